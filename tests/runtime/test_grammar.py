"""Structured output on tiny random models: whatever they would say, what comes out matches."""

import itertools
import json
import re
import threading
import time

import jsonschema
import pytest

from crane.runtime.engine import Engine
from crane.runtime.grammar import GrammarCompiler
from crane.runtime.settings import Settings
from crane.runtime.thinking import Section, ThinkingTracker
from crane.runtime.types import Accepted, Generate, Rejected, SamplingParams, Thinking
from tests.tiny import make_tiny, special_id

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "ä\n"]}, "maxItems": 3},
        "more": {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"type": "integer", "minimum": -9, "maximum": 9}]},
    },
    "required": ["name", "age", "tags", "more"],
    "additionalProperties": False,
}
# no white space, which a random model could go on with for ever
JSON = "start: %json " + json.dumps({"x-guidance": {"whitespace_flexible": False}, **SCHEMA})
EOS = special_id("<|im_end|>")
PROMPTS = [[(7 * i + 13 * j) % 300 for j in range(3 + 5 * i)] for i in range(8)]
START, END = (301, 302), (303, 304)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3")


@pytest.fixture(scope="module")
def engine(tiny):
    """One engine for tests that only need some; its grammars stay compiled."""
    return make_engine(tiny)


def make_engine(tiny, **settings):
    chosen = dict(dtype="float32", cpu=True, threads=1, max_model_len=512) | settings
    return Engine(Settings(model_path=str(tiny), **chosen))


@pytest.fixture(scope="module")
def tokenizer(tiny):
    from crane.models.files import Checkpoint
    from crane.models.tokenizer import load_tokenizer

    return load_tokenizer(Checkpoint(tiny, "safetensors"))


def constrained(grammar, **fields):
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 200, "seed": 3, "grammar": grammar, **fields})


def run(engine, requests):
    """{(rid, index): ([token_ids], last output)} of requests that are all taken."""
    for request in requests:
        assert engine.add(request) == Accepted(request.rid)
    return drain(engine)


def drain(engine):
    tokens, last = {}, {}
    while engine.has_work:
        for output in engine.step():
            key = (output.rid, output.index)
            tokens.setdefault(key, []).extend(output.token_ids)
            last[key] = output
        engine.scheduler.check()
    return {key: (tokens[key], last[key]) for key in tokens}


def one(engine, sampling, prompt=PROMPTS[1]):
    return run(engine, [Generate("one", prompt, sampling)])["one", 0]


def text_of(tokenizer, ids):
    return tokenizer.decode([i for i in ids if i not in tokenizer.special_ids])


# --- what comes out


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.0}, {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
                                    {"ignore_eos": True}, {"logit_bias": {EOS: 1e6}}, {"min_tokens": 150}],
                         ids=["plain", "greedy", "filtered", "no eos", "eos wanted", "long wanted"])  # fmt: skip
def test_a_random_model_writes_json_that_fits_the_schema(engine, tokenizer, fields):
    sampling = [constrained(JSON, **{"seed": seed, **fields}) for seed in range(8)]
    got = run(engine, [Generate(f"r{i}", PROMPTS[i], params) for i, params in enumerate(sampling)])
    assert len(got) == 8
    for ids, last in got.values():
        assert last.finish_reason == "stop" and last.error is None
        jsonschema.validate(json.loads(text_of(tokenizer, ids)), SCHEMA)


def test_the_output_ends_with_its_grammar(engine, tokenizer):
    ids, last = one(engine, constrained('start: "yes" | "no"', ignore_eos=True, min_tokens=100))
    assert text_of(tokenizer, ids) in ("yes", "no")
    assert last.finish_reason == "stop" and last.matched_id is None and last.usage.completion_tokens == len(ids)


