"""A kernel's case: its arguments, with everything around them poisoned, and how far the results may be off."""

import contextlib
import importlib
import pkgutil

import torch
from torch import Tensor

import crane.kernels
from crane.kernels.registry import KERNELS, Case, Kernel

_GUARD = 64


def all_kernels() -> list[Kernel]:
    """Every kernel of crane, by name."""
    for module in pkgutil.iter_modules(crane.kernels.__path__):
        importlib.import_module(f"crane.kernels.{module.name}")
    return [KERNELS[name] for name in sorted(KERNELS)]


def mapped(value, change):
    """`value` with every tensor in it replaced, inside lists, tuples, dicts and dataclasses, too."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(each, change) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(each, change) for each in value)
    if hasattr(value, "__dataclass_fields__"):
        fields = {key: mapped(getattr(value, key), change) for key in value.__dataclass_fields__}
        return type(value)(**fields)
    return value


def tensors(value) -> list[Tensor]:
    """The tensors in a value, in order."""
    found = []
    mapped(value, lambda each: (found.append(each), each)[1])
    return found


def widened(value):
    """A copy of the value, its floating point tensors in float64; what was one tensor still is."""
    return mapped(value, once(lambda each: each.double() if each.is_floating_point() else each.clone()))


def once(change):
    """`change`, which gives the same result for the same tensor."""
    known = {}

    def changed(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = change(tensor)
        return known[id(tensor)]

    return changed


class Guarded:
    """Copies of arguments, same shapes and strides, each in the middle of memory that holds NaN, or for integers a
    number no kernel can take for an index."""

    def __init__(self, arguments: dict):
        self._memory: list[tuple[Tensor, Tensor]] = []
        self.arguments = mapped(arguments, once(self._copy))

    def _copy(self, tensor: Tensor) -> Tensor:
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
        memory = torch.empty(span + 2 * _GUARD, dtype=tensor.dtype, device=tensor.device)
        memory.fill_(poison(tensor.dtype))
        inside = memory.as_strided(tensor.shape, tensor.stride(), _GUARD)
        inside.copy_(tensor)
        written = torch.zeros(memory.shape, dtype=torch.bool, device=tensor.device)
        written.as_strided(tensor.shape, tensor.stride(), _GUARD).fill_(True)
        self._memory.append((memory, written))
        return inside

    def check(self) -> None:
        """Nothing outside the arguments was written."""
        for memory, written in self._memory:
            around = memory[~written]
            intact = around.isnan() if around.is_floating_point() else around == poison(around.dtype)
            assert intact.all(), "memory beside an argument was written"


def poison(dtype: torch.dtype):
    """What unused memory holds."""
    if dtype.is_floating_point:
        return float("nan")
    return False if dtype == torch.bool else torch.iinfo(dtype).max


@contextlib.contextmanager
def poisoned_outputs():
    """torch.empty gives NaN, and the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def error(got: Tensor, expected: Tensor) -> float:
    """The largest distance, relative to the expected value plus the mean size of all; inf where one alone is NaN."""
    if not got.is_floating_point():
        return 0.0 if torch.equal(got.long(), expected.long()) else float("inf")
    got, expected = got.double(), expected.double()
    same = (got == expected) | (got.isnan() & expected.isnan())
    if same.all():
        return 0.0
    finite = expected[expected.isfinite()].abs()
    distance = (got - expected).abs() / (expected.abs() + (finite.mean() if finite.numel() else 0.0))
    return distance.masked_fill(same, 0.0).nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()


def run_case(kernel: Kernel, case: Case, dtype: torch.dtype, device: str = "cpu", in_c: bool = False) -> float | None:
    """Run the twin and, in float64, the reference; returns the larger error of results and arguments written.

    in_c: run the C kernel in place of the twin; None when it does not take the case.
    Raises AssertionError when the twin refuses the case, writes where it must not or gives another type.
    """
    torch.manual_seed(0)
    arguments = case.make(device, dtype)
    reason = None if in_c else kernel.why_not(**arguments)
    assert reason is None, f"{kernel.name} refuses the case {case.name}: {reason}"
    exact_arguments = widened(arguments)
    exact = kernel.reference(**exact_arguments)
    guarded = Guarded(arguments)
    with poisoned_outputs():
        got = kernel.in_c(**guarded.arguments) if in_c else kernel.triton(**guarded.arguments)
    if got is NotImplemented:
        return None
    guarded.check()
    kept = {name: value for name, value in guarded.arguments.items() if name not in kernel.scratch}
    pairs = list(zip(tensors(got), tensors(exact), strict=True))
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        assert ours.dtype in (dtype, theirs.dtype), f"the result is {ours.dtype}"
    pairs += zip(tensors(kept), tensors({name: exact_arguments[name] for name in kept}), strict=True)
    return max(error(ours, theirs) for ours, theirs in pairs)
