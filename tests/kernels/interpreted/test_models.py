"""Whole tiny models on the Triton kernels, under the interpreter: the logits are those of the torch path."""

import random

import pytest
import torch

from crane.kernels.registry import force, report
from crane.models.layers import Linear
from tests.models.paged import PagedRun, load
from tests.tiny import make_tiny

MODELS = [
    ("llama", {"head_dim": 32, "kv_heads": 1}),
    ("qwen2", {"kv_heads": 4}),
    ("qwen3", {"head_dim": 48}),
    ("hunyuan", {"attention_bias": True}),
]
# prompts beside decode beside chunks: tokens by name in each step
PLAN = [{"a": 18, "c": 9}, {"a": 1, "c": 9, "b": 10}, {"a": 1, "b": 1, "c": 1}, {"b": 3, "a": 1}]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.04}


def run(model, dtype, kv_dtype=None):
    """Logits of all steps, by name."""
    draw = random.Random(1)
    pages = PagedRun(model, num_pages=8, page_size=16, dtype=kv_dtype or dtype)
    found = {}
    for step in PLAN:
        rows = [(name, [draw.randrange(512) for _ in range(count)]) for name, count in step.items()]
        for (name, _), logits in zip(rows, pages.step(rows)):
            found.setdefault(name, []).append(logits)
    return {name: torch.cat(each) for name, each in found.items()}


def as_on_a_gpu(model):
    """Biases of the q/k/v product go where a GPU adds them: into `qkv_post`."""
    for layer in model.layers:
        attention = layer.attention
        if isinstance(attention.qkv, Linear):
            attention.bias, attention.qkv.bias = attention.qkv.bias, None
    return model


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("arch, variant", MODELS, ids=[arch for arch, _ in MODELS])
def test_a_model_gives_the_logits_of_the_torch_path(arch, variant, dtype, tmp_path):
    model = load(make_tiny(tmp_path, arch, **variant), dtype)
    expected = run(model, dtype)
    with force("triton"):
        got = run(as_on_a_gpu(model), dtype)
        assert all(report()[name] == "triton" for name in ("attention", "paged_decode", "paged_prefill", "qkv_post",
                                                           "plan_decode", "rms_norm", "silu_mul"))  # fmt: skip
    for name, logits in expected.items():
        error = (got[name] - logits).abs().max() / logits.abs().max()
        assert error <= TOLERANCES[dtype], f"{name} is off by {error:.2e} of the largest logit"


def test_with_float8_pages_the_logits_stay_near(tmp_path):
    model = load(make_tiny(tmp_path, "qwen3", head_dim=32), torch.float32)
    expected = run(model, torch.float32)
    in_torch = run(model, torch.float32, torch.float8_e4m3fn)
    with force("triton"):
        got = run(model, torch.float32, torch.float8_e4m3fn)
    for name, logits in expected.items():
        largest = logits.abs().max()
        assert (got[name] - in_torch[name]).abs().max() / largest <= 0.01
        assert 1e-4 < (got[name] - logits).abs().max() / largest <= 0.15
