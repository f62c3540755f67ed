"""Computes a batch: rows -> tensors -> model -> logits of the rows that want them -> picked tokens."""

import itertools
import time
import weakref

import numpy as np
import torch
from torch import Tensor

from crane.models.context import ForwardContext
from crane.runtime.batch import Batch, Picked, Row
from crane.runtime.grammar import Constraint
from crane.runtime.graphs import DecodeGraphs
from crane.runtime.sampler import Sampler
from crane.runtime.sequence import Sequence
from crane.runtime.types import TokenLogprob

# A mask that is not ready so long after the logits costs its sequence this step.
_MASK_PATIENCE_S = 0.005
# Prompt log-probabilities need whole rows of logits: so many positions at a time.
_LOGIT_CHUNK = 64
# Deterministic sequences decode so many at a time, no more and no less.
_FIXED_ROWS = 8


class ModelRunner:
    """One model, its KV pages and a sampler.

    kv: [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim]. vocab_size: ids that may be drawn.
    graphs: compute the steps that they can take.
    """

    def __init__(self, model, kv: Tensor, vocab_size: int, graphs: DecodeGraphs | None = None):
        self.model = model
        self.graphs = graphs
        self.kv = kv
        self.page_size = kv.shape[3]
        self.device = kv.device
        self.sampler = Sampler(vocab_size, kv.device)
        # of sequences whose mean is wanted: the sums of their first hidden states, by how many these are
        self._sums: weakref.WeakKeyDictionary[Sequence, dict[int, Tensor]] = weakref.WeakKeyDictionary()

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Picked]:
        """One step: writes K/V of all rows into their pages, draws a token for each row that samples."""
        found: dict[int, Picked] = {}
        for rows, fixed in _parts(batch.rows):
            found.update(zip(map(id, rows), self._run(rows, fixed), strict=True))
        return [found[id(row)] for row in batch.rows]

    def _run(self, rows: list[Row], fixed: bool) -> list[Picked]:
        """One forward pass. fixed: rows of deterministic sequences; several are filled up to `_FIXED_ROWS` by
        computing the last again, so that no product's shape depends on who is there."""
        filled = rows + rows[-1:] * (_FIXED_ROWS - len(rows)) if fixed and rows[0].count == 1 else rows
        constrained = _start_masks(rows)  # computed on other threads meanwhile
        *starts, _ = 0, *itertools.accumulate(row.count for row in filled)
        step = self.graphs.step_for(rows) if self.graphs is not None and not fixed else None
        hidden = self._hidden(filled, starts) if step is None else step.run(rows)  # [num_tokens, hidden]
        picked = [Picked() for _ in rows]
        for row, found, first in zip(rows, picked, starts):
            if row.sequence.pooling:
                found.embedding = self._pool(row, hidden[first : first + row.count])
            if row.prompt_logits:
                found.prompt_logprobs = self._prompt_logprobs(row, hidden[first : first + row.count])
        ends = [start + row.count for row, start in zip(filled, starts)]
        (self._draw_fixed if fixed else self._draw)(rows, ends, hidden, constrained, picked)
        return picked

    def _hidden(self, rows: list[Row], query_starts: list[int]) -> Tensor:
        """The model's hidden states of all tokens of these rows: [num_tokens, hidden]."""
        token_ids = []
        for row in rows:
            token_ids += row.sequence.token_ids[row.start : row.start + row.count]
            token_ids += row.drafts
        return self.model(self._ints(token_ids), self._context(rows, query_starts))

    def _draw_fixed(self, rows: list[Row], ends: list[int], hidden: Tensor, constrained: dict[int, Constraint],
                    picked: list[Picked]) -> None:
        """`_draw` of deterministic rows, which have no drafts: the logits of all together, the draws one by one."""
        if not any(row.samples for row in rows):
            return
        logits = self.model.logits(hidden[self._ints([end - 1 for end in ends])])
        masks = _take_masks(constrained)
        for i, row in enumerate(rows):
            if row.samples and masks.get(i, 0) is not None:
                mask = {0: masks[i]} if i in masks else {}
                drawn, logprobs = self.sampler.pick(logits[i : i + 1], [row.sequence], mask, [()])
                picked[i].token_id, picked[i].logprob = drawn[0], logprobs[0]

    def _draw(self, rows: list[Row], ends: list[int], hidden: Tensor, constrained: dict[int, Constraint],
              picked: list[Picked]) -> None:
        """The next token of each row that samples, and one behind each of its drafts, into `picked`.

        hidden: [num_tokens, hidden]. ends: where each row's tokens end in it.
        """
        # (row, how many of its drafts come before)
        sampling = [(i, ahead) for i, row in enumerate(rows) if row.samples for ahead in range(len(row.drafts) + 1)]
        if not sampling:
            return
        first = [end - len(row.drafts) - 1 for end, row in zip(ends, rows)]
        logits = self.model.logits(hidden[self._ints([first[i] + ahead for i, ahead in sampling])])
        masks = _take_masks(constrained)
        late = [masks.get(i, 0) is None for i, _ in sampling]
        if any(late):
            logits = logits[[place for place, is_late in enumerate(late) if not is_late]]
            sampling = [one for one, is_late in zip(sampling, late, strict=True) if not is_late]
        places = {place: masks[i] for place, (i, _) in enumerate(sampling) if i in masks}
        ahead = [rows[i].drafts[:ahead] for i, ahead in sampling]
        drawn, logprobs = self.sampler.pick(logits, [rows[i].sequence for i, _ in sampling], places, ahead)
        for (i, ahead), token_id, logprob in zip(sampling, drawn, logprobs, strict=True):
            if ahead:
                picked[i].after_drafts.append((token_id, logprob))
            else:
                picked[i].token_id, picked[i].logprob = token_id, logprob

    def free_memory(self) -> None:
        """Give back what torch keeps of the device's memory without using it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _context(self, rows: list[Row], query_starts: list[int]) -> ForwardContext:
        positions, slots = [], []
        for row in rows:
            pages, size = row.sequence.pages, self.page_size
            span = range(row.start, row.start + row.count)
            positions += span
            slots += [pages[p // size] * size + p % size for p in span]
        ends = [row.start + row.count for row in rows]
        width = max(-(-end // self.page_size) for end in ends)
        table = [row.sequence.pages[:width] for row in rows]
        return ForwardContext(
            positions=self._ints(positions),
            slots=self._ints(slots),
            query_lens=[row.count for row in rows],
            query_starts=query_starts,
            context_lens=ends,
            page_table=self._ints([pages + [0] * (width - len(pages)) for pages in table]),
            kv=self.kv,
            page_size=self.page_size,
        )

    def _pool(self, row: Row, hidden: Tensor) -> list[float] | None:
        """The sequence's last hidden state, or the mean of all, once the row completes it.

        hidden: [row.count, hidden].
        """
        sequence = row.sequence
        complete = row.count == sequence.num_wanted
        if sequence.pooling == "last":
            return hidden[-1].float().tolist() if complete else None
        total = hidden.float().sum(0)
        before = self._sums[sequence][row.start] if row.start else torch.zeros_like(total)
        total += before
        self._sums[sequence] = {row.start: before, row.start + row.count: total}  # the step may be computed again
        return (total / sequence.num_prompt).tolist() if complete else None

    def _prompt_logprobs(self, row: Row, hidden: Tensor) -> list[TokenLogprob]:
        """Log-probabilities of the prompt tokens that follow the row's positions. hidden: [row.count, hidden]."""
        sequence = row.sequence
        following = sequence.token_ids[row.start + 1 : min(row.start + row.count + 1, sequence.num_prompt)]
        found = []
        for start in range(0, len(following), _LOGIT_CHUNK):
            chosen = following[start : start + _LOGIT_CHUNK]
            logits = self.model.logits(hidden[start : start + len(chosen)])
            found += self.sampler.prompt_logprobs(logits, chosen, sequence)
        return found

    def _ints(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _parts(rows: list[Row]) -> list[tuple[list[Row], bool]]:
    """What is computed together, and whether in a fixed shape: all rows but those of deterministic sequences; of
    these single tokens, so many at a time; each longer row by itself."""
    fixed = [row for row in rows if row.sequence.deterministic]
    if not fixed:
        return [(rows, False)]
    single = [row for row in fixed if row.count == 1]
    parts = [([row for row in rows if not row.sequence.deterministic], False)]
    parts += [(single[start : start + _FIXED_ROWS], True) for start in range(0, len(single), _FIXED_ROWS)]
    parts += [([row], True) for row in fixed if row.count > 1]
    return [part for part in parts if part[0]]


def _start_masks(rows: list[Row]) -> dict[int, Constraint]:
    """Constraints that apply to the tokens to be drawn, by row; their masks are on their way."""
    found = {i: row.sequence.constraint for i, row in enumerate(rows) if row.samples and row.sequence.constraint}
    found = {i: constraint for i, constraint in found.items() if constraint.applies}
    for constraint in found.values():
        constraint.start()
    return found


def _take_masks(constrained: dict[int, Constraint]) -> dict[int, np.ndarray | None]:
    """The masks by row; None for those that are late."""
    until_s = time.monotonic() + _MASK_PATIENCE_S
    return {i: constraint.allowed(max(until_s - time.monotonic(), 0)) for i, constraint in constrained.items()}
