"""The two drivers: when they write, when they notice that a client is gone, how they start."""

import asyncio
import inspect
import io
import json
import os
import subprocess
import sys
import time

import pytest

from crane.api import create_app, sse
from crane.api.app import App
from crane.errors import EngineError
from crane.runtime.settings import Settings
from crane.runtime.types import Generate, Output
from tests.api.harness import NEVER, READY, Client, FakeLink, speak

PATH = "/v1/completions"
STREAM = {"prompt": "a", "stream": True}


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_while_waiting_aborts_its_request(client, stream):
    here = client(lambda request: [NEVER])
    started = time.monotonic()
    here.post(PATH, {**STREAM, "stream": stream}, leave_after=0)
    assert time.monotonic() - started < 2
    assert here.link.closed == [here.link.opened[0].rid]


def test_client_that_leaves_in_mid_stream_aborts_its_request(client, model):
    here = client(lambda request: [*speak(model.tokenizer, "a b c", request)[:2], NEVER])
    response = here.post(PATH, STREAM, leave_after=1)
    assert len(response.chunks) in (1, 2) and b"[DONE]" not in response.body
    assert here.link.closed == [here.link.opened[0].rid]


def test_stream_that_is_never_read_is_closed_too(model):
    here = Client("wsgi", model, lambda request: [NEVER])
    body = b'{"prompt": "a", "stream": true}'
    environ = {
        "REQUEST_METHOD": "POST", "PATH_INFO": PATH, "QUERY_STRING": "", "SERVER_NAME": "x",
        "SERVER_PORT": "1", "SERVER_PROTOCOL": "HTTP/1.1", "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": io.StringIO(), "wsgi.multithread": True, "CONTENT_LENGTH": str(len(body)),
    }  # fmt: skip
    answer = here.app(environ, lambda status, headers, exc_info=None: None)
    assert here.link.opened and not here.link.closed
    answer.close()
    assert here.link.closed == [here.link.opened[0].rid]


def test_frames_that_are_ready_together_are_one_write(client, model):
    here = client(lambda request: [speak(model.tokenizer, "a b c d e f", request)])
    response = here.post(PATH, STREAM)
    assert len(response.chunks) == 1 and response.chunks[0].endswith(sse.DONE)
    assert response.body.count(b"data: ") > 4


def test_silence_is_filled_with_keep_alive_comments(client, model, monkeypatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.25)
    here = client(lambda request: [0.7, *speak(model.tokenizer, "ab", request)])
    response = here.post(PATH, STREAM)
    assert 1 <= response.chunks.count(sse.KEEP_ALIVE) <= 3
    assert response.chunks[0] == sse.KEEP_ALIVE and response.data()[-1] == "[DONE]"


def test_engine_lost_in_mid_stream_is_an_error_event_and_no_done(client, model):
    def script(request):
        error = Output(request.rid, 0, [], "error", error="engine_lost: it died")
        return [speak(model.tokenizer, "a b c", request)[0], error, NEVER]

    events = client(script).post(PATH, STREAM).data()
    assert events[-1] == {
        "error": {
            "message": "engine_lost: it died", "type": "server_error", "param": None,
            "code": "engine_unavailable",
        }
    }  # fmt: skip
    assert "[DONE]" not in events and len(events) == 2


@pytest.mark.parametrize("error, status", [("engine_lost: it died", 503), ("step failed", 500)])
def test_engine_that_breaks_a_plain_request_gives_a_status(client, error, status):
    here = client(lambda request: [Output(request.rid, 0, [], "error", error=error)])
    response = here.post(PATH, {"prompt": "a"})
    assert response.status == status and response.json()["error"]["message"] == error


def test_one_broken_prompt_ends_the_whole_request(client, model):
    def script(request):
        if request.rid.endswith("-1"):
            return [Output(request.rid, 0, [], "error", error="step failed")]
        return [speak(model.tokenizer, "a b", request)[0], NEVER]

    here = client(script)
    assert here.post(PATH, {"prompt": ["a", "b"]}).status == 500
    assert here.link.closed == [request.rid for request in here.link.opened]


