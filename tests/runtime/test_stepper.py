"""The stepper on a scripted engine: whom it tells what."""

import threading
import time
from types import SimpleNamespace

import msgspec
import pytest

from crane.runtime import stepper as stepper_module
from crane.runtime.settings import Settings
from crane.runtime.stepper import Company, Stepper
from crane.runtime.types import Accepted, Call, Generate, Leave, Output, Rejected, Reply, Resume, SamplingParams, Step
from tests.fake_engine import REFUSE, FakeEngine


class Audience:
    """The loop's side. heard: (peer, message), in order; react(peer, message) may post more."""

    def __init__(self, tmp_path, engine=FakeEngine):
        self.heard = []
        self.react = lambda peer, message: None
        settings = Settings(model_path=str(tmp_path), journal_s=60.0)
        self.stepper = Stepper(settings, engine, lambda method, *args: method(*args), self)

    def loading(self, *sizes):
        pass

    def ready(self, info):
        pass

    def failed(self, reason):
        pytest.fail(reason)

    def drained(self):
        pass

    def deliver(self, messages):
        for peer, message in messages:
            self.heard.append((peer, message))
            self.react(peer, message)

    def outputs(self, peer):
        return [o for who, message in self.heard if who == peer and isinstance(message, Step) for o in message.outputs]


def request(rid, journal=None):
    return Generate(rid, [1], SamplingParams(max_tokens=2), journal=journal)


def test_a_request_that_reuses_the_id_of_a_kept_stream_does_not_go_on_with_it(tmp_path):
    audience = Audience(tmp_path)
    stepper = audience.stepper
    ends = []

    def react(peer, message):
        if isinstance(message, Step) and message.outputs[-1].finish_reason:
            ends.append(peer)
            if ends == ["a"]:
                stepper.post("b", request("x"))
            elif ends == ["a", "b"]:
                stepper.post("c", Call(1, "journal", "x"))
                stepper.post("c", Resume("x"))
                stepper.drain()

    audience.react = react
    stepper.post("a", request("x", b"note"))
    stepper.run()
    assert len(audience.outputs("b")) == 2
    told = [message for peer, message in audience.heard if peer == "c"]
    assert told[0] == Reply(1, None) and isinstance(told[1], Rejected), "the earlier stream is not kept any more"


class Forgetful(FakeEngine):
    """Loses all that runs when a request is aborted, as when copying pages fails."""

    def abort(self, rid, index=None):
        return super().abort(rid, index) + self.fail_all("the engine lost its cache")


@pytest.mark.parametrize("message", [None, Leave("mine")])
def test_what_the_engine_loses_when_somebody_leaves_is_told_to_the_others(tmp_path, message):
    audience = Audience(tmp_path, Forgetful)
    audience.stepper.post("a", request("mine"))
    audience.stepper.post("b", request("other"))
    audience.stepper.post("a", message)
    audience.stepper.drain()
    audience.stepper.run()
    assert audience.outputs("a") == []
    assert audience.outputs("b") == [Output("other", 0, [], finish_reason="error", error="the engine lost its cache")]


def test_a_question_that_breaks_the_engine_is_answered_and_costs_nobody_anything(tmp_path):
    audience = Audience(tmp_path)
    audience.stepper.post("a", request("mine"))
    audience.stepper.post("b", Call(1, "plan", "nonsense"))
    audience.stepper.drain()
    audience.stepper.run()
    (reply,) = [message for peer, message in audience.heard if peer == "b"]
    assert reply == Reply(1, error="the engine failed on this request: ValidationError")
    assert audience.outputs("a")[-1].finish_reason == "length"


def test_acceptances_come_with_the_first_outputs_but_refusals_and_what_comes_with_them_before(tmp_path):
    audience = Audience(tmp_path)
    deliveries, deliver = [], audience.deliver

    def note(messages):
        deliveries.append([(peer, type(message)) for peer, message in messages])
        deliver(messages)

    def react(peer, message):
        if isinstance(message, Step) and len(deliveries) == 1:
            audience.stepper.post("a", request("two"))
            audience.stepper.post("b", Generate("no", [REFUSE], SamplingParams()))
            audience.stepper.drain()

    audience.deliver, audience.react = note, react
    audience.stepper.post("a", request("one"))
    audience.stepper.run()
    assert deliveries[:2] == [[("a", Accepted), ("a", Step)], [("a", Accepted), ("b", Rejected)]]
    assert len(audience.outputs("a")) == 4 and audience.stepper.held() == []


