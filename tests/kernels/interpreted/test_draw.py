"""The drawing kernels beyond their cases: exactly the kept set, and rows that break careless samplers."""

import numpy as np
import pytest
import torch

from crane.kernels import draw
from tests.kernels.test_sampling import kept_set

DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
FILTERS = [
    dict(top_k=1), dict(top_k=40, top_p=0.95), dict(top_p=0.5), dict(min_p=0.1), dict(top_k=70, top_p=0.8, min_p=0.05),
    dict(temperature=0.5, top_p=0.9), dict(temperature=3.0, top_k=50), dict(top_p=1e-6), dict(temperature=1e4, top_k=3),
    dict(temperature=0.0), dict(top_p=0.999), dict(top_k=1500, top_p=0.99),
]  # fmt: skip


def drawn(logits, uniform, **filters):
    """Ids that the twin draws, and those of the reference."""
    rows, full = len(logits), DEFAULTS | filters
    arguments = {
        name: torch.full((rows,), value, dtype=torch.int64 if name == "top_k" else torch.float32)
        for name, value in full.items()
    }
    arguments["uniform"] = torch.tensor(uniform, dtype=torch.float64)
    return draw.sample.triton(logits, **arguments).tolist(), draw.sample.reference(logits, **arguments).tolist()


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_walk_through_exactly_the_kept_set(filters):
    logits = (torch.randn(1, 2000, generator=torch.Generator().manual_seed(3)) * 3).expand(5, -1).contiguous()
    twin, reference = drawn(logits, [0.0, 0.2, 0.5, 0.9, 1 - 2**-53], **filters)
    assert twin == reference
    if filters != dict(temperature=0.0):
        kept = kept_set(logits[0].numpy(), **(DEFAULTS | filters))
        assert set(twin) <= set(kept.tolist()) and (twin[0], twin[-1]) == (kept[0], kept[-1])


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_row_with_one_token_left_draws_it(filters):
    logits = torch.full((2, 5000), -torch.inf)
    logits[0, 4999] = -3e4
    logits[1, 17] = 60.0
    logits[1, 18] = torch.nan
    assert drawn(logits, [0.0, 1 - 2**-53], **filters)[0] == [4999, 17]


def test_a_row_without_any_token_left_stays_within_the_vocabulary():
    logits = torch.full((2, 300), -torch.inf)
    assert all(0 <= token < 300 for token in drawn(logits, [0.5, 0.5], top_k=5)[0])
    assert all(0 <= token < 300 for token in drawn(logits, [0.5, 0.5], top_p=0.5)[0])


def test_both_zeros_are_the_same_logit():
    logits = torch.full((1, 400), -1.0).repeat(4, 1)
    logits[:, 7], logits[:, 9] = 0.0, -0.0
    assert set(drawn(logits, [0.0, 0.4, 0.6, 0.99], top_k=1)[0]) == {7, 9}


def test_a_whole_vocabulary_is_drawn_from():
    logits = torch.randn(2, 151_936, generator=torch.Generator().manual_seed(4)) * 4
    twin, reference = drawn(logits, [0.3, 0.8], top_k=20, top_p=0.95)
    assert twin == reference
    twin, reference = drawn(logits, [0.3, 0.8])
    assert twin == reference


def test_frequencies_follow_the_probabilities():
    """Numbers of the device's generator, all drawn with by the reference, some by the twin."""
    rows = 4000
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]]).repeat(rows, 1)
    numbers = draw.uniforms.triton(torch.full((rows,), 77), torch.zeros(rows, dtype=torch.int64), torch.arange(rows))
    some = numbers[:8].tolist()
    assert len(set(some)) == 8
    twin, reference = drawn(logits[:8], some)
    assert twin == reference
    whole = torch.ones(rows)
    every = draw.sample.reference(logits, temperature=whole, top_k=torch.zeros(rows, dtype=torch.int64), top_p=whole,
                                  min_p=torch.zeros(rows), uniform=numbers)  # fmt: skip
    counts = np.bincount(every, minlength=5)
    expected = torch.softmax(logits[0], -1).numpy() * rows
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi-square, 4 degrees of freedom: p < 0.001 beyond
