"""OpenAI's text completions: prompts as they are, without a chat template."""

import msgspec

from crane.api.bodies import CompletionBody, decode, invalid
from crane.api.endpoint import Context, Endpoint, Request
from crane.api.generation import BaseGeneration, Choice, Prompt
from crane.api.logprobs import LegacyLogprobs
from crane.api.sampling import check_choices, fit, sampling_params
from crane.api.sse import json_text
from crane.runtime.text import Delta
from crane.runtime.types import Output

_json = msgspec.json.Encoder().encode


class CompletionGeneration(BaseGeneration):
    """The answer to one /v1/completions request."""

    id_prefix = "cmpl-"
    chunk_object = full_object = "text_completion"

    def __init__(self, context: Context, body: CompletionBody, prompts: list[Prompt]):
        super().__init__(context, body, prompts)
        self._echo = bool(body.echo)
        self._logprobs = body.logprobs is not None
        skipped = self.tokenizer.special_ids if body.skip_special_tokens is not False else frozenset()
        self._legacy = [LegacyLogprobs(self.tokenizer, skipped) for _ in self.choices]
        self._held: dict[str, list[tuple[Choice, Output]]] = {}

    def _push(self, choice: Choice, output: Output) -> bytes:
        """As the base, but no choice starts before its prompt's log-probabilities are there to echo."""
        prompt = choice.prompt
        if not (self._echo and self._logprobs) or prompt.logprobs is not None:
            return super()._push(choice, output)
        held = self._held.setdefault(output.rid, [])
        if output.prompt_logprobs is None:
            if output.index == 0:
                return self._fail("the engine sent no log-probabilities of the prompt")
            held.append((choice, output))
            return b""
        prompt.logprobs = output.prompt_logprobs
        waiting = [(choice, output), *self._held.pop(output.rid)]
        return b"".join([super(CompletionGeneration, self)._push(*each) for each in waiting])

    def _frames(self, choice: Choice, delta: Delta) -> bytes:
        text, logprobs = delta.text, None
        if self._logprobs and delta.logprobs:
            logprobs = self._shape(choice, delta.token_ids, delta.logprobs)
        if self._echo and not choice.started:
            text = choice.prompt.text + text
            if self._logprobs and logprobs is None:
                logprobs = self._shape(choice, [], [])
        choice.started = True
        if not text and logprobs is None and choice.finish_reason is None:
            return b""
        return self._chunk(
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}'
            % (choice.index, json_text(text), _json(logprobs), _json(choice.finish_reason))
        )

    def _final(self, choice: Choice) -> dict:
        logprobs = None
        if self._logprobs:
            logprobs = self._shape(choice, choice.text.token_ids, choice.logprobs)
        return {
            "index": choice.index,
            "text": (choice.prompt.text if self._echo else "") + choice.text.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }

    def _shape(self, choice: Choice, token_ids: list[int], entries: list) -> dict:
        """Log-probabilities of the next tokens; before a choice's first ones, its echoed prompt's."""
        legacy = self._legacy[choice.index]
        if choice.started or not self._echo:
            return legacy.shape(token_ids, entries)
        first = legacy.prompt(choice.prompt.ids, choice.prompt.logprobs, choice.prompt.text)
        rest = legacy.shape(token_ids, entries)
        return {name: first[name] + rest[name] for name in first}


def completions(context: Context, request: Request) -> CompletionGeneration:
    """POST /v1/completions: one choice per prompt and n."""
    body = decode(CompletionBody, request.body)
    model = context.model
    model.check_name(body.model)
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise invalid("best_of", f"expected the same as n ({n}), got {body.best_of}")
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens", "expected at least 1 without echo, got 0")
    # max_tokens 0 scores the prompt: the engine does that as prompt log-probabilities, asked for or not
    scoring = bool(body.echo) and (body.logprobs is not None or body.max_tokens == 0)
    sampling = sampling_params(
        body,
        context,
        body.max_tokens,
        logprobs=(body.logprobs or 0) if scoring else body.logprobs,
        prompt_logprobs=scoring,
    )
    prompts = []
    for text, ids in _prompts(body, context):
        fitted = fit(sampling, len(ids), context.max_model_len, "prompt")
        prompts.append(Prompt(ids, fitted, text=text))
    return CompletionGeneration(context, body, prompts)


def _prompts(body: CompletionBody, context: Context) -> list[tuple[str, list[int]]]:
    """Text (needed for echo only) and ids of each prompt."""
    given, model = body.prompt, context.model
    if isinstance(given, str):
        given = [given]
    kinds = {type(item) for item in given}
    if len(kinds) != 1:
        raise invalid("prompt", "expected strings, token ids or lists of token ids, got a mixture")
    if kinds != {int}:
        check_choices(len(given), body.n or 1)
    if kinds == {str}:
        return list(zip(given, (model.tokenizer.encode(text) for text in given)))
    lists = [given] if kinds == {int} else given
    for i, ids in enumerate(lists):
        model.check_ids(ids, "prompt" if kinds == {int} else f"prompt[{i}]")
    decode = model.tokenizer.decode
    return [(decode(ids, skip_special_tokens=False) if body.echo else "", ids) for ids in lists]


ENDPOINTS = (Endpoint("POST", "/v1/completions", completions),)
