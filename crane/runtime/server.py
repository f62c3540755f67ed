"""The engine process: `python -m crane.runtime.server`.

The main thread runs an asyncio loop that owns the socket, the signals and the
decision to leave; one other thread loads the engine and steps it. The engine
binds before it loads, so that workers can watch it load.
"""

import argparse
import asyncio
import contextlib
import gc
import itertools
import logging
import mmap
import operator
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from crane import __version__, kernels
from crane.errors import CraneError
from crane.runtime import launch
from crane.runtime.settings import Settings, num_cores, prefer_waiting_threads
from crane.runtime.stepper import Stepper
from crane.runtime.types import (
    Abort, Call, EngineInfo, Generate, Hello, Leave, Rejected, Reply, Resume, State,
)  # fmt: skip
from crane.runtime.wire import PROTOCOL, FrameReader, WireError, pack

log = logging.getLogger("crane.engine")

# A worker that leaves this much unread for STALL_S, or sixteen times as much, is stuck: its link is cut,
# so that it costs no more memory. One big answer alone is no reason.
MAX_UNREAD_BYTES = 16 << 20
STALL_S = 5.0
# A new engine waits at least this long for its first worker.
FIRST_LINK_S = 30.0
# After the arbiter's end its workers have this long to notice and leave.
ORPHAN_S = 3.0
# A failed engine stays this long for workers that want to know why.
FAILED_S = 1.0
TICK_S = 0.25
# With workers and nothing to compute there is nothing to watch but them, and they make themselves heard.
IDLE_TICK_S = 2.0
# A worker that starts us holds the lock for moments; a stopped one must not keep us from serving.
LOCK_TICK_S = 0.02
RECORD_S = 2.0
# See `_memory_at_hand`. Bytes: less is there at once; more is not touched while torch is imported.
_LEAST_TOUCHED, _MOST_TOUCHED = 64 << 20, 1 << 30
_TOUCH = """import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
for at in range(0, len(memory), 2 << 20): memory[at] = 1"""


class Peer(asyncio.Protocol):
    """One worker's connection."""

    def __init__(self, server: "Server"):
        self._server = server
        self._reader = FrameReader("engine")
        self._greeted = False
        self._behind_since_s: float | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport) -> None:
        self.transport = transport
        self._server.join(self)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                self._take(message)
        except WireError as error:
            log.warning("a worker's link is cut: %s", error)
            self.transport.abort()

    def _take(self, message) -> None:
        if self._greeted:
            self._server.receive(self, message)
        elif isinstance(message, Hello) and message.protocol == PROTOCOL and message.version == __version__:
            self._greeted = True
        elif isinstance(message, Hello):
            ours, theirs = f"{__version__} ({PROTOCOL})", f"{message.version} ({message.protocol})"
            reason = f"the engine is crane {ours}, the API worker {theirs}: they must be the same"
            self.send(State("failed", reason=reason))
            self.transport.close()
        else:
            raise WireError(f"expected Hello, got {type(message).__name__}")

    def connection_lost(self, error: Exception | None) -> None:
        self._server.part(self)

    def send(self, *messages) -> None:
        """In one write. Never waits: what the worker does not read is buffered, within limits."""
        if self.transport.is_closing():
            return
        try:
            self.transport.write(b"".join(map(pack, messages)))
        except WireError as error:
            log.error("a worker's link is cut: %s", error)
            self.transport.abort()
            return
        unread_bytes, now = self.unread_bytes, time.monotonic()
        if unread_bytes <= MAX_UNREAD_BYTES:
            self._behind_since_s = None
            return
        self._behind_since_s = self._behind_since_s or now
        if now - self._behind_since_s > STALL_S or unread_bytes > 16 * MAX_UNREAD_BYTES:
            log.warning("a worker left %d bytes unread: its link is cut", unread_bytes)
            self.transport.abort()

    @property
    def unread_bytes(self) -> int:
        """What has been sent and the kernel has not taken yet."""
        return self.transport.get_write_buffer_size()


