"""Anthropic's messages: the same chat as /v1/chat/completions in another dialect, errors included."""

from typing import Any

import msgspec

from crane.api.blocks import Block, BlockGeneration, chat_prompt, prepare, renamed, typed_event
from crane.api.bodies import ChatBody, decode
from crane.api.chat_parser import ChatParser
from crane.api.endpoint import Context, Endpoint, Reply, Request
from crane.api.errors import error_object, error_reply
from crane.api.generation import Prompt
from crane.api.messages_bodies import CountBody, MessagesBody, chat_body

_json = msgspec.json.Encoder().encode
_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "timeout": "timeout"}
# what a chat completion calls otherwise
_FIELDS = {
    "response_format.json_schema": "output_config.format", "response_format": "output_config.format",
    "stop": "stop_sequences", "reasoning_effort": "output_config.effort",
    "chat_template_kwargs": "thinking", "thinking_token_budget": "thinking.budget_tokens",
}  # fmt: skip


class MessagesGeneration(BlockGeneration):
    """The answer to one /v1/messages request."""

    id_prefix = "msg_"

    def __init__(self, context: Context, body: ChatBody, prompt: Prompt, parser: ChatParser):
        super().__init__(context, body, prompt, parser)
        self._asked = body.max_tokens

    def start(self) -> bytes:
        usage = {**self._counts(), "output_tokens": 0}
        message = {**self._message(), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return self.event("message_start", message=message) + self.event("ping")

    def opened(self, block: Block) -> bytes:
        shape = {
            "text": {"type": "text", "text": ""},
            "reasoning": {"type": "thinking", "thinking": "", "signature": ""},
            "tool": {"type": "tool_use", "id": block.id, "name": block.name, "input": {}},
        }[block.kind]
        return self.event("content_block_start", index=block.index, content_block=shape)

    def grown(self, block: Block, text: str, tokens: list) -> bytes:
        delta = {
            "text": {"type": "text_delta", "text": text},
            "reasoning": {"type": "thinking_delta", "thinking": text},
            "tool": {"type": "input_json_delta", "partial_json": text},
        }[block.kind]
        return self.event("content_block_delta", index=block.index, delta=delta)

    def closed(self, block: Block) -> bytes:
        frames = b""
        if block.kind == "reasoning":  # clients drop thinking that nobody signed
            delta = {"type": "signature_delta", "signature": self.id}
            frames = self.event("content_block_delta", index=block.index, delta=delta)
        return frames + self.event("content_block_stop", index=block.index)

    def finish(self) -> bytes:
        if self.failed is not None:
            return b""
        return self.event("message_delta", delta=self._ending(), usage=self._counts()) + self.event("message_stop")

    def body(self) -> bytes:
        if self.failed is not None:
            raise self.failed
        content = [self._block(block) for block in self.blocks if not (block.cut and block.kind == "tool")]
        return _json({**self._message(), "content": content, **self._ending(), "usage": self._counts()})

    def broken(self, error: Exception) -> bytes:
        """The event that ends a stream which broke after its first byte."""
        return typed_event("error", _error_body(error))

    def _message(self) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model.name}

    def _ending(self) -> dict[str, Any]:
        stopped = isinstance(self.stop, str) and self.choice.finish_reason == "stop"
        reason = "stop_sequence" if stopped else _STOP_REASONS.get(self.choice.finish_reason)
        if reason == "max_tokens" and self.prompts[0].sampling.max_tokens < self._asked:
            reason = "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": self.stop if stopped else None}

    def _counts(self) -> dict[str, Any]:
        cached = self.prompts[0].cached_tokens
        return {
            "input_tokens": len(self.prompts[0].ids) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": len(self.choice.text.token_ids),
            "output_tokens_details": {"thinking_tokens": self.choice.reasoning_tokens},
        }

    def _block(self, block: Block) -> dict[str, Any]:
        if block.kind == "text":
            return {"type": "text", "text": block.text, "citations": None}
        if block.kind == "reasoning":
            return {"type": "thinking", "thinking": block.text, "signature": self.id}
        arguments = msgspec.Raw(block.text.encode() or b"{}")
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": arguments}


def messages(context: Context, request: Request) -> MessagesGeneration:
    """POST /v1/messages: answer a chat in Anthropic's dialect. Thinking, tools and streams included."""
    body = decode(MessagesBody, request.body, context)
    context.model.check_name(body.model)
    with renamed(_FIELDS):
        chat = chat_body(body)
        prepared = prepare(context, chat)
        prompt = chat_prompt(context, chat, prepared, body.max_tokens, "messages")
    return MessagesGeneration(context, chat, prompt, prepared.parser())


def count_tokens(context: Context, request: Request) -> Reply:
    """POST /v1/messages/count_tokens: count the tokens of such a request. Template and tools included."""
    body = decode(CountBody, request.body, context)
    context.model.check_name(body.model)
    with renamed(_FIELDS):
        prepared = prepare(context, chat_body(body))
    return Reply(_json({"input_tokens": len(prepared.ids)}))


def anthropic_error_reply(error: Exception) -> Reply:
    """The response that stands for `error` in this dialect."""
    plain = error_reply(error)
    return Reply(_json(_error_body(error)), plain.status, plain.headers)


def _error_body(error: Exception) -> dict[str, Any]:
    status, plain = error_object(error)
    kind = _KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": plain["error"]["message"]}}


ENDPOINTS = (
    Endpoint("POST", "/v1/messages", messages, body=MessagesBody, error_reply=anthropic_error_reply),
    Endpoint(
        "POST", "/v1/messages/count_tokens", count_tokens, needs="model", body=CountBody,
        error_reply=anthropic_error_reply,
    ),
)  # fmt: skip
