#!/usr/bin/env python3
"""What the API costs its worker in CPU time per 1,000 streamed chunks, beside a bare application.

    python tools/api_cost.py MODEL

The bare figure is that of a falcon application that does no more than pass the engine's steps on. Both sides run
under the same gunicorn worker class, one worker each, in turns and against the same engine process. That one has no
model: it gives every running request one token per step, all at the same moment, over the real engine socket. Clients
keep their connections. An event has the same number of bytes on both sides. CPU time is that of the worker process,
all its threads, user and system.

    bare    reads the request's JSON, sends the engine one message, decodes the engine's steps, writes one ready-made
            event per token, notices a client that leaves. No tokenizer, no text, no checks, no log.
    crane   `crane.api:app` as it is served: validation, template, tokenizer, text, events, usage, keep-alives,
            request ids, access log.

A row is measured with short answers, in which the cost of the request shows, and with long ones, in which that of the
chunks does; from both follow the cost of a request and of a chunk.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import falcon.asgi
import msgspec

from crane.models.files import open_checkpoint
from crane.models.tokenizer import load_tokenizer
from crane.runtime import server
from crane.runtime.types import Accepted, EngineInfo, EngineStats, Generate, Hello, Output, SamplingParams, Step, Usage
from crane.runtime.wire import PROTOCOL, FrameReader, pack
from crane import __version__

ROOT = Path(__file__).resolve().parents[1]
TEXT = "The sky is blue because air scatters the short waves of sunlight more than the long ones, and so on. "
PROMPT = "Say what you know about the sky, in as many words as it takes, and then say it again for the others. "
BODIES = {
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}]},
    "/v1/completions": lambda text: {"prompt": text},
}
WORKER = "crane.api.worker.CraneWorker"
SHORT, LONG = 64, 512  # tokens of an answer


class TickingEngine:
    """As much of `crane.runtime.engine.Engine` as its process uses: a token for every request, every step_ms."""

    def __init__(self, settings, progress):
        ids = load_tokenizer(open_checkpoint(settings.model_path)).encode(TEXT, False)
        self._ids = ids * (-(-4096 // len(ids)))
        self._step_s = float(os.environ["STEP_MS"]) / 1000
        self._due_s = time.monotonic()
        self._running: dict[str, tuple[int, int]] = {}  # rid: (tokens so far, of how many)
        self.info = EngineInfo(
            pid=os.getpid(), model_path=settings.model_path, model_type="llama", dtype="float32", device="none",
            max_model_len=1 << 20, vocab_size=1 << 20, num_pages=1, page_size=16, max_concurrent=1 << 10,
            decode_tokens_per_seq=16,
        )  # fmt: skip

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    def add(self, request: Generate) -> Accepted:
        self._running[request.rid] = 0, request.sampling.max_tokens
        return Accepted(request.rid)

    def abort(self, rid: str | None, index: int | None = None) -> list[Output]:
        rids = [each for each in self._running if rid in (None, each)]
        for each in rids:
            del self._running[each]
        return [Output(each, 0, [], "abort") for each in rids]

    def step(self) -> list[Output]:
        self._due_s = max(self._due_s + self._step_s, time.monotonic())
        time.sleep(max(self._due_s - time.monotonic(), 0))
        outputs = []
        for rid, (done, total) in list(self._running.items()):
            last = done + 1 == total
            usage = Usage(100, done + 1) if last or not done else None
            outputs.append(Output(rid, 0, [self._ids[done]], "length" if last else None, usage=usage))
            self._running[rid] = done + 1, total
            if last:
                del self._running[rid]
        return outputs

    def prepare(self) -> bool:
        return False

    def rest(self) -> None:
        """Nothing can be out of order here."""

    def close(self) -> None:
        """Nothing is held."""

    def stats(self) -> EngineStats:
        return EngineStats(active_sequences=len(self._running))

    def metrics(self) -> dict:
        return {}


class BareLink(asyncio.Protocol):
    """The least that gets steps from the engine to requests: a mailbox and a waiter each."""

    def __init__(self):
        self.mailboxes: dict[str, Mailbox] = {}
        self._reader = FrameReader("api")

    def connection_made(self, transport) -> None:
        self.transport = transport
        transport.write(pack(Hello(PROTOCOL, os.getpid(), __version__)))

    def data_received(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            if isinstance(message, Step):
                for output in message.outputs:
                    mailbox = self.mailboxes.get(output.rid)
                    if mailbox is not None:
                        mailbox.put(output)


class Mailbox:
    """What has come for one request."""

    def __init__(self):
        self._outputs: list[Output] = []
        self._waiter: asyncio.Future | None = None

    def put(self, output: Output | None) -> None:
        self._outputs.append(output)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> list[Output]:
        if not self._outputs:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        outputs, self._outputs = self._outputs, []
        return outputs


class BareResource:
    """POST: as many events as max_tokens says."""

    def __init__(self):
        self.link: BareLink | None = None
        self._event = b"data: " + b"x" * (int(os.environ["EVENT_BYTES"]) - 8) + b"\n\n"
        self._num = 0
        self._lock = asyncio.Lock()

    async def on_post(self, req, resp) -> None:
        body = msgspec.json.decode(await req.stream.read())
        async with self._lock:
            if self.link is None:
                loop, path = asyncio.get_running_loop(), os.environ["CRANE_ENGINE_SOCKET"]
                _, self.link = await loop.create_unix_connection(BareLink, path)
        self._num += 1
        rid = f"{os.getpid()}-{self._num}"
        self.link.mailboxes[rid] = mailbox = Mailbox()
        self.link.transport.write(pack(Generate(rid, [1], SamplingParams(max_tokens=body["max_tokens"]))))
        resp.content_type = "text/event-stream; charset=utf-8"
        resp.stream = self._events(rid, mailbox, asyncio.create_task(self._watch(req.scope["receive"], mailbox)))

    async def _watch(self, receive, mailbox: Mailbox) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        mailbox.put(None)

    async def _events(self, rid: str, mailbox: Mailbox, watcher: asyncio.Task):
        event, ended = self._event, False
        try:
            while not ended:
                outputs = await mailbox.get()
                if outputs[-1] is None:
                    return
                ended = outputs[-1].finish_reason is not None
                yield event * len(outputs) + (b"data: [DONE]\n\n" if ended else b"")
        finally:
            watcher.cancel()
            del self.link.mailboxes[rid]


def bare_app():
    """The bare application, which gunicorn asks for by this name."""
    resource = BareResource()
    app = falcon.asgi.App()
    for path in BODIES:
        app.add_route(path, resource)

    async def with_receive(scope, receive, send):
        scope["receive"] = receive
        await app(scope, receive, send)

    return with_receive


class Client:
    """One kept-alive connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> "Client":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def stream(self, path: str, body: dict) -> bytes:
        """The answer to one streamed request, chunked as it came."""
        data = json.dumps({**body, "stream": True}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(data)}\r\n\r\n"
        self._writer.write(head.encode() + data)
        head = await self._reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise SystemExit(f"api_cost: {path}: {head.decode()}")
        parts = []
        while True:
            part = await self._reader.read(1 << 16)
            parts.append(part)
            if part.endswith(b"0\r\n\r\n") or not part:
                return b"".join(parts)


