"""POST /v1/responses and its stored responses: prompts, items, events, and what the next turn remembers."""

import json

import pytest

from crane.api import response_store
from crane.api.response_store import ResponseStore
from crane.runtime import launch
from crane.runtime.settings import Settings
from crane.runtime.types import Output, TokenLogprob
from tests.api.harness import Client
from tests.api.thinker import ROOMY, prompt_text, says, thinking_model, typed_events

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "weather", "description": "Tells it.", "strict": False,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}  # fmt: skip
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
EVERYTHING = f"<think>\nHe wants weather.\n</think>\n\nLet me look.\n{CALL}"


@pytest.fixture(autouse=True)
def run_dir(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "run_dir", lambda: tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def thinker(model):
    return thinking_model(model)


@pytest.fixture(params=["asgi", "wsgi"])
def here(request, thinker):
    """here(text, **options) -> a client whose engine says `text`. settings: of the app."""

    def make(text, settings=None, **options):
        return Client(request.param, thinker, says(thinker, text, **options), state=ROOMY, settings=settings)

    return make


def test_reply_has_openais_shape(here):
    client = here("The sky is blue.")
    response = client.post(PATH, {"model": "org/tiny", "input": "Hi", "metadata": {"a": "b"}, "user": "u"})
    assert response.status == 200, response.body
    body = response.json()
    usage = body.pop("usage")
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 5
    assert usage["input_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 0}
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}
    assert body.pop("id") == client.link.opened[0].rid
    assert body.pop("completed_at") >= body.pop("created_at") > 0
    (item,) = body.pop("output")
    assert item.pop("id").startswith("msg_")
    part = {"type": "output_text", "text": "The sky is blue.", "annotations": [], "logprobs": []}
    assert item == {"type": "message", "status": "completed", "role": "assistant", "content": [part]}
    sampling = client.link.opened[0].sampling
    assert body == {
        "object": "response", "status": "completed", "error": None, "incomplete_details": None, "model": "org/tiny",
        "instructions": None, "max_output_tokens": None, "max_tool_calls": None, "previous_response_id": None,
        "user": "u", "safety_identifier": None, "prompt_cache_key": None, "prompt_cache_retention": None,
        "metadata": {"a": "b"}, "parallel_tool_calls": True, "temperature": sampling.temperature,
        "top_p": sampling.top_p, "top_logprobs": 0, "tools": [], "tool_choice": "auto",
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "reasoning": {"effort": None, "summary": None},
        "truncation": "disabled", "service_tier": "default", "background": False, "store": True,
    }  # fmt: skip
    assert sampling.max_tokens == 4096 - len(client.link.opened[0].prompt_ids)


def test_reasoning_text_and_calls_are_items_of_their_own(here):
    fields = {"input": "Rome?", "tools": [TOOL], "reasoning": {"effort": "low"}}
    fields["include"] = ["reasoning.encrypted_content"]
    body = here(EVERYTHING).post(PATH, fields).json()
    reasoning, message, call = body["output"]
    assert reasoning["type"] == "reasoning" and reasoning["summary"] == []
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "He wants weather."}]
    assert bytes.fromhex(reasoning["encrypted_content"]) == b"He wants weather."
    assert message["content"][0]["text"] == "Let me look."
    assert call["type"] == "function_call" and call["call_id"].startswith("call_")
    assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Rome"})
    assert body["status"] == "completed" and body["usage"]["output_tokens_details"]["reasoning_tokens"] > 3
    assert len({item["id"] for item in body["output"]}) == 3


