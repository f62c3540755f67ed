"""y = x @ weight.T + bias with the weight in GGUF planes, taken apart in registers.

Few rows of x: codes are small integers, exact in every dtype, so they enter the tensor cores as they are,
one group at a time, and scale and offset are applied to each group's float32 product:

    y[m, n] = sum_g  scale[g, n] * (x[m, g] . code[n, g])  +  offset[g, n] * sum(x[m, g])

Many rows: the tile of weights is rounded to x's dtype first, as a model dequantised at load would hold it.
The input may be cut into parts that different programs add up; the parts are then summed in order, so that
the same call gives the same bits every time.

So many rows that taking the weight apart for each tile of them costs more than writing it out once
(`tuning.json` says from how many): it is dequantised, a slab of rows at a time, and the product left to torch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from crane.kernels import lang, tuning
from crane.kernels.gguf_codes import scale_of, second_of, step_of, uses_ptx
from crane.kernels.gguf_dequantize import gguf_dequantize
from crane.kernels.lang import FLOATS, jit, tl
from crane.kernels.planes import PLANE_FORMATS, STEP, Planes, dequantize_planes, random_planes
from crane.kernels.registry import Case, kernel

# Most programs that add up one tile, and the programs a multiprocessor should have to work on.
_MAX_PARTS = 16
_PROGRAMS_A_PROCESSOR = 4
# Elements of a weight that are dequantised at a time, and the number of rows up to which rules tell them apart.
_SLAB = 1 << 25
_MOST_ROWS = 4096


def _gguf_linear_torch(x: Tensor, planes: Planes, bias: Tensor | None = None) -> Tensor:
    """y = x @ weight.T + bias.

    x: [num_rows, in_features]; planes: a weight [out_features, in_features]; bias: [out_features] of x's dtype.
    Returns [num_rows, out_features].
    """
    return F.linear(x, dequantize_planes(planes, x.dtype), bias)


@jit
def _multiply(acc, code, x_at, there, words, more, run: tl.constexpr, NESTED: tl.constexpr, OFFSET: tl.constexpr,
              AFTER: tl.constexpr):
    """acc [BN, BM] plus the weights of one run times x. code: [BN, 32]; x_at: [32, BM]; words, more: [BN]."""
    scale = scale_of(words, more, run, NESTED, OFFSET)
    HALVES: tl.constexpr = NESTED and not OFFSET  # 16 codes to a scale
    if OFFSET or HALVES:
        second = second_of(words, more, run, NESTED, OFFSET)
    j = tl.arange(0, 32)
    if AFTER and HALVES:
        # the codes stay where they are; x comes twice, once without its last 16 columns and once without its first
        front, back = (j < 16)[:, None], (j >= 16)[:, None]
        acc += tl.dot(code, tl.load(x_at, mask=there & front, other=0.0), input_precision="ieee") * scale[:, None]
        acc += tl.dot(code, tl.load(x_at, mask=there & back, other=0.0), input_precision="ieee") * second[:, None]
        return acc
    x = tl.load(x_at, mask=there, other=0.0)
    if AFTER:
        acc += tl.dot(code, x, input_precision="ieee") * scale[:, None]
        if OFFSET:
            # sums of x, in the layout of products: cheaper than a reduction across threads
            ones = tl.full(code.shape, 1.0, code.dtype)
            acc += tl.dot(ones, x, input_precision="ieee") * second[:, None]
        return acc
    weight = code.to(tl.float32)
    if HALVES:
        weight *= tl.where((j < 16)[None, :], scale[:, None], second[:, None])
    else:
        weight *= scale[:, None]
    if OFFSET:
        weight += second[:, None]
    return tl.dot(weight.to(x.dtype), x, acc, input_precision="ieee")


@jit
def _linear_kernel(
    x_ptr, codes_ptr, high_ptr, scales_ptr, more_ptr, bias_ptr, out_ptr,
    num_rows, num_columns, width, x_stride, rounds_a_part, num_rounds,
    BITS: tl.constexpr, ZERO: tl.constexpr, NESTED: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr,
    EVEN: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr, AFTER: tl.constexpr, FAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile [BN, BM] of y's transpose, or of one part of it: weights are the first operand, whose tiles are tall.

    out: [num_rows, num_columns], or float32 [parts, num_rows, num_columns]. A round is UNROLL steps of 64 columns.
    EVEN: the last step is whole. AFTER: scales are applied to products, else to the weights.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    j = tl.arange(0, 32)
    known = n < num_columns
    there = (m < num_rows)[None, :]
    acc = tl.zeros([BN, BM], tl.float32)
    first = part * rounds_a_part
    for turn in tl.range(first, tl.minimum(first + rounds_a_part, num_rounds), num_stages=STAGES):
        more, high = n, n
        for place in tl.static_range(UNROLL):
            words, more, high, front, back = step_of(
                codes_ptr, high_ptr, scales_ptr, more_ptr, turn, place, more, high, n, known, num_columns,
                DTYPE, BITS, ZERO, NESTED, OFFSET, UNROLL, FAST)  # fmt: skip
            column = (turn * UNROLL + place) * 64 + j[:, None]
            x_at = x_ptr + m[None, :].to(tl.int64) * x_stride + column
            inside = there if EVEN else there & (column < width)
            acc = _multiply(acc, front, x_at, inside, words, more, 0, NESTED, OFFSET, AFTER)
            inside = there if EVEN else there & (column + 32 < width)
            acc = _multiply(acc, back, x_at + 32, inside, words, more, 1, NESTED, OFFSET, AFTER)
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=known, other=0.0).to(tl.float32)[:, None]
    out_at = (part * num_rows + m).to(tl.int64)[None, :] * num_columns + n[:, None]
    tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=known[:, None] & there)


@jit
def _sum_parts_kernel(parts_ptr, bias_ptr, out_ptr, size, num_columns, PARTS: tl.constexpr, BIAS: tl.constexpr,
                      BLOCK: tl.constexpr):
    """out = parts[0] + parts[1] + ... (+ bias), in this order. parts: float32 [PARTS, size], size = rows * columns."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(parts_ptr + at, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts_ptr + part * size.to(tl.int64) + at, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + at % num_columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def _tiles(planes: Planes, num_rows: int) -> dict:
    """Sizes of a tile and of its program, by the rows of x; steps in a round, a divisor of their number."""
    rows = min(max(8, lang.next_power_of_2(num_rows)), 128)
    group = 16 if planes.nested and not planes.has_offset else 32
    tiles = tuning.pick("gguf_linear", rows=rows, group=group, kind=planes.kind)
    # more steps in a round: of whole weights they break the code for sm_100's tensor cores (Triton 3.6), of others
    # ptxas, there, and AMD's compiler run out of registers
    amd = lang.arch() == 0 and not lang.INTERPRETED
    few = amd or lang.arch() >= 100 and planes.kind == "Q4_K"
    counts = (1,) if not tiles["AFTER"] else (2, 1) if few else (4, 2, 1)
    num_steps = -(-planes.shape[1] // STEP)
    return tiles | {"UNROLL": next(count for count in counts if num_steps % count == 0)}


def _num_parts(planes: Planes, num_rows: int, tiles: dict, num_rounds: int) -> int:
    """Programs that share one tile's columns, so that a narrow weight keeps the whole GPU busy."""
    programs = -(-num_rows // tiles["BM"]) * -(-planes.shape[0] // tiles["BN"])
    wanted = _PROGRAMS_A_PROCESSOR * 2 // tiles["num_warps"] or 1
    return max(1, min(wanted * lang.num_processors(planes.device) // programs, num_rounds // 2, _MAX_PARTS))


def _dequantised_product(x: Tensor, planes: Planes, bias: Tensor | None, out: Tensor) -> None:
    """The product by torch, into out: the weight is written out in x's dtype, a slab of its rows after the other."""
    num_columns, width = planes.shape
    size = max(_SLAB // width, 1)
    slab = torch.empty(min(size, num_columns), width, dtype=x.dtype, device=x.device)
    for start in range(0, num_columns, size):
        columns = slice(start, min(start + size, num_columns))
        weight = gguf_dequantize(slab[: columns.stop - start], planes, start)
        if bias is None:
            torch.mm(x, weight.T, out=out[:, columns])
        else:
            torch.addmm(bias[columns], x, weight.T, out=out[:, columns])


def _gguf_linear_triton(x: Tensor, planes: Planes, bias: Tensor | None = None) -> Tensor:
    num_rows, (num_columns, width) = x.shape[0], planes.shape
    out = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
    rows = min(lang.next_power_of_2(num_rows), _MOST_ROWS)
    if tuning.pick("gguf_linear_route", rows=rows, kind=planes.kind)["DEQUANTIZE"]:
        _dequantised_product(x, planes, bias, out)
        return out
    tiles = _tiles(planes, num_rows)
    num_rounds = -(-width // STEP) // tiles["UNROLL"]
    parts = _num_parts(planes, num_rows, tiles, num_rounds)
    target = out
    if parts > 1:
        target = torch.empty(parts, num_rows, num_columns, dtype=torch.float32, device=x.device)
    codes, high, scales, more = planes.tensors()
    grid = (-(-num_columns // tiles["BN"]), -(-num_rows // tiles["BM"]), parts)
    _linear_kernel[grid](
        x, codes, codes if high is None else high, scales, scales if more is None else more,
        x if bias is None else bias, target,
        num_rows, num_columns, width, x.stride(0), -(-num_rounds // parts), num_rounds,
        BITS=planes.format.bits, ZERO=planes.format.zero, NESTED=planes.nested, OFFSET=planes.has_offset,
        BIAS=bias is not None and parts == 1, EVEN=width % STEP == 0,
        FAST=uses_ptx(planes.kind, x.dtype), **tiles,
    )  # fmt: skip
    if parts > 1:
        block = 1024
        _sum_parts_kernel[(-(-out.numel() // block),)](
            target, x if bias is None else bias, out, out.numel(), num_columns,
            PARTS=parts, BIAS=bias is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def _why_not(x: Tensor, planes: Planes, bias: Tensor | None = None) -> str | None:
    if x.dtype not in FLOATS:
        return f"{x.dtype} is not a number type it knows"
    if x.dim() != 2 or x.stride(1) != 1 or x.shape[0] == 0:
        return "x is not a matrix with contiguous rows"
    return None if bias is None or bias.stride(0) == 1 else "the bias is not contiguous"


def _case(kind: str, rows: int, columns: int, width: int, *, bias: bool = False):
    def make(device: str, dtype: torch.dtype) -> dict:
        return {
            "x": torch.randn(rows, width, device=device).to(dtype),
            "planes": random_planes(kind, columns, width, device),
            "bias": torch.randn(columns, device=device).to(dtype) if bias else None,
        }

    return make


def _elements(function: str, constants: dict) -> int:
    """Weights of one round."""
    return constants["BN"] * STEP * constants["UNROLL"] if function == "_linear_kernel" else constants["BLOCK"]


def _traffic(x: Tensor, planes: Planes, bias: Tensor | None = None) -> tuple[int, int]:
    num_rows, (columns, width) = x.shape[0], planes.shape
    return planes.nbytes + num_rows * (columns + width) * x.element_size(), 2 * num_rows * columns * width


gguf_linear = kernel(
    "gguf_linear", reference=_gguf_linear_torch, triton=_gguf_linear_triton, why_not=_why_not, traffic=_traffic,
    elements=_elements,
    # many rows: weights are rounded to the dtype, as in torch's way
    tolerances={torch.float16: 2e-3},
    cases=(
        *(Case(f"{kind} few rows", _case(kind, 3, 40, 256, bias=True)) for kind in PLANE_FORMATS),
        *(Case(f"{kind} odd steps", _case(kind, 2, 24, 96)) for kind in PLANE_FORMATS if kind[-1] != "K"),
        *(Case(f"{kind} more rows", _case(kind, 20, 40, 256)) for kind in PLANE_FORMATS),
        *(Case(f"{kind} many rows", _case(kind, 40, 40, 256)) for kind in PLANE_FORMATS),
        Case("shared columns", _case("Q4_K", 9, 72, 1024, bias=True)),
        Case("shared columns, one row", _case("Q8_0", 1, 16, 1024)),
        Case("prefill", _case("Q5_0", 70, 72, 128)),
        Case("dequantised once", _case("Q4_K", 1050, 40, 256, bias=True), (torch.bfloat16,), tolerance=2e-2),
        Case("dequantised once, odd steps", _case("Q8_0", 1030, 24, 96), (torch.float16, torch.float32)),
        *(Case(f"{kind} decode of a 7B model", _case(kind, 1, 3584, 3584), production=True) for kind in PLANE_FORMATS),
        *(Case(f"Q4_K, {rows} rows", _case("Q4_K", rows, 18944, 3584), production=True) for rows in (16, 32, 64)),
        Case("Q6_K, 32 rows", _case("Q6_K", 32, 18944, 3584), production=True),
        *(
            Case(f"{kind}, {rows} rows of a prompt", _case(kind, rows, 18944, 3584), production=True)
            for kind in ("Q8_0", "Q4_K", "Q6_K")
            for rows in (256, 512, 1024, 2048)
        ),
    ),
)  # fmt: skip
