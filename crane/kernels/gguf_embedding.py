"""Rows of a matrix in GGUF planes, by number: an embedding whose table stays quantised."""

import torch
from torch import Tensor

from crane.kernels.lang import FLOATS, jit, tl
from crane.kernels.planes import PLANE_FORMATS, STEP, Planes, dequantize_planes, random_planes
from crane.kernels.registry import Case, kernel

_BLOCK = 512


def _gguf_embedding_torch(token_ids: Tensor, planes: Planes, dtype: torch.dtype) -> Tensor:
    """The rows `token_ids` of a table.

    token_ids: int64 [num_tokens]; planes: a table [vocab_size, hidden]. Returns [num_tokens, hidden] of `dtype`:
    what dequantising in float32 and rounding once gives, bit for bit.
    """
    return dequantize_planes(planes, dtype, token_ids)


@jit
def _half_at(words_ptr, at, place, inside):
    """Half `place` (0 or 1) of some words, a float16, as float32."""
    word = tl.load(words_ptr + at, mask=inside, other=0)
    return (word >> (16 * place)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def _embedding_kernel(
    ids_ptr, codes_ptr, high_ptr, scales_ptr, more_ptr, out_ptr, num_rows, width,
    BITS: tl.constexpr, ZERO: tl.constexpr, NESTED: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of one row a program. See `Planes` for where an element's parts lie."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + token)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < width
    step, run, j = k // 64, k // 32 % 2, k % 32
    if BITS == 8:
        code = tl.load(codes_ptr + ((k // 32) * num_rows + row) * 32 + j, mask=inside, other=0).to(tl.int32)
    else:
        code = tl.load(codes_ptr + (step * num_rows + row) * 32 + j, mask=inside, other=0).to(tl.int32)
        code = (code >> (4 * run)) & 15
        if BITS > 4:
            SHARED: tl.constexpr = 8 // (BITS - 4)  # runs whose high bits share a byte
            high_at = ((k // 32 // SHARED) * num_rows + row) * 32 + j
            high = tl.load(high_ptr + high_at, mask=inside, other=0).to(tl.int32)
            high = high >> (k // 32 % SHARED * (BITS - 4))
            code |= (high & ((1 << (BITS - 4)) - 1)) << 4
        code -= ZERO
    at = step * num_rows + row
    if NESTED:
        words = tl.load(scales_ptr + at, mask=inside, other=0)
        block = (k // 256) * num_rows + row
        d = _half_at(more_ptr, block, 0, inside)
        if OFFSET:
            scale = d * ((words >> (8 * run)) & 255).to(tl.float32)
            offset = -(_half_at(more_ptr, block, 1, inside) * ((words >> (16 + 8 * run)) & 255).to(tl.float32))
        else:
            scale = d * ((words << (24 - 8 * (k // 16 % 4))) >> 24).to(tl.float32)
    else:
        scale = _half_at(scales_ptr, at, run, inside)
        if OFFSET:
            offset = _half_at(more_ptr, at, run, inside)
    value = scale * code.to(tl.float32)
    if OFFSET:
        value += offset
    tl.store(out_ptr + token * width + k, value.to(out_ptr.dtype.element_ty), mask=inside)


def _gguf_embedding_triton(token_ids: Tensor, planes: Planes, dtype: torch.dtype) -> Tensor:
    num_rows, width = planes.shape
    out = torch.empty(token_ids.shape[0], width, dtype=dtype, device=token_ids.device)
    codes, high, scales, more = planes.tensors()
    _embedding_kernel[(token_ids.shape[0], -(-width // _BLOCK))](
        token_ids, codes, codes if high is None else high, scales, scales if more is None else more, out,
        num_rows, width, BITS=planes.format.bits, ZERO=planes.format.zero, NESTED=planes.nested,
        OFFSET=planes.has_offset, BLOCK=_BLOCK, num_warps=4,
        enable_fp_fusion=False,  # product and sum are rounded one after the other, as ggml does
    )  # fmt: skip
    return out


def _why_not(token_ids: Tensor, planes: Planes, dtype: torch.dtype) -> str | None:
    if dtype not in FLOATS:
        return f"{dtype} is not a number type it knows"
    if token_ids.dim() != 1 or token_ids.stride(0) != 1 or token_ids.shape[0] == 0:
        return "token_ids is not a plain list of numbers"
    return None


def _case(kind: str, num_tokens: int, num_rows: int, width: int):
    def make(device: str, dtype: torch.dtype) -> dict:
        ids = torch.randint(0, num_rows, (num_tokens,), device=device)
        return {"token_ids": ids, "planes": random_planes(kind, num_rows, width, device), "dtype": dtype}

    return make


def _traffic(token_ids: Tensor, planes: Planes, dtype: torch.dtype) -> tuple[int, int]:
    a_row = planes.nbytes // planes.shape[0] + planes.shape[1] * dtype.itemsize
    return len(token_ids) * a_row, 2 * len(token_ids) * planes.shape[1]


gguf_embedding = kernel(
    "gguf_embedding", reference=_gguf_embedding_torch, triton=_gguf_embedding_triton, why_not=_why_not,
    traffic=_traffic,
    cases=(
        *(Case(f"{kind}", _case(kind, 3, 20, 768)) for kind in PLANE_FORMATS),
        *(Case(f"{kind} odd steps", _case(kind, 2, 9, STEP + 32)) for kind in PLANE_FORMATS if kind[-1] != "K"),
        *(
            Case(f"{kind} prefill", _case(kind, 2048, 151936, 3584), production=True)
            for kind in ("Q8_0", "Q4_K", "Q6_K")
        ),
    ),
)  # fmt: skip
