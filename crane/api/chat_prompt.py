"""From a list of messages to token ids, and to what reads the answer.

`prepare_chat` is what every chat dialect calls; the prompt's text comes from the model's own
chat template.
"""

import functools
from dataclasses import dataclass
from typing import Any

import msgspec

from crane.api.bodies import ChatBody, Message, TokenizeBody, ToolCall, invalid
from crane.api.chat_parser import END_THINK, MARKUP, THINK, ChatForm, ChatParser, chat_form
from crane.api.constraint import response_grammar, tools_grammar
from crane.api.endpoint import Context
from crane.api.served import ServedModel
from crane.models.tokenizer import Tokenizer
from crane.runtime.types import SamplingParams, Thinking

# tokens of thinking that an effort is worth; None is as many as the model likes
EFFORTS = {"none": 0, "minimal": 512, "low": 2048, "medium": 8192, "high": None, "xhigh": None, "max": None}


@dataclass(frozen=True)
class PreparedChat:
    """A chat as the engine gets it, and how its answers are to be read.

    text, ids: the prompt. tools: those that may be called. grammar, thinking: for SamplingParams.
    keep_ids: special tokens that are tags of the answer, so that the parser has to see them.
    """

    text: str
    ids: list[int]
    form: ChatForm
    tools: list[dict] | None = None
    parallel: bool = True
    thinking_open: bool = False
    grammar: str | None = None
    thinking: Thinking | None = None
    keep_ids: frozenset[int] = frozenset()

    def parser(self) -> ChatParser:
        """A new parser, for one choice."""
        return ChatParser(self.form, self.tools, self.thinking_open, self.parallel)

    def constrain(self, sampling: SamplingParams) -> SamplingParams:
        """`sampling` with the grammar and the thinking section of this chat."""
        return msgspec.structs.replace(sampling, grammar=self.grammar, thinking=self.thinking)


def prepare_chat(
    context: Context,
    messages: list[Message] | list[dict],
    *,
    tools: list[dict] | None = None,
    tool_choice: str | dict | None = None,
    parallel_tool_calls: bool | None = None,
    response_format: dict | None = None,
    grammar: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
    reasoning_effort: str | None = None,
    thinking_budget: int | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
) -> PreparedChat:
    """A chat, ready for the engine. All values as in a body of /v1/chat/completions.

    messages: `Message`s, or the same as plain dicts. grammar: that of the answer's text, when it
    is not given as response_format. thinking_budget: tokens of thinking, at most.
    Raises RequestError naming the field.
    """
    model = context.model
    form = chat_form(model)
    kwargs = _effort_kwargs(dict(template_kwargs or {}), reasoning_effort, form, model)
    tools, choice = _allowed_tools(tools, tool_choice, form)
    if response_format is not None:
        grammar = response_grammar(response_format=response_format)
    messages = [_as_message(message, i) for i, message in enumerate(messages)]
    text, ids = render_chat(
        model,
        messages,
        kwargs,
        owner=context.tenant if context.settings.isolate_keys else "",
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
    )
    if tools:
        grammar = tools_grammar(tools, choice, form.tools, grammar, parallel_tool_calls is not False)
    is_open, is_closed = _thinking_state(text, messages, continue_final_message)
    if thinking_budget is None and reasoning_effort is not None and EFFORTS[reasoning_effort] != 0:
        thinking_budget = EFFORTS[reasoning_effort]
    elif thinking_budget is not None and not form.thinks:
        raise invalid("thinking_token_budget", "this model has no thinking section to limit")
    thinking = None
    if form.thinks and not is_closed:
        start_ids, end_ids = (tuple(model.tokenizer.encode(tag, False)) for tag in (THINK, END_THINK))
        thinking = Thinking(start_ids, end_ids, is_open, thinking_budget)
    return PreparedChat(
        text=text,
        ids=ids,
        form=form,
        tools=tools,
        parallel=parallel_tool_calls is not False,
        thinking_open=form.thinks and is_open,
        grammar=grammar,
        thinking=thinking,
        keep_ids=_special_tags(model.tokenizer),
    )


