"""In which order sequences run: the more urgent class, in it the tenant that got least, of its sequences the first.

A class is a request's `priority`: lower is earlier. A tenant is whoever shares an API key. What it got is counted in
virtual tokens: prompt tokens computed for it, plus its output tokens times a weight. A tenant that comes back counts
from where the least served active one stands, so that nobody saves up a claim by being idle. With one tenant and one
class this is first come, first served. After the virtual token counter of "Fairness in Serving Large Language Models"
(Sheng et al., 2024). Torch-free; no operation looks at the whole queue.
"""

import heapq
import itertools
from bisect import insort
from collections import Counter
from collections.abc import Iterator

from crane.runtime.sequence import Sequence


class Tenants:
    """What each tenant has been served, in virtual tokens. Only tenants with live sequences, or in debt, are known."""

    def __init__(self, output_weight: float = 2.0):
        self.output_weight = output_weight
        self._served: dict[str, float] = {}
        self._live: Counter[str] = Counter()
        self._order = LeastServed(self)

    def __len__(self) -> int:
        """How many have live sequences."""
        return len(self._live)

    def served(self, name: str) -> float:
        return self._served.get(name, 0.0)

    def served_if_entered(self, name: str) -> float:
        """What would be counted for it if it had a sequence now."""
        least = self._order.first()
        return max(self.served(name), self.served(least) if least is not None and name not in self._live else 0.0)

    def enter(self, name: str) -> None:
        """One more live sequence of this tenant."""
        if not self._live[name]:
            self._served[name] = self.served_if_entered(name)
            self._order.add(name)
        self._live[name] += 1

    def leave(self, name: str) -> None:
        """One live sequence less. Debts are forgotten once nobody is active, or when all others have caught up."""
        self._live[name] -= 1
        if self._live[name]:
            return
        del self._live[name]
        self._order.discard(name)
        if not self._live:
            self._served.clear()
        elif self.served(name) <= self.served(self._order.first()):
            del self._served[name]
        elif len(self._served) > 2 * len(self._live) + 64:
            floor = self.served(self._order.first())
            self._served = {n: got for n, got in self._served.items() if n in self._live or got > floor}

    def charge(self, name: str, prompt_tokens: int, output_tokens: int) -> None:
        """So many tokens were computed for it."""
        self._served[name] += prompt_tokens + self.output_weight * output_tokens


class LeastServed:
    """A set of tenants that knows the least served one. What is served only grows, so old entries come up too early
    and are put right then."""

    def __init__(self, tenants: Tenants):
        self._tenants = tenants
        self._names: set[str] = set()
        self._heap: list[tuple[float, int, str]] = []
        self._count = itertools.count()

    def add(self, name: str) -> None:
        if name not in self._names:
            self._names.add(name)
            if len(self._heap) > 2 * len(self._names) + 64:
                self._heap = [(self._tenants.served(n), next(self._count), n) for n in self._names - {name}]
                heapq.heapify(self._heap)
            heapq.heappush(self._heap, (self._tenants.served(name), next(self._count), name))

    def discard(self, name: str) -> None:
        self._names.discard(name)

    def first(self) -> str | None:
        """The least served one; of equals the one that has been here longest."""
        while self._heap:
            served, number, name = self._heap[0]
            now = self._tenants.served(name)
            if name not in self._names:
                heapq.heappop(self._heap)
            elif served < now:
                heapq.heapreplace(self._heap, (now, number, name))
            else:
                return name
        return None


class _Line:
    """One tenant's sequences in one class, by their tickets."""

    def __init__(self):
        self._heap: list[tuple[int, Sequence]] = []
        self._tickets: dict[Sequence, int] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def add(self, sequence: Sequence) -> None:
        self._tickets[sequence] = sequence.ticket
        heapq.heappush(self._heap, (sequence.ticket, sequence))

    def remove(self, sequence: Sequence) -> None:
        del self._tickets[sequence]
        if len(self._heap) > 2 * len(self._tickets) + 64:
            self._heap = [(ticket, each) for each, ticket in self._tickets.items()]
            heapq.heapify(self._heap)

    def first(self) -> Sequence:
        while self._tickets.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][1]


class _Level:
    """One class: a line for each of its tenants."""

    def __init__(self, tenants: Tenants):
        self.lines: dict[str, _Line] = {}
        self.names = LeastServed(tenants)
        self.size = 0

    def first(self) -> Sequence:
        return self.lines[self.names.first()].first()


class Lanes:
    """Sequences in the order of the policy. Adding, removing and `first` take O(log n)."""

    def __init__(self, tenants: Tenants):
        self._tenants = tenants
        self._levels: dict[int, _Level] = {}
        self._sorted: list[int] = []
        self._members: dict[Sequence, None] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._members

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, the last added last."""
        return iter(self._members)

    @property
    def levels(self) -> list[int]:
        """The classes present, the most urgent one first."""
        return self._sorted

    def add(self, sequence: Sequence) -> None:
        assert sequence not in self._members
        self._members[sequence] = None
        level = self._levels.get(sequence.level)
        if level is None:
            level = self._levels[sequence.level] = _Level(self._tenants)
            insort(self._sorted, sequence.level)
        line = level.lines.get(sequence.tenant)
        if line is None:
            line = level.lines[sequence.tenant] = _Line()
            level.names.add(sequence.tenant)
        line.add(sequence)
        level.size += 1

    def remove(self, sequence: Sequence) -> None:
        del self._members[sequence]
        level = self._levels[sequence.level]
        line = level.lines[sequence.tenant]
        line.remove(sequence)
        level.size -= 1
        if not line:
            del level.lines[sequence.tenant]
            level.names.discard(sequence.tenant)
        if not level.size:
            del self._levels[sequence.level]
            self._sorted.remove(sequence.level)

    def first(self) -> Sequence | None:
        """Whose turn it is."""
        return self._levels[self._sorted[0]].first() if self._sorted else None

    def first_after(self, level: int) -> list[Sequence]:
        """Whose turn it is in each class that is less urgent."""
        return [self._levels[each].first() for each in self._sorted if each > level]

    def num_ahead(self, level: int, tenant: str) -> int:
        """How many would have their turn before a new sequence: more urgent ones, its tenant's own, and of each
        other tenant as many as its own, one more if that tenant got less."""
        ahead = self.num_before(level)
        lines = self._levels[level].lines if level in self._levels else {}
        own, served = len(lines.get(tenant, ())), self._tenants.served_if_entered(tenant)
        for name, line in lines.items():
            if name != tenant:
                ahead += min(len(line), own + (self._tenants.served(name) <= served))
        return ahead + own

    def num_before(self, level: int) -> int:
        """How many are of more urgent classes."""
        return sum(self._levels[each].size for each in self._sorted if each < level)
