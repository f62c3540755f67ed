"""OpenAI's text completions: prompts as they are, without a chat template."""

import msgspec

from crane.api.bodies import CompletionBody, decode, invalid
from crane.api.endpoint import Context, Endpoint, Request
from crane.api.generation import Choice, ChoicesGeneration, Prompt
from crane.api.logprobs import LegacyLogprobs, prompt_logprobs, trimmed
from crane.api.resumable import resumable
from crane.api.sampling import check_choices, fit, sampling_params
from crane.api.served import ServedModel
from crane.api.sse import json_text
from crane.api.structured import response_constraint
from crane.runtime.text import Delta
from crane.runtime.types import Output

_json = msgspec.json.Encoder().encode
# fill-in-the-middle marks: before the text before, before the text after, before the answer
_FIM = (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"))
_FIM_ENDS = ("<|fim_pad|>", "<fim_pad>", "<|file_sep|>", "<file_sep>", "<|repo_name|>", "<repo_name>")


class CompletionGeneration(ChoicesGeneration):
    """The answer to one /v1/completions request."""

    id_prefix = "cmpl-"
    chunk_object = full_object = "text_completion"

    def __init__(self, context: Context, body: CompletionBody, prompts: list[Prompt]):
        super().__init__(context, body, prompts)
        self._echo = bool(body.echo)
        self._logprobs = body.logprobs is not None
        self._max_top = None if body.prompt_logprobs is None and not body.best_of else body.logprobs or 0
        self._body = body
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

    def _around(self, choice: Choice) -> tuple[bytes, bytes] | None:
        if self._body.return_token_ids:
            return None
        before = b'{"index":%d,"text":' % choice.index
        return self._head + before, b',"logprobs":null,"finish_reason":null}' + self._tail

    def _frames(self, choice: Choice, delta: Delta) -> bytes:
        text, logprobs = delta.text, None
        if self._logprobs and delta.logprobs:
            logprobs = self._shape(choice, delta.token_ids, delta.logprobs)
        if self._echo and not choice.started:
            text = choice.prompt.text + text
            if self._logprobs and logprobs is None:
                logprobs = self._shape(choice, [], [])
        is_first, choice.started = not choice.started, True
        extra = b""
        if self._body.return_token_ids:
            extra = _json(self._token_ids(choice, delta.token_ids, is_first))[:-1].replace(b"{", b",", 1)
        if not (text or extra) and logprobs is None and choice.finish_reason is None:
            return b""
        return self._chunk(
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b%b}'
            % (choice.index, json_text(text), _json(logprobs), _json(choice.finish_reason), extra)
        )

    def _token_ids(self, choice: Choice, token_ids: list[int], is_first: bool) -> dict:
        prompt = {"prompt_token_ids": choice.prompt.ids} if is_first else {}
        return {**prompt, "token_ids": token_ids}

    def _final(self, choice: Choice) -> dict:
        logprobs = None
        if self._logprobs:
            logprobs = self._shape(choice, choice.text.token_ids, choice.logprobs)
        final = {
            "index": choice.index,
            "text": (choice.prompt.text if self._echo else "") + choice.text.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }
        if self._body.return_token_ids:
            final |= self._token_ids(choice, choice.text.token_ids, True)
        if self._body.prompt_logprobs is not None:
            prompt = choice.prompt
            entries = trimmed(prompt.logprobs, self._body.prompt_logprobs)
            final["prompt_logprobs"] = prompt_logprobs(self.tokenizer, prompt.ids, entries)
        return final

    def _answers(self) -> list[Choice]:
        """With best_of, of each prompt's choices those with the highest mean log-probability, best first."""
        if not self._body.best_of:
            return self.choices
        best = []
        for prompt in self.prompts:
            own = [choice for choice in self.choices if choice.prompt is prompt]
            best += sorted(own, key=_mean_logprob, reverse=True)[: self._body.n or 1]
        for i, choice in enumerate(best):
            choice.index = i
        return best

    def _shape(self, choice: Choice, token_ids: list[int], entries: list) -> dict:
        """Log-probabilities of the next tokens; before a choice's first ones, its echoed prompt's."""
        legacy = self._legacy[choice.index]
        if choice.started or not self._echo:
            return legacy.shape(token_ids, entries)
        logprobs = choice.prompt.logprobs
        if self._max_top is not None:
            logprobs = trimmed(logprobs, self._max_top)
        first = legacy.prompt(choice.prompt.ids, logprobs, choice.prompt.text)
        rest = legacy.shape(token_ids, entries)
        return {name: first[name] + rest[name] for name in first}


