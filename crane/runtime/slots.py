"""Who has a run slot and who gets the next one, in `policy`'s order. Torch-free.

At most `max_running` sequences have one. After `quantum_tokens` decoded tokens a sequence gives way, behind
the others of its lane, if others wait for its slot; at once if a more urgent one does. So that
urgent ones starve nobody, one slot in `TRICKLE` goes to the first comer of the other classes, for a quantum.
"""

import itertools
from typing import Protocol

from crane.runtime.policy import Lanes, Tenants
from crane.runtime.sequence import Sequence, Status

# Of so many slots that fall free while several classes wait, one goes to a class that is not the most urgent.
TRICKLE = 16
# So many that wait behind one without pages are looked at in a step: whether they are small enough to overtake it.
LOOKAHEAD = 8


class Memory(Protocol):
    """What slots are worth nothing without: pages. See `Scheduler`."""

    def may_start(self, sequence: Sequence) -> bool:
        """Nothing but pages is missing."""

    def start(self, sequence: Sequence) -> bool:
        """Give pages to a sequence without any; False: too few are free."""

    def resume(self, sequence: Sequence) -> bool:
        """Give the next page to a sequence that kept its pages; False: none is free."""

    def pages_needed(self, sequence: Sequence) -> int:
        """To start it."""

    def most_pages(self, sequence: Sequence) -> int:
        """That it may ever hold."""


class Slots:
    """All live sequences, each in exactly one of these:

    running: has a slot. parked: wants one, and holds pages. waiting: wants one, and has no pages.
    unready: cannot start yet, whatever is free. It is tried again in every step.
    """

    def __init__(self, tenants: Tenants, memory: Memory, *, max_running: int, quantum_tokens: int):
        self.max_running = max_running
        self.quantum_tokens = quantum_tokens
        self.running: list[Sequence] = []
        self.parked = Lanes(tenants)
        self.waiting = Lanes(tenants)
        self.unready: dict[Sequence, None] = {}
        self._tenants = tenants
        self._memory = memory
        self._tickets = itertools.count()
        self._front_tickets = itertools.count(-1, -1)
        self.lookahead = LOOKAHEAD
        self._passed_over = 0  # slots in a row that went to the most urgent class while others waited

    def __len__(self) -> int:
        return len(self.running) + len(self.parked) + len(self.waiting) + len(self.unready)

    def rank(self, sequence: Sequence) -> tuple:
        """Smaller ones are to run first."""
        return sequence.level, self._tenants.served(sequence.tenant), sequence.ticket

    def num_ahead(self, sequence: Sequence) -> int:
        """How many of those that wait would get a slot before a new sequence, as far as can be told now."""
        return sum(lanes.num_ahead(sequence.level, sequence.tenant) for lanes in (self.parked, self.waiting))

    def add(self, sequence: Sequence) -> None:
        """A new sequence, the last of its lane."""
        sequence.ticket = next(self._tickets)
        self.waiting.add(sequence)

    def return_first(self, sequence: Sequence) -> None:
        """A sequence that had to give up its pages: it is to run again before the others of its lane."""
        self.remove(sequence)
        sequence.status = Status.QUEUED
        sequence.trickled = False
        sequence.quantum_used = 0
        sequence.ticket = next(self._front_tickets)
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take it out of wherever it is."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence in self.unready:
            del self.unready[sequence]
        else:
            (self.parked if sequence in self.parked else self.waiting).remove(sequence)

    def wake(self) -> None:
        """Look again at those that were not ready. Their places in their lanes are as they were."""
        for sequence in [s for s in self.unready if self._memory.may_start(s)]:
            del self.unready[sequence]
            self.waiting.add(sequence)

    def give_way(self) -> None:
        """Sequences past their quantum, and less urgent ones than those that wait, give their slots to as many."""
        num_free = self.max_running - len(self.running)
        wanted = len(self.parked) + len(self.waiting) - num_free
        if wanted <= 0:
            return
        urgent = min(lanes.levels[0] for lanes in (self.parked, self.waiting) if lanes)
        giving = [s for s in self.running
                  if s.quantum_used >= self.quantum_tokens or (s.level > urgent and not s.trickled)]
        giving.sort(key=lambda s: self.rank(s)[:2], reverse=True)  # stable: the one longest in its slot first
        for sequence in giving:
            if wanted <= 0:
                return
            if sequence.quantum_used < self.quantum_tokens:
                if self.parked.num_before(sequence.level) + self.waiting.num_before(sequence.level) <= num_free:
                    continue
            self._park(sequence)
            wanted -= 1
            num_free += 1

    def _park(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.status = Status.QUEUED
        sequence.trickled = False
        if sequence.quantum_used >= self.quantum_tokens:
            sequence.quantum_used = 0
            sequence.ticket = next(self._tickets)
        else:  # it has a claim to the rest of its quantum
            sequence.ticket = next(self._front_tickets)
        self.parked.add(sequence)

    def fill(self) -> None:
        """One pass over those that want to run. A sequence without pages waits until its whole past fits and every
        running one can still grow by a page; behind it only a few small ones may start before it, but those
        who hold their pages run on."""
        blocked, later = None, []
        while len(self.running) < self.max_running:
            sequence = self._next(waiting=blocked is None or len(later) <= self.lookahead)
            if sequence is None:
                break
            if sequence in self.parked:
                self.parked.remove(sequence)
                if not self._memory.resume(sequence):
                    later.append((self.parked, sequence))
                    continue
            else:
                self.waiting.remove(sequence)
                if not self._memory.may_start(sequence):
                    self.unready[sequence] = None
                    continue
                if not self._may_overtake(sequence, blocked) or not self._memory.start(sequence):
                    blocked = blocked or sequence
                    later.append((self.waiting, sequence))
                    continue
                if blocked is not None:
                    blocked.num_overtaken += self._memory.most_pages(sequence)
            self._run(sequence)
        for lanes, sequence in later:
            sequence.trickled = False
            lanes.add(sequence)

    def _next(self, waiting: bool) -> Sequence | None:
        """Who gets the next slot. waiting: also those without pages."""
        lanes = (self.parked, self.waiting) if waiting else (self.parked,)
        best = min((lane.first() for lane in lanes if lane), key=self.rank, default=None)
        if best is None or self._passed_over < TRICKLE - 1:
            return best
        passed = [each for lane in lanes for each in lane.first_after(best.level)]
        if not passed:
            return best
        sequence = min(passed, key=lambda s: s.ticket)
        sequence.trickled = True
        return sequence

    def _run(self, sequence: Sequence) -> None:
        """It gets a slot."""
        if sequence.trickled:
            self._passed_over = 0
        elif max((lanes.levels[-1] for lanes in (self.parked, self.waiting) if lanes), default=0) > sequence.level:
            self._passed_over += 1
        sequence.status = Status.RUNNING
        self.running.append(sequence)

    def _may_overtake(self, sequence: Sequence, blocked: Sequence | None) -> bool:
        """All that ever overtake one that waits for pages hold together no more than it needs, so it waits for
        no more than these to end."""
        if blocked is None:
            return True
        left = self._memory.pages_needed(blocked) - blocked.num_overtaken
        return self._memory.most_pages(sequence) <= left
