"""OpenAI's chat completions and models."""

from typing import Any

import msgspec

from crane.api.bodies import ChatBody, Message, decode
from crane.api.endpoint import Context, Endpoint, Reply, Request
from crane.api.generation import BaseGeneration, Choice, Prompt
from crane.api.logprobs import chat_logprobs
from crane.api.sampling import fit, sampling_params
from crane.api.served import ServedModel
from crane.api.sse import json_text
from crane.errors import RequestError
from crane.runtime.text import Delta

_json = msgspec.json.Encoder().encode


class ChatGeneration(BaseGeneration):
    """The answer to one /v1/chat/completions request."""

    id_prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"
    full_object = "chat.completion"

    def start(self) -> bytes:
        role = b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        return b"".join(self._chunk(b'{"index":%d%b' % (choice.index, role)) for choice in self.choices)

    def _frames(self, choice: Choice, delta: Delta) -> bytes:
        frames = b""
        if delta.text or delta.logprobs:
            logprobs = b"null"
            if delta.logprobs:
                logprobs = _json(chat_logprobs(self.tokenizer, delta.token_ids, delta.logprobs))
            frames = self._chunk(
                b'{"index":%d,"delta":{"content":%b},"logprobs":%b,"finish_reason":null}'
                % (choice.index, json_text(delta.text), logprobs)
            )
        if choice.finish_reason is not None:
            frames += self._chunk(
                b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b}'
                % (choice.index, _json(choice.finish_reason))
            )
        return frames

    def _final(self, choice: Choice) -> dict:
        logprobs = None
        if choice.prompt.sampling.logprobs is not None:
            logprobs = chat_logprobs(self.tokenizer, choice.text.token_ids, choice.logprobs)
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }


def chat_completions(context: Context, request: Request) -> ChatGeneration:
    body = decode(ChatBody, request.body)
    context.model.check_name(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", field="top_logprobs", code="invalid_value")
    max_tokens = body.max_completion_tokens
    if None not in (max_tokens, body.max_tokens) and max_tokens != body.max_tokens:
        raise RequestError("max_tokens and max_completion_tokens differ; give one", field="max_tokens")
    sampling = sampling_params(
        body,
        context,
        body.max_tokens if max_tokens is None else max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    ids = chat_ids(context.model, body)
    sampling = fit(sampling, len(ids), context.max_model_len, "messages")
    return ChatGeneration(context, body, [Prompt(ids, sampling)])


def chat_ids(model: ServedModel, body: Any, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a body's chat (messages and template options) as the model's template writes it."""
    continue_final = bool(body.continue_final_message)
    add_prompt = not continue_final if body.add_generation_prompt is None else body.add_generation_prompt
    if continue_final and add_prompt:
        raise RequestError(
            "continue_final_message excludes add_generation_prompt", field="continue_final_message"
        )
    text = model.render(
        template_messages(body.messages, model),
        add_generation_prompt=add_prompt,
        continue_final_message=continue_final,
        **_template_kwargs(body.chat_template_kwargs or {}),
    )
    return model.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def template_messages(messages: list[Message], model: ServedModel) -> list[dict]:
    """Messages as templates expect them: plain dicts, only what was given, developer as system
    unless the template tells the two apart."""
    knows_developer = model.template is not None and "developer" in model.template.source
    plain = []
    for i, message in enumerate(messages):
        role = message.role
        entry = {"role": "system" if role == "developer" and not knows_developer else role}
        entry["content"] = message.content
        if isinstance(message.content, list):
            entry["content"] = [_text_part(part, f"messages[{i}].content[{k}]") for k, part in enumerate(message.content)]
        for name in ("name", "tool_call_id"):
            if getattr(message, name) is not None:
                entry[name] = getattr(message, name)
        reasoning = message.reasoning_content if message.reasoning_content is not None else message.reasoning
        if reasoning is not None:
            entry["reasoning_content"] = reasoning
        if message.tool_calls:
            if role != "assistant":
                raise RequestError(
                    f"messages[{i}].tool_calls: only an assistant message has tool calls",
                    field=f"messages[{i}].tool_calls",
                )
            entry["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
        if message.content is None and role != "assistant":
            raise RequestError(f"messages[{i}].content: expected text, got null", field=f"messages[{i}].content")
        plain.append(entry)
    return plain


def _text_part(part: dict[str, Any], path: str) -> dict[str, str]:
    kind = part.get("type")
    if kind != "text":
        raise RequestError(
            f"{path}: parts of type {kind!r} are not supported; expected type 'text'", field=path, code="invalid_value"
        )
    text = part.get("text")
    if not isinstance(text, str) or part.keys() - {"type", "text"}:
        raise RequestError(f"{path}: expected {{type, text}} with a string as text", field=path, code="invalid_value")
    return {"type": "text", "text": text}


def _tool_call(call) -> dict:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    entry = {"type": "function", "function": function}
    return entry if call.id is None else {"id": call.id, **entry}


def _template_kwargs(given: dict[str, Any]) -> dict[str, Any]:
    taken = given.keys() & {"messages", "tools", "add_generation_prompt", "continue_final_message", "self"}
    if taken:
        raise RequestError(
            f"chat_template_kwargs may not set {sorted(taken)[0]!r}", field="chat_template_kwargs", code="invalid_value"
        )
    return given


def list_models(context: Context, request: Request) -> Reply:
    return Reply(_json({"object": "list", "data": [_model_object(context)]}))


def get_model(context: Context, request: Request) -> Reply:
    context.model.check_name(request.params["model"])
    return Reply(_json(_model_object(context)))


def _model_object(context: Context) -> dict:
    model = context.model
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "crane",
        "max_model_len": context.max_model_len,
    }


ENDPOINTS = (
    Endpoint("POST", "/v1/chat/completions", chat_completions),
    Endpoint("GET", "/v1/models", list_models, needs="model"),
    Endpoint("GET", "/v1/models/{model:path}", get_model, needs="model"),
)
