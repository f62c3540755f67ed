"""Anything may happen to the scheduler, in any order: after each action its books balance, at the end all is done."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from crane.runtime.sequence import Status
from tests.runtime.worlds import World


class SchedulerMachine(RuleBasedStateMachine):
    """Classes, tenants, deadlines, choices, shared prefixes, aborts, flushes, too few pages, host pages. Every sequence
    gets exactly its own tokens (`World.take`)."""

    @initialize(num_host_pages=st.sampled_from([0, 5, 30]), preemption=st.sampled_from(["swap", "recompute"]),
                prefix_cache=st.booleans(), overlap=st.booleans())
    def begin(self, num_host_pages, preemption, prefix_cache, overlap):
        self.world = World(num_pages=12, page_size=4, num_host_pages=num_host_pages, preemption=preemption,
                           max_running=3, quantum_tokens=3, max_step_tokens=8, max_model_len=40,
                           prefix_cache=prefix_cache, overlap=overlap)
        self.arrived = []

    @rule(num_prompt=st.integers(1, 39), max_tokens=st.integers(1, 30), kind=st.sampled_from([None, 0, 1]),
          salt=st.sampled_from(["", "s"]), level=st.integers(-1, 1), tenant=st.sampled_from(["", "a", "b"]),
          timeout_s=st.sampled_from([None, None, None, 1.0, 20.0]), n=st.sampled_from([1, 1, 2, 3]),
          stop_after=st.sampled_from([None, 0, 1, 5]))
    def submit(self, num_prompt, max_tokens, kind, salt, level, tenant, timeout_s, n, stop_after):
        leader = self.world.add(num_prompt, max_tokens, kind, cache_salt=salt, priority=level, tenant=tenant,
                                timeout_s=timeout_s, n=n, stop_after=stop_after)
        self.arrived += [s for s in self.world.live.values() if s.rid == leader.rid]

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps):
        world, scheduler = self.world, self.world.scheduler
        for _ in range(num_steps):
            started = len(world.started)
            waiting = {s for s in self.arrived if s.admitted_s is None and s.status is Status.QUEUED}
            faults = world.num_faults
            batch = world.step()
            idle = not batch.rows and world.num_faults == faults
            assert not idle or not scheduler.has_work, "the step is idle although something can run"
            assert batch.num_tokens <= scheduler.max_step_tokens
            planned = {row.sequence: row.count for row in batch.rows}
            if batch.num_tokens < scheduler.max_step_tokens and world.overlap.why_off:
                assert all(s in planned for s in scheduler.running), "room in the step, and someone is left out"
            for sequence in world.started[started:]:
                self.started_in_turn(sequence, waiting)
            late = [s for s in world.live.values() if s.deadline_s is not None and s.deadline_s < world.now_s - 1]
            assert not late, "past its deadline and still here"

    def started_in_turn(self, sequence, waiting):
        """Those of its class and tenant that came before it have started, or it overtook one without pages."""
        before = [s for s in waiting if (s.level, s.tenant) == (sequence.level, sequence.tenant)
                  and s.leader is None and s.admitted_s is None and s.status is Status.QUEUED
                  and self.arrived.index(s) < self.arrived.index(sequence)]
        overtaken = [s for s in self.arrived if s.num_overtaken]
        assert not before or overtaken
        for other in overtaken:
            assert other.num_overtaken <= self.world.scheduler.pages_needed(other)

    @precondition(lambda self: self.world.live)
    @rule(data=st.data(), whole=st.booleans())
    def abort(self, data, whole):
        rid, index = data.draw(st.sampled_from(sorted(self.world.live)))
        scheduler = self.world.scheduler
        self.world.take(scheduler.end([s for s in scheduler.find(rid) if whole or s.index == index], "abort"))
        assert self.world.ended[rid, index] == "abort"

    @rule(times=st.integers(1, 4))
    def a_launched_step_fails(self, times):
        self.world.script.broken = times

    @rule()
    def flush(self):
        self.world.scheduler.flush()

    @invariant()
    def books_balance(self):
        if hasattr(self, "world"):
            self.world.scheduler.check()
            assert set(self.world.scheduler.find(None)) == set(self.world.live.values())

    def teardown(self):
        """Once nobody comes any more, everybody gets to the end."""
        if hasattr(self, "world"):
            wanted = sum(s.max_tokens + s.num_prompt for s in self.world.live.values())
            self.world.drain(limit=100 + 40 * wanted)
            assert not self.world.live and len(self.world.scheduler.tenants) == 0


SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