def test_a_regular_expression_and_choices_hold(engine, tokenizer):
    for seed in range(5):
        ids, _ = one(engine, constrained("start: /[a-f]{3,7}-[0-9]{2}/", seed=seed))
        assert re.fullmatch("[a-f]{3,7}-[0-9]{2}", text_of(tokenizer, ids))
    choices = {text_of(tokenizer, one(engine, constrained('start: "a" | "b" | "cc"', seed=s))[0]) for s in range(12)}
    assert choices == {"a", "b", "cc"}


def test_an_open_end_is_left_to_eos_and_the_limit(engine, tokenizer):
    grammar = "start: /[a-z]+/"
    ids, last = one(engine, constrained(grammar, logit_bias={EOS: 100.0}))
    assert len(ids) == 2 and last.matched_id == EOS, "EOS needs at least one letter before it"
    ids, last = one(engine, constrained(grammar, logit_bias={EOS: 100.0}, min_tokens=5))
    assert len(ids) == 6 and last.matched_id == EOS
    ids, last = one(engine, constrained(grammar, logit_bias={EOS: 100.0}, ignore_eos=True, max_tokens=20))
    assert len(ids) == 20 and last.finish_reason == "length" and EOS not in ids
    assert re.fullmatch("[a-z]+", text_of(tokenizer, ids))


def test_a_stop_id_that_is_text_does_not_cut_the_grammar_short(engine, tokenizer):
    stop = tokenizer.encode("a", add_special_tokens=False)[0]
    fields = dict(stop_token_ids=(stop,), logit_bias={stop: 100.0})
    ids, last = one(engine, constrained("start: /[ab]{4}/ /[ab]*/", **fields))
    assert last.matched_id == stop and ids.count(stop) == 1
    assert len(text_of(tokenizer, ids[:-1])) >= 4
    # but where nothing else is left, it ends the output as the caller wants
    ids, last = one(engine, constrained('start: "aaaa"', **fields))
    assert last.finish_reason == "stop" and last.error is None
    ids, last = one(engine, constrained('start: "aaaa"', min_tokens=50, **fields))
    assert text_of(tokenizer, ids) == "aaaa"


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_grammar_that_turns_out_to_be_at_its_end_ends_the_output(engine, tokenizer, ignore_eos):
    grammar = 'start: "a" | "a" never\nnever: never "x"'
    ids, last = one(engine, constrained(grammar, ignore_eos=ignore_eos, min_tokens=9))
    assert text_of(tokenizer, ids) == "a" and last.finish_reason == "stop" and last.error is None


def test_a_mark_of_calls_is_text_also_where_the_vocabulary_calls_it_special(tokenizer, monkeypatch):
    monkeypatch.setattr("crane.runtime.grammar.TEXT_MARKS", ("<|im_start|>",))
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, frozenset({EOS}))
    matcher = compiler.compile('start: "<|im_start|>" "a" | "<|im_end|>" "a"').result()
    assert matcher.validate_tokens([special_id("<|im_start|>")]) == 1
    assert matcher.validate_tokens([EOS]) == 0


def test_choices_of_one_request_have_their_own_state(engine, tokenizer):
    got = run(engine, [Generate("n", PROMPTS[2], constrained(JSON, n=4))])
    texts = [text_of(tokenizer, ids) for ids, _ in got.values()]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) > 1


def test_log_probabilities_are_those_of_the_free_model(engine):
    ids, _ = one(engine, constrained('start: "a" | "b"', seed=1, logprobs=2))
    engine.add(Generate("c", PROMPTS[1], constrained('start: "a" | "b"', seed=1, logprobs=2)))
    engine.add(Generate("f", PROMPTS[1], SamplingParams(temperature=1.0, max_tokens=1, logprobs=2, ignore_eos=True)))
    entries = {}
    while engine.has_work:
        for output in engine.step():
            if output.token_ids:
                entries.setdefault(output.rid, output.logprobs[0])
    assert entries["c"].top_ids == entries["f"].top_ids
    assert entries["c"].top_logprobs == pytest.approx(entries["f"].top_logprobs, abs=1e-5)
    assert ids[0] not in entries["c"].top_ids and entries["c"].logprob < entries["c"].top_logprobs[-1]


