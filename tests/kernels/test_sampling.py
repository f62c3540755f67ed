"""Sampling against a slow float64 reference that sorts and cumulates the whole vocabulary."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from crane.kernels import draw as draw_kernels
from crane.kernels import sampling
from crane.kernels.draw import no_changes


def kept_set(logits, temperature, top_k, top_p, min_p):
    """Ids that survive the filters, by the definition in crane.kernels.sampling."""
    x = np.asarray(logits, np.float64) / temperature
    order = np.sort(x)[::-1]
    probs = np.exp(order - order[0])
    if top_k:
        probs[top_k:] = 0
    threshold = order[min(top_k or len(x), len(x)) - 1]
    if top_p < 1:
        before = probs.cumsum() - probs
        last = max(int((before < top_p * probs.sum()).sum()), 1)
        threshold = max(threshold, order[last - 1])
    if min_p:
        threshold = max(threshold, order[0] + np.log(min_p))
    return np.flatnonzero(x >= threshold - 1e-6)


def draw(logits, uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    rows = len(logits)

    def column(value, dtype=torch.float32):
        return torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=dtype)

    return sampling.draw(
        logits, temperature=column(temperature), top_k=column(top_k, torch.int64), top_p=column(top_p),
        min_p=column(min_p), uniform=column(uniform, torch.float64),
    ).tolist()


def greedy(rows):
    """Draws of rows that all take their best token."""
    zeros, ones = torch.zeros(rows), torch.ones(rows)
    ints = zeros.int()
    return sampling.Draws(zeros, ints, ones, zeros, zeros.long(), ints, ints)


@pytest.mark.parametrize(
    "counter, key, expected",
    [  # the known-answer vectors that Random123's authors publish for philox4x32-10
        ([0] * 4, [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
         [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    packed = np.array([key[0] | key[1] << 32], np.uint64).view(np.int64)
    got = sampling.philox(torch.from_numpy(packed), torch.tensor([counter]))
    assert got.tolist() == [expected]


def test_uniforms_depend_on_seed_choice_and_position_and_are_uniform():
    positions = torch.arange(20_000)
    zero = torch.zeros_like(positions)
    base = sampling.uniforms(zero, zero, positions)
    for other in (sampling.uniforms(zero + 1, zero, positions), sampling.uniforms(zero, zero + 1, positions)):
        assert not torch.equal(base, other)
        assert abs(np.corrcoef(base.numpy(), other.numpy())[0, 1]) < 0.03
    assert 0 <= base.min() and base.max() < 1
    counts = np.histogram(base.numpy(), bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-square, 19 degrees of freedom: p < 0.001 beyond 43.8


FILTERS = [
    dict(top_k=1), dict(top_k=5), dict(top_k=40, top_p=0.95), dict(top_p=0.5), dict(top_p=0.9),
    dict(min_p=0.1), dict(top_k=20, min_p=0.2), dict(top_k=100, top_p=0.8, min_p=0.05), dict(top_p=0.999),
    dict(top_k=3000), dict(top_k=1500, top_p=0.99), dict(temperature=0.5, top_p=0.9), dict(temperature=3.0, top_k=50),
]


@pytest.mark.parametrize("vocab", [50, 5000, 20_011])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_come_from_exactly_the_kept_set(vocab, filters):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(1, vocab, generator=generator) * 3
    full = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) | filters
    kept = kept_set(logits[0].numpy(), **full)
    grid = torch.linspace(0, 1 - 2**-53, 200, dtype=torch.float64).tolist()
    drawn = draw(logits.expand(200, -1), grid, **filters)
    assert set(drawn) <= set(kept.tolist())
    # inverse transform: the uniform walks through the kept ids in order, and reaches both ends
    assert drawn == sorted(drawn) and drawn[0] == kept[0] and drawn[-1] == kept[-1]


def test_frequencies_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    grid = ((torch.arange(10_000) + 0.5) / 10_000).tolist()
    drawn = np.bincount(draw(logits.expand(10_000, -1), grid), minlength=5) / 10_000
    assert np.abs(drawn - torch.softmax(logits[0], -1).numpy()).max() < 2e-4


def test_tokens_tied_at_the_threshold_are_all_kept():
    logits = torch.zeros(1, 3000)
    logits[0, :10] = 5.0
    grid = torch.linspace(0, 1 - 2**-53, 500, dtype=torch.float64).tolist()
    assert set(draw(logits.expand(500, -1), grid, top_k=3)) == set(range(10))
    tied = torch.zeros(1, 3000)
    assert len(set(draw(tied.expand(500, -1), grid, top_k=3))) == 500


def test_greedy_takes_the_lowest_of_equal_maxima_beside_sampled_rows():
    logits = torch.zeros(2, 100)
    logits[:, [30, 60]] = 4.0
    assert draw(logits, [0.99, 0.99], temperature=[0.0, 1.0], top_k=2) == [30, 60]


def test_banned_tokens_are_never_drawn():
    logits = torch.full((1, 2000), -torch.inf)
    logits[0, [3, 1500]] = 0.0
    grid = [0.0, 0.3, 0.5, 0.999]
    for filters in FILTERS:
        assert set(draw(logits.expand(4, -1), grid, **filters)) <= {3, 1500}


def test_a_row_draws_the_same_alone_and_among_neighbours_with_other_filters():
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(len(FILTERS), 4000, generator=generator) * 2).bfloat16().float()  # bf16: many ties
    full = [dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) | f for f in FILTERS]
    for uniform in (0.01, 0.37, 0.5, 0.93):
        together = draw(logits, uniform, **{name: [f[name] for f in full] for name in full[0]})
        alone = [draw(logits[i : i + 1], uniform, **f)[0] for i, f in enumerate(full)]
        assert together == alone


def test_penalties_and_bias_change_the_listed_places_only_and_as_defined():
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5], [3.0, 3.0, 3.0, 3.0]])
    raw, expected = logits.clone(), logits.clone()
    expected[0, 0] = 2.0 / 1.5 - 0.1 * 3 - 0.2 + 0.25  # in the output three times
    expected[0, 1] = -2.0 * 1.5  # in the prompt only
    expected[0, 2] = 1.0 - 4.0  # biased, never seen
    expected[1, 3] = -torch.inf
    expected[1, :2] = -torch.inf  # masked
    changes = dataclasses.replace(
        no_changes(2, "cpu"), starts=torch.tensor([0, 3, 4]).int(), ids=torch.tensor([0, 1, 2, 3]).int(),
        counts=torch.tensor([3.0, 0.0, -1.0, -1.0]), bias=torch.tensor([0.25, 0.0, -4.0, -torch.inf]),
        repetition=torch.tensor([1.5, 1.0]), frequency=torch.tensor([0.1, 0.0]), presence=torch.tensor([0.2, 0.0]),
        mask_of=torch.tensor([-1, 0]).int(), masks=torch.tensor([[0b1100]]).int(),
    )  # fmt: skip
    draws = greedy(2)
    assert sampling.sample(logits, draws, changes).tolist() == expected.argmax(1).tolist() == [0, 2]
    assert torch.equal(logits, raw)
    sampling.sample(logits, draws, changes, keep=False)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("case", [case for case in draw_kernels.sample.cases if not case.production],
                         ids=lambda case: case.name)  # fmt: skip
def test_a_draw_is_the_same_whether_the_logits_are_kept_or_not(case):
    torch.manual_seed(1)
    arguments = case.make("cpu", torch.float32)
    raw = arguments["logits"].clone()
    drawn = sampling.sample(**arguments)
    assert torch.equal(raw, arguments["logits"])
    assert torch.equal(drawn, sampling.sample(**arguments, keep=False))


def test_log_probabilities_are_log_softmax():
    logits = torch.randn(5, 500, generator=torch.Generator().manual_seed(1))
    rows, tokens, listed = torch.tensor([0, 2, 3]).int(), torch.tensor([4, 9, 0, 499, 9]), torch.tensor([[1], [0], [7]])
    picked, ids, values = sampling.log_probabilities(logits, rows, tokens, listed.int(), 5)
    reference = torch.log_softmax(logits[rows].double(), -1)
    places = torch.tensor([[4, 1], [0, 0], [499, 7]])
    torch.testing.assert_close(picked.double(), reference.gather(1, places), rtol=0, atol=1e-5)
    assert torch.equal(ids, reference.topk(5).indices)
    torch.testing.assert_close(values.double(), reference.topk(5).values, rtol=0, atol=1e-5)
    assert sampling.log_probabilities(logits, rows, tokens, listed.int(), 0)[1].shape == (3, 0)


@pytest.mark.parametrize("width", [5, 4096, 4097, 9000, 12288])
def test_the_best_column_is_argmaxs_also_with_ties_and_masked_tokens(width):
    logits = torch.randint(-3, 4, (40, width)).float()  # full of ties
    logits[:, ::3] = -math.inf
    logits[7] = -math.inf
    logits[8, width - 1] = 9.0
    logits[9, [width // 2, width - 1]] = 9.0
    wide = torch.full((40, width + 7), 100.0)  # rows of a wider tensor, as without a vocabulary's padding
    wide[:, :width] = logits
    assert torch.equal(sampling.best(wide[:, :width]), logits.argmax(-1))


def test_a_token_that_only_the_device_knows_counts_as_one_that_was_listed():
    """Rows: not listed, in the prompt, in the output twice, with a bias alone, nothing unknown, nothing listed."""
    listed = [[(5, 0, 0.5), (6, 1, 0)], [(7, 0, 1.5), (3, 2, 0)], [(7, 2, 0), (8, 0, 0)], [(9, -1, 2.5)], [(4, 1, 0)],
              []]
    drawn = torch.tensor([70, 7, 30, 9, 8])
    unknown = [-1, -2, -2, -4, 0, -5]
    rows = [own + [(place, 1, 0)] if place < 0 else own for own, place in zip(listed, unknown)]
    ids, counts, bias = zip(*(each for own in rows for each in own))
    starts = torch.tensor([sum(map(len, rows[:row])) for row in range(len(rows) + 1)], dtype=torch.int32)
    changes = dataclasses.replace(no_changes(len(rows), "cpu"), starts=starts, ids=torch.tensor(ids).int(),
                                  counts=torch.tensor(counts).float(), bias=torch.tensor(bias))
    found = sampling.count_drawn(changes, torch.tensor(unknown, dtype=torch.int32), drawn)
    owners = torch.arange(len(rows)).repeat_interleave(starts.diff())
    got = set(zip(owners.tolist(), found.ids.tolist(), found.counts.tolist(), found.bias.tolist()))
    assert {each for each in got if each[1] >= 0} == {
        (0, 5, 0, 0.5), (0, 6, 1, 0), (0, 70, 1, 0), (1, 7, 1, 1.5), (1, 3, 2, 0), (2, 7, 3, 0), (2, 8, 0, 0),
        (3, 9, 1, 2.5), (4, 4, 1, 0), (5, 8, 1, 0),
    }  # fmt: skip
    assert found.ids.dtype == torch.int32 and {each[1] for each in got if each[1] < 0} == {-1}
