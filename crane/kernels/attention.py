"""Causal attention of ragged rows over paged keys and values.

    out[t, h] = softmax(scale * q[t, h] . K[0..p(t), h // group]) @ V[0..p(t), h // group]

where p(t) is the token's position in its sequence. A row computes `query_len >= 1` tokens
that end at its `context_len`; everything before them lies in pages already. Statistics
are float32.

Rows of one token (decode) are gathered in groups of similar length, the query heads that
share a K/V head folded into one small matrix. Longer rows run one by one. What depends on
the step only, not on the layer, is worked out once, by `plan_attention`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crane.kernels.pages import gather_heads, slot_index

# Padding a row to its group's longest costs work; one more group costs a round of small
# operations, about as much as this many padded elements of K.
_GROUP_PADDING = 1 << 16
# A group's gathered keys stay below this many elements, so that memory stays bounded.
_GROUP_ELEMENTS = 1 << 23
_TOKEN_MULTIPLE = 16


@dataclass(frozen=True)
class DecodeGroup:
    """Rows of one new token, padded to the same number of tokens.

    tokens: int64 [num_rows], the rows' places in per-token tensors.
    index: int64 [num_rows * num_kv_heads * num_tokens], see `gather_heads`; padding points
        to the row's own first token, never to memory that may hold anything.
    bias: float32 [num_rows * num_kv_heads, 1, num_tokens], 0 or -inf for padding.
    """

    tokens: Tensor
    index: Tensor
    bias: Tensor


@dataclass(frozen=True)
class PrefillRow:
    """One row of several new tokens: `[start : start + count]` of per-token tensors.

    index: int64 [num_kv_heads * context_len], see `gather_heads`, and
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


def plan_attention(
    query_lens: list[int], query_starts: list[int], context_lens: list[int], page_table: Tensor, kv: Tensor
) -> AttentionPlan:
    """Index tensors and masks for the rows of one step.

    query_lens, query_starts, context_lens: one host int a row, as in `ForwardContext`.
    page_table: int64 [num_rows, max_pages]. kv: see `pages`; only its shape, dtype and
    device are read.
    """
    single = [row for row, count in enumerate(query_lens) if count == 1]
    longer = [row for row, count in enumerate(query_lens) if count > 1]
    return AttentionPlan(
        [_plan_decode(rows, query_starts, context_lens, page_table, kv)
         for rows in _group_by_length(single, context_lens, kv.shape[4] * kv.shape[5])],
        [_plan_prefill(query_starts[row], query_lens[row], context_lens[row], page_table[row], kv)
         for row in longer],
    )


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor, layer: int, plan: AttentionPlan, scale: float
) -> Tensor:
    """Attention of all rows of a step, in one layer.

    q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim], this
    step's, which are in kv already (`write_kv`); num_heads is a multiple of num_kv_heads.
    kv: [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim]. All of one dtype.
    Returns [num_tokens, num_heads * head_dim].
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for group in plan.decode:
        _decode(q, kv, layer, group, scale, out)
    for row in plan.prefill:
        _prefill(q, k, v, kv, layer, row, scale, out)
    return out.flatten(1)


def _decode(q: Tensor, kv: Tensor, layer: int, group: DecodeGroup, scale: float, out: Tensor) -> None:
    num_heads, head_dim = q.shape[1:]
    num_pairs, _, num_tokens = group.bias.shape  # a pair: one row, one K/V head
    keys, values = gather_heads(kv, layer, group.index)
    keys = keys.view(num_pairs, num_tokens, head_dim)
    values = values.view(num_pairs, num_tokens, head_dim)
    queries = q.index_select(0, group.tokens).view(num_pairs, -1, head_dim)
    # scores that were rounded to bfloat16 would cost ten times the error of the rest
    scores = torch.baddbmm(group.bias, queries.float(), keys.float().transpose(1, 2), alpha=scale)
    attended = torch.bmm(torch.softmax(scores, -1).to(q.dtype), values)
    out.index_copy_(0, group.tokens, attended.view(-1, num_heads, head_dim))


def _prefill(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor, layer: int, row: PrefillRow, scale: float, out: Tensor
) -> None:
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = kv.shape[4]
    own = slice(row.start, row.start + row.count)
    if row.index is None:
        keys, values = k[own].transpose(0, 1), v[own].transpose(0, 1)
    else:
        keys, values = (side.view(num_kv_heads, -1, head_dim) for side in gather_heads(kv, layer, row.index))
    # [num_kv_heads, group, count, head_dim]; the keys repeat over the group without a copy
    queries = q[own].transpose(0, 1).unflatten(0, (num_kv_heads, -1))
    group = queries.shape[1]
    attended = F.scaled_dot_product_attention(
        queries,
        keys.unsqueeze(1).expand(-1, group, -1, -1),
        values.unsqueeze(1).expand(-1, group, -1, -1),
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
    return groups


def _plan_decode(
    rows: list[int], query_starts: list[int], context_lens: list[int], page_table: Tensor, kv: Tensor
) -> DecodeGroup:
    num_kv_heads, device = kv.shape[4], kv.device
    longest = max(context_lens[row] for row in rows)
    num_tokens = -(-longest // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE
    lengths = torch.tensor([context_lens[row] for row in rows], device=device).unsqueeze(1)
    place = torch.arange(num_tokens, device=device).unsqueeze(0)
    padded = place >= lengths  # [num_rows, num_tokens]
    index = _head_index(page_table[torch.tensor(rows, device=device)], place.masked_fill(padded, 0), kv)
    bias = torch.zeros(padded.shape, device=device).masked_fill_(padded, float("-inf"))
    return DecodeGroup(
        tokens=torch.tensor([query_starts[row] for row in rows], device=device),
        index=index.flatten(),
        bias=bias.repeat_interleave(num_kv_heads, 0).unsqueeze(1),
    )


def _plan_prefill(start: int, count: int, context_len: int, pages: Tensor, kv: Tensor) -> PrefillRow:
    if context_len == count:
        return PrefillRow(start, count, None, None)
    place = torch.arange(context_len, device=kv.device).unsqueeze(0)
    index = _head_index(pages.unsqueeze(0), place, kv)
    mask = torch.full((count, context_len), float("-inf"), dtype=kv.dtype, device=kv.device)
    return PrefillRow(start, count, index.flatten(), mask.triu_(context_len - count + 1))


def _head_index(pages: Tensor, place: Tensor, kv: Tensor) -> Tensor:
    """Where the tokens at `place` of each row lie: [num_rows, num_kv_heads, num_tokens].

    pages: int64 [num_rows, max_pages]; place: int64 [num_rows, num_tokens].
    """
    page_size, num_kv_heads = kv.shape[3], kv.shape[4]
    slots = pages.gather(1, place // page_size) * page_size + place % page_size
    heads = torch.arange(num_kv_heads, device=kv.device).view(1, -1, 1)
    return slot_index(slots, kv).unsqueeze(1) * num_kv_heads + heads
