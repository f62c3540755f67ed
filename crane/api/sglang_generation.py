"""The answers of /generate: from engine outputs to SGLang's objects. No I/O."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from crane.api import sse
from crane.api.endpoint import Context, Generation
from crane.api.errors import error_object, out_of_time
from crane.errors import EngineError
from crane.models.tokenizer import Tokenizer
from crane.runtime.text import Delta, TextStream
from crane.runtime.types import Generate, Output, SamplingParams, TokenLogprob, Usage

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say

_json = msgspec.json.Encoder().encode


@dataclass
class Scores:
    """Log-probabilities as SGLang lists them: [logprob, token id, its text or null] each.

    items: of the tokens themselves. tops, chosen: at their positions, of the best and of the tokens asked for.
    """

    items: list[list] = field(default_factory=list)
    tops: list[list | None] = field(default_factory=list)
    chosen: list[list | None] = field(default_factory=list)


@dataclass
class NativePrompt:
    """One prompt of a request.

    start: the first prompt position whose log-probability is wanted; len(ids) for none. given: from there on,
    once they came. keep_stop: what ended the text stays in it. interval: an event per so many tokens.
    """

    rid: str
    ids: list[int]
    sampling: SamplingParams
    start: int
    keep_stop: bool = False
    interval: int = 1
    salt: str = ""
    given: Scores | None = None

    @property
    def waits(self) -> bool:
        """Nothing is shown before the prompt's log-probabilities are there."""
        return self.sampling.prompt_logprobs and self.given is None


@dataclass
class NativeChoice:
    """One answer in the making. number: among those of its prompt. num_shown, num_characters: tokens and characters
    that events have shown."""

    index: int
    number: int
    id: str
    prompt: NativePrompt
    stream: TextStream
    finish_reason: dict | None = None
    ending: str = ""  # what `keep_stop` adds to the text
    latency_s: float = 0.0
    usage: Usage = Usage(0, 0)  # as the engine counts, once it has ended the choice
    engine_done: bool = False
    num_shown: int = 0
    num_characters: int = 0
    drawn: Scores = field(default_factory=Scores)


