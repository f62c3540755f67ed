"""Which KV pages are free, who holds the others, and what they contain: host arithmetic only, no tensors.

A page holds the K and V of `page_size` consecutive tokens in every layer. Pages are reference-counted, so
that sequences can share them. A full page is remembered by its content: the tokens in it and all tokens before
it. When nobody holds it any more it stays, until its memory is needed, for the next sequence that starts
the same way.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Node:
    """One remembered page: `tokens` after `parent`'s, or at the start of a text of `salt` when parent is None.

    Found through (parent, salt, tokens), compared in full: no hash stands for content.
    """

    parent: "Node | None"
    salt: str
    tokens: tuple[int, ...]
    page: int

    @property
    def key(self) -> tuple:
        return (self.parent, self.salt, self.tokens)


class PagePool:
    """Reference counts, free list and prefix index of `num_pages` pages. Written by Scheduler only.

    A page is held (references > 0), or kept (no reference, remembered), or blank.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.page_size = page_size
        # A stack: the page freed last is taken first, while its memory is still warm in cache.
        self._blank = list(range(num_pages - 1, -1, -1))
        self._refs = [0] * num_pages
        self._nodes: dict[tuple, Node] = {}
        self._node_of: dict[int, Node] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Pages that can be taken: blank ones, and kept ones that would be forgotten."""
        return len(self._blank) + len(self._kept)

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def num_kept_of(self, nodes: list[Node]) -> int:
        """How many of these pages count as free: sharing them takes them from `num_free`."""
        return sum(node.page in self._kept for node in nodes)

    def num_sole(self, pages: list[int]) -> int:
        """How many of these pages only their holder holds: releasing them makes them free."""
        return sum(self._refs[page] == 1 for page in pages)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages `num_tokens` tokens occupy."""
        return -(-num_tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """`count` pages with one reference each. The caller has checked `num_free`."""
        assert 0 <= count <= self.num_free, f"take({count}) with {self.num_free} pages free"
        taken = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for page in taken:
            self._refs[page] = 1
        return taken

    def _evict(self) -> int:
        page, _ = self._kept.popitem(last=False)
        self._forget(page)
        return page

    def _forget(self, page: int) -> None:
        del self._nodes[self._node_of.pop(page).key]

    def share(self, pages: Iterable[int]) -> None:
        """One more reference on each of `pages`, held or kept."""
        for page in pages:
            assert self._refs[page] > 0 or page in self._kept, f"page {page} is blank and cannot be shared"
            self._refs[page] += 1
            self._kept.pop(page, None)

    def release(self, pages: list[int]) -> None:
        """One reference less on each of `pages`, a sequence's in order; those without any become free.

        The last page of a text is the first to be forgotten: what comes before it is of use to more texts, and
        of no use are pages whose predecessors are gone.
        """
        for page in reversed(pages):
            assert self._refs[page] > 0, f"page {page} released twice"
            self._refs[page] -= 1
            if self._refs[page] == 0:
                if page in self._node_of:
                    self._kept[page] = None
                else:
                    self._blank.append(page)

    # --- prefixes

    def match(self, token_ids: list[int], salt: str = "") -> list[Node]:
        """The longest remembered start of a text, page by page, short of its last token.

        That one is always computed, because the next is drawn from its logits.
        """
        found: list[Node] = []
        size = self.page_size
        for start in range(0, len(token_ids) - size, size):
            parent = found[-1] if found else None
            node = self._nodes.get((parent, salt, tuple(token_ids[start : start + size])))
            if node is None:
                break
            found.append(node)
        return found

    def remember(self, parent: Node | None, salt: str, tokens: tuple[int, ...], page: int) -> Node:
        """Note what a held page contains now that it is full. Returns its node, or the one of another page
        that has the same content already; then this page stays unremembered."""
        node = Node(parent, salt, tokens, page)
        known = self._nodes.setdefault(node.key, node)
        if known is node:
            self._node_of[page] = node
        return known

    def flush(self) -> int:
        """Forget all content; returns how many kept pages become blank. Held pages stay with their holders."""
        count = len(self._kept)
        self._blank += self._kept
        self._kept.clear()
        self._nodes.clear()
        self._node_of.clear()
        return count

    def check(self, tables: Iterable[list[int]]) -> None:
        """Prove the ledger against the page tables of all live sequences. Raises AssertionError."""
        held = Counter(page for table in tables for page in table)
        for page, refs in enumerate(self._refs):
            assert refs == held[page], f"page {page}: {refs} references counted, {held[page]} held"
        assert len(set(self._blank)) == len(self._blank), "a page is in the free list twice"
        free = {page for page, refs in enumerate(self._refs) if refs == 0}
        assert free == set(self._blank) | set(self._kept), "free list and counts differ"
        assert not set(self._blank) & set(self._kept), "a page is blank and kept"
        assert set(self._kept) <= set(self._node_of), "a kept page has no content"
        assert {id(n) for n in self._nodes.values()} == {id(n) for n in self._node_of.values()}
        for node in self._nodes.values():
            assert node.parent is None or self._nodes.get(node.parent.key) is node.parent, "a page lost its start"
