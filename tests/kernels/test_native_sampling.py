"""Sampling and log-probabilities in C against float64: the tokens kept, the token drawn, rows that break samplers."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crane.kernels import native, sampling
from crane.kernels.draw import no_changes, sample
from crane.kernels.logprobs import log_probabilities
from tests.kernels.cases import run_case

pytestmark = pytest.mark.usefixtures("c_kernels")

VOCAB = 151_936
CASES = [pytest.param(kernel, case, id=f"{kernel.name}-{case.name}")
         for kernel in (sample, log_probabilities) for case in kernel.cases if not case.production]  # fmt: skip
FILTERS = [  # temperature, top_k, top_p, min_p
    (1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (0.7, 20, 0.95, 0.0), (1.0, 1, 1.0, 0.0), (1.3, 0, 0.9, 0.0),
    (1.0, 0, 0.5, 0.1), (0.3, 300, 1.0, 0.0), (5.0, 0, 0.999, 0.0), (1.0, 40, 0.01, 0.0), (0.8, 0, 0.95, 0.0),
    (1.0, 0, 0.0, 0.0), (1.0, 0, 1.0, 1.0), (1.0, 0, 1.0, 0.05), (2.0, 3000, 0.8, 0.01), (1.0, 10**6, 1.0, 0.0),
    (100.0, 0, 0.3, 0.0), (1e-3, 0, 0.95, 0.0), (1.0, 100_000, 0.7, 0.0), (5.0, 0, 0.95, 0.0),
]  # fmt: skip


def draws_of(filters, seeds):
    """`Draws` of a row for each of the filters and seeds."""
    columns = [torch.tensor(column, dtype=dtype) for column, dtype in
               zip(zip(*filters), (torch.float32, torch.int32, torch.float32, torch.float32))]  # fmt: skip
    positions = torch.arange(len(filters), dtype=torch.int32)
    return sampling.Draws(*columns, torch.tensor(seeds), positions % 3, positions)


def drawn(logits, filters, seeds):
    """What C draws from the rows, and the numbers it draws with."""
    draws = draws_of(filters, seeds)
    before = logits.clone()
    tokens = sampling.sample_in_c(logits, draws, no_changes(len(logits), "cpu"))
    assert torch.equal(logits.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))
    return tokens.tolist(), sampling.uniforms(draws.seeds, draws.choices.long(), draws.positions.long()).tolist()


def acceptable(logits, filters, uniform):
    """Tokens that the definition in kernels/sampling.py gives, with sums that are right to 1e-6. logits: [vocab]."""
    temperature, top_k, top_p, min_p = (np.float32(each) for each in filters)
    if temperature == 0:
        return {int(logits.argmax())}
    scaled = logits / temperature
    weights = np.exp((logits.astype(np.float64) - logits.max()) / np.float64(temperature))
    order = np.argsort(-scaled, kind="stable")
    limit = len(logits) if not 0 < top_k < len(logits) else int(top_k)
    sums = weights[order][:limit].cumsum()
    found = set()
    for slack in (-1e-6, 0, 1e-6):
        before = sums - weights[order][:limit]
        num_kept = max(int((before < (top_p + slack if top_p < 1 else 2) * sums[-1]).sum()), 1)
        with np.errstate(divide="ignore"):
            floor = scaled.max() + np.log(min_p) + (np.abs(scaled.max()) * np.float32(slack) if 0 < min_p < 1 else 0)
        kept = scaled >= max(scaled[order[num_kept - 1]], floor)
        inside = np.where(kept, weights, 0.0).cumsum()
        first, last = (int(np.searchsorted(inside, (uniform + each) * inside[-1], "right")) for each in (-1e-6, 1e-6))
        span = np.arange(first, min(last, len(logits) - 1) + 1)
        found |= set(span[kept[span]].tolist())
        if uniform < 1e-6:
            found.add(int(np.flatnonzero(kept & (weights > 0))[0]))
        if uniform > 1 - 1e-6:
            found.add(int(np.flatnonzero(kept & (weights > 1e-30))[-1]))
    return found


def check(logits, filters, seeds):
    """Every row's token is one that the definition gives."""
    for row, (token, uniform) in enumerate(zip(*drawn(logits, filters, seeds), strict=True)):
        right = acceptable(logits[row].numpy(), filters[row], uniform)
        assert token in right, f"row {row}, {filters[row]}, {uniform}: {token} is none of {sorted(right)[:9]}"


def check_cases():
    """Both kernels' small cases, with the library that is loaded."""
    for kernel, case in (each.values for each in CASES):
        assert run_case(kernel, case, torch.float32, in_c=True) <= kernel.tolerances[torch.float32]


@pytest.mark.parametrize("kernel, case", CASES)
def test_the_c_of_a_kernel_gives_what_the_reference_gives_in_float64(kernel, case):
    error = run_case(kernel, case, torch.float32, in_c=True)
    assert error <= (0 if kernel is sample else kernel.tolerances[torch.float32])


