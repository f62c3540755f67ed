"""`sampling.sample` in two launches, no sort and no word to the host.

Filters keep what reaches a threshold by value, so no order is needed, only the threshold: the largest value with
at least k tokens at or above it (top-k), the smallest with less than the mass p above it (top-p). Floats become
integers of the same order, and halving finds the threshold exactly. `_scan_kernel` changes the logits at the listed
places, reads them all once and leaves the maximum of every 64 tokens. `_pick_kernel`, a program a row, looks only into
the `_BLOCKS` sub-blocks of largest maxima: everything above the largest maximum left out lies there. Rows whose
threshold turns out lower are halved as a whole. Then it puts the logits back as they were. Masks are looked up where
logits are read and never written.
"""

import torch
from torch import Tensor

from crane.kernels import sampling
from crane.kernels.lang import jit, next_power_of_2, tl
from crane.kernels.registry import Case, kernel
from crane.kernels.sampling import Changes, Draws

_SUB = 64
# Sub-blocks that `_pick_kernel` looks into.
_BLOCKS = 64
_CHUNK = 4096
# Listed places that a program changes at a time.
_PLACES = 512
# Below every key, also that of -inf.
NOTHING = tl.constexpr(-(2**31))


@jit
def to_key(x):
    """float32 -> int32 of the same order; both zeros are one number, NaN counts as -inf."""
    x = tl.where(x == x, tl.where(x == 0.0, 0.0, x), -float("inf"))
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def from_key(key):
    """The float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _load(logits_ptr, words_ptr, masked, ids, inside):
    """Logits of a row; -inf outside, for what the mask bans and for NaN. words_ptr: the row's mask, if `masked`."""
    x = tl.load(logits_ptr + ids, mask=inside, other=-float("inf"))
    x = tl.where(x == x, x, -float("inf"))
    if masked:
        words = tl.load(words_ptr + (ids >> 5), mask=inside, other=0)
        x = tl.where(((words >> (ids & 31)) & 1) != 0, x, -float("inf"))
    return x


@jit
def _load_scaled(logits_ptr, words_ptr, masked, ids, inside, temperature):
    """`_load`, over the temperature."""
    x = _load(logits_ptr, words_ptr, masked, ids, inside)
    return tl.div_rn(x, temperature + tl.zeros_like(x))


@jit
def _change(logits_ptr, starts_ptr, ids_ptr, counts_ptr, bias_ptr, repetition_ptr, frequency_ptr, presence_ptr,
            saved_ptr, row, start, end, PLACES: tl.constexpr):
    """Change the row's logits at those of its listed ids that are in start .. end, and save what they were."""
    repetition, frequency = tl.load(repetition_ptr + row), tl.load(frequency_ptr + row)
    presence = tl.load(presence_ptr + row)
    last = tl.load(starts_ptr + row + 1)
    for first in range(tl.load(starts_ptr + row), last, PLACES):
        place = first + tl.arange(0, PLACES)
        ids = tl.load(ids_ptr + place, mask=place < last, other=-1)
        mine = (ids >= start) & (ids < end)
        x = tl.load(logits_ptr + ids, mask=mine, other=0.0)
        tl.store(saved_ptr + place, x, mask=mine)
        count = tl.load(counts_ptr + place, mask=mine, other=-1.0)
        penalised = tl.where(x > 0.0, tl.div_rn(x, repetition + tl.zeros_like(x)), x * repetition)
        penalised -= frequency * count + tl.where(count > 0.0, presence, 0.0)
        x = tl.where(count < 0.0, x, penalised) + tl.load(bias_ptr + place, mask=mine, other=0.0)
        tl.store(logits_ptr + ids, x, mask=mine)
    tl.debug_barrier()  # other threads read what is changed here


@jit
def _restore(logits_ptr, starts_ptr, ids_ptr, saved_ptr, row, PLACES: tl.constexpr):
    """Undo `_change` in a whole row."""
    last = tl.load(starts_ptr + row + 1)
    for first in range(tl.load(starts_ptr + row), last, PLACES):
        place = first + tl.arange(0, PLACES)
        ids = tl.load(ids_ptr + place, mask=place < last, other=-1)
        tl.store(logits_ptr + ids, tl.load(saved_ptr + place, mask=ids >= 0, other=0.0), mask=ids >= 0)


