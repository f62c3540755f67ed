"""One step's attention by the Triton kernels: short rows by `paged_decode`, the others by `paged_prefill`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crane.kernels import tuning
from crane.kernels.lang import num_processors
from crane.kernels.paged_decode import MAX_QUERY_LEN, paged_decode
from crane.kernels.paged_prefill import PrefillTiles, paged_prefill, tile_rows
from crane.kernels.plan_decode import DecodeWork, plan_decode
from crane.kernels.rows import Rows
from crane.kernels.transfer import upload

# Tokens of a part where the other rows must not matter.
_FIXED_PART = 1024


@dataclass
class PagedPlan:
    """How one step's attention runs; the same for every layer.

    decode, work: rows of up to MAX_QUERY_LEN new tokens, and how they are divided. prefill: the others. Either may be
    missing. lengths: host ints, the query and context lengths of prefill's rows.
    """

    decode: Rows | None = None
    work: DecodeWork | None = None
    prefill: Rows | None = None
    lengths: tuple[list[int], list[int]] = ((), ())
    _tiles: PrefillTiles | None = None

    def attend(self, q: Tensor, kv: Tensor, layer: int, scale: float, kv_scales: Tensor | None = None) -> Tensor:
        """Attention of all rows in one layer; this step's keys and values are in kv already.

        q: [num_tokens, num_heads, head_dim]; for kv and kv_scales see `rows.attend_rows`. Returns q's shape and type.
        """
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if self.decode is not None:
            paged_decode(q, kv, layer, self.decode, self.work, scale, kv_scales, out)
        if self.prefill is not None:
            if self._tiles is None:  # the first layer knows what all have in common
                self._tiles = tile_rows(*self.lengths, q.shape[1] // kv.shape[4], q.shape[2], q.dtype, q.device)
            paged_prefill(q, kv, layer, self.prefill, self._tiles, scale, kv_scales, out)
        return out


def plan_decode_rows(rows: Rows, kv: Tensor, fixed: bool = False) -> PagedPlan:
    """The plan of a step of such rows only, of at most MAX_QUERY_LEN new tokens each.

    fixed: how a row is divided, so how its sums are rounded, depends on its own length and nothing else.
    Shapes are read on the host and lengths on the device, so it can be part of a CUDA graph.
    """
    tuned = tuning.pick("decode_tile", head_dim=kv.shape[5])
    tile, num_rows = tuned["tile"], rows.context_lens.shape[0]
    # parts that all K/V heads' programs of run at once
    width = max(num_processors(kv.device) * tuned["programs"] // kv.shape[4], 1)
    if not fixed:
        return PagedPlan(rows, plan_decode(rows.context_lens, tile, width, num_rows + width))
    max_parts = num_rows * max(-(-rows.max_context_len // _FIXED_PART), 1)
    return PagedPlan(rows, plan_decode(rows.context_lens, tile, width, max_parts, _FIXED_PART // tile))


def plan_rows(kv: Tensor, query_lens: list[int], query_starts: list[int], context_lens: list[int],
              page_table: Tensor, fixed: bool = False) -> PagedPlan:
    """The plan of a step with these rows. For the arguments see `attention.plan_attention`."""
    short = [row for row, count in enumerate(query_lens) if count <= MAX_QUERY_LEN]
    longer = [row for row, count in enumerate(query_lens) if count > MAX_QUERY_LEN]

    def pick(rows: list[int]) -> Rows:
        lengths = [[values[row] for row in rows] for values in (query_starts, query_lens, context_lens)]
        table = page_table
        if len(rows) < len(query_lens):
            table = page_table[upload(rows, torch.int64, page_table.device)]
        on_device = upload(lengths, torch.int32, kv.device)
        return Rows(*on_device, table, max(lengths[1]), max(lengths[2]))

    plan = plan_decode_rows(pick(short), kv, fixed) if short else PagedPlan()
    if longer:
        plan.prefill = pick(longer)
        plan.lengths = [query_lens[row] for row in longer], [context_lens[row] for row in longer]
    return plan
