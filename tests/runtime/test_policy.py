"""Who runs first: classes, tenants, deadlines, and what a step is filled with."""

import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crane.runtime.batch import Picked
from crane.runtime.forecast import Forecast
from crane.runtime.policy import Lanes, LeastServed, Tenants
from crane.runtime.sequence import Sequence
from crane.runtime.slots import TRICKLE
from crane.runtime.types import Generate, SamplingParams
from tests.runtime.worlds import World


def rids(batch):
    return [row.sequence.rid for row in batch.rows]


# --- classes


def test_a_more_urgent_class_starts_first_and_takes_slots_at_once():
    world = World(max_running=1, quantum_tokens=100)
    world.add(rid="low", max_tokens=9)
    world.step()
    world.add(rid="normal", max_tokens=2)
    world.add(rid="urgent", max_tokens=2, priority=-5)
    assert [rids(world.step()) for _ in range(5)] == [["urgent"], ["urgent"], ["low"], ["low"], ["low"]]


def test_whoever_had_to_make_way_for_a_more_urgent_one_goes_on_with_its_quantum():
    world = World(max_running=1, quantum_tokens=3)
    world.add(rid="a", max_tokens=5)
    world.add(rid="b", max_tokens=5)
    world.step()
    world.add(rid="now", max_tokens=1, priority=-1)
    assert "".join(rid[0] for _ in range(9) for rid in rids(world.step())) == "naabbbaab"
    assert world.scheduler.num_preemptions == 0


def test_a_more_urgent_class_takes_pages_from_the_least_urgent_one_that_came_last():
    world = World(num_pages=12, max_model_len=40, max_running=4)
    for rid, level in (("a", 1), ("b", 1), ("c", 2), ("d", 0)):
        world.add(rid=rid, num_prompt=10, max_tokens=8, priority=level)
    world.step()
    urgent = world.add(rid="urgent", num_prompt=22, max_tokens=4, priority=-1)
    world.step()
    assert urgent in world.scheduler.running
    gave_up = {rid for (rid, _), s in world.live.items() if s.num_preemptions}
    assert gave_up and "d" not in gave_up and ("c" in gave_up or not world.live["c", 0].pages)
    world.drain()
    assert set(world.ended.values()) == {"length"}


def test_a_less_urgent_class_takes_no_pages_from_a_more_urgent_one():
    world = World(num_pages=8, max_model_len=32, max_running=4, quantum_tokens=100)
    urgent = world.add(num_prompt=14, max_tokens=14, priority=-1)
    other = world.add(num_prompt=9, max_tokens=20, priority=3)
    world.drain()
    assert urgent.num_preemptions == 0 and other.num_preemptions > 0


def test_urgent_ones_without_end_leave_one_slot_in_so_many_to_the_others():
    world = World(max_running=1, quantum_tokens=2)
    patient = world.add(rid="patient", max_tokens=6)
    slots_given = []
    for _ in range(4 * TRICKLE):
        while world.scheduler.roster.waiting_by_level[-1] < 2:
            world.add(max_tokens=1, priority=-1)
        slots_given += rids(world.step())
    quanta = [i for i, rid in enumerate(slots_given) if rid == patient.rid][::2]
    assert [b - a for a, b in zip(quanta, quanta[1:])] == [TRICKLE + 1] * 2
    assert world.ended[patient.rid, 0] == "length"


def test_of_one_class_the_first_comer_is_first_whatever_the_others_do():
    world = World(max_running=2)
    for i in range(12):
        world.add(rid=f"r{i:02}", max_tokens=1 + i % 3, priority=i % 2)
    world.drain()
    started = [s.rid for s in world.started]
    for level in range(2):
        own = [rid for rid in started if int(rid[1:]) % 2 == level]
        assert own == sorted(own)


# --- tenants


def test_one_tenants_flood_does_not_delay_anothers_first_request():
    world = World(max_running=4, quantum_tokens=2)
    for _ in range(100):
        world.add(max_tokens=8, tenant="a")
    for _ in range(10):
        world.step()
    late = world.add(rid="late", max_tokens=1, tenant="b")
    for _ in range(3):  # a quantum, and a step
        world.step()
    assert world.ended.get((late.rid, 0)) == "length"


