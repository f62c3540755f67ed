"""Attention of rows with few new tokens (decode, verified drafts) over KV pages; the formula is in `rows`.

Work comes in parts (`plan_decode`): one program takes a part of one row for one K/V head, with all query heads that
share it and all new tokens folded into the rows of one small matrix. Rows in one part are written at once. The others
leave float32 sums, each normalised by itself, and the base-2 logarithm of their weight; a second launch merges them:

    out = sum_i 2^(lse_i - max) part_i / sum_i 2^(lse_i - max)
"""

import torch
from torch import Tensor

from crane.kernels import tuning
from crane.kernels.lang import LOG2E, jit, next_power_of_2, tl
from crane.kernels.plan_decode import DecodeWork, plan_decode
from crane.kernels.registry import Case, kernel
from crane.kernels.rows import Rows, attend_rows, make_rows, why_not_rows

# More new tokens than these make a row one for `paged_prefill`.
MAX_QUERY_LEN = 8
_MAX_BLOCK_M = 64
_MERGE_BLOCK = 16


def _paged_decode_torch(q: Tensor, kv: Tensor, layer: int, rows: Rows, work: DecodeWork, scale: float,
                        kv_scales: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """One layer's attention of the rows, which have at most MAX_QUERY_LEN new tokens each.

    work: from `plan_decode` for these rows and this GPU. For the rest see `rows.attend_rows`.
    """
    return attend_rows(q, kv, layer, rows, scale, kv_scales, out)


@jit
def _tile_of(base_ptr, table_ptr, start, head, limit, PAGE_STRIDE: tl.constexpr, PAGE: tl.constexpr,
             HEADS: tl.constexpr, D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr):
    """[N, BLOCK_D] keys or values of the tokens from `start`; with MASK those at `limit` and beyond are 0."""
    token = tl.arange(0, N)
    column = tl.arange(0, BLOCK_D)
    if PAGE >= N:  # a tile lies in one page
        page = tl.load(table_ptr + start // PAGE).to(tl.int64)
        at = page * PAGE_STRIDE + head * D + (start % PAGE + token) * (HEADS * D)
    else:
        inside = start + token < limit
        page = tl.load(table_ptr + (start + token) // PAGE, mask=inside, other=0).to(tl.int64)
        at = page * PAGE_STRIDE + head * D + (start + token) % PAGE * (HEADS * D)
    if MASK:
        shown = (start + token < limit)[:, None] & (column < D)[None, :]
        return tl.load(base_ptr + at[:, None] + column[None, :], mask=shown, other=0.0)
    if D == BLOCK_D:
        return tl.load(base_ptr + at[:, None] + column[None, :])
    return tl.load(base_ptr + at[:, None] + column[None, :], mask=(column < D)[None, :], other=0.0)


@jit(do_not_specialize=["layer", "table_stride"])
def _decode_kernel(q_ptr, kv_ptr, out_ptr, sums_ptr, lse_ptr, parts_ptr, starts_ptr, lens_ptr, contexts_ptr, table_ptr,
                   scales_ptr, layer, scale_log2e, q_stride, table_stride,
                   GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
                   PAGE_STRIDE: tl.constexpr, MAX_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_D: tl.constexpr, SCALED: tl.constexpr):
    """Grid: (HEADS * blocks of BLOCK_M query rows, parts). MAX_M: query rows (tokens * GROUP) of the longest row."""
    part = tl.program_id(1)
    row = tl.load(parts_ptr + part * 4)
    if row < 0:
        return
    first = tl.load(parts_ptr + part * 4 + 1)
    count = tl.load(parts_ptr + part * 4 + 2)
    divided = tl.load(parts_ptr + part * 4 + 3)
    head = tl.program_id(0) % HEADS
    m = tl.program_id(0) // HEADS * BLOCK_M + tl.arange(0, BLOCK_M)
    token = m // GROUP
    query_len = tl.load(lens_ptr + row)
    context = tl.load(contexts_ptr + row)
    live = token < query_len
    column = tl.arange(0, BLOCK_D)
    wanted = live[:, None] & (column < D)[None, :]
    place = (tl.load(starts_ptr + row) + token).to(tl.int64)
    q_head = head * GROUP + m % GROUP
    q = tl.load(q_ptr + place[:, None] * q_stride + q_head[:, None] * D + column[None, :], mask=wanted, other=0.0)
    seen = context - query_len + 1 + token  # positions below it
    keys_ptr = kv_ptr + layer.to(tl.int64) * (2 * PAGE * HEADS * D)
    values_ptr = keys_ptr + PAGE * HEADS * D
    table_ptr += row.to(tl.int64) * table_stride
    if SCALED:
        scale_log2e *= tl.load(scales_ptr + layer * 2)
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = tl.minimum((first + count) * BLOCK_N, context)
    for start in tl.range(first * BLOCK_N, end, BLOCK_N):
        keys = _tile_of(keys_ptr, table_ptr, start, head, end, PAGE_STRIDE, PAGE, HEADS, D, BLOCK_N, BLOCK_D, False)
        values = _tile_of(values_ptr, table_ptr, start, head, end, PAGE_STRIDE, PAGE, HEADS, D, BLOCK_N, BLOCK_D, True)
        scores = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="ieee") * scale_log2e
        at = start + tl.arange(0, BLOCK_N)
        scores = tl.where((at[None, :] < seen[:, None]) & (at < end)[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shares = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        weight = weight * fade + tl.sum(shares, 1)
        sums = tl.dot(shares.to(q.dtype), values.to(q.dtype), sums * fade[:, None], input_precision="ieee")
        top = higher
    some = weight > 0  # a part may hold nothing that an early token sees
    sums = sums / tl.where(some, weight, 1.0)[:, None]
    if SCALED:
        sums *= tl.load(scales_ptr + layer * 2 + 1)
    if divided == 0:
        out = out_ptr + place[:, None] * (HEADS * GROUP * D) + q_head[:, None] * D + column[None, :]
        tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=wanted)
    else:
        line = (part.to(tl.int64) * HEADS + head) * MAX_M + m
        tl.store(sums_ptr + line[:, None] * D + column[None, :], sums, mask=wanted)
        lse = tl.where(some, top + tl.log2(tl.where(some, weight, 1.0)), -float("inf"))
        tl.store(lse_ptr + line, lse, mask=live)


@jit
def _merge_kernel(sums_ptr, lse_ptr, out_ptr, part_starts_ptr, starts_ptr, lens_ptr,
                  GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, MAX_M: tl.constexpr, BLOCK: tl.constexpr,
                  BLOCK_D: tl.constexpr):
    """Grid: (HEADS * MAX_M, rows). BLOCK parts at a time, in order."""
    row = tl.program_id(1)
    first = tl.load(part_starts_ptr + row)
    count = tl.load(part_starts_ptr + row + 1) - first
    head = tl.program_id(0) // MAX_M
    m = tl.program_id(0) % MAX_M
    if (count <= 1) | (m // GROUP >= tl.load(lens_ptr + row)):
        return
    column = tl.arange(0, BLOCK_D)
    top = tl.full([1], -1e30, tl.float32)
    weight = tl.zeros([1], tl.float32)
    sums = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, count, BLOCK):
        part = begin + tl.arange(0, BLOCK)
        at = ((first + part).to(tl.int64) * HEADS + head) * MAX_M + m
        lse = tl.load(lse_ptr + at, mask=part < count, other=-float("inf"))
        shown = (lse > -1e30)[:, None] & (column < D)[None, :]
        each = tl.load(sums_ptr + at[:, None] * D + column[None, :], mask=shown, other=0.0)
        higher = tl.maximum(top, tl.max(lse, 0))
        share = tl.exp2(lse - higher)
        fade = tl.exp2(top - higher)
        weight = weight * fade + tl.sum(share, 0)
        sums = sums * fade + tl.sum(each * share[:, None], 0)
        top = higher
    place = tl.load(starts_ptr + row).to(tl.int64) + m // GROUP
    at = (place * HEADS + head) * GROUP + m % GROUP
    tl.store(out_ptr + at * D + column, (sums / weight).to(out_ptr.dtype.element_ty), mask=column < D)


def _paged_decode_triton(q: Tensor, kv: Tensor, layer: int, rows: Rows, work: DecodeWork, scale: float,
                         kv_scales: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    num_pages, num_layers, _, page_size, kv_heads, head_dim = kv.shape
    group = q.shape[1] // kv_heads
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    max_m = group * rows.max_query_len
    block_m = min(max(next_power_of_2(max_m), 16), _MAX_BLOCK_M)
    num_parts, num_rows = work.parts.shape[0], rows.context_lens.shape[0]
    sums = torch.empty((num_parts, kv_heads, max_m, head_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((num_parts, kv_heads, max_m), dtype=torch.float32, device=q.device)
    shared = {"GROUP": group, "HEADS": kv_heads, "D": head_dim, "MAX_M": max_m, "BLOCK_D": next_power_of_2(head_dim)}
    launch = tuning.pick("paged_decode", head_dim=head_dim, block_m=block_m, kv=str(kv.dtype).removeprefix("torch."))
    _decode_kernel[(kv_heads * -(-max_m // block_m), num_parts)](
        q, kv, out, sums, lse, work.parts, rows.query_starts, rows.query_lens, rows.context_lens, rows.page_table,
        kv_scales, layer, scale * LOG2E, q.stride(0), rows.page_table.stride(0),
        PAGE=page_size, PAGE_STRIDE=num_layers * 2 * page_size * kv_heads * head_dim, BLOCK_M=block_m,
        BLOCK_N=work.tile, SCALED=kv_scales is not None, **shared, **launch,
    )  # fmt: skip
    if num_parts > num_rows:
        _merge_kernel[(kv_heads * max_m, num_rows)](
            sums, lse, out, work.starts, rows.query_starts, rows.query_lens, BLOCK=_MERGE_BLOCK, num_warps=4, **shared
        )
    return out


def decode_tile(head_dim: int) -> int:
    """Tokens in a tile of the decode kernel on this GPU, as `plan_decode` wants to know them."""
    return tuning.pick("decode_tile", head_dim=head_dim)["tile"]


def _why_not(q: Tensor, kv: Tensor, layer: int, rows: Rows, work: DecodeWork, scale: float,
             kv_scales: Tensor | None = None, out: Tensor | None = None) -> str | None:
    return why_not_rows(q, kv)


def _case(shapes: list[tuple[int, int]], *, heads: int = 4, kv_heads: int = 2, head_dim: int = 64, page_size: int = 16,
          width: int = 3, fixed: int = 0, **more):
    def make(device: str, dtype: torch.dtype) -> dict:
        arguments = make_rows(shapes, device, dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                              page_size=page_size, **more)  # fmt: skip
        tile = decode_tile(head_dim)
        max_parts = len(shapes) + (sum(-(-n // (tile * fixed)) for _, n in shapes) if fixed else width)
        if torch.device(device).type == "meta":
            ints = {"dtype": torch.int32, "device": device}
            work = DecodeWork(torch.empty(max_parts, 4, **ints), torch.empty(len(shapes) + 1, **ints), tile)
        else:
            work = plan_decode.reference(arguments["rows"].context_lens, tile, width, max_parts, fixed)
        return arguments | {"work": work}

    return make


def _traffic(q: Tensor, kv: Tensor, layer: int, rows: Rows, work: DecodeWork, scale: float,
             kv_scales: Tensor | None = None, out: Tensor | None = None) -> tuple[int, int]:
    tokens, per_token = int(rows.context_lens.sum()), 2 * kv.shape[4] * kv.shape[5]
    return (tokens * per_token * kv.element_size() + 2 * q.numel() * q.element_size(),
            4 * tokens * rows.max_query_len * q.shape[1] * q.shape[2])  # fmt: skip


def _elements(function: str, constants: dict) -> int:
    """Of keys and values in a tile; of a merged block."""
    return (2 * constants["BLOCK_N"] if function == "_decode_kernel" else constants["BLOCK"]) * constants["D"]


_RAGGED = [(1, 1), (1, 64), (1, 129), (1, 300)]
_QWEN3_06B = dict(heads=16, kv_heads=8, head_dim=128, layers=28)
_QWEN25_7B = dict(heads=28, kv_heads=4, head_dim=128, layers=28)
_BF16 = (torch.bfloat16,)

paged_decode = kernel(
    "paged_decode", reference=_paged_decode_torch, triton=_paged_decode_triton, why_not=_why_not, traffic=_traffic,
    elements=_elements, tolerances={torch.float32: 8e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
    cases=(
        Case("ragged lengths", _case(_RAGGED)),
        Case("many parts of one row", _case([(1, 1500)], heads=2, kv_heads=1, width=20)),
        Case("group of 7 in pages of 64", _case(_RAGGED, heads=7, kv_heads=1, head_dim=128, page_size=64, gap=48)),
        Case("head_dim 80", _case([(1, 70), (1, 3)], head_dim=80, page_size=128)),
        Case("head_dim 96 without groups", _case([(1, 33), (1, 90)], heads=2, head_dim=96, page_size=32)),
        Case("head_dim 256", _case([(1, 40)], head_dim=256)),
        Case("several new tokens", _case([(8, 8), (3, 70), (1, 66), (5, 133)], heads=6)),
        Case("more query rows than a block", _case([(8, 140), (2, 2)], heads=32, page_size=64)),
        Case("padding", _case([(1, 0), (1, 20), (1, 0)])),
        Case("parts of fixed size", _case([(1, 300), (1, 64), (2, 129)], fixed=1)),
        Case("fp8 pages", _case(_RAGGED, kv_dtype=torch.float8_e4m3fn, page_size=64)),
        Case("Qwen3-0.6B", _case([(1, 1024)] * 32, page_size=64, width=49, **_QWEN3_06B), production=True),
        Case("Qwen2.5-7B", _case([(1, 1024)] * 32, page_size=64, width=99, **_QWEN25_7B),
             (torch.bfloat16, torch.float16), production=True),
        Case("Qwen2.5-7B, pages of 16", _case([(1, 1024)] * 32, page_size=16, width=99, **_QWEN25_7B), _BF16, True),
        Case("Qwen2.5-7B, fp8 pages", _case([(1, 1024)] * 32, page_size=64, width=99, kv_dtype=torch.float8_e4m3fn,
                                            **_QWEN25_7B), _BF16, True),
        Case("Qwen2.5-7B, 5 new tokens", _case([(5, 1024)] * 32, page_size=64, width=99, **_QWEN25_7B), _BF16, True),
        Case("head_dim 64 of a model", _case([(1, 1024)] * 32, page_size=64, width=99, heads=9, kv_heads=3, layers=30),
             (torch.float32, torch.bfloat16), production=True),
        Case("head_dim 256 of a model", _case([(1, 1024)] * 32, page_size=64, heads=8, kv_heads=4, head_dim=256),
             _BF16, True),
    ),
)  # fmt: skip
