"""Reasoning in chat completions: where it comes out, what it counts, how it is steered."""

import pytest

from crane.runtime.settings import Settings
from crane.runtime.types import TokenLogprob
from tests.api.harness import Client, speak
from tests.api.talk import CHAT, HI, ROOMY, answer, talking
from tests.tiny import special_id

EOS = special_id("<|im_end|>")
THOUGHT = "<think>\nTwo and two.\n</think>\n\nFour."
STREAM = pytest.mark.parametrize("stream", [False, True])


@pytest.fixture(params=["asgi", "wsgi"])
def ask(request, model):
    """ask(text, **fields) -> the client, after one request to a model that thinks says `text`."""

    def post(text, *, served=None, settings=None, finish="stop", eos=EOS, entry=None, **fields):
        served = served or talking(model)

        def script(wanted):
            return speak(served.tokenizer, text, wanted, finish=finish, eos=eos, logprobs=entry)

        here = Client(request.param, served, script, state=ROOMY, settings=settings)
        here.response = here.post(CHAT, {"messages": HI, **fields})
        assert here.response.status == 200, here.response.body
        return here

    return post


def prompt(here) -> str:
    return here.model.tokenizer.decode(here.link.opened[0].prompt_ids, skip_special_tokens=False)


@STREAM
def test_reasoning_comes_apart_from_content(ask, stream):
    message = answer(ask(THOUGHT, stream=stream).response)["message"]
    assert (message["reasoning_content"], message["content"]) == ("Two and two.", "Four.")
    assert "reasoning" not in message


@STREAM
def test_both_names_are_given_where_the_setting_says_so(ask, stream):
    message = answer(ask(THOUGHT, settings=Settings(reasoning_field="both"), stream=stream).response)["message"]
    assert message["reasoning"] == message["reasoning_content"] == "Two and two."


def test_every_delta_of_a_model_that_thinks_has_the_field(ask):
    *chunks, _ = ask(THOUGHT, stream=True).response.data()
    assert all("reasoning_content" in chunk["choices"][0]["delta"] for chunk in chunks)
    here = ask("Four.")
    assert here.response.json()["choices"][0]["message"]["reasoning_content"] is None


def test_a_model_that_does_not_think_has_no_such_field(ask, model):
    here = ask(THOUGHT, served=talking(model, thinks=False))
    message = here.response.json()["choices"][0]["message"]
    assert "reasoning_content" not in message and message["content"] == THOUGHT
    assert here.link.opened[0].sampling.thinking is None


@STREAM
def test_reasoning_tokens_are_counted(ask, stream):
    options = {"stream_options": {"include_usage": True}} if stream else {}
    here = ask(THOUGHT, stream=stream, **options)
    usage = here.response.data()[-2]["usage"] if stream else here.response.json()["usage"]
    num_reasoning = usage["completion_tokens_details"]["reasoning_tokens"]
    tokenizer = here.model.tokenizer
    least = len(tokenizer.encode("Two and two.", False))
    most = len(tokenizer.encode(THOUGHT.removesuffix("Four."), False))
    assert least <= num_reasoning <= most < usage["completion_tokens"]


@STREAM
def test_a_prompt_that_opens_the_section_is_continued_inside_it(ask, model, stream):
    here = ask("Hm.\n</think>\n\nYes", served=talking(model, opens=True), stream=stream)
    assert prompt(here).endswith("<think>\n")
    message = answer(here.response)["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes")
    assert here.link.opened[0].sampling.thinking.open


@STREAM
def test_an_answer_cut_while_thinking_is_all_reasoning(ask, stream):
    choice = answer(ask("<think>\nHm, well", finish="length", eos=None, stream=stream).response)
    assert choice["message"]["reasoning_content"] == "Hm, well" and choice["message"]["content"] == ""
    assert choice["finish_reason"] == "length"


def test_thinking_is_switched_off_by_kwargs_or_effort_none(ask):
    for fields in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        here = ask("Four.", **fields)
        assert prompt(here).endswith("<think>\n\n</think>\n\n")
        assert here.link.opened[0].sampling.thinking is None


def test_effort_and_budget_limit_the_section(ask):
    def thinking(**fields):
        return ask(THOUGHT, **fields).link.opened[0].sampling.thinking

    free = thinking()
    encode = lambda text: tuple(ask("x").model.tokenizer.encode(text, False))  # noqa: E731
    assert (free.start_ids, free.end_ids) == (encode("<think>"), encode("</think>"))
    assert free.max_tokens is None and not free.open
    assert thinking(reasoning_effort="low").max_tokens == 2048
    assert thinking(reasoning_effort="high").max_tokens is None
    assert thinking(reasoning_effort="low", thinking_token_budget=7).max_tokens == 7
    assert thinking(reasoning_budget_tokens=0).max_tokens == 0
    assert thinking(reasoning_budget_tokens=-1).max_tokens is None


@STREAM
def test_reasoning_is_left_out_on_request(ask, stream):
    message = answer(ask(THOUGHT, include_reasoning=False, stream=stream).response)["message"]
    assert not message.get("reasoning_content") and message["content"] == "Four."


@STREAM
def test_logprobs_cover_reasoning_and_held_back_tags(ask, stream):
    here = ask(THOUGHT, entry=lambda token_id: TokenLogprob(-0.5), logprobs=True, stream=stream)
    if stream:
        parts = [chunk["choices"][0]["logprobs"] for chunk in here.response.data()[:-1]]
        content = [item for part in parts if part for item in part["content"]]
    else:
        content = here.response.json()["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(item["bytes"]) for item in content).decode() == THOUGHT + "<|im_end|>"


def test_past_reasoning_reaches_the_template_under_either_name(ask):
    for name in ("reasoning_content", "reasoning"):
        messages = [*HI, {"role": "assistant", "content": "Four.", name: "Two"}, *HI]
        assert "<think>Two</think>Four." in prompt(ask("x", messages=messages))


def test_a_final_message_that_thinks_is_continued_as_reasoning(ask):
    messages = [*HI, {"role": "assistant", "content": "<think>\nTwo and"}]
    here = ask(" two.</think>Four.", messages=messages, continue_final_message=True)
    message = answer(here.response)["message"]
    assert (message["reasoning_content"], message["content"]) == ("two.", "Four.")
    messages[-1]["content"] = "It is"
    here = ask(" four.", messages=messages, continue_final_message=True)
    assert answer(here.response)["message"]["content"] == " four."
    assert here.link.opened[0].sampling.thinking is None


def test_contradictions_are_refused(model):
    here = Client("asgi", talking(model), state=ROOMY)
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    for fields, field in (
        ({"reasoning_effort": "high", **off}, "reasoning_effort"),
        ({"thinking_token_budget": 3, "reasoning_budget_tokens": 4}, "reasoning_budget_tokens"),
    ):
        response = here.post(CHAT, {"messages": HI, **fields})
        assert response.status == 400 and response.json()["error"]["param"] == field