def test_without_tenants_everybody_waits_for_who_came_before():
    world = World(max_running=4, quantum_tokens=2)
    for _ in range(100):
        world.add(max_tokens=8)
    late = world.add(max_tokens=1)
    for _ in range(40):
        world.step()
    assert late.admitted_s is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 20), st.integers(1, 12)), min_size=40, max_size=80))
def test_tenants_that_keep_waiting_get_equal_shares_within_what_slots_hold(requests):
    world = World(num_pages=300, max_model_len=40, max_running=3, quantum_tokens=2, max_step_tokens=64)
    for tenant, num_prompt, max_tokens in requests:
        world.add(num_prompt, max_tokens, tenant=tenant)
    tenants = world.scheduler.tenants
    # each running sequence may be ahead by what it computes before it has to give way
    bound = 3 * (20 + tenants.output_weight * (2 + 1)) + 20
    while len(world.scheduler.roster.waiting_by_tenant) == 2:
        world.step()
        assert abs(tenants.served("a") - tenants.served("b")) <= bound
    world.drain()


def test_a_tenant_that_was_away_has_no_claim_for_that_time():
    tenants = Tenants(output_weight=2.0)
    tenants.enter("a")
    tenants.charge("a", 100, 50)
    tenants.enter("b")
    assert tenants.served("b") == tenants.served("a") == 200.0
    tenants.charge("b", 10, 0)
    tenants.leave("b")
    tenants.charge("a", 5, 0)
    tenants.enter("b")
    assert tenants.served("b") == 210.0  # in debt still
    tenants.leave("a"), tenants.leave("b")
    tenants.enter("c")
    assert tenants.served("c") == 0.0 and len(tenants) == 1


def test_tenants_that_are_gone_and_not_in_debt_are_forgotten():
    tenants = Tenants()
    tenants.enter("stays")
    tenants.charge("stays", 10**9, 0)
    for i in range(10_000):
        tenants.enter(f"t{i}")
        tenants.charge(f"t{i}", i % 100, 0)
        tenants.leave(f"t{i}")
        tenants.charge("stays", 1, 0)
    assert len(tenants._served) < 500


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "discard", "charge"]), st.integers(0, 5), st.integers(0, 9))))
def test_the_least_served_is_always_known(actions):
    tenants, names = Tenants(), set()
    order = LeastServed(tenants)
    for i in range(6):
        tenants.enter(str(i))
    for action, number, amount in actions:
        if action == "charge":
            tenants.charge(str(number), amount, 0)
        else:
            getattr(order, action)(str(number))
            (names.add if action == "add" else names.discard)(str(number))
        least = min((tenants.served(name) for name in names), default=None)
        found = order.first()
        assert (found is None) == (least is None) and (found is None or tenants.served(found) == least)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_lanes_hold_what_was_put_in_and_begin_with_the_best(data):
    tenants, members = Tenants(), []
    lanes = Lanes(tenants)
    for name in "ab":
        tenants.enter(name)
    for number in range(data.draw(st.integers(1, 60))):
        action = data.draw(st.sampled_from(["add", "add", "remove", "charge"]))
        if action == "add":
            fields = {"priority": data.draw(st.integers(-1, 1)), "tenant": data.draw(st.sampled_from("ab"))}
            sequence = Sequence(Generate("r", [1], SamplingParams(), **fields), 0, 0, frozenset())
            sequence.ticket = data.draw(st.integers(-100, 100)) * 1000 + number
            lanes.add(sequence)
            members.append(sequence)
        elif action == "remove" and members:
            lanes.remove(members.pop(data.draw(st.integers(0, len(members) - 1))))
        elif action == "charge":
            tenants.charge(data.draw(st.sampled_from("ab")), 1, 0)
        assert list(lanes) == members and len(lanes) == len(members)
        assert lanes.levels == sorted({s.level for s in members})
        first = lanes.first()
        if members:
            least = min(members, key=lambda s: (s.level, tenants.served(s.tenant)))
            assert (first.level, tenants.served(first.tenant)) == (least.level, tenants.served(least.tenant))
            own = [s for s in members if (s.level, s.tenant) == (first.level, first.tenant)]
            assert first is min(own, key=lambda s: s.ticket)
        assert lanes.num_before(0) == sum(s.level < 0 for s in members)
    assert len(members) or lanes.first() is None