def test_bug_in_mid_stream_is_an_error_event_without_details(client, model, caplog):
    def script(request):
        return [speak(model.tokenizer, "a b", request)[0], Output(request.rid, 0, [5], logprobs=["nonsense"])]

    events = client(script).post(PATH, {**STREAM, "logprobs": 1}).data()
    assert events[-1]["error"]["code"] == "internal_error" and "[DONE]" not in events
    assert "Traceback" in caplog.text


def test_long_bodies_are_parsed_off_the_event_loop(model, monkeypatch):
    import threading

    threads = []
    here = Client("asgi", model)
    encode = type(model.tokenizer).encode

    def watched(self, *args, **kwargs):
        threads.append(threading.current_thread())
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(type(model.tokenizer), "encode", watched)
    here.post("/v1/tokenize", {"text": "short"})
    here.post("/v1/tokenize", {"text": "long " * 2000})
    assert threads[0] is threading.main_thread() and threads[1] is not threading.main_thread()


def lifespan(app, *, then=None):
    """Runs a startup and a shutdown; returns the events sent. then: called in between, on the loop."""

    async def run():
        events, sent = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}], []

        async def receive():
            if len(events) == 1 and then is not None:
                await then()
            return events.pop(0)

        async def send(event):
            sent.append(event)

        await app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
        return sent

    return asyncio.run(run())


class CountingLink(FakeLink):
    """A link that counts its starts and stops."""

    def __init__(self):
        super().__init__(state=READY)
        self.starts = self.stops = 0

    def start(self):
        self.starts += 1

    async def stop(self):
        self.stops += 1


