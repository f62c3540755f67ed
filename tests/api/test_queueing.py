"""What a request says about its place in the queue reaches the engine, and what comes of it the client."""

import dataclasses

import msgspec
import pytest

from crane.api.tenancy import tenant_of_key
from crane.runtime.settings import Settings
from crane.runtime.types import Generate, Output, Plan
from tests.api.harness import speak

HI = [{"role": "user", "content": "Hi"}]
CHAT, TEXT, NATIVE = "/v1/chat/completions", "/v1/completions", "/generate"
ASKS = {
    CHAT: {"messages": HI}, TEXT: {"prompt": "a"}, NATIVE: {"text": "a"}, "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": HI, "max_tokens": 4}, "/v1/embeddings": {"input": "a"},
    "/v1/score": {"query": "a", "items": ["b"], "label_token_ids": [1]},
}  # fmt: skip
KEYED = Settings(api_key="sk-first,sk-second", model_name="org/tiny")


def sent(client, model, path, body, settings=None, key=None) -> Generate:
    """The engine's request that a body becomes."""
    here = client(lambda request: speak(model.tokenizer, "x", request), settings=settings)
    here.post(path, body, headers={"authorization": f"Bearer {key}"} if key else None)
    return here.link.opened[0]


@pytest.mark.parametrize("path", ASKS)
def test_every_generating_route_takes_priority_and_time_limit(client, model, path):
    plain = sent(client, model, path, ASKS[path])
    assert (plain.priority, plain.timeout_s, plain.tenant) == (0, None, "")
    asked = sent(client, model, path, {**ASKS[path], "priority": -3, "timeout_s": 2.5})
    assert (asked.priority, asked.timeout_s) == (-3, 2.5)


def test_priorities_can_be_read_as_sglang_reads_them(client, model):
    settings = Settings(priority_order="highest-first")
    assert sent(client, model, NATIVE, {"text": "a", "priority": 7}, settings).priority == -7


@pytest.mark.parametrize("field, value", [
    ("priority", 1001), ("priority", -1001), ("priority", 1.5), ("priority", "high"),
    ("timeout_s", 0), ("timeout_s", -1), ("timeout_s", 1e9), ("timeout_s", "1"),
])  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_values_out_of_bounds_are_refused_by_name(client, path, field, value):
    response = client().post(path, {**ASKS[path], field: value})
    assert response.status == 400 and f"{field}:" in response.json()["error"]["message"]


def test_a_tenant_is_a_key_and_does_not_tell_it(client, model):
    first, again = (sent(client, model, CHAT, ASKS[CHAT], KEYED, "sk-first").tenant for _ in range(2))
    second = sent(client, model, NATIVE, ASKS[NATIVE], KEYED, "sk-second").tenant
    assert first == again == tenant_of_key("sk-first") != second and first and "first" not in first


def test_fair_by_user_tells_the_users_of_a_key_apart_and_fair_by_none_nobody(client, model):
    by_user = dataclasses.replace(KEYED, fair_by="user")
    tenants = [sent(client, model, CHAT, {**ASKS[CHAT], **more}, by_user, key).tenant for key, more in (
        ("sk-first", {}), ("sk-first", {"user": "a"}), ("sk-first", {"user": "b"}), ("sk-second", {"user": "a"}),
    )]  # fmt: skip
    assert len(set(tenants)) == 4 and tenants[0] == tenant_of_key("sk-first")
    anthropic = {**ASKS["/v1/messages"], "metadata": {"user_id": "a"}}
    assert sent(client, model, "/v1/messages", anthropic, by_user, "sk-first").tenant == tenants[1]
    nobody = dataclasses.replace(KEYED, fair_by="none")
    assert sent(client, model, CHAT, {**ASKS[CHAT], "user": "a"}, nobody, "sk-first").tenant == ""


def late(model, text):
    """An engine that gets as far as `text` before the time is over."""
    def script(request):
        outputs = [] if not text else speak(model.tokenizer, text, request, finish=None)
        return [*outputs, Output(request.rid, 0, [], "timeout")]

    return script


@pytest.mark.parametrize("path", ASKS)
def test_without_a_first_token_in_time_there_is_an_error_that_no_client_retries(client, model, path):
    response = client(late(model, "")).post(path, {**ASKS[path], "timeout_s": 1})
    assert response.status == 504 and response.headers["x-should-retry"] == "false"
    assert "timeout_s" in response.json()["error"]["message"]