def rows_of_a_model(kind, rows):
    """float32 [rows, VOCAB - 200], rows of a wider tensor: logits as models give them, or as none should."""
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(5))
    if kind == "flat":
        logits *= 3
    elif kind == "peaked":
        logits[:, 900:930] += torch.linspace(8, 20, 30)
    elif kind == "bfloat16":  # thousands of equals
        logits = logits.mul(3).bfloat16().float()
    elif kind == "a heavy head":  # top-p's threshold lies in an even tail
        logits *= 0.01
        logits[:, 5] = 14.7
    elif kind == "equal":
        logits[:] = 1.25
    elif kind == "two levels":
        logits[:] = 0.0
        logits[:, 70_000:70_010] = 5.0
    elif kind == "a misleading sample":  # what `guess` of sample.c looks at is far above the rest
        logits[:, torch.arange(VOCAB) % 1024 < 16] += 9.0
    elif kind == "masked":
        logits[:, torch.rand(VOCAB, generator=torch.Generator().manual_seed(6)) < 0.999] = -torch.inf
    return logits[:, :-200]


@pytest.mark.parametrize("kind", ["flat", "peaked", "bfloat16", "a heavy head", "equal", "two levels", "masked",
                                  "a misleading sample"])
def test_whole_vocabularies_are_drawn_from_as_defined(kind):
    check(rows_of_a_model(kind, len(FILTERS)), FILTERS, list(range(1 << 40, (1 << 40) + len(FILTERS))))


@st.composite
def small_rows(draw):
    """(logits, filters): few tokens or a little more than a chunk, many ties, some banned, both zeros."""
    size = draw(st.sampled_from([1, 2, 15, 16, 17, 50, 1023, 1024, 1025, 2100]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(size, generator=generator) * draw(st.sampled_from([0.0, 0.1, 3.0, 1e4]))
    if draw(st.booleans()):
        logits = logits.div(draw(st.sampled_from([0.25, 4.0]))).round()
    banned = torch.rand(size, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.99]))
    banned[draw(st.integers(0, size - 1))] = False
    filters = (draw(st.sampled_from([0.0, 1e-30, 0.01, 0.5, 1.0, 3.0, 100.0])),
               draw(st.sampled_from([0, 1, 2, 10, 100, 1024, 5000])),
               draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999999, 1.0])),
               draw(st.sampled_from([0.0, 0.0, 0.01, 0.5, 1.0])))  # fmt: skip
    return logits.masked_fill(banned, -torch.inf), filters


@settings(max_examples=400, deadline=None)
@given(small_rows(), st.integers(-(2**63), 2**63 - 1))
def test_any_row_is_drawn_from_as_defined(row, seed):
    check(row[0][None], [row[1]], [seed])


def test_logits_that_only_division_makes_equal_are_tied():
    logits = torch.full((400, 300), -1.0)
    logits[:, 7] = 1.75 + 3 * 2**-23
    logits[:, 9] = 1.75 + 2 * 2**-23
    assert (logits[0, 7] / 3 == logits[0, 9] / 3) and logits[0, 7] != logits[0, 9]
    tokens, _ = drawn(logits, [(3.0, 1, 1.0, 0.0)] * 400, list(range(400)))
    assert set(tokens) == {7, 9}


def test_rows_with_nothing_to_choose_or_no_numbers_stay_within_the_vocabulary():
    logits = torch.full((5, 3000), -torch.inf)
    logits[1, 2999] = -3e4
    logits[2, 17], logits[2, 18] = 60.0, torch.nan
    logits[3, [40, 50]] = torch.inf
    logits[4] = torch.nan
    for filters in FILTERS + [(1e-45, 0, 1.0, 0.0)]:
        assert drawn(logits, [filters] * 5, [1, 2, 3, 4, 5])[0] == [0, 2999, 17, 40, 0]


def test_numbers_are_those_of_philox():
    logits = torch.zeros(500, 1 << 16)
    tokens, numbers = drawn(logits, [(1.0, 0, 1.0, 0.0)] * 500, (torch.arange(500) * 0x9E3779B97F4A7C15).tolist())
    assert tokens == [int(number * (1 << 16)) for number in numbers]


def test_frequencies_follow_the_probabilities_that_filters_leave():
    row = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, -9.0])
    for filters, kept in (((1.0, 0, 1.0, 0.0), 5), ((0.7, 3, 1.0, 0.0), 3), ((1.0, 0, 0.8, 0.0), 3),
                          ((2.0, 0, 1.0, 0.3), 4)):  # fmt: skip
        count = 20_000
        tokens, _ = drawn(row.repeat(count, 1), [filters] * count, list(range(count)))
        allowed = row.sort(descending=True).indices[:kept]
        expected = torch.softmax(row[allowed] / filters[0], -1).numpy() * count
        found = np.bincount(tokens, minlength=6)[allowed.numpy()]
        assert found.sum() >= count - 20  # chi-square, 4 degrees of freedom at most: p < 0.001 beyond 18.5
        assert ((found - expected) ** 2 / expected).sum() < 18.5


