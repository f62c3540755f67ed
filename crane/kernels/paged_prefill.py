"""Attention of rows with many new tokens (prompts, chunks of them, what follows a shared prefix) over KV pages; the
formula is in `rows`.

A tile is BLOCK_M query rows of one row's new tokens for one K/V head; a query row is a token and one of the query heads
that share it. `tile_rows` lists the tiles on the host, from lengths that are there, the longest first. A program
goes through the keys in two loops: those that all of its tokens see, without any mask, then the diagonal.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crane.kernels import tuning
from crane.kernels.lang import INTERPRETED, LOG2E, TensorDescriptor, arch, jit, next_power_of_2, tl
from crane.kernels.registry import Case, kernel
from crane.kernels.rows import Rows, attend_rows, make_rows, why_not_rows
from crane.kernels.transfer import upload

# Up to so many query rows a smaller tile wastes less.
_FEW = 64


@dataclass(frozen=True)
class PrefillTiles:
    """tiles: int32 [num_tiles, 2]: row, first query row. block_m: query rows in a tile."""

    tiles: Tensor
    block_m: int


def tile_rows(query_lens: list[int], context_lens: list[int], group: int, head_dim: int, dtype: torch.dtype,
              device: torch.device) -> PrefillTiles:
    """The tiles of rows with these lengths. group: query heads that share a K/V head."""
    block_m = _config(max(query_lens) * group, head_dim, dtype)["BLOCK_M"]
    # (keys to go through, row, first query row)
    tiles = [(context_lens[row] - count + min(first + block_m, count * group) // group, row, first)
             for row, count in enumerate(query_lens) for first in range(0, count * group, block_m)]
    tiles.sort(key=lambda tile: -tile[0])
    return PrefillTiles(upload([tile[1:] for tile in tiles], torch.int32, device), block_m)


def _paged_prefill_torch(q: Tensor, kv: Tensor, layer: int, rows: Rows, tiles: PrefillTiles, scale: float,
                         kv_scales: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """One layer's attention of the rows.

    tiles: from `tile_rows`. For the rest see `rows.attend_rows`.
    """
    return attend_rows(q, kv, layer, rows, scale, kv_scales, out)


@jit
def _tile_of(kv, table_ptr, start, head, layer, side, end, LAYERS: tl.constexpr, PAGE: tl.constexpr,
             HEADS: tl.constexpr, D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """[N, BLOCK_D] keys (side 0) or values (side 1) of the tokens from `start`; those beyond `end` may be anything."""
    token = start + tl.arange(0, N)
    column = tl.arange(0, BLOCK_D)
    if PAGE >= N:  # a tile lies in one page
        page = tl.load(table_ptr + start // PAGE)
    else:
        page = tl.load(table_ptr + token // PAGE, mask=token <= end, other=0)
    if TMA:  # all pages seen as [slots of all layers, HEADS * D]
        slot = ((page * LAYERS + layer) * 2 + side) * PAGE + start % PAGE
        tile = kv.load([slot.to(tl.int32), head * D])
    else:
        slot = ((page.to(tl.int64) * LAYERS + layer) * 2 + side) * PAGE + token % PAGE
        at = kv + (slot * HEADS + head)[:, None] * D + column[None, :]
        if D == BLOCK_D:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(column < D)[None, :], other=0.0)
    return tile


@jit
def _step(q, keys, values, top, weight, sums, scale_log2e, shown, MASKED: tl.constexpr):
    scores = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="ieee") * scale_log2e
    if MASKED:
        scores = tl.where(shown, scores, -1e30)
    higher = tl.maximum(top, tl.max(scores, 1))
    shares = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(top - higher)
    weight = weight * fade + tl.sum(shares, 1)
    sums = tl.dot(shares.to(q.dtype), values.to(q.dtype), sums * fade[:, None], input_precision="ieee")
    return higher, weight, sums


@jit(do_not_specialize=["layer", "table_stride"])
def _prefill_kernel(q_ptr, kv, out_ptr, tiles_ptr, starts_ptr, lens_ptr, contexts_ptr, table_ptr, scales_ptr, layer,
                    scale_log2e, q_stride, table_stride,
                    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, LAYERS: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SCALED: tl.constexpr,
                    TMA: tl.constexpr):
    """Grid: (tiles, HEADS). kv: a pointer, or with TMA a descriptor of boxes [BLOCK_N, D]."""
    row = tl.load(tiles_ptr + tl.program_id(0) * 2)
    first = tl.load(tiles_ptr + tl.program_id(0) * 2 + 1)
    head = tl.program_id(1)
    m = first + tl.arange(0, BLOCK_M)
    token = m // GROUP
    query_len = tl.load(lens_ptr + row)
    earlier = tl.load(contexts_ptr + row) - query_len
    column = tl.arange(0, BLOCK_D)
    wanted = (token < query_len)[:, None] & (column < D)[None, :]
    place = (tl.load(starts_ptr + row) + token).to(tl.int64)
    q_head = head * GROUP + m % GROUP
    q = tl.load(q_ptr + place[:, None] * q_stride + q_head[:, None] * D + column[None, :], mask=wanted, other=0.0)
    if SCALED:
        scale_log2e *= tl.load(scales_ptr + layer * 2)
    table_ptr += row.to(tl.int64) * table_stride
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    position = earlier + token
    last = earlier + tl.minimum((first + BLOCK_M - 1) // GROUP, query_len - 1)  # what the last token sees
    full = (earlier + first // GROUP + 1) // BLOCK_N * BLOCK_N  # below it every token sees every key
    for start in tl.range(0, full, BLOCK_N):
        keys = _tile_of(kv, table_ptr, start, head, layer, 0, last, LAYERS, PAGE, HEADS, D, BLOCK_N, BLOCK_D, TMA)
        values = _tile_of(kv, table_ptr, start, head, layer, 1, last, LAYERS, PAGE, HEADS, D, BLOCK_N, BLOCK_D, TMA)
        top, weight, sums = _step(q, keys, values, top, weight, sums, scale_log2e, wanted, False)
    for start in tl.range(full, last + 1, BLOCK_N):
        keys = _tile_of(kv, table_ptr, start, head, layer, 0, last, LAYERS, PAGE, HEADS, D, BLOCK_N, BLOCK_D, TMA)
        values = _tile_of(kv, table_ptr, start, head, layer, 1, last, LAYERS, PAGE, HEADS, D, BLOCK_N, BLOCK_D, TMA)
        at = start + tl.arange(0, BLOCK_N)
        # slots behind the end may hold anything, and 0 * NaN is NaN
        values = tl.where((at <= last)[:, None], values, 0.0)
        shown = at[None, :] <= position[:, None]
        top, weight, sums = _step(q, keys, values, top, weight, sums, scale_log2e, shown, True)
    sums = sums / weight[:, None]
    if SCALED:
        sums *= tl.load(scales_ptr + layer * 2 + 1)
    at = place[:, None] * (HEADS * GROUP * D) + q_head[:, None] * D + column[None, :]
    tl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=wanted)


def _paged_prefill_triton(q: Tensor, kv: Tensor, layer: int, rows: Rows, tiles: PrefillTiles, scale: float,
                          kv_scales: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    num_pages, num_layers, _, page_size, kv_heads, head_dim = kv.shape
    group = q.shape[1] // kv_heads
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch = _config(rows.max_query_len * group, head_dim, q.dtype)
    block_n = launch["BLOCK_N"]
    tma = _takes_tma(kv, block_n)
    if tma:
        flat = kv.view(-1, kv_heads * head_dim)
        kv = TensorDescriptor(flat, flat.shape, flat.stride(), [block_n, head_dim])
    _prefill_kernel[(tiles.tiles.shape[0], kv_heads)](
        q, kv, out, tiles.tiles, rows.query_starts, rows.query_lens, rows.context_lens, rows.page_table, kv_scales,
        layer, scale * LOG2E, q.stride(0), rows.page_table.stride(0), GROUP=group, HEADS=kv_heads, D=head_dim,
        PAGE=page_size, LAYERS=num_layers, BLOCK_D=next_power_of_2(head_dim), SCALED=kv_scales is not None, TMA=tma,
        **launch,
    )  # fmt: skip
    return out


def _takes_tma(kv: Tensor, block_n: int) -> bool:
    """Whether whole tiles can be fetched by the copy engine: a box of one page, of powers of two."""
    page_size, head_dim = kv.shape[3], kv.shape[5]
    return ((arch() >= 90 or INTERPRETED) and page_size >= block_n and head_dim == next_power_of_2(head_dim)
            and kv.element_size() == 2 and kv.numel() // head_dim < 1 << 31)  # fmt: skip


def _config(query_rows: int, head_dim: int, dtype: torch.dtype) -> dict:
    return tuning.pick("paged_prefill", rows="few" if query_rows <= _FEW else "many", head_dim=head_dim,
                       dtype=str(dtype).removeprefix("torch."))  # fmt: skip


def _why_not(q: Tensor, kv: Tensor, layer: int, rows: Rows, tiles: PrefillTiles, scale: float,
             kv_scales: Tensor | None = None, out: Tensor | None = None) -> str | None:
    return why_not_rows(q, kv)


def _case(shapes: list[tuple[int, int]], *, heads: int = 4, kv_heads: int = 2, head_dim: int = 64, page_size: int = 16,
          **more):
    def make(device: str, dtype: torch.dtype) -> dict:
        arguments = make_rows(shapes, device, dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                              page_size=page_size, **more)  # fmt: skip
        lens, contexts = zip(*shapes)
        tiles = tile_rows(lens, contexts, heads // kv_heads, head_dim, dtype, device)
        return arguments | {"tiles": tiles}

    return make


def _traffic(q: Tensor, kv: Tensor, layer: int, rows: Rows, tiles: PrefillTiles, scale: float,
             kv_scales: Tensor | None = None, out: Tensor | None = None) -> tuple[int, int]:
    counts, contexts = rows.query_lens.long(), rows.context_lens.long()
    pairs = int((counts * contexts - counts * (counts - 1) // 2).sum())  # of a token and one that it sees
    pages = int(contexts.sum()) * 2 * kv.shape[4] * kv.shape[5] * kv.element_size()
    return pages + 2 * q.numel() * q.element_size(), 4 * pairs * q.shape[1] * q.shape[2]


def _elements(function: str, constants: dict) -> int:
    """Pairs of a query row and a key in a tile."""
    return constants["BLOCK_M"] * constants["BLOCK_N"]


_QWEN3_06B = dict(heads=16, kv_heads=8, head_dim=128, layers=28, page_size=64)
_QWEN25_7B = dict(heads=28, kv_heads=4, head_dim=128, layers=28, page_size=64)
_BF16 = (torch.bfloat16,)

paged_prefill = kernel(
    "paged_prefill", reference=_paged_prefill_torch, triton=_paged_prefill_triton, why_not=_why_not, traffic=_traffic,
    elements=_elements, tolerances={torch.float32: 8e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
    cases=(
        Case("whole prompts", _case([(40, 40), (1, 1), (70, 70)])),
        Case("chunks behind a prefix", _case([(33, 100), (5, 140), (2, 17)])),
        Case("group of 7 in pages of 64", _case([(20, 90), (9, 9)], heads=7, kv_heads=1, page_size=64, gap=16)),
        Case("pages of 128", _case([(30, 150)], page_size=128, head_dim=128)),
        Case("head_dim 80", _case([(20, 20), (3, 30)], head_dim=80, page_size=64)),
        Case("head_dim 96 without groups", _case([(18, 40)], heads=2, head_dim=96, page_size=32)),
        Case("head_dim 256", _case([(20, 35)], head_dim=256, page_size=64)),
        Case("fp8 pages", _case([(40, 100), (3, 3)], kv_dtype=torch.float8_e4m3fn, page_size=64)),
        Case("Qwen3-0.6B", _case([(2048, 2048)] * 4, **_QWEN3_06B), _BF16, True),
        Case("Qwen2.5-7B", _case([(8192, 8192)], **_QWEN25_7B), (torch.bfloat16, torch.float16), True),
        Case("Qwen2.5-7B, short chunks", _case([(9, 4096)] * 4, **_QWEN25_7B), _BF16, True),
        Case("Qwen2.5-7B, pages of 16", _case([(2048, 2048)], **(_QWEN25_7B | {"page_size": 16})), _BF16, True),
        Case("Qwen2.5-7B, fp8 pages", _case([(2048, 2048)], kv_dtype=torch.float8_e4m3fn, **_QWEN25_7B), _BF16, True),
        Case("head_dim 64 of a model", _case([(2048, 2048)], heads=9, kv_heads=3, layers=30, page_size=64),
             (torch.float32, torch.bfloat16), True),
        Case("head_dim 80 of a model", _case([(2048, 2048)], heads=8, kv_heads=8, head_dim=80, page_size=64),
             _BF16, True),
        Case("head_dim 256 of a model", _case([(2048, 2048)], heads=8, kv_heads=4, head_dim=256, page_size=64),
             _BF16, True),
    ),
)  # fmt: skip