# --- company


@pytest.fixture(scope="module")
def mixed():
    free = SamplingParams(temperature=1.0, seed=5, max_tokens=40, ignore_eos=True)
    kinds = [constrained(JSON), free, constrained("start: /[a-f ]{30,60}/"), constrained(JSON, temperature=0.0)]
    return [Generate(f"r{i}", prompt, kinds[i % 4]) for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def alone(tiny, mixed):
    engine = make_engine(tiny, prefix_cache=False)
    return {(request.rid, 0): run(engine, [request])[request.rid, 0][0] for request in mixed}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_step_tokens": 8, "max_concurrent": 8},
        {"max_concurrent": 2, "decode_tokens_per_seq": 3},
        # room for 34 pages: sequences have to be recomputed
        {"page_size": 4, "kv_memory": 2 * 34 * 2 * 2 * 4 * 64, "max_model_len": 0},
    ],
    ids=["batched", "chunked", "taking turns", "recomputed"],
)
def test_constrained_and_free_neighbours_get_what_they_get_alone(tiny, mixed, alone, settings):
    engine = make_engine(tiny, **settings)
    got = run(engine, mixed)
    assert {key: tokens for key, (tokens, _) in got.items()} == alone
    if "kv_memory" in settings:
        assert engine.stats().preemptions > 0
    assert engine.scheduler.pool.num_free == engine.info.num_pages


def test_a_mask_that_is_late_delays_its_own_sequence_only(tiny, mixed, alone, monkeypatch):
    """Every mask takes longer than the engine waits for it."""
    late = itertools.count()

    def slow(self, matcher, bits):
        def work():
            time.sleep(0.012)
            next(late)
            matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)

        return self._masks.submit(work)

    monkeypatch.setattr(GrammarCompiler, "submit_mask", slow)
    engine = make_engine(tiny)
    plan = engine.scheduler.plan

    def planned():
        batch = plan()
        assert not any(row.sequence.waits for row in batch.rows), "nothing is computed in vain"
        return batch

    engine.scheduler.plan = planned
    few = mixed[:3]
    for request in few:
        engine.add(request)
    order = []
    tokens = {request.rid: [] for request in few}
    while engine.has_work:
        for output in engine.step():
            tokens[output.rid] += output.token_ids
            if output.finish_reason:
                order.append(output.rid)
        engine.scheduler.check()
    assert {(rid, 0): ids for rid, ids in tokens.items()} == {(r.rid, 0): alone[r.rid, 0] for r in few}
    assert order[0] == "r1", "the free one is done first"
    assert next(late) > 20


def test_a_grammar_being_compiled_holds_nobody_up(tiny, monkeypatch):
    gate = threading.Event()
    engine = make_engine(tiny, max_concurrent=1)
    monkeypatch.setattr("crane.runtime.grammar._new_matcher", _after(gate))
    assert engine.add(Generate("slow", PROMPTS[0], constrained('start: "a"'))) == Accepted("slow")
    assert engine.step() == [] and engine.scheduler.num_waiting == 1
    engine.add(Generate("free", PROMPTS[1], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)))
    done = []
    while not done:
        done = [output.rid for output in engine.step() if output.finish_reason]
    assert done == ["free"] and engine.has_work
    gate.set()
    assert drain(engine)["slow", 0][1].finish_reason == "stop"


def _after(gate):
    from crane.runtime.grammar import _new_matcher

    def wait(*args):
        assert gate.wait(20)
        return _new_matcher(*args)

    return wait


def test_a_waiting_sequence_can_be_aborted(tiny, monkeypatch):
    gate = threading.Event()
    engine = make_engine(tiny)
    monkeypatch.setattr("crane.runtime.grammar._new_matcher", _after(gate))
    engine.add(Generate("slow", PROMPTS[0], constrained('start: "b"')))
    engine.step()
    assert [output.finish_reason for output in engine.abort("slow")] == ["abort"]
    gate.set()
    assert not engine.has_work and engine.step() == []


