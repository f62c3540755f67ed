"""A whole tiny model whose GGUF weights stay in planes: every product and the embedding through the Triton twins."""

import pytest
import torch

from crane.kernels.registry import force
from crane.models.layers import QuantisedLinear
from tests.models.paged import PagedRun, load
from tests.tiny import make_tiny


@pytest.mark.parametrize(
    "quant, tied, arch", [("Q8_0", True, "llama"), ("Q5_1", False, "qwen2"), ("Q4_0", False, "qwen3")]
)
def test_it_computes_what_the_dequantised_model_computes(quant, tied, arch, tmp_path):
    path = make_tiny(tmp_path / "tiny.gguf", arch, fmt="gguf", quant=quant, tied=tied, vocab=384)
    expected = PagedRun(load(path), num_pages=8)
    with force("triton", "gguf_linear", "gguf_embedding"):
        model = load(path)
        layer = model.layers[0]
        for linear in (layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down,
                       model.head.linear):  # fmt: skip
            assert isinstance(linear, QuantisedLinear)
        assert model.embedding.planes is not None
        run = PagedRun(model, num_pages=8)
        for tokens in ([5, 6, 7, 8, 9], [10]):
            for ours, theirs in zip(run.step([("a", tokens)]), expected.step([("a", tokens)]), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
