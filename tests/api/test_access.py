"""The access log, CORS, and refusals that come before the body."""

import asyncio
import logging
import re

import pytest

from crane.api import sse
from crane.errors import EngineError
from crane.runtime.settings import Settings
from crane.runtime.types import State
from tests.api.harness import INFO, NEVER, Client, speak

LINE = re.compile(
    r"POST /v1/completions 200 bytes=(\d+) ms=([\d.]+) first_ms=([\d.]+) prompt_tokens=(\d+) completion_tokens=(\d+)"
    r"( cut)?(?: key=\S+)? id=(\S+)"
)


@pytest.fixture
def lines(caplog):
    """The lines of the access log so far."""
    caplog.set_level(logging.INFO, logger="crane.access")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "crane.access"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_per_request_has_sizes_times_tokens_and_id(client, model, lines, stream):
    here = client(lambda request: [0.05, *speak(model.tokenizer, "hello there", request)])
    body = {"prompt": "secret words", "stream": stream}
    response = here.post("/v1/completions", body, headers={"x-request-id": "my-id"})
    (line,) = lines()
    found = LINE.fullmatch(line)
    assert found, line
    size, total, first, num_prompt, num_completion, cut, request_id = found.groups()
    assert int(size) == len(response.body) and request_id == "my-id" and not cut
    assert 40 < float(first) <= float(total) < 5000
    assert int(num_prompt) == len(here.link.opened[0].prompt_ids)
    assert int(num_completion) == len(model.tokenizer.encode("hello there", add_special_tokens=False))
    assert "secret" not in line


def test_other_requests_have_lines_too_and_paths_cannot_break_them(client, lines):
    here = client()
    here.get("/v1/models?key=private")
    here.get("/a\nb c")
    first, second = lines()
    assert re.fullmatch(r"GET /v1/models 200 bytes=\d+ ms=\S+ first_ms=\S+ id=\w{32}", first)
    assert second.startswith("GET /a%0Ab%20c 404 ")


def test_a_client_that_leaves_is_marked(client, model, lines):
    here = client(lambda request: [*speak(model.tokenizer, "a b c", request)[:2], NEVER])
    here.post("/v1/completions", {"prompt": "a", "stream": True}, leave_after=1)
    (line,) = lines()
    assert LINE.fullmatch(line)[6] == " cut"


def test_the_log_can_be_turned_off(client, model, lines):
    here = client(lambda request: speak(model.tokenizer, "x", request), settings=Settings(access_log=False))
    assert here.post("/v1/completions", {"prompt": "a"}).status == 200
    assert lines() == []


ORIGIN = {"origin": "https://app.example"}
ASK = {**ORIGIN, "access-control-request-method": "POST", "access-control-request-headers": "authorization, x-a"}


@pytest.mark.parametrize("origins, allowed", [("*", "*"), ("http://x, https://app.example/", "https://app.example")])
def test_pages_of_allowed_origins_may_call_also_with_a_key(client, model, origins, allowed):
    settings = Settings(cors_origins=origins, api_key="k")
    here = client(lambda request: speak(model.tokenizer, "x", request), settings=settings)
    preflight = here.request("OPTIONS", "/v1/completions", headers=ASK)
    assert preflight.status == 200 and preflight.headers["access-control-allow-origin"] == allowed
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"] == "authorization, x-a"
    for stream in (False, True):
        headers = {**ORIGIN, "authorization": "Bearer k"}
        response = here.post("/v1/completions", {"prompt": "a", "stream": stream}, headers=headers)
        assert response.status == 200 and response.headers["access-control-allow-origin"] == allowed
        assert "x-request-id" in response.headers["access-control-expose-headers"]
    # a page can read why it was refused
    refused = here.post("/v1/completions", {"prompt": "a"}, headers=ORIGIN)
    assert refused.status == 401 and refused.headers["access-control-allow-origin"] == allowed


@pytest.mark.parametrize("origins", ["", "https://other.example"])
def test_other_origins_get_no_cors_headers(client, origins):
    here = client(settings=Settings(cors_origins=origins))
    for response in (here.request("OPTIONS", "/v1/completions", headers=ASK), here.get("/v1/models", headers=ORIGIN)):
        assert not any(name.startswith("access-control-allow-origin") for name in response.headers)


def test_too_long_a_body_is_refused_by_its_header_before_it_comes(model):
    here = Client("asgi", model, settings=Settings(max_body=100))
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/completions", "raw_path": b"/v1/completions", "root_path": "", "query_string": b"",
        "server": ("test", 80), "client": ("peer", 1), "headers": [(b"host", b"x"), (b"content-length", b"101")],
    }  # fmt: skip
    sent = []

    async def send(event):
        sent.append(event)

    async def run():
        await asyncio.wait_for(here.app(scope, asyncio.Event().wait, send), 5)

    asyncio.run(run())
    assert sent[0]["status"] == 413


def test_counters_are_answered_while_the_engine_drains(client):
    draining = State("draining", info=INFO)
    assert client(state=draining, answer={"steps": 7}).get("/v1/stats").json() == {"steps": 7}
    assert client(state=draining).post("/v1/completions", {"prompt": "a"}).status == 503
    assert client(state=State("loading")).get("/v1/stats").status == 503


@pytest.mark.parametrize("code, status", [("queue_full", 429), ("draining", 503), ("lost", 503), ("failed", 503)])
@pytest.mark.parametrize("path, body", [
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ("/generate", {"text": "a"}),
    ("/v1/embeddings", {"input": "a"}),
    ("/v1/messages", {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]}),
    ("/v1/responses", {"input": "a"}),
])  # fmt: skip
def test_every_429_and_503_says_when_to_come_back(client, path, body, code, status):
    here = client(lambda request: [EngineError(code, "no")])
    response = here.post(path, body if path == "/generate" else {**body, "model": here.model.name})
    assert response.status == (503 if path == "/generate" else status)  # SGLang says 503 of a full queue
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("status", ["starting", "loading", "draining", "lost", "failed"])
def test_so_does_every_503_of_an_engine_that_is_not_ready(client, status):
    from crane.api.app import ENDPOINTS

    here = client(state=State(status, info=INFO if status == "draining" else None), answer={})
    for endpoint in ENDPOINTS:
        if endpoint.path == "/metrics" or "{" in endpoint.path:
            continue
        response = here.request(endpoint.method, endpoint.path, b"{}")
        assert response.status != 500, endpoint.path
        if response.status == 503:
            assert int(response.headers["retry-after"]) >= 1, endpoint.path


def test_a_parameter_given_twice_is_refused_by_name(client):
    response = client().get("/v1/models?a=1&a=2")
    assert response.status == 400 and response.json()["error"]["param"] == "a"


CHAT = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("path, body", [
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/chat/completions", {"messages": CHAT}),
    ("/generate", {"text": "a"}),
    ("/v1/messages", {"max_tokens": 5, "messages": CHAT}),
    ("/v1/responses", {"input": "a", "store": False}),
])  # fmt: skip
def test_no_stream_is_silent_while_its_request_waits(client, model, monkeypatch, path, body):
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.15)
    here = client(lambda request: [0.5, *speak(model.tokenizer, "hello", request)])
    body = {**body, "stream": True} | ({"model": model.name} if path.startswith("/v1") else {})
    response = here.post(path, body)
    assert response.status == 200, response.body
    waits = [i for i, chunk in enumerate(response.chunks) if chunk == sse.KEEP_ALIVE]
    assert waits and waits[0] <= 1, "at most the frames that open a stream come first"
    assert response.chunks[waits[-1] + 1 :]
