"""Steps launched before the ones before are read: when they are, what becomes of rows too many, what faults cost."""

import msgspec
import pytest

from crane.runtime.types import Accepted, Generate, SamplingParams, Thinking
from tests.runtime.test_engine import PROMPTS, make_engine
from tests.tiny import make_tiny

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, top_k=40, top_p=0.95, min_p=0.01, seed=7, max_tokens=24, logprobs=2,
                         min_tokens=3, logit_bias={5: 2.0}, repetition_penalty=1.1, ignore_eos=True)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3")


def requests(params, **fields):
    return [Generate(f"r{i}", prompt, params, **fields) for i, prompt in enumerate(PROMPTS)]


def run(engine, asked, wait_between=0):
    """{(rid, index): (tokens, last output)}; so many steps are taken before the next request comes."""
    found, waiting = {}, list(asked)
    while engine.has_work or waiting:
        if waiting:
            request = waiting.pop(0)
            assert engine.add(request) == Accepted(request.rid)
        for _ in range(wait_between if waiting else 1):
            for output in engine.step():
                tokens, _ = found.get((output.rid, output.index), ([], None))
                found[output.rid, output.index] = tokens + output.token_ids, output
            engine.scheduler.check()
    assert not engine.scheduler.flights and engine.scheduler.pool.num_free == engine.info.num_pages
    return found


def tokens_of(found):
    return {key: tokens for key, (tokens, _) in found.items()}


def test_every_step_but_the_first_runs_ahead_and_gives_the_same(tiny):
    expected = run(make_engine(tiny, overlap="off"), requests(SAMPLED))
    engine = make_engine(tiny, overlap="on")
    found = run(engine, requests(SAMPLED))
    assert tokens_of(found) == tokens_of(expected)
    stats = engine.stats()
    assert stats.overlap == {"on": True, "why_off": None, "steps_ahead": stats.steps - 1, "steps_alone": {}}
    assert stats.generated_tokens == sum(map(len, tokens_of(found).values()))


def test_requests_that_come_while_others_decode_join_them(tiny):
    expected = tokens_of(run(make_engine(tiny), requests(GREEDY)))
    engine = make_engine(tiny, overlap="on")
    assert tokens_of(run(engine, requests(GREEDY), wait_between=2)) == expected
    assert engine.stats().overlap["steps_ahead"] == engine.stats().steps - 1


def test_rows_behind_an_unforeseen_end_are_void_and_count_nowhere(tiny):
    free = tokens_of(run(make_engine(tiny), requests(GREEDY)))
    asked = [msgspec.structs.replace(request, sampling=msgspec.structs.replace(
        GREEDY, stop_token_ids=(free[request.rid, 0][3 + i % 4],))) for i, request in enumerate(requests(GREEDY))]
    expected = run(make_engine(tiny, overlap="off"), asked)
    engine, void = make_engine(tiny, overlap="on"), []
    commit = engine.scheduler.commit

    def watch(batch, picked):
        outputs = commit(batch, picked)
        void.extend(row for row in batch.rows if row.void)
        return outputs

    engine.scheduler.commit = watch
    found = run(engine, asked)
    assert tokens_of(found) == tokens_of(expected)
    assert {key: last.finish_reason for key, (_, last) in found.items()} == {key: "stop" for key in found}
    assert len(void) >= len(asked) - 3
    counts = engine.metrics()["histograms"]
    num_tokens = sum(map(len, tokens_of(found).values()))
    assert sum(counts["inter_token_latency_seconds"]["counts"]) == num_tokens - len(asked)
    assert engine.stats().generated_tokens == num_tokens


@pytest.mark.parametrize("sampling, why", [
    (dict(grammar="start: /[a-c]{1,9}/"), "a grammar or a thinking budget needs each token at once"),
    (dict(thinking=Thinking((1,), (2,), True, 3)), "a grammar or a thinking budget needs each token at once"),
    (dict(num_draft_tokens=4), "drafts follow tokens that are known"),
])  # fmt: skip
def test_a_step_whose_tokens_the_host_needs_is_alone_and_says_why(tiny, sampling, why):
    asked = requests(GREEDY)
    asked[1] = Generate("special", PROMPTS[1] * 3, msgspec.structs.replace(GREEDY, **sampling))
    expected = run(make_engine(tiny, overlap="off"), asked)
    engine = make_engine(tiny, overlap="on")
    assert tokens_of(run(engine, asked)) == tokens_of(expected)
    assert list(engine.stats().overlap["steps_alone"]) == [why]


def test_hidden_states_and_prompt_log_probabilities_come_from_overlapped_steps(tiny):
    params = msgspec.structs.replace(GREEDY, logprobs=1, prompt_logprobs=True)
    asked = [*requests(params), *[Generate(kind, PROMPTS[3] * 3, GREEDY, kind) for kind in ("mean", "last")]]
    options = {"max_step_tokens": 8, "max_concurrent": 8}
    expected = run(make_engine(tiny, **options), asked)
    engine = make_engine(tiny, overlap="on", **options)
    found = run(engine, asked)
    assert tokens_of(found) == tokens_of(expected)
    for kind in ("mean", "last"):
        assert found[kind, 0][1].embedding == pytest.approx(expected[kind, 0][1].embedding, abs=1e-5)
    assert engine.stats().overlap["steps_ahead"] == engine.stats().steps - 1


