"""Engine on a tiny real model in float32: what a request gets must not depend on what happens around it."""

import math

import pytest
import torch

from crane.runtime.engine import Engine
from crane.runtime.settings import Settings
from crane.runtime.types import Accepted, Generate, Rejected, SamplingParams
from tests.tiny import make_tiny

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=7, max_tokens=24,
                         ignore_eos=True)
PROMPTS = [[(7 * i + 13 * j) % 300 for j in range(3 + 5 * i)] for i in range(8)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3")


def make_engine(tiny, **settings):
    chosen = dict(dtype="float32", cpu=True, threads=1, max_model_len=256) | settings
    return Engine(Settings(model_path=str(tiny), **chosen))


def run(engine, requests):
    """Tokens and last outputs of all requests: {(rid, index): ([token_ids], output)}."""
    for request in requests:
        assert engine.add(request) == Accepted(request.rid)
    tokens, last = {}, {}
    while engine.has_work:
        for output in engine.step():
            key = (output.rid, output.index)
            tokens.setdefault(key, []).extend(output.token_ids)
            last[key] = output
        engine.scheduler.check()
    assert engine.scheduler.pool.num_free == engine.info.num_pages
    return {key: (tokens[key], last[key]) for key in tokens}


def requests_for(sampling):
    return [Generate(f"r{i}", prompt, sampling) for i, prompt in enumerate(PROMPTS)]


def alone(tiny, sampling):
    return {
        (request.rid, 0): run(make_engine(tiny), [request])[request.rid, 0][0] for request in requests_for(sampling)
    }


@pytest.fixture(scope="module")
def references(tiny):
    return {"greedy": alone(tiny, GREEDY), "sampled": alone(tiny, SAMPLED)}


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_step_tokens": 8, "max_concurrent": 8},
        {"max_concurrent": 2, "decode_tokens_per_seq": 3},
        # room for 16 pages: sequences have to give way
        {"page_size": 4, "kv_memory": 2 * 16 * 2 * 2 * 4 * 64, "max_model_len": 0, "preemption": "recompute"},
        {"page_size": 4, "kv_memory": 2 * 16 * 2 * 2 * 4 * 64, "max_model_len": 0, "preemption": "swap",
         "host_kv_memory": 1 << 20},
    ],
    ids=["batched", "chunked", "taking turns", "recomputed", "swapped"],
)
def test_output_is_the_same_alone_and_in_company(tiny, references, kind, settings):
    engine = make_engine(tiny, **settings)
    sampling = GREEDY if kind == "greedy" else SAMPLED
    got = run(engine, requests_for(sampling))
    assert {key: tokens for key, (tokens, _) in got.items()} == references[kind]
    if "kv_memory" in settings:
        assert engine.info.num_pages == 16 and engine.stats().preemptions > 0
        assert engine.stats().swaps == (engine.stats().preemptions if settings["preemption"] == "swap" else 0)
        assert engine.stats().free_host_pages == engine.stats().num_host_pages


def test_output_is_the_same_after_neighbours_abort(tiny, references):
    engine = make_engine(tiny)
    for request in requests_for(SAMPLED):
        engine.add(request)
    tokens, aborted = {}, []
    for number in range(1000):
        if not engine.has_work:
            break
        for output in engine.step():
            tokens.setdefault((output.rid, output.index), []).extend(output.token_ids)
        if number in (1, 3, 5):
            aborted += engine.abort(f"r{number}")
        engine.scheduler.check()
    assert [(o.rid, o.finish_reason) for o in aborted] == [("r1", "abort"), ("r3", "abort"), ("r5", "abort")]
    for key, expected in references["sampled"].items():
        if key[0] not in ("r1", "r3", "r5"):
            assert tokens[key] == expected
    assert engine.scheduler.pool.num_free == engine.info.num_pages


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_output_is_the_same_with_prefixes_found_as_computed(tiny, params):
    start = [(5 * j + 1) % 300 for j in range(50)]
    requests = [Generate(f"r{i}", start[: 20 + 6 * i] + [i, i + 1], params) for i in range(6)]
    cold = {}
    for request in requests:
        cold |= run(make_engine(tiny, prefix_cache=False), [request])
    engine = make_engine(tiny, page_size=4)
    for _ in range(2):
        warm = run(engine, requests)
        assert {key: tokens for key, (tokens, _) in warm.items()} == {key: tokens for key, (tokens, _) in cold.items()}
    assert all(last.usage.cached_tokens >= last.usage.prompt_tokens - 4 for _, last in warm.values())
    assert engine.stats().cached_tokens > 0


def test_choices_of_one_request_differ_and_do_not_depend_on_their_number(tiny):
    import msgspec

    engine = make_engine(tiny)
    three = run(engine, [Generate("a", PROMPTS[2], msgspec.structs.replace(SAMPLED, n=3))])
    one = run(engine, [Generate("b", PROMPTS[2], SAMPLED)])
    assert three["a", 0][0] == one["b", 0][0]
    assert len({tuple(three["a", index][0]) for index in range(3)}) == 3


