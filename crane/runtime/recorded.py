"""Decode steps on a CPU as lists of C calls: what `graphs` is on a GPU, and for the same steps.

A step with a number of rows that was not met before is recorded while it is computed, which costs little more than
the step. Its next one is computed in both ways and compared bit for bit; from then on the list is made again by one
call, over buffers that hold what varies. The first number of rows that cannot be recorded, or gives something else,
ends it for all, with the reason in the log and in `state`. Where every row takes its best token, steps give these
and no logits: they are lists of their own.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from crane.kernels import native
from crane.kernels.attention import AttentionPlan
from crane.kernels.packed import PackedLinear
from crane.kernels.pages import slot_index
from crane.kernels.recording import Memory, NotRecordable, Recording, record
from crane.kernels.streamed import StreamedRows, streams
from crane.kernels.transfer import fill_in
from crane.models.context import ForwardContext
from crane.runtime.batch import Row
from crane.runtime.sampler import Sampler
from crane.runtime.sequence import Sequence
from crane.runtime.step_inputs import StepInputs

log = logging.getLogger("crane.engine")

# So many recorded steps are kept, those that were needed last.
_MOST_STEPS = 64


class RecordedSteps:
    """The decode steps of one engine, by number of rows: exact ones, because padding is work on a CPU.

    model: see `Decoder`. kv: [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim]. max_rows: of a step.
    max_len: tokens of a sequence. sampler: draws where steps give logits.
    """

    def __init__(self, model, kv: Tensor, max_rows: int, max_len: int, sampler: Sampler):
        self._model, self._kv, self._max_rows, self._sampler = model, kv, max_rows, sampler
        self._max_pages = -(-max_len // kv.shape[3])
        self._numbers = torch.zeros(5, max_rows, dtype=torch.int64)  # token, position, slot, length, slot's index
        self._table = torch.zeros(max_rows, self._max_pages, dtype=torch.int64)
        self._inputs = StepInputs(self._numbers[:4].numpy(), self._table.numpy())
        self._places = torch.arange(max_rows)
        self._changes = native.Changes()  # of logits before the best is taken
        self._memory = Memory()
        self._steps: OrderedDict[tuple[int, bool], Recording] = OrderedDict()  # rows; whether they take the best
        self._proved: set[tuple[int, bool]] = set()  # of them those that were compared
        self.reason = None if streams(kv) else "attention over these pages does not run in C"

    @property
    def num_bytes(self) -> int:
        """Memory that all recorded steps together compute in."""
        return sum(map(len, self._memory.blocks))

    @property
    def state(self) -> str:
        """One line: for how many rows there are recorded steps, or why there are none."""
        counts = sorted({count for count, _ in self._proved})
        return self.reason or f"for {', '.join(map(str, counts)) or 'no'} rows so far"

    def step_for(self, rows: list[Row]) -> "RecordedSteps | None":
        """Who runs these rows, when each computes one token and draws the next, and nothing special is wanted."""
        plain = all(row.count == 1 and row.samples and not (row.prompt_logits or row.sequence.pooling) for row in rows)
        return self if plain and self.reason is None and len(rows) <= self._max_rows else None

    def recording(self, count: int, best: bool) -> Recording | None:
        """The recorded step of so many rows, if there is one that was compared. best: that gives the best tokens."""
        return self._steps[count, best] if (count, best) in self._proved else None

    @torch.inference_mode()
    def run(self, rows: list[Row], places: dict[Sequence, int], drawn: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states [len(rows), hidden] of the rows' tokens, whose K/V are in their pages then; and logits
        [len(rows), vocab], or the next tokens, int64 [len(rows)], if all take the best and C kernels find them. The
        next call overwrites both. places, drawn: as in `Row.ahead`; None when nothing is unknown.

        Raises MemoryError.
        """
        count, sequences = len(rows), [row.sequence for row in rows]
        kind = count, all(each.takes_best for each in sequences)
        if kind[1]:
            self._changes.hold(self._sampler.changes(sequences, [row.ahead(0, places) for row in rows], drawn))
        self._fill(rows, places)
        if drawn is not None:
            self._numbers[0, :count] = fill_in(self._numbers[0, :count], drawn)
        step = self._steps.get(kind)
        if step is None:
            return self._record(kind)
        self._steps.move_to_end(kind)
        step.replay()
        return step.results if kind in self._proved else self._prove(kind, step)

    def _record(self, kind: tuple[int, bool]) -> tuple[Tensor, Tensor]:
        compute = self._step(*kind)
        try:
            step = record(compute, self._memory, -(-self._max_rows // kind[0]))
        except NotRecordable as error:
            self._stop(logging.INFO, str(error))
            return compute()
        self._steps[kind] = step
        if len(self._steps) > _MOST_STEPS:
            self._proved.discard(self._steps.popitem(last=False)[0])
        return step.results

    def _prove(self, kind: tuple[int, bool], step: Recording) -> tuple[Tensor, Tensor]:
        plain = self._step(*kind)()
        pairs = zip(plain, step.results, strict=True)
        if all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in pairs):
            self._proved.add(kind)
        else:
            self._stop(logging.WARNING, f"a recorded step of {kind[0]} rows gives something else")
        return plain

    def _stop(self, level: int, reason: str) -> None:
        log.log(level, "decode steps are not recorded: %s", reason)
        self.reason, self._memory = reason, Memory()
        self._steps.clear()
        self._proved.clear()

    def _fill(self, rows: list[Row], places: dict[Sequence, int]) -> None:
        self._inputs.fill(rows, places, self._kv.shape[3])
        _, _, slots, _, index = self._numbers[:, : len(rows)].numpy()
        index[:] = slot_index(slots, self._kv)

    def _step(self, count: int, best: bool) -> Callable[[], tuple[Tensor, Tensor]]:
        """What computes the rows that `_fill` was given."""
        tokens, positions, slots, lengths, index = self._numbers[:, :count]
        context = ForwardContext(
            positions=positions, slots=slots, query_lens=[1] * count, query_starts=list(range(count)),
            context_lens=[0] * count, page_table=self._table, kv=self._kv, page_size=self._kv.shape[3],
        )  # fmt: skip
        places = self._places[:count]
        context.attention_plan = AttentionPlan([], [], StreamedRows(places, places, lengths, self._table))
        context.slot_index = index

        def compute() -> tuple[Tensor, Tensor]:
            hidden = self._model(tokens, context)
            if best and isinstance(linear := self._model.head.linear, PackedLinear):
                return hidden, linear.best(hidden, self._sampler.vocab_size, self._changes)
            return hidden, self._model.logits(hidden)

        return compute
