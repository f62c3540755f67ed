"""Rows of a matrix in GGUF planes, written out as plain numbers: for products with so many rows that it pays."""

import torch
from torch import Tensor

from crane.kernels.gguf_codes import scale_of, second_of, step_of, uses_ptx
from crane.kernels.lang import FLOATS, jit, tl
from crane.kernels.planes import PLANE_FORMATS, STEP, Planes, dequantize_planes, random_planes
from crane.kernels.registry import Case, kernel

_BLOCK_ROWS = 64


def _gguf_dequantize_torch(out: Tensor, planes: Planes, start: int = 0) -> Tensor:
    """Fill out with the weight's rows from `start` on: computed in float32 and rounded once, as a model dequantised at
    load would hold them.

    out: [num_rows, in_features]. Returns it.
    """
    return out.copy_(dequantize_planes(planes, out.dtype, slice(start, start + len(out))))


@jit
def _dequantize_run(code, words, more, run: tl.constexpr, NESTED: tl.constexpr, OFFSET: tl.constexpr):
    """float32 values of one run. code: [rows, 32]; words, more: int32 [rows]."""
    value = code.to(tl.float32)
    if NESTED and not OFFSET:  # 16 codes to a scale
        front = (tl.arange(0, 32) < 16)[None, :]
        return value * tl.where(front, scale_of(words, more, run, NESTED, OFFSET)[:, None],
                                second_of(words, more, run, NESTED, OFFSET)[:, None])  # fmt: skip
    value *= scale_of(words, more, run, NESTED, OFFSET)[:, None]
    if OFFSET:
        value += second_of(words, more, run, NESTED, OFFSET)[:, None]
    return value


@jit(do_not_specialize=["first", "num_rows"])
def _dequantize_kernel(
    codes_ptr, high_ptr, scales_ptr, more_ptr, out_ptr, first, num_rows, num_columns, width,
    BITS: tl.constexpr, ZERO: tl.constexpr, NESTED: tl.constexpr, OFFSET: tl.constexpr, UNROLL: tl.constexpr,
    FAST: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK rows and UNROLL steps of 64 columns of the weight, [num_columns, width]. DTYPE: holds every code."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = row < num_rows
    n, j = first + row, tl.arange(0, 32)
    turn = tl.program_id(1)
    more, high = n, n
    for place in tl.static_range(UNROLL):
        words, more, high, front, back = step_of(
            codes_ptr, high_ptr, scales_ptr, more_ptr, turn, place, more, high, n, known, num_columns,
            DTYPE, BITS, ZERO, NESTED, OFFSET, UNROLL, FAST)  # fmt: skip
        column = (turn * UNROLL + place) * 64 + j[None, :]
        at = out_ptr + row[:, None].to(tl.int64) * width + column
        value = _dequantize_run(front, words, more, 0, NESTED, OFFSET)
        tl.store(at, value.to(out_ptr.dtype.element_ty), mask=known[:, None] & (column < width))
        value = _dequantize_run(back, words, more, 1, NESTED, OFFSET)
        tl.store(at + 32, value.to(out_ptr.dtype.element_ty), mask=known[:, None] & (column + 32 < width))


def _gguf_dequantize_triton(out: Tensor, planes: Planes, start: int = 0) -> Tensor:
    (num_rows, width), num_steps = out.shape, -(-planes.shape[1] // STEP)
    unroll = next(count for count in (4, 2, 1) if num_steps % count == 0)
    codes, high, scales, more = planes.tensors()
    _dequantize_kernel[(-(-num_rows // _BLOCK_ROWS), num_steps // unroll)](
        codes, codes if high is None else high, scales, scales if more is None else more, out,
        start, num_rows, planes.shape[0], width,
        BITS=planes.format.bits, ZERO=planes.format.zero, NESTED=planes.nested, OFFSET=planes.has_offset,
        UNROLL=unroll, FAST=uses_ptx(planes.kind, out.dtype), DTYPE=_CODE_TYPES[out.dtype], BLOCK=_BLOCK_ROWS,
        num_warps=4, enable_fp_fusion=False,  # product and sum are rounded one after the other
    )  # fmt: skip
    return out


_CODE_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _why_not(out: Tensor, planes: Planes, start: int = 0) -> str | None:
    if out.dtype not in FLOATS:
        return f"{out.dtype} is not a number type it knows"
    return None if out.is_contiguous() and len(out) else "the result is not a contiguous matrix"


def _case(kind: str, num_rows: int, columns: int, width: int, start: int = 0):
    def make(device: str, dtype: torch.dtype) -> dict:
        out = torch.zeros(num_rows, width, dtype=dtype, device=device)
        return {"out": out, "planes": random_planes(kind, columns, width, device), "start": start}

    return make


def _traffic(out: Tensor, planes: Planes, start: int = 0) -> tuple[int, int]:
    return planes.nbytes * len(out) // planes.shape[0] + out.nbytes, 2 * out.numel()


gguf_dequantize = kernel(
    "gguf_dequantize", reference=_gguf_dequantize_torch, triton=_gguf_dequantize_triton, why_not=_why_not,
    traffic=_traffic, elements=lambda function, constants: constants["BLOCK"] * STEP * constants["UNROLL"],
    cases=(
        *(Case(f"{kind}", _case(kind, 70, 70, 256)) for kind in PLANE_FORMATS),
        *(Case(f"{kind} some rows", _case(kind, 9, 80, 96, 64)) for kind in PLANE_FORMATS if kind[-1] != "K"),
        *(Case(f"{kind} of a 7B model", _case(kind, 8192, 18944, 3584), production=True) for kind in PLANE_FORMATS),
    ),
)  # fmt: skip
