"""Follows an output's thinking section token by token. Torch-free."""

from enum import Enum

from crane.runtime.types import Thinking


class Section(Enum):
    """Where the next token of the output is."""

    UNDECIDED = "undecided"  # the output so far is a beginning of the start mark
    OPEN = "open"
    OVER = "over"  # behind the section, or there is none


class ThinkingTracker:
    """One output's thinking section. Written by the constraint that owns it.

    num_tokens: tokens of the section, its marks not counted.
    """

    def __init__(self, thinking: Thinking):
        self._start_ids = thinking.start_ids
        self._end_ids = thinking.end_ids
        self._max_tokens = thinking.max_tokens
        self._tail: list[int] = []  # the last tokens: of the start mark, or of the section
        self._num_inside = 0  # tokens since the section opened, its end mark included
        self._matched = 0  # how much of the end mark they end with
        if thinking.open:
            self.section = Section.OPEN
        else:
            self.section = Section.UNDECIDED if thinking.start_ids else Section.OVER

    @property
    def num_tokens(self) -> int:
        return self._num_inside - (self._matched if self.section is Section.OVER else 0)

    @property
    def start_id(self) -> int | None:
        """The token that may go on with the start mark, as long as there may be one."""
        return self._start_ids[len(self._tail)] if self.section is Section.UNDECIDED else None

    @property
    def forced_id(self) -> int | None:
        """The next token of the end mark, when the budget is used up."""
        if self.section is not Section.OPEN or self._max_tokens is None or self._num_inside < self._max_tokens:
            return None
        return self._end_ids[self._matched]

    def push(self, token_id: int) -> None:
        """Take note of the output's next token."""
        if self.section is Section.UNDECIDED:
            self._tail.append(token_id)
            if token_id != self._start_ids[len(self._tail) - 1]:
                self.section = Section.OVER
            elif len(self._tail) == len(self._start_ids):
                self.section = Section.OPEN
                self._tail = []
        elif self.section is Section.OPEN:
            self._num_inside += 1
            self._tail = [*self._tail, token_id][-len(self._end_ids) :]
            sizes = range(len(self._tail), 0, -1)
            self._matched = next((k for k in sizes if tuple(self._tail[-k:]) == self._end_ids[:k]), 0)
            if self._matched == len(self._end_ids):
                self.section = Section.OVER