class Clocked:
    """A `Company` of steps of 512 tokens and a clock of the test's."""

    def __init__(self):
        self.now_s = 0.0
        self.company = Company(512, lambda: self.now_s)

    def burst(self, *delays_s, num_tokens=100, step_s=0.1):
        """Requests come to an idle engine, so long after the first. Returns what each let the first step wait."""
        self.now_s += 1000
        woken_s, waits_s = self.now_s, []
        for delay_s in (0, *delays_s):
            self.now_s = woken_s + delay_s
            self.company.add(self.now_s, not waits_s, num_tokens)
            waits_s.append(self.company.wait_s)
        self.company.stepped(step_s)
        return waits_s


def test_a_request_waits_for_others_only_where_they_soon_followed_the_one_before():
    scene = Clocked()
    assert scene.burst() == [0] and scene.burst() == [0], "nobody ever came"
    assert scene.burst(0.004, 0.008) == [0, 0, 0], "nobody could know"
    assert scene.burst(0.004, 0.008) == pytest.approx([0.01, 0.006, 0]), "as many as before are there"
    assert scene.burst() == pytest.approx([0.01]), "it may be that they come again"
    assert scene.burst(0.02) == [0, 0], "the last one was alone"
    assert scene.burst() == [0], "who came after 20 ms was none to wait for"


def test_a_request_waits_no_longer_once_a_step_is_full_or_where_steps_are_short():
    scene = Clocked()
    scene.burst(0.001, 0.002, 0.003)
    assert scene.burst(0.001, 0.002, 0.003, num_tokens=200) == pytest.approx([0.01, 0.009, 0, 0])
    assert scene.burst(0.001, num_tokens=512) == [0, 0]
    scene.burst(0.0001, step_s=0.002)
    assert scene.burst() == pytest.approx([0.0002]), "missing a step of 2 ms is no loss"


class Noting(FakeEngine):
    """Notes which requests each step has."""

    def __init__(self, settings, progress):
        super().__init__(settings, progress)
        self.step_rids = []

    def step(self):
        self.step_rids.append(sorted(rid for rid, _ in self.running))
        return super().step()


def test_a_burst_to_an_idle_engine_starts_in_one_step_once_there_was_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(stepper_module, "COMPANY_S", 60.0)
    monkeypatch.setattr(stepper_module, "COMPANY_SHARE", 6000.0)  # the clock is not what ends the waiting here
    engines = []
    audience = Audience(tmp_path, lambda *args: engines.append(Noting(*args)) or engines[0])
    stepper, ended = audience.stepper, threading.Semaphore(0)
    audience.react = lambda peer, message: isinstance(message, Step) and [
        ended.release() for output in message.outputs if output.finish_reason
    ]
    stepper.start()
    stepper.post("a", request("first"))
    stepper.post("b", request("second"))
    ended.acquire(), ended.acquire()
    del engines[0].step_rids[:]
    stepper.post("a", request("third"))
    while engines[0].num_added < 3:  # it was taken, and could start
        time.sleep(0.001)
    assert not engines[0].step_rids
    stepper.post("b", request("fourth"))
    ended.acquire(), ended.acquire()
    assert engines[0].step_rids[0] == ["fourth", "third"]
    stepper.drain()
    stepper.join()


@pytest.mark.parametrize("long_s, device, pauses", [(0.0, "cpu", 2), (60.0, "cpu", 0), (0.0, "cuda", 0)])
def test_first_tokens_get_out_before_the_cores_are_busy_again(tmp_path, monkeypatch, long_s, device, pauses):
    def engine(*args):
        made = FakeEngine(*args)
        made.info = msgspec.structs.replace(made.info, device=device)
        return made

    def react(peer, message):
        if isinstance(message, Step) and message.outputs[0].finish_reason:
            audience.stepper.post("b", request("second")) if peer == "a" else audience.stepper.drain()

    slept = []
    monkeypatch.setattr(stepper_module, "LONG_STEP_S", long_s)
    monkeypatch.setattr(stepper_module, "time", SimpleNamespace(monotonic=time.monotonic, sleep=slept.append))
    audience = Audience(tmp_path, engine)
    audience.react = react
    audience.stepper.post("a", request("first"))
    audience.stepper.run()
    assert len(audience.outputs("a")) > 1 and slept == [stepper_module.LET_OUT_S] * pauses
