"""What a step that breaks costs: the request that broke it, and nobody else. Torch-free.

A batch that raises is computed again in halves until the one row is alone that raises. Computing a row again is
harmless: its keys and values go to the same places, and its draw has its own noise. Where memory runs out, rows
become shorter, too, and for a while steps are smaller from the start.
"""

import logging
from collections.abc import Callable

from crane.runtime.batch import Batch, Picked, Row

log = logging.getLogger("crane.engine")

# After so many steps without a lack of memory they may be twice as large again.
CALM_STEPS = 64


class Recovery:
    """Runs batches. run: `ModelRunner.run`; free_memory: called before anything is computed again for lack of it.

    num_faults: steps that raised; num_shortages: those for lack of memory. max_tokens: what a step should have at
    most now, None as long as memory suffices.
    """

    def __init__(self, run: Callable[[Batch], list[Picked]], free_memory: Callable[[], None] = lambda: None):
        self._run = run
        self._free_memory = free_memory
        self._num_calm = 0
        self._full_tokens = 0  # of the largest step that failed for lack of memory
        self.num_faults = 0
        self.num_shortages = 0
        self.max_tokens: int | None = None

    def run(self, batch: Batch) -> tuple[list[Picked], dict[int, Exception]]:
        """One entry per row, and by their places the errors of rows that cannot be computed.

        A row may come back shorter than it was: without its drafts, or without the end of its prompt.
        """
        try:
            picked = self._run(batch)
        except Exception as error:  # whatever went wrong, every request must be answered
            return self._again(batch, error)
        self.calm()
        return picked, {}

    def calm(self) -> None:
        """A step went well."""
        self._num_calm += 1
        if self.max_tokens is not None and self._num_calm >= CALM_STEPS:
            self._num_calm = 0
            self.max_tokens = 2 * self.max_tokens if self.max_tokens < self._full_tokens else None

    def note(self, batch: Batch, error: Exception) -> bool:
        """Count a step that raised, and give memory back if it lacked that. Returns whether it did."""
        self.num_faults += 1
        short = out_of_memory(error)
        log.error("a step of %d rows and %d tokens failed%s", len(batch.rows), batch.num_tokens,
                  ": out of memory" if short else "", exc_info=None if short else error)  # fmt: skip
        if short:
            self._free_memory()
        return short

    def _again(self, batch: Batch, error: Exception) -> tuple[list[Picked], dict[int, Exception]]:
        num_tokens = batch.num_tokens
        short = self.note(batch, error)
        picked: dict[int, Picked] = {}
        broken: dict[int, Exception] = {}
        parts = [list(enumerate(batch.rows))]
        while parts:
            part = parts.pop()
            if error is None:
                error = self._try(part, picked)
            if error is None:
                continue
            short_here = out_of_memory(error)
            if short_here:
                short = True
                self._free_memory()
            if len(part) > 1:
                parts += [part[len(part) // 2 :], part[: len(part) // 2]]
            elif short_here and _shorten(part[0][1]):
                parts.append(part)
            else:
                broken[part[0][0]] = error
            error = None
        if short:
            self.num_shortages += 1
            self._num_calm = 0
            self._full_tokens = max(num_tokens, self._full_tokens)
            self.max_tokens = max(min(num_tokens, self.max_tokens or num_tokens) // 2, 1)
            log.warning("memory is short: steps of %d tokens at most for a while", self.max_tokens)
        return [picked.get(place) or Picked() for place in range(len(batch.rows))], broken

    def _try(self, part: list[tuple[int, Row]], picked: dict[int, Picked]) -> Exception | None:
        """Compute these rows alone. Returns what was raised."""
        try:
            found = self._run(Batch([row for _, row in part]))
        except Exception as error:
            log.debug("%d of its rows failed", len(part), exc_info=True)
            return error
        picked.update((place, one) for (place, _), one in zip(part, found, strict=True))
        return None


def out_of_memory(error: Exception) -> bool:
    """torch's own error, Python's, and the plain RuntimeError of torch's allocator on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "not enough memory" in text)


def _shorten(row: Row) -> bool:
    """Make a row cheaper: without drafts, then half as long. False when it is one token."""
    if row.drafts:
        row.count -= len(row.drafts)
        row.drafts = ()
    elif row.count > 1:
        row.count //= 2
        row.samples = False  # it does not reach the last token any more
    else:
        return False
    return True
