"""KV pages in a folder, kept across restarts: one file a page, read and written by one thread. Torch-free.

A file's name is the SHA-256 of all that decides its content: the model (`fingerprint`), the salt, and every token up to
the page's last. Before a page is used its file's checksum and the tokens in it are compared, in full. A file that is
not what it should be is removed. Several engines may share a folder: files appear whole or not at all, and
whatever vanishes is a miss.

    file: "crane-kv" | fingerprint | name | number of tokens, uint32 | tokens, uint32 each | page | SHA-256 of all that
"""

import dataclasses
import errno
import hashlib
import logging
import os
import queue
import secrets
import shutil
import stat
import struct
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from crane import __version__
from crane.errors import SettingsError
from crane.models.config import ModelConfig
from crane.models.files import Checkpoint

log = logging.getLogger("crane.engine")

_MAGIC = b"crane-kv"
_HEAD = struct.Struct("<8s32s32sI")
# A temporary file so old belongs to nobody any more.
_STALE_S = 3600.0
# Beyond its size the folder shrinks to this part of it, so that this is not done for every page.
_SHRUNK = 0.9


def fingerprint(checkpoint: Checkpoint, config: ModelConfig, layout: tuple, rounding: tuple) -> bytes:
    """SHA-256 of all that decides what a page of this text contains: every byte of the weights, how they are
    understood, the pages' layout (type and shape), and what else decides how their content is rounded."""
    digest = hashlib.sha256(repr((__version__, dataclasses.asdict(config), layout, rounding)).encode())
    path = checkpoint.path
    files = [path] if checkpoint.format == "gguf" else sorted((*path.glob("*.safetensors"), path / "config.json"))
    for each in files:
        with open(each, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.digest()


def root_name(print_: bytes, salt: str) -> bytes:
    """What the first page of a text is named after."""
    return hashlib.sha256(print_ + salt.encode("utf-8", "surrogatepass")).digest()


def next_name(name: bytes, tokens: tuple[int, ...]) -> bytes:
    """The name of the page that has `tokens` behind the page called `name`."""
    return hashlib.sha256(name + array("I", tokens).tobytes()).digest()


@dataclass(eq=False)
class Job:
    """Pages to be written or read: (name, every token up to its last as uint32, buffer) each, in the text's order.

    num_done: how many were; of a read the first so many are in their buffers. epoch: the flushes before it.
    """

    kind: str  # "write" | "read" | "flush"
    pages: list[tuple[bytes, memoryview, memoryview]]
    epoch: int
    num_done: int = 0
    seconds: float = 0.0


class DiskTier:
    """Files of pages in `folder`, `max_bytes` of them at most (those of other models counted; 0: a tenth of what
    the disk has free).

    print_of: computes the model's fingerprint, on the thread; until it is there nothing is found and nothing
    written. Raises SettingsError when the folder cannot be used.
    """

    def __init__(self, folder: str, max_bytes: int, page_bytes: int, print_of: Callable[[], bytes]):
        self.root = Path(folder).expanduser()
        self.page_bytes = page_bytes
        self.print: bytes | None = None
        self.finished: deque[Job] = deque()
        self.num_files = self.num_bytes = 0  # as last counted, of all models
        self.num_written = self.num_read = self.num_bad = 0
        self.writable = True
        self.epoch = 0  # counts flushes
        self._print_of = print_of
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._num_flushing = 0
        self._warned: set[str] = set()
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = _temporary(self.root)
            os.close(_create(probe))
            probe.unlink()
            self.max_bytes = max_bytes or shutil.disk_usage(self.root).free // 10
        except OSError as error:
            raise SettingsError(f"--kv-cache-dir {folder} cannot be used: {error.strerror}") from None
        self._thread = threading.Thread(target=self._run, name="kv-disk", daemon=True)
        self._thread.start()

    # --- from the engine's thread

    @property
    def ready(self) -> bool:
        return self.print is not None and not self._num_flushing

    def has(self, name: bytes) -> bool:
        """Whether there is a file of this page; whether it is sound shows when it is read."""
        return self.ready and os.path.exists(self._path(name))

    def submit(self, job: Job) -> None:
        """Start writing or reading; the buffers are the thread's until the job is in `finished`."""
        self._jobs.put(job)

    def flush(self) -> None:
        """Remove all files of this model; from now on nothing is found that was there."""
        self._num_flushing += 1
        self.epoch += 1
        self.submit(Job("flush", [], self.epoch))

    def close(self, timeout_s: float = 10.0) -> None:
        """Finish what was submitted, as far as the time goes."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        self.writable = False  # for a thread that is still at it

    # --- the thread

    def _run(self) -> None:
        try:
            self.print = self._print_of()
            self._shrink()
        except Exception as error:  # the cache is no reason to stop serving
            self._stop_writing(error)
        while (job := self._jobs.get()) is not None:
            started_s = time.perf_counter()
            count = 0
            try:
                count = getattr(self, f"_{job.kind}")(job)
            except Exception as error:  # as above; and whoever waits for the job must go on
                self._stop_writing(error)
            else:
                self._num_flushing -= job.kind == "flush"  # what could not be removed must not be found
            job.seconds = time.perf_counter() - started_s
            job.num_done = count
            self.finished.append(job)

    def _write(self, job: Job) -> int:
        count = 0
        for page in job.pages:
            if not self.writable or job.epoch != self.epoch:
                break
            count += self._write_page(*page)
        if self.num_bytes > self.max_bytes:
            self._shrink()
        return count

    def _write_page(self, name: bytes, tokens: memoryview, buffer: memoryview) -> bool:
        path = self._path(name)
        if path.exists():
            _touch(path)
            return False
        self._folder().mkdir(mode=0o700, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = _temporary(path.parent)
        parts = (_HEAD.pack(_MAGIC, self.print, name, len(tokens)), tokens.tobytes(), buffer)
        digest = hashlib.sha256()
        try:
            with os.fdopen(_create(temporary), "wb", buffering=0) as file:
                for part in parts:
                    digest.update(part)
                    _write_all(file, part)
                _write_all(file, digest.digest())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self.num_written += 1
        self.num_files += 1
        self.num_bytes += self._file_bytes(len(tokens))
        return True

    def _read(self, job: Job) -> int:
        for place, (name, tokens, buffer) in enumerate(job.pages):
            if job.epoch != self.epoch:
                return 0
            path = self._path(name)
            try:
                with open(path, "rb", buffering=0, opener=_open_regular) as file:
                    problem = self._read_page(file, name, tokens, buffer)
            except FileNotFoundError:
                return place
            except OSError as error:
                problem = error.strerror
            if problem:
                self._remove(path, problem)
                return place
            self.num_read += 1
            _touch(path)
        return len(job.pages)

    def _read_page(self, file, name: bytes, tokens: memoryview, buffer: memoryview) -> str | None:
        """What is wrong with a file, or None: then its page is in the buffer."""
        if os.fstat(file.fileno()).st_size != self._file_bytes(len(tokens)):
            return "wrong size"
        head = file.read(_HEAD.size + 4 * len(tokens))
        if head[: _HEAD.size] != _HEAD.pack(_MAGIC, self.print, name, len(tokens)):
            return "not a page of this model"
        if head[_HEAD.size :] != tokens.tobytes():
            return "other tokens"
        view, filled = memoryview(buffer), 0
        while filled < len(view):
            count = file.readinto(view[filled:])
            if not count:
                return "cut short"
            filled += count
        digest = hashlib.sha256(head)
        digest.update(buffer)
        return None if file.read(33) == digest.digest() else "wrong checksum"

    def _flush(self, job: Job) -> int:
        for path, _ in self._files(self._folder()):
            path.unlink(missing_ok=True)
        self._shrink()
        return 0

    def _shrink(self) -> None:
        """Count the files of all models, and remove those not used for the longest time while they are too many."""
        found = sorted(self._files(self.root), key=lambda item: item[1].st_mtime)
        total = sum(status.st_size for _, status in found)
        removed = 0
        if total > self.max_bytes:
            for path, status in found:
                if total <= self.max_bytes * _SHRUNK:
                    break
                path.unlink(missing_ok=True)
                total -= status.st_size
                removed += 1
        self.num_files, self.num_bytes = len(found) - removed, total

    def _files(self, folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
        """Our files below a folder, whichever engine wrote them; temporary ones that were left behind are removed."""
        for parent, folders, names in os.walk(folder):
            for name in names:
                path = Path(parent, name)
                ours = path.suffix == ".kv" and len(path.stem) == 64 and path.stem.startswith(path.parent.name)
                try:
                    status = path.lstat()
                    if ours:
                        yield path, status
                    elif name.startswith(".tmp-") and time.time() - status.st_mtime > _STALE_S:
                        path.unlink()
                except OSError:
                    continue  # another engine was faster

    def _folder(self) -> Path:
        return self.root / self.print.hex()[:16]

    def _path(self, name: bytes) -> Path:
        text = name.hex()
        return self._folder() / text[:2] / f"{text}.kv"

    def _file_bytes(self, num_tokens: int) -> int:
        return _HEAD.size + 4 * num_tokens + self.page_bytes + 32

    def _remove(self, path: Path, problem: str) -> None:
        self.num_bad += 1
        self._warn("bad", f"{path} is removed: {problem}; more of the kind will be removed silently")
        try:
            path.unlink(missing_ok=True)
        except OSError:
            pass  # then it is looked at in vain again, that is all

    def _stop_writing(self, error: Exception) -> None:
        self.writable = False
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        self._warn("write", f"nothing more is written to {self.root}: {reason}")

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("KV cache on disk: %s", message)


def _temporary(folder: Path) -> Path:
    """A name that nobody else uses; process ids may be the same in two containers."""
    return folder / f".tmp-{secrets.token_hex(16)}"


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _open_regular(path: str, flags: int) -> int:
    """Opens no link, and does not wait for whoever may open the other end of a pipe. Raises OSError."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file")


def _write_all(file, data) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view) :]


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError:
        pass  # it says only when the file was last used
