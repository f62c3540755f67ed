"""Every architecture gives transformers' logits, however its tokens are cut into steps."""

import functools
import random

import pytest
import torch

from crane.models.registry import models
from tests.models.paged import PagedRun, load
from tests.tiny import make_tiny

VARIANTS = [
    ("llama", {}),
    ("llama", {"tied": True, "kv_heads": 4, "spelling": 5}),
    ("llama", {"head_dim": 32, "kv_heads": 1}),
    ("llama", {"rope": "linear"}),
    ("llama", {"rope": "llama3"}),
    ("llama", {"rope": "llama3", "spelling": 5}),
    ("llama", {"rope": "yarn"}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"quant": "Q8_0", "sharded": True}),
    ("qwen2", {}),
    ("qwen2", {"tied": True, "sharded": True}),
    ("qwen2", {"heads": 8, "rope": "yarn"}),
    ("qwen2", {"rope": "yarn", "spelling": 5}),
    ("qwen2", {"quant": "Q4_0"}),
    ("qwen3", {}),
    ("qwen3", {"tied": True, "head_dim": 32, "spelling": 5}),
    ("qwen3", {"rope": "yarn"}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3", {"quant": "Q8_0"}),
    ("hunyuan", {}),
    ("hunyuan", {"tied": True, "head_dim": 32, "spelling": 5}),
    ("hunyuan", {"rope": "default"}),
    ("hunyuan", {"attention_bias": True}),
    ("hunyuan", {"quant": "Q4_1"}),
]
CASES = [(fmt, *case) for fmt in ("safetensors", "gguf") for case in VARIANTS]
LENGTHS = {"a": 37, "b": 5, "c": 20}


def describe(case):
    fmt, arch, variant = case
    return "-".join([fmt, arch, *(f"{key}={value}" for key, value in variant.items())])


@pytest.fixture(scope="module")
def prompts():
    draw = random.Random(1)
    return {name: [draw.randrange(512) for _ in range(count)] for name, count in LENGTHS.items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, prompts):
    """transformers' logits by (arch, variant): one [length, vocab_size] a prompt."""
    transformers = pytest.importorskip("transformers")

    @functools.cache
    def logits(arch, variant):
        folder = make_tiny(tmp_path_factory.mktemp("reference"), arch, **dict(variant))
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(report.values()), report
        with torch.inference_mode():
            return {name: model(torch.tensor([ids])).logits[0] for name, ids in prompts.items()}

    return lambda arch, variant: logits(arch, tuple(sorted(variant.items())))


@pytest.fixture(scope="module", params=CASES, ids=describe)
def case(request, tmp_path_factory, reference):
    """(model, transformers' logits) of one checkpoint."""
    fmt, arch, variant = request.param
    path = make_tiny(tmp_path_factory.mktemp("tiny"), arch, fmt=fmt, **variant)
    return load(path), reference(arch, variant)


def assert_parity(got, expected):
    assert got.shape == expected.shape
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= 1e-4, f"off by {error:.2e} of the largest logit"


def test_whole_prefill_gives_the_logits_of_transformers(case, prompts):
    model, expected = case
    for name, tokens in prompts.items():
        run = PagedRun(model, num_pages=10)
        assert_parity(run.step([(name, tokens)])[0], expected[name])


def test_token_by_token_gives_the_logits_of_transformers(case, prompts):
    model, expected = case
    run = PagedRun(model, num_pages=10)
    got = torch.cat([run.step([("a", [token])])[0] for token in prompts["a"]])
    assert_parity(got, expected["a"])


def test_uneven_chunks_give_the_logits_of_transformers(case, prompts):
    model, expected = case
    run = PagedRun(model, num_pages=10)
    cuts = [0, 7, 8, 19, 21, 36, 37]
    got = torch.cat([run.step([("a", prompts["a"][cut:end])])[0] for cut, end in zip(cuts, cuts[1:])])
    assert_parity(got, expected["a"])


def test_ragged_batches_give_the_logits_of_transformers(case, prompts):
    """Sequences of all kinds share steps: decode beside whole prompts beside chunks, and
    one ends in the middle, its pages taken over by another."""
    model, expected = case
    run = PagedRun(model, num_pages=18)
    got = {name: [] for name in prompts}
    plan = [
        [("c", 11), ("gone", 9)],
        [("gone", 1), ("a", 6), ("c", 1)],
        [("c", 1), ("b", 3), ("a", 13)],
        [("a", 1), ("b", 1), ("c", 1)],
        [("b", 1), ("a", 17), ("c", 6)],
    ]
    done = dict.fromkeys(prompts, 0)
    for number, step in enumerate(plan):
        if number == 2:
            run.drop("gone")
        left = {name: prompts[name][done[name] :] for name in done} | {"gone": prompts["a"]}
        rows = [(name, left[name][:count]) for name, count in step]
        for (name, tokens), logits in zip(rows, run.step(rows)):
            if name in got:
                got[name].append(logits)
                done[name] += len(tokens)
    assert done == LENGTHS
    for name in prompts:
        assert_parity(torch.cat(got[name]), expected[name])


def test_every_registered_architecture_is_among_the_cases():
    tried = {"qwen25" if arch == "qwen2" else arch for _, arch, _ in CASES}
    assert set(models()) == tried


def test_llama3_divisors_of_a_gguf_stay_exact_in_a_bfloat16_model(tmp_path):
    folder = make_tiny(tmp_path, "llama", rope="llama3")
    file = make_tiny(tmp_path, "llama", rope="llama3", fmt="gguf")
    far = torch.tensor([100_000])
    for ours, theirs in zip(load(file, torch.bfloat16).rope(far), load(folder).rope(far)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.1)