class NativeGeneration(Generation):
    """See `endpoint.Generation`. The text and ids of an event are all so far; what is new where the settings say so.

    listed: the answer is a list, and events say whose they are. with_text: log-probabilities name their tokens.
    """

    def __init__(self, context: Context, prompts: Sequence[NativePrompt], *, claims: dict, stream: bool, listed: bool,
                 with_text: bool = False, with_prompt_ids: bool = False):
        self.stream = stream
        self.failed: EngineError | None = None
        self.requests: list[Generate] = []
        self.choices: list[NativeChoice] = []
        self._tokenizer = context.model.tokenizer
        self._incremental = context.settings.incremental_streaming_output
        self._listed = listed
        self._with_text = with_text
        self._with_prompt_ids = with_prompt_ids
        self._started_s = time.monotonic()
        self.aborts: list[tuple[str, int]] = []
        self._by_output: dict[tuple[str, int], NativeChoice] = {}
        for prompt in prompts:
            n = prompt.sampling.n
            self.requests.append(Generate(prompt.rid, prompt.ids, prompt.sampling, cache_salt=prompt.salt, **claims))
            for number in range(n):
                own_id = prompt.rid if n == 1 else f"{prompt.rid}#{number}"  # /abort_request knows these too
                text = TextStream(self._tokenizer, prompt.sampling, prompt.ids)
                choice = NativeChoice(len(self.choices), number, own_id, prompt, text)
                self.choices.append(choice)
                self._by_output[prompt.rid, number] = choice
        self._num_open = len(self.choices)

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.stream.token_ids) for choice in self.choices)

    def feed(self, outputs: list[Output]) -> bytes:
        frames = []
        for output in outputs:
            choice = self._by_output.get((output.rid, output.index))
            if choice is None or self.failed is not None:
                continue
            choice.engine_done |= output.finish_reason is not None
            if choice.finish_reason is not None:
                continue  # its stop string came up; what the engine adds is not part of the answer
            if output.finish_reason == "error":
                frames.append(self._fail(output.error or "the engine failed"))
                continue
            if output.finish_reason == "timeout" and not any(each.stream.token_ids for each in self.choices):
                frames.append(self._end_with(out_of_time()))
                continue
            waited = choice.prompt.waits
            self._push(choice, output)
            if self.stream and not choice.prompt.waits:
                # siblings may have had outputs before the one that brings the prompt's log-probabilities
                shown = [c for c in self.choices if c.prompt is choice.prompt] if waited else [choice]
                frames += [self._event(each) for each in shown if self._due(each)]
        return b"".join(frames)

    def finish(self) -> bytes:
        return sse.DONE

    def body(self) -> bytes:
        if self.failed is not None:
            raise self.failed
        answers = [self._answer(choice) for choice in self.choices]
        return _json(answers if self._listed else answers[0])

    def _push(self, choice: NativeChoice, output: Output) -> None:
        prompt = choice.prompt
        if output.prompt_logprobs is not None:
            prompt.given = Scores()
            # an aborted prompt may not have been scored to its end
            for token_id, entry in list(zip(prompt.ids, output.prompt_logprobs))[prompt.start :]:
                self._score(prompt.given, prompt.sampling, token_id, entry)
        choice.usage = output.usage or choice.usage
        delta = choice.stream.push(output)
        for token_id, entry in zip(delta.token_ids, delta.logprobs or ()):
            self._score(choice.drawn, prompt.sampling, token_id, entry)
        if delta.finish_reason is None:
            return
        choice.finish_reason = _finish_reason(delta, len(choice.stream.token_ids))
        choice.latency_s = time.monotonic() - self._started_s
        if prompt.keep_stop and delta.stop is not None:
            choice.ending = delta.stop if isinstance(delta.stop, str) else self._visible(choice, delta.stop)
        self._num_open -= 1
        if not choice.engine_done:  # a stop string, of which the engine knows nothing
            self.aborts.append((prompt.rid, choice.number))

    def _visible(self, choice: NativeChoice, token_id: int) -> str:
        hidden = choice.prompt.sampling.skip_special_tokens and token_id in self._tokenizer.special_ids
        return "" if hidden else _text(self._tokenizer, token_id)

    def _due(self, choice: NativeChoice) -> bool:
        num_new = len(choice.stream.token_ids) - choice.num_shown
        return num_new >= choice.prompt.interval or choice.finish_reason is not None

    def _event(self, choice: NativeChoice) -> bytes:
        answer = self._answer(choice)
        num_tokens, num_characters = len(choice.stream.token_ids), len(answer["text"])
        if self._incremental:
            answer["text"] = answer["text"][choice.num_characters :]
            answer["output_ids"] = choice.stream.token_ids[choice.num_shown :]
        choice.num_shown, choice.num_characters = num_tokens, num_characters
        if self._listed:
            answer["index"] = choice.index
        return sse.frame(sse.json_line(answer))

    def _fail(self, message: str) -> bytes:
        return self._end_with(EngineError("lost" if message.startswith("engine_lost") else "internal", message))

    def _end_with(self, error: EngineError) -> bytes:
        self.failed = error
        if not self.stream:
            return b""
        status, body = error_object(error)
        lost = error.code == "lost"
        said = {"message": str(error), "type": body["error"]["type"], "code": status, "retryable": lost}
        return sse.frame(_json({"error": said}))

    def _answer(self, choice: NativeChoice) -> dict:
        prompt, token_ids = choice.prompt, choice.stream.token_ids
        meta = {
            "id": choice.id,
            "finish_reason": choice.finish_reason,
            "prompt_tokens": len(prompt.ids),
            "weight_version": "default",
            "num_retractions": choice.usage.num_preemptions,
            "reasoning_tokens": choice.usage.reasoning_tokens,
            "completion_tokens": len(token_ids),
            "cached_tokens": choice.usage.cached_tokens,
        }
        if prompt.sampling.logprobs is not None:
            meta |= _logprobs(prompt.sampling, prompt.given or Scores(), choice.drawn)
        if choice.finish_reason is not None:
            meta["e2e_latency"] = choice.latency_s
        answer = {"text": choice.stream.text + choice.ending, "output_ids": token_ids, "meta_info": meta}
        if self._with_prompt_ids:
            answer["prompt_token_ids"] = prompt.ids
        return answer

    def _score(self, scores: Scores, sampling: SamplingParams, token_id: int, entry: TokenLogprob | None) -> None:
        if entry is None:  # the first prompt token: nothing precedes it
            scores.items.append(self._triple(token_id, None))
            scores.tops.append(None)
            scores.chosen.append(None)
            return
        scores.items.append(self._triple(token_id, entry.logprob))
        scores.tops.append(list(map(self._triple, entry.top_ids, entry.top_logprobs)))
        scores.chosen.append(list(map(self._triple, sampling.logprob_ids, entry.ids_logprobs)))

    def _triple(self, token_id: int, logprob: float | None) -> list:
        logprob = None if logprob is None else max(logprob, LOWEST)
        return [logprob, token_id, _text(self._tokenizer, token_id) if self._with_text else None]


def _logprobs(sampling: SamplingParams, given: Scores, drawn: Scores) -> dict:
    """What meta_info says of them."""
    found = {
        "input_token_logprobs": given.items,
        "output_token_logprobs": drawn.items,
        "output_token_logprobs_length": len(drawn.items),
    }
    if sampling.logprobs:
        found |= {"input_top_logprobs": given.tops, "output_top_logprobs": drawn.tops}
    if sampling.logprob_ids:
        found |= {"input_token_ids_logprobs": given.chosen, "output_token_ids_logprobs": drawn.chosen}
    return found


def _finish_reason(delta: Delta, num_tokens: int) -> dict:
    if delta.finish_reason == "length":
        return {"type": "length", "length": num_tokens}
    if delta.finish_reason == "abort":
        return {"type": "abort", "message": "the request was aborted", "status_code": None, "err_type": None}
    if delta.finish_reason == "timeout":
        message = "timeout_s: the time is over"
        return {"type": "abort", "message": message, "status_code": 504, "err_type": "timeout"}
    return {"type": "stop", "matched": delta.stop}


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")
