"""From logits to tokens: penalties, temperature, top-k / top-p / min-p, seeded draw, log-probabilities.

Everything is row-wise: what a row gets depends on its own logits and parameters only,
never on its neighbours in the batch. The draw is the inverse transform: the kept
tokens stand in id order on [0, total), and one uniform number per row points at one of
them. That number is Philox4x32-10 of (seed, choice, position), so there is no generator
state to save, swap or share.

Filters work by value: a token is kept when its logit reaches the threshold, so tokens
tied at the threshold are all kept and no order among equals is ever invented.

The kernels `draw.sample` and `logprobs.log_probabilities` compute the same on a GPU, cpu/sample.c and cpu/logprobs.c
where there are C kernels; this is their reference.
"""

import ctypes
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crane.kernels import native

_MASK32 = 0xFFFFFFFF
# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), table 2 and section 3.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# Rows that top-k leaves with at most this many tokens never look at the rest of the vocabulary again.
_NUM_CANDIDATES = 1024
_SUB_BLOCK = 64
_WHOLE_ELEMENTS = 1 << 19  # logits of rows that are drawn from whole, at a time: 2 MB
# Columns in which `best` looks for a maximum at a time.
_ARGMAX_BLOCK = 4096


def philox(key: Tensor, counter: Tensor) -> Tensor:
    """Philox4x32-10. key: int64 [rows] (64 bits); counter: int64 [rows, 4] (32 bits each) -> int64 [rows, 4]."""
    key0, key1 = key & _MASK32, (key >> 32) & _MASK32
    c0, c1, c2, c3 = counter.unbind(1)
    for _ in range(10):
        # the product's low 64 bits are exact in wrapping int64; `& mask` undoes the sign of the shift
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ key0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ key1,
            product0 & _MASK32,
        )
        key0, key1 = (key0 + _WEYL[0]) & _MASK32, (key1 + _WEYL[1]) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=1)


def uniforms(seeds: Tensor, choices: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) per row, float64 [rows], from int64 [rows] each: 53 bits of Philox."""
    zero = torch.zeros_like(positions)
    bits = philox(seeds, torch.stack((positions, choices, zero, zero), dim=1))
    return ((bits[:, 0] << 21) | (bits[:, 1] >> 11)).double() * 2.0**-53


@dataclass(frozen=True)
class Draws:
    """How each row's token is drawn, [rows] each.

    temperature, top_p, min_p: float32; top_k: int32. Temperature 0 is greedy (ties go to the lowest id), top_k 0 is
    off. top_p acts on what top_k kept, renormalised; min_p on the ratio to the best. seeds: int64, choices, positions:
    int32, what the row's number is made of.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    choices: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Changes:
    """What is done to logits before the draw: penalties, then bias, on listed places; and which ids are allowed.

    starts: int32 [rows + 1]: a row's places are starts[row] .. starts[row + 1]. ids: int32 [num_places], each once a
    row; -1 is no place. counts: float32 [num_places], how often the output has the id; 0: the prompt alone has it; -1:
    neither, no penalty. bias: float32 [num_places]. repetition, frequency, presence: float32 [rows]. Repetition penalty
    as in CTRL (Keskar et al. 2019): logits above 0 are divided by it, others multiplied; the other two as OpenAI
    documents them. mask_of: int32 [rows], the row's mask, -1 for none. masks: int32 [num_masks, num_words], a bit for
    each id, lowest first: 1 is allowed.
    """

    starts: Tensor
    ids: Tensor
    counts: Tensor
    bias: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    mask_of: Tensor
    masks: Tensor


def sample(logits: Tensor, draws: Draws, changes: Changes, keep: bool = True) -> Tensor:
    """Draw one token per row: int64 [rows].

    logits: float32 [rows, vocab], raw. keep: whether they have to be afterwards what they were.
    """
    if keep and len(changes.masks):
        logits, keep = logits.clone(), False
    for row, mask in enumerate(changes.mask_of.tolist() if len(changes.masks) else ()):
        if mask >= 0:
            _mask(logits[row], changes.masks[mask])
    if len(changes.ids):
        rows, listed = _rows_of(changes), changes.ids >= 0
        changed = _changed(logits[rows, changes.ids.long()], rows, changes)
        places = rows[listed], changes.ids[listed].long()
        before = logits[places]
        logits[places] = changed[listed]
    if bool((draws.temperature == 0).all()):
        drawn = best(logits)
    else:
        drawn = draw(logits, temperature=draws.temperature, top_k=draws.top_k, top_p=draws.top_p, min_p=draws.min_p,
                     uniform=uniforms(draws.seeds, draws.choices.long(), draws.positions.long()))  # fmt: skip
    if keep and len(changes.ids):
        logits[places] = before
    return drawn


