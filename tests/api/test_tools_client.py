"""Tools, schemas and reasoning through the real openai client, a real server and an engine with a tiny model."""

from typing import Literal

import openai
import pydantic
import pytest

from tests.api.talk import NO_SPACES, talking
from tests.serving import start_server
from tests.tiny import make_tiny

OFF = {"chat_template_kwargs": {"enable_thinking": False}}
PLAIN = {"model": "org/tiny", "extra_body": OFF, "logit_bias": NO_SPACES}
CHAT = [{"role": "user", "content": "Paint it"}]


class paint(pydantic.BaseModel):
    """Paint the sky."""

    model_config = pydantic.ConfigDict(extra="forbid")
    color: Literal["blue", "grey"]


class Sky(pydantic.BaseModel):
    """What the sky is like."""

    color: Literal["blue", "grey"]
    clouds: Literal[0, 1, 2]


@pytest.fixture(scope="module")
def client(tmp_path_factory, model):
    folder = make_tiny(tmp_path_factory.mktemp("tools") / "m", "qwen2")
    (folder / "chat_template.jinja").write_text(talking(model).template.source)
    with start_server(folder, env={"CRANE_MODEL_NAME": "org/tiny"}) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
            yield made


def test_a_parsed_answer_has_its_class(client):
    done = client.chat.completions.parse(messages=CHAT, response_format=Sky, **PLAIN)
    sky = done.choices[0].message.parsed
    assert isinstance(sky, Sky)


def test_a_streamed_call_is_parsed_and_its_result_goes_back(client):
    tools = [openai.pydantic_function_tool(paint)]
    fields = {**PLAIN, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    with client.chat.completions.stream(messages=CHAT, **fields) as stream:
        kinds = {event.type for event in stream}
        done = stream.get_final_completion()
    message = done.choices[0].message
    (call,) = message.tool_calls
    assert isinstance(call.function.parsed_arguments, paint) and done.choices[0].finish_reason == "tool_calls"
    assert "tool_calls.function.arguments.done" in kinds
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    for sent in (message, message.to_dict()):
        messages = [*CHAT, sent, result]
        reply = client.chat.completions.create(model="org/tiny", messages=messages, tools=tools, max_tokens=4)
        assert reply.usage.completion_tokens <= 4


def test_reasoning_is_counted_and_named(client):
    done = client.chat.completions.create(
        model="org/tiny",
        messages=CHAT,
        extra_body={"guided_choice": ["yes", "no"], **OFF},
    )
    assert done.choices[0].message.content in ("yes", "no")
    assert done.choices[0].message.reasoning_content is None
    assert done.usage.completion_tokens_details.reasoning_tokens == 0
