"""Layers that have a choice of how to compute, and the register of models."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from crane.errors import ModelError
from crane.models.config import load_config
from crane.models.files import open_checkpoint
from crane.models.layers import Linear
from crane.models.registry import load_model, models
from tests.tiny import make_tiny


TOLERANCES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)]


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_linear_is_the_product_whatever_layout_it_keeps(dtype, tolerance, bias, rows):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 96).to(dtype), (torch.randn(72, 96) / 10).to(dtype)
    offset = torch.randn(72).to(dtype) if bias else None
    got = Linear(weight, offset)(x)
    expected = F.linear(x.double(), weight.double(), offset.double() if bias else None)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_linear_on_the_cpu_keeps_one_packed_copy():
    linear = Linear(torch.randn(64, 64))
    assert linear.packed == torch.backends.mkldnn.is_available()
    assert [value for value in vars(linear).values() if torch.is_tensor(value)] == [linear.weight]


def test_there_is_a_class_for_every_model_type_that_a_config_can_name():
    from crane.models.config import _HF_TYPES
    from crane.models.config_gguf import _GGUF_TYPES

    assert set(models()) == {kind for kind, _ in _HF_TYPES.values()} == set(_GGUF_TYPES.values())


def test_a_model_type_without_a_class_is_named_with_the_supported_ones(tmp_path):
    checkpoint = open_checkpoint(make_tiny(tmp_path, "qwen2"))
    config = dataclasses.replace(load_config(checkpoint), model_type="mamba")
    with pytest.raises(ModelError, match="'mamba'.*hunyuan, llama, qwen25, qwen3"):
        load_model(checkpoint, config, "cpu", torch.float32)


def test_loading_reports_progress_up_to_the_whole(tmp_path):
    checkpoint = open_checkpoint(make_tiny(tmp_path, "qwen3"))
    calls = []
    load_model(checkpoint, load_config(checkpoint), "cpu", torch.float32, lambda *call: calls.append(call))
    loaded = [call[0] for call in calls]
    assert loaded == sorted(loaded)
    assert calls[-1][0] == calls[-1][1] > 0
