"""OpenAI's chat completions and models."""

import msgspec

from crane.api.bodies import ChatBody, decode, invalid
from crane.api.chat_parser import ChatEvent, Content, Reasoning, ToolStart
from crane.api.chat_prompt import PreparedChat, prepare_chat
from crane.api.endpoint import Context, Endpoint, Reply, Request
from crane.api.generation import Choice, ChoicesGeneration, Prompt
from crane.api.logprobs import chat_logprobs, prompt_logprobs, trimmed
from crane.api.resumable import resumable
from crane.api.sampling import fit, sampling_params
from crane.api.sse import json_text
from crane.api.structured import response_constraint
from crane.runtime.text import Delta

_json = msgspec.json.Encoder().encode


class ChatGeneration(ChoicesGeneration):
    """The answer to one /v1/chat/completions request."""

    id_prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"
    full_object = "chat.completion"

    def __init__(self, context: Context, body: ChatBody, chat: PreparedChat, prompt: Prompt):
        super().__init__(context, body, [prompt])
        for choice in self.choices:
            choice.parser = chat.parser()
        self._body = body
        self._extended = body.return_token_ids or body.include_reasoning is False
        self._thinks = chat.form.thinks
        self._both = context.settings.reasoning_field == "both"
        self._max_top = None if body.prompt_logprobs is None else body.top_logprobs or 0
        # clients look for the fields of a model that thinks in every delta
        self._no_reasoning = b""
        if self._thinks:
            self._no_reasoning = b',"reasoning_content":null' + (b',"reasoning":null' if self._both else b"")

    def start(self) -> bytes:
        role = b',"delta":{"role":"assistant","content":""%b},"logprobs":null,"finish_reason":null}'
        role %= self._no_reasoning
        return self._prompt_ids(b"".join(self._chunk(b'{"index":%d%b' % (c.index, role)) for c in self.choices))

    def _prompt_ids(self, frames: bytes) -> bytes:
        """`frames` with the prompt's ids in the first one, where they are asked for."""
        if not self._body.return_token_ids:
            return frames
        field = b',"prompt_token_ids":' + _json(self.prompts[0].ids) + b',"choices":['
        return frames.replace(b',"choices":[', field, 1)

    def _around(self, choice: Choice) -> tuple[bytes, bytes] | None:
        if not choice.parser.verbatim or self._body.return_token_ids:
            return None
        before = b'{"index":%d,"delta":{"content":' % choice.index
        return self._head + before, self._no_reasoning + b'},"logprobs":null,"finish_reason":null}' + self._tail

    def _frames(self, choice: Choice, delta: Delta) -> bytes:
        events = choice.events
        if len(events) == 1 and not (choice.finish_reason or delta.logprobs or self._extended):
            head = b'{"index":%d,"delta":%b,"logprobs":null,"finish_reason":null}'
            return self._chunk(head % (choice.index, self._delta(events[0])))
        deltas = [self._delta(event) for event in events if self._shows(event)]
        logprobs, extra = b"null", b"}"
        if delta.logprobs and self._body.logprobs:
            logprobs = _json(chat_logprobs(self.tokenizer, delta.token_ids, delta.logprobs))
        if self._body.return_token_ids and delta.token_ids:
            extra = b',"token_ids":' + _json(delta.token_ids) + b"}"
        if not deltas and (logprobs != b"null" or extra != b"}"):
            deltas.append(self._delta(Content("")))  # the text of these tokens is held back
        frames = []
        for text in deltas:
            head = b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":null' % (choice.index, text, logprobs)
            frames.append(self._chunk(head + extra))
            logprobs, extra = b"null", b"}"
        if choice.finish_reason is not None:
            last = b'{"index":%d,"delta":{%b},"logprobs":null,"finish_reason":%b}'
            frames.append(
                self._chunk(last % (choice.index, self._no_reasoning[1:], _json(choice.finish_reason)))
            )
        return b"".join(frames)

    def _shows(self, event: ChatEvent) -> bool:
        return self._body.include_reasoning is not False or not isinstance(event, Reasoning)

    def _delta(self, event: ChatEvent) -> bytes:
        if isinstance(event, Content):
            return b'{"content":%b%b}' % (json_text(event.text), self._no_reasoning)
        if isinstance(event, Reasoning):
            text = json_text(event.text)
            return b'{"reasoning_content":%b%b}' % (text, b',"reasoning":' + text if self._both else b"")
        if isinstance(event, ToolStart):
            call = b'"id":%b,"type":"function","function":{"name":%b,"arguments":""}'
            call %= (_json(event.id), json_text(event.name))
        else:
            call = b'"function":{"arguments":%b}' % json_text(event.text)
        return b'{"tool_calls":[{"index":%d,%b}]%b}' % (event.index, call, self._no_reasoning)

    def _final(self, choice: Choice) -> dict:
        logprobs = None
        if self._body.logprobs:
            logprobs = chat_logprobs(self.tokenizer, choice.text.token_ids, choice.logprobs)
        final = {
            "index": choice.index,
            "message": self._message(choice),
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }
        if self._body.return_token_ids:
            final["token_ids"] = choice.text.token_ids
        return final

    def _message(self, choice: Choice) -> dict:
        parser = choice.parser
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in parser.calls
            if call.complete
        ]
        content = parser.content or (None if calls else "")
        message = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
        if self._thinks:
            shown = parser.reasoning if self._body.include_reasoning is not False else ""
            message["reasoning_content"] = shown or None
            if self._both:
                message["reasoning"] = shown or None
        if calls:
            message["tool_calls"] = calls
        return message

    def _extra(self) -> dict:
        body, prompt, extra = self._body, self.prompts[0], {}
        if body.service_tier is not None:
            extra["service_tier"] = "default"
        if body.return_token_ids:
            extra["prompt_token_ids"] = prompt.ids
        if body.prompt_logprobs is not None:
            entries = trimmed(prompt.logprobs, body.prompt_logprobs)
            extra["prompt_logprobs"] = prompt_logprobs(self.tokenizer, prompt.ids, entries)
        return extra


