"""What GGUF kernels promise beyond their cases: exact embeddings, results that do not depend on the batch."""

import pytest
import torch

from crane.kernels import gguf_linear as linear
from crane.kernels.blocks import dequantize
from crane.kernels.gguf_embedding import gguf_embedding
from crane.kernels.planes import PLANE_FORMATS, pack_planes, random_planes
from tests.kernels.test_blocks import random_blocks


@pytest.mark.parametrize("kind", PLANE_FORMATS)
def test_embeddings_are_the_dequantised_rows_bit_for_bit(kind):
    weight = random_blocks(kind, 11, 2)
    ids = torch.tensor([10, 0, 3, 3])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(gguf_embedding.triton(ids, pack_planes(weight), dtype), dequantize(weight, dtype)[ids])


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_K", "Q6_K"])
def test_a_row_is_the_same_bit_for_bit_alone_and_in_any_batch_when_asked(kind):
    planes, x = random_planes(kind, 40, 1024, "cpu"), torch.randn(18, 1024)
    together = linear.gguf_linear.triton(x, planes, invariant=True)
    for rows in (slice(3, 4), slice(0, 9), slice(16, 18)):
        assert torch.equal(linear.gguf_linear.triton(x[rows], planes, invariant=True), together[rows])


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_however_many_programs_share_the_columns_the_sum_is_complete(parts, monkeypatch):
    planes, x, bias = random_planes("Q4_K", 24, 1024, "cpu"), torch.randn(2, 1024), torch.randn(24)
    monkeypatch.setattr(linear, "_num_parts", lambda *_: parts)
    expected = linear.gguf_linear.reference(x.double(), planes, bias.double())
    torch.testing.assert_close(linear.gguf_linear.triton(x, planes, bias).double(), expected, rtol=1e-5, atol=1e-5)
