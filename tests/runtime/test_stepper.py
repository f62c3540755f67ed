"""The stepper on a scripted engine: whom it tells what."""

import pytest

from crane.runtime.settings import Settings
from crane.runtime.stepper import Stepper
from crane.runtime.types import Call, Generate, Leave, Output, Rejected, Reply, Resume, SamplingParams, Step
from tests.fake_engine import FakeEngine


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
