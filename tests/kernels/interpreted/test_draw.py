"""The drawing kernels beyond their cases: exactly the kept set, and rows that break careless samplers."""

import functools

import numpy as np
import pytest
import torch

from crane.kernels import draw, sampling
from crane.kernels.logprobs import log_probabilities
from tests.kernels.test_sampling import kept_set

DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
FILTERS = [
    dict(top_k=1), dict(top_k=40, top_p=0.95), dict(top_p=0.5), dict(min_p=0.1), dict(top_k=70, top_p=0.8, min_p=0.05),
    dict(temperature=0.5, top_p=0.9), dict(temperature=3.0, top_k=50), dict(top_p=1e-6), dict(temperature=1e4, top_k=3),
    dict(temperature=0.0), dict(top_p=0.999), dict(top_k=1500, top_p=0.99),
]  # fmt: skip


@functools.cache
def _numbers():
    """The uniform numbers of positions 0 .. 2**20 for seed 77, ascending, and their positions."""
    count = 1 << 20
    zeros = torch.zeros(count, dtype=torch.int64)
    return sampling.uniforms(zeros + 77, zeros, torch.arange(count)).sort()


def drawn(logits, uniform, **filters):
    """Ids that the twin draws, and those of the reference, with (nearly) these uniform numbers."""
    rows, full = len(logits), DEFAULTS | filters
    numbers, positions = _numbers()
    places = torch.searchsorted(numbers, torch.tensor(uniform, dtype=torch.float64)).clamp(max=len(numbers) - 1)
    columns = {
        name: torch.full((rows,), value, dtype=torch.int32 if name == "top_k" else torch.float32)
        for name, value in full.items()
    }
    draws = sampling.Draws(
        **columns, seeds=torch.full((rows,), 77), choices=torch.zeros(rows).int(), positions=positions[places].int()
    )
    both = draw.sample.triton, draw.sample.reference
    return [each(logits, draws, draw.no_changes(rows, "cpu")).tolist() for each in both]


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
    rows = 400
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]]).repeat(rows, 1)
    ones, zeros = torch.ones(rows), torch.zeros(rows)
    seeds, ints = torch.arange(rows) << 33, torch.zeros(rows).int()  # the high half of the seed counts, too
    draws = sampling.Draws(ones, ints, ones, zeros, seeds, ints, ints)
    found = draw.sample.reference(logits, draws, draw.no_changes(rows, "cpu"))
    assert torch.equal(draw.sample.triton(logits[:20], sampling.Draws(*(each[:20] for each in vars(draws).values())),
                                          draw.no_changes(20, "cpu")), found[:20])  # fmt: skip
    expected = torch.softmax(logits[0], -1).numpy() * rows
    counts = np.bincount(found, minlength=5)
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi-square, 4 degrees of freedom: p < 0.001 beyond


@pytest.mark.parametrize("vocab", [97, 5000])
def test_log_probabilities_put_equal_logits_in_the_order_of_their_ids(vocab):
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(5)).mul(2).round()  # full of ties
    logits[1, 3::2] = -torch.inf
    tokens = torch.tensor([1, 2])
    rows, listed = torch.tensor([0, 1]).int(), torch.zeros(2, 0).int()
    picked, ids, values = log_probabilities.triton(logits, rows, tokens, listed, 60)
    order = logits.sort(dim=1, descending=True, stable=True)
    exact = torch.log_softmax(logits.double(), 1)
    assert torch.equal(ids, order.indices[:, :60])
    torch.testing.assert_close(values.double(), exact.gather(1, ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(picked.double(), exact.gather(1, tokens[:, None]), rtol=0, atol=1e-5)
