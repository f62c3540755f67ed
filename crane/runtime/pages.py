"""Which KV pages are free and who holds the others: host arithmetic only, no tensors.

A page holds the K and V of `page_size` consecutive tokens in every layer. Pages
are reference-counted, so that sequences can share them.
"""

from collections import Counter
from collections.abc import Iterable


class PagePool:
    """Free list and reference counts of `num_pages` pages. Written by Scheduler only."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.page_size = page_size
        # A stack: the page freed last is taken first, while its memory is still warm in cache.
        self._free = list(range(num_pages - 1, -1, -1))
        self._refs = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages `num_tokens` tokens occupy."""
        return -(-num_tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """`count` pages with one reference each. The caller has checked `num_free`."""
        assert 0 <= count <= len(self._free), f"take({count}) with {len(self._free)} pages free"
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._refs[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more reference on each of `pages`."""
        for page in pages:
            assert self._refs[page] > 0, f"page {page} is free and cannot be shared"
            self._refs[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One reference less on each of `pages`; those without any become free."""
        for page in pages:
            assert self._refs[page] > 0, f"page {page} released twice"
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self._free.append(page)

    def check(self, tables: Iterable[list[int]]) -> None:
        """Prove the ledger against the page tables of all live sequences. Raises AssertionError."""
        held = Counter(page for table in tables for page in table)
        for page, refs in enumerate(self._refs):
            assert refs == held[page], f"page {page}: {refs} references counted, {held[page]} held"
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert free == {page for page, refs in enumerate(self._refs) if refs == 0}, "free list and counts differ"