# --- deadlines


def test_a_sequence_ends_at_its_deadline_wherever_it_is_and_leaves_nothing():
    world = World(max_running=1, quantum_tokens=100)
    world.add(rid="runs", max_tokens=50, timeout_s=3.0)
    world.add(rid="waits", max_tokens=50, timeout_s=2.0)
    world.add(rid="no limit", max_tokens=2)
    world.drain()
    assert world.ended == {("runs", 0): "timeout", ("waits", 0): "timeout", ("no limit", 0): "length"}
    assert len(world.tokens["runs", 0]) == 3 and world.tokens["waits", 0] == []


def test_deadlines_of_requests_that_end_in_time_do_not_pile_up():
    world = World()
    for _ in range(1000):
        world.add(max_tokens=1, timeout_s=1e6)
        world.step()
    assert len(world.scheduler.roster._deadlines) < 200


# --- work conservation


def test_a_step_uses_its_whole_budget_while_there_are_prompts():
    world = World(num_pages=512, max_running=8, max_step_tokens=16, quantum_tokens=100)
    for _ in range(8):
        world.add(num_prompt=30, max_tokens=5)
    while any(s.num_wanted > 1 for s in world.live.values()):
        batch = world.step()
        left = sum(s.num_wanted for s in world.scheduler.running if s.num_wanted > 1)
        assert batch.num_tokens == 16 or not left


def test_many_short_prompts_share_one_step():
    world = World(num_pages=512, max_running=32, max_step_tokens=128)
    for _ in range(32):
        world.add(num_prompt=4, max_tokens=1)
    assert len(world.step().rows) == 32


def test_sequences_that_decode_are_in_every_step_and_no_step_is_longer_than_its_limit():
    world = World(num_pages=512, max_running=8, max_step_tokens=16, quantum_tokens=100)
    world.add(rid="decodes", max_tokens=30)
    world.step()
    for _ in range(6):
        world.add(num_prompt=60, max_tokens=1)
    for _ in range(25):
        batch = world.step()
        assert "decodes" in rids(batch) and batch.num_tokens <= 16


def test_a_tenants_short_prompt_is_computed_before_the_rest_of_anothers_long_ones():
    world = World(num_pages=512, max_running=8, max_step_tokens=16)
    for _ in range(4):
        world.add(num_prompt=60, max_tokens=1, tenant="a")
    world.step()
    world.add(rid="short", num_prompt=4, max_tokens=1, tenant="b")
    assert "short" in rids(world.step()) + rids(world.step())


def test_small_ones_overtake_one_that_waits_for_pages_until_they_could_hold_what_it_needs():
    world = World(num_pages=16, max_model_len=64, max_running=8, quantum_tokens=1000)
    world.add(rid="long", num_prompt=30, max_tokens=10)
    world.step()
    big = world.add(rid="big", num_prompt=50, max_tokens=1)  # 13 pages, 8 are free
    for i in range(40):
        world.add(rid=f"s{i}", num_prompt=3, max_tokens=1)
    while big.admitted_s is None:
        world.step()
    # one page each for ever: 13 of them and no more
    assert 0 < world.started.index(big) - 1 == big.num_overtaken <= 13
    world.drain()
    assert Counter(world.ended.values()) == {"length": 42}


# --- the queue's bounds, and what is told of them


def test_a_flood_leaves_room_for_others_and_a_single_user_gets_all_of_the_queue():
    world = World()
    forecast = Forecast(world.scheduler, max_queue=100)

    def fill(tenant):
        num = 0
        while forecast.has_place(tenant):
            world.add(tenant=tenant)
            num += 1
        return num

    assert [fill(tenant) for tenant in "abcd"] == [50, 25, 13, 6]
    assert fill("") == 6


