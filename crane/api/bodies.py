"""The request bodies: one Struct each drives parsing, validation and error messages.

A field is honoured, or refused with an error that names it. Known fields that
crane does not act on yet are declared with `later(...)`: null and the listed
neutral values, which ask for nothing, pass; anything else is a 400.
"""

import functools
import re
import typing
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from crane.api.endpoint import Context
from crane.api.limits import given, refuse_duplicates, refuse_excess
from crane.errors import RequestError

MAX_INT = 2**31 - 1


def later(*neutral, use: str = ""):
    """use: the field that takes this one's place."""
    schema = {"enum": [None, *neutral], "description": "not supported; only these values, which ask for nothing"}
    return Annotated[Any, Meta(extra={"neutral": neutral, "use": use}, extra_json_schema=schema)]


Absent = later()
Off = later(False)
EmptyList = later([])
NoFunctions = later([], use="tools")
NoFunctionCall = later("none", "auto", use="tool_choice")
StandardTier = later("auto", "default")
EmptyText = later("")
TextOnly = later(["text"])
Medium = later("medium")

TokenId = Annotated[int, Meta(ge=0, le=MAX_INT)]
# the settings set narrower bounds, see `limits`; these are the engine's own
NumChoices = Annotated[int, Meta(ge=1, le=1024)]
NumTop = Annotated[int, Meta(ge=0, le=1000)]
StopText = Annotated[str, Meta(min_length=1)]
Priority = Annotated[int, Meta(ge=-1000, le=1000)]
TimeLimit = Annotated[float, Meta(gt=0, le=86_400)]
Bias = Annotated[float, Meta(ge=-100, le=100)]


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A JSON object without unknown fields."""


class QueuedBody(Body):
    """A body that becomes work for the engine.

    priority: its class, 0 without one. Lower values run first, as in vLLM, unless --priority-order is
    highest-first, as in SGLang. timeout_s: so long after its arrival it ends, wherever it is then: with
    finish_reason "timeout" and the tokens that there are, or with an error (504, code "timeout") when there are none.
    """

    priority: Priority | None = None
    timeout_s: TimeLimit | None = None


class StreamOptions(Body):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Off = None


class JsonSchema(Body):
    """The schema of a json_schema response. strict: false lets keywords pass that cannot be enforced; name
    and description only label it."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Body):
    """What the answer's text has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """The same, as vLLM writes it: one of these."""

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class GenerateBody(QueuedBody):
    """What /v1/chat/completions and /v1/completions have in common."""

    model: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None  # 0 is greedy
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=MAX_INT)] | None = None  # -1 and 0 are off
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Bias] | None = None  # keys are token ids
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: NumChoices | None = None
    stop: StopText | list[StopText] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_INT)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Meta(min_length=1)] | None = None
    guided_grammar: str | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    prompt_logprobs: NumTop | None = None
    return_token_ids: bool | None = None
    timeline: bool | None = None  # the answer says when what happened to it
    # events of the stream are numbered, and another connection may go on with it: see GET /v1/streams/{id}
    resumable: bool | None = None
    # tokens guessed and verified in one step, at most; 0 is off. What a grammar constrains is never guessed
    num_draft_tokens: Annotated[int, Meta(ge=0, le=64)] | None = None
    # the same bits whatever runs beside it, in bfloat16, too; slower, and nothing is guessed
    deterministic: bool | None = None
    # computed prefixes are shared only between requests of the same salt
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    # these label a request and change nothing in its answer
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: StandardTier = None
    store: Off = None


class Function(Body):
    """The function a tool call names; arguments as JSON text or already parsed."""

    name: str
    arguments: str | dict[str, Any] = ""
    parsed_arguments: Any = None  # the same again, which openai's client adds to what it got


class ToolCall(Body):
    """One call of an earlier assistant message."""

    function: Function
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None  # clients that join stream deltas send it back


class FunctionTool(Body):
    """A function that the model may call. strict: refuses keywords of `parameters` that cannot be enforced."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """One tool of a request."""

    function: FunctionTool
    type: Literal["function"] = "function"


class ChosenFunction(Body):
    """The name of a function."""

    name: str


class AllowedTool(Body):
    """One of the tools of a request, by its name."""

    function: ChosenFunction
    type: Literal["function"] = "function"


class AllowedTools(Body):
    """Some of the tools of a request."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], Meta(min_length=1)]


class ToolChoice(Body):
    """A function that has to be called, or the tools that may be."""

    type: Literal["function", "allowed_tools"]
    function: ChosenFunction | None = None
    allowed_tools: AllowedTools | None = None


