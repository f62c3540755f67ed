"""A kernel: one public function, computed by its torch reference or by its Triton twin.

    rms_norm = kernel("rms_norm", reference=_rms_norm_torch, triton=_rms_norm_triton, why_not=_why_not, cases=_CASES)

The reference accepts everything and is what runs on Metal, and on the CPU unless `in_c` takes the call: see `native`.
The twin takes the same arguments and runs on a GPU whenever `why_not` has no objection. Which of them runs can be
forced, for one kernel or for all. When a call falls back although its device has Triton, that is logged once with the
reason and kept for `report`.
"""

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from crane.errors import SettingsError
from crane.kernels import lang, native

log = logging.getLogger("crane.kernels")

# Every kernel by name; a kernel enters when its module is loaded.
KERNELS: dict[str, "Kernel"] = {}
# How far from the reference in float64 a result may be, relative to each value and to the mean of them all.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Case:
    """Arguments to test, compile or time a kernel with.

    make(device, dtype): the arguments by name. Random ones come from torch's generator; on device "meta" they need
        shapes only.
    dtypes: what it makes sense with.
    production: as large as in a served model: compiled for every GPU and timed, too slow to interpret.
    tolerance: if not the kernel's own.
    """

    name: str
    make: Callable[[str, torch.dtype], dict]
    dtypes: tuple[torch.dtype, ...] = lang.FLOATS
    production: bool = False
    tolerance: float | None = None


class Kernel:
    """What `kernel` makes. Call it as the reference is called, the first argument a tensor (or a list of them).

    mode: "auto", "torch" (never the twin) or "triton" (the twin, or a ValueError with the reason).
    tolerances: by dtype, see TOLERANCES. scratch: arguments whose contents mean nothing after the call.
    traffic(**arguments): (bytes moved, floating point operations) at least needed, for rooflines.
    elements(function, constants): of one of the twin's Triton functions, elements that one round of its main loop
        handles in one program (the whole program where it has no loop): instructions are counted by them.
    straight: Triton functions whose work is outside of their loops: counted as a whole.
    """

    def __init__(self, name: str, reference: Callable, triton: Callable, why_not: Callable, cases: tuple[Case, ...],
                 tolerances: dict | None, scratch: tuple[str, ...], traffic: Callable | None, elements: Callable,
                 straight: tuple[str, ...] = ()):
        self.name = name
        self.reference = reference
        self.triton = triton
        self.in_c: Callable | None = None
        self.cases = cases
        self.tolerances = TOLERANCES | (tolerances or {})
        self.scratch = scratch
        self.traffic = traffic
        self.elements = elements
        self.straight = straight
        self.mode = "auto"
        self.fallbacks: set[str] = set()
        self.why_not = why_not
        self._used = False
        self.__doc__ = reference.__doc__
        self.__signature__ = inspect.signature(reference)

    def __call__(self, first: Tensor, *args, **named):
        mode = self.mode
        if mode == "torch" or (mode == "auto" and not first.is_cuda):
            if mode == "auto" and self.in_c and native.library() and first.device.type == "cpu":
                result = self.in_c(first, *args, **named)
                if result is not NotImplemented:
                    return result
            return self.reference(first, *args, **named)
        if self.chooses_triton(first, *args, **named):
            return self.triton(first, *args, **named)
        return self.reference(first, *args, **named)

    def chooses_triton(self, first: Tensor, *args, **named) -> bool:
        """Whether a call would run the twin. Records why not. Raises ValueError where the twin is forced and cannot."""
        mode = self.mode
        if mode == "torch" or (mode == "auto" and not first.is_cuda):
            return False
        reason = lang.missing(first.device) or self.why_not(first, *args, **named)
        if reason is None:
            self._used = True
            return True
        if mode == "triton":
            raise ValueError(f"the Triton kernel {self.name} cannot take this call: {reason}")
        if reason not in self.fallbacks:
            self.fallbacks.add(reason)
            log.warning("kernel %s runs in torch: %s", self.name, reason)
        return False

    @property
    def state(self) -> str:
        """One line: what it runs in so far, and why."""
        if self.mode == "torch":
            return "torch: ruled out"
        reasons = "; ".join(sorted(self.fallbacks))
        if self._used:
            return f"triton, at times torch: {reasons}" if reasons else "triton"
        return f"torch: {reasons}" if reasons else "torch"


def kernel(name: str, *, reference: Callable, triton: Callable, why_not: Callable, cases: tuple[Case, ...],
           tolerances: dict | None = None, scratch: tuple[str, ...] = (), traffic: Callable | None = None,
           elements: Callable = lambda function, constants: constants["BLOCK"], straight: tuple[str, ...] = (),
           in_c: Callable | None = None) -> Kernel:
    """Pair a torch reference with its Triton twin; see `Kernel`. reference, triton and why_not take the same arguments.

    in_c, where there is one, is called on a CPU while the C kernels are loaded, and may return NotImplemented.
    why_not returns the reason why the twin cannot take a call, in words for the log, or None. It looks at shapes,
    strides and dtypes only.
    """
    assert name not in KERNELS, name
    made = KERNELS[name] = Kernel(name, reference, triton, why_not, cases, tolerances, scratch, traffic,
                                  elements, straight)
    made.in_c = in_c
    return made


@contextlib.contextmanager
def force(mode: str, *names: str) -> Iterator[None]:
    """Within it, the named kernels, or all, run in this mode: "auto", "torch" or "triton"."""
    chosen = [KERNELS[name] for name in names] if names else list(KERNELS.values())
    before = [each.mode for each in chosen]
    try:
        for each in chosen:
            each.mode = mode
        yield
    finally:
        for each, old in zip(chosen, before, strict=True):
            each.mode = old


def configure(mode: str, torch_kernels: str, device: torch.device) -> None:
    """What --kernels and --torch-kernels ask for, for good. torch_kernels: names, separated by commas.

    Raises SettingsError for an unknown name, and for "triton" on a device that cannot run it.
    """
    ruled_out = {name.strip() for name in torch_kernels.split(",") if name.strip()}
    if unknown := ruled_out - KERNELS.keys():
        raise SettingsError(f"--torch-kernels: no kernel is called {', '.join(sorted(unknown))}; "
                            f"there are {', '.join(sorted(KERNELS))}")
    if mode == "triton" and (reason := lang.missing(device)):
        raise SettingsError(f"--kernels triton: {reason}")
    for name, each in KERNELS.items():
        each.mode = "torch" if name in ruled_out else mode


def report() -> dict[str, str]:
    """What each kernel runs in so far, by name."""
    return {name: each.state for name, each in sorted(KERNELS.items())}
