"""A group of requests on its way to the engine: how many are sent when, and how each of them ends."""

import asyncio

import pytest

from crane.errors import EngineError
from crane.runtime.stream import LOST, Stream
from crane.runtime.types import Accepted, Generate, Output, Rejected, SamplingParams


class Carrier:
    """A link that takes notes."""

    def __init__(self):
        self.writes: list[bytes] = []
        self.forgotten: list[str] = []
        self.gone: list[str] = []
        self.touched: list[Stream] = []

    @property
    def sent(self) -> str:
        return b"".join(self.writes).decode()

    def send(self, frame):
        self.writes.append(frame)

    def forget(self, rid):
        self.forgotten.append(rid)

    def ended(self, rid):
        self.gone.append(rid)

    def touch(self, stream):
        self.touched.append(stream)


def group(rids: str, window: int, n: int = 1) -> tuple[Carrier, Stream]:
    """One request per letter, whose frame is that letter."""
    carrier = Carrier()
    requests = [Generate(rid, [1], SamplingParams(n=n)) for rid in rids]
    return carrier, Stream(carrier, requests, [rid.encode() for rid in rids], window)


def end(stream: Stream, rid: str, index: int = 0, reason: str = "stop") -> None:
    stream.take(Output(rid, index, [1], reason))


def accept(stream: Stream, rids: str) -> None:
    for rid in rids:
        stream.take(Accepted(rid))


def ends(stream: Stream) -> dict[str, str]:
    outputs = asyncio.run(stream.next())
    return {output.rid: output.finish_reason for output in outputs if output.finish_reason}


def test_group_that_fits_is_sent_in_one_write():
    carrier, stream = group("abc", 3)
    assert carrier.writes == [b"abc"]
    accept(stream, "abc")
    asyncio.run(stream.accepted())


def test_rest_of_a_large_group_is_sent_as_others_end():
    carrier, stream = group("abcde", 2)
    assert carrier.sent == "ab"
    accept(stream, "ab")
    asyncio.run(stream.accepted())
    for rid in "abcde":
        end(stream, rid)
        expected = {"a": "abc", "b": "abcd"}.get(rid, "abcde")
        assert carrier.sent == expected
        accept(stream, expected[-1])
    assert stream.finished and ends(stream) == dict.fromkeys("abcde", "stop")
    assert carrier.gone == list("abcde") and asyncio.run(stream.next()) == []


def test_window_counts_choices_and_always_lets_one_request_through():
    carrier, stream = group("abc", 5, n=3)
    accept(stream, "a")
    assert carrier.sent == "a"
    end(stream, "a", 0), end(stream, "a", 1)
    assert carrier.sent == "a"
    end(stream, "a", 2)
    assert carrier.sent == "ab"
    assert group("ab", 1, n=3)[0].sent == "a"


def test_refusal_of_a_first_request_refuses_the_group():
    carrier, stream = group("abc", 2)
    accept(stream, "a")
    stream.take(Rejected("b", "queue_full", "no room", 2.0))
    with pytest.raises(EngineError) as raised:
        asyncio.run(stream.accepted())
    assert raised.value.code == "queue_full" and carrier.sent == "ab"
    assert carrier.forgotten == ["a"] and sorted(carrier.gone) == ["b", "c"] and stream.finished


def test_later_request_that_finds_the_queue_full_is_sent_again():
    carrier, stream = group("abcd", 2)
    accept(stream, "ab")
    end(stream, "a")
    stream.take(Rejected("c", "queue_full", "others were faster"))
    assert carrier.sent == "abc" and not stream.finished
    end(stream, "b")
    assert carrier.sent == "abccd"
    accept(stream, "cd")
    end(stream, "c"), end(stream, "d")
    assert ends(stream) == dict.fromkeys("abcd", "stop")


def test_later_request_that_is_refused_otherwise_ends_with_the_reason():
    carrier, stream = group("abcd", 2)
    accept(stream, "ab")
    end(stream, "a")
    stream.take(Rejected("c", "draining", "the server is stopping"))
    outputs = asyncio.run(stream.next())
    assert (outputs[-1].rid, outputs[-1].finish_reason, outputs[-1].error) == ("c", "error", "the server is stopping")
    assert carrier.sent == "abcd"


def test_aborted_group_sends_no_more():
    carrier, stream = group("abcd", 2)
    accept(stream, "ab")
    end(stream, "a", reason="abort"), end(stream, "b", reason="abort")
    assert carrier.sent == "ab" and stream.finished
    assert ends(stream) == dict.fromkeys("abcd", "abort")


def test_close_aborts_what_was_sent_and_sends_no_more():
    carrier, stream = group("abcd", 2)
    accept(stream, "ab")
    stream.close()
    assert carrier.forgotten == ["a", "b"] and carrier.gone == ["c", "d"] and carrier.sent == "ab"
    assert stream.finished and asyncio.run(stream.next()) == []


def test_lost_engine_ends_every_request_sent_or_not():
    carrier, stream = group("abcd", 2)
    accept(stream, "ab")
    asyncio.run(stream.accepted())
    stream.lose()
    outputs = asyncio.run(stream.next())
    assert [(output.rid, output.error) for output in outputs] == [(rid, LOST) for rid in "abcd"]
    assert carrier.sent == "ab"


def listening(rids: str) -> tuple[Carrier, Stream, list]:
    carrier, stream = group(rids, 8)
    accept(stream, rids)
    heard = []
    stream.listen(heard.append)
    return carrier, stream, heard


def test_a_listener_hears_everything_that_came_together_at_once_and_then_the_end():
    carrier, stream, heard = listening("ab")
    assert not carrier.touched
    stream.take(Output("a", 0, [1]))
    end(stream, "b")
    assert not heard and set(carrier.touched) == {stream}
    stream.deliver()
    stream.deliver()
    assert [[output.rid for output in outputs] for outputs in heard] == [["a", "b"]]
    end(stream, "a")
    carrier.touched.clear()
    stream.deliver()
    assert carrier.touched == [stream], "who still listens is to hear that nothing more comes"
    stream.deliver()
    assert [len(outputs) for outputs in heard] == [2, 1, 0]


def test_nothing_is_lost_while_nobody_listens():
    carrier, stream, heard = listening("a")
    stream.listen(None)
    stream.take(Output("a", 0, [1]))
    stream.deliver()
    assert not heard and not carrier.touched
    stream.listen(heard.append)
    end(stream, "a")
    stream.deliver()
    assert carrier.touched and [len(outputs) for outputs in heard] == [2]


@pytest.mark.parametrize("how", [Stream.disconnect, Stream.close, Stream.lose])
def test_a_listener_hears_of_the_end_however_it_comes(how):
    carrier, stream, heard = listening("a")
    how(stream)
    assert carrier.touched == [stream]
    stream.deliver()
    expected = [["error"]] if how is Stream.lose else [[]]
    assert [[output.finish_reason for output in outputs] for outputs in heard] == expected