class Message(Body):
    """One turn of a chat; content is text or parts of type text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    # present in answers that clients send back as they got them
    refusal: EmptyText = None
    annotations: EmptyList = None
    parsed: Any = None  # the content again, which openai's client adds
    audio: Absent = None
    function_call: Absent = None


class PredictedText(Body):
    """A piece of a prediction."""

    text: str
    type: Literal["text"]


class Prediction(Body):
    """What most of the answer is expected to be: where that comes true, it comes faster."""

    content: str | Annotated[list[PredictedText], Meta(min_length=1)]
    type: Literal["content"]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(GenerateBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_INT)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=MAX_INT)] | None = None
    logprobs: bool | None = None
    top_logprobs: NumTop | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    parallel_tool_calls: bool | None = None  # without tools there is nothing to run in parallel
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    functions: NoFunctions = None
    function_call: NoFunctionCall = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    thinking_token_budget: Annotated[int, Meta(ge=0, le=MAX_INT)] | None = None
    reasoning_budget_tokens: Annotated[int, Meta(ge=-1, le=MAX_INT)] | None = None  # -1 is no limit
    include_reasoning: bool | None = None  # false keeps it out of the answer
    verbosity: Medium = None
    modalities: TextOnly = None
    audio: Absent = None
    prediction: Prediction | None = None
    moderation: Absent = None
    web_search_options: Absent = None
    prompt_cache_options: Absent = None


class CompletionBody(GenerateBody, kw_only=True):
    """POST /v1/completions. prompt: text, token ids, or a list of either."""

    prompt: str | Annotated[list[str | int | list[TokenId]], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_INT)] | None = None  # 0 only with echo
    logprobs: NumTop | None = None
    echo: bool | None = None
    best_of: NumChoices | None = None
    suffix: str | None = None  # for models with fill-in-the-middle tokens


class TokenizeBody(Body):
    """POST /v1/tokenize: exactly one of text, prompt, messages."""

    model: str | None = None
    text: str | list[str] | None = None
    prompt: str | list[str] | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None  # default: true for text, false for messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None
    tools: list[Tool] | None = None


class DetokenizeBody(Body):
    """POST /v1/detokenize: token ids, or a list of such lists."""

    tokens: list[int | list[TokenId]]
    model: str | None = None
    skip_special_tokens: bool | None = None


def invalid(field: str, message: str) -> RequestError:
    """The 400 for a value of `field` that says what was expected, and what came."""
    return RequestError(f"{field}: {message}", field=field, code="invalid_value")


def decode(kind: type, raw: bytes, context: Context | None = None):
    """`raw` as a `kind`, within the limits of the settings. Raises RequestError naming the field, what was expected and
    what came.

    context: None for what was made of a body that has been checked already.
    """
    try:
        body = _decoder(kind).decode(raw)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), raw) from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _not_json(raw, error) from None
    refuse_unsupported(body)
    if context is not None:
        refuse_duplicates(raw)
        refuse_excess(body, raw, context)
    return body


def refuse_unsupported(body: Body, path: str = "") -> None:
    """Raises RequestError for the first field, here or deeper, that asks for what crane cannot do yet."""
    neutral = _neutral_values(type(body))
    for name, value in given(body):
        if name in neutral and not any(_same(value, each) for each in neutral[name]["neutral"]):
            field, use = path + name, neutral[name].get("use")
            message = f"{field} is not supported" + (f", use {use}" if use else "")
            raise RequestError(message, field=field, code="unsupported_parameter")
        if isinstance(value, Body):
            refuse_unsupported(value, f"{path}{name}.")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, Body):
                    refuse_unsupported(item, f"{path}{name}[{i}].")


def _same(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and value == neutral  # 0 is not False


@functools.cache
def _decoder(kind: type) -> msgspec.json.Decoder:
    return msgspec.json.Decoder(kind)


@functools.cache
def _neutral_values(kind: type) -> dict[str, dict]:
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        for meta in getattr(hint, "__metadata__", ()):
            if meta.extra and "neutral" in meta.extra:
                found[name] = meta.extra
    return found


def _not_json(raw: bytes, error: Exception) -> RequestError:
    """A RequestError that says where the body stops being JSON: at a byte, and behind which key."""
    if not raw.strip():
        return RequestError("the body is empty: expected a JSON object")
    at = re.search(r"\(byte (\d+)\)", str(error))
    what, start = f"not valid JSON: {error}", int(at[1]) if at else len(raw)
    half = re.search(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|\\u[dD][c-fC-F][0-9a-fA-F]{2}", raw)
    if isinstance(error, UnicodeDecodeError):
        what, start = "not valid UTF-8", _valid_utf8(raw)
    elif half:
        what, start = f"{what} (half of a surrogate pair is not text)", half.start()
    keys = re.findall(rb'"([^"\\]{1,64})"\s*:', raw[max(0, start - 65536) : start])
    field = keys[-1].decode("utf-8", "replace") if keys else None
    return RequestError(f"the body is {what}" + (f", in {field!r}" if field else ""), field=field)


def _valid_utf8(raw: bytes) -> int:
    """How many bytes there are before the first that is not UTF-8."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(raw)


def _invalid(message: str, raw: bytes) -> RequestError:
    """A RequestError from msgspec's "Expected `int`, got `str` - at `$.n`" and its kin."""
    what, _, where = message.partition(" - at `$")
    path = where.rstrip("`").lstrip(".")
    match = re.fullmatch(r"Object (?:contains unknown|missing required) field `(.*)`", what, re.DOTALL)
    if match:
        name = f"{path}.{match[1]}" if path else match[1]
        kind = "unknown field" if "unknown" in what else "missing field"
        return RequestError(f"{kind} {name!r}", field=name, code=kind.replace(" ", "_"))
    what = what[:1].lower() + what[1:]
    if "got" not in what:
        what += _got(raw, path)
    subject = path or "the body"
    return RequestError(f"{subject}: {what}", field=path or None, code="invalid_value")


def _got(raw: bytes, path: str) -> str:
    """What came at `path`, as the end of a message; nothing when the path has no address."""
    try:
        value = msgspec.json.decode(raw)
        for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
            value = value[int(index)] if index else value[key]
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, IndexError, TypeError, RecursionError):
        return ""
    text = repr(value)
    return f", got {text if len(text) <= 60 else text[:57] + '...'}"
