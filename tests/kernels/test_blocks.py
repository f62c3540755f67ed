"""GGUF blocks against the `gguf` package's own dequantisation, bit for bit."""

import gguf
import numpy as np
import pytest
import torch

from crane.kernels.blocks import BLOCK_KINDS, BlockWeight, dequantize
from crane.models.files import open_checkpoint
from crane.models.gguf_header import BLOCK_TYPES


def random_blocks(kind, rows, blocks_per_row, seed=0):
    """Any bytes at all, except that no float16 in them is an inf or a NaN."""
    block = BLOCK_KINDS[kind]
    data = np.random.default_rng(seed).integers(0, 256, (rows, blocks_per_row * block.nbytes), dtype=np.uint8)
    data[(data & 0x7C) == 0x7C] ^= 0x40  # in any byte: no field of a code loses a value it could have
    return BlockWeight(kind, torch.from_numpy(data))


def by_gguf(weight):
    return torch.from_numpy(gguf.dequantize(weight.data.numpy(), gguf.GGMLQuantizationType[weight.kind]))


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_random_blocks_mean_what_gguf_says(kind):
    weight = random_blocks(kind, 37, 5)
    assert weight.shape == (37, 5 * BLOCK_KINDS[kind].elements)
    expected = by_gguf(weight)
    assert torch.isfinite(expected).all() and expected.unique().numel() > 1000
    assert torch.equal(dequantize(weight), expected)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(weight, dtype), expected.to(dtype))


def test_block_sizes_are_those_of_the_file_format():
    sizes = {name: (elements, nbytes) for name, elements, nbytes in BLOCK_TYPES.values()}
    assert {kind: (block.elements, block.nbytes) for kind, block in BLOCK_KINDS.items()} == {
        kind: sizes[kind] for kind in BLOCK_KINDS
    }


@pytest.mark.parametrize("model", ["smollm2", "qwen_coder"])
def test_real_blocks_mean_what_gguf_says(model, request):
    checkpoint = open_checkpoint(request.getfixturevalue(model))
    kinds = {}
    for info in checkpoint.tensors.values():
        if info.dtype in BLOCK_KINDS and len(kinds.setdefault(info.dtype, [])) < 2:
            kinds[info.dtype].append(info)
    assert len(kinds) >= 2
    for info in (info for infos in kinds.values() for info in infos):
        rows = min(info.shape[0], 512)
        data = np.fromfile(info.path, np.uint8, info.nbytes // info.shape[0] * rows, offset=info.offset)
        weight = BlockWeight(info.dtype, torch.from_numpy(data.reshape(rows, -1)))
        assert weight.shape[1] == info.shape[1]
        assert torch.equal(dequantize(weight), by_gguf(weight)), info.name


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q6_K"])
def test_rows_move_without_being_taken_apart(kind):
    weight = random_blocks(kind, 9, 2, seed=1)
    values = dequantize(weight)
    order = torch.tensor([8, 0, 0, 5])
    assert torch.equal(dequantize(weight.rows(order)), values[order])
    assert dequantize(weight.rows(order[:0])).shape == (0, weight.shape[1])
    part = weight.rows(slice(2, 7))
    assert torch.equal(dequantize(part), values[2:7])
    assert part.data.data_ptr() == weight.data[2:].data_ptr()


def test_values_go_where_they_are_wanted():
    weight = random_blocks("Q4_K", 300, 4)
    expected = dequantize(weight)
    room = torch.full((300, 1024 + 8), torch.nan)
    assert torch.equal(dequantize(weight, out=room[:, 8:]), expected)
    assert torch.equal(room[:, 8:], expected) and room[:, :8].isnan().all()
    whole = torch.empty(300, 1024)
    assert dequantize(weight, out=whole) is whole and torch.equal(whole, expected)
