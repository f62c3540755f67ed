"""Tools in chat completions: what the model is shown, and the calls that come back."""

import dataclasses
import json

import pytest

from crane.api.chat_parser import ChatForm, chat_form
from crane.api.served import ServedModel
from crane.models.chat import ChatTemplate
from crane.runtime.settings import Settings
from crane.runtime.types import TokenLogprob
from tests.api.harness import Client, speak
from tests.api.talk import CHAT, HI, NOW, ROOMY, TAGS, TOOLS, answer, called, talking, with_special_tags
from tests.tiny import make_tiny, special_id

EOS = special_id("<|im_end|>")
CALL = '{"name": "weather", "arguments": {"city": "Paris"}}'


@pytest.fixture(params=["asgi", "wsgi"])
def ask(request, model):
    """ask(text, **fields) -> the client, and the one choice of a model with tools that says `text`."""

    def post(text, *, served=None, finish="stop", eos=EOS, entry=None, **fields):
        served = served or talking(model, thinks=False)

        def script(wanted):
            return speak(served.tokenizer, text, wanted, finish=finish, eos=eos, logprobs=entry)

        here = Client(request.param, served, script, state=ROOMY)
        response = here.post(CHAT, {"messages": HI, "tools": TOOLS, **fields})
        assert response.status == 200, response.body
        here.response = response
        return here, answer(response)

    return post


STREAM = pytest.mark.parametrize("stream", [False, True])


@STREAM
def test_a_call_has_openais_shape_and_null_content(ask, stream):
    _, choice = ask(f"<tool_call>\n{CALL}\n</tool_call>", stream=stream)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_") and len(call["id"]) == 29
    assert call == {
        "id": call["id"],
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
    }


@STREAM
def test_bare_json_of_a_known_tool_is_a_call(ask, stream):
    _, choice = ask(CALL, stream=stream)
    assert called(choice) == [("weather", {"city": "Paris"})] and choice["message"]["content"] is None


@STREAM
def test_text_and_several_calls_come_apart_without_markup(ask, stream):
    second = '{"name": "now", "arguments": {}}'
    text = f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{second}\n</tool_call>"
    _, choice = ask(text, stream=stream)
    assert choice["message"]["content"] == "Let me see."
    assert called(choice) == [("weather", {"city": "Paris"}), ("now", {})]
    ids = [call["id"] for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 2


@STREAM
def test_hunyuans_form_is_read(ask, model, stream):
    served = talking(model, thinks=False, tags="tool_calls")
    _, choice = ask(f"<tool_calls>[{CALL}]</tool_calls>", served=served, stream=stream)
    assert called(choice) == [("weather", {"city": "Paris"})]


def test_arguments_are_streamed_as_they_come(ask):
    here, _ = ask(f"<tool_call>\n{CALL}\n</tool_call>", stream=True)
    deltas = [c["choices"][0]["delta"] for c in here.response.data()[:-1]]
    pieces = [d["tool_calls"][0]["function"]["arguments"] for d in deltas if d.get("tool_calls")]
    assert pieces[0] == "" and len(pieces) > 3 and "".join(pieces) == '{"city": "Paris"}'
    assert all("<" not in d.get("content", "") for d in deltas)


@STREAM
def test_a_cut_call_ends_by_length(ask, stream):
    text = f"<tool_call>{CALL}</tool_call><tool_call>" + CALL[:-9]
    _, choice = ask(text, stream=stream, finish="length", eos=None)
    assert choice["finish_reason"] == "length"
    if not stream:
        assert called(choice) == [("weather", {"city": "Paris"})]  # the incomplete one is dropped


def test_one_call_at_a_time_ends_the_request_after_the_first(ask):
    text = f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call> and more"
    here, choice = ask(text, parallel_tool_calls=False)
    assert len(called(choice)) == 1 and choice["finish_reason"] == "tool_calls"
    request = here.link.opened[0]
    usage = here.response.json()["usage"]["completion_tokens"]
    assert usage < len(talked(here, text)) and here.link.closed == [request.rid]


def talked(here, text):
    return here.model.tokenizer.encode(text, add_special_tokens=False)


def prompt(here) -> str:
    return here.model.tokenizer.decode(here.link.opened[0].prompt_ids, skip_special_tokens=False)


def test_the_template_is_given_the_tools_as_they_are(ask):
    here, _ = ask("x")
    first, second = (json.dumps(tool) for tool in TOOLS)
    assert prompt(here).startswith(f"T:{first}{second}\n<|im_start|>user")


def test_choice_none_shows_no_tools_and_reads_no_calls(ask):
    here, choice = ask(CALL, tool_choice="none")
    assert prompt(here).startswith("<|im_start|>user")
    assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"


def test_allowed_tools_are_the_only_ones_shown(ask):
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]}
    here, choice = ask(CALL, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert prompt(here).startswith(f"T:{json.dumps(NOW)}\n<|im_start|>user")
    assert choice["message"]["content"] == CALL  # bare, and not of an allowed tool


def test_results_go_into_the_next_turn_with_arguments_parsed_once(ask):
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
            {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": ""}},
        ]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "noon"}]},
    ]  # fmt: skip
    here, _ = ask("x", messages=messages)
    assert (
        f'<|im_start|>assistant\n<tool_call>{CALL}</tool_call><tool_call>{{"name": "now", "arguments": {{}}}}'
        "</tool_call><|im_end|>\n<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>tool\nnoon<|im_end|>\n"
    ) in prompt(here)


