"""Decode steps at fixed addresses: on a GPU one CUDA graph replays all launches of the model at once.

Captured are steps in which every row computes one token, for a few numbers of rows; a step with fewer rows is padded.
What changes from step to step lies in buffers that one copy fills, but for tokens that the step before draws: the graph
takes them from where that one's draws are copied to. Graphs are captured while the engine has nothing
to do, the ones for the most rows first; until then, and for other steps, the model runs launch by launch.
"""

import itertools
import logging
from functools import cached_property

import torch
from torch import Tensor

from crane.kernels.attention import plan_attention
from crane.kernels.paged_plan import PagedPlan, plan_decode_rows
from crane.kernels.rows import Rows
from crane.kernels.transfer import fill_in
from crane.models.context import ForwardContext
from crane.runtime.batch import Row
from crane.runtime.sequence import Sequence
from crane.runtime.step_inputs import StepInputs

log = logging.getLogger("crane.engine")

# Numbers of rows that are captured: all small ones cost little, and from 8 on padding wastes at most a third.
_SMALL_SIZES = (1, 2, 4)
_STEP = 8


class _FixedContext(ForwardContext):
    """What layers may know about a padded decode step: tensors at fixed addresses, read when the step runs."""

    rows: Rows

    @cached_property
    def attention_plan(self) -> PagedPlan:
        return plan_decode_rows(self.rows, self.kv)


class _Numbers:
    """What the host says of a step: token, position, slot and length of every row, then its pages.

    Written while the step before may still read its own, so there are two of these, in turn.
    """

    def __init__(self, num_rows: int, max_pages: int, device: torch.device):
        cuda = device.type == "cuda"
        self._host = torch.zeros(num_rows * (4 + max_pages), dtype=torch.int32, pin_memory=cuda)
        self._numbers = self._host[: 4 * num_rows].view(4, num_rows).numpy()
        self._inputs = StepInputs(self._numbers, self._host[4 * num_rows :].view(num_rows, max_pages).numpy())
        self._read = torch.cuda.Event() if cuda else None

    def fill(self, rows: list[Row], places: dict[Sequence, int], page_size: int) -> None:
        """Of these rows; places as in `Row.ahead`."""
        if self._read is not None:
            self._read.synchronize()  # two steps ago: long past
        self._inputs.fill(rows, places, page_size)
        tokens, positions, slots, lengths = self._numbers
        # padding writes nothing and reads nothing
        tokens[len(rows) :] = positions[len(rows) :] = lengths[len(rows) :] = 0
        slots[len(rows) :] = -1

    def send(self, device: Tensor) -> None:
        """Copy all to the device: int32 [num_rows * (4 + max_pages)]."""
        device.copy_(self._host, non_blocking=True)
        if self._read is not None:
            self._read.record()


