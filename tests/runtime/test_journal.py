"""The journal of outputs: what it keeps, for how long, and how much."""

from crane.runtime.journal import Journal
from crane.runtime.types import Output, TokenLogprob


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def make(max_bytes=1 << 20, keep_s=10.0):
    clock = Clock()
    return Journal(max_bytes, keep_s, clock), clock


def outputs(rid, count, last="length", index=0):
    made = [Output(rid, index, [i, i + 1], logprobs=[TokenLogprob(-0.5, [1], [-0.5])] * 2) for i in range(count)]
    return made + ([Output(rid, index, [9], finish_reason=last)] if last else [])


def test_whoever_resumes_gets_every_output_in_order():
    journal, _ = make()
    journal.open("a", b"note", 1)
    given = outputs("a", 5, last=None)
    for output in (given[0], Output("other", 0, [1]), *given[1:]):
        journal.add(output)
    assert journal.note("a") == b"note" and journal.note("other") is None and journal.resume("other") is None
    assert journal.resume("a") == given == journal.resume("a")
    last = Output("a", 0, [], finish_reason="stop")
    journal.add(last)
    assert journal.resume("a") == [*given, last]


def test_it_is_kept_for_a_while_after_its_end_and_after_its_client_has_left():
    journal, clock = make()
    journal.open("ended", b"", 2)
    journal.open("left", b"", 1)
    journal.open("heard", b"", 1)
    for output in (*outputs("ended", 2), *outputs("ended", 2, index=1)):
        journal.add(output)
    journal.leave("left")
    clock.now += 9
    assert journal.expire() == [] and len(journal) == 3
    assert journal.resume("left") == []  # somebody listens again
    clock.now += 2
    assert journal.note("ended") is None and journal.resume("ended") is None
    assert journal.expire() == [] and len(journal) == 2
    journal.leave("left")
    clock.now += 5
    journal.leave("left")  # twice is not longer
    clock.now += 6
    assert journal.expire() == ["left"] and len(journal) == 1  # it had not ended
    assert journal.resume("heard") == []


def test_with_too_little_memory_those_that_ended_go_first_and_then_the_one_that_grows():
    journal, _ = make(max_bytes=20_000)
    for rid in ("first", "second"):
        journal.open(rid, b"", 1)
        for output in outputs(rid, 30):
            journal.add(output)
    journal.open("long", b"", 1)
    sizes = []
    for output in outputs("long", 500, last=None):
        journal.add(output)
        sizes.append(journal.num_bytes)
    assert max(sizes) <= 20_000
    assert journal.note("first") is None and "long" not in journal  # its stream goes on all the same
    journal.add(Output("long", 0, [1]))
    journal.expire()
    assert journal.num_bytes < 20_000
    journal.open("huge", b"x" * 30_000, 1)
    assert "huge" not in journal
    assert len(journal) == 0 and journal.num_bytes == 0


def test_an_id_used_again_starts_anew():
    journal, _ = make()
    journal.open("a", b"1", 1)
    journal.add(Output("a", 0, [1], finish_reason="stop"))
    journal.open("a", b"2", 1)
    assert journal.note("a") == b"2" and journal.resume("a") == []
    journal.leave("a")
    assert len(journal) == 1