def test_ending_one_choice_leaves_its_siblings_and_is_no_abort_in_the_stats(tiny):
    import msgspec

    engine = make_engine(tiny)
    engine.add(Generate("a", PROMPTS[2], msgspec.structs.replace(SAMPLED, n=2)))
    engine.step()
    (ended,) = engine.abort("a", 0)
    assert (ended.index, ended.finish_reason, ended.usage.completion_tokens) == (0, "abort", 1)
    got = run(engine, [])
    assert list(got) == [("a", 1)] and len(got["a", 1][0]) == SAMPLED.max_tokens
    assert (engine.stats().completed_requests, engine.stats().aborted_requests) == (1, 0)
    assert engine.abort("a") == [] and engine.abort("nobody") == []


def test_requests_without_a_seed_differ(tiny):
    engine = make_engine(tiny)
    params = SamplingParams(temperature=2.0, max_tokens=16, ignore_eos=True)
    got = run(engine, [Generate(f"r{i}", [1, 2, 3], params) for i in range(4)])
    assert len({tuple(tokens) for tokens, _ in got.values()}) == 4


def test_logprobs_are_those_of_the_raw_distribution_for_output_and_prompt(tiny):
    engine = make_engine(tiny, max_step_tokens=4, max_concurrent=4)
    prompt = PROMPTS[3]
    params = SamplingParams(temperature=0.7, top_k=5, seed=3, repetition_penalty=1.5, max_tokens=6, ignore_eos=True,
                            logprobs=4, prompt_logprobs=True)
    engine.add(Generate("a", prompt, params))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    tokens = [t for o in outputs for t in o.token_ids]
    reference = torch.log_softmax(full_logits(engine, prompt + tokens), -1)
    assert outputs[0].prompt_logprobs[0] is None and len(outputs[0].prompt_logprobs) == len(prompt)
    entries = outputs[0].prompt_logprobs[1:] + [o.logprobs[0] for o in outputs]
    for position, entry in enumerate(entries):
        chosen = (prompt + tokens)[position + 1]
        assert math.isclose(entry.logprob, reference[position, chosen], abs_tol=1e-4)
        best = reference[position].topk(4)
        assert entry.top_ids == best.indices.tolist()
        assert entry.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-4)


def test_logprobs_of_asked_ids_come_with_every_token(tiny):
    engine = make_engine(tiny)
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=0, logprob_ids=(5, 9), prompt_logprobs=True)
    engine.add(Generate("a", PROMPTS[1], params))
    engine.add(Generate("b", PROMPTS[2], SamplingParams(temperature=0.0, max_tokens=3, logprobs=2)))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    mine = [o for o in outputs if o.rid == "a"]
    tokens = PROMPTS[1] + [t for o in mine for t in o.token_ids]
    reference = torch.log_softmax(full_logits(engine, tokens), -1)
    entries = mine[0].prompt_logprobs[1:] + [o.logprobs[0] for o in mine]
    assert len(entries) == len(tokens) - 1
    for position, entry in enumerate(entries):
        assert entry.ids_logprobs == pytest.approx(reference[position, [5, 9]].tolist(), abs=1e-4)
        assert entry.top_ids == []
    other = [o.logprobs[0] for o in outputs if o.rid == "b"]
    assert all(len(entry.top_ids) == 2 and entry.ids_logprobs == [] for entry in other)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("max_step_tokens", [64, 8])
def test_pooling_gives_the_hidden_states_and_draws_nothing(tiny, pooling, max_step_tokens):
    engine = make_engine(tiny, max_step_tokens=max_step_tokens, max_concurrent=4)
    for i, prompt in enumerate(PROMPTS):
        assert engine.add(Generate(f"r{i}", prompt, SamplingParams(), pooling)) == Accepted(f"r{i}")
    engine.add(Generate("text", PROMPTS[0], GREEDY))
    got = {}
    while engine.has_work:
        for output in engine.step():
            if output.rid != "text":
                assert output.token_ids == [] and output.finish_reason == "stop" and output.rid not in got
                got[output.rid] = torch.tensor(output.embedding)
    for i, prompt in enumerate(PROMPTS):
        states = full_hidden(engine, prompt)
        expected = states[-1] if pooling == "last" else states.mean(0)
        torch.testing.assert_close(got[f"r{i}"], expected, rtol=1e-4, atol=1e-4)
    assert engine.add(Generate("bad", [1], SamplingParams(n=2), pooling)).code == "bad_request"
    assert engine.add(Generate("bad", [1], SamplingParams(), "max")).code == "bad_request"


def full_logits(engine, token_ids):
    with torch.inference_mode():
        return engine.runner.model.logits(full_hidden(engine, token_ids))[:, : engine.info.vocab_size]


