"""The request body of /v1/responses, its items, and what they say in the words of a chat completion."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from crane.api.bodies import (
    MAX_INT, Absent, Body, ChatBody, EmptyList, Function, Medium, Message, NumTop, Off, QueuedBody,
    StandardTier, StopText, ToolCall, decode, invalid, later,
)  # fmt: skip
from crane.errors import RequestError

_json = msgspec.json.Encoder().encode

LOGPROBS, ENCRYPTED = "message.output_text.logprobs", "reasoning.encrypted_content"
DirectCaller = later({"type": "direct"})
DirectCallers = later(["direct"])
AllTurns = later("auto", "all_turns")
AutoSummary = later("auto")  # crane makes none: reasoning is shown whole
StandardMode = later("standard")
Status = Literal["in_progress", "completed", "incomplete"]


class MessageItem(Body):
    """A message of anybody's."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]
    type: Literal["message"] = "message"
    id: str | None = None
    status: Status | None = None
    phase: str | None = None


class CallItem(Body):
    """A function call of an earlier turn."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None
    namespace: Absent = None
    caller: DirectCaller = None


class OutputItem(Body):
    """What a function call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[dict[str, Any]]
    id: str | None = None
    name: str | None = None
    status: Status | None = None
    namespace: Absent = None
    caller: DirectCaller = None


class ReasoningItem(Body):
    """What the model thought in an earlier turn."""

    type: Literal["reasoning"]
    summary: list[dict[str, Any]] | None = None
    content: list[dict[str, Any]] | None = None
    encrypted_content: str | None = None
    id: str | None = None
    status: Status | None = None


_ITEMS = {
    "message": MessageItem, "function_call": CallItem, "function_call_output": OutputItem, "reasoning": ReasoningItem,
}  # fmt: skip


class FunctionTool(Body):
    """A function that the client runs."""

    type: Literal["function"]
    name: Annotated[str, Meta(min_length=1)]
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None
    defer_loading: Off = None
    allowed_callers: DirectCallers = None
    output_schema: Absent = None


class NamedTool(Body):
    """One of the tools of a request, by its name."""

    name: str
    type: Literal["function"] = "function"


class ToolChoice(Body):
    """A function that has to be called (name), or the tools that may be (mode and tools)."""

    type: Literal["function", "allowed_tools"]
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[NamedTool], Meta(min_length=1)] | None = None


class TextFormat(Body):
    """What the answer's text has to be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(Body):
    """Form of the answer's text."""

    format: TextFormat | None = None
    verbosity: Medium = None


