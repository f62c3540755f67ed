"""Causal attention of ragged rows over paged keys and values.

    out[t, h] = softmax(scale * q[t, h] . K[0..p(t), h // group]) @ V[0..p(t), h // group]

where p(t) is the token's position in its sequence. A row computes `query_len >= 1` tokens
that end at its `context_len`; everything before them lies in pages already. Statistics
are float32.

Rows of one token (decode) run in groups of similar length, the query heads that share a
K/V head folded into one small matrix. Longer rows run one by one. Where there are C kernels,
rows of few tokens do neither, and longer ones do not where there is AMX: see `streamed`. What
depends on the step only, not on the layer, is worked out once, by `plan_attention`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crane.kernels.paged_plan import PagedPlan, plan_rows
from crane.kernels.pages import gather_kv, slot_index
from crane.kernels.registry import kernel
from crane.kernels.rows import why_not_pages
from crane.kernels.streamed import StreamedRows, TiledRows, streamed_attention, streams, tiled_attention, tiles

# Padding a row to its group's longest costs work; one more group costs a round of small
# operations, about as much as this many padded elements of K.
_GROUP_PADDING = 1 << 16
# A group's gathered keys stay below this many elements, so that memory stays bounded.
_GROUP_ELEMENTS = 1 << 23
# Padding in such steps keeps a bfloat16 row's result the same bit for bit on the CPU, whatever
# the length of the longest row in its group; it would differ in the last bits otherwise.
_TOKEN_MULTIPLE = 32
# Rows of up to so many tokens are streamed: one matrix product pays from about there.
_STREAMED_TOKENS = 8


@dataclass(frozen=True)
class DecodeGroup:
    """Rows of one new token, padded to the same number of tokens.

    tokens: int64 [num_rows], the rows' places in per-token tensors; None when the group is
        the whole step, in order.
    index: int64 [num_rows, num_tokens], `slot_index` of every token; padding points to the
        row's own first token, never to memory that may hold anything.
    mask: [num_rows, 1, 1, num_tokens] of kv's dtype, 0, or -inf for padding.
    """

    tokens: Tensor | None
    index: Tensor
    mask: Tensor


@dataclass(frozen=True)
class PrefillRow:
    """One row of several new tokens: `[start : start + count]` of per-token tensors.

    index: int64 [1, context_len], `slot_index` of every token, and
    mask: [count, context_len] of kv's dtype, 0 or -inf; both None when the row has no
    earlier tokens, so that its own keys and values are all there is.
    """

    start: int
    count: int
    index: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True)
class AttentionPlan:
    """How one step's attention runs; the same for every layer."""

    decode: list[DecodeGroup]
    prefill: list[PrefillRow]
    streamed: StreamedRows | None = None
    tiled: TiledRows | None = None


def _plan_torch(
    kv: Tensor, query_lens: list[int], query_starts: list[int], context_lens: list[int], page_table: Tensor,
    fixed: bool = False,
) -> AttentionPlan | PagedPlan:
    """How the rows of one step are computed: index tensors and masks, or work for the Triton kernels.

    query_lens, query_starts, context_lens: one host int a row, as in `ForwardContext`.
    page_table: int64 [num_rows, max_pages]. kv: see `pages`; only its shape, dtype and
    device are read. fixed: no row's result may depend on the others.
    """
    if kv.dtype == torch.float8_e4m3fn:
        return plan_rows(kv, query_lens, query_starts, context_lens, page_table, fixed)
    longest = _STREAMED_TOKENS if streams(kv) else 0
    short = [row for row, count in enumerate(query_lens) if count <= longest]
    single = [row for row, count in enumerate(query_lens) if longest < count == 1]
    longer = [row for row, count in enumerate(query_lens) if count > max(longest, 1)]
    if fixed and kv.device.type != "cpu":  # see _TOKEN_MULTIPLE
        groups = [[row] for row in single]
    else:
        groups = _group_by_length(single, context_lens, kv.shape[4] * kv.shape[5])
    tiled = None
    if longer and tiles(kv):
        facts = [(query_starts[row], query_lens[row], row, context_lens[row]) for row in longer]
        tiled, longer = TiledRows(torch.tensor(facts), page_table.contiguous()), []
    return AttentionPlan(
        [_plan_decode(rows, query_starts, context_lens, page_table, kv) for rows in groups],
        [_plan_prefill(query_starts[row], query_lens[row], context_lens[row], page_table[row], kv)
         for row in longer],
        _plan_streamed(short, query_lens, query_starts, context_lens, page_table) if short else None,
        tiled,
    )


def _why_not(kv: Tensor, *rows, fixed: bool = False) -> str | None:
    return why_not_pages(kv)


plan_attention = kernel("attention", reference=_plan_torch, triton=plan_rows, why_not=_why_not, cases=())


