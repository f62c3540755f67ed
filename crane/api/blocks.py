"""An answer as a row of blocks: thinking, text and tool calls, each opened, grown and closed in turn.

What the dialects that stream typed blocks (Anthropic's messages, OpenAI's responses) share.
"""

import abc
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from crane.api import sse
from crane.api.bodies import ChatBody
from crane.api.chat_parser import CUT, ChatEvent, ChatParser, Content, ToolArguments, ToolStart
from crane.api.chat_prompt import PreparedChat, prepare_chat
from crane.api.endpoint import Context
from crane.api.generation import BaseGeneration, Choice, Prompt
from crane.api.sampling import fit, sampling_params
from crane.errors import EngineError, RequestError
from crane.runtime.types import Output, TokenLogprob


@dataclass
class Block:
    """One block. id, name: of a tool call, whose text is its arguments. tokens: of a text, with their
    log-probabilities when asked for. cut: it has no proper end, for lack of tokens mostly."""

    index: int
    kind: Literal["reasoning", "text", "tool"]
    id: str = ""
    name: str = ""
    parts: list[str] = field(default_factory=list)
    tokens: list[tuple[int, TokenLogprob]] = field(default_factory=list)
    cut: bool = False

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self.parts)


class BlockGeneration(BaseGeneration):
    """One answer of one prompt. A subclass says which events a block opens, grows and closes with.

    stop: the stop string or id that ended the answer.
    """

    def __init__(self, context: Context, body: ChatBody, prompt: Prompt, parser: ChatParser):
        super().__init__(context, body, [prompt])
        (self.choice,) = self.choices
        self.choice.parser = parser
        self.blocks: list[Block] = []
        self.stop: str | int | None = None
        self._open: Block | None = None
        self._tokens: list[tuple[int, TokenLogprob]] = []

    def _push(self, choice: Choice, output: Output) -> bytes:
        delta = choice.text.push(output)
        self._read(choice, delta)
        if delta.logprobs:
            self._tokens += zip(delta.token_ids, delta.logprobs)
        frames = [self._take(event) for event in choice.events]
        if choice.finish_reason is not None:
            self.stop = delta.stop
            self._close(choice)
            if self._open is not None:
                self._open.cut |= choice.finish_reason in CUT
                frames.append(self._shut())
        return b"".join(frames)

    def _end_with(self, error: EngineError) -> bytes:
        super()._end_with(error)
        return self.broken(error) if self.stream else b""

    def _take(self, event: ChatEvent) -> bytes:
        kind = "text" if isinstance(event, Content) else "reasoning"
        frames = b""
        if isinstance(event, ToolStart):
            return self._shut() + self._begin("tool", event.id, event.name)
        if isinstance(event, ToolArguments):
            kind = "tool"
        elif self._open is None or self._open.kind != kind:
            frames = self._shut() + self._begin(kind)
        block, tokens, self._tokens = self._open, self._tokens, []
        block.parts.append(event.text)
        if kind != "text":
            tokens = []  # log-probabilities are shown of text only
        block.tokens += tokens
        return frames + self.grown(block, event.text, tokens)

    def _begin(self, kind, call_id: str = "", name: str = "") -> bytes:
        self._open = Block(len(self.blocks), kind, call_id, name)
        self.blocks.append(self._open)
        return self.opened(self._open)

    def _shut(self) -> bytes:
        block, self._open = self._open, None
        if block is None:
            return b""
        if block.kind == "tool":
            calls = [call for call in self.choice.parser.calls if call.id == block.id]
            block.cut |= not all(call.complete for call in calls)
        return self.closed(block)

    def event(self, kind: str, **fields: Any) -> bytes:
        """A typed event; nothing when not streaming."""
        return typed_event(kind, fields) if self.stream else b""

    @abc.abstractmethod
    def broken(self, error: Exception) -> bytes:
        """The event that ends a stream which broke after its first byte."""

    @abc.abstractmethod
    def opened(self, block: Block) -> bytes:
        """The events with which a block begins."""

    @abc.abstractmethod
    def grown(self, block: Block, text: str, tokens: list[tuple[int, TokenLogprob]]) -> bytes:
        """The events with which it grows by `text`."""

    @abc.abstractmethod
    def closed(self, block: Block) -> bytes:
        """The events with which it ends."""


def chat_prompt(context: Context, chat: ChatBody, prepared: PreparedChat, max_tokens: int, field: str) -> Prompt:
    """The engine's side of a chat. field: what its messages are called in this dialect. Raises RequestError."""
    logprobs = (chat.top_logprobs or 0) if chat.logprobs else None
    sampling = prepared.constrain(sampling_params(chat, context, max_tokens, logprobs=logprobs))
    sampling = fit(sampling, len(prepared.ids), context.max_model_len, field)
    return Prompt(prepared.ids, sampling, keep_ids=prepared.keep_ids)


def prepare(context: Context, chat: ChatBody) -> PreparedChat:
    """`prepare_chat` on a whole body. Raises RequestError."""
    plain = msgspec.to_builtins
    return prepare_chat(
        context,
        chat.messages,
        tools=plain(chat.tools),
        tool_choice=plain(chat.tool_choice),
        parallel_tool_calls=chat.parallel_tool_calls,
        response_format=plain(chat.response_format),
        template_kwargs=chat.chat_template_kwargs,
        reasoning_effort=chat.reasoning_effort,
        thinking_budget=chat.thinking_token_budget,
        continue_final_message=bool(chat.continue_final_message),
    )


@contextlib.contextmanager
def renamed(names: dict[str, str]) -> Iterator[None]:
    """Errors about fields of a chat completion become errors about those of another dialect.

    names: from a field to the one that stands for it here; a tool is {"name"} here, not {"function": {"name"}}.
    """
    try:
        yield
    except RequestError as error:
        if error.field is None:
            raise
        field = error.field.replace(".function.", ".")
        for old, new in names.items():
            if field == old or field.startswith((old + ".", old + "[")):
                field = new + field[len(old) :]
                break
        message = str(error).replace(error.field, field, 1)
        raise RequestError(message, field=field, code=error.code, status=error.status) from None


def typed_event(kind: str, fields: dict[str, Any]) -> bytes:
    """A server-sent event that carries its type twice, beside its data and in it."""
    return b"event: " + kind.encode() + b"\n" + sse.frame(sse.json_line({"type": kind, **fields}))