def test_stream_tells_each_item_from_beginning_to_end(here):
    response = here(EVERYTHING).post(PATH, {"input": "Rome?", "tools": [TOOL], "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream") and b"[DONE]" not in response.body
    events = typed_events(response)
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    kinds = [kind.removeprefix("response.") for kind, _ in events]
    once = [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]
    assert once == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    added = [data["item"] for kind, data in events if kind.endswith("output_item.added")]
    done = [data["item"] for kind, data in events if kind.endswith("output_item.done")]
    final = events[-1][1]["response"]
    assert final["output"] == done and [item["id"] for item in added] == [item["id"] for item in done]
    assert {item["status"] for item in added} == {"in_progress"} and final["status"] == "completed"
    assert events[0][1]["response"]["output"] == [] and events[0][1]["response"]["usage"] is None
    for kind, whole in (("output_text", "text"), ("reasoning_text", "text"), ("function_call_arguments", "arguments")):
        pieces = [data["delta"] for name, data in events if name == f"response.{kind}.delta"]
        (end,) = [data for name, data in events if name == f"response.{kind}.done"]
        assert "".join(pieces) == end[whole] != ""


def test_input_items_become_the_templates_turns(here, thinker):
    items = [
        {"role": "user", "content": "Rome?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Look."}]},
        {"type": "message", "role": "assistant", "id": "m", "status": "completed",
         "content": [{"type": "output_text", "text": "One moment.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "And?"}]},
        {"type": "reasoning", "summary": [], "encrypted_content": b"Hm.".hex()},
        {"role": "assistant", "content": "Well."},
        {"role": "assistant", "content": "Indeed."},
    ]  # fmt: skip
    client = here("x")
    response = client.post(PATH, {"input": items, "instructions": "Be brief."})
    assert response.status == 200, response.body
    assert prompt_text(thinker, client.link.opened[0]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nRome?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nLook.\n</think>\n\nOne moment."
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>sun</tool_response><|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nHm.\n</think>\n\nWell.<|im_end|>\n<|im_start|>assistant\nIndeed.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_previous_response_is_remembered_but_not_its_instructions(here, thinker):
    client = here(EVERYTHING)
    first = client.post(PATH, {"input": "Rome?", "tools": [TOOL], "instructions": "Be brief."}).json()
    output = [{"type": "function_call_output", "call_id": first["output"][2]["call_id"], "output": "sun"}]
    second = client.post(PATH, {"input": output, "previous_response_id": first["id"]}).json()
    assert second["previous_response_id"] == first["id"]
    text = prompt_text(thinker, client.link.opened[1])
    assert text.startswith("<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\n<think>\nHe wants weather.")
    assert "Be brief" not in text and "<tool_response>sun</tool_response>" in text
    third = client.post(PATH, {"input": "And?", "previous_response_id": second["id"], "stream": True})
    assert third.status == 200
    items = client.get(f"{PATH}/{typed_events(third)[-1][1]['response']['id']}/input_items?order=asc").json()["data"]
    assert [item["type"] for item in items] == [
        "message", "reasoning", "message", "function_call", "function_call_output",
        "reasoning", "message", "message",
    ]  # fmt: skip


def test_stored_response_can_be_read_listed_and_deleted(here):
    client = here("Yes")
    made = client.post(PATH, {"input": [{"role": "user", "content": letter} for letter in "abc"]}).json()
    path = f"{PATH}/{made['id']}"
    assert client.get(path).json() == made
    page = client.get(f"{path}/input_items?limit=2").json()
    assert [item["content"] for item in page["data"]] == ["c", "b"] and page["has_more"] is True
    assert (page["first_id"], page["last_id"]) == tuple(item["id"] for item in page["data"])
    page = client.get(f"{path}/input_items?limit=2&after={page['last_id']}").json()
    assert [item["content"] for item in page["data"]] == ["a"] and page["has_more"] is False
    refused = client.post(f"{path}/cancel", {})
    assert refused.status == 400 and "completed" in refused.json()["error"]["message"]
    assert client.request("DELETE", path).json() == {"id": made["id"], "object": "response", "deleted": True}
    for method, where in (("GET", path), ("DELETE", path), ("POST", f"{path}/cancel"), ("GET", f"{path}/input_items")):
        assert client.request(method, where).status == 404
    again = client.post(PATH, {"input": "x", "previous_response_id": made["id"]})
    assert again.status == 400 and again.json()["error"]["code"] == "previous_response_not_found"


def test_a_response_of_another_tenant_is_not_there(here, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("sk-1 name=a\nsk-2 name=a\nsk-3 name=b\n")
    client = here("Yes", settings=Settings(api_key_file=str(keys)))
    bearers = [{"authorization": f"Bearer sk-{i}"} for i in (1, 2, 3)]
    made = client.post(PATH, {"input": "x"}, headers=bearers[0]).json()
    path, turn = f"{PATH}/{made['id']}", {"input": "y", "previous_response_id": made["id"]}
    for method, where in (("GET", path), ("DELETE", path), ("POST", f"{path}/cancel"), ("GET", f"{path}/input_items")):
        assert client.request(method, where, headers=bearers[2]).status == 404
    for where in (PATH, f"{PATH}/input_tokens"):
        refused = client.post(where, turn, headers=bearers[2])
        assert refused.status == 400 and refused.json()["error"]["code"] == "previous_response_not_found"
    assert client.get(path, headers=bearers[1]).json() == made  # the other key of its tenant
    assert client.post(PATH, turn, headers=bearers[1]).status == 200


@pytest.mark.parametrize(
    "query, param", [("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=x", "after")]
)
def test_bad_list_query_is_a_400_that_names_it(here, query, param):
    client = here("Yes")
    made = client.post(PATH, {"input": "x"}).json()
    response = client.get(f"{PATH}/{made['id']}/input_items?{query}")
    assert (response.status, response.json()["error"]["param"]) == (400, param)


def test_what_is_not_to_be_stored_is_not(here, run_dir):
    client = here("Yes")
    made = client.post(PATH, {"input": "x", "store": False}).json()
    assert made["store"] is False and list(run_dir.iterdir()) == []
    off = here("Yes", settings=Settings(response_store=0))
    assert off.post(PATH, {"input": "x"}).json()["store"] is False and list(run_dir.iterdir()) == []
    response = off.post(PATH, {"input": "x", "store": True})
    assert (response.status, response.json()["error"]["param"]) == (400, "store")


def test_answer_that_was_cut_is_incomplete(here):
    body = here("The sky", finish="length", eos=None).post(PATH, {"input": "x", "max_output_tokens": 5}).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete" and body["completed_at"] is None
    response = here("The sky", finish="length", eos=None).post(PATH, {"input": "x", "stream": True})
    assert typed_events(response)[-1][0] == "response.incomplete"


def test_stream_that_breaks_ends_with_a_failed_response(here):
    client = here("x")
    client.link.script = lambda request: [
        Output(request.rid, 0, [70]), Output(request.rid, 0, [], "error", error="engine_lost: gone"),
    ]  # fmt: skip
    kind, data = typed_events(client.post(PATH, {"input": "x", "stream": True}))[-1]
    assert kind == "response.failed" and data["response"]["status"] == "failed"
    assert data["response"]["error"]["code"] == "server_error"
    assert client.get(f"{PATH}/{data['response']['id']}").json()["status"] == "failed"
    assert client.post(PATH, {"input": "x"}).status == 503


def test_logprobs_of_the_text_when_included(here):
    fields = {"input": "x", "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    options = {"logprobs": lambda token_id: TokenLogprob(-0.5, [token_id], [-0.5])}
    body = here("The sky", **options).post(PATH, fields).json()
    logprobs = body["output"][0]["content"][0]["logprobs"]
    assert "".join(each["token"] for each in logprobs).startswith("The sky")
    assert all(len(each["top_logprobs"]) == 1 and each["logprob"] == -0.5 for each in logprobs)
    events = typed_events(here("The sky", **options).post(PATH, {**fields, "stream": True}))
    streamed = [each for kind, data in events if kind.endswith("text.delta") for each in data["logprobs"]]
    assert streamed == logprobs[: len(streamed)] and len(streamed) > 1


def test_schema_and_forced_tool_reach_the_engine_as_a_grammar(here):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    client = here('{"a": 1}')
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    body = client.post(PATH, {"input": "x", "text": {"format": form}}).json()
    assert client.link.opened[0].sampling.grammar and body["output"][0]["content"][0]["text"] == '{"a": 1}'
    assert body["text"]["format"] == form
    forced = {"tools": [TOOL], "tool_choice": {"type": "function", "name": "weather"}}
    assert client.post(PATH, {"input": "x", **forced}).json()["tool_choice"] == forced["tool_choice"]
    assert "weather" in client.link.opened[1].sampling.grammar
    bad = {**form, "schema": {"type": "object", "properties": {"a": {"type": "nothing"}}}}
    response = client.post(PATH, {"input": "x", "text": {"format": bad}})
    assert response.status == 400 and response.json()["error"]["param"].startswith("text.format")


def test_truncation_auto_leaves_out_the_oldest_turns(here, thinker):
    items = [{"role": "user", "content": f"{i} " + "word " * 300} for i in range(9)]
    fields = {"input": items, "instructions": "Be brief.", "max_output_tokens": 10}
    client = here("x")
    refused = client.post(PATH, fields)
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert refused.json()["error"]["param"] == "input" and refused.headers["x-should-retry"] == "false"
    assert client.post(PATH, {**fields, "truncation": "auto"}).status == 200
    text = prompt_text(thinker, client.link.opened[0])
    assert "Be brief." in text and "\n8 word" in text and "\n0 word" not in text
    kept = text.count("<|im_start|>user")
    one_more = len(client.link.opened[0].prompt_ids) * (kept + 1) / kept
    assert one_more > 4096
    assert client.post(PATH, {**fields, "input": "word " * 4000, "truncation": "auto"}).status == 400


def test_input_tokens_are_counted_as_the_engine_would_get_them(here):
    client = here("x")
    fields = {"input": "Hi", "instructions": "Be brief.", "tools": [TOOL]}
    counted = client.post(f"{PATH}/input_tokens", fields).json()
    client.post(PATH, fields)
    num_prompt = len(client.link.opened[0].prompt_ids)
    assert counted == {"object": "response.input_tokens", "input_tokens": num_prompt}


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "critic", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "n"}]}, "input[0].arguments"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}]}, "input[0].encrypted_content"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"stream_options": {}}, "stream_options"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
        ({"n": 2}, "n"),
    ],
)
def test_bad_field_is_a_400_that_names_it(here, fields, param):
    client = here("x")
    response = client.post(PATH, {"input": "x", **fields})
    assert (response.status, response.json()["error"]["param"]) == (400, param), response.body
    assert client.link.opened == []


