"""OpenAI's responses: a chat as typed items, whose answers the server keeps for the next turn."""

import time
from typing import Any

import msgspec

from crane.api.blocks import Block, BlockGeneration, chat_prompt, prepare, renamed, typed_event
from crane.api.bodies import ChatBody, Message, decode, invalid
from crane.api.chat_parser import ChatParser
from crane.api.endpoint import Context, Endpoint, Reply, Request
from crane.api.errors import error_object
from crane.api.generation import Prompt
from crane.api.logprobs import chat_logprobs
from crane.api.response_store import ResponseStore
from crane.api.responses_bodies import (
    ENCRYPTED, LOGPROBS, ResponsesBody, chat_body, chat_messages, input_items, seal,
)  # fmt: skip
from crane.errors import RequestError

MAX_LIST = 100

_json = msgspec.json.Encoder().encode
# what a chat completion calls otherwise
_FIELDS = {
    "messages": "input", "response_format.json_schema": "text.format", "response_format": "text.format",
    "reasoning_effort": "reasoning.effort", "max_tokens": "max_output_tokens",
}  # fmt: skip
_PREFIXES = {"text": "msg", "reasoning": "rs", "tool": "fc"}
_ENDINGS = {"completed": "response.completed", "failed": "response.failed"}


class ResponsesGeneration(BlockGeneration):
    """The answer to one /v1/responses request. store: where it is kept, or None. items: its whole input."""

    id_prefix = "resp_"

    def __init__(
        self, context: Context, body: ResponsesBody, chat: ChatBody, prompt: Prompt, parser: ChatParser,
        items: list[dict[str, Any]], store: ResponseStore | None,
    ):  # fmt: skip
        super().__init__(context, chat, prompt, parser)
        self._body = body
        self._items = items
        self._store = store
        self._tenant = context.tenant
        self._num_events = 0
        self._include = frozenset(body.include or ())
        self._fixed = _echo(body, prompt.sampling) | {"store": store is not None}

    def start(self) -> bytes:
        response = self._response("in_progress")
        return b"".join(self.event(f"response.{kind}", response=response) for kind in ("created", "in_progress"))

    def event(self, kind: str, **fields: Any) -> bytes:
        if not self.stream:
            return b""
        self._num_events += 1
        return typed_event(kind, {**fields, "sequence_number": self._num_events - 1})

    def opened(self, block: Block) -> bytes:
        item = self._item(block, "in_progress")
        if block.kind == "tool":
            return self.event("response.output_item.added", output_index=block.index, item=item)
        part, item["content"] = item["content"][0], []
        added = self.event("response.output_item.added", output_index=block.index, item=item)
        return added + self.event("response.content_part.added", **self._place(block), part=part)

    def grown(self, block: Block, text: str, tokens: list) -> bytes:
        if block.kind == "text":
            logprobs = self._logprobs(tokens) if self.stream else []
            return self.event("response.output_text.delta", **self._place(block), delta=text, logprobs=logprobs)
        kind = "function_call_arguments" if block.kind == "tool" else "reasoning_text"
        return self.event(f"response.{kind}.delta", **self._place(block), delta=text)

    def closed(self, block: Block) -> bytes:
        if not self.stream:
            return b""
        place, item = self._place(block), self._item(block, "incomplete" if block.cut else "completed")
        if block.kind == "tool":
            kind = "response.function_call_arguments.done"
            frames = self.event(kind, **place, arguments=block.text, name=block.name)
        else:
            part = item["content"][0]
            kind = "output_text" if block.kind == "text" else "reasoning_text"
            logprobs = {"logprobs": part["logprobs"]} if block.kind == "text" else {}
            frames = self.event(f"response.{kind}.done", **place, text=block.text, **logprobs)
            frames += self.event("response.content_part.done", **place, part=part)
        return frames + self.event("response.output_item.done", output_index=block.index, item=item)

    def finish(self) -> bytes:
        return b"" if self.failed is not None else self._end()

    def body(self) -> bytes:
        if self.failed is not None:
            raise self.failed
        return _json(self._keep())

    def broken(self, error: Exception) -> bytes:
        """The event that ends a stream which broke after its first byte."""
        said = error_object(error)[1]["error"]
        self._fixed["error"] = {"code": "server_error", "message": said["message"]}
        return self._end("failed")

    def _end(self, status: str | None = None) -> bytes:
        response = self._keep(status)
        return self.event(_ENDINGS.get(response["status"], "response.incomplete"), response=response)

    def _keep(self, status: str | None = None) -> dict[str, Any]:
        """The response as it ended, from now on in the store."""
        if status is None:
            endings = {"length": "incomplete", "timeout": "incomplete", "abort": "cancelled"}
            status = endings.get(self.choice.finish_reason, "completed")
        response = self._response(status)
        if self._store is not None:
            self._store.put(self.id, self._tenant, _json({"response": response, "input": self._items}))
        return response

    def _response(self, status: str) -> dict[str, Any]:
        running = status == "in_progress"
        reason = "timeout" if self.choice.finish_reason == "timeout" else "max_output_tokens"
        cut = {"reason": reason} if status == "incomplete" else None
        output = [
            self._item(block, "incomplete" if block.cut or block is self._open else "completed")
            for block in self.blocks
        ]
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "model": self.model.name,
            **self._fixed,
            "output": output,
            "usage": None if running else self._counts(),
        }

    def _counts(self) -> dict[str, Any]:
        usage = self.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]},
            "total_tokens": usage["total_tokens"],
        }

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item = {"id": self._item_id(block), "status": status}
        if block.kind == "tool":
            call = {"call_id": block.id, "name": block.name, "arguments": block.text}
            return {"type": "function_call", **item, **call}
        if block.kind == "reasoning":
            sealed = seal(block.text) if ENCRYPTED in self._include and status != "in_progress" else None
            content = [{"type": "reasoning_text", "text": block.text}]
            return {"type": "reasoning", **item, "summary": [], "content": content, "encrypted_content": sealed}
        part = {"type": "output_text", "text": block.text, "annotations": [], "logprobs": self._logprobs(block.tokens)}
        return {"type": "message", **item, "role": "assistant", "content": [part]}

    def _item_id(self, block: Block) -> str:
        return f"{_PREFIXES[block.kind]}_{self.id.removeprefix(self.id_prefix)}{block.index:02d}"

    def _place(self, block: Block) -> dict[str, Any]:
        place = {"item_id": self._item_id(block), "output_index": block.index}
        return place if block.kind == "tool" else {**place, "content_index": 0}

    def _logprobs(self, tokens: list) -> list[dict]:
        if LOGPROBS not in self._include or not tokens:
            return []
        ids, entries = zip(*tokens)
        return chat_logprobs(self.tokenizer, ids, entries)["content"]