class Server:
    """The loop's side of the engine process. Everything here runs on the loop's thread."""

    def __init__(self, settings: Settings, place: launch.Meeting, engine_factory: Callable):
        self.settings = settings
        self.place = place
        self.state = State("loading")
        self.peers: set[Peer] = set()
        self._factory = engine_factory
        self._arbiter = launch.Arbiter(place.arbiter_pid)
        self._stepper: Stepper | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._empty_since_s = time.monotonic()
        self._had_peer = False
        self._told_failure = False
        self._failed_s: float | None = None
        self._orphan_s: float | None = None
        self._drain_end_s: float | None = None
        self._drained = False
        self._stop_now = False
        self._loaded: EngineInfo | None = None  # loaded, and not yet announced
        self._loaded_s = 0.0
        self._stuck_since_s: float | None = None  # when the step began that is known to be stuck

    async def run(self) -> int:
        """Serve until there is nobody to serve. Returns the exit status. Raises SettingsError."""
        loop = self._loop = asyncio.get_running_loop()
        listener = launch.listen(self.place.socket)
        status = os.lstat(self.place.socket)
        server = await loop.create_unix_server(lambda: Peer(self), sock=listener)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.drain)
        self._stepper = Stepper(self.settings, self._factory, self._tell, self)
        self._stepper.start()
        self._arbiter.watch(loop, self._wake.set)
        while True:
            code = self._exit_code()
            if code is not None and self._leave(server, (status.st_dev, status.st_ino), code):
                break
            if self._loaded is not None:
                self._announce_ready()
            self._watch_step()
            self.deliver(self._stepper.held())  # of a long step
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._tick_s())
            self._wake.clear()
        await self._flush()
        return code

    def _tick_s(self) -> float:
        if self._loaded is not None:
            return LOCK_TICK_S
        idle = self.state.status == "ready" and self.peers and not self._stepper.step_since_s
        return IDLE_TICK_S if idle and not self._arbiter.gone else TICK_S

    # what peers do

    def join(self, peer: Peer) -> None:
        self.peers.add(peer)
        self._had_peer = True
        self._told_failure |= self.state.status == "failed"
        peer.send(self.state)

    def part(self, peer: Peer) -> None:
        self.peers.discard(peer)
        self._stepper.post(peer, None)
        if not self.peers:
            self._empty_since_s = time.monotonic()
            self._wake.set()

    def receive(self, peer: Peer, message) -> None:
        status = self.state.status
        kept = isinstance(message, Resume) and status == "draining"
        if isinstance(message, Generate | Resume) and status != "ready" and not kept:
            texts = {"loading": "the model is loading", "draining": "the server is stopping"}
            peer.send(Rejected(message.rid, status, texts.get(status, self.state.reason), 1.0))
        elif isinstance(message, Call) and status not in ("ready", "draining"):
            peer.send(Reply(message.id, error=f"the engine is {status}"))
        elif isinstance(message, Generate | Abort | Leave | Resume | Call):
            self._stepper.post(peer, message)
        else:
            raise WireError(f"unexpected {type(message).__name__}")

    # what the stepper reports

    def _tell(self, method: Callable, *args) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is about to end
            self._loop.call_soon_threadsafe(method, *args)

    def loading(self, loaded_bytes: int, total_bytes: int) -> None:
        if self.state.status == "loading":
            self._set(State("loading", loaded_bytes=loaded_bytes, total_bytes=total_bytes))

    def ready(self, info) -> None:
        self._loaded = info
        self._loaded_s = time.monotonic()
        self._wake.set()

    def failed(self, reason: str) -> None:
        """The stepper has ended: it could not load, or cannot go on."""
        self._told_failure = bool(self.peers)
        self._failed_s = time.monotonic()
        self._set(State("failed", reason=reason))
        self._wake.set()

    def deliver(self, messages: list) -> None:
        for peer, theirs in itertools.groupby(messages, operator.itemgetter(0)):
            peer.send(*[message for _, message in theirs])

    def drained(self) -> None:
        self._drained = True
        self._wake.set()

    # the process

    def drain(self) -> None:
        """SIGTERM: refuse what is new, finish what runs. A second signal ends at once."""
        if self.state.status not in ("ready", "stuck"):  # loading, or the second signal
            self._stop_now = True
        else:
            self._drain_end_s = time.monotonic() + self.settings.graceful_timeout_s
            self._set(State("draining", info=self.state.info))
            self._stepper.drain()
        self._wake.set()

    def _watch_step(self) -> None:
        """Say so when a step takes too long, where it is, and when it is over after all."""
        since_s, limit_s, state = self._stepper.step_since_s, self.settings.step_timeout_s, self.state
        if state.status == "stuck" and since_s != self._stuck_since_s:
            log.warning("the step that was stuck is over")
            self._set(State("ready", info=state.info))
        elif state.status == "ready" and limit_s and since_s and time.monotonic() - since_s > limit_s:
            self._stuck_since_s = since_s
            frame = sys._current_frames().get(self._stepper.ident)
            stack = "".join(traceback.format_stack(frame)) if frame else "(unknown)\n"
            log.error("a step has been running for %g s, it is here:\n%s", limit_s, stack)
            self._set(State("stuck", reason=f"a step has been running for more than {limit_s:g} s", info=state.info))

    def _set(self, state: State) -> None:
        self.state = state
        for peer in list(self.peers):
            peer.send(state)

    def _exit_code(self) -> int | None:
        """The exit status with which to leave now, or None to stay."""
        now = time.monotonic()
        if self._failed_s is not None:
            told_all = self._told_failure and not self.peers
            return 1 if told_all or now - self._failed_s > FAILED_S else None
        if self._stop_now or self._drained:
            return 0
        if self._drain_end_s is not None and now > self._drain_end_s:
            self._stepper.post(None, Abort(None))
            return 0 if now > self._drain_end_s + ORPHAN_S else None
        if self._arbiter.gone:
            self._orphan_s = self._orphan_s or now
            return 0 if not self.peers or now - self._orphan_s > ORPHAN_S else None
        if self.place.arbiter_pid is None or self.peers:
            return None
        linger_s = self.settings.linger_s if self._had_peer else max(self.settings.linger_s, FIRST_LINK_S)
        return 0 if now - self._empty_since_s >= linger_s else None

    def _leave(self, server: asyncio.Server, inode: tuple[int, int], code: int) -> bool:
        """Stop listening, under the lock: a worker that holds it is about to meet us, so then stay."""
        with launch.locked(self.place) as fd:
            if fd is None and not self._arbiter.gone:
                return False
            server.close()
            launch.unlink_own(self.place.socket, inode)
            if fd is not None:
                record = launch.read_record(fd)
                if code:
                    record.reason = self.state.reason
                else:
                    record.attempts = 0
                launch.write_record(fd, record)
                if self.place.arbiter_pid is None:
                    self.place.lock.unlink(missing_ok=True)
            if self._arbiter.gone:
                launch.clear(self.place.arbiter_pid)
        return True

    def _announce_ready(self) -> None:
        """First write it down: a worker that saw us ready must find so when we die."""
        with launch.locked(self.place) as fd:
            if fd is not None:
                launch.write_record(fd, launch.Record(was_ready=True))
            elif time.monotonic() - self._loaded_s < RECORD_S:
                return
        info, self._loaded = self._loaded, None
        self._set(State("ready", info=info))

    async def _flush(self) -> None:
        """Let the last outputs reach workers that read."""
        deadline_s = time.monotonic() + 2.0
        while any(peer.unread_bytes for peer in self.peers) and time.monotonic() < deadline_s:
            await asyncio.sleep(0.01)
        for peer in list(self.peers):
            peer.transport.abort()

    @property
    def untold_failure(self) -> str:
        """Why it failed, when nobody was told and no worker will read it in the record."""
        return "" if self._told_failure or self.place.arbiter_pid is not None else self.state.reason


