"""What a worker holds of its requests while the engine runs them. Torch-free."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Protocol

from crane.errors import EngineError
from crane.runtime.types import Accepted, Generate, Output, Rejected

# When the engine is away, this much later it may be back.
RETRY_S = 1.0
LOST = "engine_lost: the engine ended before it finished this request"


class Carrier(Protocol):
    """Who sends a stream's requests: `client.Link`."""

    def send(self, frame: bytes) -> None:
        """To the engine."""

    def forget(self, rid: str) -> None:
        """The stream does not want the request any more."""

    def leave(self, rid: str) -> None:
        """The stream's client is gone, and may come back for the request."""

    def ended(self, rid: str) -> None:
        """The request has had its last output."""

    def touch(self, stream: "Stream") -> None:
        """Call its `deliver` once everything that came at the same time is with it."""


class Stream:
    """The outputs of one group of requests, in order of arrival. Belongs to the link's loop; one task at a time waits,
    or a listener is called.

    frames: the requests, packed. The engine gets as many of them as make `window` choices, and
    another whenever one ends: a large group fits into its queue, and leaves room for others.
    """

    def __init__(self, link: Carrier, requests: Sequence[Generate], frames: Sequence[bytes], window: int):
        self._link = link
        self._open = {request.rid: set(range(request.sampling.n)) for request in requests}
        self._frames = {request.rid: (frame, request.sampling.n) for request, frame in zip(requests, frames)}
        self._kept = {request.rid for request in requests if request.journal is not None}
        self._window = window
        self._num_sent = 0  # choices of requests that the engine has
        self._unsent = deque(self._open)
        self._unaccepted: set[str] = set()
        self._refused: EngineError | None = None
        self._outputs: list[Output] = []
        self._waiter: asyncio.Future[None] | None = None
        self._listener: Callable[[list[Output]], None] | None = None
        self._disconnected = False
        self._send()
        self._first = set(self._unaccepted)

    @property
    def finished(self) -> bool:
        """Every choice has had its last output, whether `next` has given it out or not."""
        return not self._open

    async def accepted(self) -> None:
        """Wait until the engine has taken the first requests, of most groups all. EngineError when it refuses
        one: none runs then. Later ones wait for room, and if refused otherwise end with an error."""
        while self._first and self._refused is None and not self._disconnected:
            self._waiter = asyncio.Future()
            await self._waiter
        if self._refused is not None:
            self.close()
            raise self._refused

    async def next(self) -> list[Output]:
        """All outputs that have come, at least one; [] once finished or after `disconnect`."""
        while not self._has_news:
            self._waiter = asyncio.Future()
            await self._waiter
        return self._news()

    def listen(self, listener: Callable[[list[Output]], None] | None) -> None:
        """Instead of `next`: from now on it is called with what that would return. None: no longer."""
        self._listener = listener
        if listener is not None and self._has_news:
            self._link.touch(self)

    def deliver(self) -> None:
        """From the link, after `touch`."""
        listener, outputs = self._listener, self._outputs
        if listener is None:
            return
        if outputs and not self._disconnected:
            self._outputs = []
            listener(outputs)
        elif self._has_news:
            listener([])
        if not self._open:  # for a listener that is still there: nothing more comes
            self.listen(self._listener)

    @property
    def _has_news(self) -> bool:
        return bool(self._outputs or self._disconnected or not self._open)

    def _news(self) -> list[Output]:
        if self._disconnected:
            return []
        outputs, self._outputs = self._outputs, []
        return outputs

    def disconnect(self) -> None:
        """The client is gone: whoever waits in `next` gets []."""
        self._disconnected = True
        self._wake()

    def close(self) -> None:
        """Abort what is unfinished and not in the journal; `next` gives nothing more. Idempotent."""
        for rid in self._open:
            if rid in self._unsent:
                self._link.ended(rid)
            elif rid in self._kept:
                self._link.leave(rid)
            else:
                self._link.forget(rid)
        self._clear()
        self._outputs = []
        self._wake()

    def hand_over(self) -> None:
        """Another stream of this link has the requests now: end like one whose client is gone."""
        self._clear()
        self.disconnect()

    def take(self, message: Accepted | Rejected | Output) -> None:
        """From the link: something about one of this stream's requests."""
        rid = message.rid
        if isinstance(message, Output):
            if rid in self._unaccepted:
                return  # a late output of an earlier request with this rid
            self._outputs.append(message)
            if message.finish_reason is not None:
                self._open[rid].discard(message.index)
                if message.finish_reason == "abort":  # by somebody who cannot know of those not sent yet
                    self._drop_unsent()
                if not self._open[rid]:
                    self._end(rid)
        elif isinstance(message, Accepted):
            self._unaccepted.discard(rid)
            self._first.discard(rid)
        else:
            self._reject(rid, message)
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if self._listener is not None:
            self._link.touch(self)
        elif waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def _reject(self, rid: str, message: Rejected) -> None:
        num_others = self._num_sent - self._frames[rid][1]
        if self._first:
            self._refused = self._refused or EngineError(message.code, message.message, message.retry_after_s)
        elif message.code == "queue_full" and num_others:  # others took the room: again when one of ours ends
            self._num_sent = num_others
            self._unaccepted.discard(rid)
            self._unsent.appendleft(rid)
            return
        else:
            self._fail([rid], message.message)
        self._end(rid)

    def _send(self) -> None:
        """As many requests as fit into the window; at least one is always under way."""
        frames = []
        while self._unsent and self._refused is None:
            frame, n = self._frames[self._unsent[0]]
            if self._num_sent and self._num_sent + n > self._window:
                break
            self._num_sent += n
            self._unaccepted.add(self._unsent.popleft())
            frames.append(frame)
        if frames:
            self._link.send(b"".join(frames))

    def _drop_unsent(self) -> None:
        for rid in self._unsent:
            self._outputs += [Output(rid, i, [], finish_reason="abort") for i in sorted(self._open.pop(rid))]
            self._link.ended(rid)
        self._unsent.clear()

    def _end(self, rid: str) -> None:
        self._open.pop(rid, None)
        self._unaccepted.discard(rid)
        self._num_sent -= self._frames[rid][1]
        self._link.ended(rid)
        self._send()

    def _fail(self, rids: list[str], reason: str) -> None:
        for rid in rids:
            self._outputs += [Output(rid, i, [], finish_reason="error", error=reason) for i in sorted(self._open[rid])]

    def _clear(self) -> None:
        for group in (self._open, self._unaccepted, self._first, self._unsent):
            group.clear()

    def lose(self) -> None:
        """From the link: the engine is gone."""
        if self._first:
            self._refused = self._refused or EngineError("lost", LOST, RETRY_S)
        self._fail(list(self._open), LOST)
        self._clear()
        self._wake()


