"""Everything at once on a tiny engine with too few pages: no answer changes, nothing leaks, nothing stalls."""

import random

import pytest

from crane.runtime.engine import Engine
from crane.runtime.settings import Settings
from crane.runtime.types import Accepted, Generate, SamplingParams, Thinking
from tests.tiny import make_tiny

NUM_REQUESTS = 400
MAX_IDLE_STEPS = 20_000
START = [(7 * i) % 300 for i in range(60)]
# (prompt, parameters, pooling): every feature that shapes an answer, with long and short starts in common
KINDS = [
    (START[:50], dict(max_tokens=20), None),
    (START[:43], dict(max_tokens=25, temperature=1.0, top_k=30, seed=3), None),
    (START[:20] + [5, 6], dict(max_tokens=9, temperature=1.5, seed=4, n=3), None),
    (START[:60], dict(max_tokens=12, repetition_penalty=1.3, logit_bias={3: 2.0}, min_tokens=5), None),
    (START[:30], dict(max_tokens=30, temperature=1.0, seed=5, grammar="start: /[a-c]{2,9}/"), None),
    ([9, 8, 7], dict(max_tokens=30, temperature=1.0, seed=6, n=2,
                     grammar='start: %json {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],'
                             ' "additionalProperties": false}'), None),
    (START[:25], dict(max_tokens=15, temperature=0.8, seed=7, thinking=Thinking((1,), (2, 3), True, 4)), None),
    (START[:35], dict(max_tokens=4, logprobs=2, prompt_logprobs=True), None),
    (START[:40], {}, "mean"),
    (START[:41], {}, "last"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3")


def make_engine(tiny, **settings):
    return Engine(Settings(model_path=str(tiny), dtype="float32", cpu=True, threads=1, page_size=4, **settings))


def request(rid, kind, salt=""):
    prompt, params, pooling = KINDS[kind]
    params = {"temperature": 0.0, "ignore_eos": "grammar" not in params} | params
    return Generate(rid, prompt, SamplingParams(**params), pooling, salt)


class Answers:
    """Tokens, reasons and embeddings by (rid, index)."""

    def __init__(self):
        self.tokens, self.ends = {}, {}

    def take(self, outputs):
        for output in outputs:
            key = (output.rid, output.index)
            self.tokens.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason:
                assert key not in self.ends, "a choice ended twice"
                self.ends[key] = (output.finish_reason, output.embedding)


def answers_alone(tiny):
    found = []
    for kind in range(len(KINDS)):
        engine, answers = make_engine(tiny, prefix_cache=False), Answers()
        assert engine.add(request("r", kind)) == Accepted("r")
        while engine.has_work:
            answers.take(engine.step())
        found.append((answers.tokens, answers.ends))
    return found


@pytest.mark.parametrize("seed, preemption", [(1, "recompute"), (2, "swap")])
def test_mixed_requests_with_aborts_and_too_few_pages_get_the_answers_they_get_alone(tiny, seed, preemption):
    expected = answers_alone(tiny)
    # 48 pages of 4 tokens, 2,048 bytes each: about two of the longer requests fit
    memory = dict(kv_memory=48 * 2048, host_kv_memory=40 * 2048, preemption=preemption)
    engine = make_engine(tiny, max_concurrent=6, decode_tokens_per_seq=4, max_step_tokens=32, **memory)
    answers, rng = Answers(), random.Random(seed)
    kinds, aborted, idle = {}, set(), 0
    while len(kinds) < NUM_REQUESTS or engine.has_work:
        if len(kinds) < NUM_REQUESTS and engine.stats().waiting_sequences < 20 and rng.random() < 0.5:
            rid, kind = f"r{len(kinds)}", rng.randrange(len(KINDS))
            assert engine.add(request(rid, kind, rng.choice(["", "s"]))) == Accepted(rid)
            kinds[rid] = kind
        if rng.random() < 0.02:
            rid = rng.choice(list(kinds) or ["none"])
            aborted |= {output.rid for output in engine.abort(rid)}
        if rng.random() < 0.005:
            engine.flush_cache()
        outputs = engine.step()
        idle = 0 if outputs else idle + 1
        assert idle < MAX_IDLE_STEPS, "the engine has work and does nothing"
        answers.take(outputs)
        engine.scheduler.check()
    assert engine.stats().preemptions > 0 and engine.stats().host_cached_tokens > 0
    assert (engine.stats().swaps > 0) == (preemption == "swap")
    assert engine.stats().free_host_pages == engine.stats().num_host_pages == 40
    assert engine.scheduler.pool.num_free == engine.info.num_pages
    for rid, kind in kinds.items():
        if rid in aborted:
            continue
        tokens, ends = expected[kind]
        for (_, index), ids in tokens.items():
            assert answers.tokens[rid, index] == ids, f"{rid} of kind {kind} differs from itself alone"
            reason, embedding = ends["r", index]
            assert answers.ends[rid, index][0] == reason
            if embedding:
                assert answers.ends[rid, index][1] == pytest.approx(embedding, abs=1e-4)
    assert len(aborted) < NUM_REQUESTS / 2
