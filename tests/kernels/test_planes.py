"""Blocks re-packed into planes hold the same bits."""

import pytest
import torch

from crane.kernels import planes as planes_module
from crane.kernels.blocks import BLOCK_KINDS, dequantize, unpack
from crane.kernels.planes import PLANE_FORMATS, dequantize_planes, pack_planes, unpack_planes
from tests.kernels.test_blocks import random_blocks


@pytest.mark.parametrize("blocks_per_row", [1, 2, 3])
@pytest.mark.parametrize("kind", PLANE_FORMATS)
def test_packing_loses_nothing(kind, blocks_per_row, monkeypatch):
    weight = random_blocks(kind, 21, blocks_per_row)
    monkeypatch.setattr(planes_module, "_PIECE", 8 * weight.shape[1])  # several pieces, the last one short
    planes = pack_planes(weight)
    before, after = unpack(kind, weight.data), unpack_planes(planes)
    assert torch.equal(before.codes.int(), after.codes.int())
    for name in ("d", "scales", "m", "mins"):
        old, new = getattr(before, name), getattr(after, name)
        assert (old is None) == (new is None), name
        assert old is None or torch.equal(old, new), name
    assert torch.equal(dequantize_planes(planes, torch.float32), dequantize(weight))


@pytest.mark.parametrize("kind", PLANE_FORMATS)
def test_planes_take_hardly_more_memory_than_blocks(kind):
    weight = random_blocks(kind, 64, 2048 // BLOCK_KINDS[kind].elements)
    assert weight.data.nbytes <= pack_planes(weight).nbytes <= weight.data.nbytes * 1.03


def test_rows_of_planes_are_rows_of_the_weight():
    weight = random_blocks("Q5_K", 9, 2)
    rows = torch.tensor([7, 0, 7])
    expected = dequantize(weight, torch.float16)[rows]
    assert torch.equal(dequantize_planes(pack_planes(weight), torch.float16, rows), expected)