@STREAM
def test_logprobs_cover_every_token_also_of_calls(ask, stream):
    text = f"<tool_call>\n{CALL}\n</tool_call>"
    here, _ = ask(text, entry=lambda token_id: TokenLogprob(-0.5), logprobs=True, stream=stream)
    if stream:
        parts = [chunk["choices"][0]["logprobs"] for chunk in here.response.data()[:-1]]
        content = [item for part in parts if part for item in part["content"]]
    else:
        content = here.response.json()["choices"][0]["logprobs"]["content"]
    raw = b"".join(bytes(item["bytes"]) for item in content)
    assert raw.decode() == text + "<|im_end|>"


def test_tags_that_are_special_tokens_reach_the_parser_and_no_other_does(ask, tmp_path):
    served = with_special_tags(make_tiny(tmp_path / "m", "qwen2"), TAGS)
    served = talking(served)
    ids = served.tokenizer.encode(f"<think>a</think><tool_call>{CALL}</tool_call>", False)
    assert len(served.special_text.findall("<think><tool_call>")) == 2 and served.tokenizer.special_ids & set(ids)
    text = f"<think>a</think>b<|im_start|><tool_call>{CALL}</tool_call>"
    _, choice = ask(text, served=served)
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("a", "b")
    assert called(choice) == [("weather", {"city": "Paris"})]


REFUSED = [
    ({"tools": [NOW, NOW]}, "tools[1].function.name"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
    ({"functions": [NOW["function"]]}, "functions"),
    ({"messages": [*HI, {"role": "function", "name": "now", "content": "noon"}]}, "messages[1].role"),
    ({"messages": [*HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]}]},
     "messages"),
]  # fmt: skip


@pytest.mark.parametrize("fields, field", REFUSED, ids=[json.dumps(fields)[:70] for fields, _ in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_name(model, fields, field):
    response = Client("asgi", talking(model)).post(CHAT, {"messages": HI, **fields})
    assert response.status == 400 and response.json()["error"]["param"] == field


def test_a_template_without_tools_refuses_them(model):
    response = Client("asgi", model).post(CHAT, {"messages": HI, "tools": TOOLS})
    assert response.status == 400 and response.json()["error"]["param"] == "tools"


def test_tokenize_counts_the_tools_too(model):
    here = Client("wsgi", talking(model))
    bare = here.post("/v1/tokenize", {"messages": HI}).json()
    full = here.post("/v1/tokenize", {"messages": HI, "tools": TOOLS}).json()
    assert full["count"] > bare["count"]


def test_real_templates_tell_the_form_of_their_answers(model, qwen_coder, qwen3_tokenizer):
    coder = ServedModel.load(Settings(model_path=str(qwen_coder)))
    assert chat_form(coder) == ChatForm(thinks=False, takes_tools=True, tools="hermes")
    source = json.loads((qwen3_tokenizer / "tokenizer_config.json").read_text())["chat_template"]
    qwen3 = dataclasses.replace(model, template=ChatTemplate(source, {}))
    assert chat_form(qwen3) == ChatForm(thinks=True, takes_tools=True, tools="hermes")


def test_qwens_own_template_shows_tools_and_results(qwen_coder):
    here = Client("wsgi", ServedModel.load(Settings(model_path=str(qwen_coder))), state=ROOMY)
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]  # fmt: skip
    body = here.post(CHAT + "/render", {"messages": messages, "tools": [NOW]}).json()
    assert f"<tools>\n{json.dumps(NOW)}\n</tools>" in body["prompt"]
    assert '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>' in body["prompt"]
    assert "<tool_response>\nnoon\n</tool_response>" in body["prompt"]
    infill = {"prompt": "a = ", "suffix": "\nb = 2", "max_tokens": 4}
    here.link.script = lambda request: speak(here.model.tokenizer, "1", request)
    assert here.post("/v1/completions", infill).status == 200
    prompt_text = here.model.tokenizer.decode(here.link.opened[0].prompt_ids, skip_special_tokens=False)
    assert prompt_text == "<|fim_prefix|>a = <|fim_suffix|>\nb = 2<|fim_middle|>"
