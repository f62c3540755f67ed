"""SGLang's native generation: POST or PUT /generate, and how its dialect writes errors."""

import functools
import re
import uuid
from typing import Any

import msgspec

from crane.api import errors
from crane.api.bodies import decode, invalid
from crane.api.chat_parser import END_THINK, THINK, chat_form
from crane.api.constraint import response_grammar
from crane.api.endpoint import Context, Endpoint, Reply, Request
from crane.api.queueing import claims
from crane.api.sampling import bias_by_id, check_choices
from crane.api.served import ServedModel
from crane.api.sglang_bodies import NativeBody, NativeSamplingBody
from crane.api.sglang_generation import NativeGeneration, NativePrompt
from crane.errors import EngineError, RequestError
from crane.runtime.types import SamplingParams, Thinking

DEFAULT_MAX_TOKENS = 128
DEFAULTS = {"temperature": 0.8, "top_p": 0.95, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.0}
GREEDY_BELOW = 1e-6  # temperatures
KINDS = {"json_schema": "json", "regex": "regex", "ebnf": "grammar", "choice": "choice"}
ANY_JSON = "$$ANY$$"  # as a schema: whatever is JSON

_json = msgspec.json.Encoder().encode


class SchemaError(RequestError):
    """A body that is not of the declared shape; such errors have a form of their own."""


def native_body(kind: type, raw: bytes, context: Context):
    """`raw` as a `kind`. Raises SchemaError naming the field, what was expected and what came."""
    try:
        return decode(kind, raw, context)
    except RequestError as error:
        raise SchemaError(str(error), field=error.field, code=error.code) from None


def generate(context: Context, request: Request) -> NativeGeneration:
    """Generate in SGLang's native dialect. From text or token ids, one prompt or a batch; the text of a stream's events
    is all so far, or with --incremental-streaming-output what is new."""
    body = native_body(NativeBody, request.body, context)
    inputs, batched = _inputs(body, context.model)
    num = len(inputs)
    if num > context.settings.max_queue:
        raise invalid("text" if body.input_ids is None else "input_ids",
                      f"expected at most {context.settings.max_queue} prompts, what the queue holds, got {num}")
    params = _spread(body, "sampling_params", num, batched) or [NativeSamplingBody()] * num
    if len({each.n or 1 for each in params}) > 1:
        raise invalid("sampling_params", "n: expected the same for all prompts of a batch")
    n = params[0].n or 1
    check_choices(num, n)
    rids = _rids(body, num, batched)
    wanted = _logprobs(body, inputs, batched)
    salts = _salts(body, num, batched)
    prompts = []
    for i, ids in enumerate(inputs):
        where = f"sampling_params[{i}]." if isinstance(body.sampling_params, list) else "sampling_params."
        start, options = wanted[i]
        options |= {"grammar": _grammar(params[i], where), "thinking": _thinking(body, ids, context.model)}
        sampling = _sampling(params[i], context, len(ids), where, options)
        prompts.append(
            NativePrompt(rids[i], ids, sampling, start, keep_stop=bool(params[i].no_stop_trim),
                         interval=params[i].stream_interval or 1, salt=salts[i])
        )
    return NativeGeneration(
        context,
        prompts,
        claims=claims(context, body),
        stream=bool(body.stream),
        listed=batched or n > 1,
        with_text=bool(body.return_text_in_logprobs),
        with_prompt_ids=bool(body.return_prompt_token_ids),
    )


def error_reply(error: Exception) -> Reply:
    """As SGLang writes errors, with our Retry-After."""
    plain = errors.error_reply(error)
    status, message = plain.status, errors.error_object(error)[1]["error"]["message"]
    body: dict[str, Any] = {"error": {"message": message}}
    if status == 401:
        body = {"error": "Unauthorized"}
    elif isinstance(error, SchemaError):
        found = re.fullmatch(r"sampling_params(?:\[\d*\])?\.(.*)", error.field or "", re.DOTALL)
        if error.code == "unknown_field" and found:
            known = ", ".join(f"`{name}`" for name in NativeSamplingBody.__struct_fields__)
            body = {"error": f"unknown field `{found[1][:200]}`, expected one of {known}"}
        else:
            body = {"object": "error", "message": message, "type": "Bad Request", "param": None, "code": status}
    elif isinstance(error, EngineError) and error.code == "queue_full":
        status, body = 503, {"error": {"message": "The request queue is full."}}
    return Reply(_json(body), status, plain.headers)