@jit(do_not_specialize=["num_words"])
def _scan_kernel(
    logits_ptr, temperature_ptr, starts_ptr, ids_ptr, counts_ptr, bias_ptr, repetition_ptr, frequency_ptr,
    presence_ptr, mask_of_ptr, masks_ptr, saved_ptr, maxima_ptr, tops_ptr, sums_ptr,
    vocab, stride, num_words, num_maxima, SUB: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """A chunk of a row. maxima: float32 [rows, num_maxima], of every SUB tokens. tops, sums: [rows, chunks], the
    largest scaled logit and, unless greedy, the sum of exp(scaled - top)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = chunk * BLOCK
    logits_ptr += row * stride
    _change(logits_ptr, starts_ptr, ids_ptr, counts_ptr, bias_ptr, repetition_ptr, frequency_ptr, presence_ptr,
            saved_ptr, row, start, tl.minimum(start + BLOCK, vocab), PLACES)
    mask = tl.load(mask_of_ptr + row).to(tl.int64)
    ids = start + tl.arange(0, BLOCK)
    x = _load(logits_ptr, masks_ptr + mask * num_words, mask >= 0, ids, ids < vocab)
    temperature = tl.load(temperature_ptr + row)
    greedy = temperature == 0.0
    temperature = tl.where(greedy, 1.0, temperature)
    # division keeps the order, so only maxima need it
    subs = chunk * (BLOCK // SUB) + tl.arange(0, BLOCK // SUB)
    maxima = tl.max(tl.reshape(x, (BLOCK // SUB, SUB)), 1)
    tl.store(maxima_ptr + row * num_maxima + subs, tl.div_rn(maxima, temperature + tl.zeros_like(maxima)),
             mask=subs < num_maxima)
    if greedy == 0:
        top = tl.max(maxima, 0)
        at = row * tl.num_programs(1) + chunk
        tl.store(tops_ptr + at, tl.div_rn(top, temperature))
        top = tl.where(top == -float("inf"), 0.0, top)
        tl.store(sums_ptr + at, tl.sum(tl.exp((x - top) * (1.0 / temperature)), 0))


@jit
def _total(tops_ptr, sums_ptr, row, best, num_chunks, CHUNKS: tl.constexpr):
    """float64 sum of exp(scaled - best) over the vocabulary."""
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < num_chunks
    top = tl.load(tops_ptr + row * num_chunks + chunk, mask=inside, other=-float("inf"))
    sums = tl.load(sums_ptr + row * num_chunks + chunk, mask=inside, other=0.0)
    return tl.sum(sums.to(tl.float64) * tl.exp(top - best).to(tl.float64), 0)


@jit
def _cut(keys, best_key, most):
    """The least key that at most `most` of the keys reach."""
    low, cut = best_key.to(tl.int64) * 0 + NOTHING, best_key.to(tl.int64) + 1
    for _ in range(33):
        middle = (low + cut) >> 1
        few = tl.sum((keys >= middle).to(tl.int32), 0) <= most
        cut = tl.where(few & (middle > low), middle, cut)
        low = tl.where(few, low, middle)
    return cut


@jit
def _reached(keys, best_key, limit):
    """Top-k: the largest key that at least `limit` of the keys reach."""
    least, high = best_key.to(tl.int64) * 0 + NOTHING, best_key.to(tl.int64) + 1
    for _ in range(33):
        middle = (least + high) >> 1
        enough = tl.sum((keys >= middle).to(tl.int32), 0) >= limit
        least = tl.where(enough, middle, least)
        high = tl.where(enough, high, middle)
    return least


@jit
def _lightest(keys, weights, best_key, mass):
    """Top-p: the smallest key above which lies less than `mass`."""
    low, threshold = best_key.to(tl.int64) * 0 + NOTHING, best_key.to(tl.int64)
    for _ in range(33):
        middle = (low + threshold) >> 1
        less = tl.sum(tl.where(keys > middle, weights, 0.0), 0) < mass
        threshold = tl.where(less & (middle > low), middle, threshold)
        low = tl.where(less, low, middle)
    return threshold


@jit
def _above(logits_ptr, words_ptr, masked, key, best, temperature, vocab, BLOCK: tl.constexpr):
    """(tokens with a key above `key`, their mass relative to the best's) in a whole row."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        scaled = _load_scaled(logits_ptr, words_ptr, masked, ids, ids < vocab, temperature)
        above = (ids < vocab) & (to_key(scaled) > key)
        count += above.to(tl.int32)
        mass += tl.where(above, tl.exp(scaled - best), 0.0).to(tl.float64)
    return tl.sum(count, 0), tl.sum(mass, 0)


@jit
def _kept(logits_ptr, words_ptr, masked, start, threshold, best, temperature, vocab, BLOCK: tl.constexpr):
    """float64 [BLOCK]: exp(scaled - best) of the tokens kept among those from `start` on."""
    ids = start + tl.arange(0, BLOCK)
    scaled = _load_scaled(logits_ptr, words_ptr, masked, ids, ids < vocab, temperature)
    kept = (ids < vocab) & (to_key(scaled) >= threshold) & (scaled > -float("inf"))
    return tl.where(kept, tl.exp(scaled - best), 0.0).to(tl.float64)


@jit
def _draw_wide(logits_ptr, words_ptr, masked, temperature, limit, top_p, floor, uniform, best_key, total, vocab,
               BLOCK: tl.constexpr):
    """A draw that looks at the whole row again and again. total: mass of the vocabulary relative to the best's."""
    best = from_key(best_key)
    least = best_key.to(tl.int64) * 0 + NOTHING
    if limit < vocab:
        high = best_key.to(tl.int64) + 1
        for _ in range(33):
            middle = (least + high) >> 1
            count, mass = _above(logits_ptr, words_ptr, masked, middle - 1, best, temperature, vocab, BLOCK)
            least = tl.where(count >= limit, middle, least)
            high = tl.where(count >= limit, high, middle)
        count, mass = _above(logits_ptr, words_ptr, masked, least, best, temperature, vocab, BLOCK)
        total = mass + (limit - count).to(tl.float64) * tl.exp(from_key(least.to(tl.int32)) - best).to(tl.float64)
    threshold = best_key.to(tl.int64) * 0 + NOTHING
    if top_p < 1.0:
        low, threshold = threshold, best_key.to(tl.int64)
        for _ in range(33):
            middle = (low + threshold) >> 1
            count, mass = _above(logits_ptr, words_ptr, masked, middle, best, temperature, vocab, BLOCK)
            less = mass < top_p.to(tl.float64) * total
            threshold = tl.where(less & (middle > low), middle, threshold)
            low = tl.where(less, low, middle)
    threshold = tl.maximum(tl.maximum(threshold, least).to(tl.int32), to_key(best + floor))
    total = uniform * 0.0
    for start in range(0, vocab, BLOCK):
        total += tl.sum(_kept(logits_ptr, words_ptr, masked, start, threshold, best, temperature, vocab, BLOCK), 0)
    target = uniform * total
    # the chunk that the target falls into; sums are taken in the same order, so the last one reaches the total
    before, base, found = total * 0.0, total * 0.0, vocab * 0 - 1
    for start in range(0, vocab, BLOCK):
        kept = _kept(logits_ptr, words_ptr, masked, start, threshold, best, temperature, vocab, BLOCK)
        after = before + tl.sum(kept, 0)
        here = (found < 0) & (after > target)
        base = tl.where(here, before, base)
        found = tl.where(here, start, found)
        before = after
    found = tl.maximum(found, 0)
    j = tl.arange(0, BLOCK)
    kept = _kept(logits_ptr, words_ptr, masked, found, threshold, best, temperature, vocab, BLOCK)
    place = tl.sum((base + tl.cumsum(kept, 0) <= target).to(tl.int32), 0)
    last = tl.max(tl.where(kept > 0.0, j, 0), 0)  # rounding may leave the target just past the chunk's own sum
    return found + tl.minimum(place, last)


@jit
def _draw(logits_ptr, words_ptr, masked, temperature, limit, top_p, floor, uniform, maxima, best_key, picked_ptr,
          total, vocab, SUB: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, MAXIMA: tl.constexpr):
    """The token of a row that is not greedy. maxima: keys [MAXIMA]; picked: int32 [BLOCKS], scratch; total: mass of the
    vocabulary relative to the best's."""
    best = from_key(best_key)
    sub = tl.arange(0, MAXIMA)
    chosen = maxima >= _cut(maxima, best_key, BLOCKS)
    left_out = tl.max(tl.where(chosen, NOTHING, maxima), 0)
    count = tl.sum(chosen.to(tl.int32), 0)
    tl.store(picked_ptr + tl.cumsum(chosen.to(tl.int32), 0) - 1, sub, mask=chosen)
    tl.debug_barrier()
    # candidates, in the order of their ids
    j = tl.arange(0, BLOCKS * SUB)
    inside = j // SUB < count
    ids = tl.load(picked_ptr + j // SUB, mask=inside, other=0) * SUB + j % SUB
    inside = inside & (ids < vocab)
    scaled = _load_scaled(logits_ptr, words_ptr, masked, ids, inside, temperature)
    keys = tl.where(inside, to_key(scaled), NOTHING)
    weights = tl.where(scaled > -float("inf"), tl.exp(scaled - best), 0.0).to(tl.float64)
    least = tl.where(limit < vocab, _reached(keys, best_key, limit), NOTHING).to(tl.int32)
    # the mass of exactly `limit` tokens, of those tied at the end only as many as fit
    above = keys > least
    tied = (limit - tl.sum(above.to(tl.int32), 0)).to(tl.float64) * tl.exp(from_key(least) - best).to(tl.float64)
    mass = tl.where(limit == vocab, total, tl.sum(tl.where(above, weights, 0.0), 0) + tied)
    threshold = _lightest(keys, weights, best_key, top_p.to(tl.float64) * mass)
    threshold = tl.where(top_p < 1.0, threshold, NOTHING).to(tl.int32)
    threshold = tl.maximum(tl.maximum(threshold, least), to_key(best + floor))
    sums = tl.cumsum(tl.where(keys >= threshold, weights, 0.0), 0)
    place = tl.sum((sums <= uniform * tl.max(sums, 0)).to(tl.int32), 0)
    token = tl.sum(tl.where(j == place, ids, 0), 0)
    # with nothing left out, the candidates are the row
    if (threshold <= left_out) & (left_out > NOTHING):
        token = _draw_wide(logits_ptr, words_ptr, masked, temperature, limit, top_p, floor, uniform, best_key, total,
                           vocab, BLOCK)
    return token


@jit
def _uniform(seed, choice, position):
    """`sampling.uniforms`: 53 bits of Philox."""
    zero = (position * 0).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, position.to(tl.uint32), choice.to(tl.uint32), zero, zero)
    bits = (first.to(tl.int64) << 21) | (second >> 11).to(tl.int64)
    return bits.to(tl.float64) * (1.0 / 9007199254740992.0)


@jit(do_not_specialize=["num_words"])
def _pick_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, choices_ptr, positions_ptr,
    starts_ptr, ids_ptr, mask_of_ptr, masks_ptr, saved_ptr, maxima_ptr, tops_ptr, sums_ptr, picked_ptr, out_ptr,
    vocab, stride, num_words, num_maxima, num_chunks,
    SUB: tl.constexpr, BLOCKS: tl.constexpr, MAXIMA: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
    PLACES: tl.constexpr,
):  # fmt: skip
    """One row a program. picked: int32 [rows, BLOCKS], scratch."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    mask = tl.load(mask_of_ptr + row).to(tl.int64)
    words_ptr = masks_ptr + mask * num_words
    sub = tl.arange(0, MAXIMA)
    maxima = tl.load(maxima_ptr + row * num_maxima + sub, mask=sub < num_maxima, other=-float("inf"))
    maxima = tl.where(sub < num_maxima, to_key(maxima), NOTHING)
    best_key = tl.max(maxima, 0)
    temperature = tl.load(temperature_ptr + row)
    if temperature == 0.0:
        ids = tl.min(tl.where(maxima == best_key, sub, MAXIMA), 0) * SUB + tl.arange(0, SUB)
        x = _load(logits_ptr, words_ptr, mask >= 0, ids, ids < vocab)
        token = tl.min(tl.where((to_key(x) == best_key) & (ids < vocab), ids, vocab - 1), 0)
    else:
        k = tl.load(top_k_ptr + row)
        limit = tl.where((k == 0) | (k > vocab), vocab, k)
        uniform = _uniform(tl.load(seeds_ptr + row), tl.load(choices_ptr + row), tl.load(positions_ptr + row))
        total = _total(tops_ptr, sums_ptr, row, from_key(best_key), num_chunks, CHUNKS)
        token = _draw(logits_ptr, words_ptr, mask >= 0, temperature, limit, tl.load(top_p_ptr + row),
                      tl.log(tl.load(min_p_ptr + row)), uniform, maxima, best_key, picked_ptr + row * BLOCKS, total,
                      vocab, SUB, BLOCKS, BLOCK, MAXIMA)
    tl.store(out_ptr + row, token.to(tl.int64))
    tl.debug_barrier()  # all have read the changed logits
    _restore(logits_ptr, starts_ptr, ids_ptr, saved_ptr, row, PLACES)


def _sample_triton(logits: Tensor, draws: Draws, changes: Changes, keep: bool = True) -> Tensor:
    rows, vocab = logits.shape
    num_maxima, num_chunks = -(-vocab // _SUB), -(-vocab // _CHUNK)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    maxima, tops, sums = scratch(rows, num_maxima), scratch(rows, num_chunks), scratch(rows, num_chunks)
    picked, saved = scratch(rows, _BLOCKS, dtype=torch.int32), scratch(len(changes.ids))
    out = scratch(rows, dtype=torch.int64)
    sizes = vocab, logits.stride(0), changes.masks.shape[1], num_maxima
    _scan_kernel[(rows, num_chunks)](
        logits, draws.temperature, changes.starts, changes.ids, changes.counts, changes.bias, changes.repetition,
        changes.frequency, changes.presence, changes.mask_of, changes.masks, saved, maxima, tops, sums, *sizes,
        SUB=_SUB, BLOCK=_CHUNK, PLACES=_PLACES, num_warps=4,
    )  # fmt: skip
    _pick_kernel[(rows,)](
        logits, draws.temperature, draws.top_k, draws.top_p, draws.min_p, draws.seeds, draws.choices, draws.positions,
        changes.starts, changes.ids, changes.mask_of, changes.masks, saved, maxima, tops, sums, picked, out, *sizes,
        num_chunks, SUB=_SUB, BLOCKS=_BLOCKS, MAXIMA=max(next_power_of_2(num_maxima), 2 * _BLOCKS),
        CHUNKS=next_power_of_2(num_chunks), BLOCK=_CHUNK, PLACES=_PLACES, num_warps=16,
    )  # fmt: skip
    return out


def _why_not(logits: Tensor, draws: Draws, changes: Changes, keep: bool = True) -> str | None:
    if logits.dtype != torch.float32:
        return f"logits are {logits.dtype}, not float32"
    if logits.stride(1) != 1 or len(logits) == 0:
        return "logits are not rows of contiguous numbers"
    return None


_FILTERS = (  # temperature, top_k, top_p, min_p
    (1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (0.7, 20, 0.95, 0.0), (1.0, 1, 1.0, 0.0), (1.3, 0, 0.9, 0.0),
    (1.0, 0, 0.5, 0.1), (0.3, 300, 1.0, 0.0), (5.0, 0, 0.999, 0.0), (1.0, 40, 0.01, 0.0),
)  # fmt: skip
_GREEDY = ((0.0, 0, 1.0, 0.0),)


def no_changes(rows: int, device: torch.device | str) -> Changes:
    """Nothing listed and everything allowed."""
    def of(dtype: torch.dtype, *shape: int, value: int = 0) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    ints, floats = torch.int32, torch.float32
    return Changes(of(ints, rows + 1), of(ints, 0), of(floats, 0), of(floats, 0), of(floats, rows, value=1),
                   of(floats, rows), of(floats, rows), of(ints, rows, value=-1), of(ints, 0, 0))  # fmt: skip


def _changes(vocab: int, rows: int, device: str, most: int) -> Changes:
    """Up to `most` places in every row but each fourth, a mask in every third."""
    counts = [0 if row % 4 == 3 else most * (row % 4 + 1) // 4 for row in range(rows)]
    total, num_words = sum(counts), (vocab + 32) // 32

    def floats(count: int, least: float, most: float) -> Tensor:
        return torch.rand(count, device=device).mul_(most - least).add_(least)

    if torch.device(device).type == "meta":
        ids = torch.empty(total, dtype=torch.int32, device=device)
    else:
        ids = torch.cat([torch.randperm(vocab, device=device)[:count] for count in counts]).int()
        ids[3::11] = -1
    bias = floats(total, -3, 3)
    bias[1::3] = 0.0
    bias[2::9] = float("-inf")
    return Changes(
        torch.tensor([sum(counts[:row]) for row in range(rows + 1)], dtype=torch.int32, device=device), ids,
        torch.randint(-1, 4, (total,), device=device).float(), bias,
        floats(rows, 0.8, 1.5), floats(rows, 0, 0.5), floats(rows, -0.5, 0.5),
        torch.tensor([row // 3 if row % 3 == 0 else -1 for row in range(rows)], dtype=torch.int32, device=device),
        torch.randint(-(2**31), 2**31, (-(-rows // 3), num_words), device=device).int(),
    )  # fmt: skip


def _case(vocab: int, rows: int, spread: float, *, gap: int = 0, filters: tuple = _FILTERS, levels: float = 0.0,
          most: int = 0):
    def make(device: str, dtype: torch.dtype) -> dict:
        chosen = [filters[row % len(filters)] for row in range(rows)]
        logits = torch.randn(rows, vocab + gap, device=device).mul_(spread)[:, :vocab]
        if levels:  # many ties
            logits = logits.div(levels).round().mul(levels)

        def column(place: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([each[place] for each in chosen], dtype=dtype, device=device)

        def numbers(dtype: torch.dtype = torch.int32) -> Tensor:
            high = torch.iinfo(dtype).max >> 8
            return torch.randint(0, high, (rows,), dtype=dtype, device=device)

        draws = Draws(column(0), column(1, torch.int32), column(2), column(3), numbers(torch.int64), numbers(),
                      numbers())  # fmt: skip
        changes = _changes(vocab, rows, device, most) if most else no_changes(rows, device)
        return {"logits": logits, "draws": draws, "changes": changes}

    return make


def _traffic(logits: Tensor, **_) -> tuple[int, int]:
    return logits.numel() * 4, 4 * logits.numel()


def _elements(function: str, constants: dict) -> int:
    return constants["MAXIMA"] if function == "_pick_kernel" else constants["BLOCK"]


_MODELS = (_FILTERS[2], (0.7, 0, 0.9, 0.0))
sample = kernel(
    "sample", reference=sampling.sample, triton=_sample_triton, why_not=_why_not, traffic=_traffic, elements=_elements,
    straight=("_scan_kernel", "_pick_kernel"), in_c=sampling.sample_in_c,
    cases=(
        Case("every filter", _case(5000, 9, 3.0), (torch.float32,)),
        Case("small vocabulary", _case(50, 9, 2.0), (torch.float32,)),
        Case("rows of a wider tensor", _case(3000, 9, 3.0, gap=72), (torch.float32,)),
        Case("nearly flat", _case(4100, 9, 0.1), (torch.float32,)),
        Case("many ties", _case(4100, 9, 3.0, levels=0.5), (torch.float32,)),
        Case("penalties, bias and masks", _case(5000, 12, 3.0, most=700), (torch.float32,)),
        Case("most of a small vocabulary changed", _case(97, 12, 2.0, most=97), (torch.float32,)),
        Case("greedy, many ties", _case(9000, 6, 2.0, levels=0.5, filters=_GREEDY, most=1200), (torch.float32,)),
        Case("128 rows of Qwen", _case(151936, 128, 3.0, filters=_MODELS, most=2000), (torch.float32,),
             production=True),
        Case("128 greedy rows of Qwen", _case(151936, 128, 3.0, filters=_GREEDY, most=2000), (torch.float32,),
             production=True),
    ),
)  # fmt: skip
