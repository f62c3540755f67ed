"""POST /v1/messages: Anthropic's dialect of the same chat, prompts, blocks, events and errors."""

import json

import pytest

from crane.api.messages import MessagesGeneration
from crane.errors import EngineError
from crane.runtime.types import Output, State
from tests.api.harness import Client
from tests.api.thinker import ROOMY, prompt_text, says, thinking_model, typed_events

PATH = "/v1/messages"
HELLO = {"model": "org/tiny", "max_tokens": 100, "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {
    "name": "weather",
    "description": "Tells it.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
THINKING = {"type": "enabled", "budget_tokens": 50}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture(scope="module")
def thinker(model):
    return thinking_model(model)


@pytest.fixture(params=["asgi", "wsgi"])
def here(request, thinker):
    """here(text, **options) -> a client whose engine says `text`."""
    return lambda text, **options: Client(request.param, thinker, says(thinker, text, **options), state=ROOMY)


def joined(events) -> list[tuple[str, str]]:
    """Kind and whole text of each streamed block; checks that each is opened, grown and closed in turn."""
    blocks, is_open = [], False
    for kind, data in events:
        if kind == "content_block_start":
            assert not is_open and data["index"] == len(blocks)
            is_open = True
            blocks.append([data["content_block"]["type"], ""])
        elif kind == "content_block_delta":
            assert is_open and data["index"] == len(blocks) - 1
            delta = data["delta"]
            if delta["type"] != "signature_delta":
                (text,) = [value for name, value in delta.items() if name != "type"]
                blocks[-1][1] += text
        elif kind == "content_block_stop":
            assert is_open
            is_open = False
    assert not is_open
    return [tuple(block) for block in blocks]


def test_reply_has_anthropics_shape(here):
    client = here("The sky is blue.")
    response = client.post(PATH, HELLO)
    assert response.status == 200
    body = response.json()
    num_prompt = len(client.link.opened[0].prompt_ids)
    num_output = body["usage"].pop("output_tokens")
    assert body.pop("id") == client.link.opened[0].rid and num_output > 4
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": "org/tiny",
        "content": [{"type": "text", "text": "The sky is blue.", "citations": None}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": num_prompt,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }


def test_stream_has_anthropics_events_in_their_order(here):
    response = here("A crane").post(PATH, {**HELLO, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = typed_events(response)
    kinds = [kind for kind, _ in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    message = events[0][1]["message"]
    assert message["content"] == [] and message["stop_reason"] is None and message["usage"]["output_tokens"] == 0
    assert joined(events) == [("text", "A crane")]
    delta = events[-2][1]
    assert delta["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert delta["usage"]["output_tokens"] > 2
    assert b"[DONE]" not in response.body


def test_thinking_text_and_tool_use_are_blocks_of_their_own(here, thinker):
    text = f"<think>\nHe wants weather.\n</think>\n\nLet me look.\n{CALL}"
    fields = {**HELLO, "thinking": THINKING, "tools": [TOOL], "max_tokens": 200}
    client = here(text)
    body = client.post(PATH, fields).json()
    thinking, said, call = body["content"]
    assert (thinking["type"], thinking["thinking"]) == ("thinking", "He wants weather.") and thinking["signature"]
    assert said == {"type": "text", "text": "Let me look.", "citations": None}
    assert call.pop("id").startswith("call_")
    assert call == {"type": "tool_use", "name": "weather", "input": {"city": "Rome"}}
    assert body["stop_reason"] == "tool_use"
    assert 0 < body["usage"]["output_tokens_details"]["thinking_tokens"] < body["usage"]["output_tokens"]
    request = client.link.opened[0]
    assert request.sampling.thinking.max_tokens == 50
    assert '"name": "weather"' in prompt_text(thinker, request)

    events = typed_events(here(text).post(PATH, {**fields, "stream": True}))
    (_, a), (_, b), (_, c) = blocks = joined(events)
    assert [kind for kind, _ in blocks] == ["thinking", "text", "tool_use"]
    assert (a, b, json.loads(c)) == ("He wants weather.", "Let me look.", {"city": "Rome"})
    signed = [data for _, data in events if data.get("delta", {}).get("type") == "signature_delta"]
    assert len(signed) == 1 and signed[0]["index"] == 0 and signed[0]["delta"]["signature"]


def test_nothing_is_thought_unless_asked(here, thinker):
    client = here("Yes")
    client.post(PATH, HELLO)
    assert prompt_text(thinker, client.link.opened[0]).endswith("<think>\n\n</think>\n\n")
    client.post(PATH, {**HELLO, "thinking": {"type": "adaptive"}})
    assert prompt_text(thinker, client.link.opened[1]).endswith("<|im_start|>assistant\n")


def test_turns_with_tool_results_become_the_templates_turns(here, thinker):
    client = here("Sunny")
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Rome?", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Look.", "signature": "s"},
            {"type": "text", "text": "One moment."},
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sun"}]},
            {"type": "tool_result", "tool_use_id": "t2", "content": "no such city", "is_error": True},
            {"type": "text", "text": "And?"}]},
    ]  # fmt: skip
    system = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]
    response = client.post(PATH, {**HELLO, "messages": messages, "system": system})
    assert response.status == 200, response.body
    assert prompt_text(thinker, client.link.opened[0]) == (
        "<|im_start|>system\nBe\nbrief.<|im_end|>\n<|im_start|>user\nRome?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nLook.\n</think>\n\nOne moment."
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>sun</tool_response><|im_end|>\n"
        "<|im_start|>user\n<tool_response>Error: no such city</tool_response><|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_last_turn_of_the_assistant_is_continued(here, thinker):
    client = here(" blue.")
    messages = [*HELLO["messages"], {"role": "assistant", "content": "The sky is"}]
    assert client.post(PATH, {**HELLO, "messages": messages}).json()["content"][0]["text"] == " blue."
    assert prompt_text(thinker, client.link.opened[0]).endswith("<|im_start|>assistant\nThe sky is")


def test_sampling_fields_reach_the_engine(here):
    client = here("x")
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "stop_sequences": ["\n\n"], "metadata": {"user_id": "u"}}
    assert client.post(PATH, {**HELLO, **fields, "service_tier": "auto"}).status == 200
    sampling = client.link.opened[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.stop) == (0.5, 0.9, 7, ("\n\n",))
    assert sampling.max_tokens == 100


@pytest.mark.parametrize(
    "options, fields, reason, sequence",
    [
        ({"finish": "length", "eos": None}, {}, "max_tokens", None),
        ({"finish": "length", "eos": None}, {"max_tokens": 5000}, "model_context_window_exceeded", None),
        ({}, {"stop_sequences": ["is"]}, "stop_sequence", "is"),
        ({}, {}, "end_turn", None),
    ],
)
def test_stop_reason_says_why(here, options, fields, reason, sequence):
    body = here("The sky is blue.", **options).post(PATH, {**HELLO, **fields}).json()
    assert (body["stop_reason"], body["stop_sequence"]) == (reason, sequence)
    assert body["content"][0]["text"] == ("The sky " if sequence else "The sky is blue.")


def test_tool_call_that_was_cut_is_left_out(here):
    text = 'Well.<tool_call>\n{"name": "weather", "arguments": {"ci'
    body = here(text, finish="length", eos=None).post(PATH, {**HELLO, "tools": [TOOL]}).json()
    assert [block["type"] for block in body["content"]] == ["text"]
    assert body["stop_reason"] == "max_tokens"


def test_tool_call_that_fell_apart_is_left_out(here):
    text = 'Well.<tool_call>\n{"name": "weather", "arguments": {"ci'
    body = here(text).post(PATH, {**HELLO, "tools": [TOOL]}).json()
    assert [block["type"] for block in body["content"]] == ["text"] and body["stop_reason"] == "end_turn"


def test_effort_alone_asks_for_thinking_and_contradicts_none(here, thinker):
    client = here("Yes")
    assert client.post(PATH, {**HELLO, "output_config": {"effort": "low"}}).status == 200
    assert prompt_text(thinker, client.link.opened[0]).endswith("<|im_start|>assistant\n")
    assert client.link.opened[0].sampling.thinking.max_tokens == 2048
    fields = {"output_config": {"effort": "low"}, "thinking": {"type": "disabled"}}
    response = client.post(PATH, {**HELLO, **fields})
    assert response.status == 400 and "output_config.effort" in response.json()["error"]["message"]


def test_tool_choice_none_shows_the_model_no_tools(here, thinker):
    client = here("x")
    response = client.post(PATH, {**HELLO, "tools": [TOOL], "tool_choice": {"type": "none"}})
    assert response.status == 200 and "weather" not in prompt_text(thinker, client.link.opened[0])


def test_schema_and_forced_tool_reach_the_engine_as_a_grammar(here):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    client = here('{"a": 1}')
    form = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    assert client.post(PATH, {**HELLO, **form}).json()["content"][0]["text"] == '{"a": 1}'
    assert client.link.opened[0].sampling.grammar
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        assert client.post(PATH, {**HELLO, "tools": [TOOL], "tool_choice": choice}).status == 200
        assert "weather" in client.link.opened[-1].sampling.grammar


def test_one_call_at_a_time_ends_after_the_first(here):
    fields = {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    client = here(CALL + "\n" + CALL)
    body = client.post(PATH, {**HELLO, **fields, "max_tokens": 200}).json()
    assert [block["type"] for block in body["content"]] == ["tool_use"] and body["stop_reason"] == "tool_use"
    assert client.link.aborted == [(client.link.opened[0].rid, 0)]


def test_tokens_are_counted_as_the_engine_would_get_them(here):
    client = here("x")
    fields = {"system": "Be brief.", "tools": [TOOL], "messages": HELLO["messages"], "model": "org/tiny"}
    counted = client.post(PATH + "/count_tokens", fields).json()
    client.post(PATH, {**fields, "max_tokens": 5})
    assert counted == {"input_tokens": len(client.link.opened[0].prompt_ids)}


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]},
         "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
         "messages[0].content[0]"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 10}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, "thinking.display"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tools": [{**TOOL, "input_examples": [{"city": "x"}]}]}, "tools[0].input_examples"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"container": "c"}, "container"),
        ({"n": 2}, "n"),
        ({"messages": [{"role": "user", "content": "word " * 4000}]}, "messages"),
    ],
)  # fmt: skip
def test_bad_field_is_a_400_in_anthropics_shape_that_names_it(here, fields, named):
    client = here("x")
    response = client.post(PATH, {**HELLO, **fields})
    body = response.json()
    assert response.status == 400 and body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error" and named in body["error"]["message"]
    assert set(body["error"]) == {"type", "message"} and client.link.opened == []


