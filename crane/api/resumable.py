"""Streams that survive their connection: events are numbered, and whoever has the last number gets the rest.

The engine keeps what such a request was given (`runtime.journal`), and the request itself as the API got it. To go on,
any worker makes the generation anew from the request, feeds it everything from the start, which gives the
same events, and leaves out those that the client has.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import msgspec

from crane.api import sse
from crane.api.bodies import invalid
from crane.api.endpoint import Answer, Context, Endpoint, Generation, Question, Request
from crane.errors import EngineError, RequestError

_EVENT_ID = re.compile(r"([\w-]{1,200}):(\d{1,9})", re.ASCII)
_runs: dict[str, Callable[[Context, Request], Generation]] = {}  # by path


class Record(msgspec.Struct, array_like=True):
    """A request, as it is made again. tenant: whose key it came with; id, created: of its answer."""

    path: str
    body: bytes
    tenant: str
    id: str
    created: int


class NumberedGeneration:
    """A `Generation` that streams, with an `id:` before every event, and without the first `num_known` events.

    It has no `body`: drivers ask for that of answers that do not stream.
    """

    stream = True

    def __init__(self, generation: Generation, num_known: int = 0, resumes: bool = False):
        self._generation = generation
        self.requests, self.aborts = generation.requests, generation.aborts
        self._num_known = num_known
        self._num_events = 0
        self.resumes = resumes  # its requests run already
        for choice in generation.choices:
            if choice.parser is not None:  # ids of tool calls must not change either
                choice.parser.new_id = _call_ids(generation.id, choice.index)

    @property
    def finished(self) -> bool:
        return self._generation.finished

    @property
    def failed(self) -> EngineError | None:
        return self._generation.failed

    @failed.setter
    def failed(self, error: EngineError) -> None:
        self._generation.failed = error

    def start(self) -> bytes:
        return self._number(self._generation.start())

    def feed(self, outputs: list) -> bytes:
        return self._number(self._generation.feed(outputs))

    @property
    def num_tokens(self) -> int:
        return self._generation.num_tokens

    def finish(self) -> bytes:
        return self._number(self._generation.finish())

    def _number(self, frames: bytes) -> bytes:
        parts = []
        for frame in frames.split(b"\n\n")[:-1]:
            self._num_events += 1
            if self._num_events > self._num_known:
                parts.append(b"id: %b:%d\n%b\n\n" % (self._generation.id.encode(), self._num_events, frame))
        return b"".join(parts)


def resumable(path: str) -> Callable:
    """Decorates the `run` of the POST endpoint at `path`, which gives a `BaseGeneration`.

    With `resumable` in the body its stream is numbered and kept. With a Last-Event-ID, whatever the body, the
    stream that this names goes on.
    """

    def decorate(run: Callable[[Context, Request], Generation]) -> Callable[[Context, Request], Answer]:
        _runs[path] = run

        @functools.wraps(run)
        def numbered(context: Context, request: Request) -> Answer:
            if request.last_event_id:
                return _go_on(context, *_parsed(request.last_event_id))
            generation = run(context, request)
            if not generation.resumable:
                return generation
            if not generation.stream or len(generation.requests) != 1:
                raise invalid("resumable", "goes with stream: true and one prompt only")
            if not context.settings.journal_memory:
                raise invalid("resumable", "this server keeps no streams (--journal-memory)")
            record = Record(path, request.body, context.tenant, generation.id, generation.created)
            note = msgspec.msgpack.encode(record)
            generation.requests = [msgspec.structs.replace(generation.requests[0], journal=note)]
            return NumberedGeneration(generation)

        return numbered

    return decorate


def stream(context: Context, request: Request) -> Answer:
    """The events of a resumable stream, from behind Last-Event-ID (or ?after=, a number; default 0) to its end."""
    stream_id, num_known = request.params["id"], 0
    if request.last_event_id:
        named, num_known = _parsed(request.last_event_id)
        if named != stream_id:
            raise RequestError(f"Last-Event-ID is of another stream: {named}", field="Last-Event-ID")
    elif "after" in request.query:
        after = request.query["after"]
        if not re.fullmatch(r"\d{1,9}", after, re.ASCII):
            raise invalid("after", f"expected the number of an event, got {after[:40]!r}")
        num_known = int(after)
    return _go_on(context, stream_id, num_known)


def _go_on(context: Context, stream_id: str, num_known: int) -> Question:
    def render(note: bytes | None) -> NumberedGeneration:
        record = msgspec.msgpack.decode(note, type=Record) if note else None
        if record is None or record.tenant != context.tenant:
            why = "it was not resumable, or ended too long ago"
            message = f"there is no stream {stream_id[:200]} that can be resumed: {why}"
            raise RequestError(message, code="stream_not_found", status=404)
        again = dataclasses.replace(context, identity=(record.id, record.created))
        generation = _runs[record.path](again, Request("POST", record.path, {}, {}, record.body))
        generation.requests = [msgspec.structs.replace(generation.requests[0], journal=note)]
        return NumberedGeneration(generation, num_known, resumes=True)

    return Question("journal", render, stream_id)


def _parsed(event_id: str) -> tuple[str, int]:
    match = _EVENT_ID.fullmatch(event_id)
    if match is None:
        message = f"Last-Event-ID: expected the id of an event of a resumable stream, got {event_id[:60]!r}"
        raise RequestError(message, field="Last-Event-ID", code="stream_not_found", status=404)
    return match[1], int(match[2])


def _call_ids(stream_id: str, index: int) -> Callable[[], str]:
    count = iter(range(1 << 30))
    return lambda: f"call_{stream_id.rpartition('-')[2][:16]}{index:04x}{next(count):04x}"


ENDPOINTS = (
    Endpoint("GET", "/v1/streams/{id}", stream, needs="link", query={"after": {"type": "integer", "minimum": 0}},
             content_type=sse.CONTENT_TYPE),
)  # fmt: skip
