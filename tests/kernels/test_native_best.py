"""The best columns after penalties and bias, found where products are computed: those of all logits in `sample`."""

import numpy as np
import pytest
import torch

from crane.kernels import native, sampling
from crane.kernels.packed import PackedLinear, pack
from tests.kernels.test_native_sampling import draws_of
from tests.kernels.test_screened import gaussian, logits, packed_weight, screened

pytestmark = pytest.mark.usefixtures("c_kernels")

VOCAB, COLUMNS, KNOWN = 20_000, 64, 19_990  # three slices of 32 rows of sums; KNOWN: columns that are searched
BORDERS = [0, 8191, 8192, 16383, 16384, KNOWN - 1, KNOWN, -1]  # of these slices and of what is searched
ROWS = [  # how many ids are listed, repetition, frequency, presence, bias
    (5, 1.05, 0.0, 0.0, 0.0), (0, 1.0, 0.0, 0.0, 0.0), (3000, 1.1, 0.0, 0.0, 0.0), (17, 0.7, -0.5, -1.0, 2.0),
    (900, 1.0, 1.5, 0.5, 0.0), (16, 1.3, 0.0, -2.0, -np.inf), (333, 1.0, 0.0, 0.0, 1.0), (1, 1.2, 2.0, 2.0, 0.0),
]  # fmt: skip


def changes_of(tops, rows=ROWS, seed=0):
    """`Changes` of these rows, whose lists begin with their logits' best ids, tops: [len(rows), n], and the borders."""
    random, ids, counts, bias = np.random.default_rng(seed), [], [], []
    for (count, *_, most), top in zip(rows, tops):
        own = [*dict.fromkeys([*top, *BORDERS, *random.permutation(VOCAB)])][:count]
        ids.append(random.permutation(np.array(own, np.int32)))
        counts.append(random.integers(-1, 6, count))
        bias.append(np.where(random.random(count) < 0.5, most, 0))
    columns = [np.array(column, np.float32) for column in list(zip(*rows))[1:4]]
    parts = np.concatenate(ids), *(np.concatenate(each).astype(np.float32) for each in (counts, bias))
    starts = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    none = np.full(len(rows), -1, np.int32), np.empty((0, 0), np.int32)
    return sampling.Changes(*map(torch.from_numpy, (starts, *parts, *columns, *none)))


def expected(found, changes):
    """The best of what `sample` draws from: int64 [rows]. found: all logits that are searched."""
    return sampling.sample_in_c(found, draws_of([(0.0, 0, 1.0, 0.0)] * len(found), [0] * len(found)), changes)


def close_ones(weight, num_rows, seed):
    """x, float32 [num_rows, columns], each with a few logits near each other and far above the others."""
    random, parts = torch.manual_seed(seed), torch.tensor([1.0, 0.97, 0.94, 0.9, 0.8]) / 9
    ids = torch.randperm(KNOWN, generator=random)[: 5 * num_rows]
    return (weight.rows(ids, torch.float32).view(num_rows, 5, -1) * parts[:, None]).sum(1)


def weights():
    yield "Q8_0", packed_weight(gaussian(VOCAB, COLUMNS)), torch.bfloat16
    yield "Q8_0", packed_weight(gaussian(VOCAB, COLUMNS)), torch.float32
    yield "Q4_0", packed_weight(gaussian(VOCAB, COLUMNS), "Q4_0"), torch.bfloat16
    if native.has_amx():
        yield "BF16", pack("BF16", VOCAB, COLUMNS, [gaussian(VOCAB, COLUMNS).bfloat16()]), torch.bfloat16


@pytest.mark.parametrize("num_rows", [1, 8, 32])
def test_they_are_those_of_all_logits_after_the_same_changes(num_rows):
    for name, weight, dtype in weights():
        linear, differing = PackedLinear([weight]), 0
        for part in range(8 if num_rows == 1 else 1):
            rows = [ROWS[(part + row) % len(ROWS)] for row in range(num_rows)]
            x = close_ones(weight, num_rows, part).to(dtype)
            found = linear(x, torch.float32)[:, :KNOWN]
            changes = changes_of(found.topk(12).indices.numpy(), rows, part)
            best = linear.best(x, KNOWN, native.Changes().hold(changes))
            assert torch.equal(best, expected(found, changes)), (name, part)
            differing += int((best != linear.best(x, KNOWN)).sum())
        assert differing > num_rows // 4, "changes matter"