def sample_in_c(logits: Tensor, draws: Draws, changes: Changes, keep: bool = True) -> Tensor:
    """`sample` by the C kernel, for rows of contiguous float32; logits are afterwards what they were in any case."""
    if not _is_plain(logits):
        return NotImplemented
    drawn = torch.empty(len(logits), dtype=torch.int64)
    places = [each.data_ptr() for each in (logits, *vars(draws).values())]
    changes = ctypes.byref(native.Changes().hold(changes))
    native.library().crane_sample(*places, changes, drawn.data_ptr(), *logits.shape, logits.stride(0))
    return drawn


def _is_plain(logits: Tensor) -> bool:
    return logits.dtype == torch.float32 and logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]


def _rows_of(changes: Changes) -> Tensor:
    """int64 [num_places]: whose place each is."""
    rows = torch.arange(len(changes.mask_of), device=changes.starts.device)
    return rows.repeat_interleave(changes.starts.diff(), output_size=len(changes.ids))


def count_drawn(changes: Changes, places: Tensor, drawn: Tensor) -> Changes:
    """The same with one more token in the output of some rows, which only the device knows yet.

    places: int32 [rows], -1 - its place in drawn; others are not below 0. drawn: int64 [num_draws]. Such a row has one
    place more, below 0, for the token if it is not listed yet.
    """
    rows = _rows_of(changes)
    tokens = torch.where(places < 0, drawn[(-1 - places).clamp(min=0)], -1)[rows]
    found = changes.ids == tokens
    known = torch.zeros(len(places), device=drawn.device).index_add(0, rows, found.float())[rows] > 0
    ids = torch.where(changes.ids < 0, torch.where(known, -1, tokens).int(), changes.ids)
    return replace(changes, ids=ids, counts=torch.where(found, changes.counts.clamp(min=0) + 1, changes.counts))


def _mask(logits: Tensor, words: Tensor) -> None:
    """Ban what the bits do not allow. logits: [vocab]; words: int32 [num_words]."""
    places = torch.arange(32, dtype=torch.int32, device=words.device)
    allowed = (words[:, None] >> places).bitwise_and_(1).bool().flatten()[: len(logits)]
    logits.masked_fill_(~allowed, -torch.inf)


def _changed(values: Tensor, rows: Tensor, changes: Changes) -> Tensor:
    """The logits at the listed places, [num_places], with penalties and bias. rows: int64 [num_places]."""
    repetition, frequency, presence = (
        each.index_select(0, rows) for each in (changes.repetition, changes.frequency, changes.presence)
    )
    penalised = torch.where(values > 0, values / repetition, values * repetition)
    penalised = penalised - frequency * changes.counts - presence * (changes.counts > 0)
    return torch.where(changes.counts < 0, values, penalised) + changes.bias


def draw(logits: Tensor, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
         uniform: Tensor) -> Tensor:
    """Draw one token per row from logits that are changed already: int64 [rows].

    logits: float32 [rows, vocab]; banned tokens are -inf. uniform: float64 [rows]. The others as in `Draws`.
    """
    limit = torch.where(top_k == 0, logits.shape[1], top_k.clamp(max=logits.shape[1]))
    greedy = temperature == 0
    whole = ~greedy & (limit == logits.shape[1]) & (top_p >= 1.0)
    drawn = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for mask, way in ((greedy, _draw_greedy), (whole, _draw_whole), (~greedy & ~whole, _draw_filtered)):
        if mask.all():  # the usual case, and a copy of all logits costs more than the draw
            return way(logits, temperature, limit, top_p, min_p, uniform)
        if mask.any():
            drawn[mask] = way(*(part[mask] for part in (logits, temperature, limit, top_p, min_p, uniform)))
    return drawn


