"""POST /v1/plan: what would become of a request, without making it."""

import dataclasses

import msgspec

from crane.api import completions, openai, sglang
from crane.api.bodies import ChatBody, CompletionBody
from crane.api.endpoint import Context, Endpoint, Generation, Question, Reply, Request
from crane.api.sglang_bodies import NativeBody
from crane.api.tenancy import isolated
from crane.errors import RequestError

_json = msgspec.json.Encoder().encode
# fields that only one kind of body has, and what answers it
_KINDS = {
    "messages": openai.chat_completions, "prompt": completions.completions, "text": sglang.generate,
    "input_ids": sglang.generate,
}  # fmt: skip


def plan(context: Context, request: Request) -> Question:
    """Tell what would become of a request. Its tokens, how many of them are cached, whether it fits, how long it
    would wait, and when its first token would come.

    The body is one of /v1/chat/completions, /v1/completions or /generate, checked as there. Nothing is generated.
    """
    generation = _generation(context, request)
    requests = generation.requests
    if context.settings.isolate_keys and context.tenant:
        requests = isolated(requests, context.tenant)
    num_choices = [each.sampling.n for each in requests]

    def render(plans: list[dict]) -> Reply:
        return Reply(_json(_summary(plans, num_choices, context)))

    return Question("plan", render, msgspec.to_builtins(requests))


def _generation(context: Context, request: Request) -> Generation:
    try:
        given = msgspec.json.decode(request.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        given = {}  # the endpoint below says what is wrong with it
    keys = given if isinstance(given, dict) else {}
    kind = next((answer for key, answer in _KINDS.items() if key in keys), None)
    if kind is None and keys:
        raise RequestError(f"expected one of the fields {', '.join(_KINDS)}", code="missing_field")
    # a prompt that is too long is an answer here, not an error
    return (kind or openai.chat_completions)(
        dataclasses.replace(context, any_length=True), dataclasses.replace(request, last_event_id="")
    )


def _summary(plans: list[dict], num_choices: list[int], context: Context) -> dict:
    """Of several prompts, the sums, and the times of the one that comes last."""
    def last(name: str):
        values = [each[name] for each in plans]
        return None if None in values else max(values)

    refused = next((each for each in plans if each["code"] is not None), None)
    return {
        "object": "plan",
        "model": context.model.name,
        "fits": all(each["fits"] for each in plans),
        "would_be_refused": refused and {name: refused[name] for name in ("code", "message", "retry_after_s")},
        "prompt_tokens": sum(each["prompt_tokens"] for each in plans),
        "cached_tokens": sum(each["cached_tokens"] for each in plans),
        "max_tokens": sum(each["max_tokens"] * n for each, n in zip(plans, num_choices)),
        "max_model_len": context.max_model_len,
        "kv_pages": sum(each["pages"] * n for each, n in zip(plans, num_choices)),
        "free_kv_pages": plans[0]["free_pages"],
        "waiting": plans[0]["waiting"],
        "queue_position": last("queue_position"),
        "wait_s": last("wait_s"),
        "first_token_s": last("first_token_s"),
    }


ENDPOINTS = (Endpoint("POST", "/v1/plan", plan, body=ChatBody | CompletionBody | NativeBody),)
