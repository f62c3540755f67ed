"""What a request gets does not depend on what happens around it. One row of the promise, one test.

Float32: the same ids, log-probabilities within 1e-4. Bfloat16: the same bits for `deterministic` requests.
"""

import msgspec
import pytest

from crane.runtime.engine import Engine
from crane.runtime.settings import Settings
from crane.runtime.types import Accepted, Generate, SamplingParams
from tests.tiny import make_tiny

PAGE = 4
PAGE_BYTES = 2048  # of the tiny model in float32
SAMPLED = SamplingParams(temperature=1.0, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=7, max_tokens=24,
                         ignore_eos=True, logprobs=2)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=2)
START = [(7 * j + 3) % 300 for j in range(70)]
PROMPTS = [START[: 30 + 9 * (i % 5)] + [i, i + 1] for i in range(32)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3")


def make_engine(tiny, **settings):
    chosen = dict(dtype="float32", cpu=True, threads=1, max_model_len=128, page_size=PAGE) | settings
    return Engine(Settings(model_path=str(tiny), **chosen))


def requests(params, prompts=PROMPTS):
    return [Generate(f"r{i}", prompt, params) for i, prompt in enumerate(prompts)]


def run(engine, asked, each_step=None):
    """{(rid, index): (token ids, log-probabilities)} of requests that come all at once."""
    for request in asked:
        assert engine.add(request) == Accepted(request.rid)
    found, number = {}, 0
    while engine.has_work:
        for output in engine.step():
            ids, logprobs = found.setdefault((output.rid, output.index), ([], []))
            ids += output.token_ids
            logprobs += [each.logprob for each in output.logprobs or []]
        if each_step is not None:
            each_step(number)
        engine.scheduler.check()
        number += 1
    assert (engine.stats().overlap["steps_ahead"] > 0) == (engine.settings.overlap == "on")
    return found


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, (ids, logprobs) in found.items():
        assert ids == expected[key][0], f"{key} says something else"
        assert logprobs == pytest.approx(expected[key][1], abs=1e-4), key


@pytest.fixture(scope="module", params=[GREEDY, SAMPLED], ids=["greedy", "sampled"])
def params(request):
    return request.param


@pytest.fixture(params=["off", "on"], ids=["", "overlapped"])
def overlap(request):
    """Whether steps are launched before the ones before are read."""
    return request.param


@pytest.fixture(scope="module")
def alone(tiny, params):
    engine = make_engine(tiny, prefix_cache=False)
    found = {}
    for request in requests(params):
        found |= run(engine, [request])
    return found


@pytest.mark.parametrize(
    "settings",
    [{"prefix_cache": False}, {"prefix_cache": False, "max_step_tokens": 7, "max_concurrent": 7}, {}],
    ids=["batch of 32", "chunked", "prefix-cached"],
)
def test_the_same_in_a_batch_in_chunks_and_with_cached_prefixes(tiny, params, alone, settings, overlap):
    engine = make_engine(tiny, overlap=overlap, **settings)
    same(run(engine, requests(params)), alone)
    same(run(engine, requests(params)), alone)
    assert (engine.stats().cached_tokens > 0) == ("prefix_cache" not in settings)


def test_the_same_with_tokens_guessed(tiny, params, alone):
    engine = make_engine(tiny, num_draft_tokens=4)
    asked = []
    for request in requests(params):
        guess = list(alone[request.rid, 0][0])
        guess[5] = 9  # right and wrong guesses
        asked.append(msgspec.structs.replace(request, prediction_ids=guess))
    same(run(engine, asked), alone)
    stats = engine.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


@pytest.mark.parametrize("preemption, host", [("swap", 200), ("recompute", 0), ("auto", 40)])
def test_the_same_swapped_or_recomputed(tiny, params, alone, preemption, host, overlap):
    engine = make_engine(tiny, kv_memory=60 * PAGE_BYTES, host_kv_memory=host * PAGE_BYTES, preemption=preemption,
                         max_concurrent=8, decode_tokens_per_seq=4, overlap=overlap)  # fmt: skip
    same(run(engine, requests(params)), alone)
    stats = engine.stats()
    assert stats.preemptions > 0 and (stats.swaps == stats.preemptions if preemption == "swap" else True)
    assert stats.swaps == 0 or preemption != "recompute"


def test_the_same_from_disk_after_a_restart(tiny, params, alone, tmp_path, overlap):
    settings = dict(kv_cache_dir=str(tmp_path), kv_memory=60 * PAGE_BYTES, host_kv_memory=200 * PAGE_BYTES,
                    preemption="swap", overlap=overlap)  # fmt: skip
    for cached in (False, True):
        engine = make_engine(tiny, **settings)
        while not engine.memory.disk.disk.ready:
            pass
        found = {}
        for start in range(0, 32, 8):
            found |= run(engine, requests(params)[start : start + 8])
        same(found, alone)
        engine.close()
        assert (engine.stats().disk_pages_read > 0) == cached


def test_the_same_as_one_of_several_choices(tiny, params, alone, overlap):
    prompts = PROMPTS[:6]
    single = make_engine(tiny, prefix_cache=False)
    expected = run(single, [Generate(f"r{i}", p, msgspec.structs.replace(params, n=4)) for i, p in enumerate(prompts)])
    engine = make_engine(tiny, overlap=overlap)
    forked = run(engine, [Generate(f"r{i}", p, msgspec.structs.replace(params, n=4)) for i, p in enumerate(prompts)])
    same(forked, expected)
    same({key: forked[key] for key in alone if key in forked}, {key: alone[key] for key in forked if key in alone})


def test_choices_begin_with_a_copy_of_the_first_ones_last_page(tiny):
    engine = make_engine(tiny)
    prompt = START[:31]  # 7 whole pages and 3 tokens
    assert engine.add(Generate("r", prompt, msgspec.structs.replace(SAMPLED, n=4))) == Accepted("r")
    counts = []
    while engine.has_work:
        before = engine.scheduler.tables.num_cached_tokens
        engine.step()
        counts.append(engine.scheduler.tables.num_cached_tokens - before)
    assert counts[:2] == [0, 3 * 30], "each of the three computes one token of the prompt"


def test_the_same_after_others_abort(tiny, params, alone, overlap):
    engine = make_engine(tiny, kv_memory=60 * PAGE_BYTES, max_concurrent=8, overlap=overlap)
    gone = set()

    def abort(number):
        if number % 3 == 0 and len(gone) < 10:
            gone.add(f"r{(number * 5) % 32}")
            engine.abort(f"r{(number * 5) % 32}")

    found = run(engine, requests(params), abort)
    kept = {key: value for key, value in found.items() if key[0] not in gone}
    assert len(kept) >= 22
    same(kept, {key: alone[key] for key in kept})


@pytest.mark.parametrize("settings", [
    {"max_step_tokens": 40, "max_concurrent": 20},
    {"kv_memory": 40 * PAGE_BYTES, "host_kv_memory": 400 * PAGE_BYTES, "preemption": "swap"},
    {"kv_memory": 40 * PAGE_BYTES, "host_kv_memory": 0, "preemption": "recompute", "decode_tokens_per_seq": 3},
    {"num_draft_tokens": 4, "prefix_cache": False},
    {"max_step_tokens": 40, "max_concurrent": 20, "overlap": "on"},
], ids=["chunked", "swapped", "recomputed", "speculated", "overlapped"])  # fmt: skip
def test_deterministic_requests_get_the_same_bits_in_bfloat16(tiny, settings, monkeypatch):
    """Half of the requests are deterministic: alone and among the others their log-probabilities are equal bits."""
    monkeypatch.setattr("crane.runtime.sequence._FIXED_CHUNK", 16)  # so that these prompts have several pieces
    params = msgspec.structs.replace(SAMPLED, deterministic=True)
    chosen = dict(dtype="bfloat16") | settings
    engine = make_engine(tiny, dtype="bfloat16")
    expected = {}
    for request in requests(params)[::2]:
        expected |= run(engine, [request])
        engine.flush_cache()
    engine = make_engine(tiny, **chosen)
    mixed = [Generate(f"r{i}", p, SAMPLED if i % 2 else params, prediction_ids=p) for i, p in enumerate(PROMPTS)]
    for _ in range(2):  # the second time with prefixes found
        found = run(engine, mixed)
        assert {key: found[key] for key in expected} == expected
    assert engine.stats().preemptions > 0 or "kv_memory" not in settings


def test_deterministic_requests_share_prefixes_among_themselves_only(tiny, monkeypatch):
    monkeypatch.setattr("crane.runtime.sequence._FIXED_CHUNK", 16)
    engine = make_engine(tiny)
    fixed = msgspec.structs.replace(GREEDY, deterministic=True)
    run(engine, [Generate("a", START[:60], GREEDY)])
    for rid, cached in (("b", 0), ("c", 48)):
        run(engine, [Generate(rid, START[:60], fixed)])
        assert engine.scheduler.tables.num_cached_tokens == cached
    run(engine, [Generate("d", START[:60], GREEDY)])
    assert engine.scheduler.tables.num_cached_tokens == 48 + 56