def full_hidden(engine, token_ids):
    """Hidden states of every position, by another path: one prompt computed whole, in fresh pages."""
    from crane.runtime.batch import Row
    from crane.runtime.runner import Launched
    from crane.runtime.sequence import Sequence

    sequence = Sequence(Generate("x", token_ids, SamplingParams()), 0, 0, frozenset())
    sequence.pages = list(range(engine.scheduler.pool.pages_for(len(token_ids))))
    with torch.inference_mode():
        return engine.runner._hidden([Row(sequence, 0, len(token_ids), False)], [0], Launched([]), False)


def test_penalties_bias_and_minimum_length_act(tiny):
    engine = make_engine(tiny)
    prompt = PROMPTS[1]

    def tokens(**params):
        params = dict(temperature=0.0, max_tokens=30, ignore_eos=True) | params
        return run(engine, [Generate("a", prompt, SamplingParams(**params))])["a", 0][0]

    plain = tokens()
    assert tokens(logit_bias={5: 1000.0}) == [5] * 30
    assert plain[0] not in tokens(logit_bias={plain[0]: -1000.0})
    assert len(set(tokens(presence_penalty=1000.0))) == 30
    assert len(set(tokens(frequency_penalty=1000.0))) == 30
    repeated = tokens(repetition_penalty=1e6)
    assert len(set(repeated)) == 30 and not set(repeated) & set(prompt)
    stopped = tokens(stop_token_ids=(plain[0],))
    assert stopped == plain[:1]
    late = tokens(stop_token_ids=(plain[0],), min_tokens=7)
    assert len(late) > 7 and plain[0] not in late[:7]


def test_the_padded_tail_of_the_vocabulary_is_never_drawn(tiny):
    engine = make_engine(tiny)
    assert engine.info.vocab_size < engine.runner.model.config.vocab_size
    params = SamplingParams(temperature=100.0, max_tokens=200, seed=1, ignore_eos=True)
    ((tokens, _),) = run(engine, [Generate("a", [1], params)]).values()
    assert max(tokens) < engine.info.vocab_size and len(set(tokens)) > 50


@pytest.mark.parametrize(
    "prompt, params, code",
    [
        ([], {}, "bad_request"),
        ([-1], {}, "bad_request"),
        ([100_000], {}, "bad_request"),
        ([1], {"stop_token_ids": (100_000,)}, "bad_request"),
        ([1], {"logit_bias": {-1: 0.0}}, "bad_request"),
        ([1], {"n": 0}, "bad_request"),
        ([1], {"max_tokens": -1}, "bad_request"),
        ([1] * 256, {}, "too_long"),
        ([1], {"seed": 2**70}, "bad_request"),
    ],
)
def test_what_cannot_be_served_is_rejected_and_leaves_no_trace(tiny, prompt, params, code):
    engine = make_engine(tiny)
    answer = engine.add(Generate("a", prompt, SamplingParams(**params)))
    assert isinstance(answer, Rejected) and answer.code == code
    assert not engine.has_work and engine.stats().total_requests == 0


def test_a_second_request_with_a_live_id_and_one_beyond_the_queue_are_rejected(tiny):
    engine = make_engine(tiny, max_queue=2, max_concurrent=1)
    engine.add(Generate("a", [1], GREEDY))
    assert engine.add(Generate("a", [2], GREEDY)).code == "duplicate_rid"
    engine.add(Generate("b", [1], GREEDY))
    full = engine.add(Generate("c", [1], GREEDY))
    assert full.code == "queue_full" and full.retry_after_s >= 1


def test_a_fault_in_a_step_fails_its_requests_only_and_the_engine_goes_on(tiny, references):
    engine = make_engine(tiny, max_concurrent=1)
    engine.add(Generate("bad", PROMPTS[0], GREEDY))
    engine.add(Generate("r2", PROMPTS[2], GREEDY))
    healthy = engine.runner.model

    def broken(token_ids, context):
        raise RuntimeError("no more")

    engine.runner.model = broken
    (failed,) = engine.step()
    assert (failed.rid, failed.finish_reason) == ("bad", "error") and "RuntimeError" in failed.error
    engine.runner.model = healthy
    got = run(engine, [])
    assert got["r2", 0][0] == references["greedy"]["r2", 0]
    assert engine.stats().failed_requests == 1 and engine.stats().completed_requests == 1


def test_stats_count_requests_tokens_and_rates(tiny):
    engine = make_engine(tiny)
    run(engine, requests_for(GREEDY))
    stats = engine.stats()
    assert (stats.total_requests, stats.completed_requests, stats.active_sequences) == (8, 8, 0)
    assert stats.prompt_tokens == sum(map(len, PROMPTS)) and stats.generated_tokens == 8 * 24
    assert stats.avg_decode_tokens_per_sec > 0 and stats.avg_prefill_tokens_per_sec > 0
    assert stats.free_pages == stats.num_pages
