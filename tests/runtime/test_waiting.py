"""Questions that wait for what the engine does: probes and flushes, as the stepper asks them."""

import time

import pytest

from crane.runtime.types import Accepted, Call, Output, Rejected, Reply
from crane.runtime.waiting import Waiting


class Engine:
    """Takes requests or refuses them; each runs until `end`."""

    def __init__(self, refuses=False):
        self.running = []
        self.refuses = refuses
        self.num_flushes = 0

    @property
    def has_work(self):
        return bool(self.running)

    def add(self, request):
        if self.refuses:
            return Rejected(request.rid, "queue_full", "300 requests are waiting")
        self.running.append(request)
        return Accepted(request.rid)

    def flush_cache(self):
        self.num_flushes += 1
        return 5

    def end(self, reason="length", tokens=(1,)):
        """The outputs with which all that runs ends."""
        outputs = [Output(request.rid, 0, list(tokens), reason) for request in self.running]
        self.running = []
        return outputs


@pytest.fixture
def waiting():
    return Waiting()


def test_idle_engine_is_probed_with_one_greedy_token(waiting):
    engine = Engine()
    waiting.add("peer", Call(3, "probe"))
    assert waiting.prepare(engine) == []
    (request,) = engine.running
    assert (request.sampling.max_tokens, request.sampling.temperature) == (1, 0.0)
    assert waiting.prepare(engine) == [] and len(engine.running) == 1  # one request is enough
    assert waiting.follow([]) == []  # a step may give nothing, as in a long prompt
    assert waiting.follow(engine.end()) == [("peer", Reply(3, {"alive": True}))]
    assert waiting.prepare(engine) == [] and not engine.running


def test_busy_engine_answers_a_probe_with_anybodys_output(waiting):
    engine = Engine()
    engine.running = ["somebody's"]
    waiting.add("peer", Call(3, "probe"))
    assert waiting.prepare(engine) == [] and engine.running == ["somebody's"]
    assert waiting.follow([Output("x", 0, [5])]) == [("peer", Reply(3, {"alive": True}))]


def test_what_ends_otherwise_is_no_sign_of_life(waiting):
    engine = Engine()
    engine.running = ["somebody's"]
    waiting.add("peer", Call(3, "probe"))
    waiting.prepare(engine)
    assert waiting.follow([Output("x", 0, [], "abort"), Output("y", 0, [], "error", error="broken")]) == []
    engine.running = []  # and with them it is idle: now the probe needs a request of its own
    waiting.prepare(engine)
    assert len(engine.running) == 1
    assert waiting.follow(engine.end("error", ())) == [("peer", Reply(3, error="the engine cannot generate"))]


def test_probe_whose_request_is_aborted_makes_another(waiting):
    engine = Engine()
    waiting.add("peer", Call(3, "probe"))
    waiting.prepare(engine)
    first = engine.running[0].rid
    assert waiting.follow(engine.end("abort", ())) == []
    waiting.prepare(engine)
    assert engine.running[0].rid != first


def test_refused_probe_is_answered_at_once(waiting):
    waiting.add("peer", Call(3, "probe"))
    assert waiting.prepare(Engine(refuses=True)) == [("peer", Reply(3, error="300 requests are waiting"))]


def test_idle_engine_is_flushed_at_once(waiting):
    engine = Engine()
    waiting.add("peer", Call(3, "flush_cache", {"timeout_s": 0.0}))
    assert waiting.prepare(engine) == [("peer", Reply(3, {"flushed": True, "pages": 5}))]
    assert engine.num_flushes == 1 and waiting.prepare(engine) == []


def test_busy_engine_is_flushed_once_idle_or_not_at_all(waiting):
    engine = Engine()
    engine.running = ["somebody's"]
    waiting.add("hasty", Call(1, "flush_cache", {"timeout_s": 0.0}))
    waiting.add("patient", Call(2, "flush_cache", {"timeout_s": 30.0}))
    assert waiting.prepare(engine) == []
    assert waiting.follow([Output("x", 0, [5])]) == [("hasty", Reply(1, {"flushed": False, "pages": 0}))]
    engine.running = []
    assert waiting.prepare(engine) == [("patient", Reply(2, {"flushed": True, "pages": 5}))]


def test_patience_ends(waiting):
    engine = Engine()
    engine.running = ["somebody's"]
    waiting.add("peer", Call(1, "flush_cache", {"timeout_s": 0.02}))
    assert waiting.follow([]) == []
    time.sleep(0.03)
    assert waiting.follow([]) == [("peer", Reply(1, {"flushed": False, "pages": 0}))]


def test_peers_that_leave_are_forgotten(waiting):
    engine = Engine()
    waiting.add("gone", Call(1, "probe"))
    waiting.add("here", Call(1, "flush_cache", {"timeout_s": 0.0}))
    waiting.forget("gone")
    assert waiting.prepare(engine) == [("here", Reply(1, {"flushed": True, "pages": 5}))]
    assert not engine.running
