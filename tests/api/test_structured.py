"""What the fields for structured output come to: the grammar sent, and answers of a real engine that obey it."""

import json

import pytest

from crane.api import openai
from crane.api.constraint import response_grammar, tools_grammar
from crane.api.endpoint import Context, Request
from crane.runtime.engine import Engine
from crane.runtime.settings import Settings
from crane.runtime.types import State
from tests.api.harness import Client, speak
from tests.api.talk import CHAT, HI, NO_SPACES, ROOMY, TOOLS, called, talking

SCHEMA = {
    "type": "object",
    "properties": {"sky": {"enum": ["blue", "grey"]}},
    "required": ["sky"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "sky", "schema": SCHEMA, "strict": True}}
PAINT = {"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(params=["asgi", "wsgi"])
def sent(request, model):
    """sent(path, body) -> the SamplingParams that reach the engine."""

    def post(path, body):
        served = talking(model)
        here = Client(request.param, served, lambda r: speak(served.tokenizer, "x", r), state=ROOMY)
        response = here.post(path, body)
        assert response.status == 200, response.body
        return here.link.opened[0].sampling

    return post


SAME = {
    "response_format": (FORMAT, {"response_format": FORMAT}),
    "guided_json": (SCHEMA, {"json": SCHEMA}),
    "json_schema": (json.dumps(SCHEMA), {"json": SCHEMA}),
    "guided_regex": ("a+", {"regex": "a+"}),
    "regex": ("a+", {"regex": "a+"}),
    "guided_choice": (["yes", "no"], {"choice": ["yes", "no"]}),
    "guided_grammar": ("start: /a/", {"grammar": "start: /a/"}),
    "ebnf": ("start: /a/", {"grammar": "start: /a/"}),
    "structured_outputs": ({"choice": ["yes", "no"]}, {"choice": ["yes", "no"]}),
}


@pytest.mark.parametrize("field", SAME)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_every_dialects_field_becomes_a_grammar(sent, field, path):
    value, meaning = SAME[field]
    prompt = {"messages": HI} if path == CHAT else {"prompt": "a"}
    assert sent(path, {**prompt, field: value}).grammar == response_grammar(**meaning)


def test_text_is_free(sent):
    assert sent(CHAT, {"messages": HI, "response_format": {"type": "text"}}).grammar is None


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_forced_call_becomes_a_grammar(sent, choice):
    fields = {"messages": HI, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    assert sent(CHAT, fields).grammar == tools_grammar(TOOLS, choice, "hermes", None, False)


def test_tools_and_a_response_format_are_composed(sent):
    grammar = sent(CHAT, {"messages": HI, "tools": TOOLS, "response_format": FORMAT}).grammar
    response = response_grammar(response_format=FORMAT)
    assert grammar == tools_grammar(TOOLS, "auto", "hermes", response, True) and response not in (None, grammar)


REFUSED = [
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ({"guided_json": {"type": "object", "properties": {"a": {"type": "integ"}}}}, "guided_json.properties.a"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"ebnf": "start: nowhere"}, "ebnf"),
]


@pytest.mark.parametrize("fields, field", REFUSED, ids=[field for _, field in REFUSED])
def test_what_cannot_be_matched_is_a_400_that_says_where(model, fields, field):
    response = Client("asgi", model).post(CHAT, {"messages": HI, **fields})
    assert response.status == 400 and response.json()["error"]["param"] == field


@pytest.fixture(scope="module")
def ask(model, tiny_path):
    """ask(served, **fields) -> the one choice and the usage, of a real engine with random weights."""
    settings = Settings(model_path=str(tiny_path), cpu=True, dtype="float32", threads=1)
    engine = Engine(settings)

    def post(served, **fields):
        context = Context(settings, served, State("ready", info=engine.info))
        fields = {"messages": HI, "seed": 7, "max_tokens": 200, "logit_bias": NO_SPACES, **fields}
        body = json.dumps(fields).encode()
        generation = openai.chat_completions(context, Request("POST", CHAT, {}, {}, body))
        for request in generation.requests:
            engine.add(request)
        while not generation.finished:
            generation.feed(engine.step())
        engine.abort(None)
        answer = json.loads(generation.body())
        return answer["choices"][0], answer["usage"]

    return post


def test_an_answer_obeys_its_schema(ask, model):
    choice, _ = ask(model, response_format=FORMAT)
    assert json.loads(choice["message"]["content"])["sky"] in ("blue", "grey")
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("tags", ["tool_call", "tool_calls"])
def test_a_forced_call_is_a_call_of_that_tool(ask, model, tags):
    served = talking(model, thinks=False, tags=tags)
    choice, _ = ask(served, tools=[PAINT], tool_choice="required", parallel_tool_calls=False)
    ((name, arguments),) = called(choice)
    assert name == "paint" and arguments["sky"] in ("blue", "grey")
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None


def test_thinking_is_free_within_its_budget_and_the_answer_obeys(ask, model):
    served = talking(model, opens=True)
    choice, usage = ask(served, response_format=FORMAT, tools=[PAINT], thinking_token_budget=9)
    message = choice["message"]
    assert message["reasoning_content"]
    if message["content"] is None:
        assert called(choice)[0][0] == "paint"
    else:
        assert json.loads(message["content"])["sky"] in ("blue", "grey")
    num_reasoning = usage["completion_tokens_details"]["reasoning_tokens"]
    num_mark = len(model.tokenizer.encode("</think>", False))
    assert 9 <= num_reasoning <= 9 + num_mark < usage["completion_tokens"]
