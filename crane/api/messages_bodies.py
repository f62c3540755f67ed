"""Anthropic's request bodies, and what they say in the words of a chat completion."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from crane.api.bodies import (
    MAX_INT, Absent, Body, ChatBody, EmptyList, Function, Message, Off, Priority, StopText, TimeLimit,
    ToolCall, decode, invalid, later,
)  # fmt: skip

_json = msgspec.json.Encoder().encode

Caching = dict[str, Any] | None  # marks what to cache; crane decides that by itself, and no answer depends on it
StandardSpeed = later("standard")
DirectCaller = later(["direct"], {"type": "direct"})
Summarized = later("summarized")


class Block(Body, tag_field="type"):
    """A block of a message's content."""


class TextBlock(Block, tag="text"):
    """Text."""

    text: str
    cache_control: Caching = None
    citations: EmptyList = None


class ThinkingBlock(Block, tag="thinking"):
    """What the model thought in an earlier turn. signature: as it was given out; not looked at."""

    thinking: str
    signature: str | None = None


class ToolUseBlock(Block, tag="tool_use"):
    """A tool call of an earlier turn."""

    id: str
    name: str
    input: dict[str, Any]
    cache_control: Caching = None
    caller: DirectCaller = None
    toolset_name: Absent = None


class ToolResultBlock(Block, tag="tool_result"):
    """What a tool call gave. is_error: says so to the model, in a word before the content."""

    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: Caching = None
    toolset_name: Absent = None


class Turn(Body):
    """One message. A last one of the assistant's is continued."""

    role: Literal["user", "assistant", "system"]
    content: str | list[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock]


class Tool(Body):
    """A tool that the client runs."""

    name: Annotated[str, Meta(min_length=1)]
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    description: str | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None  # input always streams as it is made
    cache_control: Caching = None
    defer_loading: Off = None
    allowed_callers: DirectCaller = None
    input_examples: EmptyList = None


class ToolChoice(Body):
    """Whether and which tools are called. name: with type "tool"."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Body):
    """How much to think; without it, nor an effort, not at all. budget_tokens: with type "enabled"."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Meta(ge=1, le=MAX_INT)] | None = None
    display: Summarized = None  # what is shown is not a summary but the whole


class JsonFormat(Body):
    """The schema of the answer."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Body):
    """Form and effort of the answer."""

    format: JsonFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class Metadata(Body):
    """Labels."""

    user_id: str | None = None


class CountBody(Body):
    """POST /v1/messages/count_tokens: what of a request makes its prompt."""

    messages: Annotated[list[Turn], Meta(min_length=1)]
    model: str | None = None
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    cache_control: Caching = None
    speed: StandardSpeed = None
    user_profile_id: Absent = None
    workspace_id: Absent = None


class MessagesBody(CountBody, kw_only=True):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Meta(ge=1, le=MAX_INT)]
    stop_sequences: list[StopText] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=MAX_INT)] | None = None
    metadata: Metadata | None = None
    # as in `bodies.QueuedBody`
    priority: Priority | None = None
    timeout_s: TimeLimit | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    container: Absent = None
    diagnostics: Absent = None
    inference_geo: Absent = None
    context_management: Absent = None
    mcp_servers: EmptyList = None


def chat_body(body: CountBody) -> ChatBody:
    """`body` as a chat completion would say it. Raises RequestError naming the field."""
    messages = []
    if body.system:
        messages.append(Message(role="system", content=_text_of(body.system)))
    for i, turn in enumerate(body.messages):
        messages += _messages(turn, f"messages[{i}]")
    config = body.output_config or OutputConfig()
    fields: dict[str, Any] = {"messages": messages, "reasoning_effort": config.effort}
    if body.thinking is not None or config.effort is None:
        fields["chat_template_kwargs"] = {"enable_thinking": _thinks(body)}
    if body.messages[-1].role == "assistant" and not messages[-1].tool_calls:
        fields["continue_final_message"] = True
    if body.thinking is not None and body.thinking.budget_tokens is not None:
        fields["thinking_token_budget"] = body.thinking.budget_tokens
    if body.tools:
        fields["tools"] = [_tool(tool) for tool in body.tools]
    if body.tool_choice is not None:
        fields |= _tool_choice(body.tool_choice)
    if config.format is not None:
        schema = {"name": "answer", "schema": config.format.schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(body, MessagesBody):
        names = ("max_tokens", "stream", "temperature", "top_p", "top_k", "priority", "timeout_s")
        fields |= {name: getattr(body, name) for name in names}
        fields["stop"] = body.stop_sequences
        fields["user"] = body.metadata and body.metadata.user_id
    return decode(ChatBody, _json(fields))


def _thinks(body: CountBody) -> bool:
    thinking = body.thinking
    if thinking is None:
        return False
    if thinking.type != "enabled" and thinking.budget_tokens is not None:
        raise invalid("thinking.budget_tokens", "goes with type 'enabled' only")
    if thinking.type == "enabled" and thinking.budget_tokens is None:
        raise invalid("thinking.budget_tokens", "expected a number of tokens, got null")
    max_tokens = getattr(body, "max_tokens", None)
    if max_tokens is not None and (thinking.budget_tokens or 0) >= max_tokens:
        expected = f"expected less than max_tokens ({max_tokens})"
        raise invalid("thinking.budget_tokens", f"{expected}, got {thinking.budget_tokens}")
    return thinking.type != "disabled"


def _messages(turn: Turn, path: str) -> list[Message]:
    """One message of Anthropic's is several where it holds results of tools."""
    if isinstance(turn.content, str):
        return [Message(role=turn.role, content=turn.content)]
    if turn.role == "assistant":
        return [_assistant(turn.content, path)]
    messages: list[Message] = []
    texts: list[TextBlock] = []
    for i, block in enumerate(turn.content):
        if isinstance(block, TextBlock):
            texts.append(block)
            continue
        if not isinstance(block, ToolResultBlock) or turn.role != "user":
            raise invalid(f"{path}.content[{i}]", f"expected no {_tag(block)} block in a message of role {turn.role}")
        if texts:
            messages.append(Message(role=turn.role, content=_text_of(texts)))
            texts = []
        content = _text_of(block.content or "")
        content = f"Error: {content}" if block.is_error else content
        messages.append(Message(role="tool", content=content, tool_call_id=block.tool_use_id))
    if texts or not messages:
        messages.append(Message(role=turn.role, content=_text_of(texts)))
    return messages


def _assistant(blocks: list, path: str) -> Message:
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(blocks):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            calls.append(ToolCall(Function(name=block.name, arguments=block.input), id=block.id))
        else:
            raise invalid(f"{path}.content[{i}]", f"expected no {_tag(block)} block in a message of role assistant")
    content = "".join(texts) if texts or not calls else None
    reasoning = "".join(thoughts) if thoughts else None
    return Message(role="assistant", content=content, reasoning_content=reasoning, tool_calls=calls or None)


def _text_of(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _tag(block: Block) -> str:
    return type(block).__struct_config__.tag


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoice) -> dict[str, Any]:
    if (choice.type == "tool") != (choice.name is not None):
        raise invalid("tool_choice.name", "goes with type 'tool', and that with a name")
    said: str | dict = {"auto": "auto", "any": "required", "none": "none"}.get(choice.type, "")
    if choice.type == "tool":
        said = {"type": "function", "function": {"name": choice.name}}
    return {"tool_choice": said, "parallel_tool_calls": not choice.disable_parallel_tool_use}
