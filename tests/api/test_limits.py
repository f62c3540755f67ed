"""What one request may ask for is bounded by settings, which every route obeys and every refusal names."""

import dataclasses

import pytest

from crane.api.limits import prompt_chars
from crane.runtime.settings import Settings
from tests.api.harness import speak
from tests.api.talk import ROOMY, WEATHER, talking

CHAT, TEXT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"a" * 40: {"type": "string"}}}
ASKS = {CHAT: {"messages": HI}, TEXT: {"prompt": "a"}, MESSAGES: {"messages": HI, "max_tokens": 4},
        RESPONSES: {"input": "a"}, "/generate": {"text": "a"}, "/v1/tokenize": {"text": "a"},
        "/v1/embeddings": {"input": "a"}, "/v1/rerank": {"query": "a", "documents": ["b"]}}  # fmt: skip
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
# (setting, its value, route, fields that are too much, the field that is named)
TOO_MUCH = [
    ("max_n", 2, CHAT, {"n": 3}, "n"),
    ("max_n", 2, TEXT, {"n": 3}, "n"),
    ("max_n", 2, TEXT, {"best_of": 3}, "best_of"),
    ("max_n", 2, "/generate", {"sampling_params": {"n": 3}}, "n"),
    ("max_n", 2, "/generate", {"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 3}]}, "n"),
    ("max_logprobs", 1, CHAT, {"logprobs": True, "top_logprobs": 2}, "top_logprobs"),
    ("max_logprobs", 1, CHAT, {"prompt_logprobs": 2}, "prompt_logprobs"),
    ("max_logprobs", 1, TEXT, {"logprobs": 2}, "logprobs"),
    ("max_logprobs", 1, RESPONSES, {"top_logprobs": 2}, "top_logprobs"),
    ("max_logprobs", 1, "/generate", {"return_logprob": True, "top_logprobs_num": 2}, "top_logprobs_num"),
    ("max_stop", 1, CHAT, {"stop": ["a", "b"]}, "stop"),
    ("max_stop", 1, MESSAGES, {"stop_sequences": ["a", "b"]}, "stop_sequences"),
    ("max_stop", 1, RESPONSES, {"stop": ["a", "b"]}, "stop"),
    ("max_stop", 1, "/generate", {"sampling_params": {"stop": ["a", "b"]}}, "stop"),
    ("max_stop_chars", 3, CHAT, {"stop": "abcd"}, "stop"),
    ("max_stop_chars", 3, TEXT, {"stop": ["abc", "abcd"]}, "stop[1]"),
    ("max_stop_chars", 3, MESSAGES, {"stop_sequences": ["abcd"]}, "stop_sequences[0]"),
    ("max_logit_bias", 1, CHAT, {"logit_bias": {"1": 1, "2": 1}}, "logit_bias"),
    ("max_logit_bias", 1, "/generate", {"sampling_params": {"logit_bias": {"1": 1, "2": 1}}}, "logit_bias"),
    ("max_messages", 1, CHAT, {"messages": HI * 2}, "messages"),
    ("max_messages", 1, MESSAGES, {"messages": HI * 2}, "messages"),
    ("max_messages", 1, RESPONSES, {"input": HI * 2}, "input"),
    ("max_messages", 1, "/v1/tokenize", {"text": None, "messages": HI * 2}, "messages"),
    ("max_tools", 0, CHAT, {"tools": [WEATHER]}, "tools"),
    ("max_tools", 0, MESSAGES, {"tools": [{"name": "f", "input_schema": {"type": "object"}}]}, "tools"),
    ("max_tools", 0, RESPONSES, {"tools": [{"type": "function", "name": "f"}]}, "tools"),
    ("max_schema", 50, CHAT, {"response_format": FORMAT}, "response_format"),
    ("max_schema", 50, CHAT, {"guided_regex": "a" * 60}, "guided_regex"),
    ("max_schema", 50, TEXT, {"structured_outputs": {"choice": ["a"] * 60}}, "structured_outputs"),
    ("max_schema", 50, TEXT, {"ebnf": "root ::= " + '"a" ' * 20}, "ebnf"),
    ("max_schema", 50, RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}, "text"),
    ("max_schema", 50, MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
     "output_config"),
    ("max_schema", 50, "/generate", {"sampling_params": {"regex": "a" * 60}}, "regex"),
    ("max_prompt_chars", 80, CHAT, {"messages": [{"role": "user", "content": "a " * 20}] * 3}, "messages"),
    ("max_prompt_chars", 80, CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a" * 81}]}]},
     "messages"),
    ("max_prompt_chars", 80, TEXT, {"prompt": ["a", "a" * 81]}, "prompt"),
    ("max_prompt_chars", 80, MESSAGES, {"system": "a" * 81}, "system"),
    ("max_prompt_chars", 80, RESPONSES, {"instructions": "a" * 41, "input": "a" * 41}, "instructions"),
    ("max_prompt_chars", 80, "/generate", {"text": ["a" * 81]}, "text"),
    ("max_prompt_chars", 80, "/v1/tokenize", {"text": "a" * 81}, "text"),
    ("max_prompt_chars", 80, "/v1/embeddings", {"input": ["a", "a" * 81]}, "input"),
    ("max_prompt_chars", 80, "/v1/rerank", {"documents": ["a" * 81]}, "documents"),
]  # fmt: skip


def asks(client, model, settings):
    answer = lambda r: [speak(model.tokenizer, "hi", r, index=i) for i in range(r.sampling.n)]  # noqa: E731
    return client(answer, settings=settings, state=ROOMY)


@pytest.mark.parametrize("setting, value, path, extra, field", TOO_MUCH)
def test_more_than_a_setting_allows_is_refused_by_field_and_flag(client, model, setting, value, path, extra, field):
    body = {name: each for name, each in {**ASKS[path], **extra}.items() if each is not None}
    for stream in (False, True) if path in (CHAT, MESSAGES, RESPONSES, "/generate") else (False,):
        here = asks(client, talking(model, thinks=False), Settings(**{setting: value}))
        response = here.post(path, {**body, **({"stream": True} if stream else {})})
        text = response.body.decode()
        assert response.status == 400 and not here.link.opened, text
        assert field in text and "--" + setting.replace("_", "-") in text


@pytest.mark.parametrize("path", [CHAT, TEXT, MESSAGES, RESPONSES, "/generate", "/v1/tokenize"])
def test_the_defaults_are_in_nobodys_way(client, model, path):
    assert asks(client, model, Settings()).post(path, ASKS[path]).status == 200


def test_texts_that_are_prompts_of_their_own_are_counted_each(client, model):
    here = asks(client, model, Settings(max_prompt_chars=80))
    assert here.post(TEXT, {"prompt": ["a " * 30] * 5}).status == 200


def test_without_a_setting_a_prompt_may_have_what_the_context_could_hold(client, model):
    context = asks(client, model, Settings()).app.start_blocking().context("nothing")
    assert prompt_chars(context) == 1 << 20
    long = dataclasses.replace(context, settings=Settings(max_prompt_chars=7))
    assert prompt_chars(long) == 7


TWICE = [
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": 0, "temperature": 1}', "temperature"),
    (CHAT, b'{"messages": [{"role": "user", "role": "user", "content": "a"}]}', "role"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "logit_bias": {"1": 0, "1": 1}}', "1"),
    (TEXT, b'{"prompt": "a", "prompt": "a"}', "prompt"),
    (TEXT, b'{"prompt": "a", "metadata": {"a": [{"b": 1, "b": 2}]}}', "b"),
    ("/generate", b'{"text": "a", "sampling_params": {"n": 1, "n": 1}}', "n"),
]


@pytest.mark.parametrize("path, raw, field", TWICE)
def test_a_key_given_twice_is_refused_by_name(client, model, path, raw, field):
    response = asks(client, model, Settings()).post(path, raw)
    assert response.status == 400 and f"{field} is given twice" in response.body.decode()


NAMELESS = [
    (b'{"prompt": "a", "temperature": NaN}', "temperature"),
    (b'{"prompt": "a", "seed": 0x10}', "seed"),
    (b'{"prompt": "a", "user": "\\ud83d"}', "user"),
    (b'{"prompt": "\\udc00", "user": "b"}', "prompt"),
    (b'{"prompt": "\xed\xa0\x80", "user": "b"}', "prompt"),
    (b'{"user": "b", "prompt": "\xe9"}', "prompt"),
]


@pytest.mark.parametrize("raw, field", NAMELESS)
def test_what_is_no_json_at_all_is_placed_behind_its_key(client, model, raw, field):
    error = asks(client, model, Settings()).post(TEXT, raw).json()["error"]
    assert error["param"] == field and field in error["message"]


@pytest.mark.parametrize("value", [0, 0.0, 1, "", [False]])
def test_what_only_equals_a_neutral_value_is_not_taken_for_it(client, model, value):
    response = asks(client, model, Settings()).post(CHAT, {**ASKS[CHAT], "store": value})
    assert response.status == 400 and response.json()["error"]["param"] == "store"


def test_limits_have_bounds_of_their_own():
    from crane.errors import SettingsError

    beyond = {"max_n": 1025, "max_logprobs": 1001, "max_schema": 1 << 20, "port": 65536, "max_stop": -1}
    for name, value in beyond.items():
        with pytest.raises(SettingsError, match=f"CRANE_{name.upper()} must be at (most|least)"):
            Settings(**{name: value})
