"""The draw of `sampling.sample` in three launches, no sort and no word to the host; and its uniform numbers.

Filters keep what reaches a threshold by value, so no order is needed, only the threshold: the largest value with
at least k tokens at or above it (top-k), the smallest with less than the mass p above it (top-p). Floats become
integers of the same order, and halving finds the threshold exactly. `_scan_kernel` reads the logits once and leaves
the maximum of every 64 tokens. `_pick_kernel` looks only into the `_BLOCKS` sub-blocks of largest maxima: everything
above the largest maximum left out lies there. Rows whose threshold turns out lower go through `_wide_kernel`, which
halves over the whole row; it leaves at once where there is nothing to do.
"""

import torch
from torch import Tensor

from crane.kernels import sampling
from crane.kernels.lang import jit, next_power_of_2, tl
from crane.kernels.registry import Case, kernel

_SUB = 64
# Sub-blocks that `_pick_kernel` looks into.
_BLOCKS = 64
_CHUNK = 4096
# Below every key, also that of -inf.
_NOTHING = tl.constexpr(-(2**31))


@jit
def _key(x):
    """float32 -> int32 of the same order; both zeros are one number, NaN counts as -inf."""
    x = tl.where(x == x, tl.where(x == 0.0, 0.0, x), -float("inf"))
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _from_key(key):
    """The float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _load_scaled(logits_ptr, at, inside, temperature):
    """Logits over temperature; temperature 0, greedy, leaves them as they are. -inf outside."""
    x = tl.load(logits_ptr + at, mask=inside, other=-float("inf"))
    x = tl.where(x == x, x, -float("inf"))
    return tl.div_rn(x, tl.where(temperature == 0.0, 1.0, temperature) + tl.zeros_like(x))


@jit
def _scan_kernel(logits_ptr, temperature_ptr, maxima_ptr, tops_ptr, sums_ptr, vocab, stride, num_maxima,
                 SUB: tl.constexpr, BLOCK: tl.constexpr):
    """maxima: float32 [rows, num_maxima], of every SUB tokens. tops, sums: [rows, chunks], the largest scaled logit
    and the sum of exp(scaled - top)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * stride + ids, mask=ids < vocab, other=-float("inf"))
    x = tl.where(x == x, x, -float("inf"))
    temperature = tl.load(temperature_ptr + row)
    temperature = tl.where(temperature == 0.0, 1.0, temperature)
    # division keeps the order, so only maxima need it
    subs = chunk * (BLOCK // SUB) + tl.arange(0, BLOCK // SUB)
    maxima = tl.max(tl.reshape(x, (BLOCK // SUB, SUB)), 1)
    tl.store(maxima_ptr + row * num_maxima + subs, tl.div_rn(maxima, temperature + tl.zeros_like(maxima)),
             mask=subs < num_maxima)
    top = tl.max(maxima, 0)
    at = row * tl.num_programs(1) + chunk
    tl.store(tops_ptr + at, tl.div_rn(top, temperature))
    top = tl.where(top == -float("inf"), 0.0, top)
    tl.store(sums_ptr + at, tl.sum(tl.exp((x - top) * (1.0 / temperature)), 0))


@jit
def _limits(top_k_ptr, top_p_ptr, floor_ptr, temperature_ptr, uniform_ptr, row, vocab):
    """(tokens top-k keeps, top-p, log of min-p, whether greedy, uniform number) of a row."""
    k = tl.load(top_k_ptr + row)
    greedy = tl.load(temperature_ptr + row) == 0.0
    limit = tl.where((k == 0) | (k > vocab), vocab, k)
    uniform = tl.where(greedy, 0.0, tl.load(uniform_ptr + row))
    return limit, tl.load(top_p_ptr + row), tl.load(floor_ptr + row), greedy, uniform


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
    low, cut = best_key.to(tl.int64) * 0 + _NOTHING, best_key.to(tl.int64) + 1
    for _ in range(33):
        middle = (low + cut) >> 1
        few = tl.sum((keys >= middle).to(tl.int32), 0) <= most
        cut = tl.where(few & (middle > low), middle, cut)
        low = tl.where(few, low, middle)
    return cut


@jit
def _reached(keys, best_key, limit):
    """Top-k: the largest key that at least `limit` of the keys reach."""
    least, high = best_key.to(tl.int64) * 0 + _NOTHING, best_key.to(tl.int64) + 1
    for _ in range(33):
        middle = (least + high) >> 1
        enough = tl.sum((keys >= middle).to(tl.int32), 0) >= limit
        least = tl.where(enough, middle, least)
        high = tl.where(enough, high, middle)
    return least


@jit
def _lightest(keys, weights, best_key, mass):
    """Top-p: the smallest key above which lies less than `mass`."""
    low, threshold = best_key.to(tl.int64) * 0 + _NOTHING, best_key.to(tl.int64)
    for _ in range(33):
        middle = (low + threshold) >> 1
        less = tl.sum(tl.where(keys > middle, weights, 0.0), 0) < mass
        threshold = tl.where(less & (middle > low), middle, threshold)
        low = tl.where(less, low, middle)
    return threshold


@jit
def _pick_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, floor_ptr, uniform_ptr, maxima_ptr, tops_ptr, sums_ptr,
    picked_ptr, wide_ptr, out_ptr, vocab, stride, num_maxima, num_chunks,
    SUB: tl.constexpr, BLOCKS: tl.constexpr, MAXIMA: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One row a program. picked: int32 [rows, BLOCKS], scratch; wide: int32 [rows], where `_wide_kernel` draws."""
    row = tl.program_id(0).to(tl.int64)
    limit, top_p, floor, greedy, uniform = _limits(
        top_k_ptr, top_p_ptr, floor_ptr, temperature_ptr, uniform_ptr, row, vocab)
    sub = tl.arange(0, MAXIMA)
    maxima = tl.load(maxima_ptr + row * num_maxima + sub, mask=sub < num_maxima, other=-float("inf"))
    maxima = tl.where(sub < num_maxima, _key(maxima), _NOTHING)
    best_key = tl.max(maxima, 0)
    best = _from_key(best_key)
    chosen = maxima >= _cut(maxima, best_key, BLOCKS)
    left_out = tl.max(tl.where(chosen, _NOTHING, maxima), 0)
    count = tl.sum(chosen.to(tl.int32), 0)
    tl.store(picked_ptr + row * BLOCKS + tl.cumsum(chosen.to(tl.int32), 0) - 1, sub, mask=chosen)
    tl.debug_barrier()
    # candidates, in the order of their ids
    j = tl.arange(0, BLOCKS * SUB)
    inside = j // SUB < count
    ids = tl.load(picked_ptr + row * BLOCKS + j // SUB, mask=inside, other=0) * SUB + j % SUB
    inside = inside & (ids < vocab)
    scaled = _load_scaled(logits_ptr + row * stride, ids, inside, tl.load(temperature_ptr + row))
    keys = tl.where(inside, _key(scaled), _NOTHING)
    weights = tl.where(scaled > -float("inf"), tl.exp(scaled - best), 0.0).to(tl.float64)
    least = tl.where(limit < vocab, _reached(keys, best_key, limit), _NOTHING).to(tl.int32)
    # the mass of exactly `limit` tokens, of those tied at the end only as many as fit
    above = keys > least
    tied = (limit - tl.sum(above.to(tl.int32), 0)).to(tl.float64) * tl.exp(_from_key(least) - best).to(tl.float64)
    total = tl.sum(tl.where(above, weights, 0.0), 0) + tied
    if limit == vocab:
        total = _total(tops_ptr, sums_ptr, row, best, num_chunks, CHUNKS)
    threshold = _lightest(keys, weights, best_key, top_p.to(tl.float64) * total)
    threshold = tl.where(top_p < 1.0, threshold, _NOTHING).to(tl.int32)
    threshold = tl.maximum(tl.maximum(threshold, least), _key(best + floor))
    threshold = tl.where(greedy, best_key, threshold)
    # with nothing left out, the candidates are the row
    tl.store(wide_ptr + row, ((threshold <= left_out) & (left_out > _NOTHING)).to(tl.int32))
    sums = tl.cumsum(tl.where(keys >= threshold, weights, 0.0), 0)
    place = tl.sum((sums <= uniform * tl.max(sums, 0)).to(tl.int32), 0)
    tl.store(out_ptr + row, tl.sum(tl.where(j == place, ids, 0), 0).to(tl.int64))


@jit
def _above(logits_ptr, key, best, temperature, vocab, BLOCK: tl.constexpr):
    """(tokens with a key above `key`, their mass relative to the best's) in a whole row."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        scaled = _load_scaled(logits_ptr, ids, ids < vocab, temperature)
        above = (ids < vocab) & (_key(scaled) > key)
        count += above.to(tl.int32)
        mass += tl.where(above, tl.exp(scaled - best), 0.0).to(tl.float64)
    return tl.sum(count, 0), tl.sum(mass, 0)


@jit
def _kept(logits_ptr, start, threshold, best, temperature, vocab, BLOCK: tl.constexpr):
    """float64 [BLOCK]: exp(scaled - best) of the tokens kept among those from `start` on."""
    ids = start + tl.arange(0, BLOCK)
    scaled = _load_scaled(logits_ptr, ids, ids < vocab, temperature)
    kept = (ids < vocab) & (_key(scaled) >= threshold) & (scaled > -float("inf"))
    return tl.where(kept, tl.exp(scaled - best), 0.0).to(tl.float64)


@jit
def _wide_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, floor_ptr, uniform_ptr, tops_ptr, sums_ptr, wide_ptr, out_ptr,
    vocab, stride, num_chunks, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The same over the whole row, where `wide` says so."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(wide_ptr + row) == 0:
        return
    limit, top_p, floor, greedy, uniform = _limits(
        top_k_ptr, top_p_ptr, floor_ptr, temperature_ptr, uniform_ptr, row, vocab)
    temperature = tl.load(temperature_ptr + row)
    logits_ptr += row * stride
    chunk = tl.arange(0, CHUNKS)
    best = tl.max(tl.load(tops_ptr + row * num_chunks + chunk, mask=chunk < num_chunks, other=-float("inf")), 0)
    best_key = _key(best)
    least = best_key.to(tl.int64) * 0 + _NOTHING
    total = _total(tops_ptr, sums_ptr, row, best, num_chunks, CHUNKS)
    if (limit < vocab) & (greedy == 0):
        high = best_key.to(tl.int64) + 1
        for _ in range(33):
            middle = (least + high) >> 1
            count, mass = _above(logits_ptr, middle - 1, best, temperature, vocab, BLOCK)
            least = tl.where(count >= limit, middle, least)
            high = tl.where(count >= limit, high, middle)
        count, mass = _above(logits_ptr, least, best, temperature, vocab, BLOCK)
        total = mass + (limit - count).to(tl.float64) * tl.exp(_from_key(least.to(tl.int32)) - best).to(tl.float64)
    threshold = best_key.to(tl.int64) * 0 + _NOTHING
    if (top_p < 1.0) & (greedy == 0):
        low, threshold = threshold, best_key.to(tl.int64)
        for _ in range(33):
            middle = (low + threshold) >> 1
            count, mass = _above(logits_ptr, middle, best, temperature, vocab, BLOCK)
            less = mass < top_p.to(tl.float64) * total
            threshold = tl.where(less & (middle > low), middle, threshold)
            low = tl.where(less, low, middle)
    threshold = tl.maximum(tl.maximum(threshold, least).to(tl.int32), _key(best + floor))
    threshold = tl.where(greedy, best_key, threshold)
    total = uniform * 0.0
    for start in range(0, vocab, BLOCK):
        total += tl.sum(_kept(logits_ptr, start, threshold, best, temperature, vocab, BLOCK), 0)
    target = uniform * total
    # the chunk that the target falls into; sums are taken in the same order, so the last one reaches the total
    before, base, found = total * 0.0, total * 0.0, vocab * 0 - 1
    for start in range(0, vocab, BLOCK):
        after = before + tl.sum(_kept(logits_ptr, start, threshold, best, temperature, vocab, BLOCK), 0)
        here = (found < 0) & (after > target)
        base = tl.where(here, before, base)
        found = tl.where(here, start, found)
        before = after
    found = tl.maximum(found, 0)
    j = tl.arange(0, BLOCK)
    kept = _kept(logits_ptr, found, threshold, best, temperature, vocab, BLOCK)
    place = tl.sum((base + tl.cumsum(kept, 0) <= target).to(tl.int32), 0)
    last = tl.max(tl.where(kept > 0.0, j, 0), 0)  # rounding may leave the target just past the chunk's own sum
    tl.store(out_ptr + row, (found + tl.minimum(place, last)).to(tl.int64))


def _sample_triton(logits: Tensor, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
                   uniform: Tensor) -> Tensor:
    rows, vocab = logits.shape
    num_maxima, num_chunks = -(-vocab // _SUB), -(-vocab // _CHUNK)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    maxima, tops, sums = scratch(rows, num_maxima), scratch(rows, num_chunks), scratch(rows, num_chunks)
    picked, wide = scratch(rows, _BLOCKS, dtype=torch.int32), scratch(rows, dtype=torch.int32)
    out = scratch(rows, dtype=torch.int64)
    limits = (temperature, top_k, top_p, min_p.log(), uniform)
    chunks = next_power_of_2(num_chunks)
    _scan_kernel[(rows, num_chunks)](
        logits, temperature, maxima, tops, sums, vocab, logits.stride(0), num_maxima, SUB=_SUB, BLOCK=_CHUNK,
        num_warps=4,
    )  # fmt: skip
    _pick_kernel[(rows,)](
        logits, *limits, maxima, tops, sums, picked, wide, out, vocab, logits.stride(0), num_maxima, num_chunks,
        SUB=_SUB, BLOCKS=_BLOCKS, MAXIMA=max(next_power_of_2(num_maxima), 2 * _BLOCKS), CHUNKS=chunks, num_warps=16,
    )  # fmt: skip
    _wide_kernel[(rows,)](
        logits, *limits, tops, sums, wide, out, vocab, logits.stride(0), num_chunks,
        BLOCK=_CHUNK, CHUNKS=chunks, num_warps=8,
    )  # fmt: skip
    return out


def _why_not(logits: Tensor, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
             uniform: Tensor) -> str | None:
    if logits.dtype != torch.float32:
        return f"logits are {logits.dtype}, not float32"
    if logits.stride(1) != 1 or len(logits) == 0:
        return "logits are not rows of contiguous numbers"
    return None


_FILTERS = (  # temperature, top_k, top_p, min_p
    (1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (0.7, 20, 0.95, 0.0), (1.0, 1, 1.0, 0.0), (1.3, 0, 0.9, 0.0),
    (1.0, 0, 0.5, 0.1), (0.3, 300, 1.0, 0.0), (5.0, 0, 0.999, 0.0), (1.0, 40, 0.01, 0.0),
)  # fmt: skip


def _case(vocab: int, rows: int, spread: float, *, gap: int = 0, filters: tuple = _FILTERS, levels: float = 0.0):
    def make(device: str, dtype: torch.dtype) -> dict:
        chosen = [filters[row % len(filters)] for row in range(rows)]
        logits = torch.randn(rows, vocab + gap, device=device).mul_(spread)[:, :vocab]
        if levels:  # many ties
            logits = logits.div(levels).round().mul(levels)

        def column(place: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([each[place] for each in chosen], dtype=dtype, device=device)

        return {
            "logits": logits, "temperature": column(0), "top_k": column(1, torch.int64), "top_p": column(2),
            "min_p": column(3), "uniform": torch.rand(rows, dtype=torch.float64, device=device),
        }  # fmt: skip

    return make


def _traffic(logits: Tensor, **_) -> tuple[int, int]:
    return logits.numel() * 4, 4 * logits.numel()


def _elements(function: str, constants: dict) -> int:
    return constants["MAXIMA"] if function == "_pick_kernel" else constants["BLOCK"]


_MODELS = (_FILTERS[2], (0.7, 0, 0.9, 0.0))
sample = kernel(
    "sample", reference=sampling.sample, triton=_sample_triton, why_not=_why_not, traffic=_traffic, elements=_elements,
    cases=(
        Case("every filter", _case(5000, 9, 3.0), (torch.float32,)),
        Case("small vocabulary", _case(50, 9, 2.0), (torch.float32,)),
        Case("rows of a wider tensor", _case(3000, 9, 3.0, gap=72), (torch.float32,)),
        Case("nearly flat", _case(4100, 9, 0.1), (torch.float32,)),
        Case("many ties", _case(4100, 9, 3.0, levels=0.5), (torch.float32,)),
        Case("128 rows of Qwen", _case(151936, 128, 3.0, filters=_MODELS), (torch.float32,), production=True),
    ),
)  # fmt: skip


@jit
def _uniforms_kernel(seeds_ptr, choices_ptr, positions_ptr, out_ptr, num_rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    seed = tl.load(seeds_ptr + row, mask=inside, other=0)
    position = tl.load(positions_ptr + row, mask=inside, other=0).to(tl.uint32)
    choice = tl.load(choices_ptr + row, mask=inside, other=0).to(tl.uint32)
    zero = tl.zeros_like(position)
    first, second, _, _ = tl.philox(seed, position, choice, zero, zero)
    bits = (first.to(tl.int64) << 21) | (second >> 11).to(tl.int64)
    tl.store(out_ptr + row, bits.to(tl.float64) * (1.0 / 9007199254740992.0), mask=inside)


def _uniforms_triton(seeds: Tensor, choices: Tensor, positions: Tensor) -> Tensor:
    out = torch.empty(len(seeds), dtype=torch.float64, device=seeds.device)
    block = 128
    _uniforms_kernel[(-(-len(seeds) // block),)](seeds, choices, positions, out, len(seeds), BLOCK=block, num_warps=4)
    return out


def _uniforms_why_not(seeds: Tensor, choices: Tensor, positions: Tensor) -> str | None:
    plain = all(each.is_contiguous() and each.dtype == torch.int64 for each in (seeds, choices, positions))
    return None if plain and len(seeds) else "seeds, choices and positions are not plain int64 lists"


def _uniforms_case(rows: int):
    def make(device: str, dtype: torch.dtype) -> dict:
        return {
            "seeds": torch.randint(-(2**63), 2**63 - 1, (rows,), device=device),
            "choices": torch.randint(0, 1 << 20, (rows,), device=device),
            "positions": torch.randint(0, 1 << 20, (rows,), device=device),
        }

    return make


uniforms = kernel(
    "uniforms", reference=sampling.uniforms, triton=_uniforms_triton, why_not=_uniforms_why_not,
    tolerances={torch.float64: 0.0},
    cases=(
        Case("one row", _uniforms_case(1), (torch.float64,)),
        Case("more than a block", _uniforms_case(300), (torch.float64,)),
        Case("a batch", _uniforms_case(128), (torch.float64,), production=True),
    ),
)  # fmt: skip