def events_of(raw: bytes) -> list[bytes]:
    """The events in a chunked body."""
    body, at = b"", 0
    while True:
        end = raw.index(b"\r\n", at)
        size = int(raw[at:end], 16)
        if not size:
            return [event + b"\n\n" for event in body.split(b"\n\n") if event]
        body += raw[end + 2 : end + 2 + size]
        at = end + 2 + size + 2


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, to the nanosecond where the kernel says (Linux)."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def is_ready(port: int) -> bool:
    """Whether crane has found its engine. Raises OSError while it has not."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
        return answer.status == 200


@contextlib.contextmanager
def served(name: str, port: int, folder: Path, env: dict):
    """gunicorn with one worker of application `name`; yields the worker's pid."""
    target = "crane.api:app" if name == "crane" else "api_cost:bare_app()"
    command = [sys.executable, "-m", "gunicorn", "-k", WORKER, "--bind", f"127.0.0.1:{port}", "--keep-alive", "30",
               "--graceful-timeout", "1", "--pythonpath", str(ROOT / "tools"), target]  # fmt: skip
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)
    try:
        for _ in range(300):
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                asyncio.run(Client.connect(port))
                if children and (name == "bare" or is_ready(port)):
                    break
        else:
            raise SystemExit(f"api_cost: {name} did not start:\n{(folder / f'{name}.log').read_text()}")
        yield int(children[0])
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def ticking_engine(model: str, step_ms: float, folder: Path):
    """The engine process; yields the environment of its servers."""
    path = folder / "engine.sock"
    env = {name: value for name, value in os.environ.items() if not name.startswith("CRANE_")}
    env |= {"PYTHONPATH": str(ROOT), "CRANE_MODEL_PATH": os.path.abspath(model), "CRANE_ENGINE_SOCKET": str(path),
            "STEP_MS": str(step_ms)}  # fmt: skip
    process = subprocess.Popen([sys.executable, __file__], env=env, cwd=folder)
    try:
        while not path.exists():
            if process.poll() is not None:
                raise SystemExit("api_cost: the engine did not start")
            time.sleep(0.05)
        yield env
    finally:
        process.terminate()
        process.wait()