@pytest.mark.parametrize("where", ["launch", "collect"])
@pytest.mark.parametrize("error", [RuntimeError("once"), MemoryError()], ids=["fault", "memory"])
def test_a_fault_in_a_launched_step_costs_nobody_anything(tiny, where, error, monkeypatch):
    monkeypatch.setattr("crane.runtime.overlap.CALM_STEPS", 4)
    asked = [*requests(SAMPLED), Generate("mean", PROMPTS[3] * 3, GREEDY, "mean")]
    options = {"max_step_tokens": 16, "max_concurrent": 16}
    expected = run(make_engine(tiny, **options), asked)
    engine = make_engine(tiny, overlap="on", **options)
    call, count = getattr(engine.runner, where), iter(range(10_000))

    def break_at_times(*args):
        result = call(*args)
        if next(count) % 7 == 5:
            raise error
        return result

    setattr(engine.runner, where, break_at_times)
    found = run(engine, asked)
    assert tokens_of(found) == tokens_of(expected)
    assert found["mean", 0][1].embedding == pytest.approx(expected["mean", 0][1].embedding, abs=1e-5)
    stats = engine.stats()
    assert stats.step_faults >= 3 and stats.failed_requests == 0
    assert stats.overlap["steps_alone"] and stats.overlap["steps_ahead"] > 3


def test_a_request_that_breaks_every_step_fails_alone(tiny):
    expected = tokens_of(run(make_engine(tiny), requests(SAMPLED)))
    engine = make_engine(tiny, overlap="on")
    collect, compute = engine.runner.collect, engine.runner.run

    def poisoned(sequences):
        if any(s.rid == "poison" and s.num_output >= 3 for s in sequences):
            raise RuntimeError("a bad row")

    engine.runner.collect = lambda step: (poisoned(step.places), collect(step))[1]
    engine.runner.run = lambda batch: (poisoned(row.sequence for row in batch.rows), compute(batch))[1]
    found = run(engine, [Generate("poison", [250] * 20, SAMPLED), *requests(SAMPLED)])
    assert found.pop(("poison", 0))[1].finish_reason == "error"
    assert tokens_of(found) == expected and engine.stats().failed_requests == 1


def test_all_may_leave_while_a_step_is_on_its_way(tiny):
    engine = make_engine(tiny, overlap="on")
    for request in requests(GREEDY):
        engine.add(request)
    for _ in range(3):
        engine.step()
    assert engine.scheduler.flights
    assert len(engine.abort(None)) == len(PROMPTS) and not engine.has_work
    assert not engine.scheduler.flights and not len(engine.runner._sums)
    engine.rest()
    assert engine.stats().ledger_faults == 0
    assert tokens_of(run(engine, requests(GREEDY))) == tokens_of(run(make_engine(tiny), requests(GREEDY)))


def test_it_is_off_on_a_cpu_unless_asked_for(tiny):
    assert make_engine(tiny).stats().overlap["why_off"] == "on cpu the host would wait for what it launches"
    assert make_engine(tiny, overlap="off").stats().overlap["why_off"] == "ruled out"


@pytest.mark.parametrize("penalty", [
    {"repetition_penalty": 1.3}, {"presence_penalty": 1.5}, {"frequency_penalty": 0.4, "presence_penalty": -0.3},
], ids=["repetition", "presence", "both"])  # fmt: skip
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_penalties_count_tokens_that_only_the_device_knows(tiny, penalty, temperature):
    """New ones, those of the prompt, those the output has, and those with a bias; beside rows without penalties."""
    bias = {token_id: 4.0 for token_id in range(0, 300, 7)}
    params = SamplingParams(temperature=temperature, top_k=20, seed=1, max_tokens=40, ignore_eos=True, logit_bias=bias)
    asked = requests(msgspec.structs.replace(params, **penalty))
    asked[::3] = requests(params)[::3]
    expected = tokens_of(run(make_engine(tiny, overlap="off"), asked))
    engine = make_engine(tiny, overlap="on")
    assert tokens_of(run(engine, asked)) == expected
    assert engine.stats().overlap["steps_ahead"] == engine.stats().steps - 1
    assert expected != tokens_of(run(make_engine(tiny), requests(params))), "the penalties change nothing here"
    assert any(len(set(ids)) < len(ids) and set(ids) & set(bias) for ids in expected.values())


@pytest.mark.parametrize("number", [0, 4, 9])
def test_a_cache_that_is_lost_while_a_step_runs_ends_all_and_serves_on(tiny, number):
    engine = make_engine(tiny, overlap="on")
    expected = tokens_of(run(engine, requests(GREEDY)))
    move, count = engine.memory.move, iter(range(10_000))

    def break_once(copies):
        if next(count) == number:
            raise RuntimeError("no copy")
        move(copies)

    engine.memory.move = break_once
    found = run(engine, requests(GREEDY))
    assert {last.finish_reason for _, last in found.values()} == {"error"} and found.keys() == expected.keys()
    assert engine.stats().failed_requests == len(PROMPTS) and engine.stats().step_faults == 0
    assert tokens_of(run(engine, requests(GREEDY))) == expected
