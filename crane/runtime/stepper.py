"""The thread that owns the engine: loads it, feeds it, steps it, routes its outputs."""

import contextlib
import logging
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from crane.errors import CraneError
from crane.runtime.journal import Journal
from crane.runtime.settings import Settings
from crane.runtime.types import (
    Abort, Accepted, Call, EngineInfo, Generate, Leave, Output, Rejected, Reply, Resume, Step,
)  # fmt: skip
from crane.runtime.waiting import Waiting

log = logging.getLogger("crane.engine")

# So many steps in a row that gave nothing but errors mean that the engine is broken, not a request.
MAX_BROKEN_STEPS = 5
# After so long without work the engine does, once, what nobody should wait for; see `Engine.rest`.
IDLE_S = 1.0
TAKEN = "the stream goes on over another connection"
# See `Company`: it waits no longer than this, and than this share of a step.
COMPANY_S, COMPANY_SHARE = 0.01, 0.1
# A CPU's steps keep all cores busy. After one not shorter than this that gave first tokens, workers and clients have
# the cores for so long; else half of these tokens wait 2 to 6 ms for the system to interrupt the next step.
LONG_STEP_S, LET_OUT_S = 0.05, 0.001
# What `post` carries when the loop wants the stepper to end once nothing runs.
_DRAIN = object()


class Listener(Protocol):
    """Who is told, on the loop's thread. See `server.Server`."""

    def loading(self, loaded_bytes: int, total_bytes: int) -> None: ...
    def ready(self, info: EngineInfo) -> None: ...
    def failed(self, reason: str) -> None: ...
    def deliver(self, messages: list[tuple[Any, Any]]) -> None: ...
    def drained(self) -> None: ...


@dataclass
class _Owner:
    """Who listens to a request (None: nobody, for now), how many of its choices still run, and whose key it came with.
    Written by Stepper only."""

    peer: Any
    num_open: int
    num_choices: int
    key: str
    heard: bool = False  # it has had tokens


class Company:
    """How long a request that wakes an idle engine waits for others, so that a burst starts in one step: until as many
    have come as soon followed the one before, or fill a step of max_tokens. After one that stayed alone, not at all."""

    def __init__(self, max_tokens: int, clock: Callable[[], float] = time.monotonic):
        self._max_tokens, self._clock = max_tokens, clock
        self._woken_s, self._limit_s = 0.0, COMPANY_S
        self._num_expected = self._num = self._num_tokens = self._num_steps = 0

    def add(self, came_s: float, woke: bool, num_tokens: int) -> None:
        """A request of so many tokens that came then. woke: the engine had no work."""
        if woke:
            self._woken_s, self._num_expected = came_s, self._num
            self._num = self._num_tokens = self._num_steps = 0
        self._num += came_s <= self._woken_s + self._limit_s
        self._num_tokens += num_tokens

    def stepped(self, seconds: float) -> None:
        """A step took so long: the longer the first one is, the more it costs to miss it."""
        self._num_steps += 1
        if self._num_steps == 1:
            self._limit_s = min(COMPANY_S, COMPANY_SHARE * seconds)

    @property
    def wait_s(self) -> float:
        enough = self._num >= self._num_expected or self._num_tokens >= self._max_tokens
        return 0 if enough else max(self._woken_s + self._limit_s - self._clock(), 0)