def _inputs(body: NativeBody, model: ServedModel) -> tuple[list[list[int]], bool]:
    """The prompts' ids, and whether they came as a list."""
    if body.text is None and body.input_ids is None:
        raise RequestError("Either text, input_ids or input_embeds should be provided.")
    if body.text is not None and body.input_ids is not None:
        raise invalid("input_ids", "goes without text: only one of them can be the prompt")
    if body.text is not None:
        texts = [body.text] if isinstance(body.text, str) else body.text
        inputs = [model.tokenizer.encode(text) for text in texts]
        if not all(inputs):
            raise invalid("text", "expected at least one token in each prompt")
        return inputs, isinstance(body.text, list)
    given = body.input_ids
    kinds = {type(item) for item in given}
    if not given or [] in given:
        raise RequestError("input_ids cannot be empty.", field="input_ids")
    if len(kinds) > 1:
        raise invalid("input_ids", "expected token ids or lists of token ids, got a mixture")
    batched = kinds == {list}
    for i, ids in enumerate(given if batched else [given]):
        model.check_ids(ids, f"input_ids[{i}]" if batched else "input_ids")
    return (given if batched else [given]), batched


def _spread(body: NativeBody, name: str, num: int, batched: bool) -> list | None:
    """A field's value for each of `num` prompts; None when it is not given."""
    value = getattr(body, name)
    if not isinstance(value, list):
        return None if value is None else [value] * num
    if not batched:
        raise invalid(name, "expected one value, got a list although text or input_ids is no batch")
    if len(value) != num:
        raise invalid(name, f"expected one entry for each of the {num} prompts, got {len(value)}")
    return value


def _rids(body: NativeBody, num: int, batched: bool) -> list[str]:
    if isinstance(body.rid, str) and batched:
        return [f"{body.rid}_{i}" for i in range(num)]
    rids = _spread(body, "rid", num, batched) or [uuid.uuid4().hex for _ in range(num)]
    if len(set(rids)) < num:
        raise invalid("rid", "expected a different one for each prompt")
    return rids


def _salts(body: NativeBody, num: int, batched: bool) -> list[str]:
    salts = _spread(body, "cache_salt", num, batched) or [""] * num
    extra = _spread(body, "extra_key", num, batched)
    return [f"{salt}\0{key}" for salt, key in zip(salts, extra)] if extra else salts


def _logprobs(body: NativeBody, inputs: list[list[int]], batched: bool) -> list[tuple[int, dict]]:
    """For each prompt, where its own log-probabilities begin (its end: nowhere), and fields of SamplingParams."""
    num = len(inputs)
    spread = functools.partial(_spread, body, num=num, batched=batched)
    wanted = spread("return_logprob") or [False] * num
    starts = spread("logprob_start_len") or [-1] * num
    tops = spread("top_logprobs_num") or [0] * num
    chosen = body.token_ids_logprob or []
    if any(isinstance(each, list) for each in chosen):
        chosen = spread("token_ids_logprob")
        if any(isinstance(each, int) for each in chosen):
            raise invalid("token_ids_logprob", "expected token ids or lists of token ids, got a mixture")
    else:
        chosen = [[each for each in chosen if each is not None]] * num
    found = []
    for i, ids in enumerate(inputs):
        if not wanted[i]:
            for name, value in (("logprob_start_len", starts[i] >= 0), ("top_logprobs_num", tops[i]),
                                ("token_ids_logprob", chosen[i])):
                if value:
                    raise invalid(name, "goes with return_logprob: true only")
            found.append((len(ids), {}))
            continue
        if starts[i] > len(ids):
            expected = f"expected at most the number of input tokens ({len(ids)})"
            raise invalid("logprob_start_len", f"{expected}, got {starts[i]}")
        start = len(ids) if starts[i] < 0 else starts[i]
        options = {"logprobs": tops[i], "logprob_ids": tuple(chosen[i] or ()), "prompt_logprobs": start < len(ids)}
        found.append((start, options))
    return found


