"""Where keys and values land in the page-major pool."""

import pytest
import torch

from crane.kernels.pages import gather_kv, slot_index, write_kv

SHAPE = (5, 3, 2, 4, 2, 8)  # pages, layers, keys and values, page size, heads, head_dim


@pytest.mark.parametrize("layer", range(3))
def test_written_vectors_are_found_at_page_and_offset_and_nowhere_else(layer):
    kv = torch.zeros(SHAPE)
    slots = torch.tensor([19, 0, 6, 7])
    k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    write_kv(kv, layer, slot_index(slots, kv), k, v)
    expected = torch.zeros(SHAPE)
    for token, slot in enumerate(slots.tolist()):
        expected[slot // 4, layer, 0, slot % 4] = k[token]
        expected[slot // 4, layer, 1, slot % 4] = v[token]
    assert torch.equal(kv, expected)


def test_strided_keys_and_values_are_written():
    kv = torch.zeros(SHAPE)
    fused = torch.randn(3, 6, 8)
    k, v = fused[:, 2:4], fused[:, 4:]
    write_kv(kv, 2, slot_index(torch.tensor([3, 9, 16]), kv), k, v)
    assert torch.equal(kv[[0, 2, 4], 2, 0, [3, 1, 0]], k)
    assert torch.equal(kv[[0, 2, 4], 2, 1, [3, 1, 0]], v)


def test_slots_are_gathered_in_the_order_and_shape_of_the_index():
    kv = torch.randn(SHAPE)
    keys, values = gather_kv(kv, 1, slot_index(torch.tensor([[17, 2], [2, 8]]), kv))
    assert torch.equal(keys, kv[[[4, 0], [0, 2]], 1, 0, [[1, 2], [2, 0]]])
    assert torch.equal(values, kv[[[4, 0], [0, 2]], 1, 1, [[1, 2], [2, 0]]])