@contextlib.contextmanager
def _memory_at_hand(model_path: str) -> Iterator[None]:
    """Have another process touch as much memory as the weights' files are large, then leave it to the system again.

    A host takes back what its virtual machines do not use, and a GB that it has to give anew takes it 1.5 s. In
    threads of this process others would wait for that, too.
    """
    process, path = None, Path(model_path)
    with contextlib.suppress(OSError, ValueError):  # what is wrong with the files is said when they are read
        files = [path] if path.is_file() else path.glob("*.safetensors")
        num_bytes = min(sum(file.stat().st_size for file in files), _MOST_TOUCHED)
        if num_bytes >= _LEAST_TOUCHED and num_cores() > 1 and hasattr(mmap, "MADV_HUGEPAGE"):
            process = subprocess.Popen([sys.executable, "-ISc", _TOUCH, str(num_bytes)], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def load_engine(settings: Settings, progress: Callable[[int, int], None] | None = None):
    """The real engine. Imports torch, so it is called on the stepper's thread, after the socket is bound.

    Torch and a vocabulary are a million objects that stay: Python's collector does not look through them while they
    are made, which took it a tenth of the start, nor ever after.
    """
    prefer_waiting_threads()
    gc.disable()
    try:
        with _memory_at_hand(settings.model_path):
            import torch

            kernels.use_triton = settings.kernels == "triton" or (torch.cuda.is_available() and not settings.cpu)
            from crane.runtime.engine import Engine

        return Engine(settings, progress)
    finally:
        gc.freeze()
        gc.enable()


def main(argv: Sequence[str] | None = None, engine_factory: Callable = load_engine) -> int:
    """The process: returns the exit status. engine_factory(settings, progress) -> Engine."""
    parser = argparse.ArgumentParser("python -m crane.runtime.server", description="crane's engine process.")
    parser.add_argument("--socket", help="where to listen (default: CRANE_ENGINE_SOCKET)")
    parser.add_argument("--arbiter-pid", type=int, help="leave when this process is gone (default: stay)")
    parser.add_argument("settings", nargs="*", metavar="CRANE_NAME=VALUE", help="default: the environment")
    options = parser.parse_args(argv)
    try:
        settings = launch.settings_from_arguments(options.settings)
        path = options.socket or settings.engine_socket
        if not path:
            parser.error("--socket or CRANE_ENGINE_SOCKET is needed")
        launch.log_to_stderr(settings)
        server = Server(settings, launch.Meeting(Path(path).absolute(), options.arbiter_pid), engine_factory)
        code = asyncio.run(server.run())
        if server.untold_failure:
            print(f"crane: {server.untold_failure}", file=sys.stderr)
    except CraneError as error:
        print(f"crane: {error}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the engine's thread may be deep in a load or a step; nothing is left that needs cleaning


if __name__ == "__main__":
    main()
