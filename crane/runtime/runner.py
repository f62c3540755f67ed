"""Computes a batch: rows -> tensors -> model -> logits of the rows that want them -> picked tokens."""

import itertools
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from crane.kernels import native
from crane.kernels.transfer import download, fill_in, upload
from crane.models.context import ForwardContext
from crane.runtime.batch import Batch, Picked, Row
from crane.runtime.grammar import Constraint
from crane.runtime.graphs import DecodeGraphs
from crane.runtime.recorded import RecordedSteps
from crane.runtime.sampler import Sampler, pack
from crane.runtime.sequence import Sequence

# A mask that is not ready so long after the logits costs its sequence this step.
_MASK_PATIENCE_S = 0.005
# Prompt log-probabilities need whole rows of logits: so many positions at a time.
_LOGIT_CHUNK = 64
# Sums of hidden states that are kept: two launched steps may be computed again.
_NUM_SUMS = 3
# Deterministic sequences decode so many at a time, no more and no less.
_FIXED_ROWS = 8


@dataclass(slots=True)
class Launched:
    """A step that the device computes, or has computed.

    picked: what will be known of each row. reads: turn what arrived in host memory into numbers there.
    done: passed when everything has arrived; None where nothing has to be waited for.
    draws: int64 [num_draws] each, the drawn tokens on the device; places: where each sequence's is in all of them.
    before: while it is being launched, the step launched last.
    """

    picked: list[Picked]
    reads: list[Callable[[], None]] = field(default_factory=list)
    done: torch.cuda.Event | None = None
    draws: list[Tensor] = field(default_factory=list)
    places: dict[Sequence, int] = field(default_factory=dict)
    before: "Launched | None" = None

    def drew(self, token_ids: Tensor, sequences: list[Sequence]) -> None:
        """One more draw for each of these."""
        first = sum(map(len, self.draws))
        self.draws.append(token_ids)
        self.places.update(zip(sequences, range(first, first + len(sequences))))

    @property
    def drawn(self) -> Tensor:
        """int64 [num_draws]."""
        return self.draws[0] if len(self.draws) == 1 else torch.cat(self.draws)