def test_lifespan_starts_and_stops_the_link(model):
    link = CountingLink()
    app = App(Settings(), link=link, model=model)
    assert link.starts == 0
    sent = lifespan(app)
    assert [event["type"] for event in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert (link.starts, link.stops) == (1, 1)


def test_without_lifespan_the_first_requests_share_one_start(model):
    link = CountingLink()
    app = App(Settings(), link=link, model=model)

    async def run():
        return await asyncio.gather(app.start(), app.start(), app.start())

    sites = asyncio.run(run())
    assert link.starts == 1 and len({id(site) for site in sites}) == 1


@pytest.mark.parametrize("settings", [Settings(), Settings(model_path="/nowhere/at/all")])
def test_broken_model_fails_the_start_with_its_reason_and_starts_no_engine(settings):
    link = CountingLink()
    app = App(settings, link=link)
    answers = []

    async def ask():
        app_site = await app.start()
        answers.append(app_site.model_error)

    failed, _ = lifespan(app, then=ask)
    assert failed["type"] == "lifespan.startup.failed" and "\n" not in failed["message"]
    assert str(answers[0]) == failed["message"] and link.starts == 0


def test_broken_model_is_503_with_its_reason(client):
    here = client()
    here.app = App(Settings(model_path="/nowhere/at/all"), link=here.link)
    for response in (here.get("/v1/models"), here.post(PATH, {"prompt": "a"})):
        assert response.status == 503 and "/nowhere/at/all" in response.json()["error"]["message"]
    health = here.get("/health")
    assert health.status == 503 and health.json()["status"] == "failed"


def test_forked_worker_starts_afresh(model):
    link = CountingLink()
    app = App(Settings(), link=link, model=model)
    first = app.start_blocking()
    assert app.start_blocking() is first and link.starts == 1
    pid = os.fork()
    if pid == 0:
        os._exit(0 if app.start_blocking() is not first and link.starts == 2 else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_one_object_is_wsgi_and_asgi():
    app = create_app()
    assert asyncio.iscoroutinefunction(app.__call__)  # as uvicorn asks
    assert len(inspect.signature(app).parameters) == 3


def test_create_app_takes_settings_by_name(monkeypatch):
    app = create_app(model_path="/some/model", max_body=7)
    assert (app._settings.model_path, app._settings.max_body) == ("/some/model", 7)


def test_importing_the_api_reads_no_model_and_no_torch(tmp_path):
    code = (
        "import sys, crane.api; crane.api.create_app(); "
        "print([m for m in ('torch', 'transformers', 'gguf', 'safetensors', 'numpy') if m in sys.modules])"
    )
    env = {**os.environ, "CRANE_MODEL_PATH": "/nowhere/at/all"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_sync_worker_is_warned_about_once(model, caplog):
    here = Client("wsgi", model)
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/health", "wsgi.multithread": False, "SERVER_NAME": "x",
               "SERVER_PORT": "1", "QUERY_STRING": "", "wsgi.url_scheme": "http"}  # fmt: skip
    for _ in range(2):
        here.app({**environ, "wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO()}, lambda *args: None)
    assert caplog.text.count("one request at a time") == 1


def test_keep_alive_does_not_lose_outputs_that_come_at_the_same_moment(model, monkeypatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.001)

    def script(request):
        return [item for output in speak(model.tokenizer, "a b c d e", request) for item in (0.002, output)]

    events = Client("asgi", model, script).post(PATH, STREAM).data()
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "a b c d e"


def talk_over(app, path: str, body: dict, send):
    """One POST over ASGI, by a client that stays."""
    raw = json.dumps(body).encode()
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"",
        "server": ("test", 80), "client": ("peer", 1), "headers": [(b"content-length", b"%d" % len(raw))],
    }  # fmt: skip
    events = [{"type": "http.request", "body": raw, "more_body": False}]

    async def receive():
        return events.pop() if events else await asyncio.Future()

    return app(scope, receive, send)


def test_a_client_that_takes_its_time_gets_everything_in_order_and_holds_up_nobody_else(model):
    here = Client("asgi", model, lambda request: speak(model.tokenizer, "a b c d", request))
    written: dict[str, list[dict]] = {"slow": [], "fast": []}

    async def run():
        may_go = asyncio.Event()

        async def slow(event):
            written["slow"].append(event)
            if event["type"] == "http.response.body":
                await may_go.wait()

        async def fast(event):
            written["fast"].append(event)

        slowly = asyncio.create_task(talk_over(here.app, PATH, STREAM, slow))
        await asyncio.sleep(0.02)
        await talk_over(here.app, PATH, STREAM, fast)
        assert len(written["slow"]) == 2 and not slowly.done(), "the headers, and what it does not take"
        may_go.set()
        await slowly

    asyncio.run(run())
    texts = {}
    for name, events in written.items():
        bodies = [event for event in events if event["type"] == "http.response.body"]
        assert [event["more_body"] for event in bodies] == [True] * (len(bodies) - 1) + [False]
        frames = b"".join(event["body"] for event in bodies).decode().split("\n\n")[:-2]
        texts[name] = [json.loads(frame.removeprefix("data: "))["choices"][0]["text"] for frame in frames]
    assert texts["slow"] == texts["fast"] and "".join(texts["fast"]) == "a b c d"


def test_a_write_that_fails_ends_its_own_request_only(model):
    here = Client("asgi", model, lambda request: [*speak(model.tokenizer, "a b", request)[:1], NEVER])

    async def broken(event):
        if event["type"] == "http.response.body":
            raise OSError("the client is gone")

    with pytest.raises(OSError, match="the client is gone"):
        asyncio.run(talk_over(here.app, PATH, STREAM, broken))
    assert here.link.closed == [here.link.opened[0].rid]


def test_the_frame_that_opens_a_chat_comes_with_the_first_token_or_soon(model, monkeypatch):
    chat, path = {"messages": [{"role": "user", "content": "a"}], "stream": True}, "/v1/chat/completions"
    here = Client("asgi", model, lambda request: speak(model.tokenizer, "a b", request))
    assert here.post(path, chat).chunks[0].count(b"data: ") == 2
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.5)
    here = Client("asgi", model, lambda request: [0.2, *speak(model.tokenizer, "a b", request)])
    chunks = here.post(path, chat).chunks
    assert b'"role":"assistant"' in chunks[0] and chunks[0].count(b"data: ") == 1 and sse.KEEP_ALIVE not in chunks


def test_refused_request_is_a_status_before_any_event(client):
    response = client(lambda request: [EngineError("queue_full", "full")]).post(PATH, STREAM)
    assert response.status == 429 and not response.body.startswith(b"data:")


def test_request_objects_reach_the_link_untouched(client, model):
    here = client(lambda request: speak(model.tokenizer, "x", request))
    here.post(PATH, {"prompt": [1, 2]})
    assert isinstance(here.link.opened[0], Generate) and here.link.opened[0].prompt_ids == [1, 2]