def responses(context: Context, request: Request) -> ResponsesGeneration:
    """POST /v1/responses: answer in OpenAI's newer dialect. Input and output are typed items; the answer is kept for
    previous_response_id and GET unless store is false."""
    body = decode(ResponsesBody, request.body, context)
    context.model.check_name(body.model)
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "goes with stream: true only")
    if body.store and not context.settings.response_store:
        raise invalid("store", "this server stores no responses (--response-store 0)")
    items = _all_items(context, body)
    chat, prompt, parser = _fitted(context, body, chat_messages(body.instructions, items))
    keep = body.store is not False and context.settings.response_store
    store = ResponseStore.of(context.settings) if keep else None
    return ResponsesGeneration(context, body, chat, prompt, parser, items, store)


def count_input(context: Context, request: Request) -> Reply:
    """POST /v1/responses/input_tokens: count such a request's tokens. Earlier turns, template and tools included."""
    body = decode(ResponsesBody, request.body, context)
    context.model.check_name(body.model)
    with renamed(_FIELDS):
        prepared = prepare(context, chat_body(body, chat_messages(body.instructions, _all_items(context, body))))
    return Reply(_json({"object": "response.input_tokens", "input_tokens": len(prepared.ids)}))


def get_response(context: Context, request: Request) -> Reply:
    """GET /v1/responses/{id}: get a stored response. As a whole: only those made in the background could be
    streamed again, and crane makes none there."""
    for name in ("stream", "starting_after", "include_obfuscation"):
        if request.query.get(name) not in (None, "false"):
            why = "only a response made in the background can be streamed again, and crane makes none there"
            raise RequestError(f"{name}: {why}", field=name, code="unsupported_parameter")
    return Reply(_json(_record(context, request)["response"]))


def delete_response(context: Context, request: Request) -> Reply:
    """DELETE /v1/responses/{id}: forget a stored response. Later turns that name it are refused."""
    response_id = request.params["response_id"]
    if not ResponseStore.of(context.settings).delete(response_id, context.tenant):
        raise _unknown(response_id)
    return Reply(_json({"id": response_id, "object": "response", "deleted": True}))


def cancel_response(context: Context, request: Request) -> Reply:
    """POST /v1/responses/{id}/cancel: cancel a response. Always a 400: stored ones have ended, and crane runs none in
    the background."""
    status = _record(context, request)["response"]["status"]
    raise RequestError(f"this response cannot be cancelled: it is {status}, and was not made in the background")