@functools.lru_cache
def _special_tags(tokenizer: Tokenizer) -> frozenset[int]:
    return tokenizer.special_ids & {tokenizer.token_to_id(tag) for tag in MARKUP}


def render_chat(
    model: ServedModel, messages: list[Message], kwargs: dict[str, Any], owner: str | None = None, **options
) -> tuple[str, list[int]]:
    """The prompt of a chat: text and ids. kwargs: further names for the template; owner: see `Tokenizer.encode_chat`;
    options: of `ChatTemplate.render`.

    What users and tools say is text: a special token spelled out in it does not
    become that token, so nobody forges a turn. Raises RequestError.
    """
    plain = template_messages(messages, model)
    seam = _break_special_tokens(plain, model)
    text = model.render(plain, kwargs, **options)
    if not seam:
        return text, model.tokenizer.encode_chat(text, owner)
    return text.replace(seam, ""), _encode_stretches(text, seam, model)


def chat_ids(model: ServedModel, body: ChatBody | TokenizeBody, add_special_tokens=False) -> list[int]:
    """Token ids of a body's chat (messages, tools and template options). Raises RequestError."""
    tools, _ = _allowed_tools(msgspec.to_builtins(body.tools), None, chat_form(model))
    _, ids = render_chat(
        model,
        body.messages,
        body.chat_template_kwargs or {},
        tools=tools,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
    )
    return model.tokenizer.with_ends(ids) if add_special_tokens else ids


def _as_message(message: Message | dict, i: int) -> Message:
    if isinstance(message, Message):
        return message
    try:
        return msgspec.convert(message, Message)
    except msgspec.ValidationError as error:
        raise invalid(f"messages[{i}]", str(error)) from None


def _effort_kwargs(kwargs: dict, effort: str | None, form: ChatForm, model: ServedModel) -> dict:
    """Names for the template, with those that an effort stands for."""
    if effort is None:
        return kwargs
    knows_effort = model.template is not None and "reasoning_effort" in model.template.source
    if effort != "none" and not form.thinks and not knows_effort:
        raise invalid("reasoning_effort", f"expected none for this model, which does not think, got {effort}")
    wanted = effort != "none"
    if kwargs.get("enable_thinking", wanted) != wanted:
        raise invalid("reasoning_effort", f"{effort} contradicts chat_template_kwargs.enable_thinking")
    return {"enable_thinking": wanted, "reasoning_effort": effort, **kwargs}