def _sampling(params: NativeSamplingBody, context: Context, num_prompt: int, where: str, more: dict) -> SamplingParams:
    """One prompt's parameters. where: what its fields are called in errors. more: fields to set as they are."""
    model = context.model
    max_tokens = _max_tokens(params, num_prompt, context.max_length)
    min_tokens = params.min_new_tokens or 0
    if min_tokens > max_tokens and not _clamped(params):
        raise invalid(f"{where}min_new_tokens", f"expected at most max_new_tokens ({max_tokens}), got {min_tokens}")
    if None not in (params.seed, params.sampling_seed) and params.seed != params.sampling_seed:
        raise invalid(f"{where}seed", f"expected the same as sampling_seed, got {params.seed}")
    model.check_ids(params.stop_token_ids or [], f"{where}stop_token_ids")
    model.check_ids(list(more.get("logprob_ids", ())), "token_ids_logprob")
    chosen = {}
    for name, default in DEFAULTS.items():
        given, own = getattr(params, name), getattr(model.defaults, name)
        chosen[name] = given if given is not None else default if own is None else own
    chosen["top_k"] = max(chosen["top_k"], 0)
    if chosen["temperature"] < GREEDY_BELOW:
        chosen["temperature"] = 0.0
    return SamplingParams(
        max_tokens=max_tokens,
        frequency_penalty=params.frequency_penalty or 0.0,
        presence_penalty=params.presence_penalty or 0.0,
        logit_bias=bias_by_id(params.logit_bias or {}, model, f"{where}logit_bias"),
        seed=params.seed if params.sampling_seed is None else params.sampling_seed,
        n=params.n or 1,
        stop=(params.stop,) if isinstance(params.stop, str) else tuple(params.stop or ()),
        stop_token_ids=tuple(params.stop_token_ids or ()),
        min_tokens=min(min_tokens, max_tokens),
        ignore_eos=bool(params.ignore_eos),
        skip_special_tokens=params.skip_special_tokens is not False,
        deterministic=bool(params.deterministic),
        **chosen,
        **more,
    )


def _grammar(params: NativeSamplingBody, where: str) -> str | None:
    """What the text has to match."""
    given = [name for name in ("json_schema", "regex", "ebnf", "choice") if getattr(params, name) is not None]
    if not given:
        return None
    if len(given) > 1:
        message = "Only one of json_schema, regex, ebnf, or structural_tag can be set."
        raise RequestError(message, field=where + given[1], code="invalid_value")
    value = getattr(params, given[0])
    if value == ANY_JSON:
        value = True
    return response_grammar(**{KINDS[given[0]]: value}, field=where + given[0])


def _thinking(body: NativeBody, ids: list[int], model: ServedModel) -> Thinking | None:
    """The thinking section, if the request speaks of one."""
    if body.max_thinking_tokens is None and not body.require_reasoning:
        return None
    if not chat_form(model).thinks:
        field = "require_reasoning" if body.require_reasoning else "max_thinking_tokens"
        raise invalid(field, "this model has no thinking section")
    text = model.tokenizer.decode(ids, skip_special_tokens=False)
    start_ids, end_ids = (tuple(model.tokenizer.encode(tag, False)) for tag in (THINK, END_THINK))
    return Thinking(start_ids, end_ids, text.rfind(THINK) > text.rfind(END_THINK), body.max_thinking_tokens)


def _clamped(params: NativeSamplingBody) -> bool:
    """Whether the context's end may be what limits max_new_tokens."""
    return not isinstance(params.max_new_tokens, int)


def _max_tokens(params: NativeSamplingBody, num_prompt: int, max_model_len: int) -> int:
    """What was asked for; the default, or null, as far as the context goes."""
    room, asked = max_model_len - num_prompt, params.max_new_tokens
    code = "context_length_exceeded"
    if room < (asked != 0):
        message = f"The input ({num_prompt} tokens) is longer than the model's context length ({max_model_len} tokens)."
        raise RequestError(message, field="text", code=code)
    if _clamped(params):
        return room if asked is None else min(DEFAULT_MAX_TOKENS, room)
    if asked > room:
        raise RequestError(
            f"Requested token count exceeds the model's maximum context length of {max_model_len} tokens. You "
            f"requested a total of {num_prompt + asked} tokens: {num_prompt} tokens from the input and {asked} "
            "tokens for the completion.",
            field="sampling_params.max_new_tokens",
            code=code,
        )
    return asked


ENDPOINTS = tuple(
    Endpoint(method, "/generate", generate, body=NativeBody, error_reply=error_reply) for method in ("POST", "PUT")
)