def list_input(context: Context, request: Request) -> Reply:
    """GET /v1/responses/{id}/input_items: list what a response answered. Its input and all turns before it, the newest
    first."""
    query = request.query
    limit, order = query.get("limit", "20"), query.get("order", "desc")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= MAX_LIST):
        raise invalid("limit", f"expected a number in 1..{MAX_LIST}, got {limit[:40]!r}")
    if order not in ("asc", "desc"):
        raise invalid("order", f"expected asc or desc, got {order[:40]!r}")
    items = _record(context, request)["input"][:: 1 if order == "asc" else -1]
    if "after" in query:
        ids = [item["id"] for item in items]
        if query["after"] not in ids:
            raise invalid("after", f"expected the id of an item, got {query['after'][:80]!r}")
        items = items[ids.index(query["after"]) + 1 :]
    page = items[: int(limit)]
    ends = {"first_id": page[0]["id"] if page else "", "last_id": page[-1]["id"] if page else ""}
    return Reply(_json({"object": "list", "data": page, **ends, "has_more": len(items) > len(page)}))


def _all_items(context: Context, body: ResponsesBody) -> list[dict[str, Any]]:
    """Everything this request answers, from the first turn on, with ids."""
    items = input_items(body)
    previous = body.previous_response_id
    earlier = []
    if previous is not None:
        raw = ResponseStore.of(context.settings).get(previous, context.tenant)
        if raw is None:
            message = f"previous_response_id: there is no response {previous[:80]!r} (any more)"
            raise RequestError(message, field="previous_response_id", code="previous_response_not_found")
        record = msgspec.json.decode(raw)
        earlier = [*record["input"], *record["response"]["output"]]
        chat_messages(None, items)  # so that errors count the items as this request has them
    own = f"{time.time_ns():x}"
    named = ({**item, "id": item.get("id") or f"item_{own}{i:02d}"} for i, item in enumerate(items))
    return [*earlier, *named]


def _fitted(
    context: Context, body: ResponsesBody, messages: list[Message]
) -> tuple[ChatBody, Prompt, ChatParser]:
    """The chat; with truncation "auto", without the oldest turns that do not fit. Raises RequestError."""

    def build(kept: list[Message]):
        with renamed(_FIELDS):
            chat = chat_body(body, kept)
            prepared = prepare(context, chat)
            # without a limit of its own, an answer may be as long as the model's context
            max_tokens = body.max_output_tokens or context.max_model_len
            return chat, chat_prompt(context, chat, prepared, max_tokens, "messages"), prepared.parser()

    try:
        return build(messages)
    except RequestError as error:
        if body.truncation != "auto" or error.code != "context_length_exceeded":
            raise
        too_long = error
    num_system = next((i for i, message in enumerate(messages) if message.role not in ("system", "developer")), 0)
    starts = [i for i, message in enumerate(messages) if message.role == "user" and i > num_system]
    found = None
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        try:
            found = build(messages[:num_system] + messages[starts[middle] :])
            high = middle
        except RequestError as error:
            if error.code != "context_length_exceeded":
                raise
            low = middle + 1
    if found is None:
        raise too_long
    return found


def _record(context: Context, request: Request) -> dict[str, Any]:
    response_id = request.params["response_id"]
    raw = ResponseStore.of(context.settings).get(response_id, context.tenant)
    if raw is None:
        raise _unknown(response_id)
    return msgspec.json.decode(raw)


def _unknown(response_id: str) -> RequestError:
    message = f"there is no response {response_id[:80]!r} (any more)"
    return RequestError(message, field="response_id", code="not_found", status=404)


def _echo(body: ResponsesBody, sampling) -> dict[str, Any]:
    """What a response repeats of its request, defaults filled in."""
    given = msgspec.to_builtins(body)
    names = (
        "instructions", "max_output_tokens", "max_tool_calls", "previous_response_id", "user", "safety_identifier",
        "prompt_cache_key", "prompt_cache_retention",
    )  # fmt: skip
    text = {name: value for name, value in ((given["text"] or {}).get("format") or {}).items() if value is not None}
    choice = given["tool_choice"]
    if isinstance(choice, dict):
        choice = {name: value for name, value in choice.items() if value is not None}
    tool_fields = ("type", "name", "description", "parameters", "strict")
    return {
        **{name: given[name] for name in names},
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "tools": [{name: tool[name] for name in tool_fields} for tool in given["tools"] or []],
        "tool_choice": choice or "auto",
        "text": {"format": text or {"type": "text"}, "verbosity": "medium"},
        "reasoning": {"effort": (given["reasoning"] or {}).get("effort"), "summary": None},
        "truncation": body.truncation or "disabled",
        "service_tier": "default",
        "background": False,
    }


_ONE = "/v1/responses/{response_id}"
ENDPOINTS = (
    Endpoint("POST", "/v1/responses", responses, body=ResponsesBody),
    Endpoint("POST", "/v1/responses/input_tokens", count_input, needs="model", body=ResponsesBody),
    Endpoint("GET", _ONE, get_response, needs="nothing"),
    Endpoint("DELETE", _ONE, delete_response, needs="nothing"),
    Endpoint("POST", f"{_ONE}/cancel", cancel_response, needs="nothing"),
    Endpoint("GET", f"{_ONE}/input_items", list_input, needs="nothing"),
)
