"""From a request body to SamplingParams: defaults, limits, ids inside the vocabulary.

Each value comes from the request, else the model's generation_config, else the
seed's defaults below.
"""

import msgspec

from crane.api.bodies import GenerateBody, invalid
from crane.api.endpoint import Context
from crane.api.served import ServedModel
from crane.errors import RequestError
from crane.runtime.types import SamplingParams

DEFAULT_MAX_TOKENS = 512
MAX_CHOICES = 1024  # prompts x n of one request
DEFAULTS = {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "min_p": 0.0, "repetition_penalty": 1.05}


def sampling_params(
    body: GenerateBody,
    context: Context,
    max_tokens: int | None,
    *,
    logprobs: int | None,
    prompt_logprobs: bool = False,
) -> SamplingParams:
    """All of a body but its prompt. `fit` then adapts max_tokens to each prompt.

    max_tokens: as the client gave it, or None. prompt_logprobs: wanted with `logprobs` alternatives,
    apart from those that body.prompt_logprobs asks for. Raises RequestError naming the field.
    """
    model = context.model
    chosen = {
        name: _first(getattr(body, name), getattr(model.defaults, name), default)
        for name, default in DEFAULTS.items()
    }
    max_tokens = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
    if (body.min_tokens or 0) > max_tokens:
        raise invalid("min_tokens", f"expected at most max_tokens ({max_tokens}), got {body.min_tokens}")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "goes with stream: true only")
    model.check_ids(body.stop_token_ids or [], "stop_token_ids")
    if body.prompt_logprobs is not None:
        if body.stream:
            raise invalid("prompt_logprobs", "goes with stream: false only")
        logprobs, prompt_logprobs = max(logprobs or 0, body.prompt_logprobs), True
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=chosen["temperature"],
        top_k=max(chosen["top_k"], 0),
        top_p=chosen["top_p"],
        min_p=chosen["min_p"],
        repetition_penalty=chosen["repetition_penalty"],
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=bias_by_id(body.logit_bias or {}, model),
        seed=body.seed,
        n=body.n or 1,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        skip_special_tokens=body.skip_special_tokens is not False,
        num_draft_tokens=body.num_draft_tokens,
        deterministic=bool(body.deterministic),
    )


def fit(sampling: SamplingParams, num_prompt: int, max_model_len: int, field: str) -> SamplingParams:
    """`sampling` with max_tokens cut to the room that the prompt leaves.

    Raises RequestError (context_length_exceeded) when the prompt leaves none, and
    for an empty prompt. field: "messages" or "prompt".
    """
    if num_prompt == 0:
        raise invalid(field, "expected at least one token, got none")
    room = max_model_len - num_prompt
    if room < min(sampling.max_tokens, 1):
        raise RequestError(
            f"This model's maximum context length is {max_model_len} tokens. However, your {field} resulted "
            f"in {num_prompt} tokens. Please reduce the length of the {field}.",
            field=field,
            code="context_length_exceeded",
        )
    if sampling.max_tokens <= room:
        return sampling
    return msgspec.structs.replace(sampling, max_tokens=room, min_tokens=min(sampling.min_tokens, room))


def check_choices(num_prompts: int, n: int) -> None:
    """Raises RequestError when one request asks for too many answers."""
    if num_prompts * n > MAX_CHOICES:
        raise invalid("n", f"expected at most {MAX_CHOICES} choices over all prompts, got {num_prompts * n}")


def bias_by_id(given: dict[str, float], model: ServedModel, field: str = "logit_bias") -> dict[int, float]:
    """logit_bias of a body, with numbers for keys. Raises RequestError."""
    for key in given:
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < model.num_ids):
            expected = f"expected token ids in 0..{model.num_ids - 1} as keys"
            raise invalid(field, f"{expected}, got {key[:40]!r}")
    return {int(key): bias for key, bias in given.items()}


def _first(asked, models, default):
    return asked if asked is not None else models if models is not None else default
