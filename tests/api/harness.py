"""A client that calls the application in process, over WSGI or ASGI, and a link that follows a script."""

import asyncio
import contextlib
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from crane.api.app import App
from crane.errors import EngineError
from crane.runtime.settings import Settings
from crane.runtime.types import EngineInfo, Generate, Output, State, Usage

INFO = EngineInfo(
    pid=1, model_path="m", model_type="qwen25", dtype="float32", device="cpu", max_model_len=256,
    vocab_size=512, num_pages=64, page_size=16, max_concurrent=8, decode_tokens_per_seq=16,
)  # fmt: skip
READY = State("ready", info=INFO)
NEVER = "never"  # a script's last word: the engine falls silent


@dataclass
class Response:
    """What came back. chunks: as the application wrote them."""

    status: int
    headers: dict[str, str]
    chunks: list[bytes]

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def json(self):
        return json.loads(self.body)

    def data(self) -> list:
        """The `data:` payloads of an event stream: parsed, but "[DONE]" as it is."""
        events = [event for event in self.body.decode().split("\n\n") if event]
        lines = [event.removeprefix("data: ") for event in events if not event.startswith(":")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


def speak(
    tokenizer, text: str, request: Generate, *, index=0, finish="stop", eos=None, logprobs=None
) -> list[Output]:
    """One Output per token of `text`, then the end: an EOS token when `eos` is given."""
    ids = tokenizer.encode(text, add_special_tokens=False) + ([eos] if eos is not None else [])
    usage = Usage(len(request.prompt_ids), len(ids))
    outputs = [
        Output(request.rid, index, [token_id], logprobs=[logprobs(token_id)] if logprobs else None)
        for token_id in ids
    ]
    last = outputs.pop()
    outputs.append(Output(request.rid, index, last.token_ids, finish, eos, last.logprobs, usage=usage))
    return outputs


@dataclass
class FakeLink:
    """A link whose engine is `script`: from a request to its outputs, one item a step.

    An item may also be an EngineError (a rejection), a float (seconds to wait) or NEVER.
    """

    script: Callable[[Generate], list] = lambda request: []
    state: State = READY
    blocking: bool = False
    opened: list[Generate] = field(default_factory=list)
    resumed: list[Generate] = field(default_factory=list)
    aborted: list[tuple] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    calls: list = field(default_factory=list)
    answer: object = None

    def start(self):
        pass

    async def stop(self):
        pass

    def open(self, requests):
        self.opened += requests
        return (BlockingStream if self.blocking else AsyncStream)(self, requests)

    def resume(self, requests):
        self.resumed += requests
        return (BlockingStream if self.blocking else AsyncStream)(self, requests)

    def abort(self, rid, index=None):
        self.aborted.append((rid, index))

    def call(self, op, payload=None, timeout_s=30):
        self.calls.append((op, payload))
        return self.answer if self.blocking else _later(self.answer)

    def steps(self, requests) -> list:
        """What all requests get, step by step, merged as the engine merges them."""
        scripts = [list(self.script(request)) for request in requests]
        steps = []
        while any(scripts):
            items = [script.pop(0) for script in scripts if script]
            outputs = []
            for item in items:
                if isinstance(item, (Output, list)):
                    outputs += item if isinstance(item, list) else [item]
                else:
                    steps.append(item)
            if outputs:
                steps.append(outputs)
        return steps


async def _later(value):
    return value


class AsyncStream:
    """The contract of `client.Stream`."""

    def __init__(self, link: FakeLink, requests):
        self._link, self._rids = link, [request.rid for request in requests]
        self._steps = link.steps(requests)
        self._woken = asyncio.Event()
        self._gone = False
        self._left = asyncio.Event()
        self._listener: Callable | None = None
        self._feeding: asyncio.Task | None = None

    async def accepted(self):
        if self._steps and isinstance(self._steps[0], EngineError):
            raise self._steps.pop(0)

    def listen(self, listener):
        self._listener = listener
        self._feeding = self._feeding or asyncio.create_task(self._feed())
        self._woken.set()

    async def _feed(self):
        while self._steps or self._gone or self._listener is not None:
            step = [] if self._gone or not self._steps else self._steps[0]
            if isinstance(step, float):
                self._steps.pop(0)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._left.wait(), step)
            elif step == NEVER or self._listener is None:
                self._woken.clear()
                await self._woken.wait()
            else:
                self._listener(self._steps.pop(0) if step else [])

    def disconnect(self):
        self._gone = True
        self._left.set()
        self._woken.set()

    def close(self):
        if self._feeding is not None:
            self._feeding.cancel()
        self._link.closed += self._rids
        self._rids = []