@pytest.mark.parametrize(
    "error, status, kind",
    [(EngineError("queue_full", "full", 3.0), 429, "rate_limit_error"),
     (EngineError("draining", "bye"), 503, "overloaded_error"), (EngineError("internal", "no"), 500, "api_error")],
)  # fmt: skip
def test_engine_errors_have_anthropics_shape_too(here, error, status, kind):
    client = here("x")
    client.link.script = lambda request: [error]
    response = client.post(PATH, HELLO)
    assert (response.status, response.json()["error"]["type"]) == (status, kind)
    assert ("retry-after" in response.headers) == (status != 500)


def test_unknown_model_and_loading_engine(here, thinker):
    response = here("x").post(PATH, {**HELLO, "model": "nope"})
    assert (response.status, response.json()["error"]["type"]) == (404, "not_found_error")
    loading = Client("asgi", thinker, state=State("loading"))
    response = loading.post(PATH, HELLO)
    assert (response.status, response.json()["error"]["type"]) == (503, "overloaded_error")
    assert loading.post(PATH + "/count_tokens", HELLO | {"max_tokens": 1}).status == 400  # it is no field there


def test_stream_that_breaks_ends_with_an_error_event(here):
    client = here("x")
    client.link.script = lambda request: [
        Output(request.rid, 0, [70]), Output(request.rid, 0, [], "error", error="engine_lost: gone"),
    ]  # fmt: skip
    events = typed_events(client.post(PATH, {**HELLO, "stream": True}))
    assert events[-1][1]["error"]["type"] == "overloaded_error"
    assert "message_stop" not in [kind for kind, _ in events]
    assert client.post(PATH, HELLO).status == 503


def test_bug_of_ours_in_mid_stream_ends_with_an_error_event_without_details(here, monkeypatch):
    def broken(self, outputs):
        raise ValueError("secret")

    monkeypatch.setattr(MessagesGeneration, "feed", broken)
    response = here("x").post(PATH, {**HELLO, "stream": True})
    assert typed_events(response)[-1][1]["error"]["type"] == "api_error" and b"secret" not in response.body