def best(logits: Tensor) -> Tensor:
    """The column of each row's maximum, of equals the lowest: int64 [rows]. logits: float32 [rows, vocab].

    In two levels on a CPU: torch's argmax looks at one number at a time, amax at a vector of them.
    """
    rows, width = logits.shape
    if logits.device.type != "cpu" or width < _ARGMAX_BLOCK:
        return logits.argmax(-1)
    blocks = logits[:, : width - width % _ARGMAX_BLOCK].unflatten(1, (-1, _ARGMAX_BLOCK))
    maxima = blocks.amax(2)
    block = maxima.argmax(1)
    every = torch.arange(rows)
    found = block * _ARGMAX_BLOCK + blocks[every, block].argmax(1)
    if width % _ARGMAX_BLOCK == 0:
        return found
    rest, place = logits[:, blocks.shape[1] * _ARGMAX_BLOCK :].max(1)
    return torch.where(rest > maxima[every, block], place + blocks.shape[1] * _ARGMAX_BLOCK, found)


def _draw_greedy(logits: Tensor, *_) -> Tensor:
    return best(logits)


def _draw_whole(logits: Tensor, temperature: Tensor, limit: Tensor, top_p: Tensor, min_p: Tensor,
                uniform: Tensor) -> Tensor:
    """Rows without top-k and top-p: the whole vocabulary, less what min-p takes."""
    few = max(_WHOLE_ELEMENTS // logits.shape[1], 1)
    if len(logits) > few:  # a few rows at a time: what is made of them stays in a core's cache
        parts = zip(*(each.split(few) for each in (logits, temperature, limit, top_p, min_p, uniform)))
        return torch.cat([_draw_whole(*part) for part in parts])
    scaled = logits / temperature[:, None]
    if bool((min_p > 0).any()):
        floor = scaled.amax(-1, keepdim=True) + min_p[:, None].log()
        scaled.masked_fill_(scaled < floor, -torch.inf)
    return _inverse_transform(scaled, uniform)


def _draw_filtered(logits: Tensor, temperature: Tensor, limit: Tensor, top_p: Tensor, min_p: Tensor,
                   uniform: Tensor) -> Tensor:
    """Rows with top-k or top-p: a few candidates decide, unless the kept set turns out wider than them."""
    vocab = logits.shape[1]
    wanted = int(limit.max())
    width = min(vocab, wanted + 1 if wanted < _NUM_CANDIDATES else _NUM_CANDIDATES)
    values, ids = _largest(logits, width)
    values = values / temperature[:, None]
    threshold, known = _threshold(logits, temperature, values, limit, top_p, min_p)
    # A candidate list is complete when its last value falls short of the threshold (or it is the vocabulary).
    complete = known & ((values[:, -1] < threshold) | (width == vocab))
    ids, order = ids.sort(dim=1)
    values = values.gather(1, order)
    # an incomplete row keeps its best candidate here, so that it has something to draw; its draw follows
    kept = values.masked_fill(values < torch.minimum(threshold, values.amax(1))[:, None], -torch.inf)
    drawn = ids.gather(1, _inverse_transform(kept, uniform)[:, None])[:, 0]
    for row in (~complete).nonzero()[:, 0].tolist():
        one = slice(row, row + 1)
        scaled = logits[one] / temperature[one, None]
        ordered = scaled.sort(dim=1, descending=True).values
        threshold, _ = _threshold(logits[one], temperature[one], ordered, limit[one], top_p[one], min_p[one])
        drawn[one] = _inverse_transform(scaled.masked_fill(scaled < threshold[:, None], -torch.inf), uniform[one])
    return drawn


def _threshold(logits: Tensor, temperature: Tensor, values: Tensor, limit: Tensor, top_p: Tensor,
               min_p: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest scaled logit each row keeps, and whether `values` (its largest, descending) suffice to know it."""
    width, vocab = values.shape[1], logits.shape[1]
    best = values[:, 0]
    weights = (values - best[:, None]).exp().double()
    rank = torch.arange(width, device=values.device)
    weights = weights.masked_fill(rank >= limit[:, None], 0.0)
    sums = weights.cumsum(1)
    # top-p renormalises over what top-k kept; without top-k that is the whole vocabulary
    total = sums[:, -1].clone()
    whole = limit == vocab
    if width < vocab and bool(whole.any()):
        scaled = logits[whole] / temperature[whole, None]
        total[whole] = (scaled - best[whole, None]).exp().sum(1, dtype=torch.float64)
    # the smallest prefix that reaches the mass: tokens whose preceding mass is below it
    num_kept = (sums - weights < top_p[:, None].double() * total[:, None]).logical_and(rank < limit[:, None]).sum(1)
    num_kept = num_kept.clamp(min=1)
    # with width < limit < vocab the mass that top-k keeps is not known yet
    known = (limit <= width) | (whole & (num_kept < width)) | (width == vocab)
    threshold = values.gather(1, (num_kept - 1)[:, None])[:, 0]
    return torch.maximum(threshold, best + min_p.log()), known


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, descending, and their places.

    They can only lie in the `count` sub-blocks with the largest maxima, so most of a large vocabulary is
    read once and never sorted.
    """
    rows, vocab = values.shape
    whole = vocab - vocab % _SUB_BLOCK
    if count * _SUB_BLOCK * 2 > vocab:
        return values.topk(count, dim=1)
    blocks = values[:, :whole].view(rows, -1, _SUB_BLOCK)
    best = blocks.amax(2).topk(count, dim=1).indices  # [rows, count]
    places = (best[:, :, None] * _SUB_BLOCK + torch.arange(_SUB_BLOCK, device=values.device)).flatten(1)
    tail = torch.arange(whole, vocab, device=values.device).expand(rows, -1)
    places = torch.cat((places, tail), dim=1)
    found = values.gather(1, places).topk(count, dim=1)
    return found.values, places.gather(1, found.indices)


def _inverse_transform(logits: Tensor, uniform: Tensor) -> Tensor:
    """The column where each row's cumulated probability first exceeds `uniform` times its total.

    Two levels, 1,024 columns each, so that a whole vocabulary is not cumulated number by number.
    """
    rows, width = logits.shape
    weights = (logits - logits.amax(1, keepdim=True)).exp_()
    size = min(1024, width)
    weights = torch.nn.functional.pad(weights, (0, -width % size)).view(rows, -1, size)
    chunks = weights.sum(2, dtype=torch.float64).cumsum(1)  # [rows, num_chunks]
    target = (uniform * chunks[:, -1])[:, None]
    chunk = (chunks <= target).sum(1, keepdim=True).clamp(max=chunks.shape[1] - 1)
    before = torch.where(chunk > 0, chunks.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    inside = weights.gather(1, chunk[:, :, None].expand(-1, -1, size))[:, 0].double().cumsum(1)  # [rows, size]
    # rounding may leave the target just past the chunk's own sum: the last token with weight takes it
    inside_target = torch.minimum(target - before, inside[:, -1:].nextafter(torch.zeros_like(target)))
    return chunk[:, 0] * size + (inside <= inside_target).sum(1)


def log_probabilities(logits: Tensor, rows: Tensor, tokens: Tensor, listed: Tensor,
                      num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax, in some rows, at the row's token, at the ids listed and at the `num_top` best.

    logits: float32 [num_rows, vocab], raw. rows: int32 [count], ascending. tokens: int64 [num_rows], one for each of
    the logits' rows. listed: int32 [count, num_listed]. Returns float32 [count, 1 + num_listed], int64 [count, num_top]
    ids, best first, and float32 [count, num_top].
    """
    places = torch.cat((tokens[rows, None], listed.long()), dim=1)
    if len(rows) < len(logits):
        logits = logits[rows]
    norm = logits.logsumexp(1, keepdim=True)
    best = logits.topk(num_top, dim=1)
    return logits.gather(1, places) - norm, best.indices, best.values - norm


def log_probabilities_in_c(logits: Tensor, rows: Tensor, tokens: Tensor, listed: Tensor,
                           num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """`log_probabilities` by the C kernel, for rows of contiguous float32. Of equals the lowest id comes first."""
    if not _is_plain(logits):
        return NotImplemented
    sizes = *listed.shape, num_top
    picked, top = torch.empty(len(rows), 1 + sizes[1]), torch.empty(len(rows), num_top)
    ids = torch.empty(len(rows), num_top, dtype=torch.int64)
    places = [each.data_ptr() for each in (logits, rows, tokens, listed, picked, ids, top)]
    native.library().crane_log_probabilities(*places, *sizes, logits.shape[1], logits.stride(0))
    return picked, ids, top