class BlockingStream:
    """The contract of `client.BlockingStream`."""

    def __init__(self, link: FakeLink, requests):
        self._link, self._rids = link, [request.rid for request in requests]
        self._steps = link.steps(requests)

    def accepted(self, timeout):
        if self._steps and isinstance(self._steps[0], EngineError):
            raise self._steps.pop(0)

    def next(self, timeout_s):
        step = self._steps[0]
        if step == NEVER:
            time.sleep(timeout_s)
            return None
        if isinstance(step, float):
            time.sleep(min(step, timeout_s))
            self._steps[:1] = [step - timeout_s] if step > timeout_s else []
            return None
        return self._steps.pop(0)

    def close(self):
        self._link.closed += self._rids
        self._rids = []


class Client:
    """Calls one App over `kind`, "asgi" or "wsgi". Requests are made one at a time."""

    def __init__(self, kind: str, model, script=None, *, state=READY, settings=None, answer=None):
        self.kind = kind
        self.model = model
        self.link = FakeLink(state=state, blocking=kind == "wsgi", answer=answer)
        if script is not None:
            self.link.script = script
        self.app = App(settings or Settings(), link=self.link, model=model)

    def get(self, path, **options) -> Response:
        return self.request("GET", path, b"", **options)

    def post(self, path, body, **options) -> Response:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, raw, **options)

    def request(self, method, path, body=b"", *, headers=None, leave_after=None, chunked=False) -> Response:
        """leave_after: the client goes away after so many chunks (0: as soon as the request is sent)."""
        length = {"content-length": str(len(body))} if body and not chunked else {}
        headers = {"host": "test", **length, **(headers or {})}
        if self.kind == "asgi":
            return asyncio.run(self._asgi(method, path, body, headers, leave_after))
        return self._wsgi(method, path, body, headers, leave_after)

    async def _asgi(self, method, path, body, headers, leave_after):
        path, _, query = path.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": method, "scheme": "http", "path": path, "raw_path": path.encode(), "root_path": "",
            "query_string": query.encode(), "server": ("test", 80), "client": ("peer", 1),
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }  # fmt: skip
        half = len(body) // 2
        events = [
            {"type": "http.request", "body": body[:half], "more_body": True},
            {"type": "http.request", "body": body[half:], "more_body": False},
        ]
        gone = asyncio.Event()
        if leave_after == 0:
            gone.set()
        response = Response(0, {}, [])

        async def receive():
            if events:
                return events.pop(0)
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(event):
            if event["type"] == "http.response.start":
                response.status = event["status"]
                response.headers = {name.decode().lower(): value.decode() for name, value in event["headers"]}
            elif event.get("body"):
                response.chunks.append(event["body"])
                if leave_after is not None and len(response.chunks) >= leave_after:
                    gone.set()
                if len(response.chunks) % 2:  # a server's send waits now and then
                    await asyncio.sleep(0)

        await self.app(scope, receive, send)
        return response

    def _wsgi(self, method, path, body, headers, leave_after):
        path, _, query = path.partition("?")
        environ = {
            "REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query, "SERVER_NAME": "test",
            "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1", "SCRIPT_NAME": "", "REMOTE_ADDR": "peer",
            "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(body),
            "wsgi.errors": io.StringIO(), "wsgi.multithread": True, "wsgi.multiprocess": True,
            "wsgi.run_once": False, "wsgi.input_terminated": True,
        }  # fmt: skip
        for name, value in headers.items():
            key = name.upper().replace("-", "_")
            environ[key if key in ("CONTENT_LENGTH", "CONTENT_TYPE") else f"HTTP_{key}"] = value
        peer = environ["gunicorn.socket"] = Peer(gone=leave_after == 0)
        response = Response(0, {}, [])

        def start_response(status, pairs, exc_info=None):
            response.status = int(status.split()[0])
            response.headers = {name.lower(): value for name, value in pairs}

        answer = self.app(environ, start_response)
        try:
            for chunk in answer:
                if chunk:
                    response.chunks.append(chunk)
                if leave_after is not None and len(response.chunks) >= leave_after:
                    peer.is_gone = True
        finally:
            if hasattr(answer, "close"):
                answer.close()
        return response


class Peer:
    """The socket that gunicorn puts into a WSGI environ, as far as a peek goes."""

    def __init__(self, gone: bool):
        self.is_gone = gone

    def recv(self, size, flags):
        if self.is_gone:
            return b""
        raise BlockingIOError