async def check(port: int, path: str, num_tokens: int, text: str) -> int:
    """Raises SystemExit unless crane streams exactly the engine's tokens. Returns the median bytes of an event."""
    client = await Client.connect(port)
    body = {**BODIES[path](PROMPT), "max_tokens": num_tokens, "stream_options": {"include_usage": True}}
    events = events_of(await client.stream(path, body))
    parsed = [json.loads(event[6:]) for event in events[:-1]]
    choices = [choice for event in parsed for choice in event["choices"]]
    got = "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)
    if got != text or parsed[-1]["usage"]["completion_tokens"] != num_tokens or events[-1] != b"data: [DONE]\n\n":
        raise SystemExit(f"api_cost: check failed: {path} gave {got!r}, not {text!r}")
    return int(statistics.median(len(event) for event in events))


async def load(port: int, pid: int, path: str, num_clients: int, num_tokens: int, seconds: float) -> float:
    """CPU milliseconds of the worker per 1,000 chunks, with every client asking again and again."""
    words, rng = PROMPT.split(), random.Random(0)
    clients = [await Client.connect(port) for _ in range(num_clients)]
    num_done = 0

    def body(max_tokens: int) -> dict:
        """With words in an order of its own, so that nobody is asked the same twice."""
        return {**BODIES[path](" ".join(rng.sample(words, len(words)))), "max_tokens": max_tokens}

    async def ask(client: Client) -> None:
        nonlocal num_done
        while time.monotonic() < end_s:
            await client.stream(path, body(num_tokens))
            num_done += 1

    await asyncio.gather(*[client.stream(path, body(2)) for client in clients])
    before_s, end_s = cpu_s(pid), time.monotonic() + seconds
    await asyncio.gather(*map(ask, clients))
    return 1e6 * (cpu_s(pid) - before_s) / (num_done * num_tokens)


def measure(model: str, path: str, num_clients: int, step_ms: float, rounds: int, seconds: float) -> dict:
    """One row: both sides in turns, short and long answers."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="crane-cost-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        env = stack.enter_context(ticking_engine(model, step_ms, folder))
        pids = {"crane": stack.enter_context(served("crane", port, folder, env))}
        event_bytes = asyncio.run(check(port, path, SHORT, expected(model, SHORT)))
        env = {**env, "EVENT_BYTES": str(event_bytes)}
        ports = {"crane": port, "bare": free_port()}
        pids["bare"] = stack.enter_context(served("bare", ports["bare"], folder, env))
        found: dict[tuple[str, int], list[float]] = {(side, n): [] for side in pids for n in (SHORT, LONG)}
        for i in range(rounds):
            for num_tokens in (SHORT, LONG):
                for side in ("bare", "crane") if i % 2 == 0 else ("crane", "bare"):
                    used = load(ports[side], pids[side], path, num_clients, num_tokens, seconds)
                    found[side, num_tokens].append(asyncio.run(used))
    row = {"path": path, "streams": num_clients, "step_ms": step_ms, "event_bytes": event_bytes}
    for num_tokens in (SHORT, LONG):
        bare, crane = (statistics.median(found[side, num_tokens]) for side in ("bare", "crane"))
        row[f"ms_per_1000_chunks_of_{num_tokens}"] = {
            "bare": round(bare, 1), "crane": round(crane, 1), "ratio": round(crane / bare, 2)
        }  # fmt: skip
    for side in ("bare", "crane"):
        short, long = (statistics.median(found[side, n]) for n in (SHORT, LONG))
        request_us = (short - long) / (1 / SHORT - 1 / LONG)
        row[side] = {"us_per_request": round(request_us), "us_per_chunk": round(long - request_us / LONG, 1)}
    return row


def expected(model: str, num_tokens: int) -> str:
    """The text of the engine's first tokens."""
    tokenizer = load_tokenizer(open_checkpoint(model))
    ids = tokenizer.encode(TEXT, False)
    return tokenizer.decode((ids * num_tokens)[:num_tokens])


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(model: str, loads: str, rounds: int, seconds: float) -> list[dict]:
    """Measure and print. loads: such as "32:10,128:20", streams and the milliseconds of a step. seconds: of a run,
    in which every client starts at least one request."""
    rows = []
    for path in BODIES:
        for each in loads.split(","):
            num_clients, _, step_ms = each.partition(":")
            rows.append(measure(model, path, int(num_clients), float(step_ms or 10), rounds, seconds))
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def main() -> int:
    if "CRANE_ENGINE_SOCKET" in os.environ and len(sys.argv) == 1:  # started by `measure`
        return server.main(["--socket", os.environ["CRANE_ENGINE_SOCKET"]], engine_factory=TickingEngine)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model whose tokenizer and template are used")
    parser.add_argument("--loads", default="32:10,128:20", help="streams and milliseconds of a step (32:10,128:20)")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side is measured (2)")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each time (2)")
    options = parser.parse_args()
    rows = run(options.model, options.loads, options.rounds, options.seconds)
    print(json.dumps({"benchmark": "api_cost", "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
