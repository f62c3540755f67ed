"""What GGUF kernels promise beyond their cases: exact embeddings and weights, complete sums."""

import pytest
import torch

from crane.kernels import gguf_linear as linear
from crane.kernels import tuning
from crane.kernels.blocks import dequantize
from crane.kernels.gguf_dequantize import gguf_dequantize
from crane.kernels.gguf_embedding import gguf_embedding
from crane.kernels.planes import PLANE_FORMATS, pack_planes, random_planes
from tests.kernels.test_blocks import random_blocks


@pytest.mark.parametrize("kind", PLANE_FORMATS)
def test_embeddings_are_the_dequantised_rows_bit_for_bit(kind):
    weight = random_blocks(kind, 11, 2)
    ids = torch.tensor([10, 0, 3, 3])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(gguf_embedding.triton(ids, pack_planes(weight), dtype), dequantize(weight, dtype)[ids])


@pytest.mark.parametrize("kind", PLANE_FORMATS)
def test_weights_are_written_out_bit_for_bit_as_they_would_be_at_load(kind):
    weight = random_blocks(kind, 80, 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.zeros(9, weight.shape[1], dtype=dtype)
        assert torch.equal(gguf_dequantize.triton(out, pack_planes(weight), 65), dequantize(weight, dtype)[65:74])


@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_larger_than_a_slab_is_written_out_in_several(bias, monkeypatch):
    """The last slab is smaller than the others, as 40 rows are no multiple of 7."""
    planes, x, bias = random_planes("Q4_K", 40, 256, "cpu"), torch.randn(600, 256), torch.randn(40) if bias else None
    expected = linear.gguf_linear.reference(x, planes, bias)
    monkeypatch.setattr(linear, "_SLAB", 7 * 256)
    sizes = []
    monkeypatch.setattr(linear, "gguf_dequantize", lambda out, planes, start: sizes.append((start, len(out))) or
                        gguf_dequantize.triton(out, planes, start))  # fmt: skip
    torch.testing.assert_close(linear.gguf_linear.triton(x, planes, bias), expected, rtol=1e-5, atol=1e-5)
    assert sizes == [(0, 7), (7, 7), (14, 7), (21, 7), (28, 7), (35, 5)]


def test_rules_say_from_how_many_rows_a_weight_is_written_out(monkeypatch):
    planes, ran = random_planes("Q8_0", 16, 64, "cpu"), []
    monkeypatch.setattr(linear, "_dequantised_product", lambda x, planes, bias, out: ran.append(len(x)))
    for rows in (1, 512, 513, 9000):
        linear.gguf_linear.triton(torch.randn(rows, 64), planes)
    assert ran == [513, 9000]
    with tuning.overridden(lambda name, features, use: {"DEQUANTIZE": 1} if name == "gguf_linear_route" else use):
        linear.gguf_linear.triton(torch.randn(3, 64), planes)
    assert ran == [513, 9000, 3]


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_however_many_programs_share_the_columns_the_sum_is_complete(parts, monkeypatch):
    planes, x, bias = random_planes("Q4_K", 24, 1024, "cpu"), torch.randn(2, 1024), torch.randn(24)
    monkeypatch.setattr(linear, "_num_parts", lambda *_: parts)
    expected = linear.gguf_linear.reference(x.double(), planes, bias.double())
    torch.testing.assert_close(linear.gguf_linear.triton(x, planes, bias).double(), expected, rtol=1e-5, atol=1e-5)