def _allowed_tools(
    tools: list[dict] | None, choice: str | dict | None, form: ChatForm
) -> tuple[list[dict] | None, str | dict]:
    """The tools that the model is shown, and "auto", "required" or the one to call; none at all
    when the choice is "none". Raises RequestError."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice", "goes with tools only")
        return None, "auto"
    names = [tool["function"]["name"] for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise invalid(f"tools[{i}].function.name", f"expected each name once, got {name!r} again")
    if choice == "none":
        return None, "auto"
    if not form.takes_tools:
        raise invalid("tools", "this model's chat template takes none")
    if choice is None or isinstance(choice, str):
        return _plain_tools(tools), choice or "auto"
    allowed = choice.get("allowed_tools")
    chosen = [choice] if allowed is None else allowed["tools"]
    wanted = [(each.get("function") or {}).get("name") for each in chosen]
    for name in wanted:
        if name not in names:
            raise invalid("tool_choice", f"expected one of {', '.join(names)[:200]}, got {name!r}")
    tools = [tool for tool in tools if tool["function"]["name"] in wanted]
    return _plain_tools(tools), choice if allowed is None else allowed["mode"]


def _plain_tools(tools: list[dict]) -> list[dict]:
    """Tools as templates expect them: with only what was given."""
    plain = []
    for tool in tools:
        function = {key: value for key, value in tool["function"].items() if value is not None}
        plain.append({"type": "function", "function": function})
    return plain


def _thinking_state(text: str, messages: list[Message], continued: bool) -> tuple[bool, bool]:
    """Whether the prompt ends inside a thinking section, and whether past one."""
    if continued:
        final = messages[-1].content
        said = final if isinstance(final, str) else ""
        is_open = said.rfind(THINK) > said.rfind(END_THINK)
        return is_open, not is_open
    end = text.rstrip()
    return end.endswith(THINK), end.endswith(END_THINK)


def _encode_stretches(text: str, seam: str, model: ServedModel) -> list[int]:
    """The special tokens that the template wrote, and between them text, where a spelled-out one is only text."""
    ids, start = [], 0
    for mark in model.special_text.finditer(text):  # a seam keeps it from finding those that are only spelled out
        ids += model.tokenizer.encode(text[start : mark.start()].replace(seam, ""), False, parse_special=False)
        ids += model.tokenizer.encode(mark[0], False)
        start = mark.end()
    return ids + model.tokenizer.encode(text[start:].replace(seam, ""), False, parse_special=False)


def template_messages(messages: list[Message], model: ServedModel) -> list[dict]:
    """Messages as templates expect them: plain dicts with only what was given, developer as
    system unless the template tells the two apart. Raises RequestError naming the message."""
    knows_developer = model.template is not None and "developer" in model.template.source
    return [_plain(message, f"messages[{i}]", knows_developer) for i, message in enumerate(messages)]


def _plain(message: Message, path: str, knows_developer: bool) -> dict[str, Any]:
    role = message.role
    plain: dict[str, Any] = {"role": "system" if role == "developer" and not knows_developer else role}
    plain["content"] = message.content
    if isinstance(message.content, list):
        parts = enumerate(message.content)
        plain["content"] = [_text_part(part, f"{path}.content[{i}]") for i, part in parts]
    elif message.content is None and role != "assistant":
        raise invalid(f"{path}.content", "expected text, got null")
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            plain[name] = getattr(message, name)
    reasoning = message.reasoning if message.reasoning_content is None else message.reasoning_content
    if reasoning is not None:
        plain["reasoning_content"] = reasoning
    if message.tool_calls:
        if role != "assistant":
            raise invalid(f"{path}.tool_calls", f"expected none in a message of role {role}")
        plain["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    return plain


def _text_part(part: dict[str, Any], path: str) -> dict[str, str]:
    kind = part.get("type")
    if kind != "text":
        raise invalid(path, f"expected a part of type 'text', the only one supported, got {str(kind)[:40]!r}")
    text = part.get("text")
    if not isinstance(text, str) or part.keys() != {"type", "text"}:
        raise invalid(path, "expected {type, text} with a string as text")
    return {"type": "text", "text": text}


def _tool_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    plain = {"type": "function", "function": function}
    return plain if call.id is None else {"id": call.id, **plain}


def _break_special_tokens(messages: list[dict], model: ServedModel) -> str:
    """Puts a seam, which it returns, into every special token that users and tools spell out.

    "" when there are none.
    """
    pattern = model.special_text
    texts = [text for message in messages if message["role"] in ("user", "tool") for text in _texts(message)]
    if pattern is None or not any(pattern.search(text) for text in texts):
        return ""
    seam = "\ue001"
    while any(seam in text for message in messages for text in _texts(message)):
        seam += "\ue001"
    for message in messages:
        if message["role"] not in ("user", "tool"):
            continue
        content = message["content"]
        if isinstance(content, str):
            message["content"] = _broken(content, pattern, seam)
        else:
            message["content"] = [{**part, "text": _broken(part["text"], pattern, seam)} for part in content]
    return seam


def _texts(message: dict) -> list[str]:
    content = message["content"] or ""
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _broken(text: str, pattern, seam: str) -> str:
    return pattern.sub(lambda match: match[0][:1] + seam + match[0][1:], text)
