"""From engine outputs to response bytes, without I/O: what all generating endpoints share.

A generation has prompts (one engine request each) and, per prompt, n choices.
Choice `prompt_i * n + j` is output j of request i. A subclass says how a delta
and a finished choice look in its dialect.
"""

import abc
import os
import time
from dataclasses import dataclass, field

import msgspec

from crane.api import sse
from crane.api.bodies import GenerateBody
from crane.api.chat_parser import ChatEvent, ChatParser
from crane.api.endpoint import Context, Generation
from crane.api.errors import error_frame, out_of_time
from crane.api.logprobs import trimmed
from crane.api.queueing import claims
from crane.api.sse import json_text
from crane.errors import EngineError
from crane.runtime.text import Delta, TextStream
from crane.runtime.types import Generate, Output, SamplingParams, TokenLogprob

_json = msgspec.json.Encoder().encode


@dataclass
class Prompt:
    """One prompt of a request. text: as echoed. logprobs: of its tokens, once they came.
    rid: of its engine request. keep_ids: special tokens whose text is part of the answer.
    prediction_ids: what the answer is expected to be."""

    ids: list[int]
    sampling: SamplingParams
    text: str = ""
    rid: str = ""
    logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int = 0
    keep_ids: frozenset[int] = frozenset()
    prediction_ids: list[int] = field(default_factory=list)


@dataclass
class Choice:
    """One answer in the making. number: among those of its prompt. started: a frame of it was sent.
    events: what the last output came to, in dialects that know reasoning and tool calls. around: what stands before
    and after the text in the frames of further text, once nothing else can come before the end; else None."""

    index: int
    number: int
    prompt: Prompt
    text: TextStream
    finish_reason: str | None = None
    engine_done: bool = False
    started: bool = False
    logprobs: list[TokenLogprob] = field(default_factory=list)
    parser: ChatParser | None = None
    events: list[ChatEvent] = field(default_factory=list)
    reasoning_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    timeline: list[dict] | None = None
    around: tuple[bytes, bytes] | None = None


class BaseGeneration(Generation, abc.ABC):
    """See `endpoint.Generation`. Written by one driver; `failed` is the EngineError that broke it."""

    id_prefix = ""
    chunk_object = ""
    full_object = ""

    def __init__(self, context: Context, body: GenerateBody, prompts: list[Prompt]):
        self.model = context.model
        self.tokenizer = context.model.tokenizer
        self.prompts = prompts
        self.id, self.created = context.identity or (self.id_prefix + os.urandom(16).hex(), int(time.time()))
        self.resumable = bool(body.resumable)
        self._wants_timeline = bool(body.timeline)
        self.stream = bool(body.stream)
        self.failed: EngineError | None = None
        options = body.stream_options
        self._include_usage = bool(options and options.include_usage)
        self._continuous_usage = bool(options and options.continuous_usage_stats)
        self._max_top: int | None = None  # of alternatives: the engine sends more where the prompt's need them
        self.aborts: list[tuple[str, int]] = []
        self.requests: list[Generate] = []
        self.choices: list[Choice] = []
        self._by_output: dict[tuple[str, int], Choice] = {}
        claimed = claims(context, body)
        for i, prompt in enumerate(prompts):
            rid = prompt.rid = self.id if len(prompts) == 1 else f"{self.id}-{i}"
            salt = body.cache_salt or ""
            self.requests.append(
                Generate(rid, prompt.ids, prompt.sampling, None, salt, prompt.prediction_ids,
                         timeline=self._wants_timeline, **claimed)
            )
            for j in range(prompt.sampling.n):
                text = TextStream(self.tokenizer, prompt.sampling, prompt.ids, prompt.keep_ids)
                choice = Choice(len(self.choices), j, prompt, text)
                self.choices.append(choice)
                self._by_output[rid, j] = choice
        self._num_open = len(self.choices)
        self._may_hurry = not self._continuous_usage and all(p.sampling.logprobs is None for p in prompts)
        head = {"id": self.id, "object": self.chunk_object, "created": self.created, "model": self.model.name}
        self._head = b"data: " + _json(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if self._include_usage else b"]}\n\n"

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.text.token_ids) for choice in self.choices)

    def feed(self, outputs: list[Output]) -> bytes:
        return self._feed(outputs[0]) if len(outputs) == 1 else b"".join(map(self._feed, outputs))

    def _feed(self, output: Output) -> bytes:
        choice = self._by_output.get((output.rid, output.index))
        if choice is None or self.failed is not None:
            return b""
        if output.num_drafted and choice.finish_reason is None:
            choice.drafted_tokens += output.num_drafted
            choice.accepted_tokens += len(output.token_ids) - 1
        if choice.around is not None and output.finish_reason is None and output.usage is None:
            text = choice.text.grow(output.token_ids)  # the short way that nearly every token of a stream takes
            before, after = choice.around
            return before + json_text(text) + after if text else b""
        usage = output.usage
        if usage is not None:
            choice.prompt.cached_tokens = max(choice.prompt.cached_tokens, usage.cached_tokens)
        if output.finish_reason is not None:
            choice.engine_done = True
            choice.timeline = output.timeline
            if choice.finish_reason is not None and self._wants_timeline:  # it is what this choice has waited for
                self._num_open -= 1
        if choice.finish_reason is not None:
            return b""  # its stop string came up; what the engine adds is not part of the answer
        if output.finish_reason == "error":
            return self._fail(output.error or "the engine failed")
        if output.finish_reason == "timeout" and not self.num_tokens:
            return self._end_with(out_of_time())
        frames = self._push(choice, output)
        if usage is not None and usage.reasoning_tokens:  # exact, unlike what the text shows
            choice.reasoning_tokens = min(usage.reasoning_tokens, len(choice.text.token_ids))
        return frames

    def finish(self) -> bytes:
        if self.failed is not None:
            return b""
        usage = self._usage_frame() if self._include_usage else b""
        return self._timeline_frame() + usage + sse.DONE

    @abc.abstractmethod
    def body(self) -> bytes:
        """See `endpoint.Generation`."""

    def _timelines(self) -> list[dict]:
        return [{"index": choice.index, "events": choice.timeline} for choice in self._answers()]

    def _timeline_frame(self) -> bytes:
        if not self._wants_timeline:
            return b""
        return self._head + b'],"timeline":' + _json(self._timelines()) + b"}\n\n"

    def usage(self) -> dict:
        """Token counts so far; every prompt counts once, however many choices it has."""
        num_prompt = sum(len(prompt.ids) for prompt in self.prompts)
        num_completion = self.num_tokens
        details = {"reasoning_tokens": sum(choice.reasoning_tokens for choice in self.choices)}
        drafted = sum(choice.drafted_tokens for choice in self.choices)
        if drafted:
            accepted = sum(choice.accepted_tokens for choice in self.choices)
            details |= {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": {"cached_tokens": sum(prompt.cached_tokens for prompt in self.prompts)},
            "completion_tokens_details": details,
        }

    @abc.abstractmethod
    def _push(self, choice: Choice, output: Output) -> bytes:
        """One output of one open choice, as frames when streaming."""

    def _read(self, choice: Choice, delta: Delta) -> None:
        """Takes note of a delta, and has its markup read where the dialect knows any."""
        parser, reason = choice.parser, delta.finish_reason
        if parser is None:
            choice.finish_reason = reason
            return
        was_thinking = parser.thinking
        choice.events = parser.push(delta.text)
        if was_thinking or parser.thinking:
            choice.reasoning_tokens += len(delta.token_ids)
        if reason is None and parser.done:
            reason = "stop"
        if reason is not None:
            events, choice.finish_reason = parser.finish(reason)
            choice.events += events

    def _answers(self) -> list[Choice]:
        """The choices that the client gets."""
        return self.choices

    def _close(self, choice: Choice) -> None:
        if choice.engine_done or not self._wants_timeline:
            self._num_open -= 1
        if not choice.engine_done:  # a stop string, of which the engine knows nothing
            self.aborts.append((choice.prompt.rid, choice.number))

    def _fail(self, message: str) -> bytes:
        lost = message.startswith("engine_lost")
        return self._end_with(EngineError("lost" if lost else "internal", message))

    def _end_with(self, error: EngineError) -> bytes:
        self.failed = error
        return error_frame(error) if self.stream else b""

    def _usage_frame(self) -> bytes:
        return self._head + b'],"usage":' + _json(self.usage()) + b"}\n\n"