class DecodeStep:
    """A step of up to `num_rows` rows of one token each.

    model: see `Decoder`. kv: [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim]. max_pages: of one row.
    drawn: int64, no fewer than a step may draw, what the step before drew.
    """

    def __init__(self, model, kv: Tensor, num_rows: int, max_pages: int, drawn: Tensor,
                 kv_scales: Tensor | None = None):
        self.num_rows = num_rows
        self._model, self._kv, self._kv_scales = model, kv, kv_scales
        self._max_pages = max_pages
        self._drawn = drawn
        self._device = torch.zeros(num_rows * (4 + max_pages), dtype=torch.int32, device=kv.device)
        self._numbers = itertools.cycle([_Numbers(num_rows, max_pages, kv.device) for _ in range(2)])
        self._graph: torch.cuda.CUDAGraph | None = None
        self._hidden: Tensor | None = None

    @torch.inference_mode()
    def run(self, rows: list[Row], places: dict[Sequence, int], drawn: Tensor | None) -> tuple[Tensor, None]:
        """Hidden states [len(rows), hidden] of the rows' tokens, whose K/V are in their pages then; no logits.

        The tensor is overwritten by the next call. places, drawn: as in `Row.ahead`; None when nothing is unknown.
        """
        self._send(rows, places)
        if drawn is not None:
            self._drawn[: len(drawn)].copy_(drawn)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._hidden = self._compute()
        return self._hidden[: len(rows)], None

    @torch.inference_mode()
    def capture(self, pool) -> None:
        """Make a CUDA graph of the step. pool: memory that all graphs share; only one of them runs at a time."""
        self._send([], {})
        stream = torch.cuda.Stream(self._kv.device)
        stream.wait_stream(torch.cuda.current_stream(self._kv.device))
        with torch.cuda.stream(stream):  # compiles kernels and lets libraries set themselves up
            self._compute()
        torch.cuda.current_stream(self._kv.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads may allocate meanwhile: they must not break the capture
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._hidden = self._compute()
        self._graph = graph

    def _send(self, rows: list[Row], places: dict[Sequence, int]) -> None:
        numbers = next(self._numbers)
        numbers.fill(rows, places, self._kv.shape[3])
        numbers.send(self._device)

    def _compute(self) -> Tensor:
        count = self.num_rows
        tokens, positions, slots, lengths = self._device[: 4 * count].view(4, count)
        starts = torch.arange(count, dtype=torch.int32, device=self._device.device)
        context = _FixedContext(
            positions=positions.long(), slots=slots.long(), query_lens=[1] * count, query_starts=list(range(count)),
            context_lens=[0] * count, page_table=self._device[4 * count :].view(count, self._max_pages),
            kv=self._kv, page_size=self._kv.shape[3], kv_scales=self._kv_scales,
        )  # fmt: skip
        context.rows = Rows(
            starts, torch.ones_like(starts), lengths, context.page_table, 1, self._max_pages * self._kv.shape[3]
        )
        return self._model(fill_in(tokens.long(), self._drawn), context)


class DecodeGraphs:
    """The decode steps of one engine, by number of rows.

    max_rows: of a step. max_len: tokens of a sequence.
    """

    def __init__(self, model, kv: Tensor, max_rows: int, max_len: int, kv_scales: Tensor | None = None):
        assert kv.shape[0] * kv.shape[3] < 2**31, "slots are 32 bits wide"
        max_pages = -(-max_len // kv.shape[3])
        drawn = torch.zeros(max_rows, dtype=torch.int64, device=kv.device)
        self._make = lambda size: DecodeStep(model, kv, size, max_pages, drawn, kv_scales)
        self._missing = sizes(max_rows)
        self._steps: dict[int, DecodeStep] = {}
        self._pool = None
        self.reason = _why_not(kv)  # why there are no graphs, or None

    @property
    def state(self) -> str:
        """One line: for how many rows there are graphs, and why there are no more."""
        done = f"for {', '.join(map(str, sorted(self._steps)))} rows" if self._steps else "none"
        return f"{done}: {self.reason}" if self.reason else done

    def step_for(self, rows: list[Row]) -> DecodeStep | None:
        """The captured step that these rows fit in, when each computes one token and nothing special is wanted."""
        if not self._steps or any(row.count != 1 or row.prompt_logits or row.sequence.pooling for row in rows):
            return None
        return next((self._steps[size] for size in sorted(self._steps) if size >= len(rows)), None)

    def capture_next(self) -> bool:
        """Capture one more graph, for a moment when nothing else is to be done. False when all are there."""
        if self.reason is not None or not self._missing:
            return False
        size = self._missing.pop()
        step = self._make(size)
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            step.capture(self._pool)
        except RuntimeError as error:  # out of memory, or an operation that cannot be captured
            self.reason = f"{size} rows cannot be captured: {str(error).splitlines()[0]}"
            log.warning("CUDA graphs are not used for more: %s", self.reason)
            torch.cuda.synchronize()
            return False
        self._steps[size] = step
        return bool(self._missing)


def sizes(max_rows: int) -> list[int]:
    """Numbers of rows to capture, ascending; the last one is `max_rows`."""
    wanted = {size for size in (*_SMALL_SIZES, *range(_STEP, max_rows, _STEP)) if size < max_rows}
    return [*sorted(wanted), max_rows]


def _why_not(kv: Tensor) -> str | None:
    if kv.device.type != "cuda":
        return f"there are none on {kv.device.type}"
    if not plan_attention.chooses_triton(kv, [1], [0], [1], torch.zeros(1, 1, dtype=torch.int64, device=kv.device)):
        return "attention does not run in Triton"
    return None
