"""Frames of the engine socket."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crane.runtime import wire
from crane.runtime.types import (
    Abort, Accepted, Call, EngineInfo, Generate, Hello, Output, Rejected, Reply, SamplingParams, State, Step,
    TokenLogprob, Usage,
)
from crane.runtime.wire import FrameReader, WireError, pack

INFO = EngineInfo(1, "/m", "llama", "float32", "cpu", 2048, 1000, 10, 16, 32, 16)
TO_ENGINE = [
    Hello(1, 42, "0.1"),
    Generate("r", [1, 2], SamplingParams(stop=("a", "b"), logit_bias={5: -1.5}, seed=-(2**63), logprobs=0)),
    Abort(None),
    Abort("r"),
    Call(7, "stats", {"deep": [1, None]}),
]
TO_API = [
    State("loading", loaded_bytes=2**40, total_bytes=2**41),
    State("ready", info=INFO),
    Accepted("r"),
    Rejected("r", "queue_full", "full", 1.5),
    Step([
        Output("r", 0, [5], logprobs=[TokenLogprob(-0.5, [1], [-0.25])],
               prompt_logprobs=[None, TokenLogprob(-1.0)]),
        Output("r", 1, [], finish_reason="stop", matched_id=3, usage=Usage(3, 9, 2, 0.1, 0.2, 0.3)),
        Output("é中🙂", 2, [], finish_reason="error", error="why"),
    ]),
    Reply(7, {"a": 1}, None),
]


@pytest.mark.parametrize("side, messages", [("engine", TO_ENGINE), ("api", TO_API)])
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_messages_survive_the_wire_however_it_cuts_them(side, messages, size):
    data = b"".join(pack(message) for message in messages)
    reader = FrameReader(side)
    read = [m for start in range(0, len(data), size) for m in reader.feed(data[start : start + size])]
    assert read == messages


@pytest.mark.parametrize("side, message", [("engine", Accepted("r")), ("api", Abort("r"))])
def test_a_message_of_the_other_direction_is_refused(side, message):
    with pytest.raises(WireError, match="malformed"):
        FrameReader(side).feed(pack(message))


def test_a_frame_over_the_limit_is_refused_before_it_is_buffered(monkeypatch):
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 100)
    with pytest.raises(WireError, match="exceeds"):
        FrameReader("engine").feed((101).to_bytes(4, "little"))
    with pytest.raises(WireError, match="exceeds"):
        pack(Call(1, "x" * 200))
    assert FrameReader("engine").feed(pack(Call(1, "x" * 50))) == [Call(1, "x" * 50)]


@given(st.binary(max_size=200))
def test_any_bytes_give_messages_or_a_wire_error(data):
    try:
        FrameReader("engine").feed(data)
    except WireError:
        pass


@given(st.binary(max_size=60))
def test_any_body_gives_a_message_or_a_wire_error(body):
    try:
        FrameReader("api").feed(len(body).to_bytes(4, "little") + body)
    except WireError:
        pass
