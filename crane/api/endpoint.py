"""What an endpoint is: a pure function from a Request to one of three answers.

    Reply        the answer is known already
    Question     one question to the engine, and how to render its reply
    Generation   requests for the engine, and how their outputs become bytes

Endpoints do no I/O and know neither sockets nor event loops; `drivers` carries
out what they ask for, once for ASGI and once for WSGI.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Protocol

from crane.api.served import ServedModel
from crane.runtime.settings import Settings
from crane.runtime.types import Generate, Output, State

JSON = "application/json"
MAX_LENGTH = 2**31 - 1


@dataclass(frozen=True)
class Request:
    """One HTTP request, body read. `params` are the fields of the route's path."""

    method: str
    path: str
    params: Mapping[str, str]
    query: Mapping[str, str]
    body: bytes
    last_event_id: str = ""


@dataclass(frozen=True)
class Reply:
    """One HTTP response; `body` is JSON unless the headers say otherwise."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A `Call` to the engine, answered within timeout_s. render: its payload -> Reply or Generation."""

    op: str
    render: Callable[[Any], "Reply | Generation"]
    payload: Any = None
    timeout_s: float = 30.0


class Generation(Protocol):
    """Outputs in, bytes out, for one HTTP request. See `generation.BaseGeneration`.

    stream: whether the client wants events. failed: set when the engine broke it. aborts: choices, as (rid, index),
    that need no more tokens although the engine still makes them; the driver takes them out. _num_open: choices that
    have not ended, counted by those that inherit from this.
    """

    requests: list[Generate]
    stream: bool
    aborts: list[tuple[str, int]]

    @property
    def finished(self) -> bool:
        return self._num_open == 0 or self.failed is not None

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer so far, of all choices."""

    def start(self) -> bytes:
        """The frames that precede any output."""
        return b""

    def feed(self, outputs: list[Output]) -> bytes:
        """The frames that `outputs` complete (b"" when none, or when not streaming)."""

    def finish(self) -> bytes:
        """The frames that end the stream."""

    def body(self) -> bytes:
        """The whole answer, when not streaming. Raises EngineError if the engine broke it."""


@dataclass(frozen=True)
class Context:
    """What an endpoint may know. model: as this worker loaded it; state: the engine's latest. tenant: who asks, ""
    without keys. any_length: prompts of any length are taken, as nothing will be computed. identity: id and
    time of the answer, when it is made again."""

    settings: Settings
    model: ServedModel
    state: State
    tenant: str = ""
    any_length: bool = False
    identity: tuple[str, int] | None = None

    @property
    def max_model_len(self) -> int:
        """The engine's own limit, or before it is ready what the files and settings say."""
        if self.state.info is not None:
            return self.state.info.max_model_len
        limit = self.model.config.max_position
        return min(limit, self.settings.max_model_len) if self.settings.max_model_len else limit

    @property
    def max_length(self) -> int:
        """The longest prompt plus output that is taken."""
        return MAX_LENGTH if self.any_length else self.max_model_len


Answer = Reply | Question | Generation


@dataclass(frozen=True)
class Endpoint:
    """One route. needs: "nothing" | "model" (tokenizer, template) | "link" (an engine to ask, if only
    one that drains) | "engine" (ready).

    body: the Struct, or one of those, that `run` decodes; query: the parameters it looks at, with their JSON
    schemas; content_type: of the 200; all for /openapi.json, whose summary of the route is the first line of
    `run`'s docstring.
    error_reply: how this dialect writes an error; default: as OpenAI does.
    """

    method: str
    path: str
    run: Callable[[Context, Request], Answer]
    needs: str = "engine"
    body: type | UnionType | None = None
    query: Mapping[str, dict] = field(default_factory=dict)
    content_type: str = JSON
    error_reply: Callable[[Exception], Reply] | None = None
