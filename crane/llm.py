"""crane without HTTP: the engine and the text work in this process.

    from crane import LLM, SamplingParams
    llm = LLM("path/to/model")
    for answer in llm.chat([{"role": "user", "content": "Why is the sky blue?"}]):
        print(answer.text)
"""

import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from crane.errors import EngineError, ModelError, RequestError
from crane.models.chat import load_chat_template
from crane.models.config import load_config
from crane.models.files import open_checkpoint
from crane.models.tokenizer import load_tokenizer
from crane.runtime.engine import Engine
from crane.runtime.settings import Settings
from crane.runtime.text import Delta, TextStream
from crane.runtime.types import Generate, Output, Rejected, SamplingParams, TokenLogprob, Usage

Prompt = str | Sequence[int]
Messages = Sequence[dict]


@dataclass(frozen=True)
class Completion:
    """One finished choice.

    prompt_index: which prompt it answers; index: which of its n choices. finish_reason: "stop" | "length".
    stop: the stop string or stop token id that ended it, if one did. logprobs: one per token when asked for;
    prompt_logprobs: on choice 0 when asked for, None for the first prompt token.
    """

    prompt_index: int
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop: str | int | None
    usage: Usage
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


class LLM:
    """A model, loaded and ready. Use it from one thread.

    model_path: a model folder or .gguf file; settings: fields of `crane.runtime.settings.Settings`.
    Raises ModelError or SettingsError.
    """

    def __init__(self, model_path: str, **settings):
        self.settings = Settings(model_path=str(model_path), **settings)
        checkpoint = open_checkpoint(self.settings.model_path, self.settings.format)
        config = load_config(checkpoint, self.settings.model_type)
        self.tokenizer = load_tokenizer(checkpoint)
        self.chat_template = load_chat_template(checkpoint, self.tokenizer, config.model_type)
        self.engine = Engine(self.settings)
        while self.engine.prepare():  # now, because nobody waits yet
            pass
        self._rids = itertools.count()
        self._end = weakref.finalize(self, self.engine.close)

    def close(self) -> None:
        """Finish writing to `kv_cache_dir` what was computed, for a few seconds at most; afterwards nothing more is
        written. Happens by itself at the latest when the interpreter ends."""
        self._end()

    def generate(self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | None = None) -> list[Completion]:
        """Complete one prompt or several (text, or token ids): one Completion per prompt and choice, in order.

        Raises RequestError when a prompt cannot be served; nothing is generated then.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        prompts = [prompts] if single else list(prompts)
        encoded = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        finished = list(self._run(encoded, sampling or SamplingParams()))
        return sorted(finished, key=lambda c: (c.prompt_index, c.index))

    def chat(self, messages: Messages | Sequence[Messages], sampling: SamplingParams | None = None,
             **template_options) -> list[Completion]:
        """Answer one conversation or several through the model's chat template.

        messages: [{"role": ..., "content": ...}, ...]. template_options go to the template (enable_thinking=...).
        """
        if self.chat_template is None:
            raise ModelError(f"{self.settings.model_path}: the model has no chat template; use generate()")
        several = len(messages) > 0 and not isinstance(messages[0], dict)
        chats = list(messages) if several else [messages]
        rendered = [self.chat_template.render(list(chat), **template_options) for chat in chats]
        encoded = [self.tokenizer.encode(text, add_special_tokens=False) for text in rendered]
        finished = list(self._run(encoded, sampling or SamplingParams()))
        return sorted(finished, key=lambda c: (c.prompt_index, c.index))

    def _run(self, prompts: list[list[int]], sampling: SamplingParams) -> Iterator[Completion]:
        places = {f"llm-{next(self._rids)}": place for place in range(len(prompts))}
        waiting = [Generate(rid, prompts[place], sampling) for rid, place in places.items()]
        choices = {(rid, index): _Choice(self.tokenizer, sampling) for rid in places for index in range(sampling.n)}
        try:
            while waiting or choices:
                waiting = self._submit(waiting)
                outputs = self.engine.step()
                for output in outputs:
                    choice = choices.get((output.rid, output.index))
                    if choice is None or not choice.push(output):
                        continue
                    usage = output.usage
                    if output.finish_reason is None:  # ended by a stop string, of which the engine knows nothing
                        ended, *others = self.engine.abort(output.rid, output.index)
                        usage = ended.usage
                        outputs += others  # what the engine lost in doing so
                    del choices[output.rid, output.index]
                    yield choice.completion(places[output.rid], output.index, usage)
        finally:
            for rid, _ in choices:  # after an error, or when the caller stops early
                self.engine.abort(rid)

    def _submit(self, waiting: list[Generate]) -> list[Generate]:
        """Hand the engine as many requests as its queue takes; the others wait here."""
        for place, request in enumerate(waiting):
            answer = self.engine.add(request)
            if isinstance(answer, Rejected):
                if answer.code == "queue_full":
                    return waiting[place:]
                raise RequestError(answer.message, field="prompts", code=answer.code)
        return []


class _Choice:
    """Collects what the engine says of one choice until it is finished."""

    def __init__(self, tokenizer, sampling: SamplingParams):
        self._stream = TextStream(tokenizer, sampling)
        self._logprobs: list[TokenLogprob] | None = None if sampling.logprobs is None else []
        self._prompt_logprobs: list | None = None
        self._last: Delta | None = None

    def push(self, output: Output) -> bool:
        """Take an output in; True when the choice is finished. Raises EngineError when the engine failed on it."""
        if output.finish_reason == "error":
            raise EngineError("internal", output.error or "the engine failed")
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        self._last = self._stream.push(output)
        if self._logprobs is not None:
            self._logprobs += self._last.logprobs or []
        return self._last.finish_reason is not None

    def completion(self, prompt_index: int, index: int, usage: Usage) -> Completion:
        token_ids = list(self._stream.token_ids)
        return Completion(
            prompt_index, index, self._stream.text, token_ids, self._last.finish_reason, self._last.stop,
            msgspec.structs.replace(usage, completion_tokens=len(token_ids)), self._logprobs, self._prompt_logprobs,
        )
