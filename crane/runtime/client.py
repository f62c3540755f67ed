"""A worker's side of the engine socket: `Link` for asyncio, `LinkThread` for threads.

A Link finds the engine or starts it (see `launch`), keeps one connection, and
hands every request group a `Stream`. When the engine is lost, every open stream
gets an error at once; nothing is retried on the client's behalf. Torch-free.
"""

import asyncio
import contextlib
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from crane import __version__
from crane.errors import EngineError, SettingsError
from crane.runtime import launch
from crane.runtime.settings import Settings
from crane.runtime.stream import RETRY_S, BlockingStream, Stream
from crane.runtime.types import (
    Abort, Accepted, Call, EngineInfo, Generate, Hello, Leave, Rejected, Reply, Resume, State, Step,
)
from crane.runtime.wire import PROTOCOL, FrameReader, WireError, pack

log = logging.getLogger("crane.link")

# An engine that accepts a connection and says nothing for so long is stuck.
GREETING_S = 10.0
POLL_S = 0.05
LINGER_S = 0.001  # messages to the engine wait no longer for others


class _Connection(asyncio.Protocol):
    """One connection to an engine. greeting: True once it has spoken, False when it ends silent."""

    def __init__(self, link: "Link"):
        self._link = link
        self._reader = FrameReader("api")
        self.greeting: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.lost = asyncio.Event()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport) -> None:
        self.transport = transport
        transport.write(pack(Hello(PROTOCOL, os.getpid(), __version__)))

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                if not self.greeting.done():  # the first message is a State
                    self._link.adopt(self)
                    self.greeting.set_result(True)
                self._link.receive(message)
        except WireError as error:
            log.error("the engine's link is cut: %s", error)
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.greeting.done():
            self.greeting.set_result(False)
        self.lost.set()


