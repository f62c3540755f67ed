"""RMS normalisation: y = x / sqrt(mean(x^2) + eps) * weight, statistics in float32."""

import torch
from torch import Tensor

from crane.kernels import native
from crane.kernels.lang import FLOATS, jit, next_power_of_2, tl
from crane.kernels.registry import Case, kernel

_LONGEST = 32768


def _rms_norm_torch(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Normalise the last dimension; of `residual + x` when a residual is given.

    x: [..., size]; weight: [size], or [num_heads, size] for one weight a head.
    residual: same shape and dtype as x; it is updated in place to `residual + x`.
    Returns a new tensor of x's shape and dtype.
    """
    if residual is not None:
        x = residual.add_(x)
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * scale).mul_(weight).to(x.dtype)


@jit
def _rms_norm_kernel(x_ptr, weight_ptr, residual_ptr, out_ptr, x_stride, residual_stride, eps,
                     SIZE: tl.constexpr, HEADS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row. HEADS: rows of weight, taken in turn."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        at = residual_ptr + row * residual_stride + column
        x += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        # what the next layer adds to is what this one normalises: the rounded sum
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    weight = tl.load(weight_ptr + (row % HEADS) * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * SIZE + column, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


def _rms_norm_triton(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    size = x.shape[-1]
    rows = x.view(-1, size)
    added = rows if residual is None else residual.view(-1, size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = next_power_of_2(size)
    _rms_norm_kernel[(rows.shape[0],)](
        rows, weight, added, out, rows.stride(0), added.stride(0), eps,
        SIZE=size, HEADS=weight.numel() // size, ADD=residual is not None, BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
    return out


def _rms_norm_c(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    plain = x.dtype == weight.dtype and x.dtype in native.DTYPES and x.dim() == 2 and x.stride(1) == 1
    if not plain or weight.dim() != 1 or not (residual is None or residual.is_contiguous()):
        return NotImplemented
    out = torch.empty(x.shape, dtype=x.dtype)
    native.library().crane_rms_norm(
        x.data_ptr(), weight.data_ptr(), eps, None if residual is None else residual.data_ptr(), out.data_ptr(),
        x.shape[0], x.shape[1], x.stride(0), native.DTYPES[x.dtype],
    )  # fmt: skip
    return out


def _why_not(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> str | None:
    if x.dtype not in FLOATS:
        return f"{x.dtype} is not a number type it knows"
    if x.shape[-1] > _LONGEST:
        return f"rows are longer than {_LONGEST}"
    for each in (x,) if residual is None else (x, residual):
        if not _has_plain_rows(each):
            return "rows are not evenly spaced"
    return None if weight.is_contiguous() else "the weight is not contiguous"


def _has_plain_rows(x: Tensor) -> bool:
    """Whether `x.view(-1, x.shape[-1])` works and its rows are contiguous."""
    if x.stride(-1) != 1:
        return False
    return x.dim() <= 2 or x.is_contiguous() or all(
        x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 2)
    )


def _case(rows: int, size: int, *, residual: bool = False, heads: int = 0, gap: int = 0):
    def make(device: str, dtype: torch.dtype) -> dict:
        shape = (rows, heads, size) if heads else (rows, size)
        x = torch.randn(rows, heads or 1, size + gap, device=device).to(dtype)[..., :size].reshape(shape)
        if gap and not heads:  # rows of a wider tensor
            x = torch.randn(rows, size + gap, device=device).to(dtype)[:, :size]
        weight = torch.randn(shape[1:], device=device).to(dtype)
        added = torch.randn(shape, device=device).to(dtype) if residual else None
        return {"x": x, "weight": weight, "eps": 1e-6, "residual": added}

    return make


def _traffic(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[int, int]:
    passes = 2 if residual is None else 4
    return passes * x.numel() * x.element_size(), 4 * x.numel()


rms_norm = kernel(
    "rms_norm", reference=_rms_norm_torch, triton=_rms_norm_triton, why_not=_why_not, traffic=_traffic,
    in_c=_rms_norm_c,
    cases=(
        Case("one row", _case(1, 64)),
        Case("odd size", _case(5, 100)),
        Case("residual", _case(6, 256, residual=True)),
        Case("one weight a head", _case(3, 48, heads=5)),
        Case("rows of a wider tensor", _case(4, 32, gap=16)),
        Case("decode of a 7B model", _case(32, 3584, residual=True), production=True),
        Case("prefill of a 0.6B model", _case(8192, 1024, residual=True), production=True),
        Case("widest", _case(64, 8192), production=True),
    ),
)  # fmt: skip
