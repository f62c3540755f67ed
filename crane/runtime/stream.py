"""What a worker holds of its requests while the engine runs them. Torch-free."""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from crane.errors import EngineError
from crane.runtime.types import Accepted, Generate, Output, Rejected

# When the engine is away, this much later it may be back.
RETRY_S = 1.0
LOST = "engine_lost: the engine ended before it finished this request"


class Carrier(Protocol):
    """Who sends a stream's requests: `client.Link`."""

    def forget(self, rid: str) -> None:
        """The stream does not want the request any more."""

    def ended(self, rid: str) -> None:
        """The request has had its last output."""


class Stream:
    """The outputs of one group of requests, in order of arrival. Belongs to the link's loop."""

    def __init__(self, link: Carrier, requests: Sequence[Generate]):
        self._link = link
        self._open = {request.rid: set(range(request.sampling.n)) for request in requests}
        self._unaccepted = set(self._open)
        self._refused: EngineError | None = None
        self._outputs: deque[Output] = deque()
        self._changed = asyncio.Event()
        self._disconnected = False

    @property
    def finished(self) -> bool:
        """Every choice has had its last output, whether `next` has given it out or not."""
        return not self._open

    async def accepted(self) -> None:
        """Wait until the engine has taken all requests. EngineError when it refuses one: none runs then."""
        while self._unaccepted and self._refused is None and not self._disconnected:
            self._changed.clear()
            await self._changed.wait()
        if self._refused is not None:
            self.close()
            raise self._refused

    async def next(self) -> list[Output]:
        """All outputs that have come, at least one; [] once finished or after `disconnect`."""
        while not self._outputs and not self._disconnected and self._open:
            self._changed.clear()
            await self._changed.wait()
        if self._disconnected:
            return []
        outputs = list(self._outputs)
        self._outputs.clear()
        return outputs

    def disconnect(self) -> None:
        """The client is gone: whoever waits in `next` gets []."""
        self._disconnected = True
        self._changed.set()

    def close(self) -> None:
        """Abort what is unfinished; `next` gives nothing more. Idempotent."""
        for rid in self._open:
            self._link.forget(rid)
        self._open.clear()
        self._unaccepted.clear()
        self._outputs.clear()
        self._changed.set()

    def take(self, message: Accepted | Rejected | Output) -> None:
        """From the link: something about one of this stream's requests."""
        rid = message.rid
        if isinstance(message, Accepted):
            self._unaccepted.discard(rid)
        elif isinstance(message, Rejected):
            self._refused = self._refused or EngineError(message.code, message.message, message.retry_after_s)
            self._end(rid)
        elif rid not in self._unaccepted:  # else a late output of an earlier request with this rid
            self._outputs.append(message)
            if message.finish_reason is not None:
                self._open[rid].discard(message.index)
                if not self._open[rid]:
                    self._end(rid)
        self._changed.set()

    def _end(self, rid: str) -> None:
        self._open.pop(rid, None)
        self._unaccepted.discard(rid)
        self._link.ended(rid)

    def lose(self) -> None:
        """From the link: the engine is gone."""
        if self._unaccepted:
            self._refused = self._refused or EngineError("lost", LOST, RETRY_S)
        for rid, indexes in self._open.items():
            self._outputs += [Output(rid, i, [], finish_reason="error", error=LOST) for i in sorted(indexes)]
        self._open.clear()
        self._unaccepted.clear()
        self._changed.set()