# --- what is refused


def test_a_grammar_that_does_not_compile_is_rejected(engine):
    answer = engine.add(Generate("x", PROMPTS[0], constrained("start: gone")))
    assert isinstance(answer, Rejected) and answer.code == "bad_request" and "gone" in answer.message
    assert "longer" in engine.add(Generate("x", PROMPTS[0], constrained("a" * (1 << 20)))).message


def test_a_long_bad_grammar_fails_its_request_and_no_other(engine):
    grammar = "start: gone\n" + "// comment\n" * 2000
    got = run(engine, [Generate("bad", PROMPTS[0], constrained(grammar, n=2)),
                       Generate("good", PROMPTS[0], constrained('start: "a"'))])  # fmt: skip
    for index in (0, 1):
        tokens, last = got["bad", index]
        assert tokens == [] and last.finish_reason == "error" and "gone" in last.error
    assert got["good", 0][1].finish_reason == "stop"


def test_a_grammar_that_allows_nothing_ends_in_an_error(engine):
    tokens, last = one(engine, constrained("start: start"))
    assert last.finish_reason == "error" and last.error.startswith("the grammar") and tokens == []


def test_a_mask_never_bans_everything(tokenizer):
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, frozenset({EOS}))
    compiler.compile("start: start").result()
    constraint = compiler.constraint(constrained("start: start", ignore_eos=True), frozenset())
    constraint.start()
    assert constraint.allowed(5).any()


def test_a_thousand_rules_deep_does_not_end_the_process(engine):
    rules = "\n".join(f'r{i}: (("b"|("c" r{i + 1}?)+))*' for i in range(1500))
    run(engine, [Generate("deep", PROMPTS[0], constrained(f'start: r0\n{rules}\nr1500: "a"', max_tokens=5))])


def test_thinking_is_checked(engine):
    for thinking, word in [(Thinking((), ()), "end_ids"), (Thinking((9999,), (1,)), "must be in"),
                           (Thinking((), (1,), True, -1), "max_tokens")]:  # fmt: skip
        answer = engine.add(Generate("x", [1], SamplingParams(thinking=thinking)))
        assert isinstance(answer, Rejected) and word in answer.message


# --- thinking


def test_the_tracker_finds_start_and_end():
    tracker = ThinkingTracker(Thinking(START, END))
    assert tracker.section is Section.UNDECIDED and tracker.start_id == START[0]
    tracker.push(START[0])
    assert tracker.section is Section.UNDECIDED and tracker.start_id == START[1]
    for token in (START[1], 1, END[0], END[0], 2, END[0]):
        tracker.push(token)
        assert tracker.section is Section.OPEN and tracker.start_id is None and tracker.forced_id is None
    tracker.push(END[1])
    assert tracker.section is Section.OVER and tracker.num_tokens == 4
    other = ThinkingTracker(Thinking(START, END))
    other.push(START[0])
    other.push(7)
    assert other.section is Section.OVER and other.num_tokens == 0


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_budget_closes_the_section_and_the_grammar_follows(engine, tokenizer, budget):
    thinking = Thinking(START, END, open=True, max_tokens=budget)
    ids, last = one(engine, constrained(JSON, thinking=thinking, max_tokens=400))
    assert tuple(ids[budget : budget + 2]) == END
    jsonschema.validate(json.loads(text_of(tokenizer, ids[budget + 2 :])), SCHEMA)
    assert last.usage.reasoning_tokens == budget and last.finish_reason == "stop"


