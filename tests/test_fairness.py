"""Keys, classes, time limits and plans on a whole server with a tiny real model, under both drivers."""

import contextlib
import http.client
import json
import urllib.parse

import pytest

from tests.serving import start_server, wait_for
from tests.tiny import make_tiny

LONG = {"prompt": "a b c", "max_tokens": 400, "ignore_eos": True, "temperature": 0, "stream": True}
SHORT = {"prompt": "x y z", "max_tokens": 3, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module", params=["asgi", "gthread"])
def server(tmp_path_factory, request):
    tiny = make_tiny(tmp_path_factory.mktemp("fair") / "tiny", "qwen2", max_position=1024)
    way = ("-k", "gthread", "--threads", "100") if request.param == "gthread" else ()
    env = {"CRANE_API_KEY": "sk-a,sk-b", "CRANE_MAX_CONCURRENT": "4", "CRANE_DTYPE": "float32"}
    with start_server(tiny, *way, env=env) as server:
        yield server


class Call:
    """One request with a key, sent at once; `answer` waits for all of it."""

    def __init__(self, server, path, body=None, key="sk-a"):
        self._connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=60)
        method = "GET" if body is None else "POST"
        self._connection.request(method, path, body and json.dumps(body), {"authorization": f"Bearer {key}"})

    def answer(self) -> tuple[int, dict]:
        response = self._connection.getresponse()
        with contextlib.closing(self._connection):
            return response.status, json.load(response)

    def leave(self):
        self._connection.close()


def stats(server) -> dict:
    return Call(server, "/v1/stats").answer()[1]


def num_live(server) -> int:
    now = stats(server)
    return now["waiting_sequences"] + now["active_sequences"]


# While it waits for all of the flood to have a turn the engine makes 56 x 16 tokens; for a quantum, 4 x 16.
FEW_TOKENS = 450


@pytest.fixture
def flood(server):
    """60 long requests of key a: 56 of them wait for their turns."""
    calls = [Call(server, "/v1/completions", LONG) for _ in range(60)]
    wait_for(lambda: num_live(server) == 60)
    yield calls
    for call in calls:
        call.leave()
    wait_for(lambda: num_live(server) == 0)
    after = stats(server)
    assert after["free_pages"] == after["num_pages"]


def test_another_keys_first_request_does_not_wait_for_the_flood(server, flood):
    before = stats(server)["generated_tokens"]
    status, answer = Call(server, "/v1/completions", SHORT, "sk-b").answer()
    assert status == 200 and answer["usage"]["completion_tokens"] == 3
    assert stats(server)["generated_tokens"] - before < FEW_TOKENS


def test_an_urgent_request_of_the_flooding_key_goes_first(server, flood):
    before = stats(server)["generated_tokens"]
    status, _ = Call(server, "/v1/completions", {**SHORT, "priority": -1}).answer()
    assert status == 200 and stats(server)["generated_tokens"] - before < FEW_TOKENS


def test_a_flood_is_shown_by_class_and_a_plan_tells_what_it_means(server, flood):
    lowest = Call(server, "/v1/completions", {**LONG, "priority": 7})
    wait_for(lambda: stats(server)["waiting_by_priority"].get("7") == 1)
    response = Call(server, "/metrics")
    response._connection.sock.settimeout(20)
    text = response._connection.getresponse().read().decode()
    assert 'crane:num_requests_waiting_by_priority{model_name="tiny",priority="7"} 1.0' in text
    lowest.leave()
    plans = {}
    for name, key, priority in (("behind", "sk-a", 0), ("urgent", "sk-a", -5), ("other", "sk-b", 0)):
        status, plans[name] = Call(server, "/v1/plan", {**SHORT, "priority": priority}, key).answer()
        assert status == 200 and plans[name]["fits"], plans[name]
    assert plans["behind"]["queue_position"] > 10 > 2 > plans["urgent"]["queue_position"] == 0
    assert plans["other"]["queue_position"] <= 2
    assert plans["behind"]["wait_s"] > plans["other"]["wait_s"] > 0
    assert plans["behind"]["first_token_s"] > plans["behind"]["wait_s"]


def test_a_time_limit_ends_what_waits_with_504_and_what_runs_with_what_there_is(server, flood):
    status, answer = Call(server, "/v1/completions", {**SHORT, "priority": 9, "timeout_s": 0.001}).answer()
    assert (status, answer["error"]["code"]) == (504, "timeout")
    body = {**LONG, "max_tokens": 900, "stream": False, "priority": -9, "timeout_s": 0.2}
    status, answer = Call(server, "/v1/completions", body).answer()
    choice, usage = answer["choices"][0], answer["usage"]
    assert status == 200 and choice["finish_reason"] == "timeout" and 0 < usage["completion_tokens"] < 900
    assert stats(server)["timed_out_requests"] >= 2


def test_a_plan_counts_as_the_request_itself_does_and_knows_what_is_cached(server):
    body = {"messages": [{"role": "user", "content": "a long question " * 20}], "max_tokens": 4, "seed": 1}
    planned = Call(server, "/v1/plan", body).answer()[1]
    assert planned["cached_tokens"] == 0 and planned["wait_s"] == 0 and planned["would_be_refused"] is None
    usage = Call(server, "/v1/chat/completions", body).answer()[1]["usage"]
    assert planned["prompt_tokens"] == usage["prompt_tokens"] and planned["max_tokens"] == 4
    again = Call(server, "/v1/plan", body).answer()[1]
    cached = Call(server, "/v1/chat/completions", body).answer()[1]["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert again["cached_tokens"] == cached > 0 and again["first_token_s"] > 0
    long = Call(server, "/v1/plan", {"prompt": [1] * 3000}).answer()[1]
    assert long["fits"] is False and long["would_be_refused"]["code"] == "too_long" and long["prompt_tokens"] == 3000
