"""Scheduler and page pool with host memory: no model, no tensors, but a memory whose contents are checked.

A token's K/V is stood for by the text up to it. Whoever reads a position that does not have it has been given
a page that was copied wrongly, too late, or not at all.
"""

import random
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from crane.runtime.batch import Picked
from crane.runtime.costs import Costs
from crane.runtime.pages import PagePool
from crane.runtime.scheduler import Scheduler
from crane.runtime.sequence import Sequence
from crane.runtime.tiers import DiskLink
from crane.runtime.types import Generate, SamplingParams

SIZE = 4


class Memory:
    """Places of `SIZE` tokens each, as the runner and the host copies see them."""

    def __init__(self, pool):
        self.places = [[None] * SIZE for _ in range(pool.num_pages + pool.host.size)]

    def apply(self, copies):
        for source, target in copies:
            self.places[target][:] = self.places[source]

    def compute(self, row):
        """Read everything before the row, write the row."""
        sequence = row.sequence
        for position in range(row.start + row.count):
            page, offset = sequence.pages[position // SIZE], position % SIZE
            text = tuple(sequence.token_ids[: position + 1])
            if position >= row.start:
                self.places[page][offset] = text
            assert self.places[page][offset] == text, f"{sequence.rid}: position {position} is not in its page"


def token_for(sequence):
    """A scripted model: the next token depends on everything before it."""
    return hash((sequence.index, *sequence.token_ids)) % 50


def make(num_pages=8, num_host_pages=8, policy="swap", **options):
    chosen = dict(max_running=3, quantum_tokens=2, max_step_tokens=8, max_model_len=num_pages * SIZE) | options
    pool = PagePool(num_pages, SIZE, num_host_pages)
    return Scheduler(pool, costs=Costs(1, policy), **chosen), Memory(pool)


def add(scheduler, rid, tokens, max_tokens, n=1, salt=""):
    request = Generate(rid, list(tokens), SamplingParams(n=n, max_tokens=max_tokens), cache_salt=salt)
    sequences = [Sequence(request, index, 0, frozenset()) for index in range(n)]
    for sequence in sequences:
        sequence.leader = sequences[0] if sequence is not sequences[0] else None
        scheduler.enqueue(sequence)
    return sequences


def step(scheduler, memory):
    batch = scheduler.plan()
    memory.apply(batch.copies)
    if scheduler.tables.disk is not None:
        scheduler.tables.disk.hand_over()
    for row in batch.rows:
        memory.compute(row)
    outputs = scheduler.commit(batch, [Picked(token_for(row.sequence) if row.samples else None) for row in batch.rows])
    if scheduler.tables.disk is not None:
        memory.apply(scheduler.pool.due_copies())
        scheduler.tables.disk.hand_over()
    scheduler.check()
    return batch, outputs


def drain(scheduler, memory, disk=None):
    computed = 0
    while disk and disk.jobs:
        disk.work()
    for _ in range(10_000):
        if not scheduler.has_work:
            return computed
        batch, _ = step(scheduler, memory)
        assert batch.rows or (disk and disk.jobs), "there is work, but the step is empty"
        while disk and disk.jobs:
            disk.work()
        computed += batch.num_tokens
    raise AssertionError("the scheduler does not come to an end")


def test_swapped_sequences_go_on_where_they_were_and_nothing_is_computed_twice():
    scheduler, memory = make(num_pages=8, num_host_pages=32)
    sequences = [add(scheduler, rid, [i] * 6, 20)[0] for i, rid in enumerate("abcd")]
    # every token but the last one is computed once
    assert drain(scheduler, memory) == 4 * (6 + 20 - 1)
    assert scheduler.tables.num_swaps > 0 and scheduler.tables.num_swaps == scheduler.num_preemptions
    assert [s.num_output for s in sequences] == [20] * 4
    assert scheduler.pool.host.num_free == 32


def test_what_does_not_fit_into_host_memory_is_recomputed():
    scheduler, memory = make(num_pages=8, num_host_pages=1, prefix_cache=False)
    for i, rid in enumerate("abcd"):
        add(scheduler, rid, [i] * 6, 20)
    assert drain(scheduler, memory) > 4 * (6 + 20 - 1)
    assert scheduler.num_preemptions > scheduler.tables.num_swaps


def test_a_prefix_that_had_to_give_way_is_not_computed_again():
    scheduler, memory = make(num_pages=8, num_host_pages=8)
    first = list(range(100, 117))
    add(scheduler, "a", first, 1), drain(scheduler, memory)
    add(scheduler, "b", range(200, 230), 1), drain(scheduler, memory)
    assert all(node.page is None for node in scheduler.pool.match(first))
    (again,) = add(scheduler, "c", first, 1)
    assert drain(scheduler, memory) == 1
    assert (again.num_cached, scheduler.tables.num_host_tokens) == (16, 16)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_swapped_sequence_that_is_aborted_returns_its_slots(prefix_cache):
    scheduler, memory = make(num_pages=8, num_host_pages=32, prefix_cache=prefix_cache)
    for i, rid in enumerate("abcd"):
        add(scheduler, rid, [i] * 6, 20)
    while not (swapped := [s for s in scheduler.find(None) if s.host_pages]):
        step(scheduler, memory)
    scheduler.end(swapped, "abort")
    scheduler.check()
    drain(scheduler, memory)
    assert scheduler.pool.host.num_free == 32 and scheduler.pool.num_free == 8


def test_the_measured_rates_decide_between_copying_and_computing():
    costs = Costs(page_bytes=1000, copy_bytes_s=1e6)
    assert costs.swaps(10, 160), "nothing is known of computing yet"
    costs.computed(1000, 1.0)  # 0.16 s for 160 tokens, against 0.02 s for 10 pages out and in
    assert costs.swaps(10, 160) and not costs.swaps(100, 160)
    for _ in range(100):
        costs.computed(100_000, 1.0)
    assert not costs.swaps(10, 160)
    for _ in range(100):
        costs.copied(1000, 0.01)
    assert costs.swaps(10, 160)
    assert not Costs(1000, "recompute", 1e12).swaps(1, 10**6) and Costs(1000, "swap", 1.0).swaps(10**6, 1)


class FakeDisk:
    """Stands for `disk.DiskTier`: its jobs are done when `work` is called."""

    print = b"model"
    ready = writable = True

    def __init__(self):
        self.files, self.jobs, self.finished, self.epoch = {}, deque(), deque(), 0

    def has(self, name):
        return name in self.files

    def submit(self, job):
        self.jobs.append(job)

    def flush(self):
        self.files.clear()
        self.epoch += 1

    def work(self):
        job = self.jobs.popleft()
        for name, tokens, place in job.pages:
            if job.kind == "write" and job.epoch == self.epoch:
                self.files[name] = (tokens, list(place))
            elif job.kind == "read" and name in self.files:
                known, place[:] = self.files[name]
                assert known == tokens
            else:
                break
            job.num_done += 1
        self.finished.append(job)


def connect(scheduler, memory, disk):
    pool, tables = scheduler.pool, scheduler.tables
    tables.disk = DiskLink(pool, disk, tables.costs, lambda page: memory.places[pool.num_pages + page])


def test_pages_of_one_text_on_their_way_to_and_from_the_disk_share_the_memory_of_its_tokens():
    scheduler, memory = make(num_pages=32, num_host_pages=128)
    disk, jobs = FakeDisk(), []
    connect(scheduler, memory, disk)
    disk.submit = lambda job: (jobs.append(job), disk.jobs.append(job))
    for _ in range(2):
        add(scheduler, "long", list(range(100)), 2)
        drain(scheduler, memory, disk)
        scheduler.tables.disk.poll()
        scheduler.pool.flush()  # memory forgets, the disk does not
    assert [job.kind for job in jobs[:2]] == ["write", "read"]
    for job in jobs[:2]:
        assert len(job.pages) == job.num_done > 20
        assert len({id(tokens.obj) for _, tokens, _ in job.pages}) == 1
        assert [tokens.tolist() for _, tokens, _ in job.pages] == [list(range(4 * i + 4)) for i in range(job.num_done)]


class SwappingMachine(RuleBasedStateMachine):
    """Random requests on a scheduler with too few pages and a little host memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    @initialize(slots=st.sampled_from([0, 3, 12, 24]), cache=st.booleans(), disk=st.booleans(),
                policy=st.sampled_from(["swap", "recompute", "mixed"]))
    def start(self, slots, cache, policy, disk):
        self.scheduler, self.memory = make(8, slots, "swap" if policy == "mixed" else policy, prefix_cache=cache)
        self.disk = FakeDisk() if disk else None
        if disk:
            connect(self.scheduler, self.memory, self.disk)
        if policy == "mixed":
            toss = random.Random(slots)
            self.scheduler.tables.costs.swaps = lambda pages, tokens: toss.random() < 0.5

    @rule(start=st.integers(0, 2), length=st.integers(1, 20), output=st.integers(1, 11), n=st.integers(1, 3),
          salt=st.sampled_from(["", "", "x"]))
    @precondition(lambda self: len(self.scheduler.find(None)) < 12)
    def submit(self, start, length, output, n, salt):
        self.count += 1
        add(self.scheduler, f"r{self.count}", [start, *range(length)], output, n, salt)

    @rule(count=st.integers(1, 20))
    def steps(self, count):
        for _ in range(count):
            batch, _ = step(self.scheduler, self.memory)
            assert batch.rows or not self.scheduler.has_work or (self.disk and self.disk.jobs)

    @rule(count=st.integers(1, 4))
    def disk_works(self, count):
        for _ in range(min(count, len(self.disk.jobs) if self.disk else 0)):
            self.disk.work()

    @rule(place=st.integers(0, 11))
    @precondition(lambda self: self.scheduler.has_work)
    def abort(self, place):
        live = self.scheduler.find(None)
        self.scheduler.end([live[place % len(live)]], "abort")

    @rule()
    def flush(self):
        self.scheduler.flush()

    @invariant()
    def ledger_is_sound(self):
        if self.count:
            self.scheduler.check()

    def teardown(self):
        if self.count:
            drain(self.scheduler, self.memory, self.disk)
            pool = self.scheduler.pool
            if self.disk:
                self.scheduler.tables.disk.poll()
                self.scheduler.check()
            assert (pool.num_free, pool.host.num_free) == (8, pool.host.size)


TestSwappingMachine = SwappingMachine.TestCase
TestSwappingMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("seed", range(12))
def test_a_long_random_life_under_pressure_uses_every_tier_and_confuses_none(seed):
    rng = random.Random(seed)
    scheduler, memory = make(num_pages=10, num_host_pages=rng.choice([8, 16, 24]), policy="swap")
    disk = FakeDisk()
    connect(scheduler, memory, disk)
    for number in range(1500):
        kind = rng.random()
        live = scheduler.find(None)
        if kind < 0.2 and len(live) < 12:
            tokens = [rng.randrange(4), *range(rng.randrange(1, 24))]
            add(scheduler, f"r{number}", tokens, rng.randrange(1, 14), rng.choice([1, 1, 1, 3]), rng.choice(["", "x"]))
        elif kind < 0.25 and live:
            scheduler.end([rng.choice(live)], "abort")
        elif kind < 0.252:
            scheduler.flush()
        elif kind < 0.5 and disk.jobs:
            disk.work()
        else:
            step(scheduler, memory)
        scheduler.check()
    drain(scheduler, memory, disk)
    scheduler.tables.disk.poll()
    scheduler.check()
    assert (scheduler.pool.num_free, scheduler.pool.host.num_free) == (10, scheduler.pool.host.size)
    tables = scheduler.tables
    assert tables.num_swaps > 20 and tables.num_host_tokens > 0 and tables.num_disk_tokens > 0