class ChoicesGeneration(BaseGeneration):
    """An answer made of choices, each in chunks of its own, as OpenAI's chats and completions are."""

    def body(self) -> bytes:
        if self.failed is not None:
            raise self.failed
        return _json(
            {
                "id": self.id,
                "object": self.full_object,
                "created": self.created,
                "model": self.model.name,
                "choices": [self._final(choice) for choice in self._answers()],
                "usage": self.usage(),
                **({"timeline": self._timelines()} if self._wants_timeline else {}),
                **self._extra(),
            }
        )

    def _push(self, choice: Choice, output: Output) -> bytes:
        delta = choice.text.push(output)
        if output.prompt_logprobs is not None:
            choice.prompt.logprobs = output.prompt_logprobs
        self._read(choice, delta)
        if choice.finish_reason is not None:
            self._close(choice)
        if self._max_top is not None:
            delta = delta._replace(logprobs=trimmed(delta.logprobs, self._max_top))
        if self.stream:
            frames = self._frames(choice, delta)
            if self._may_hurry and choice.text.free and choice.finish_reason is None:
                choice.around = self._around(choice)
            return frames
        if delta.logprobs:
            choice.logprobs.extend(delta.logprobs)
        return b""

    def _extra(self) -> dict:
        """Further fields of the whole answer."""
        return {}

    def _chunk(self, choice: bytes) -> bytes:
        """A frame with one choice, given as JSON."""
        if self._continuous_usage:
            return self._head + choice + b'],"usage":' + _json(self.usage()) + b"}\n\n"
        return self._head + choice + self._tail

    @abc.abstractmethod
    def _around(self, choice: Choice) -> tuple[bytes, bytes] | None:
        """`Choice.around` from now on, when its text has no stop strings and no log-probabilities."""

    @abc.abstractmethod
    def _frames(self, choice: Choice, delta: Delta) -> bytes:
        """The frames of one delta."""

    @abc.abstractmethod
    def _final(self, choice: Choice) -> dict:
        """A finished choice in the whole answer."""
