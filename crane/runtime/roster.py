"""All live sequences: by request, by deadline, and how many of them have not started. Torch-free."""

import heapq
import itertools
from collections import Counter

from crane.runtime.policy import Tenants
from crane.runtime.sequence import Sequence, Status


class Roster:
    """Written by Scheduler only.

    num_waiting: sequences that have not started yet; by_level, by_tenant: the same by class and tenant.
    waiting_tokens: of their prompts. num_started, started_prompt: how many have, and the tokens of their prompts that
    were not cached. num_ended, ended_output: those that have started and ended, and their output tokens.
    """

    def __init__(self, tenants: Tenants):
        self.num_waiting = 0
        self.waiting_tokens = 0
        self.num_started = self.started_prompt = 0
        self.num_ended = self.ended_output = 0
        self.waiting_by_level: Counter[int] = Counter()
        self.waiting_by_tenant: Counter[str] = Counter()
        self._tenants = tenants
        self._by_rid: dict[str, list[Sequence]] = {}
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._num_timed = 0  # of the live ones, those with a deadline
        self._numbers = itertools.count()

    def __bool__(self) -> bool:
        return bool(self._by_rid)

    def enter(self, sequence: Sequence) -> None:
        """A new one."""
        self._by_rid.setdefault(sequence.rid, []).append(sequence)
        self._tenants.enter(sequence.tenant)
        self._count(sequence, 1)
        if sequence.deadline_s is not None:
            heapq.heappush(self._deadlines, (sequence.deadline_s, next(self._numbers), sequence))
            self._num_timed += 1

    def starts(self, sequence: Sequence, now_s: float) -> None:
        """It has a slot for the first time."""
        sequence.admitted_s = now_s
        self.num_started += 1
        self.started_prompt += sequence.num_prompt - sequence.num_cached
        self._count(sequence, -1)

    def leave(self, sequence: Sequence) -> None:
        """It has ended."""
        if sequence.admitted_s is None:
            self._count(sequence, -1)
        else:
            self.num_ended += 1
            self.ended_output += sequence.num_output
        self._tenants.leave(sequence.tenant)
        if sequence.deadline_s is not None:
            self._num_timed -= 1
            if len(self._deadlines) > 2 * self._num_timed + 64:  # most of them ended in time
                self._deadlines = [each for each in self._deadlines if each[2].status is not Status.FINISHED]
                heapq.heapify(self._deadlines)
        siblings = self._by_rid[sequence.rid]
        siblings.remove(sequence)
        if not siblings:
            del self._by_rid[sequence.rid]

    def _count(self, sequence: Sequence, change: int) -> None:
        self.num_waiting += change
        self.waiting_tokens += change * sequence.num_prompt
        for counter, name in ((self.waiting_by_level, sequence.level), (self.waiting_by_tenant, sequence.tenant)):
            counter[name] += change
            if not counter[name]:
                del counter[name]

    def find(self, rid: str | None) -> list[Sequence]:
        """Those of one request, or all when rid is None."""
        if rid is not None:
            return list(self._by_rid.get(rid, ()))
        return [sequence for siblings in self._by_rid.values() for sequence in siblings]

    def overdue(self, now_s: float) -> list[Sequence]:
        """Those whose deadline has passed; each is named once."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            sequence = heapq.heappop(self._deadlines)[2]
            if sequence.status is not Status.FINISHED:
                late.append(sequence)
        return late

    def check(self, live: set[Sequence]) -> None:
        """Prove the counts against all live sequences. Raises AssertionError."""
        assert live == set(self.find(None))
        new = [sequence for sequence in live if sequence.admitted_s is None]
        assert self.num_waiting == len(new)
        assert self.waiting_tokens == sum(sequence.num_prompt for sequence in new)
        assert self.waiting_by_level == Counter(sequence.level for sequence in new)
        assert self.waiting_by_tenant == Counter(sequence.tenant for sequence in new)
        assert len(self._tenants) == len({sequence.tenant for sequence in live})
        timed = {sequence for sequence in live if sequence.deadline_s is not None}
        assert timed <= {sequence for _, _, sequence in self._deadlines}
