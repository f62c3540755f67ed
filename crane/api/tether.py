"""One ASGI request while the engine works for it: what comes is written, and when its client leaves the work ends.

No chunk wakes a task for that. `send` is a coroutine, but one that need not wait is over once it is begun, so it is
begun where the engine's steps come in; the request's own task finishes what does have to wait for the client. In the
same way `receive` is begun, and what it waits for, the client's leaving, calls back.
"""

import asyncio
import types

from crane.api import sse
from crane.api.access import Access
from crane.api.drivers import advance
from crane.api.endpoint import Generation

BEATS = 10  # of the pulse, in the time after which a silent stream says something


class Pulse:
    """The one timer of all streams of an application."""

    def __init__(self):
        self._tethers: dict[Tether, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, tether: "Tether") -> None:
        """From now on it beats for this one, too."""
        self._tethers[tether] = None
        if self._timer is None:
            self._wind()

    def remove(self, tether: "Tether") -> None:
        """Idempotent."""
        self._tethers.pop(tether, None)
        if not self._tethers and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wind(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(sse.KEEP_ALIVE_S / BEATS, self._beat)

    def _beat(self) -> None:
        self._wind()
        for tether in list(self._tethers):
            tether.beat()


class Tether:
    """Ties the engine's work for one ASGI request to its client. receive: what is left of the request's events."""

    def __init__(self, receive, send, pulse: Pulse):
        self.receive = receive
        self._send = send
        self._pulse = pulse
        self._complete = False  # the response has its last chunk
        self._stream = None
        self._watching = None  # `receive`, begun

    async def send(self, event: dict) -> None:
        """For falcon, which ends every stream with an event of its own."""
        if not self._complete:
            await self._send(event)

    def hold(self, stream):
        """`stream`, from now on closed with the request. Call once the body is read."""
        self._stream = stream
        self._watching = self.receive()
        self._look()
        return stream

    def release(self) -> None:
        """The request is over: whatever of it still runs is aborted."""
        self._pulse.remove(self)
        if self._watching is not None:
            watching, self._watching = self._watching, None
            watching.close()
        if self._stream is not None:
            self._stream.close()

    async def answer(self, link, generation: Generation, access: Access) -> None:
        """Feed the generation until it is finished or the client is gone, and write its chunks if it streams."""
        self._link, self._generation, self._access = link, generation, access
        self._over = False
        self._unsent = None  # the rest of a `send` that has to wait
        self._num_quiet = 0  # beats since the last chunk
        self._head = b""  # waits for the first token, or a beat: both are one write
        if generation.stream:
            self._head = generation.start()
            self._pulse.add(self)
        loop = asyncio.get_running_loop()
        while not self._over:
            self._woken = loop.create_future()
            self._stream.listen(self._take)
            await self._woken
            if self._unsent is not None:
                unsent, self._unsent = self._unsent, None
                await unsent

    async def frames(self, link, generation: Generation, access: Access):
        """The same as an iterator, which falcon wants; it has nothing to give, for everything is written."""
        await self.answer(link, generation, access)
        return
        yield

    def beat(self) -> None:
        """A tenth of KEEP_ALIVE_S has passed."""
        self._num_quiet += 1
        if not self._woken.done() and (self._head or self._num_quiet >= BEATS):
            self._write(b"" if self._head else sse.KEEP_ALIVE)

    def _take(self, outputs: list) -> None:
        generation = self._generation
        if self._woken.done():
            return  # the task is about to leave
        try:
            chunk = advance(self._link, generation, outputs) if outputs else b""
        except Exception as error:
            self._wake(error)
            return
        self._over = not outputs or generation.finished  # without any, the client is gone
        if outputs and generation.stream and (chunk or self._over):
            self._write(chunk)
        if self._over:
            self._wake()

    def _write(self, chunk: bytes) -> None:
        if self._head:
            chunk, self._head = self._head + chunk, b""
        if not chunk:
            return
        self._num_quiet = 0
        self._access.wrote(len(chunk))
        self._complete = self._over
        sending = self._send({"type": "http.response.body", "body": chunk, "more_body": not self._over})
        try:
            waits_for = sending.send(None)
        except StopIteration:
            return
        except Exception as error:
            self._wake(error)
        else:
            self._unsent = _rest(sending, waits_for)
            self._wake()

    def _wake(self, error: Exception | None = None) -> None:
        """The task has something to do: to end, to fail, or to wait for the client."""
        if not self._woken.done():
            self._stream.listen(None)
            self._woken.set_result(None) if error is None else self._woken.set_exception(error)

    def _look(self, _=None) -> None:
        """Run `receive` as far as it goes; when it has to wait, until then."""
        while self._watching is not None:
            try:
                waits_for = self._watching.send(None)
            except StopIteration as end:
                if end.value["type"] == "http.disconnect":
                    self._watching = None
                    self._stream.disconnect()
                else:
                    self._watching = self.receive()
            else:
                if waits_for is None:
                    asyncio.get_running_loop().call_soon(self._look)
                else:
                    waits_for.add_done_callback(self._look)
                return


@types.coroutine
def _rest(begun, waits_for):
    """What is left of a coroutine that was begun by hand."""
    try:
        yield waits_for
    except BaseException:
        begun.close()
        raise
    yield from begun