@resumable("/v1/chat/completions")
def chat_completions(context: Context, request: Request) -> ChatGeneration:
    """POST /v1/chat/completions: answer a chat. The messages go through the model's own template; tools, reasoning,
    response formats, log-probabilities and streams as in OpenAI's API, with vLLM's and SGLang's further parameters."""
    body, chat = _prepared(context, request)
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
    sampling = fit(chat.constrain(sampling), len(chat.ids), context.max_length, "messages")
    prompt = Prompt(chat.ids, sampling, keep_ids=chat.keep_ids)
    if body.prediction is not None:
        if sampling.constrained:
            raise invalid("prediction", "goes without tools, structured output and thinking budgets")
        prompt.prediction_ids = context.model.tokenizer.encode(body.prediction.text, False, parse_special=False)
    return ChatGeneration(context, body, chat, prompt)


def render_chat_completion(context: Context, request: Request) -> Reply:
    """POST /v1/chat/completions/render: show a chat's prompt, and do not answer it. As text and as token ids."""
    _, chat = _prepared(context, request)
    return Reply(_json({"prompt": chat.text, "prompt_token_ids": chat.ids, "count": len(chat.ids)}))


def _prepared(context: Context, request: Request) -> tuple[ChatBody, PreparedChat]:
    body = decode(ChatBody, request.body, context)
    context.model.check_name(body.model)
    plain = msgspec.to_builtins
    chat = prepare_chat(
        context,
        body.messages,
        tools=plain(body.tools),
        tool_choice=plain(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        grammar=response_constraint(body),
        template_kwargs=body.chat_template_kwargs,
        reasoning_effort=body.reasoning_effort,
        thinking_budget=_thinking_budget(body),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
    )
    return body, chat


def _thinking_budget(body: ChatBody) -> int | None:
    """Tokens of thinking, by vLLM's name or llama.cpp's; None is no limit."""
    budget, other = body.thinking_token_budget, body.reasoning_budget_tokens
    if other == -1:
        other = None
    if None not in (budget, other) and budget != other:
        raise invalid("reasoning_budget_tokens", f"expected the same as thinking_token_budget, got {other}")
    return other if budget is None else budget


def list_models(context: Context, request: Request) -> Reply:
    """GET /v1/models: list the models. There is one, with the longest prompt plus answer that it takes."""
    return Reply(_json({"object": "list", "data": [_model_object(context)]}))


def get_model(context: Context, request: Request) -> Reply:
    """GET /v1/models/{id}: describe a model. Its id may hold slashes; another than the served one is a 404."""
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
    Endpoint("POST", "/v1/chat/completions", chat_completions, body=ChatBody),
    Endpoint("POST", "/v1/chat/completions/render", render_chat_completion, needs="model", body=ChatBody),
    Endpoint("GET", "/v1/models", list_models, needs="model"),
    Endpoint("GET", "/v1/models/{model:path}", get_model, needs="model"),
)