@pytest.mark.parametrize("path, ending", [
    (CHAT, lambda body: (body["choices"][0]["message"]["content"], body["choices"][0]["finish_reason"])),
    (TEXT, lambda body: (body["choices"][0]["text"], body["choices"][0]["finish_reason"])),
    (NATIVE, lambda body: (body["text"], body["meta_info"]["finish_reason"]["err_type"])),
    ("/v1/messages", lambda body: (body["content"][0]["text"], body["stop_reason"])),
    ("/v1/responses", lambda body: (body["output"][0]["content"][0]["text"], body["incomplete_details"]["reason"])),
])  # fmt: skip
def test_what_there_is_when_the_time_is_over_is_the_answer(client, model, path, ending):
    response = client(late(model, "so far")).post(path, {**ASKS[path], "timeout_s": 1})
    assert response.status == 200 and ending(response.json()) == ("so far", "timeout")


def test_streams_say_that_their_time_was_over(client, model):
    body = {**ASKS[CHAT], "stream": True, "timeout_s": 1}
    *_, last, done = client(late(model, "so far")).post(CHAT, body).data()
    assert last["choices"][0]["finish_reason"] == "timeout" and done == "[DONE]"
    *_, last = client(late(model, "")).post(CHAT, body).data()
    assert (last["error"]["type"], last["error"]["code"]) == ("timeout_error", "timeout")
    native = client(late(model, "")).post(NATIVE, {"text": "a", "stream": True}).data()
    assert native[0]["error"]["code"] == 504 and native[0]["error"]["retryable"] is False


# --- /v1/plan

PLAN = Plan(prompt_tokens=9, cached_tokens=4, max_tokens=20, fits=True, waiting=3, free_pages=50, pages=2,
            queue_position=1, wait_s=0.5, first_token_s=0.7)  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, TEXT, NATIVE])
def test_plan_asks_the_engine_about_the_very_request_that_would_be_made(client, model, path):
    body = {**ASKS[path], "priority": 2, **({} if path == NATIVE else {"max_tokens": 20})}
    here = client(answer=[msgspec.to_builtins(PLAN)])
    response = here.post("/v1/plan", body)
    assert response.status == 200, response.body
    ((op, payload),) = here.link.calls
    (asked,) = msgspec.convert(payload, list[Generate])
    made = sent(client, model, path, body)
    assert op == "plan" and here.link.opened == []
    assert msgspec.structs.replace(asked, rid="") == msgspec.structs.replace(made, rid="")
    plan = response.json()
    assert (plan["prompt_tokens"], plan["cached_tokens"], plan["first_token_s"]) == (9, 4, 0.7)
    assert plan["fits"] is True and plan["would_be_refused"] is None and plan["max_model_len"] == 256


def test_plan_of_several_prompts_adds_up_and_ends_with_the_last(client):
    other = msgspec.structs.replace(PLAN, cached_tokens=0, wait_s=2.0, code="queue_full", message="full",
                                    retry_after_s=3.0)  # fmt: skip
    here = client(answer=[msgspec.to_builtins(each) for each in (PLAN, other)])
    plan = here.post("/v1/plan", {"prompt": ["a", "b"], "n": 3}).json()
    assert (plan["prompt_tokens"], plan["cached_tokens"], plan["kv_pages"], plan["max_tokens"]) == (18, 4, 12, 120)
    assert plan["wait_s"] == 2.0
    assert plan["would_be_refused"] == {"code": "queue_full", "message": "full", "retry_after_s": 3.0}


def test_plan_sends_on_a_prompt_that_is_too_long_and_refuses_what_the_route_refuses(client):
    here = client(answer=[msgspec.to_builtins(PLAN)])
    assert here.post("/v1/plan", {"input_ids": [1] * 1000}).status == 200
    assert len(here.link.calls[0][1][0][2]) == 1000
    for body, param in (({"messages": HI, "top_p": 2}, "top_p"), ({"max_tokens": 2}, None), ({}, "messages")):
        response = client().post("/v1/plan", body)
        assert response.status == 400 and response.json()["error"]["param"] == param
    assert client().post("/v1/plan", b"nonsense").status == 400
