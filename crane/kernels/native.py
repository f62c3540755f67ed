"""The C kernels of `crane/kernels/cpu`: built once by the machine's own compiler, loaded with ctypes.

They are optional. Without a compiler, on another architecture, or when anything about them fails, everything
computes in torch; the reason is logged and shown by `reason`. A build is tried in a process of its own before it is
used, so that an instruction the machine turns out not to have cannot end the engine.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from ctypes import c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

import torch

log = logging.getLogger("crane.kernels")

SOURCES = Path(__file__).parent / "cpu"
_FLAGS = ["-O3", "-march=native", "-ffp-contract=fast", "-std=gnu11", "-shared", "-fPIC", "-pthread", "-Wno-psabi"]
_BUILD_TIMEOUT_S = 120
# what qkv_post has room for
MAX_HEAD_DIM = 1024
# A thread that waits looks for work so many times (about 20 to 100 us) before it sleeps.
SPINS = 2000
DTYPES = {torch.float32: 0, torch.bfloat16: 1}

_POINTER = c_void_p
_SIGNATURES = {
    "crane_set_threads": (None, [c_int32, c_int32]),
    "crane_hold": (None, []),
    "crane_release": (None, []),
    "crane_has_amx": (c_int32, []),
    "crane_weight_bytes": (c_int64, [_POINTER]),
    "crane_pack": (None, [_POINTER, c_int32, _POINTER, c_int64, _POINTER, _POINTER, c_int64, c_int64]),
    "crane_pack_file": (c_int32, [_POINTER] + [c_int32] * 2 + [c_int64] * 4),
    "crane_rows": (None, [_POINTER, _POINTER, c_int64, _POINTER, c_int32]),
    "crane_linear": (None, [_POINTER, _POINTER, c_int64, c_int32, _POINTER, c_int64, c_int32]),
    "crane_gated": (None, [_POINTER, _POINTER, c_int64, c_int32, _POINTER]),
    "crane_best": (c_int32, [_POINTER, _POINTER, c_int64, c_int32, c_int64] + [_POINTER] * 3),
    "crane_screen": (None, [_POINTER, _POINTER, c_uint64]),
    "crane_rms_norm": (None, [_POINTER, _POINTER, c_float, _POINTER, _POINTER, c_int64, c_int64, c_int64, c_int32]),
    "crane_silu_mul": (None, [_POINTER, _POINTER, c_int64, c_int64, c_int32]),
    "crane_qkv_post": (None, [_POINTER] * 6 + [c_int64] * 6 + [c_float, c_int32, c_int32]),
    "crane_angles": (None, [_POINTER] * 4 + [c_int64] * 2 + [c_float]),
    "crane_decode": (c_int32, [_POINTER] * 7 + [c_int64] * 9 + [c_float, c_int32]),
    "crane_prefill": (c_int32, [_POINTER] * 5 + [c_int64] * 9 + [c_float]),
    "crane_sample": (None, [_POINTER] * 10 + [c_int64] * 3),
    "crane_log_probabilities": (None, [_POINTER] * 7 + [c_int64] * 5),
    "crane_record": (c_int32, []),
    "crane_recorded": (_POINTER, []),
    "crane_forget": (None, [_POINTER]),
    "crane_num_calls": (c_int32, [_POINTER]),
    "crane_replay": (c_int32, [_POINTER] * 3),
}


class Weight(ctypes.Structure):
    """`Weight` of weight.h."""

    _fields_ = [
        ("panels", c_void_p), ("bias", c_void_p), ("num_rows", c_int64), ("num_columns", c_int64),
        ("bits", c_int32), ("groups", c_int32), ("has_offset", c_int32), ("shift", c_int32),
        ("is_paired", c_int32), ("amx_rows", c_int32),
    ]  # fmt: skip


class Screen(ctypes.Structure):
    """`Screen` of product.h."""

    _fields_ = [
        ("weight", Weight), ("num_screened", c_int64), ("num_blocks", c_int64), ("num_whole", c_int64),
        ("wait", c_int32), ("last_wait", c_int32),
    ]  # fmt: skip


class Changes(ctypes.Structure):
    """`Changes` of changes.h, whose pointers are `places`; at first none."""

    _fields_ = [("places", c_void_p * 9), ("num_words", c_int64)]

    def hold(self, changes) -> "Changes":
        """Be these from now on: a `sampling.Changes` on the CPU, or None."""
        self.tensors = changes
        self.places[:] = [each.data_ptr() for each in vars(changes).values()] if changes else [None] * 9
        self.num_words = changes.masks.shape[1] if changes else 0
        return self


_library: ctypes.CDLL | None = None
_notes: Path | None = None
_reason = "not asked for"


def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None."""
    return _library


