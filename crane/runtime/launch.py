"""Where the engine's socket is, and who may start the engine.

All workers of one gunicorn master (their parent, the arbiter) with the same
engine settings meet at one socket in a private run folder. Whoever finds nobody
there takes the lock beside it and starts the engine; under the same lock the
engine leaves. The lock file carries a `Record` of how starting went so far, so
that workers agree on when to give up. Torch-free.
"""

import asyncio
import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import select
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from crane.errors import SettingsError
from crane.runtime.settings import Settings, variable

# Shorter than sun_path everywhere (104 bytes on macOS, 108 on Linux).
MAX_SOCKET_PATH_BYTES = 100
# Once it has been ready, the engine may fail to come back this many times in a row.
MAX_ATTEMPTS = 3
ENGINE_COMMAND = (sys.executable, "-m", "crane.runtime.server")
# A started engine has this long to listen; loading comes after that.
BIND_S = 60.0
# gunicorn stops altogether when a worker exits with this code, instead of starting another
EXIT_HALT = 3
# Settings that the engine does not look at: changing them needs no other engine.
API_SETTINGS = frozenset(
    ("model_name", "reasoning_field", "host", "port", "workers", "engine_socket", "response_store", "api_key",
     "api_key_file", "isolate_keys", "user_special_tokens", "metrics_key", "cors_origins", "access_log", "audit_log",
     "worker_swap", "log_level", "metric_aliases", "incremental_streaming_output",
     "max_body", "max_prompt_chars", "max_messages", "max_tools", "max_n", "max_logprobs", "max_stop", "max_stop_chars",
     "max_logit_bias", "max_schema", "max_connections", "header_timeout_s", "body_timeout_s", "write_timeout_s")
)  # fmt: skip


class Record(msgspec.Struct):
    """What is known about this engine's starts.

    was_ready: it has been ready once. attempts: starts since it was last ready; pid and started_s (on the
    clock that never steps, the same for all processes): of the last of them.
    reason: why the last one failed, as far as it could say.
    """

    was_ready: bool = False
    attempts: int = 0
    reason: str = ""
    pid: int = 0
    started_s: float = 0.0

    @property
    def starting(self) -> bool:
        """Somebody started an engine that may yet listen, and was killed while waiting for that."""
        return self.pid > 0 and 0 <= time.monotonic() - self.started_s < BIND_S and alive(self.pid)

    @property
    def exhausted(self) -> bool:
        """No further start makes sense: a first start is tried once, a restart MAX_ATTEMPTS times."""
        return self.attempts >= (MAX_ATTEMPTS if self.was_ready else 1)


@dataclass(frozen=True)
class Meeting:
    """Where the workers of one arbiter and their engine meet.

    arbiter_pid: None for an engine that somebody else starts and stops.
    """

    socket: Path
    arbiter_pid: int | None

    @property
    def lock(self) -> Path:
        return self.socket.with_name(self.socket.name + ".lock")


def meeting(settings: Settings, arbiter_pid: int) -> Meeting:
    """The meeting place of these settings' engine under this arbiter. Raises SettingsError."""
    if settings.engine_socket:
        return Meeting(_checked(Path(settings.engine_socket).absolute()), None)
    wanted = [f"{spec.name}={getattr(settings, spec.name)!r}" for spec in dataclasses.fields(settings)
              if spec.name not in API_SETTINGS and spec.name != "model_path"]
    wanted += [os.path.abspath(settings.model_path), process_start(arbiter_pid)]
    digest = hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:12]
    return Meeting(_checked(run_dir() / f"{arbiter_pid}-{digest}.sock"), arbiter_pid)


def _checked(path: Path) -> Path:
    if len(os.fsencode(path)) >= MAX_SOCKET_PATH_BYTES:
        limit = MAX_SOCKET_PATH_BYTES
        raise SettingsError(f"the engine socket's path must be shorter than {limit} bytes: {path}")
    return path


def run_dir() -> Path:
    """This user's private folder for sockets, made when absent. Raises SettingsError if it is not private."""
    folder = Path(tempfile.gettempdir()) / f"crane-{os.geteuid()}"
    if len(os.fsencode(folder)) > MAX_SOCKET_PATH_BYTES - 40:
        folder = Path("/tmp") / folder.name
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise SettingsError(f"{folder} must be a folder of this user with mode 0700; remove it")
    return folder


