"""What a layer may know about the step it runs in."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from crane.kernels.attention import AttentionPlan, plan_attention
from crane.kernels.paged_plan import PagedPlan
from crane.kernels.pages import slot_index


@dataclass
class ForwardContext:
    """The rows of one step. Written by the runner before the step, read-only afterwards.

    Row i computes tokens `context_lens[i] - query_lens[i]` up to `context_lens[i]` of its
    sequence; whether that is a prompt, a chunk of one or a single new token makes no
    difference. Its tokens are `[query_starts[i] : query_starts[i] + query_lens[i]]` of
    every per-token tensor.

    positions: int64 [num_tokens]. slots: int64 [num_tokens], page_id * page_size + offset.
    query_lens, query_starts: host ints, one a row.
    context_lens: host ints, tokens a row has in pages *including* this step's.
    page_table: int64 [num_rows, max_pages], padded with 0 (page 0 is a real page).
    kv: [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim], contiguous.
    kv_scales: float32 [num_layers, 2], what keys and values in kv are multiplied with when
        read, or None.
    fixed: no row's result may depend on the others.
    """

    positions: Tensor
    slots: Tensor
    query_lens: list[int]
    query_starts: list[int]
    context_lens: list[int]
    page_table: Tensor
    kv: Tensor
    page_size: int
    kv_scales: Tensor | None = None
    fixed: bool = False

    @cached_property
    def attention_plan(self) -> AttentionPlan | PagedPlan:
        """What the step's attention needs to know, shared by all layers."""
        return plan_attention(self.kv, self.query_lens, self.query_starts, self.context_lens, self.page_table,
                              fixed=self.fixed)  # fmt: skip

    @property
    def is_prompt_in_c(self) -> bool:
        """Whether the C kernels compute a step with prompts, all but what is next to nothing."""
        return isinstance(self.attention_plan, AttentionPlan) and self.attention_plan.tiled is not None

    @cached_property
    def wants_new_kv(self) -> bool:
        """Whether attention takes this step's keys and values as they are, not from pages only."""
        return isinstance(self.attention_plan, AttentionPlan)

    @cached_property
    def slot_index(self) -> Tensor:
        """Where `qkv_post` puts this step's keys and values, shared by all layers."""
        return slot_index(self.slots, self.kv)
