"""OpenAI's chat completions and models."""

import msgspec

from crane.api.bodies import ChatBody, decode, invalid
from crane.api.chat_prompt import chat_ids
from crane.api.endpoint import Context, Endpoint, Reply, Request
from crane.api.generation import BaseGeneration, Choice, Prompt
from crane.api.logprobs import chat_logprobs
from crane.api.sampling import fit, sampling_params
from crane.api.sse import json_text
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
    """POST /v1/chat/completions."""
    body = decode(ChatBody, request.body)
    context.model.check_name(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "goes with logprobs: true only")
    max_tokens = body.max_completion_tokens
    if None not in (max_tokens, body.max_tokens) and max_tokens != body.max_tokens:
        raise invalid("max_tokens", f"expected the same as max_completion_tokens, got {body.max_tokens}")
    sampling = sampling_params(
        body,
        context,
        body.max_tokens if max_tokens is None else max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    ids = chat_ids(context.model, body)
    sampling = fit(sampling, len(ids), context.max_model_len, "messages")
    return ChatGeneration(context, body, [Prompt(ids, sampling)])


def list_models(context: Context, request: Request) -> Reply:
    """GET /v1/models: the one model there is."""
    return Reply(_json({"object": "list", "data": [_model_object(context)]}))


def get_model(context: Context, request: Request) -> Reply:
    """GET /v1/models/{id}, where the id may hold slashes."""
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