@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_screen_finds_them_whatever_way_logits_are_changed(count):
    weight = packed_weight(gaussian(VOCAB, 512))
    x = close_ones(weight, 64, count).bfloat16()
    linear, plain, changed = screened(weight), screened(weight), 0
    for start in range(0, 64 - count + 1, count):
        some, rows = x[start : start + count], [ROWS[(start + row) % len(ROWS)] for row in range(count)]
        found = logits(weight, some)[:, :KNOWN]
        changes = changes_of(found.topk(12).indices.numpy(), rows, start)
        best = linear.best(some, KNOWN, native.Changes().hold(changes))
        assert torch.equal(best, expected(found, changes))
        changed += int((best != plain.best(some, KNOWN)).sum())
    assert changed > 10 and linear.screen.num_screened >= plain.screen.num_screened / 2 > 0


def test_bounds_change_as_logits_do_so_that_large_changes_spare_as_much():
    """With bounds of raw logits nearly all would have to be computed: the raw best one is far below the best."""
    weight = packed_weight(gaussian(VOCAB, 512))
    linear, peaks = screened(weight), weight.rows(torch.arange(0, VOCAB, 1000), torch.float32)
    for row, x in enumerate((peaks + peaks.roll(1, 0) / 2)[:, None].bfloat16()):  # the second best is there, too
        found = logits(weight, x)[:, :KNOWN]
        first, second = found.topk(2).indices[0].tolist()
        assert first == 1000 * row and second == 1000 * ((row or 20) - 1)
        for changed, bias, best in ((first, -1e3, second), (777, 1e3, 777), (777, -np.inf, first), (first, 1.0, first)):
            changes = changes_of([[changed]], [(1, 1.0, 0.0, 0.0, bias)])
            changes.bias[0] = bias
            assert linear.best(x, KNOWN, native.Changes().hold(changes)) == best == expected(found, changes)
    assert linear.screen.num_whole == 0 and linear.screen.num_blocks < 3 * linear.screen.num_screened


def test_of_columns_that_changes_make_equal_the_first_is_taken():
    values = gaussian(2048, COLUMNS)
    values[1024:] = values[:1024]
    weight = packed_weight(values)
    x, top = values[7:8].bfloat16(), float(logits(weight, values[7:8].bfloat16())[0, 7])
    for linear in (PackedLinear([weight]), screened(weight)):
        for ids, bias, best in (([7], -1e-3, 1031), ([1031, 7], -0.5, 7), ([600], 0.0, 7), ([7, 1031], -np.inf, 5)):
            changes = changes_of([ids], [(len(ids) + 1, 1.0, 0.0, 0.0, bias)])
            changes.ids[:], changes.bias[:] = torch.tensor([*ids, 5]), bias
            changes.bias[-1] = top - logits(weight, x)[0, 5] if best == 5 else -1.0
            assert linear.best(x, 2048, native.Changes().hold(changes)) == best


def test_numbers_that_are_none_and_infinite_ones_are_as_without_changes():
    weight = packed_weight(gaussian(VOCAB, COLUMNS))
    x = gaussian(8, COLUMNS)
    x[1] = torch.nan
    x[2] = 0
    x[3, 5] = torch.inf
    x[4] *= 1e30
    for linear in (PackedLinear([weight]), screened(weight)):
        for row, one in enumerate(x[:, None]):
            found = linear(one)[:, :KNOWN]
            changes = changes_of(found.nan_to_num(nan=-1e9).topk(12).indices.numpy(), ROWS[row : row + 1], row)
            assert torch.equal(linear.best(one, KNOWN, native.Changes().hold(changes)), expected(found, changes)), row


def test_structures_are_as_large_as_in_c():
    assert native.ctypes.sizeof(native.Changes) == 10 * 8
