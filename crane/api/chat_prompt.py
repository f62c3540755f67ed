"""From a list of messages to token ids, through the model's own chat template."""

from typing import Any

from crane.api.bodies import ChatBody, Message, TokenizeBody, ToolCall, invalid
from crane.api.served import ServedModel


def chat_ids(model: ServedModel, body: ChatBody | TokenizeBody, add_special_tokens=False) -> list[int]:
    """Token ids of a body's chat (messages and template options).

    What users and tools say is text: a special token spelled out in it does not
    become that token, so nobody forges a turn. Raises RequestError.
    """
    messages = template_messages(body.messages, model)
    seam = _break_special_tokens(messages, model)
    text = model.render(
        messages,
        body.chat_template_kwargs or {},
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
    )
    if not seam:
        return model.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    ids = _encode_stretches(text, seam, model)
    return model.tokenizer.with_ends(ids) if add_special_tokens else ids


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
