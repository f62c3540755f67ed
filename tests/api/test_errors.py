"""Refusals: a real status, OpenAI's error object, the field's name; and nothing ever ignored in silence."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crane.errors import EngineError
from crane.runtime.settings import Settings
from tests.api.harness import Client, speak

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
PART = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}


def refused(response, status=400):
    """The error object of a refusal, its shape checked."""
    assert response.status == status, response.body
    assert response.headers["content-type"] == "application/json"
    ((name, error),) = response.json().items()
    assert name == "error" and set(error) == {"message", "type", "param", "code"}
    return error


BAD_CHAT = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 101}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"presence_penalty": -3}, "presence_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": ["a", 1]}, "stop[1]"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop": "a" * 1001}, "stop"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
    ({"logit_bias": {"512": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"one": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": []}, "logit_bias"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"nope": 1}}, "stream_options.nope"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"stream": "yes"}, "stream"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [PART]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
    ({"messages": [*HI, {"role": "user", "content": "x", "extra": 1}]}, "messages[1].extra"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}]},
     "messages[0].tool_calls"),
    ({"messages": [*HI, {"role": "assistant", "content": "x", "audio": {"id": "a"}}]}, "messages[1].audio"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex"),
    ({"guided_regex": "a", "ebnf": "b"}, "ebnf"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
    ({"guided_choice": []}, "guided_choice"),
    ({"thinking_token_budget": 5}, "thinking_token_budget"),
    ({"thinking_token_budget": -1}, "thinking_token_budget"),
    ({"thinking_token_budget": 5, "reasoning_budget_tokens": 6}, "reasoning_budget_tokens"),
    ({"reasoning_effort": "extreme"}, "reasoning_effort"),
    ({"prompt_logprobs": 2, "stream": True}, "prompt_logprobs"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"prediction": {"type": "content", "content": "x"}, "response_format": {"type": "json_object"}}, "prediction"),
    ({"prediction": {"type": "text", "content": "x"}}, "prediction.type"),
    ({"num_draft_tokens": 65}, "num_draft_tokens"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"moderation": {}}, "moderation"),
    ({"prompt_cache_options": {}}, "prompt_cache_options"),
    ({"session_id": "s"}, "session_id"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"verbosity": "low"}, "verbosity"),
    ({"best_of": 2}, "best_of"),
    ({"nonsense": None}, "nonsense"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
]  # fmt: skip


@pytest.mark.parametrize("extra, field", BAD_CHAT, ids=[json.dumps(extra)[:60] for extra, _ in BAD_CHAT])
def test_bad_chat_field_is_refused_by_name(client, extra, field):
    here = client()
    error = refused(here.post(CHAT, {"messages": HI, "stream": False, **extra}))
    assert error["param"] == field and error["type"] == "invalid_request_error"
    assert field.split(".")[-1].split("[")[0] in error["message"]
    assert here.link.opened == []


BAD_TEXT = [
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt[0]"),
    ({"prompt": [1, 512]}, "prompt"),
    ({"prompt": [1, -1]}, "prompt"),
    ({"prompt": [[1], [10**9]]}, "prompt[1]"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "logprobs": True}, "logprobs"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "best_of": 2, "n": 3}, "best_of"),
    ({"prompt": "a", "best_of": 3, "stream": True}, "best_of"),
    ({"prompt": ["a"] * 9, "best_of": 128}, "n"),
    ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"prompt": ["a"] * 9, "n": 128}, "n"),
    ({"prompt": "a", "messages": []}, "messages"),
]


@pytest.mark.parametrize("body, field", BAD_TEXT, ids=[json.dumps(body)[:60] for body, _ in BAD_TEXT])
def test_bad_completion_field_is_refused_by_name(client, body, field):
    assert refused(client().post(TEXT, body))["param"] == field


BAD_TOKENS = [
    ("tokenize", {}, "text"),
    ("tokenize", {"text": "a", "prompt": "b"}, "prompt"),
    ("tokenize", {"text": "a", "add_generation_prompt": True}, "add_generation_prompt"),
    ("tokenize", {"text": "a", "tools": [{"function": {"name": "f"}}]}, "tools"),
    ("tokenize", {"text": 1}, "text"),
    ("detokenize", {}, "tokens"),
    ("detokenize", {"tokens": [1, [2]]}, "tokens"),
    ("detokenize", {"tokens": [10**7]}, "tokens"),
    ("detokenize", {"tokens": [-1]}, "tokens"),
    ("detokenize", {"tokens": [2**80]}, "tokens"),
    ("detokenize", {"tokens": ["a"]}, "tokens[0]"),
]


@pytest.mark.parametrize("path, body, field", BAD_TOKENS)
def test_bad_token_request_is_refused_by_name(client, path, body, field):
    assert refused(client().post(f"/v1/{path}", body))["param"] == field


NOT_JSON = {
    "empty": b"",
    "cut": b'{"messages": [',
    "text": b"hello",
    "not an object": b"[]",
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": 1e999}',
    "half a surrogate pair": b'{"prompt": "\\ud83d"}',
    "surrogate in UTF-8": b'{"prompt": "\xed\xa0\x80"}',
    "latin-1": b'{"prompt": "\xe9"}',
    "nested too deeply": b'{"prompt": "a", "metadata": {"a": ' + b"[" * 100000 + b"]" * 100000 + b"}}",
    "number of 5000 digits": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("raw", NOT_JSON.values(), ids=NOT_JSON)
@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/tokenize"])
def test_body_that_is_not_our_json_is_400(client, raw, path):
    refused(client().post(path, raw))


@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/tokenize", "/v1/detokenize"])
def test_unknown_model_is_404(client, path):
    bodies = {CHAT: {"messages": HI}, TEXT: {"prompt": "a"}, "/v1/tokenize": {"text": "a"}}
    body = {**bodies.get(path, {"tokens": [1]}), "model": "other"}
    error = refused(client().post(path, body), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "other" in error["message"] and "org/tiny" in error["message"]


@pytest.mark.parametrize(
    "path, body, field",
    [(CHAT, {"messages": [{"role": "user", "content": "a b c d " * 200}]}, "messages"),
     (TEXT, {"prompt": "a b c d " * 200}, "prompt"), (TEXT, {"prompt": ["a", "a b c d " * 200]}, "prompt")],
)  # fmt: skip
def test_prompt_that_does_not_fit_is_context_length_exceeded(client, path, body, field):
    response = client().post(path, {**body, "stream": True})
    error = refused(response)
    assert (error["code"], error["param"]) == ("context_length_exceeded", field)
    assert "maximum context length is 256 tokens" in error["message"] and "resulted in" in error["message"]
    assert response.headers["x-should-retry"] == "false"


REJECTIONS = [
    (EngineError("queue_full", "full", 3.2), 429, "rate_limit_error", "rate_limit_exceeded", "4"),
    (EngineError("queue_full", "full"), 429, "rate_limit_error", "rate_limit_exceeded", "1"),
    (EngineError("draining", "bye"), 503, "server_error", "engine_unavailable", "2"),
    (EngineError("lost", "gone", 1.0), 503, "server_error", "engine_unavailable", "1"),
    (EngineError("too_long", "long"), 400, "invalid_request_error", "context_length_exceeded", None),
    (EngineError("duplicate_rid", "twice"), 400, "invalid_request_error", "duplicate_rid", None),
    (EngineError("bad_request", "bad"), 400, "invalid_request_error", None, None),
    (EngineError("internal", "oops"), 500, "server_error", "internal_error", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "error, status, kind, code, wait", REJECTIONS, ids=[str(row[0].code) for row in REJECTIONS]
)
def test_refusal_of_the_engine_has_a_status_also_for_streams(client, error, status, kind, code, wait, stream):
    here = client(lambda request: [error])
    response = here.post(CHAT, {"messages": HI, "stream": stream})
    found = refused(response, status)
    assert (found["type"], found["code"], found["message"]) == (kind, code, str(error))
    assert response.headers.get("retry-after") == wait
    assert here.link.closed == [here.link.opened[0].rid]


def test_what_a_client_sent_does_not_all_come_back(client):
    assert len(client().post(TEXT, {"prompt": "a", "model": "m" * 100000}).body) < 2000
    assert len(client().post(TEXT, {"prompt": "a", "f" * 100000: 1}).body) < 2000


def test_error_of_our_own_is_500_without_details_and_logged(client, caplog):
    def broken(request):
        raise KeyError("secret")

    response = client(broken).post(CHAT, {"messages": HI})
    error = refused(response, 500)
    assert (
        error["code"] == "internal_error"
        and b"secret" not in response.body
        and b"Traceback" not in response.body
    )
    assert "secret" in caplog.text


def test_body_above_the_limit_is_413_by_length_and_by_counting(client):
    small = Settings(max_body=100)
    body = {"prompt": "a" * 200}
    assert refused(client(settings=small).post(TEXT, body), 413)["type"] == "invalid_request_error"
    refused(client(settings=small).post(TEXT, body, chunked=True), 413)
    refused(client(settings=small).post(TEXT, b"{}", headers={"content-length": "99999999"}), 413)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    "messages prompt text tokens max_tokens temperature logit_bias stop n seed stream logprobs "
    "stop_token_ids echo stream_options chat_template_kwargs tools metadata model"
).split()


@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/tokenize", "/v1/detokenize"])
@given(extra=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_json_at_all_makes_the_server_fail(model, path, extra):
    here = Client(
        "wsgi", model, lambda r: [speak(model.tokenizer, "x", r, index=i) for i in range(r.sampling.n)]
    )
    body = {CHAT: {"messages": HI}, TEXT: {"prompt": "a"}}.get(path, {}) | extra
    assert here.post(path, json.dumps(body).encode()).status in (200, 400, 404)


def test_list_of_texts_and_objects_is_checked_item_by_item():
    from crane.api.bodies import decode
    from crane.api.score import RerankBody

    body = decode(RerankBody, b'{"query": "q", "documents": [{"text": "a"}, "b"]}')
    assert [getattr(each, "text", each) for each in body.documents] == ["a", "b"]


def test_a_field_with_a_successor_says_which(client):
    old = {"functions": ([{"name": "f"}], "tools"), "function_call": ({"name": "f"}, "tool_choice")}
    for name, (value, successor) in old.items():
        error = refused(client().post(CHAT, {"messages": HI, name: value}))
        assert error["message"] == f"{name} is not supported, use {successor}"