def paged_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, kv: Tensor, layer: int, plan: AttentionPlan | PagedPlan,
    scale: float, kv_scales: Tensor | None = None
) -> Tensor:
    """Attention of all rows of a step, in one layer.

    q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim], this
    step's, which are in kv already (`qkv_post`); num_heads is a multiple of num_kv_heads.
    A `PagedPlan` does without k and v.
    kv: [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim]. All of one dtype, but
    with a `PagedPlan` kv may be float8_e4m3fn, and kv_scales float32 [num_layers, 2].
    Returns [num_tokens, num_heads * head_dim].
    """
    if isinstance(plan, PagedPlan):
        return plan.attend(q, kv, layer, scale, kv_scales).flatten(1)
    if plan.decode and plan.decode[0].tokens is None:
        return _decode(q, kv, layer, plan.decode[0], scale).flatten(1)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if plan.streamed:
        streamed_attention(q, out, kv, layer, plan.streamed, scale)
    if plan.tiled:
        tiled_attention(q, out, kv, layer, plan.tiled, scale)
    for group in plan.decode:
        attended = _decode(q.index_select(0, group.tokens), kv, layer, group, scale)
        out.index_copy_(0, group.tokens, attended)
    for row in plan.prefill:
        _prefill(q, k, v, kv, layer, row, scale, out)
    return out.flatten(1)


def _decode(q: Tensor, kv: Tensor, layer: int, group: DecodeGroup, scale: float) -> Tensor:
    keys, values = gather_kv(kv, layer, group.index)
    # [num_rows, num_kv_heads, num_heads / num_kv_heads, head_dim]
    queries = q.unflatten(1, (kv.shape[4], -1))
    return F.scaled_dot_product_attention(
        queries, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=group.mask, scale=scale
    ).flatten(1, 2)


def _prefill(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor, layer: int, row: PrefillRow, scale: float, out: Tensor
) -> None:
    own = slice(row.start, row.start + row.count)
    keys, values = k[own], v[own]
    if row.index is not None:
        keys, values = (side[0] for side in gather_kv(kv, layer, row.index))
    # [num_kv_heads, group, count, head_dim]; the keys repeat over the group without a copy
    queries = q[own].transpose(0, 1).unflatten(0, (kv.shape[4], -1))
    attended = F.scaled_dot_product_attention(
        queries,
        keys.transpose(0, 1).unsqueeze(1).expand(-1, queries.shape[1], -1, -1),
        values.transpose(0, 1).unsqueeze(1).expand(-1, queries.shape[1], -1, -1),
        attn_mask=row.mask,
        is_causal=row.mask is None,
        scale=scale,
    )
    out[own] = attended.flatten(0, 1).transpose(0, 1)


def _group_by_length(rows: list[int], context_lens: list[int], width: int) -> list[list[int]]:
    """Rows in groups worth padding to one length, longest first. width: elements of K a token."""
    groups = []
    padding = longest = 0
    for row in sorted(rows, key=lambda row: -context_lens[row]):
        padding += (longest - context_lens[row]) * width
        full = groups and (len(groups[-1]) + 1) * longest * width > _GROUP_ELEMENTS
        if not groups or full or padding > _GROUP_PADDING:
            groups.append([])
            padding, longest = 0, context_lens[row]
        groups[-1].append(row)
    return [sorted(group) for group in groups]


def _plan_decode(
    rows: list[int], query_starts: list[int], context_lens: list[int], page_table: Tensor, kv: Tensor
) -> DecodeGroup:
    device = kv.device
    lengths = [context_lens[row] for row in rows]
    num_tokens = -(-max(lengths) // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE
    place = torch.arange(num_tokens, device=device).unsqueeze(0)
    padded = place >= torch.tensor(lengths, device=device).unsqueeze(1)  # [num_rows, num_tokens]
    mask = torch.zeros(padded.shape, dtype=kv.dtype, device=device).masked_fill_(padded, float("-inf"))
    pages, tokens = page_table, None
    if len(rows) < len(query_starts):
        pages = page_table[torch.tensor(rows, device=device)]
        tokens = torch.tensor([query_starts[row] for row in rows], device=device)
    return DecodeGroup(
        tokens=tokens,
        index=_token_index(pages, place.masked_fill(padded, 0), kv),
        mask=mask[:, None, None],
    )


def _plan_streamed(
    rows: list[int], query_lens: list[int], query_starts: list[int], context_lens: list[int], page_table: Tensor
) -> StreamedRows:
    places = [(row, place) for row in rows for place in range(query_lens[row])]
    return StreamedRows(
        tokens=torch.tensor([query_starts[row] + place for row, place in places]),
        table_rows=torch.tensor([row for row, _ in places]),
        lengths=torch.tensor([context_lens[row] - query_lens[row] + place + 1 for row, place in places]),
        page_table=page_table.contiguous(),
    )


def _plan_prefill(start: int, count: int, context_len: int, pages: Tensor, kv: Tensor) -> PrefillRow:
    if context_len == count:
        return PrefillRow(start, count, None, None)
    place = torch.arange(context_len, device=kv.device).unsqueeze(0)
    mask = torch.full((count, context_len), float("-inf"), dtype=kv.dtype, device=kv.device)
    index = _token_index(pages.unsqueeze(0), place, kv)
    return PrefillRow(start, count, index, mask.triu_(context_len - count + 1))


def _token_index(pages: Tensor, place: Tensor, kv: Tensor) -> Tensor:
    """`slot_index` of the tokens at `place` of each row: int64 [num_rows, num_tokens].

    pages: int64 [num_rows, max_pages]; place: int64 [num_rows, num_tokens].
    """
    page_size = kv.shape[3]
    return slot_index(pages.gather(1, place // page_size) * page_size + place % page_size, kv)
