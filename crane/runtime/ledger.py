"""Which places of one memory are free, who holds the others: host arithmetic only, no tensors."""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Node:
    """What one remembered page contains: `tokens` after `parent`'s, or at the start of a text of `salt` when parent
    is None. Found through (parent, salt, tokens), compared in full: no hash stands for content.

    page: where it is on the device; host: where it is in host memory; None where it is not, at least one is set.
    """

    parent: "Node | None"
    salt: str
    tokens: tuple[int, ...]
    page: int | None = None
    host: int | None = None
    children: set["Node"] = field(default_factory=set)
    digest: bytes = b""  # names it on disk; computed when a disk tier asks
    on_disk: bool = False  # or on its way there
    from_disk: bool = False  # read from disk, and no sequence has used it yet

    @property
    def key(self) -> tuple:
        return (self.parent, self.salt, self.tokens)


class Ledger:
    """Reference counts and free list of `size` places, and which node each remembered place contains.

    A place is held (references > 0), or kept (no reference, remembered), or blank.
    """

    def __init__(self, size: int):
        self.size = size
        self.node_of: dict[int, Node] = {}
        # A stack: the place freed last is taken first, while its memory is still warm in cache.
        self._blank = list(range(size - 1, -1, -1))
        self._refs = [0] * size
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Places that can be taken: blank ones, and kept ones that would lose their content."""
        return len(self._blank) + len(self._kept)

    @property
    def num_blank(self) -> int:
        return len(self._blank)

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def is_kept(self, place: int) -> bool:
        return place in self._kept

    def num_sole(self, places: list[int]) -> int:
        return sum(self._refs[place] == 1 for place in places)

    @property
    def oldest(self) -> int:
        """The kept place that was not used for the longest time."""
        return next(iter(self._kept))

    def take_blank(self) -> int:
        """A blank place, with one reference."""
        place = self._blank.pop()
        self._refs[place] = 1
        return place

    def share(self, places: Iterable[int]) -> None:
        """One more reference on each place, held or kept."""
        for place in places:
            assert self._refs[place] > 0 or place in self._kept, f"page {place} is blank and cannot be shared"
            self._refs[place] += 1
            self._kept.pop(place, None)

    def release(self, places: list[int]) -> None:
        """One reference less on each place, a text's in order; those without any become free.

        The last page of a text is the first to be forgotten: what comes before it is of use to more texts, and
        of no use are pages whose predecessors are gone.
        """
        for place in reversed(places):
            assert self._refs[place] > 0, f"page {place} released twice"
            self._refs[place] -= 1
            if self._refs[place] == 0:
                if place in self.node_of:
                    self._kept[place] = None
                else:
                    self._blank.append(place)

    def drop(self, place: int) -> Node:
        """Forget what a place contains; a kept one is blank then. Returns the node it contained."""
        node = self.node_of.pop(place)
        if self._refs[place] == 0:
            del self._kept[place]
            self._blank.append(place)
        return node

    def drop_all(self) -> int:
        """Forget what all places contain. Returns how many kept ones became blank."""
        count = len(self._kept)
        self._blank += self._kept
        self._kept.clear()
        self.node_of.clear()
        return count

    def check(self, tables: Iterable[Iterable[int]], word: str) -> None:
        """Prove the counts against all who hold places. Raises AssertionError."""
        held = Counter(place for table in tables for place in table)
        for place, refs in enumerate(self._refs):
            assert refs == held[place], f"{word} {place}: {refs} references counted, {held[place]} held"
        assert len(set(self._blank)) == len(self._blank), f"a {word} is in the free list twice"
        free = {place for place, refs in enumerate(self._refs) if refs == 0}
        assert free == set(self._blank) | set(self._kept), f"free list and counts of {word}s differ"
        assert not set(self._blank) & set(self._kept), f"a {word} is blank and kept"
        assert set(self._kept) <= set(self.node_of), f"a kept {word} has no content"
