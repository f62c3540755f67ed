"""The one import of Triton. Crane loads and serves without it; kernels then run their torch references.

`jit`, `tl` and `constexpr_function` are what kernels are written with. Where Triton is absent they are stand-ins that
let the source load and can do nothing else.
"""

import functools

import torch

from crane import kernels

try:
    if not kernels.use_triton:
        raise ImportError
    import triton
    import triton.language as tl
    from triton import constexpr_function, jit
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = None

    class _Absent:
        """Whatever is asked of it, or called: itself."""

        def __getattr__(self, name: str) -> "_Absent":
            return self

        def __call__(self, *args, **named) -> "_Absent":
            return self

    tl = jit = constexpr_function = TensorDescriptor = _Absent()

# Triton's interpreter runs kernels on the CPU, slowly: for tests. It is chosen when Triton loads.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LOG2E = 1.4426950408889634


def missing(device: torch.device) -> str | None:
    """Why no Triton kernel at all can run on this device, or None."""
    if device.type != "cuda" and not INTERPRETED:
        return f"triton does not run on {device.type}"
    if triton is None:
        return "triton is not installed"
    return None


@functools.cache
def arch() -> int:
    """The GPU's architecture: 80, 90, 100 for NVIDIA's; 0 for others, under the interpreter and without one."""
    if triton is None or INTERPRETED:
        return 0
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # no GPU that Triton knows
        return 0
    return target.arch if target.backend == "cuda" else 0


def has_fp8() -> bool:
    """Whether this GPU converts float8_e4m3fn."""
    return INTERPRETED or arch() >= 89


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; a small number under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below `number` >= 1."""
    return 1 << (number - 1).bit_length()
