"""Speculation: guesses change how fast an output comes, and nothing else."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crane.runtime.drafts import MAX_STEP_DRAFTS, Acceptance, Drafter, NgramIndex, StepCost
from crane.runtime.engine import Engine
from crane.runtime.scheduler import Scheduler
from crane.runtime.settings import Settings
from crane.runtime.types import Accepted, Generate, Rejected, SamplingParams, Thinking
from tests.tiny import make_tiny

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, top_k=40, top_p=0.95, repetition_penalty=1.2, presence_penalty=0.3,
                         frequency_penalty=0.2, logit_bias={5: 1.5}, seed=7, max_tokens=40, min_tokens=6)  # fmt: skip
PROMPTS = [[(7 * i + 13 * j) % 300 for j in range(3 + 5 * i)] for i in range(8)]


# --- the index


def brute_force(tokens, text, smallest, largest, limit):
    """What `follow` promises, by looking everywhere: the latest of the 16 last places, the longest first."""
    places = []
    for end in range(smallest, len(tokens)):
        if tokens[end - smallest : end] == text[-smallest:] and len(text) >= smallest:
            length = smallest
            while length < min(largest, end, len(text)) and tokens[end - 1 - length] == text[-1 - length]:
                length += 1
            places.append((length, end))
    if not places:
        return 0, []
    length, end = max(places[-16:])
    found = tokens[end : end + limit]
    while tokens is text and len(found) < limit:
        found.append((tokens + found)[end + len(found)])
    return length, found


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40), st.integers(1, 3))
def test_the_index_finds_the_longest_and_latest_match_as_its_text_grows(tokens, other, smallest):
    grown, largest = [], smallest + 2
    own, foreign = NgramIndex(grown, smallest, largest), NgramIndex(other, smallest, largest)
    for token in tokens:
        grown.append(token)
        assert own.follow(grown, 5) == brute_force(grown, grown, smallest, largest, 5)
        assert foreign.follow(grown, 5) == brute_force(other, grown, smallest, largest, 5)


def test_what_repeats_itself_is_guessed_to_go_on():
    text = [9, 1, 2, 1, 2]
    assert NgramIndex(text, 2, 4).follow(text, 6) == (2, [1, 2, 1, 2, 1, 2])


# --- how long a draft is


def test_a_guess_is_worth_what_a_token_costs_a_step():
    cost = StepCost()
    assert 0 < cost.worth(1) < cost.worth(32) < 1
    for tokens in (1, 2, 5, 9, 1, 4, 8):
        cost.learn(tokens, 0.050 + 0.003 * tokens)
    assert cost.worth(1) == pytest.approx(3 / 53, rel=1e-3)
    assert cost.worth(32) == pytest.approx(96 / 146, rel=1e-3)
    flat = StepCost()
    for tokens in (1, 2, 5, 9):
        flat.learn(tokens, 0.050)
    assert flat.worth(1) < 0.01


def test_the_rate_follows_what_was_seen_last():
    acceptance = Acceptance(0.9)
    assert acceptance.rate(3, 0.4) == pytest.approx(0.4)
    for _ in range(30):
        acceptance.learn(3, 0, 1)
    assert acceptance.rate(3, 0.4) < 0.1 and acceptance.rate(4, 0.4) == pytest.approx(0.4)
    for _ in range(30):
        acceptance.learn(3, 4, 0)
    assert acceptance.rate(3, 0.4) > 0.9


def played(text, num_prompt, num_rows=1, **options):
    """A drafter that speculates on a known text: (tokens drafted, accepted, steps)."""
    drafter = Drafter(Settings(speculative="ngram", **options))
    tokens = text[:num_prompt]
    drafts = drafter.drafts_for(Generate("r", list(tokens), GREEDY), tokens)
    steps = 0
    while len(tokens) < len(text):
        guesses = drafter.draft(drafts, 64, num_rows)
        rest, steps = text[len(tokens) :], steps + 1
        right = 0
        while right < min(len(guesses), len(rest) - 1) and guesses[right] == rest[right]:
            right += 1
        tokens += rest[: right + 1]
        if guesses:
            drafter.learn(drafts, len(guesses), right)
    return drafter.num_drafted, drafter.num_accepted, steps


def test_a_copied_text_is_guessed_in_long_runs():
    rng = random.Random(1)
    prompt = [rng.randrange(1000) for _ in range(300)]
    drafted, accepted, steps = played(prompt + prompt, 302, num_draft_tokens=8)
    assert accepted > 0.95 * drafted and steps < 298 / 6


@pytest.mark.parametrize("num_rows", [1, 8, 32])
def test_where_guesses_fail_they_become_rare(num_rows):
    rng = random.Random(2)
    text = [rng.choice((1, 2, 3, 4, 5, 6)) for _ in range(3000)]  # every pair has been there, and says nothing
    drafted, accepted, steps = played(text, 100, num_rows)
    assert accepted < 0.3 * drafted
    # a guess costs a 17th of a step alone, and as much as a row's share when 32 share it
    cost, gain = drafted / (16 + num_rows), 2900 - steps
    assert cost - gain < 0.03 * 2900


# --- the same output


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3")


def make_engine(tiny, **settings):
    chosen = dict(dtype="float32", cpu=True, threads=1, max_model_len=256) | settings
    return Engine(Settings(model_path=str(tiny), **chosen))


class Seer(Drafter):
    """Guesses what it knows will come, with a mistake now and then: tiny random models hardly repeat themselves."""

    def __init__(self, truth, seed):
        super().__init__(Settings(speculative="ngram"))
        self._truth = truth  # of each prompt and choice
        self._rng = random.Random(seed)

    def drafts_for(self, request, token_ids):
        drafts = super().drafts_for(request, token_ids)
        if drafts is not None:
            drafts.all = self._truth[tuple(request.prompt_ids)]
        return drafts

    def draft(self, drafts, limit, num_rows):
        place = len(drafts._token_ids)
        guesses = drafts.all[place : place + self._rng.randrange(min(limit, 9) + 1)]
        return [(token + (self._rng.random() < 0.15)) % 320 for token in guesses]


def run(engine, requests, abort_at=()):
    """{(rid, index): ([token_ids], last output, [logprobs])}; the ledger and the index are checked in every step."""
    for request in requests:
        assert engine.add(request) == Accepted(request.rid)
    live = {(s.rid, s.index): s for s in engine.scheduler.find(None)}
    texts = engine.texts = getattr(engine, "texts", []) + [s.token_ids for s in live.values()]
    got, steps = {key: ([], [], []) for key in live}, 0
    while engine.has_work:
        steps += 1
        if steps in abort_at:
            for output in engine.abort(engine.scheduler.find(None)[0].rid):
                got[output.rid, output.index][1].append(output)
        for output in engine.step():
            tokens, ends, logprobs = got[output.rid, output.index]
            tokens += output.token_ids
            logprobs += output.logprobs or []
            ends += [output] if output.finish_reason else []
        engine.scheduler.check()
        for node in engine.scheduler.pool._nodes.values():
            start = []
            while node is not None:
                start, node = [*node.tokens, *start], node.parent
            assert any(text[: len(start)] == start for text in texts), "the index has what nobody said"
    assert engine.scheduler.pool.num_free == engine.info.num_pages
    return {key: (tokens, ends[-1], logprobs) for key, (tokens, ends, logprobs) in got.items()}


def seen(engine, truth, seed):
    engine.scheduler.drafter = Seer(truth, seed)
    return engine


def truths(plain, requests):
    return {tuple(r.prompt_ids): r.prompt_ids + plain[r.rid, 0][0] for r in requests}


CHOICES = msgspec.structs.replace(SAMPLED, n=3, stop_token_ids=(70, 71, 72))


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, CHOICES], ids=["greedy", "sampled", "choices and stop ids"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_step_tokens": 8, "max_concurrent": 8},
        {"max_concurrent": 2, "decode_tokens_per_seq": 3},
        {"page_size": 4, "kv_memory": 2 * 24 * 2 * 2 * 4 * 64, "max_model_len": 0},
    ],
    ids=["batched", "chunked", "taking turns", "recomputed"],
)
def test_output_is_the_same_with_right_and_wrong_guesses_as_without(tiny, params, options):
    requests = [Generate(f"r{i}", prompt, params) for i, prompt in enumerate(PROMPTS)]
    plain = run(make_engine(tiny, **options), requests)
    engine = seen(make_engine(tiny, **options), truths(plain, requests), 1)
    got = run(engine, requests)
    for key, (tokens, last, _) in plain.items():
        assert got[key][0] == tokens
        assert (got[key][1].finish_reason, got[key][1].matched_id) == (last.finish_reason, last.matched_id)
        assert got[key][1].usage.completion_tokens == len(tokens)
    stats = engine.stats()
    assert stats.accepted_tokens > 20 and stats.drafted_tokens > stats.accepted_tokens
    if "kv_memory" in options:
        assert stats.preemptions > 0


def test_guesses_of_sequences_that_are_aborted_leave_nothing_behind(tiny):
    requests = [Generate(f"r{i}", prompt, SAMPLED) for i, prompt in enumerate(PROMPTS)]
    plain = run(make_engine(tiny), requests)
    got = run(seen(make_engine(tiny, page_size=4), truths(plain, requests), 2), requests, abort_at=(3, 5, 6))
    aborted = {rid for (rid, _), (_, last, _) in got.items() if last.finish_reason == "abort"}
    assert len(aborted) == 3
    for key, (tokens, _, _) in got.items():
        assert tokens == plain[key][0][: len(tokens)] and (key[0] in aborted or tokens == plain[key][0])


def test_logprobs_come_with_every_accepted_token(tiny):
    params = msgspec.structs.replace(SAMPLED, logprobs=3, prompt_logprobs=True, logprob_ids=(4,))
    requests = [Generate(f"r{i}", prompt, params) for i, prompt in enumerate(PROMPTS[:4])]
    plain = run(make_engine(tiny), requests)
    engine = seen(make_engine(tiny), truths(plain, requests), 3)
    got = run(engine, requests)
    assert engine.stats().accepted_tokens > 20
    for key, (tokens, _, logprobs) in plain.items():
        assert got[key][0] == tokens and len(got[key][2]) == len(tokens)
        for ours, theirs in zip(got[key][2], logprobs):
            assert ours.top_ids == theirs.top_ids
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert ours.ids_logprobs == pytest.approx(theirs.ids_logprobs, abs=1e-4)


def test_the_drafter_itself_changes_nothing_and_the_switch_of_a_request_wins(tiny):
    loop = [(5 * j) % 30 for j in range(30)] * 3
    params = SamplingParams(temperature=0.2, top_k=2, seed=1, max_tokens=60, ignore_eos=True)
    requests = [Generate(f"r{i}", loop[i:], params) for i in range(4)]
    off, on = make_engine(tiny), make_engine(tiny, speculative="ngram", ngram_min=1)
    plain, got = run(off, requests), run(on, requests)
    assert {key: tokens for key, (tokens, *_) in got.items()} == {key: tokens for key, (tokens, *_) in plain.items()}
    assert off.stats().drafted_tokens == 0 and on.stats().drafted_tokens > 0
    drafted = on.stats().drafted_tokens
    run(on, [Generate("a", loop, msgspec.structs.replace(params, num_draft_tokens=0))])
    run(on, [Generate("b", loop, msgspec.structs.replace(params, thinking=Thinking((1,), (2,), True, 5)))])
    assert on.stats().drafted_tokens == drafted  # nothing is guessed for it: it says so, or its tokens are constrained
    run(off, [Generate("a", loop, msgspec.structs.replace(params, num_draft_tokens=4))])
    assert off.stats().drafted_tokens > 0


def test_a_prediction_that_comes_true_is_given_out_in_long_runs(tiny):
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=64, ignore_eos=True)
    engine = make_engine(tiny)
    (tokens, *_), = run(engine, [Generate("a", PROMPTS[3], params)]).values()
    steps = engine.stats().steps
    wrong = tokens[:30] + [(tokens[30] + 1) % 320] + tokens[31:]  # one mistake, after which it is found again
    for predicted in (tokens, wrong):
        before = engine.stats()
        before = (before.steps, before.accepted_tokens)
        (again, *_), = run(engine, [Generate("b", PROMPTS[3], params, prediction_ids=predicted)]).values()
        assert again == tokens
        assert engine.stats().steps - before[0] < steps / 3
        assert engine.stats().accepted_tokens - before[1] > 45
    assert isinstance(engine.add(Generate("c", [1], params, prediction_ids=[99999])), Rejected)


# --- bounds


class Eager(Drafter):
    """Guesses as much as it may, and never right."""

    def draft(self, drafts, limit, num_rows):
        return [-1] * limit


def test_guesses_stay_inside_the_step_and_never_take_a_page_that_another_needs():
    from tests.runtime.test_scheduler import PagePool, Sequence, step

    drafter = Eager(Settings(speculative="ngram", num_draft_tokens=64))
    scheduler = Scheduler(PagePool(12, 4), max_running=4, quantum_tokens=100, max_step_tokens=40, max_model_len=44,
                          drafter=drafter)
    for i in range(3):
        request = Generate(f"r{i}", [100 * i + j for j in range(5)], SamplingParams(max_tokens=7))
        sequence = Sequence(request, 0, 0, frozenset())
        sequence.drafts = drafter.drafts_for(request, sequence.token_ids)
        scheduler.enqueue(sequence)
    while scheduler.has_work:
        batch, _ = step(scheduler)
        assert batch.num_tokens <= 40
        assert sum(len(row.drafts) for row in batch.rows) <= MAX_STEP_DRAFTS
        for row in batch.rows:
            assert row.start + row.count <= len(row.sequence.pages) * 4 or row.sequence.num_output == 7
            assert row.sequence.num_output + len(row.drafts) <= 7
    assert scheduler.num_preemptions == 0 and drafter.num_drafted > 0
    assert scheduler.pool.num_free == 12