class Reasoning(Body):
    """How much to think."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: AutoSummary = None
    generate_summary: AutoSummary = None
    context: AllTurns = None
    mode: StandardMode = None


class ResponsesStreamOptions(Body):
    """What a stream carries."""

    include_obfuscation: Off = None


class ResponsesBody(QueuedBody, kw_only=True):
    """POST /v1/responses. store: keep it for previous_response_id and GET; default: true, where there is a store."""

    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1)] | None = None
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=MAX_INT)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_logprobs: NumTop | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int, Meta(ge=1)] | None = None  # of built-in tools, of which there are none
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["disabled", "auto"] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    # as in a chat completion
    top_k: Annotated[int, Meta(ge=-1, le=MAX_INT)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopText | list[StopText] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_token_budget: Annotated[int, Meta(ge=0, le=MAX_INT)] | None = None
    # these label a request and change nothing in its answer
    metadata: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: StandardTier = None
    background: Off = None
    conversation: Absent = None
    prompt: Absent = None
    context_management: EmptyList = None
    moderation: Absent = None
    prompt_cache_options: Absent = None
    background_options: Absent = None
    access_programs: Absent = None
    image: Absent = None


_SAME = (
    "stream", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
    "seed", "stop", "chat_template_kwargs", "thinking_token_budget", "parallel_tool_calls", "max_output_tokens",
    "priority", "timeout_s", "user", "safety_identifier",
)  # fmt: skip


def chat_body(body: ResponsesBody, messages: list[Message]) -> ChatBody:
    """`body` with the messages that it comes to, as a chat completion would say it. Raises RequestError."""
    fields = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    if "max_output_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_output_tokens")
    if body.tools:
        fields["tools"] = [_tool(tool) for tool in body.tools]
    if body.tool_choice is not None:
        fields["tool_choice"] = _tool_choice(body.tool_choice)
    if body.text is not None and body.text.format is not None:
        fields["response_format"] = _format(body.text.format)
    if body.reasoning is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    wants_logprobs = LOGPROBS in (body.include or ())
    if body.top_logprobs and not wants_logprobs:
        raise invalid("top_logprobs", f"goes with {LOGPROBS!r} in include only")
    if wants_logprobs:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    return decode(ChatBody, _json({"messages": messages, **fields}))


def input_items(body: ResponsesBody) -> list[dict[str, Any]]:
    """The items of the input, a text as a message; with ids, as they are kept. Raises RequestError."""
    if body.input is None:
        raise RequestError("missing field 'input'", field="input", code="missing_field")
    if isinstance(body.input, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": body.input}]}]
    return [item if "type" in item else {"type": "message", **item} for item in body.input]


def chat_messages(instructions: str | None, items: list[dict[str, Any]]) -> list[Message]:
    """Items as messages: reasoning, text and calls in a row are one turn of the assistant's.

    Raises RequestError naming the item.
    """
    messages = [] if instructions is None else [Message(role="system", content=instructions)]
    turn: Message | None = None  # the assistant's that grows
    for i, raw in enumerate(items):
        path = f"input[{i}]"
        item = _item(raw, path)
        if isinstance(item, OutputItem):
            output = item.output if isinstance(item.output, str) else _parts(item.output, f"{path}.output")
            messages.append(Message(role="tool", content=output, tool_call_id=item.call_id))
            turn = None
            continue
        if isinstance(item, MessageItem) and item.role != "assistant":
            messages.append(Message(role=item.role, content=_content(item, path)))
            turn = None
            continue
        starts = isinstance(item, ReasoningItem) or (isinstance(item, MessageItem) and turn and turn.content)
        if turn is None or (starts and (turn.content or turn.tool_calls)):
            turn = Message(role="assistant")
            messages.append(turn)
        if isinstance(item, ReasoningItem):
            turn.reasoning_content = (turn.reasoning_content or "") + _reasoning(item, path)
        elif isinstance(item, MessageItem):
            turn.content = _content(item, path)
        else:
            call = ToolCall(Function(name=item.name, arguments=item.arguments), id=item.call_id)
            turn.tool_calls = [*(turn.tool_calls or ()), call]
    for message in messages:
        if message.role == "assistant" and message.content is None and not message.tool_calls:
            message.content = ""
    return messages


def _item(raw: dict[str, Any], path: str):
    kind = raw.get("type")
    if not isinstance(kind, str) or kind not in _ITEMS:
        known = ", ".join(_ITEMS)
        raise invalid(f"{path}.type", f"expected one of {known}, got {str(kind)[:40]!r}")
    try:
        return decode(_ITEMS[kind], _json(raw))
    except RequestError as error:
        field = f"{path}.{error.field}" if error.field else path
        raise RequestError(f"{path}: {error}", field=field, code=error.code) from None


def _content(item: MessageItem, path: str) -> str:
    return item.content if isinstance(item.content, str) else _parts(item.content, f"{path}.content")


def _parts(parts: list[dict[str, Any]], path: str) -> str:
    texts = []
    for i, part in enumerate(parts):
        kind = part.get("type")
        text = part.get("refusal" if kind == "refusal" else "text")
        if kind not in ("input_text", "output_text", "text", "refusal") or not isinstance(text, str):
            raise invalid(f"{path}[{i}]", f"expected a part of text, the only kind supported, got {str(kind)[:40]!r}")
        known = {"type", "text", "refusal", "annotations", "logprobs"}
        if part.keys() - known or part.get("annotations"):
            name = min(part.keys() - known, default="annotations")
            field = f"{path}[{i}].{name}"
            raise RequestError(f"{field} is not supported yet", field=field, code="unsupported_parameter")
        texts.append(text)
    return "".join(texts)


def _reasoning(item: ReasoningItem, path: str) -> str:
    if item.content is None and item.encrypted_content is not None:
        return unseal(item.encrypted_content, f"{path}.encrypted_content")
    texts = []
    for name, kind in (("content", "reasoning_text"), ("summary", "summary_text")):
        for i, part in enumerate(getattr(item, name) or ()):
            if part.get("type") != kind or not isinstance(part.get("text"), str):
                raise invalid(f"{path}.{name}[{i}]", f"expected a part of type {kind!r} with a text")
            if name == "content" or not item.content:
                texts.append(part["text"])
    return "".join(texts)


def seal(text: str) -> str:
    """Reasoning as `encrypted_content`: opaque, not secret, since the same reply shows it in full."""
    return text.encode().hex()


def unseal(sealed: str, field: str) -> str:
    """The reasoning of an `encrypted_content` that crane gave out. Raises RequestError for any other."""
    try:
        return bytes.fromhex(sealed).decode()
    except ValueError:
        raise invalid(field, "expected what this server gave out, got something else") from None


def _tool(tool: FunctionTool) -> dict[str, Any]:
    fields = {name: getattr(tool, name) for name in ("name", "description", "parameters", "strict")}
    return {"type": "function", "function": {name: value for name, value in fields.items() if value is not None}}


def _tool_choice(choice: str | ToolChoice) -> str | dict[str, Any]:
    if isinstance(choice, str):
        return choice
    if choice.type == "function":
        if choice.name is None or choice.mode is not None or choice.tools is not None:
            raise invalid("tool_choice", "expected type 'function' with a name, and nothing else")
        return {"type": "function", "function": {"name": choice.name}}
    if choice.mode is None or choice.tools is None or choice.name is not None:
        raise invalid("tool_choice", "expected type 'allowed_tools' with a mode and tools, and nothing else")
    tools = [{"type": "function", "function": {"name": tool.name}} for tool in choice.tools]
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": tools}}


def _format(wanted: TextFormat) -> dict[str, Any]:
    if wanted.type != "json_schema":
        for name in ("name", "schema", "strict", "description"):
            if getattr(wanted, name) is not None:
                raise invalid(f"text.format.{name}", f"goes with type 'json_schema', not {wanted.type!r}")
        return {"type": wanted.type}
    if wanted.name is None or wanted.schema is None:
        missing = "name" if wanted.name is None else "schema"
        raise invalid(f"text.format.{missing}", "expected one with type 'json_schema', got null")
    schema = {name: getattr(wanted, name) for name in ("name", "schema", "strict", "description")}
    return {"type": "json_schema", "json_schema": schema}