def test_allowed_tools_are_the_only_ones_shown(here, thinker):
    client = here("x")
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}
    fields = {"input": "x", "tools": [TOOL, {**TOOL, "name": "news"}], "tool_choice": choice}
    body = client.post(PATH, fields).json()
    text = prompt_text(thinker, client.link.opened[0])
    assert '"weather"' in text and '"news"' not in text
    assert body["tool_choice"] == choice and [tool["name"] for tool in body["tools"]] == ["weather", "news"]


def test_store_is_bounded_by_bytes_and_by_number(tmp_path, monkeypatch):
    store = ResponseStore(tmp_path / "s", 1000)
    for i in range(20):
        store.put(f"r{i}", "", b"x" * 100)
    assert [i for i in range(20) if store.get(f"r{i}", "")] == list(range(10, 20))
    store.put("large", "", b"x" * 1001)
    assert store.get("large", "") is None and store.get("r19", "")
    monkeypatch.setattr(response_store, "MAX_RECORDS", 3)
    store.put("r20", "", b"y")
    assert [i for i in range(21) if store.get(f"r{i}", "")] == [18, 19, 20]
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0


def test_store_that_is_broken_fails_reads_but_no_answers(here, run_dir):
    client = here("Yes")
    made = client.post(PATH, {"input": "x"}).json()
    (path,) = run_dir.iterdir()
    path.write_bytes(b"not a database" * 100)
    assert client.get(f"{PATH}/{made['id']}").status == 500
    assert client.post(PATH, {"input": "x"}).status == 200