def overloaded(world, forecast, num_steps, arrivals=2):
    """Steps with more arrivals than can be served, and forecasts kept up to date."""
    for _ in range(num_steps):
        for _ in range(arrivals):
            if forecast.has_place(""):
                world.add(num_prompt=4, max_tokens=4)
        forecast.step(world.step().num_tokens, 1.0)


def test_retry_after_is_when_a_place_falls_free():
    world = World(max_running=4, quantum_tokens=100)
    forecast = Forecast(world.scheduler, max_queue=20)
    overloaded(world, forecast, 100)
    while forecast.has_place(""):
        world.add(num_prompt=4, max_tokens=4)
    # 4 slots, 4 steps each: a start a second
    first, second = (forecast.refuse("")[1] for _ in range(2))
    assert first == pytest.approx(1.0, abs=0.3) and second == pytest.approx(2.0, abs=0.6)
    told = [forecast.refuse("")[1] for _ in range(1000)]
    assert told == sorted(told) and told[-1] == 60.0  # longer waits are not obeyed


def test_a_plan_says_when_a_request_would_start_and_have_its_first_token():
    world = World(max_running=4, quantum_tokens=100, num_pages=400)
    forecast = Forecast(world.scheduler, max_queue=20)
    request = Generate("x", [7] * 10, SamplingParams(max_tokens=1000))
    empty = forecast.plan(request, None)
    assert (empty.wait_s, empty.first_token_s, empty.queue_position, empty.max_tokens) == (0.0, None, 0, 54)
    overloaded(world, forecast, 100)
    ahead = world.scheduler.num_waiting
    plan = forecast.plan(request, None)
    assert plan.queue_position == plan.waiting == ahead
    sequence = world.add(10, 5, rid="x")
    arrived_s = world.now_s
    while sequence.first_token_s is None:
        world.step()
    assert plan.wait_s == pytest.approx(sequence.admitted_s - arrived_s, rel=0.3)
    assert plan.first_token_s == pytest.approx(sequence.first_token_s + 1 - arrived_s, rel=0.3)


def test_a_plan_counts_cached_tokens_and_says_what_does_not_fit():
    world = World()
    forecast = Forecast(world.scheduler, max_queue=20)
    world.add(20, 1, kind=1)
    world.drain()
    ids = [1_000_000 + i for i in range(20)]
    plan = forecast.plan(Generate("x", ids, SamplingParams(max_tokens=3)), None)
    assert (plan.cached_tokens, plan.fits, plan.pages, plan.free_pages) == (16, True, 6, 64)
    assert forecast.plan(Generate("x", ids, SamplingParams(), cache_salt="s"), None).cached_tokens == 0
    long = forecast.plan(Generate("x", [1] * 80, SamplingParams()), ("too_long", "80 tokens are too many"))
    assert (long.fits, long.code, long.max_tokens, long.wait_s) == (False, "too_long", 0, None)


def test_the_work_of_a_step_does_not_grow_with_the_queue():
    def calls_of_a_step(num_waiting):
        world = World(max_running=8, num_pages=64, quantum_tokens=2)
        for i in range(num_waiting):
            world.add(num_prompt=8, max_tokens=50, tenant=f"t{i % 10}", priority=i % 3, timeout_s=1e6)
        counts = []
        for _ in range(12):
            num_calls = 0

            def count(frame, event, argument):
                nonlocal num_calls
                num_calls += event in ("call", "c_call")

            sys.setprofile(count)
            try:
                batch = world.scheduler.plan()
                outputs = world.scheduler.commit(batch, [Picked(1 if row.samples else None) for row in batch.rows])
            finally:
                sys.setprofile(None)
            assert batch.rows and not any(output.finish_reason for output in outputs)
            counts.append(num_calls)
        return max(counts)

    assert calls_of_a_step(20_000) < 1.2 * calls_of_a_step(200)
