"""Timelines say what happened to a request, in order; the trace of them is one that viewers load."""

import msgspec

from crane.runtime.types import Generate
from tests.runtime.test_engine import GREEDY, PROMPTS, SAMPLED, make_engine, run, tiny  # noqa: F401 (a fixture)


def timelines(got):
    return {key: last.timeline for key, (_, last) in got.items()}


def check(events):
    """In order, and within one another's times."""
    assert events[0]["event"] == "queued" and events[0]["ms"] == 0 and events[-1]["event"] == "finished"
    starts = [event["ms"] for event in events if event["event"] != "first_token"]
    assert starts == sorted(starts)
    assert all(event["ms"] + event.get("duration_ms", 0) <= events[-1]["ms"] + 0.01 for event in events)


def names(events):
    return [event["event"] for event in events]


def test_a_timeline_has_the_queue_chunks_cache_hits_and_the_end(tiny):  # noqa: F811
    engine = make_engine(tiny, max_step_tokens=16, max_concurrent=4, page_size=4)
    request = Generate("a", list(range(40)), GREEDY, timeline=True)
    events = timelines(run(engine, [request, Generate("b", PROMPTS[1], GREEDY)]))
    assert events["b", 0] is None
    check(events["a", 0])
    assert names(events["a", 0])[:3] == ["queued", "admitted", "prefill"]
    assert sum(e["tokens"] for e in events["a", 0] if e["event"] == "prefill") == 40
    decoded = [e for e in events["a", 0] if e["event"] == "decode"]
    assert sum(e["tokens"] for e in decoded) == 23 and names(events["a", 0]).count("first_token") == 1
    assert events["a", 0][-1]["reason"] == "length" and events["a", 0][-1]["output_tokens"] == 24
    (again,) = timelines(run(engine, [request])).values()
    assert again[1]["cached_tokens"] >= 36


def test_preemptions_drafts_and_aborts_are_in_it(tiny):  # noqa: F811
    small = {"page_size": 4, "kv_memory": 2 * 16 * 2 * 2 * 4 * 64, "max_model_len": 0}
    engine = make_engine(tiny, **small)
    got = run(engine, [Generate(f"r{i}", prompt, SAMPLED, timeline=True) for i, prompt in enumerate(PROMPTS)])
    assert engine.stats().preemptions > 0
    for (_, last), events in zip(got.values(), timelines(got).values()):
        check(events)
        assert names(events).count("preempted") == last.usage.num_preemptions == names(events).count("resumed")
    plain = got["r7", 0][0]
    engine = make_engine(tiny)
    params = msgspec.structs.replace(SAMPLED, num_draft_tokens=8)
    (events,) = timelines(run(engine, [Generate("p", PROMPTS[7], params, None, "", plain, timeline=True)])).values()
    assert sum(e["accepted"] for e in events if e["event"] == "decode") == engine.stats().accepted_tokens > 0
    engine.add(Generate("gone", PROMPTS[0], GREEDY, timeline=True))
    engine.step()
    (ended,) = engine.abort("gone")
    assert ended.timeline[-1]["reason"] == "abort"


def test_the_trace_is_in_chromes_format_and_bounded(tiny):  # noqa: F811
    engine = make_engine(tiny, trace_requests=5)
    run(engine, [Generate(f"r{i}", PROMPTS[i], msgspec.structs.replace(SAMPLED, n=2)) for i in range(4)])
    trace = engine.trace()
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str) and isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert event["ph"] in ("M", "X", "i")
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name") and event["args"]["name"]
        else:
            assert event["ts"] > 1e15 and event["cat"] == "request"
            assert event["dur"] >= 0 if event["ph"] == "X" else event["s"] == "t"
    threads = {(e["pid"], e["tid"]) for e in trace["traceEvents"]}
    assert len(threads) == 5
    assert {"queued", "prefill", "decode", "finished"} <= {e["name"] for e in trace["traceEvents"]}
    off = make_engine(tiny)
    run(off, [Generate("a", PROMPTS[0], GREEDY)])
    assert off.trace()["traceEvents"] == []
