"""What varies from one decode step to the next, at fixed addresses: for `graphs` and `recorded`."""

import numpy as np

from crane.runtime.batch import Row
from crane.runtime.sequence import Sequence


class StepInputs:
    """Arrays that say what a step of rows of one token each computes. Pages that stay are not written again.

    numbers: [4, num_rows], token, position, slot and length of every row. table: [num_rows, max_pages], its pages.
    """

    def __init__(self, numbers: np.ndarray, table: np.ndarray):
        self._numbers, self._table = numbers, table
        self._pages: list[list[int]] = [[] for _ in table]  # what `table` has

    def fill(self, rows: list[Row], places: dict[Sequence, int], page_size: int) -> None:
        """Of these rows, the first ones; the others' stay as they are. places: as in `Row.ahead`."""
        tokens, positions, slots, lengths = self._numbers
        for place, row in enumerate(rows):
            pages = row.sequence.pages
            (tokens[place],) = row.input_ids(places)
            positions[place] = row.start
            slots[place] = pages[row.start // page_size] * page_size + row.start % page_size
            lengths[place] = row.start + 1
            if self._pages[place] != pages:
                self._table[place, : len(pages)] = pages
                self._pages[place] = list(pages)
