"""API keys: who is let in, what stays open, and that keys are shown nowhere."""

import dataclasses
import logging

import msgspec
import pytest

from crane.api.auth import load_keys
from crane.api.tenancy import Keys, parse_keys
from crane.errors import SettingsError
from crane.runtime import launch
from crane.runtime.settings import Settings
from crane.runtime.types import EngineStats
from tests.api.harness import speak

KEYED = Settings(api_key="sk-first, sk-second")
BEARER = {"authorization": "Bearer sk-first"}


def talk(model):
    return lambda request: speak(model.tokenizer, "hello", request)


@pytest.mark.parametrize(
    "headers",
    [
        BEARER,
        {"authorization": "bearer  sk-second "},
        {"x-api-key": "sk-second"},
        {"authorization": "Bearer wrong", "x-api-key": "sk-first"},
        {"authorization": "Basic abc", "x-api-key": "sk-first"},
    ],
)
def test_a_valid_key_is_let_in_as_openai_and_as_anthropic_send_it(client, model, headers):
    response = client(talk(model), settings=KEYED).post("/v1/completions", {"prompt": "a"}, headers=headers)
    assert response.status == 200 and response.json()["choices"][0]["text"] == "hello"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer sk-third"},
        {"authorization": "Bearer sk-first, sk-second"},
        {"authorization": "Bearer"},
        {"authorization": "sk-first"},
        {"authorization": "Basic sk-first"},
        {"x-api-key": "SK-FIRST"},
        {"x-api-key": "sk-f\xefrst"},
    ],
)
def test_without_a_valid_key_the_answer_is_401_and_the_engine_is_not_asked(client, model, headers):
    here = client(talk(model), settings=KEYED)
    response = here.post("/v1/completions", {"prompt": "a"}, headers=headers)
    assert response.status == 401 and not here.link.opened
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("authentication_error", "invalid_api_key", None)
    assert response.headers["www-authenticate"] == "Bearer" and response.headers["x-request-id"]


def test_every_route_but_the_probes_and_metrics_asks_for_a_key(client):
    from crane.api.app import ENDPOINTS

    here = client(settings=KEYED, answer={})
    for endpoint in ENDPOINTS:
        if endpoint.path in ("/health", "/health_generate", "/ready", "/ping", "/metrics"):
            continue
        path = endpoint.path.replace("{model:path}", "x").replace("{", "").replace("}", "")
        assert here.request(endpoint.method, path, b"{}").status == 401, path
        if endpoint.method == "GET":
            assert here.request("HEAD", path).status == 401, path


def test_probes_and_preflights_are_open(client):
    here = client(settings=KEYED)
    assert here.get("/health").status == 200
    assert here.request("OPTIONS", "/v1/completions").status == 200
    assert here.get("/no/such/route").status == 404


def test_metrics_are_open_unless_a_setting_says_otherwise(client):
    answer = {"stats": msgspec.to_builtins(EngineStats()), "finished": {}, "histograms": {}}
    assert client(settings=KEYED, answer=answer).get("/metrics").status == 200
    locked = client(settings=dataclasses.replace(KEYED, metrics_key=True), answer=answer)
    assert locked.get("/metrics").status == 401
    assert locked.get("/metrics", headers=BEARER).status == 200


def test_without_keys_nothing_is_asked_for(client, model):
    response = client(talk(model)).post("/v1/completions", {"prompt": "a"}, headers={"authorization": "Bearer x"})
    assert response.status == 200


def test_a_401_comes_before_the_body_is_read(model):
    import asyncio

    from tests.api.harness import Client

    here = Client("asgi", model, settings=KEYED)
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/completions", "raw_path": b"/v1/completions", "root_path": "", "query_string": b"",
        "server": ("test", 80), "client": ("peer", 1), "headers": [(b"host", b"x"), (b"content-length", b"9")],
    }  # fmt: skip
    sent = []

    async def send(event):
        sent.append(event)

    async def run():
        await asyncio.wait_for(here.app(scope, asyncio.Event().wait, send), 5)

    asyncio.run(run())
    assert sent[0]["status"] == 401


def test_keys_come_from_a_file_one_a_line(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# team a\nsk-a\n\n  sk-b  \r\n")
    keys = load_keys(Settings(api_key="sk-c", api_key_file=str(path)))
    found = [bool(keys.find(key)) for key in ("sk-a", "sk-b", "sk-c", "# team a", "", "sk-d")]
    assert found == [True] * 3 + [False] * 3
    assert load_keys(Settings()) is None


@pytest.mark.parametrize("text", ["", "# nothing\n\n", "sk-a\nwith a space\n", "k\xe9y\n"])
def test_a_file_without_usable_keys_is_an_error_that_shows_none(tmp_path, text):
    path = tmp_path / "keys"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingsError) as raised:
        load_keys(Settings(api_key_file=str(path)))
    assert str(path) in str(raised.value) and "space\n" not in str(raised.value)
    assert "with a" not in str(raised.value)


@pytest.mark.parametrize("settings", [Settings(api_key=" , "), Settings(api_key_file="/nowhere/at/all")])
def test_keys_that_are_asked_for_and_missing_fail_the_start(client, settings):
    here = client(settings=settings)
    with pytest.raises(SettingsError, match="CRANE_API_KEY"):
        here.get("/v1/models")


def test_comparison_looks_at_every_key(monkeypatch):
    import hmac

    seen = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: seen.append(1) or compare(a, b))
    assert Keys(parse_keys(["a", "b", "c"], "here")).find("a") and len(seen) == 3


def test_keys_show_up_nowhere(client, model, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    here = client(talk(model), settings=KEYED, answer={})
    for path in ("/v1/models", "/server_info", "/openapi.json", "/docs", "/v1/nothing"):
        assert b"sk-first" not in here.get(path, headers=BEARER).body
    here.post("/v1/completions", {"prompt": "a"}, headers={"x-api-key": "sk-wrong"})
    assert "sk-first" not in repr(KEYED) and "sk-" not in caplog.text

    started = []
    monkeypatch.setattr(launch.subprocess, "Popen", lambda command, **options: started.append(command))
    launch.spawn(KEYED, launch.Meeting(launch.Path("/tmp/x.sock"), 1))
    assert "sk-first" not in str(started)
