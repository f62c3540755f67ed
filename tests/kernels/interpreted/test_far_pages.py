"""Pages so far into the pool that their elements' numbers do not fit 32 bits.

The pool is larger than what is touched of it: the system hands out memory page by page, when it is first written.
"""

import pytest
import torch

from crane.kernels.paged_decode import decode_tile, paged_decode
from crane.kernels.paged_prefill import paged_prefill, tile_rows
from crane.kernels.pages import slot_index
from crane.kernels.plan_decode import plan_decode
from crane.kernels.qkv_post import qkv_post
from crane.kernels.rope import rope_tables
from crane.kernels.rows import Rows, attend_rows

HEADS, KV_HEADS, HEAD_DIM, PAGE = 4, 2, 64, 64
PAGE_ELEMENTS = 16 * 2 * PAGE * KV_HEADS * HEAD_DIM
FAR = (1 << 31) // PAGE_ELEMENTS + 1


@pytest.fixture(scope="module")
def kv():
    pool = torch.empty(FAR + 2, 16, 2, PAGE, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    assert pool[FAR].data_ptr() - pool.data_ptr() > 1 << 32
    return pool


def rows_of(count):
    """One row of 100 tokens, `count` of them new, in two far pages."""
    ints = {"dtype": torch.int32}
    return Rows(torch.tensor([0], **ints), torch.tensor([count], **ints), torch.tensor([100], **ints),
                torch.tensor([[FAR + 1, FAR]], **ints), count, 100)  # fmt: skip


def test_keys_and_values_are_written_far_away(kv):
    kv[FAR:, 5].fill_(float("nan"))
    qkv = torch.randn(2, (HEADS + 2 * KV_HEADS) * HEAD_DIM).bfloat16()
    tables = rope_tables(torch.randn(2, HEAD_DIM // 2))
    index = slot_index(torch.tensor([FAR * PAGE + 3, (FAR + 1) * PAGE]), kv)
    values = qkv.unflatten(1, (-1, HEAD_DIM))[:, -KV_HEADS:].clone()
    _, keys, _ = qkv_post.triton(qkv, kv, 5, index, *tables, HEADS)
    for token, (page, slot) in enumerate([(FAR, 3), (FAR + 1, 0)]):
        assert torch.equal(kv[page, 5, 0, slot], keys[token])
        assert torch.equal(kv[page, 5, 1, slot], values[token])
    assert int((~kv[FAR:, 5].isnan()).sum()) == 2 * 2 * KV_HEADS * HEAD_DIM


@pytest.mark.parametrize("count", [1, 20])
def test_attention_reads_far_away(kv, count):
    kv[FAR:, 15].normal_()
    rows, q = rows_of(count), torch.randn(count, HEADS, HEAD_DIM).bfloat16()
    if count == 1:
        work = plan_decode.triton(rows.context_lens, decode_tile(HEAD_DIM), 2, 3)
        got = paged_decode.triton(q, kv, 15, rows, work, 0.125)
    else:
        tiles = tile_rows([count], [100], HEADS // KV_HEADS, HEAD_DIM, q.dtype, q.device)
        got = paged_prefill.triton(q, kv, 15, rows, tiles, 0.125)
    expected = attend_rows(q.double(), kv, 15, rows, 0.125, None)
    torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.01)