class Stepper(threading.Thread):
    """One engine on one thread.

    factory(settings, progress) makes the engine; tell(method, *args) runs a method of `listener` on the loop.
    A peer is any hashable that `post` brings and `deliver` gets back.
    """

    def __init__(self, settings: Settings, factory: Callable, tell: Callable, listener: Listener):
        super().__init__(name="engine", daemon=True)
        self._settings = settings
        self._factory = factory
        self._tell = tell
        self._listener = listener
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._owners: dict[str, _Owner] = {}
        self._waiting = Waiting()
        self._company = Company(settings.max_step_tokens)
        # Nobody needs them before the tokens, and to deliver them takes a core from the step that has just begun.
        self._held: deque[tuple] = deque()
        self._journal = Journal(settings.journal_memory, settings.journal_s)
        self._unheard: list[str] = []  # requests to end: nobody listens, and nobody can any more
        self._draining = False
        self._num_broken = 0
        self._rested = False  # nothing was computed since the engine's last rest
        self.step_since_s: float | None = None  # monotonic: since when the step under way runs; read by the loop

    def post(self, peer: Any, message: Generate | Abort | Leave | Resume | Call | None) -> None:
        """From any thread: a message of this peer, or None when the peer is gone."""
        self._inbox.put((time.monotonic(), peer, message))

    def drain(self) -> None:
        """From any thread: end once nothing runs."""
        self._inbox.put((0.0, None, _DRAIN))

    def held(self) -> list[tuple]:
        """From any thread: acceptances that wait for the end of a step. The caller delivers them."""
        messages = []
        with contextlib.suppress(IndexError):
            while True:
                messages.append(self._held.popleft())
        return messages

    def run(self) -> None:
        progress = Progress(lambda *sizes: self._tell(self._listener.loading, *sizes))
        try:
            engine = self._factory(self._settings, progress)
        except Exception as error:
            reason = str(error) if isinstance(error, CraneError) else f"{type(error).__name__}: {error}"
            log.debug("the engine cannot start", exc_info=True)
            reason = " ".join(f"cannot serve {self._settings.model_path}: {reason}".split())
            self._tell(self._listener.failed, reason)
            return
        self._tell(self._listener.ready, engine.info)
        try:
            self._serve(engine)
            engine.close()
        except Exception as error:
            log.exception("the engine cannot go on")
            self._tell(self._listener.failed, f"the engine failed: {type(error).__name__}: {error}")
        else:
            self._tell(self._listener.drained)

    def _serve(self, engine) -> None:
        while not self._draining or engine.has_work or not self._inbox.empty():
            messages = self._take(engine)
            if len(self._journal):
                self._unheard += self._journal.expire()
            for rid in self._unheard:
                messages += self._desert(engine, rid)
            self._unheard.clear()
            messages += self._waiting.prepare(engine)
            if engine.has_work and all(isinstance(message, Accepted) for _, message in messages):
                self._held.extend(messages)
            else:
                self._deliver(messages)  # an answer need not wait for the step
            if engine.has_work:
                outputs, step_s = self._step(engine)
                is_long = engine.info.device == "cpu" and step_s >= LONG_STEP_S
                starts = is_long and any(o.rid in self._owners and not self._owners[o.rid].heard for o in outputs)
                self._deliver(self.held() + self._route(outputs) + self._waiting.follow(outputs))
                if starts:
                    time.sleep(LET_OUT_S)
            if self._num_broken >= MAX_BROKEN_STEPS:
                raise RuntimeError(f"{self._num_broken} steps in a row failed")

    def _deliver(self, messages: list[tuple]) -> None:
        if messages:
            self._tell(self._listener.deliver, messages)

    def _take(self, engine) -> list[tuple]:
        """Act on everything in the inbox; with nothing to compute, wait for it. Returns what to deliver."""
        answers = []
        idle = wait = not engine.has_work and not self._draining
        while True:
            timeout_s = self._company.wait_s if idle else 0
            if wait:
                timeout_s = 0 if engine.prepare() else None if self._rested else IDLE_S
            try:
                came_s, peer, message = self._inbox.get(timeout=timeout_s)
            except queue.Empty:
                if not wait:
                    return answers
                if timeout_s:
                    engine.rest()
                    self._rested = True
                continue
            wait = False
            if message is None:
                answers += self._forget(engine, peer)
            elif message is _DRAIN:
                self._draining = True
            elif isinstance(message, Abort):
                answers += self._route(engine.abort(message.rid, message.index))
            elif isinstance(message, Leave):
                answers += self._leave(engine, peer, message.rid)
            elif isinstance(message, Resume):
                answers += self._resume(peer, message.rid)
            elif isinstance(message, Call) and message.op == "abort":
                answers += self._abort(engine, peer, message)
            elif isinstance(message, Call) and message.op in Waiting.OPS:
                self._waiting.add(peer, message)
            else:
                woke = not engine.has_work
                answers.append((peer, self._answer(engine, peer, message)))
                if engine.has_work and isinstance(message, Generate):
                    self._company.add(came_s, woke, len(message.prompt_ids))

    def _answer(self, engine, peer, message: Generate | Call) -> Accepted | Rejected | Reply:
        """What the worker waits for, whatever happens."""
        try:
            return self._add(engine, peer, message) if isinstance(message, Generate) else self._reply(engine, message)
        except Exception as error:
            reason = f"the engine failed on this request: {type(error).__name__}"
            if isinstance(message, Generate):
                log.exception("request %s cannot be added", message.rid)
                return Rejected(message.rid, "internal", reason)
            log.exception("question %s cannot be answered", message.op)
            return Reply(message.id, error=reason)

    def _add(self, engine, peer, message: Generate) -> Accepted | Rejected:
        if message.rid in self._owners:
            return Rejected(message.rid, "duplicate_rid", f"a request with id {message.rid!r} is running")
        answer = engine.add(message)
        if not isinstance(answer, Rejected):
            self._owners[message.rid] = _Owner(peer, message.sampling.n, message.sampling.n, message.owner)
            if message.journal is None:
                self._journal.forget(message.rid)  # of an earlier request with this rid
            else:
                self._journal.open(message.rid, message.journal, message.sampling.n)
        return answer

    def _reply(self, engine, call: Call) -> Reply:
        if call.op == "stats":
            return Reply(call.id, msgspec.to_builtins(engine.stats()))
        if call.op == "journal":
            return Reply(call.id, self._journal.note(call.payload))
        if call.op in ("metrics", "trace"):
            return Reply(call.id, getattr(engine, call.op)())
        if call.op == "plan":
            requests = msgspec.convert(call.payload, list[Generate])
            return Reply(call.id, [msgspec.to_builtins(engine.plan(request)) for request in requests])
        return Reply(call.id, error=f"unknown question {call.op!r}")

    def _abort(self, engine, peer, call: Call) -> list[tuple]:
        """End the requests of any peer whose rid begins as the payload says, or all; answers how many.

        `rid#i` that is no request's own is choice i of request `rid`.
        """
        start, key = call.payload
        theirs = [rid for rid, owner in self._owners.items() if key in ("", owner.key)]
        named = [(rid, None) for rid in theirs if start is None or rid.startswith(start)]
        if not named:
            rid, _, index = start.rpartition("#") if start else ("", "", "")
            named = [(rid, int(index))] if index.isdecimal() and rid in theirs else []
        outputs = [output for rid, index in named for output in engine.abort(rid, index)]
        return [*self._route(outputs), (peer, Reply(call.id, len({output.rid for output in outputs})))]

    def _forget(self, engine, peer) -> list[tuple]:
        """The peer is gone: end its requests, but for those that somebody may resume."""
        self._waiting.forget(peer)
        mine = [rid for rid, owner in self._owners.items() if owner.peer is peer]
        return [message for rid in mine for message in self._leave(engine, peer, rid)]

    def _leave(self, engine, peer, rid: str) -> list[tuple]:
        owner = self._owners.get(rid)
        if owner is None or owner.peer is not peer:  # it has ended, or somebody else has resumed it
            return []
        if rid not in self._journal:
            return self._desert(engine, rid)
        owner.peer = None
        self._journal.leave(rid)
        return []

    def _desert(self, engine, rid: str) -> list[tuple]:
        """End a request that nobody listens to. Others are told if the engine lost theirs with it."""
        return [] if self._owners.pop(rid, None) is None else self._route(engine.abort(rid))

    def _resume(self, peer, rid: str) -> list[tuple]:
        """Give this peer all that the request has had, and from now on what it gets; whoever had it is told."""
        outputs = self._journal.resume(rid)
        if outputs is None:
            return [(peer, Rejected(rid, "not_found", f"the stream {rid} is not kept any more"))]
        answers = [(peer, Accepted(rid)), (peer, Step(outputs))] if outputs else [(peer, Accepted(rid))]
        owner = self._owners.get(rid)
        if owner is not None:
            if owner.peer is not None and owner.peer is not peer:
                told = [Output(rid, i, [], finish_reason="error", error=TAKEN) for i in range(owner.num_choices)]
                answers.append((owner.peer, Step(told)))
            owner.peer = peer
        return answers

    def _step(self, engine) -> tuple[list[Output], float]:
        """What a step gives, and the seconds it took."""
        self._rested = False
        self.step_since_s = time.monotonic()
        try:
            outputs = engine.step()
        except Exception as error:  # the engine answers what it can itself; here all that runs is broken
            log.exception("an engine step failed")
            outputs = engine.fail_all(f"the engine failed: {type(error).__name__}")
        step_s, self.step_since_s = time.monotonic() - self.step_since_s, None
        self._company.stepped(step_s)
        if outputs:
            # a grammar that does not work out is its request's fault
            broken = all(o.finish_reason == "error" and not (o.error or "").startswith("the grammar") for o in outputs)
            self._num_broken = self._num_broken + 1 if broken else 0
        return outputs, step_s

    def _route(self, outputs: list[Output]) -> list[tuple]:
        """One Step message per peer. Outputs of peers that are gone are dropped."""
        by_peer: dict[Any, list[Output]] = {}
        for output in outputs:
            owner = self._owners.get(output.rid)
            if owner is None:
                continue
            owner.heard = True
            if owner.peer is not None:
                by_peer.setdefault(owner.peer, []).append(output)
            if len(self._journal):
                self._journal.add(output)
                if owner.peer is None and output.rid not in self._journal:  # it has become too long to be kept
                    self._unheard.append(output.rid)
            if output.finish_reason is not None:
                owner.num_open -= 1
                if not owner.num_open:
                    del self._owners[output.rid]
        return [(peer, Step(mine)) for peer, mine in by_peer.items()]