@resumable("/v1/completions")
def completions(context: Context, request: Request) -> CompletionGeneration:
    """POST /v1/completions: continue prompts. Text or token ids, one or several, without a template; one choice per
    prompt and n. With echo, logprobs and max_tokens 0 a prompt is scored and nothing generated."""
    body = decode(CompletionBody, request.body, context)
    model = context.model
    model.check_name(body.model)
    if body.best_of is not None:
        _check_best_of(body)
    if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
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
    best_of = body.best_of or 0
    sampling = msgspec.structs.replace(
        sampling,
        n=best_of or sampling.n,
        logprobs=0 if best_of and sampling.logprobs is None else sampling.logprobs,
        grammar=response_constraint(body),
        stop_token_ids=sampling.stop_token_ids + (_fim_ends(model) if body.suffix is not None else ()),
    )
    prompts = []
    for text, ids in _prompts(body, context):
        fitted = fit(sampling, len(ids), context.max_length, "prompt")
        prompts.append(Prompt(ids, fitted, text=text))
    return CompletionGeneration(context, body, prompts)


def _prompts(body: CompletionBody, context: Context) -> list[tuple[str, list[int]]]:
    """Text (needed for echo only) and ids of each prompt."""
    given, model, num_each = body.prompt, context.model, body.best_of or body.n or 1
    if isinstance(given, str):
        given = [given]
    kinds = {type(item) for item in given}
    if len(kinds) != 1:
        raise invalid("prompt", "expected strings, token ids or lists of token ids, got a mixture")
    if kinds != {int}:
        check_choices(len(given), num_each)
    if body.suffix is not None:
        if kinds != {str} or body.echo:
            raise invalid("suffix", "goes with prompts that are text, and without echo")
        return [("", _fim_ids(text, body.suffix, model)) for text in given]
    if kinds == {str}:
        return list(zip(given, (model.tokenizer.encode(text) for text in given)))
    lists = [given] if kinds == {int} else given
    for i, ids in enumerate(lists):
        model.check_ids(ids, "prompt" if kinds == {int} else f"prompt[{i}]")
    decode = model.tokenizer.decode
    return [(decode(ids, skip_special_tokens=False) if body.echo else "", ids) for ids in lists]


def _check_best_of(body: CompletionBody) -> None:
    if body.best_of < (body.n or 1):
        raise invalid("best_of", f"expected at least n ({body.n or 1}), got {body.best_of}")
    if body.stream and body.best_of > (body.n or 1):
        raise invalid("best_of", "goes with stream: false only")


def _mean_logprob(choice: Choice) -> float:
    values = [entry.logprob for entry in choice.logprobs]
    return sum(values) / len(values) if values else float("-inf")


def _fim_ids(before: str, after: str, model: ServedModel) -> list[int]:
    """The prompt that asks for what stands between two texts. Raises RequestError for a model without marks."""
    for marks in _FIM:
        mark_ids = [model.tokenizer.token_to_id(mark) for mark in marks]
        if None not in mark_ids:
            texts = [model.tokenizer.encode(text, False, parse_special=False) for text in (before, after)]
            return [mark_ids[0], *texts[0], mark_ids[1], *texts[1], mark_ids[2]]
    raise invalid("suffix", "this model has no fill-in-the-middle tokens")


def _fim_ends(model: ServedModel) -> tuple[int, ...]:
    """Tokens with which a model turns to another file: the gap is filled."""
    ids = (model.tokenizer.token_to_id(mark) for mark in _FIM_ENDS)
    return tuple(token_id for token_id in ids if token_id is not None)


ENDPOINTS = (Endpoint("POST", "/v1/completions", completions, body=CompletionBody),)
