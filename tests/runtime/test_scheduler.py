"""Scheduler: no model, no tensors. A scripted "runner" invents tokens."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from crane.runtime.batch import Picked
from crane.runtime.pages import PagePool
from crane.runtime.scheduler import Scheduler
from crane.runtime.sequence import Sequence, Status
from crane.runtime.types import Generate, SamplingParams

EOS = 7


def make_scheduler(num_pages=64, page_size=4, max_running=4, quantum_tokens=2, max_step_tokens=16, max_model_len=64,
                   **options):
    return Scheduler(
        PagePool(num_pages, page_size), max_running=max_running, quantum_tokens=quantum_tokens,
        max_step_tokens=max_step_tokens, max_model_len=max_model_len, **options,
    )


def prompt(num_tokens, kind):
    """Tokens that differ from position to position and, from the first on, from kind to kind."""
    return [10_000 + 1000 * kind + i for i in range(num_tokens)]


def add(scheduler, rid, num_prompt=4, kind=None, salt="", n=1, **sampling):
    """A request of n choices; its prompt is like no other unless a kind is given."""
    ids = prompt(num_prompt, kind if kind is not None else 100 + int.from_bytes(rid.encode()))
    request = Generate(rid, ids, SamplingParams(n=n, **sampling), cache_salt=salt)
    sequences = [Sequence(request, index, 0, frozenset({EOS})) for index in range(n)]
    for sequence in sequences:
        sequence.leader = sequences[0] if sequence is not sequences[0] else None
        scheduler.enqueue(sequence)
    return sequences[0]


def token_for(sequence):
    """A scripted model: the next token depends on the position only."""
    return 1000 + len(sequence.token_ids)


def step(scheduler, token=token_for):
    batch = scheduler.plan()
    picked = [Picked(token(row.sequence) if row.samples else None) for row in batch.rows]
    outputs = scheduler.commit(batch, picked)
    scheduler.check()
    return batch, outputs


def drain(scheduler, limit=10_000):
    outputs = []
    for _ in range(limit):
        if not scheduler.has_work:
            return outputs
        batch, new = step(scheduler)
        assert batch.rows, "there is work, but the step is empty"
        outputs += new
    raise AssertionError("the scheduler does not come to an end")


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks():
    scheduler = make_scheduler(max_step_tokens=16)
    add(scheduler, "a", num_prompt=40, max_tokens=2)
    counts = [[(row.start, row.count, row.samples) for row in step(scheduler)[0].rows] for _ in range(4)]
    assert counts == [[(0, 16, False)], [(16, 16, False)], [(32, 8, True)], [(40, 1, True)]]


def test_prompts_share_a_step_with_sequences_that_decode():
    scheduler = make_scheduler(max_step_tokens=16)
    add(scheduler, "a", num_prompt=4, max_tokens=9)
    step(scheduler)
    add(scheduler, "b", num_prompt=30, max_tokens=9)
    batch, _ = step(scheduler)
    assert [(row.sequence.rid, row.count) for row in batch.rows] == [("a", 1), ("b", 15)]


def test_sequences_take_turns_after_their_quantum_when_more_want_to_run_than_fit():
    scheduler = make_scheduler(max_running=1, quantum_tokens=2)
    for rid in "abc":
        add(scheduler, rid, max_tokens=4)
    order = [row.sequence.rid for _ in range(9) for row in step(scheduler)[0].rows]
    assert "".join(order) == "aabbccaab"


def test_a_sequence_that_gives_way_keeps_its_pages_and_recomputes_nothing():
    scheduler = make_scheduler(max_running=1, quantum_tokens=1)
    first, _ = add(scheduler, "a", max_tokens=3), add(scheduler, "b", max_tokens=3)
    counts = [(row.sequence.rid, row.count) for _ in range(6) for row in step(scheduler)[0].rows]
    assert counts == [("a", 4), ("b", 4), ("a", 1), ("b", 1), ("a", 1), ("b", 1)]
    assert scheduler.num_preemptions == 0 and first.status is Status.FINISHED


def test_nobody_gives_way_while_no_one_waits():
    scheduler = make_scheduler(max_running=2, quantum_tokens=1)
    add(scheduler, "a", max_tokens=5), add(scheduler, "b", max_tokens=5)
    assert all(len(step(scheduler)[0].rows) == 2 for _ in range(5))


def test_finished_and_aborted_sequences_return_their_pages_in_the_same_step():
    scheduler = make_scheduler()
    add(scheduler, "a", max_tokens=1), add(scheduler, "b", max_tokens=50)
    _, outputs = step(scheduler)
    assert {o.rid: o.finish_reason for o in outputs} == {"a": "length", "b": None}
    held = scheduler.pool.num_pages - scheduler.pool.num_free
    assert held == scheduler.pool.pages_for(4)
    (ended,) = scheduler.end(scheduler.find("b"), "abort")
    assert ended.finish_reason == "abort" and ended.usage.completion_tokens == 1
    assert scheduler.pool.num_free == scheduler.pool.num_pages


def test_running_out_of_pages_recomputes_the_last_comer_and_changes_no_token():
    scheduler = make_scheduler(num_pages=8, page_size=4, max_running=4, max_model_len=32)
    for rid in "abc":
        add(scheduler, rid, num_prompt=6, max_tokens=12)
    outputs = drain(scheduler)
    assert scheduler.num_preemptions > 0
    ended = [o.usage.num_preemptions for o in outputs if o.finish_reason]
    assert sum(ended) == scheduler.num_preemptions and ended.count(0) > 0
    for rid in "abc":
        tokens = [t for o in outputs if o.rid == rid for t in o.token_ids]
        assert tokens == [1000 + 6 + i for i in range(12)]
    assert scheduler.pool.num_free == 8


def test_the_first_comer_is_never_the_one_that_gives_up_its_pages():
    scheduler = make_scheduler(num_pages=8, page_size=4, max_running=4, max_model_len=32)
    first = add(scheduler, "a", num_prompt=6, max_tokens=20)
    for rid in "bcd":
        add(scheduler, rid, num_prompt=6, max_tokens=20)
    computed = 0
    while first.status is not Status.FINISHED:
        step(scheduler)
        if first.status is not Status.FINISHED:
            assert first.num_computed > computed
            computed = first.num_computed


@pytest.mark.parametrize(
    "sampling, tokens, reason, matched",
    [
        ({"max_tokens": 3}, [1, 2, 3, 4], "length", None),
        ({"max_tokens": 9}, [1, EOS], "stop", EOS),
        ({"max_tokens": 2}, [1, EOS], "stop", EOS),
        ({"max_tokens": 3, "ignore_eos": True}, [1, EOS, 2], "length", None),
        ({"max_tokens": 9, "stop_token_ids": (5,)}, [1, 5], "stop", 5),
        ({"max_tokens": 9, "min_tokens": 2}, [EOS, 1, EOS], "stop", EOS),
    ],
)
def test_end_of_a_sequence(sampling, tokens, reason, matched):
    scheduler = make_scheduler()
    sequence = add(scheduler, "a", **sampling)
    script, got, last = iter(tokens), [], None
    while scheduler.has_work:
        _, outputs = step(scheduler, lambda s: next(script))
        got += outputs[0].token_ids
        last = outputs[0]
    assert got == tokens[: len(got)] and (last.finish_reason, last.matched_id) == (reason, matched)
    assert last.usage.completion_tokens == len(got) == sequence.num_output
    if reason == "length":
        assert len(got) == sampling["max_tokens"]


def test_max_tokens_is_cut_to_what_the_context_leaves():
    scheduler = make_scheduler(max_model_len=16)
    add(scheduler, "a", num_prompt=10, max_tokens=1000)
    outputs = drain(scheduler)
    assert sum(len(o.token_ids) for o in outputs) == 6 and outputs[-1].finish_reason == "length"


def test_max_tokens_zero_computes_the_prompt_and_draws_nothing():
    scheduler = make_scheduler()
    add(scheduler, "a", num_prompt=20, max_tokens=0)
    outputs = drain(scheduler)
    assert [(o.token_ids, o.finish_reason) for o in outputs] == [([], "length")]


def rows_of(batch):
    return [(row.sequence.rid, row.start, row.count) for row in batch.rows]


def test_a_prompt_that_was_computed_before_is_computed_from_where_it_differs():
    scheduler = make_scheduler(max_step_tokens=64)
    add(scheduler, "a", 18, kind=1, max_tokens=3)
    drain(scheduler)
    again = add(scheduler, "b", 18, kind=1, max_tokens=3)
    longer = add(scheduler, "c", 30, kind=1, max_tokens=3)
    other = add(scheduler, "d", 18, kind=2, max_tokens=3)
    batch, _ = step(scheduler)
    assert rows_of(batch) == [("b", 16, 2), ("c", 16, 14), ("d", 0, 18)]
    assert again.pages[:4] == longer.pages[:4] and not set(other.pages) & set(longer.pages)
    outputs = drain(scheduler)
    assert {o.rid: o.usage.cached_tokens for o in outputs if o.usage} == {"b": 16, "c": 16, "d": 0}
    assert scheduler.tables.num_cached_tokens == 32


def test_a_prompt_of_whole_pages_still_computes_its_last_token():
    scheduler = make_scheduler()
    for rid in "ab":
        add(scheduler, rid, 16, kind=1, max_tokens=1)
        batch, _ = step(scheduler)
    assert rows_of(batch) == [("b", 12, 4)]


def test_the_next_turn_of_a_chat_finds_prompt_and_answer():
    scheduler = make_scheduler()
    first = add(scheduler, "a", 10, kind=1, max_tokens=8)
    drain(scheduler)
    request = Generate("b", first.token_ids + [1, 2, 3], SamplingParams(max_tokens=1))
    scheduler.enqueue(Sequence(request, 0, 0, frozenset()))
    batch, _ = step(scheduler)
    assert rows_of(batch) == [("b", 16, 5)]  # 18 tokens were there; the last was never computed


def test_requests_in_flight_share_what_is_computed_already_and_keep_one_copy():
    scheduler = make_scheduler(max_step_tokens=16)
    one, two = add(scheduler, "a", 14, kind=1, max_tokens=5), add(scheduler, "b", 14, kind=1, max_tokens=5)
    for _ in range(3):
        step(scheduler)
    assert one.pages[:3] == two.pages[:3] and one.pages[3] != two.pages[3]
    drain(scheduler)
    assert scheduler.pool.num_free == scheduler.pool.num_pages


def test_other_salts_and_switched_off_caches_share_nothing():
    for options, salts in (({}, ("x", "y")), ({"prefix_cache": False}, ("x", "x"))):
        scheduler = make_scheduler(max_step_tokens=64, **options)
        for rid, salt in zip("ab", salts):
            add(scheduler, rid, 20, kind=1, salt=salt, max_tokens=1)
            assert rows_of(step(scheduler)[0]) == [(rid, 0, 20)]


def test_prompt_logprobs_compute_the_whole_prompt_once_for_all_choices():
    scheduler = make_scheduler(max_step_tokens=64)
    add(scheduler, "a", 20, kind=1, max_tokens=1)
    drain(scheduler)
    add(scheduler, "b", 20, kind=1, max_tokens=1, logprobs=0, prompt_logprobs=True)
    assert rows_of(step(scheduler)[0]) == [("b", 0, 20)]


def test_choices_wait_for_the_first_and_then_share_its_prompt():
    scheduler = make_scheduler(max_step_tokens=8)
    add(scheduler, "a", 18, n=3, max_tokens=4)
    assert [rows_of(step(scheduler)[0]) for _ in range(3)] == [[("a", 0, 8)], [("a", 8, 8)], [("a", 16, 2)]]
    # all but the last token: 4 shared pages, and a copy of the one that the first goes on to fill
    assert rows_of(step(scheduler)[0]) == [("a", 18, 1), ("a", 17, 1), ("a", 17, 1)]
    outputs = drain(scheduler)
    assert {o.index: o.usage.cached_tokens for o in outputs if o.usage} == {0: 0, 1: 17, 2: 17}


def test_choices_go_on_when_the_first_is_aborted_before_its_prompt_is_computed():
    scheduler = make_scheduler(max_step_tokens=8)
    first = add(scheduler, "a", 18, n=2, max_tokens=4)
    step(scheduler)
    scheduler.end([first], "abort")
    assert {o.index for o in drain(scheduler) if o.finish_reason} == {1}


def test_remembered_pages_give_way_to_new_ones_the_least_recently_used_first():
    scheduler = make_scheduler(num_pages=16, max_running=1, max_step_tokens=64)
    for rid, kind in (("a", 1), ("b", 2), ("c", 1)):  # 1 is used again: 2 is older now
        add(scheduler, rid, 20, kind=kind, max_tokens=1)
        drain(scheduler)
    add(scheduler, "d", 42, kind=3, max_tokens=1)
    drain(scheduler)
    cached = {}
    for rid, kind in (("e", 1), ("f", 2)):
        cached[kind] = len(scheduler.pool.match(prompt(20, kind)))
    assert cached[1] > 0 and cached[2] == 0


def test_flushing_forgets_what_nobody_holds_and_spares_who_runs():
    scheduler = make_scheduler(max_step_tokens=64)
    add(scheduler, "a", 20, kind=1, max_tokens=1)
    drain(scheduler)
    running = add(scheduler, "b", 20, kind=2, max_tokens=9)
    step(scheduler)
    assert scheduler.flush() == 5 and scheduler.pool.num_kept == 0
    scheduler.check()
    assert scheduler.pool.match(prompt(20, 1)) == scheduler.pool.match(prompt(20, 2)) == []
    outputs = drain(scheduler)
    assert sum(len(o.token_ids) for o in outputs) == 8 and running.status is Status.FINISHED


class SchedulerMachine(RuleBasedStateMachine):
    """Random submits, steps and aborts; every sequence must give exactly its own tokens, and pages must add up."""

    def __init__(self):
        super().__init__()
        self.scheduler = make_scheduler(num_pages=10, page_size=4, max_running=3, quantum_tokens=3,
                                        max_step_tokens=8, max_model_len=40)
        self.live: dict[str, Sequence] = {}
        self.tokens: dict[str, list[int]] = {}
        self.num_added = 0

    @rule(num_prompt=st.integers(1, 39), max_tokens=st.integers(1, 40), kind=st.sampled_from([None, 0, 1]),
          salt=st.sampled_from(["", "s"]))
    def submit(self, num_prompt, max_tokens, kind, salt):
        rid = f"r{self.num_added}"
        self.num_added += 1
        self.live[rid] = add(self.scheduler, rid, num_prompt, kind, salt, max_tokens=max_tokens)
        self.tokens[rid] = []

    @rule()
    def flush(self):
        self.scheduler.flush()

    @rule()
    def step(self):
        had_work = self.scheduler.has_work
        batch, outputs = step(self.scheduler)
        assert bool(batch.rows) == had_work, "the step is idle although something can run"
        assert batch.num_tokens <= self.scheduler.max_step_tokens
        for output in outputs:
            self.tokens[output.rid] += output.token_ids
            if output.finish_reason:
                sequence = self.live.pop(output.rid)
                expected = [1000 + sequence.num_prompt + i for i in range(sequence.max_tokens)]
                assert self.tokens[output.rid] == expected

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data):
        rid = data.draw(st.sampled_from(sorted(self.live)))
        (output,) = self.scheduler.end(self.scheduler.find(rid), "abort")
        assert output.finish_reason == "abort"
        del self.live[rid]

    @invariant()
    def ledger_adds_up(self):
        self.scheduler.check()
        assert {s.rid for s in self.scheduler.find(None)} == set(self.live)

    def teardown(self):
        drain(self.scheduler)
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_pages


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