def test_a_budget_without_a_grammar_leaves_the_rest_as_it_is(engine):
    free = SamplingParams(temperature=1.0, seed=4, max_tokens=30, ignore_eos=True)
    thinking = Thinking(START, END, open=True, max_tokens=10)
    limited = SamplingParams(temperature=1.0, seed=4, max_tokens=30, ignore_eos=True, thinking=thinking)
    unlimited = SamplingParams(
        temperature=1.0, seed=4, max_tokens=30, ignore_eos=True, thinking=Thinking(START, END, open=True)
    )
    reference, _ = one(engine, free)
    ids, last = one(engine, limited)
    assert ids[:10] == reference[:10] and tuple(ids[10:12]) == END and len(ids) == 30
    assert last.usage.reasoning_tokens == 10
    ids, last = one(engine, unlimited)
    assert ids == reference and last.usage.reasoning_tokens == 30


def test_a_section_does_not_end_the_output_when_a_grammar_is_to_follow(engine, tokenizer):
    thinking = Thinking(START, END, open=True, max_tokens=12)
    ids, last = one(engine, constrained('start: "yes"', thinking=thinking, logit_bias={EOS: 100.0}))
    assert EOS not in ids[:14] and text_of(tokenizer, ids[14:]) == "yes"


@pytest.mark.parametrize("thinks", [True, False])
def test_a_model_may_think_first_or_not(engine, tokenizer, thinks):
    thinking = Thinking(START, END, open=False, max_tokens=5)
    bias = {START[0]: 100.0 if thinks else -100.0}
    sampling = constrained('start: "yes" | "no"', thinking=thinking, logit_bias=bias)
    ids, last = one(engine, sampling)
    if thinks:
        assert tuple(ids[:2]) == START, "once begun, the mark is completed"
        assert tuple(ids[7:9]) == END and last.usage.reasoning_tokens == 5
        ids = ids[9:]
    assert text_of(tokenizer, ids) in ("yes", "no")


def test_a_start_mark_that_the_grammar_could_also_begin_with_is_kept_open(engine, tokenizer):
    first = tokenizer.encode("y", add_special_tokens=False)[0]
    sampling = constrained("start: /y[es]{2}/", thinking=Thinking((first, START[1]), END, max_tokens=3))
    seen = set()
    for seed in range(20):
        ids, _ = one(engine, constrained("start: /y[es]{2}/", seed=seed, thinking=sampling.thinking,
                                         logit_bias={START[1]: 4.0, first: 50.0}))  # fmt: skip
        thought = ids[1] == START[1]
        seen.add(thought)
        answer = ids[7:] if thought else ids
        assert re.fullmatch("y[es]{2}", text_of(tokenizer, answer)), ids
    assert seen == {True, False}


# --- real vocabulary


def test_marks_of_calls_are_one_token_where_the_vocabulary_has_them(qwen3_tokenizer):
    from crane.models.files import Checkpoint
    from crane.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Checkpoint(qwen3_tokenizer, "safetensors"))
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, frozenset({151645}))
    constraint = compiler.constraint(constrained('start: "<tool_call>" /[a-z]+/ "</tool_call>"'), frozenset({151645}))
    while constraint.waits:
        time.sleep(0.01)
    for text in ("<tool_call>", "cat", "</tool_call>"):
        token = tokenizer.token_to_id(text)
        constraint.start()
        bits = constraint.allowed(5)
        allowed = [i for i in range(tokenizer.vocab_size) if bits[i >> 5] >> (i & 31) & 1]
        assert token in allowed and 151645 not in allowed
        if text == "<tool_call>":
            assert all(text.encode().startswith(tokenizer.token_bytes(i)) for i in allowed)
        assert not constraint.finished
        constraint.advance(token)
    assert constraint.finished


def test_the_vocabulary_of_grammars_is_made_when_the_engine_rests_not_before_the_first_token(tiny):
    engine = Engine(Settings(model_path=str(tiny), cpu=True, dtype="float32"))
    assert engine._grammars._vocabulary is None
    engine.rest()
    assert engine._grammars._vocabulary.result(30).vocab_size == engine.info.vocab_size + 1
    engine.rest()
    assert engine._grammars.prepare() is engine._grammars._vocabulary