class BlockingStream:
    """A Stream for one thread that waits."""

    def __init__(self, stream: Stream, loop: asyncio.AbstractEventLoop):
        self._stream = stream
        self._loop = loop
        self._next: Future | None = None

    @property
    def finished(self) -> bool:
        return self._stream.finished

    def accepted(self, timeout_s: float | None = None) -> None:
        """As `Stream.accepted`. Raises EngineError, also when the engine has not answered in time."""
        answer = asyncio.run_coroutine_threadsafe(self._stream.accepted(), self._loop)
        try:
            answer.result(timeout_s)
        except FutureTimeout:
            self.close()
            raise EngineError("internal", f"no answer within {timeout_s:g} s", RETRY_S) from None

    def next(self, timeout_s: float | None = None) -> list[Output] | None:
        """As `Stream.next`; None when nothing has come in time."""
        if self._next is None:
            self._next = asyncio.run_coroutine_threadsafe(self._stream.next(), self._loop)
        try:
            outputs = self._next.result(timeout_s)
        except FutureTimeout:
            return None  # and the next call waits on: what comes meanwhile is not lost
        self._next = None
        return outputs

    def disconnect(self) -> None:
        """From any thread: whoever waits in `next` gets []."""
        self._loop.call_soon_threadsafe(self._stream.disconnect)

    def close(self) -> None:
        """Abort what is unfinished. Idempotent."""
        self._loop.call_soon_threadsafe(self._stream.close)
