"""Paged attention against one written out token by token in float64."""

import random

import pytest
import torch

from crane.kernels import native
from crane.kernels.attention import paged_attention, plan_attention
from crane.kernels.pages import slot_index, write_kv
from crane.kernels.registry import force

NUM_LAYERS = 3


@pytest.fixture(autouse=True, scope="module")
def in_torch():
    """Engines of earlier tests may have loaded the C kernels, which test_native tests."""
    native.unload()


class Case:
    """Random rows over randomly ordered pages; every slot that no row owns holds NaN."""

    def __init__(self, rows, *, heads=4, kv_heads=2, head_dim=16, page_size=4, dtype=torch.float32, layer=1):
        """rows: (query_len, context_len) of each."""
        torch.manual_seed(0)
        self.scale, self.layer = head_dim**-0.5, layer
        self.query_lens = [row[0] for row in rows]
        self.context_lens = [row[1] for row in rows]
        self.query_starts = [sum(self.query_lens[:row]) for row in range(len(rows))]
        needed = [-(-length // page_size) for length in self.context_lens]
        order = list(range(sum(needed) + 2))
        random.Random(0).shuffle(order)
        self.page_table = torch.zeros(len(rows), max(needed) + 1, dtype=torch.int64)
        shape = (len(order), NUM_LAYERS, 2, page_size, kv_heads, head_dim)
        self.kv = torch.full(shape, float("nan"), dtype=dtype)
        self.keys = [torch.randn(n, kv_heads, head_dim).to(dtype) for n in self.context_lens]
        self.values = [torch.randn(n, kv_heads, head_dim).to(dtype) for n in self.context_lens]
        self.q = torch.randn(sum(self.query_lens), heads, head_dim).to(dtype)
        slots = []
        for row, (count, length) in enumerate(rows):
            pages = torch.tensor([order.pop() for _ in range(needed[row])])
            self.page_table[row, : needed[row]] = pages
            own = (pages[:, None] * page_size + torch.arange(page_size)).flatten()[:length]
            earlier = slice(length - count)
            index = slot_index(own[earlier], self.kv)
            write_kv(self.kv, layer, index, self.keys[row][earlier], self.values[row][earlier])
            slots.append(own[length - count :])
        self.slots = torch.cat(slots)

    def run(self):
        """Write the new keys and values, then attend: [num_tokens, heads * head_dim]."""
        k = torch.cat([keys[-count:] for keys, count in zip(self.keys, self.query_lens)])
        v = torch.cat([values[-count:] for values, count in zip(self.values, self.query_lens)])
        write_kv(self.kv, self.layer, slot_index(self.slots, self.kv), k, v)
        plan = plan_attention(self.kv, self.query_lens, self.query_starts, self.context_lens, self.page_table)
        return paged_attention(self.q, k, v, self.kv, self.layer, plan, self.scale)

    def expected(self):
        out = []
        for row, (count, length) in enumerate(zip(self.query_lens, self.context_lens)):
            for place in range(count):
                query = self.q[self.query_starts[row] + place].double()
                seen = length - count + place + 1
                group = query.shape[0] // self.keys[row].shape[1]
                keys = self.keys[row][:seen].double().repeat_interleave(group, 1)
                values = self.values[row][:seen].double().repeat_interleave(group, 1)
                scores = torch.einsum("hd,thd->ht", query, keys) * self.scale
                out.append(torch.einsum("ht,thd->hd", scores.softmax(-1), values).flatten())
        return torch.stack(out)


ROWS = {
    "one token": [(1, 1)],
    "whole prompts": [(5, 5), (1, 1), (17, 17)],
    "decode of many lengths": [(1, length) for length in (1, 2, 3, 4, 5, 16, 17, 31, 64, 7)],
    "chunks with a prefix": [(3, 9), (4, 8), (2, 33)],
    "all kinds in one step": [(1, 40), (6, 6), (1, 3), (5, 21), (1, 1), (2, 2)],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 2), (7, 1)])
def test_ragged_rows_equal_attention_written_out(rows, heads, kv_heads):
    case = Case(rows, heads=heads, kv_heads=kv_heads)
    torch.testing.assert_close(case.run().double(), case.expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page_size", [1, 2, 16, 64])
@pytest.mark.parametrize("layer", [0, NUM_LAYERS - 1])
def test_any_page_size_and_layer(page_size, layer):
    case = Case(ROWS["all kinds in one step"], page_size=page_size, layer=layer)
    torch.testing.assert_close(case.run().double(), case.expected(), rtol=1e-5, atol=1e-5)


def test_bfloat16_keeps_scores_in_float32():
    case = Case(ROWS["all kinds in one step"], head_dim=64, dtype=torch.bfloat16)
    case.q *= 8  # scores of about 100, where bfloat16 would be off by 0.25
    error = (case.run().double() - case.expected()).abs().max()
    assert error < 0.02


def test_lengths_far_apart_are_not_padded_to_the_longest():
    lengths = [5000, 4990, 30, 20, 10]
    case = Case([(1, length) for length in lengths], page_size=64)
    plan = plan_attention(case.kv, case.query_lens, case.query_starts, case.context_lens, case.page_table)
    gathered = sum(group.index.numel() for group in plan.decode)
    assert len(plan.decode) == 2
    assert gathered < 1.05 * sum(lengths)
    torch.testing.assert_close(case.run().double(), case.expected(), rtol=1e-5, atol=1e-5)


def test_a_decode_row_does_not_depend_on_its_neighbours():
    rows = [(1, length) for length in (33, 40, 47, 90, 12)]
    together = Case(rows).run()
    for row in range(len(rows)):
        case = Case(rows)
        case.q, case.slots = case.q[row : row + 1], case.slots[row : row + 1]
        case.keys, case.values = case.keys[row : row + 1], case.values[row : row + 1]
        case.query_lens, case.query_starts, case.context_lens = [1], [0], [rows[row][1]]
        case.page_table = case.page_table[row : row + 1]
        torch.testing.assert_close(case.run()[0], together[row], rtol=0, atol=2e-7)


def test_where_padding_may_show_fixed_rows_are_groups_of_their_own():
    """On a CPU padded rows are equal bit for bit: `deterministic` relies on it (tests/runtime/test_exactness.py)."""
    table = torch.zeros(3, 4, dtype=torch.int64)
    sizes = []
    for device, fixed in (("cpu", True), ("meta", False), ("meta", True)):
        kv = torch.empty(4, 1, 2, 16, 2, 8, device=device)
        with force("torch"):
            plan = plan_attention(kv, [1, 1, 1], [0, 1, 2], [20, 33, 40], table.to(device), fixed=fixed)
        sizes.append(len(plan.decode))
    assert sizes == [1, 1, 3]