class Progress:
    """How far a load is: a bar on a terminal, a line per tenth in a log, and `tell(loaded, total)`."""

    def __init__(self, tell: Callable[[int, int], None]):
        self._tell = tell
        self._terminal = sys.stderr.isatty()
        self._first: tuple[float, int] | None = None  # when, and how much there was by then
        self._told_s = 0.0
        self._logged_s = 0.0
        self._tenth = 0
        self._lock = threading.Lock()  # weights may be read by several threads

    def __call__(self, loaded_bytes: int, total_bytes: int) -> None:
        with self._lock:
            now, done = time.monotonic(), loaded_bytes >= total_bytes
            self._first = self._first or (now, 0 if done else loaded_bytes)
            if now - self._told_s >= 0.1 or done:
                self._told_s = now
                self._tell(loaded_bytes, total_bytes)
                if self._terminal:
                    self._draw(loaded_bytes, total_bytes, "\n" if done else "")
            tenth = 10 * loaded_bytes // max(total_bytes, 1)
            if not self._terminal and tenth > self._tenth and (now - self._logged_s >= 0.5 or done):
                self._tenth, self._logged_s = tenth, now
                log.info("loading the model: %s", self._text(loaded_bytes, total_bytes))

    def _text(self, loaded_bytes: int, total_bytes: int) -> str:
        first_s, first_bytes = self._first
        rate = (loaded_bytes - first_bytes) / max(time.monotonic() - first_s, 0.05)
        percent = 100 * loaded_bytes // max(total_bytes, 1)
        sizes = f"{loaded_bytes / 1e6:.0f} of {total_bytes / 1e6:.0f} MB"
        return f"{percent:3d} %, {sizes}, {rate / 1e6:.0f} MB/s"

    def _draw(self, loaded_bytes: int, total_bytes: int, end: str) -> None:
        width = 30 * loaded_bytes // max(total_bytes, 1)
        bar = "#" * width + "." * (30 - width)
        text = f"\rloading [{bar}] {self._text(loaded_bytes, total_bytes)}  "
        print(text, end=end, file=sys.stderr, flush=True)