def test_a_row_draws_the_same_alone_and_among_neighbours_on_any_number_of_threads(c_kernels):
    logits = rows_of_a_model("flat", len(FILTERS))
    together = drawn(logits, FILTERS, [9] * len(FILTERS))[0]
    draws = draws_of(FILTERS, [9] * len(FILTERS))
    for threads in (1, 3):
        c_kernels.crane_set_threads(threads, native.SPINS)
        for row in range(len(FILTERS)):
            own = sampling.Draws(*(each[row : row + 1] for each in vars(draws).values()))
            assert sampling.sample_in_c(logits[row : row + 1], own, no_changes(1, "cpu")).tolist() == [together[row]]
    c_kernels.crane_set_threads(2, native.SPINS)


def test_listed_places_are_changed_for_the_draw_alone_with_a_mask_and_without():
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5], [3.0, 3.0, 3.0, 3.0], [3.0, 2.0, 0.0, 1.0]])
    raw = logits.clone()
    changes = dataclasses.replace(
        no_changes(3, "cpu"), starts=torch.tensor([0, 3, 5, 6]).int(), ids=torch.tensor([0, 1, 2, 3, -1, 0]).int(),
        counts=torch.tensor([3.0, 0, -1, -1, 5, 0]), bias=torch.tensor([0.25, 0, 0.4, -torch.inf, 9, 0]),
        repetition=torch.tensor([1.5, 1.0, 3.1]), frequency=torch.tensor([0.1, 0.0, 0.0]),
        presence=torch.tensor([0.2, 0.0, 0.0]), mask_of=torch.tensor([-1, 0, -1]).int(),
        masks=torch.tensor([[0b1100]]).int(),
    )  # fmt: skip
    # row 0: 2 / 1.5 - 0.3 - 0.2 + 0.25 is below 1.4; row 1: one is allowed; row 2: 3 / 3.1 is below 2
    draws = draws_of([(0.0, 0, 1.0, 0.0)] * 3, [0, 0, 0])
    for kernel in (sampling.sample_in_c, sampling.sample):
        assert kernel(logits, draws, changes).tolist() == [2, 2, 1]
        assert torch.equal(logits, raw)


@pytest.mark.parametrize("vocab", [97, 5000])
def test_log_probabilities_put_equal_logits_in_the_order_of_their_ids(vocab):
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(5)).mul(2).round()  # full of ties
    logits[1, 3::2] = -torch.inf
    tokens, rows, listed = torch.tensor([1, 2]), torch.tensor([0, 1]).int(), torch.zeros(2, 0).int()
    exact = torch.log_softmax(logits.double(), 1)
    order = logits.sort(dim=1, descending=True, stable=True).indices
    for count in (0, 1, 60, vocab):
        picked, ids, values = sampling.log_probabilities_in_c(logits, rows, tokens, listed, count)
        assert torch.equal(ids, order[:, :count])
        torch.testing.assert_close(values.double(), exact.gather(1, ids), rtol=0, atol=2e-6)
        torch.testing.assert_close(picked.double(), exact.gather(1, tokens[:, None]), rtol=0, atol=2e-6)


def test_log_probabilities_of_whole_vocabularies_are_right_to_a_millionth():
    for kind in ("flat", "peaked", "masked"):
        logits = rows_of_a_model(kind, 3)
        tokens, rows = logits.argmax(1), torch.tensor([0, 2]).int()
        listed = torch.tensor([[3, 99], [151_000, 70]]).int()
        exact = torch.log_softmax(logits[rows].double(), 1)
        picked, ids, values = sampling.log_probabilities_in_c(logits, rows, tokens, listed, 20)
        assert torch.equal(ids, exact.topk(20).indices)
        torch.testing.assert_close(values.double(), exact.topk(20).values, rtol=1e-6, atol=1e-6)
        places = torch.cat((tokens[rows, None], listed.long()), 1)
        torch.testing.assert_close(picked.double(), exact.gather(1, places), rtol=1e-6, atol=1e-6)


def test_other_than_rows_of_contiguous_float32_is_left_to_torch():
    draws = draws_of([(0.0, 0, 1.0, 0.0)] * 4, [0] * 4)
    for logits in (torch.randn(4, 8).bfloat16(), torch.randn(8, 4).T, torch.randn(1, 8).expand(4, -1)):
        assert sampling.sample_in_c(logits, draws, no_changes(4, "cpu")) is NotImplemented
        assert sample(logits, draws, no_changes(4, "cpu")).tolist() == logits.argmax(1).tolist()