def reason() -> str:
    """Why there is no library."""
    return _reason


def load(cache: Path, num_threads: int) -> ctypes.CDLL | None:
    """Build the kernels unless `cache` has them, load them, and set how many threads they use.

    Returns None, after a line in the log, where they cannot be had.
    """
    global _library, _notes, _reason
    if _library is None:
        try:
            path = _build(cache)
            _library, _notes = _open(path), path.with_suffix(".json")
        except _Unavailable as error:
            if _reason != str(error):
                log.warning("the C kernels are not used: %s", error)
            _reason = str(error)
            return None
    _library.crane_set_threads(num_threads, SPINS)
    return _library


def measured(name: str, measure: Callable[[], int]) -> int:
    """What was measured of the library on this machine, now if never before; kept beside it."""
    try:
        known = json.loads(_notes.read_text())
    except (OSError, ValueError):
        known = {}
    if not isinstance(known.get(name), int):
        known[name] = measure()
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
            made = _notes.with_suffix(f".{os.getpid()}")
            made.write_text(json.dumps(known))
            os.replace(made, _notes)
    return known[name]


@contextlib.contextmanager
def held(wanted: bool) -> Iterator[None]:
    """If wanted, the kernels' threads stay awake between this thread's calls: only where torch's want no core."""
    library = _library if wanted else None
    if library is not None:
        library.crane_hold()
    try:
        yield
    finally:
        if library is not None:
            library.crane_release()


def unload() -> None:
    """Compute in torch from now on; what was made with the library still works."""
    global _library, _reason
    _library, _reason = None, "ruled out"


class _Unavailable(Exception):
    """Why there are no C kernels, in words for the log."""


def _open(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise _Unavailable(f"{path} does not load: {error}") from None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _compiler() -> list[str]:
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise _Unavailable("there is no C compiler; install gcc or clang, or: pip install ziglang")


def _processor() -> str:
    """What decides which instructions a build may use; caches are shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name"))}))


def _build(cache: Path) -> Path:
    if platform.machine() not in ("x86_64", "AMD64"):
        raise _Unavailable(f"there are none for {platform.machine()} yet")
    command = [*_compiler(), *_FLAGS]
    sources = sorted(SOURCES.glob("*.[ch]"))
    digest = hashlib.sha256("\n".join([_processor(), *command, *(path.read_text() for path in sources)]).encode())
    library = cache / "kernels" / f"crane-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / "crane.so"
            _run([*command, *(str(path) for path in sources if path.suffix == ".c"), "-o", str(made), "-lm"])
            _run([sys.executable, "-I", __file__, str(made)])
            os.replace(made, library)
    except OSError as error:
        raise _Unavailable(f"{library} cannot be written: {error}") from None
    log.info("built the C kernels: %s", library)
    return library


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise _Unavailable(f"{command[0]} took longer than {_BUILD_TIMEOUT_S} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or [f"status {done.returncode}"]
        raise _Unavailable(f"{' '.join(command[:3])[:80]} failed: {lines[0]}")


def check(path: str) -> None:
    """Compute a little with the library at `path`, in every way it multiplies. Raises AssertionError when wrong."""
    made = _open(Path(path))
    made.crane_set_threads(2, SPINS)
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (48, 64), dtype=torch.int8)
    scale = torch.full((48, 2), 0.5)
    weight = Weight(None, None, 48, 64, 4, 1, 0, 8, 0, 1)
    panels = torch.zeros(made.crane_weight_bytes(ctypes.byref(weight)), dtype=torch.uint8)
    weight.panels = panels.data_ptr()
    made.crane_pack(ctypes.byref(weight), 0, codes.data_ptr(), 0, scale.data_ptr(), None, 0, 48)
    x = torch.randint(-127, 128, (35, 64)).float()
    x[:, ::32] = 127  # so that 8 bits hold each value exactly, as bfloat16 does
    for given, rows in ((x, 35), (x.bfloat16(), 35), (x.bfloat16(), 19)):
        out = torch.zeros(rows, 48)
        kind = DTYPES[given.dtype]
        made.crane_linear(ctypes.byref(weight), given.data_ptr(), rows, kind, out.data_ptr(), 48, 0)
        expected = x[:rows] @ codes.T.float() * 0.5
        assert torch.allclose(out, expected, rtol=1e-5), f"{rows} rows of {given.dtype} are multiplied wrongly"


def has_amx() -> bool:
    """Whether the library multiplies bfloat16 on AMX here."""
    return _library is not None and bool(_library.crane_has_amx())


if __name__ == "__main__":
    check(sys.argv[1])