class Link:
    """This worker's connection to the engine. Make it anywhere; everything else belongs to one loop.

    arbiter_pid: the process whose workers share the engine (default: our parent). on_halt(reason) is called
    when the engine could not start even once. on_state: callables that get every new State.
    """

    def __init__(self, settings: Settings, *, arbiter_pid: int | None = None,
                 command: Sequence[str] = launch.ENGINE_COMMAND,
                 on_halt: Callable[[str], None] = launch.halt_server):
        self.settings = settings
        self.state = State("starting")
        self.on_state: list[Callable[[State], None]] = []
        self._arbiter_pid = arbiter_pid
        self._command = command
        self._on_halt = on_halt
        self._place: launch.Meeting | None = None
        self._arbiter: launch.Arbiter | None = None
        self._connection: _Connection | None = None
        self._engine: subprocess.Popen | None = None
        self._streams: dict[str, Stream] = {}
        self._touched: dict[Stream, None] = {}
        self._unsent: list[bytes] = []
        self._unsent_since_s = 0.0
        self._calls: dict[int, asyncio.Future] = {}
        self._num_calls = 0
        self._changed = asyncio.Event()
        self._was_ready = False
        self._halted = False
        self._task: asyncio.Task | None = None

    # for the API

    def start(self) -> None:
        """Connect or start the engine, and stay connected, in the background. Call on the loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="engine link")

    async def stop(self) -> None:
        """Leave the engine. Open streams end as lost."""
        if self._task is not None:
            self._was_ready = False  # leaving is no news
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        self._drop()

    async def ready(self, timeout_s: float) -> EngineInfo:
        """Wait until the engine is ready. Raises EngineError when it has failed or time is up."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.state.status not in ("ready", "failed"):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass
        self._check_ready()
        return self.state.info

    def open(self, requests: Sequence[Generate]) -> Stream:
        """Send the requests, of a large group the first ones.

        Raises EngineError at once when the engine is not ready or a rid is in use.
        """
        self._check_ready()
        rids = [request.rid for request in requests]
        taken = next((rid for i, rid in enumerate(rids) if rid in self._streams or rid in rids[:i]), None)
        if taken is not None:
            raise EngineError("duplicate_rid", f"a request with id {taken!r} is running")
        try:
            frames = [pack(request) for request in requests]
        except WireError as error:
            raise EngineError("too_long", f"the request is too large: {error}") from None
        # half of the queue at most is for one group
        stream = Stream(self, requests, frames, max(self.settings.max_queue // 2, 1))
        self._streams.update(dict.fromkeys(rids, stream))
        return stream

    def resume(self, requests: Sequence[Generate]) -> Stream:
        """All outputs, from the first one, of requests in the journal, whoever sent them."""
        if self.state.status != "draining":
            self._check_ready()
        for earlier in {self._streams[request.rid] for request in requests if request.rid in self._streams}:
            earlier.hand_over()
        stream = Stream(self, requests, [pack(Resume(request.rid)) for request in requests], len(requests))
        self._streams.update(dict.fromkeys([request.rid for request in requests], stream))
        return stream

    async def call(self, op: str, payload: Any = None, timeout_s: float = 30.0) -> Any:
        """Ask the engine. Raises EngineError: not ready, no answer in time, or the engine's own message."""
        if self.state.status not in ("ready", "draining"):
            self._check_ready()
        self._num_calls += 1
        number = self._num_calls
        answer = self._calls[number] = asyncio.get_running_loop().create_future()
        self.send(pack(Call(number, op, payload)))
        try:
            async with asyncio.timeout(timeout_s):
                reply = await answer
        except TimeoutError:
            raise EngineError("internal", f"no answer to {op!r} within {timeout_s:g} s") from None
        finally:
            self._calls.pop(number, None)
        if reply.error is not None:
            raise EngineError("internal", reply.error)
        return reply.payload

    def abort(self, rid: str | None, index: int | None = None) -> None:
        """End a request of any worker, one choice of it, or all requests (None).

        Unknown ids and a lost engine are no error.
        """
        if self._connection is not None:
            self.send(pack(Abort(rid, index)))

    def _check_ready(self) -> None:
        state = self.state
        if state.status == "ready":
            return
        code = "loading" if state.status == "starting" else state.status
        texts = {
            "loading": "the model is loading",
            "draining": "the server is stopping",
            "stuck": f"the engine is stuck: {state.reason}",
            "lost": state.reason or "the engine is restarting",
            "failed": f"the engine cannot serve: {state.reason}",
        }
        raise EngineError(code, texts[code], 5.0 if code == "failed" else RETRY_S)

    # for streams and the connection

    def send(self, frame: bytes) -> None:
        """In one write with all that is sent within a moment: each wakes the engine's process."""
        now_s = time.monotonic()
        if not self._unsent:
            self._unsent_since_s = now_s
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(frame)
        if now_s > self._unsent_since_s + LINGER_S:
            self._flush()

    def _flush(self) -> None:
        if self._unsent:
            self._connection.transport.write(b"".join(self._unsent))
            self._unsent.clear()

    def forget(self, rid: str) -> None:
        """The stream does not want the request any more."""
        if self._streams.pop(rid, None) is not None:
            self.abort(rid)

    def leave(self, rid: str) -> None:
        """The stream's client is gone, and may come back for the request."""
        if self._streams.pop(rid, None) is not None and self._connection is not None:
            self.send(pack(Leave(rid)))

    def ended(self, rid: str) -> None:
        self._streams.pop(rid, None)

    def touch(self, stream: Stream) -> None:
        """Deliver to it once everything that has come is taken."""
        if not self._touched:
            asyncio.get_running_loop().call_soon(self._deliver)
        self._touched[stream] = None

    def _deliver(self) -> None:
        touched, self._touched = self._touched, {}
        for stream in touched:
            stream.deliver()

    def adopt(self, connection: _Connection) -> None:
        """An engine has answered: from now on this is the connection."""
        self._connection = connection

    def receive(self, message) -> None:
        if isinstance(message, Step):
            streams = self._streams
            for output in message.outputs:
                stream = streams.get(output.rid)
                if stream is not None:
                    stream.take(output)
        elif isinstance(message, Accepted | Rejected):
            stream = self._streams.get(message.rid)
            if stream is not None:
                stream.take(message)
        elif isinstance(message, State):
            self._set(message)
            self._was_ready |= message.status == "ready"
            if message.status == "failed":  # it leaves once nobody is connected any more
                self._connection.transport.abort()
        elif isinstance(message, Reply):
            answer = self._calls.get(message.id)
            if answer is not None and not answer.done():
                answer.set_result(message)

    def _set(self, state: State) -> None:
        if state == self.state:
            return
        self.state = state
        self._changed.set()
        for callback in self.on_state:
            callback(state)

    # staying connected

    async def _run(self) -> None:
        while True:
            connection = None
            try:
                if self._place is None:
                    self._place = launch.meeting(self.settings, self._arbiter_pid or launch.own_arbiter())
                    self._arbiter = launch.Arbiter(self._place.arbiter_pid)
                connection = await self._connect_or_start()
            except SettingsError as error:  # the run folder cannot be used
                self._give_up(str(error), halt=True)
            except OSError as error:  # no process to be had, an engine that is stuck, ...
                self._set(State("lost", reason=f"cannot reach the engine: {error}"))
            except Exception as error:  # without this loop the worker would never have an engine again
                log.exception("cannot reach the engine")
                self._set(State("lost", reason=f"cannot reach the engine: {type(error).__name__}"))
            if connection is not None:
                await connection.lost.wait()
                self._drop()
            await asyncio.sleep(RETRY_S if self.state.status == "failed" else POLL_S)

    def _drop(self) -> None:
        """The connection is of no more use: everything that waited on it is told."""
        if self._connection is not None:
            self._connection.transport.abort()
            self._connection = None
        self._unsent.clear()
        streams = set(self._streams.values())
        if self._was_ready:
            how = f"failed: {self.state.reason}" if self.state.status == "failed" else "has left"
            log.warning("the engine %s (%d open requests end with an error)", how, len(self._streams))
        self._was_ready = False
        self._streams.clear()
        if self.state.status != "failed":
            self._set(State("lost"))
        for stream in streams:
            stream.lose()
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(EngineError("lost", "the engine ended before it answered", RETRY_S))

    async def _connect_or_start(self) -> _Connection | None:
        """A greeted connection, or None: try again later. Starts the engine when nobody answers."""
        connection = await self._connect()
        if connection is not None:
            return connection
        if self._place.arbiter_pid is None:
            raise OSError(f"nobody listens on {self._place.socket}")
        if self._arbiter.gone:
            return None  # we are about to end, too
        with launch.locked(self._place) as fd:
            if fd is None:
                return None  # another worker is at it
            connection = await self._connect()
            if connection is not None:
                return connection
            record = launch.read_record(fd)
            if record.starting:
                return None
            if record.exhausted:
                reason = record.reason or f"the engine died while it was loading{self._exit_text()}"
                return self._give_up(reason, halt=not record.was_ready)
            if record.attempts:
                await asyncio.sleep(RETRY_S * 2**record.attempts)
            self._place.socket.unlink(missing_ok=True)
            launch.sweep()
            return await self._start_engine(fd, launch.Record(record.was_ready, record.attempts + 1))

    def _give_up(self, reason: str, halt: bool) -> None:
        if self.state.status != "failed" or self.state.reason != reason:
            self._set(State("failed", reason=reason))
            if not halt:
                log.error("no engine any more: %s", reason)
        if halt and not self._halted:
            self._halted = True
            self._on_halt(reason)

    def _exit_text(self) -> str:
        status = self._engine.poll() if self._engine else None
        return "" if status is None else f" (signal {-status})" if status < 0 else f" (exit status {status})"

    async def _connect(self) -> _Connection | None:
        """Connect, and wait for the first State. None when nobody listens; OSError when it says nothing."""
        loop = asyncio.get_running_loop()
        try:
            path = str(self._place.socket)
            _, connection = await loop.create_unix_connection(lambda: _Connection(self), path)
        except (FileNotFoundError, ConnectionError):
            return None
        try:
            async with asyncio.timeout(GREETING_S):  # not wait_for: it can swallow stop()'s cancellation
                greeted = await connection.greeting
        except TimeoutError:
            connection.transport.abort()
            raise OSError(f"it accepts connections on {self._place.socket} and says nothing") from None
        return connection if greeted else None

    async def _start_engine(self, fd: int, record: launch.Record) -> _Connection | None:
        """Start it and wait until it listens. Holding the lock `fd`, so that nobody starts a second one."""
        self._engine = launch.spawn(self.settings, self._place, self._command)
        record.pid, record.started_s = self._engine.pid, time.monotonic()
        launch.write_record(fd, record)
        threading.Thread(target=self._engine.wait, daemon=True).start()  # else it would stay a zombie
        deadline = asyncio.get_running_loop().time() + launch.BIND_S
        while self._engine.poll() is None and asyncio.get_running_loop().time() < deadline:
            connection = await self._connect()
            if connection is not None:
                return connection
            await asyncio.sleep(0.02)
        return None


class LinkThread:
    """A Link on a loop of its own in a daemon thread, for WSGI. Methods block, and any thread may call them.

    Start it in the process that uses it: a thread does not survive a fork.
    """

    def __init__(self, settings: Settings, **options):
        self._link = Link(settings, **options)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    @property
    def settings(self) -> Settings:
        return self._link.settings

    @property
    def state(self) -> State:
        return self._link.state

    @property
    def on_state(self) -> list[Callable[[State], None]]:
        """Called on the link's thread."""
        return self._link.on_state

    def start(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="engine link", daemon=True).start()
                self._loop.call_soon_threadsafe(self._link.start)

    def stop(self) -> None:
        """Leave the engine. Open streams end as lost."""
        with self._lock:
            if self._loop is not None:
                self._wait(self._link.stop())
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._loop = None

    def ready(self, timeout_s: float) -> EngineInfo:
        return self._wait(self._link.ready(timeout_s))

    def open(self, requests: Sequence[Generate]) -> BlockingStream:
        async def on_loop():
            return self._link.open(requests)

        return BlockingStream(self._wait(on_loop()), self._loop)

    def resume(self, requests: Sequence[Generate]) -> BlockingStream:
        async def on_loop():
            return self._link.resume(requests)

        return BlockingStream(self._wait(on_loop()), self._loop)

    def call(self, op: str, payload: Any = None, timeout_s: float = 30.0) -> Any:
        return self._wait(self._link.call(op, payload, timeout_s))

    def abort(self, rid: str | None, index: int | None = None) -> None:
        self._loop.call_soon_threadsafe(self._link.abort, rid, index)

    def _wait(self, coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