class ModelRunner:
    """One model, its KV pages and a sampler.

    kv: [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim]. graphs: compute the steps that they can take.
    """

    def __init__(self, model, kv: Tensor, sampler: Sampler, graphs: DecodeGraphs | RecordedSteps | None = None):
        self.model = model
        self.graphs = graphs
        self.kv = kv
        self.page_size = kv.shape[3]
        self.device = kv.device
        self.sampler = sampler
        # of sequences whose mean is wanted: the sums of their first hidden states, by how many these are, the last few
        self._sums: weakref.WeakKeyDictionary[Sequence, dict[int, Tensor]] = weakref.WeakKeyDictionary()

    def run(self, batch: Batch) -> list[Picked]:
        """One step: writes K/V of all rows into their pages, draws a token for each row that samples."""
        return self.collect(self.launch(batch))

    @torch.inference_mode()
    def launch(self, batch: Batch, before: Launched | None = None) -> Launched:
        """Give the device a step to compute. The host waits for masks at most, never for the device.

        before: the step launched last, from whose draws rows go on that nobody has read yet.
        """
        found = {id(row): Picked() for row in batch.rows}
        step = Launched(list(found.values()), before=before or Launched([]))
        for rows, fixed in _parts(batch.rows):
            self._launch(rows, fixed, [found[id(row)] for row in rows], step)
        step.before = None
        if self.device.type == "cuda":
            step.done = torch.cuda.Event()
            step.done.record()
        return step

    def collect(self, step: Launched) -> list[Picked]:
        """What a launched step gave, one entry a row, when the device has computed it."""
        if step.done is not None:
            step.done.synchronize()
        for read in step.reads:
            read()
        return step.picked

    def _launch(self, rows: list[Row], fixed: bool, picked: list[Picked], launched: Launched) -> None:
        """One forward pass. fixed: rows of deterministic sequences; several are filled up to `_FIXED_ROWS` by
        computing the last again, so that no product's shape depends on who is there."""
        filled = rows + rows[-1:] * (_FIXED_ROWS - len(rows)) if fixed and rows[0].count == 1 else rows
        constrained = _start_masks(rows)  # computed on other threads meanwhile
        *starts, _ = 0, *itertools.accumulate(row.count for row in filled)
        step = self.graphs.step_for(rows) if self.graphs is not None and not fixed else None
        before = launched.before
        if step is None:
            hidden, logits = self._hidden(filled, starts, before, fixed), None  # [num_tokens, hidden]
        else:
            hidden, logits = step.run(rows, before.places, before.drawn if before.draws else None)
        if logits is not None and logits.dtype == torch.int64:  # the tokens themselves
            launched.drew(logits.clone(), [row.sequence for row in rows])
            for found, token_id in zip(picked, logits.tolist(), strict=True):
                found.token_id = token_id
            return
        for row, found, first in zip(rows, picked, starts):
            if row.sequence.pooling:
                self._pool(row, hidden[first : first + row.count], found, launched)
            if row.prompt_logits:
                self._prompt_logprobs(row, hidden[first : first + row.count], found, launched)
        ends = [start + row.count for row, start in zip(filled, starts)]
        if fixed:
            self._draw_fixed(rows, ends, hidden, constrained, picked, launched)
        else:
            self._draw(rows, ends, hidden, logits, constrained, picked, launched)

    def _hidden(self, rows: list[Row], query_starts: list[int], before: Launched, fixed: bool) -> Tensor:
        """The model's hidden states of all tokens of these rows: [num_tokens, hidden]."""
        token_ids = [i for row in rows for i in row.input_ids(before.places)]
        ids = self._ints(token_ids)
        if min(token_ids) < 0:
            ids = fill_in(ids, before.drawn)
        context = self._context(rows, query_starts, fixed)
        with native.held(context.is_prompt_in_c):
            return self.model(ids, context)

    def _draw_fixed(self, rows: list[Row], ends: list[int], hidden: Tensor, constrained: dict[int, Constraint],
                    picked: list[Picked], launched: Launched) -> None:
        """`_draw` of deterministic rows, which have no drafts: the logits of all together, the draws one by one."""
        if not any(row.samples for row in rows):
            return
        logits = self.model.logits(hidden[self._ints([end - 1 for end in ends])])
        masks = _take_masks(constrained)
        for i, row in enumerate(rows):
            if row.samples and masks.get(i, 0) is not None:
                mask = {0: masks[i]} if i in masks else {}
                self._pick(logits[i : i + 1], [(row, 0, picked[i])], mask, launched)

    def _draw(self, rows: list[Row], ends: list[int], hidden: Tensor, logits: Tensor | None,
              constrained: dict[int, Constraint], picked: list[Picked], launched: Launched) -> None:
        """The next token of each row that samples, and one behind each of its drafts, into `picked`.

        hidden: [num_tokens, hidden]. ends: where each row's tokens end in it. logits: theirs, if known.
        """
        # (row, how many of its drafts come before)
        sampling = [(i, ahead) for i, row in enumerate(rows) if row.samples for ahead in range(len(row.drafts) + 1)]
        if not sampling:
            return
        first = [end - len(row.drafts) - 1 for end, row in zip(ends, rows)]
        if logits is None:
            logits = self.model.logits(hidden[self._ints([first[i] + ahead for i, ahead in sampling])])
        masks = _take_masks(constrained)
        late = [masks.get(i, 0) is None for i, _ in sampling]
        if any(late):
            logits = logits[self._ints([place for place, is_late in enumerate(late) if not is_late])]
            sampling = [one for one, is_late in zip(sampling, late, strict=True) if not is_late]
            if not sampling:
                return
        places = {place: masks[i] for place, (i, _) in enumerate(sampling) if i in masks}
        self._pick(logits, [(rows[i], ahead, picked[i]) for i, ahead in sampling], places, launched)

    def _pick(self, logits: Tensor, wanted: list[tuple[Row, int, Picked]], masks: dict[int, np.ndarray],
              launched: Launched) -> None:
        """Draw a token for each row of logits: of which row, how many of its drafts come before, and who is told."""
        sequences, before = [row.sequence for row, _, _ in wanted], launched.before
        ahead = [row.ahead(count, before.places) for row, count, _ in wanted]
        drawn = self.sampler.launch(logits, sequences, masks, ahead, before.drawn if before.draws else None)
        launched.drew(drawn.ids, sequences)
        drawn = drawn.fetch()

        def read() -> None:
            for (_, count, picked), token_id, logprob in zip(wanted, *drawn.read(), strict=True):
                if count:
                    picked.after_drafts.append((token_id, logprob))
                else:
                    picked.token_id, picked.logprob = token_id, logprob

        launched.reads.append(read)

    def free_memory(self) -> None:
        """Give back what torch keeps of the device's memory without using it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _context(self, rows: list[Row], query_starts: list[int], fixed: bool) -> ForwardContext:
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
            positions=self._ints(positions), slots=self._ints(slots), query_lens=[row.count for row in rows],
            query_starts=query_starts, context_lens=ends,
            page_table=self._ints([pages + [0] * (width - len(pages)) for pages in table]),
            kv=self.kv, page_size=self.page_size, fixed=fixed,
        )  # fmt: skip

    def _pool(self, row: Row, hidden: Tensor, picked: Picked, launched: Launched) -> None:
        """The sequence's last hidden state, or the mean of all, once the row completes it.

        hidden: [row.count, hidden].
        """
        sequence = row.sequence
        if sequence.pooling == "last":
            total, count = hidden[-1].float(), 1
        else:
            total, count = hidden.float().sum(0), sequence.num_prompt
            if row.start == 0:
                self._sums[sequence] = {0: torch.zeros_like(total)}
            sums = self._sums[sequence]
            total += sums[row.start]
            sums[row.start + row.count] = total
            while len(sums) > _NUM_SUMS:
                del sums[min(sums)]
        if row.start + row.count == sequence.num_prompt:
            pooled = download(total / count)
            launched.reads.append(lambda: setattr(picked, "embedding", pooled.tolist()))

    def _prompt_logprobs(self, row: Row, hidden: Tensor, picked: Picked, launched: Launched) -> None:
        """Log-probabilities of the prompt tokens that follow the row's positions. hidden: [row.count, hidden]."""
        sequence = row.sequence
        following = sequence.token_ids[row.start + 1 : min(row.start + row.count + 1, sequence.num_prompt)]
        found = []
        for start in range(0, len(following), _LOGIT_CHUNK):
            chosen = following[start : start + _LOGIT_CHUNK]
            logits = self.model.logits(hidden[start : start + len(chosen)])
            found.append(tuple(map(download, self.sampler.prompt_logprobs(logits, chosen, sequence))))
        launched.reads.append(lambda: picked.prompt_logprobs.extend(entry for part in found for entry in pack(*part)))

    def _ints(self, values: list) -> Tensor:
        return upload(values, torch.int64, self.device)


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