def own_arbiter() -> int:
    """Whose workers share an engine with this process: its gunicorn master's, else nobody else's.

    A gunicorn worker spends its life inside the master's `spawn_worker`; being its child is not enough, since
    whatever a test or an embedding program imports, its parent is not its master.
    """
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None:
        if frame.f_code.co_name == "spawn_worker" and frame.f_globals.get("__name__") == "gunicorn.arbiter":
            return frame.f_locals["self"].pid
        frame = frame.f_back
    return os.getpid()


def process_start(pid: int) -> str:
    """When the process started, in whatever unit the system has; "" where it cannot be told.

    Tells a process from a later one that got the same pid.
    """
    return "".join(_stat(pid)[19:20])


def _stat(pid: int) -> list[str]:
    """What Linux says about a process, from its state on; nothing elsewhere."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def alive(pid: int) -> bool:
    """Whether there is such a process. One that has ended, and whose parent has not asked, is none on Linux."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _stat(pid)[:1] != ["Z"]


class Arbiter:
    """Whether the process that the workers belong to still runs. pid None: nobody to watch."""

    def __init__(self, pid: int | None):
        self._pid = pid
        self._fd = None
        if pid is not None and hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # not there any more, or not allowed here: ask by pid
                self._fd = os.pidfd_open(pid)

    def watch(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
        """Have `callback` called once when it has ended, where the system can tell; else somebody has to ask."""

        def end() -> None:
            loop.remove_reader(self._fd)
            callback()

        if self._fd is not None:
            loop.add_reader(self._fd, end)

    @property
    def gone(self) -> bool:
        if self._pid is None:
            return False
        if self._fd is not None:  # readable once the process has ended
            return bool(select.select([self._fd], [], [], 0)[0])
        return not alive(self._pid)


@contextlib.contextmanager
def locked(place: Meeting) -> Iterator[int | None]:
    """Try to hold the meeting's lock: yields the lock file's descriptor, or None when another holds it."""
    fd = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        # the holder before us may have removed the file: then this lock guards nothing
        if not _same_file(fd, place.lock):
            yield None
            return
        yield fd
    finally:
        os.close(fd)


def _same_file(fd: int, path: Path) -> bool:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (mine.st_dev, mine.st_ino) == (found.st_dev, found.st_ino)


def read_record(fd: int) -> Record:
    """The record in a lock file that is held."""
    try:
        return msgspec.json.decode(os.pread(fd, 1 << 16, 0), type=Record)
    except msgspec.MsgspecError:
        return Record()  # new, or cut short by a crash: nothing is known


def write_record(fd: int, record: Record) -> None:
    """Replace the record in a lock file that is held. By one write: who is killed leaves the old or the new one."""
    os.pwrite(fd, msgspec.json.encode(record).ljust(os.fstat(fd).st_size), 0)


def spawn(settings: Settings, place: Meeting, command: Sequence[str] = ENGINE_COMMAND) -> subprocess.Popen:
    """Start the engine: exec'ed, in its own session, so that Ctrl-C stops the workers first and they drain.

    Settings travel as arguments, so that the engine has exactly this worker's, wherever they came from.
    """
    if settings.model_path:
        settings = dataclasses.replace(settings, model_path=os.path.abspath(settings.model_path))
    # every user of the machine can read arguments, and the engine asks for no key
    settings = dataclasses.replace(settings, api_key="")
    wanted = [f"{name}={value}" for name, value in settings.to_env().items()]
    arguments = ["--socket", str(place.socket), "--arbiter-pid", str(place.arbiter_pid), *wanted]
    return subprocess.Popen(
        [*command, *arguments],
        stdin=subprocess.DEVNULL,
        cwd=Path(__file__).resolve().parents[2],  # `crane` is importable there, whatever changed sys.path
        start_new_session=True,
        close_fds=True,
    )


@contextlib.contextmanager
def engine_ahead(settings: Settings, arbiter_pid: int, command: Sequence[str] = ENGINE_COMMAND) -> Iterator[None]:
    """Start the engine before there are workers, so that it loads while the body prepares for them.

    They find it on record as if one of them had started it. A body that fails ends it.
    """
    place = meeting(settings, arbiter_pid)
    engine = None
    if place.arbiter_pid is not None:  # else somebody else starts it
        with locked(place) as fd:
            if fd is not None:
                sweep()
                engine = spawn(settings, place, command)
                write_record(fd, Record(attempts=1, pid=engine.pid, started_s=time.monotonic()))
    try:
        yield
    except BaseException:
        if engine is not None:
            engine.kill()
            engine.wait()
            place.socket.unlink(missing_ok=True)
            place.lock.unlink(missing_ok=True)
        raise


def settings_from_arguments(pairs: Sequence[str]) -> Settings:
    """Settings from NAME=VALUE arguments as `spawn` writes them; without any, from the environment."""
    if not pairs:
        return Settings.from_env()
    for pair in pairs:
        if not pair.startswith("CRANE_") or "=" not in pair:
            raise SettingsError(f"expected CRANE_NAME=VALUE such as {variable('page_size')}=16, got {pair!r}")
    return Settings.from_env(dict(pair.split("=", 1) for pair in pairs))


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, mode 0600. Replaces a stale file; a live listener is a SettingsError."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if path.is_socket():
        if _answers(path):
            raise SettingsError(f"another engine listens on {path}")
        path.unlink()
    umask = os.umask(0o177)
    try:
        server.bind(str(path))
    except OSError as error:
        raise SettingsError(f"cannot listen on {path}: {error.strerror}") from None
    finally:
        os.umask(umask)
    server.listen(128)
    server.setblocking(False)
    return server


def unlink_own(path: Path, inode: tuple[int, int]) -> None:
    """Remove a socket file unless it is another engine's by now. inode: (st_dev, st_ino) of ours."""
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(path)
        if (found.st_dev, found.st_ino) == inode:
            path.unlink()


def sweep() -> None:
    """Remove what killed servers left in the run folder: dead sockets at once, notes after a day.

    Processes of another container may share the folder: a pid that looks dead here is not proof enough.
    """
    for path in run_dir().iterdir():
        pid = path.name.partition("-")[0]
        if not pid.isdigit() or alive(int(pid)):
            continue
        with contextlib.suppress(FileNotFoundError):
            if path.is_socket():
                stale = not _answers(path)
            else:
                stale = time.time() - path.stat().st_mtime > 86400
            if stale:
                path.unlink()


def _answers(path: Path) -> bool:
    """Whether a process listens on the socket file."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def claim(what: str, arbiter_pid: int) -> bool:
    """True for the first process under this arbiter that asks for `what`: for things to do or say once."""
    try:
        os.close(os.open(note_path(what, arbiter_pid), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


def claimed(what: str, arbiter_pid: int) -> bool:
    """Whether a process under this arbiter has claimed `what`."""
    return note_path(what, arbiter_pid).exists()


def note_path(what: str, arbiter_pid: int) -> Path:
    """A file in the run folder for this arbiter's processes, removed when it is gone."""
    return run_dir() / f"{arbiter_pid}-{process_start(arbiter_pid)}.{what}"


def clear(arbiter_pid: int) -> None:
    """Remove the notes (not the sockets) of an arbiter that is gone or about to be."""
    for path in run_dir().glob(f"{arbiter_pid}-*"):
        if not path.is_socket():
            path.unlink(missing_ok=True)


def halt_server(reason: str) -> None:
    """The server can never work: say why in one line and make the arbiter stop with EXIT_HALT.

    Only the first worker to know does so and does not return: two workers that exit this way trip gunicorn.
    """
    if not claim("halted", own_arbiter()):
        return
    print(f"crane: {reason}", file=sys.stderr, flush=True)
    os._exit(EXIT_HALT)  # from any thread; nothing has been served yet


def log_to_stderr(settings: Settings) -> None:
    """Show the `crane` loggers on stderr, once per process, in gunicorn's format."""
    logger = logging.getLogger("crane")
    logger.setLevel(settings.log_level.upper())
    if not logger.handlers:
        handler = logging.StreamHandler()
        line = "[%(asctime)s] [%(process)d] [%(levelname)s] %(message)s"
        handler.setFormatter(logging.Formatter(line, "%Y-%m-%d %H:%M:%S %z"))
        logger.addHandler(handler)
        logger.propagate = False
