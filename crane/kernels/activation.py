"""The gate of a gated MLP: silu(gate) * up."""

import torch
import torch.nn.functional as F
from torch import Tensor

from crane.kernels import native
from crane.kernels.lang import FLOATS, jit, tl
from crane.kernels.registry import Case, kernel

_BLOCK = 1024


def _silu_mul_torch(gate_up: Tensor) -> Tensor:
    """silu of the first half times the second half.

    gate_up: [num_tokens, 2 * size], gate first. Returns a new [num_tokens, size] of the same dtype; silu is computed
    in float32 and the torch reference rounds it to the dtype before the product.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, stride, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    at = gate_up_ptr + row * stride + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + size, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * size + column, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


def _silu_mul_triton(gate_up: Tensor) -> Tensor:
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul_kernel[(rows, -(-size // _BLOCK))](gate_up, out, gate_up.stride(0), size, BLOCK=_BLOCK, num_warps=4)
    return out


def _silu_mul_c(gate_up: Tensor) -> Tensor:
    if gate_up.dtype not in native.DTYPES or gate_up.dim() != 2 or not gate_up.is_contiguous():
        return NotImplemented
    rows, width = gate_up.shape
    out = torch.empty(rows, width // 2, dtype=gate_up.dtype)
    native.library().crane_silu_mul(
        gate_up.data_ptr(), out.data_ptr(), rows, width // 2, native.DTYPES[gate_up.dtype]
    )
    return out


def _why_not(gate_up: Tensor) -> str | None:
    if gate_up.dtype not in FLOATS:
        return f"{gate_up.dtype} is not a number type it knows"
    return None if gate_up.stride(1) == 1 else "rows are not contiguous"


def _case(rows: int, size: int, gap: int = 0):
    def make(device: str, dtype: torch.dtype) -> dict:
        return {"gate_up": torch.randn(rows, 2 * size + gap, device=device).mul_(3).to(dtype)[:, : 2 * size]}

    return make


def _traffic(gate_up: Tensor) -> tuple[int, int]:
    return gate_up.numel() * gate_up.element_size() * 3 // 2, 4 * gate_up.numel()


silu_mul = kernel(
    "silu_mul", reference=_silu_mul_torch, triton=_silu_mul_triton, why_not=_why_not, traffic=_traffic,
    in_c=_silu_mul_c,
    cases=(
        Case("one row", _case(1, 96)),
        Case("odd size", _case(3, 1029)),
        Case("rows of a wider tensor", _case(4, 64, gap=16)),
        Case("decode of a 7B model", _case(32, 18944), production=True),
        Case("prefill of a 0.6B model", _case(8192, 3072), production=True),
    ),
)  # fmt: skip
