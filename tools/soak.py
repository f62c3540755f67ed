#!/usr/bin/env python3
"""Drive a server of its own with everything at once, kill parts of it, and check every answer and every leak.

    python tools/soak.py                              10,000 requests to a tiny model: about two minutes
    python tools/soak.py --seconds 3600 --kill-every 30 --requests 100000000            an hour
    python tools/soak.py --workers 2 --concurrency 64 --kill-every 5

Each kind of request is first asked alone; then thousands of them are in flight together, streamed and not, among
clients that leave, abort, read slowly, send nonsense or ask for more than the queue holds. In the first three tenths of
the run, by time or by requests, API workers and the engine are killed with SIGKILL every so often; the last six are
undisturbed, and what they leave behind is compared with what was there at their start. Exit status 1 for: an answer
that differs from the one alone, a stream that was lost without a kill, a request that hangs, pages, descriptors or
threads that are not given back, memory that grows. Run it in the repository: it makes its model and starts its server
as the tests do.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.serving import Server, start_server, wait_for  # noqa: E402
from tests.tiny import make_tiny  # noqa: E402

HANG_S = 60.0
RECOVERY_S = 20.0  # after a kill, requests may fail for so long, and not longer
MAX_GROWTH_MB = {"worker": 16.0, "engine": 48.0}
START = "the time of the year is a way of life and the day is a part of the week " * 3
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def _text(prompt: str, **options) -> tuple[str, dict]:
    return TEXT, {"prompt": prompt, "temperature": 0, "max_tokens": 10, "ignore_eos": True, **options}


def _chat(content: str, **options) -> tuple[str, dict]:
    messages = [{"role": "user", "content": content}]
    return CHAT, {"messages": messages, "temperature": 0, "max_tokens": 10, **options}


# what is asked: every feature that shapes an answer, with long and short beginnings in common
KINDS = [
    _text(START[:150]), _text(START[:120] + "x"), _text(START, max_tokens=24), _text("a b c", max_tokens=3),
    _text(START[:60], temperature=1.0, top_k=30, seed=3), _text("a", temperature=1.5, seed=4, n=3),
    _text(START[:90], repetition_penalty=1.3, logit_bias={"3": 2.0}, min_tokens=5), _text("a b", logprobs=2),
    _text("year", stop=["e", "th"], max_tokens=30), _text("day", echo=True, logprobs=1, max_tokens=4),
    _text(["a b", "c d e", START[:80]], max_tokens=4), _text("b", best_of=3, n=1, temperature=1.0, seed=9),
    _text("{", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}),
    _text("x", guided_regex="[a-c]{2,9}", temperature=1.0, seed=5), _chat("hi"), _chat(START, max_tokens=20),
    _chat("a", temperature=1.0, seed=6, n=2, logprobs=True, top_logprobs=1),
    ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 8, "temperature": 0, "store": False}),
    ("/generate", {"text": START[:70], "sampling_params": {"temperature": 0, "max_new_tokens": 9}}),
    ("/v1/embeddings", {"input": ["a b c", START[:100]]}), ("/v1/tokenize", {"text": START}),
]  # fmt: skip
STREAMS = (CHAT, TEXT)
NONSENSE = [
    (TEXT, {"prompt": [10**6]}), (TEXT, {"prompt": 5}), (CHAT, {"messages": []}), (TEXT, {"prompt": "a", "n": 0}),
    ("/v1/embeddings", {"input": []}), (TEXT, {"prompt": "a", "guided_regex": "("}), ("/nowhere", {}),
]  # fmt: skip


class Lost(Exception):
    """The connection ended before the answer did, or the engine was lost."""


@dataclass
class Tally:
    """How the run went. problems: what fails it."""

    counts: collections.Counter = field(default_factory=collections.Counter)
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        self.counts["PROBLEMS"] += 1
        if len(self.problems) < 50:
            self.problems.append(text)


class Client:
    """A minimal HTTP/1.1 client, a connection per request."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self._address = parts.hostname, parts.port

    async def open(self, path: str, body: dict):
        """(status, reader, writer), the headers read. Raises Lost."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            writer.write(head.encode() + data)
            line = await reader.readline()
            if not line:
                raise Lost("no status")
            chunked = False
            while header := (await reader.readline()).strip().lower():
                chunked |= header == b"transfer-encoding: chunked"
            return int(line.split()[1]), (_Chunks(reader) if chunked else reader), writer
        except BaseException:
            writer.close()
            raise

    async def ask(self, path: str, body: dict) -> tuple[int, dict]:
        """(status, the answer)."""
        status, reader, writer = await self.open(path, body)
        try:
            raw = await reader.read()
            return status, json.loads(raw) if raw.strip() else {}
        except json.JSONDecodeError:
            raise Lost("an answer was cut") from None
        finally:
            writer.close()

    async def stream(self, path: str, body: dict, pause_s: float = 0.0, leave_after: int | None = None):
        """(status, events without the marks around them), or as many events as wanted. Raises Lost."""
        status, reader, writer = await self.open(path, {**body, "stream": True})
        try:
            if status != 200:
                return status, [await reader.read()]
            events = []
            while line := await reader.readline():
                if line.startswith(b"data: "):
                    events.append(line[6:].strip())
                    if len(events) == leave_after:
                        return status, events
                    if pause_s:
                        await asyncio.sleep(pause_s)
            if not events or events[-1] != b"[DONE]":
                raise Lost(f"a stream ended with {events[-1:]}")
            return status, events[:-1]
        finally:
            writer.close()


class _Chunks:
    """The body of a chunked answer, as a reader. Raises Lost when it ends before its last chunk."""

    def __init__(self, reader: asyncio.StreamReader):
        self._reader = reader
        self._buffer = b""
        self._over = False

    async def _more(self) -> bool:
        if self._over:
            return False
        size = await self._reader.readline()
        if not size.endswith(b"\n"):
            raise Lost("a stream was cut")
        try:
            data = await self._reader.readexactly(int(size, 16) + 2)
        except asyncio.IncompleteReadError:
            raise Lost("a stream was cut") from None
        self._buffer += data[:-2]
        self._over = int(size, 16) == 0
        return not self._over

    async def readline(self) -> bytes:
        while b"\n" not in self._buffer and await self._more():
            pass
        line, newline, self._buffer = self._buffer.partition(b"\n")
        return line + newline

    async def read(self) -> bytes:
        while await self._more():
            pass
        data, self._buffer = self._buffer, b""
        return data


def essence(value):
    """What of an answer must be the same every time: no ids, times, nor what a cache saved; numbers rounded."""
    if isinstance(value, dict):
        skipped = ("id", "created", "created_at", "completed_at", "meta_info", "usage", "system_fingerprint")
        return {name: essence(each) for name, each in value.items() if name not in skipped}
    if isinstance(value, list):
        return [essence(each) for each in value]
    return round(value, 3) + 0.0 if isinstance(value, float) else value


def texts(answer: dict) -> list:
    """Text and reason of each choice of an answer."""
    found = []
    for choice in answer["choices"]:
        found.append([choice["text"] if "text" in choice else choice["message"]["content"], choice["finish_reason"]])
    return found


def joined(events: list[bytes]) -> list:
    """The same of a stream."""
    found: dict[int, list] = {}
    for event in map(json.loads, events):
        if "error" in event:
            raise Lost(event["error"]["message"])
        for choice in event["choices"]:
            entry = found.setdefault(choice["index"], ["", None])
            entry[0] += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            entry[1] = choice["finish_reason"] or entry[1]
    return [found[index] for index in sorted(found)]


class Soak:
    """One run."""

    def __init__(self, server: Server, options: argparse.Namespace):
        self.server = server
        self.client = Client(server.url)
        self.tally = Tally()
        self.options = options
        self.random = random.Random(options.seed)
        self.alone: list[dict] = []
        self.kills: list[float] = []
        self.end_s = 0.0
        self.started = 0

    async def learn(self) -> None:
        """The answers alone."""
        for path, body in KINDS:
            status, answer = await self.client.ask(path, body)
            assert status == 200, (path, body, answer)
            self.alone.append(answer)

    async def run(self, share: float, killing: bool) -> None:
        """This share of all requests, or of the time."""
        goal = self.started + round(share * self.options.requests)
        self.end_s = time.monotonic() + share * self.options.seconds
        killer = asyncio.create_task(self._kill()) if killing and self.options.kill_every else None
        await asyncio.gather(*(self._one_after_another(goal) for _ in range(self.options.concurrency)))
        if killer is not None:
            killer.cancel()

    async def _one_after_another(self, goal: int) -> None:
        while self.started < goal and time.monotonic() < self.end_s:
            self.started += 1
            number, began = self.random.randrange(len(KINDS)), time.monotonic()
            try:
                async with asyncio.timeout(HANG_S):
                    taken = await self._one(number)
                if not taken:  # full or restarting
                    await asyncio.sleep(0.3 * self.random.random())
            except TimeoutError:
                self.tally.problem(f"hangs: {KINDS[number]}")
            except (Lost, OSError) as error:
                if any(began - RECOVERY_S < when <= time.monotonic() for when in self.kills):
                    self.tally.counts["cut by a kill"] += 1
                    await asyncio.sleep(0.1)
                else:
                    self.tally.problem(f"lost without a kill: {error!r} {KINDS[number]}")

    async def _one(self, number: int) -> bool:
        """Whether the server took it."""
        (path, body), luck = KINDS[number], self.random.random()
        if luck < 0.05:
            path, body = self.random.choice(NONSENSE)
            status, answer = await self.client.ask(path, body)
            if status not in (400, 404, 503, 429) or "error" not in answer:
                self.tally.problem(f"nonsense was answered with {status}: {answer}")
            self.tally.counts["nonsense refused"] += 1
        elif luck < 0.13 and path in STREAMS and "best_of" not in body:
            longer = {**body, "max_tokens": 500, "stop": None}
            status, events = await self.client.stream(path, longer, leave_after=self.random.randint(1, 8))
            self.tally.counts["left in mid stream" if status == 200 else f"status {status}"] += 1
        elif luck < 0.17:
            _, _, writer = await self.client.open(path, body)
            writer.transport.abort()
            self.tally.counts["left before the answer"] += 1
        elif luck < 0.21:
            return await self._abort()
        elif luck < 0.55 and path in STREAMS and "best_of" not in body and not body.get("echo"):
            pause_s = 0.02 if luck < 0.25 else 0.0
            status, events = await self.client.stream(path, body, pause_s)
            if not self._taken(status, path):
                return False
            self._compare(number, joined(events), texts(self.alone[number]), "slow" if pause_s else "stream")
        else:
            status, answer = await self.client.ask(path, body)
            if not self._taken(status, path):
                return False
            self._compare(number, essence(answer), essence(self.alone[number]), "whole")
        return True

    async def _abort(self) -> bool:
        rid = f"soak-{self.random.random()}"
        params = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}
        body = {"text": START, "rid": rid, "sampling_params": params}
        asked = asyncio.create_task(self.client.ask("/generate", body))
        try:
            await asyncio.sleep(self.random.random() * 0.2)
            await self.client.ask("/abort_request", {"rid": rid})
        finally:
            status, answer = await asked
        if not self._taken(status, "/generate"):
            return False
        self.tally.counts[f"abort: {answer['meta_info']['finish_reason']['type']}"] += 1
        return True

    def _taken(self, status: int, path: str) -> bool:
        """Whether there is an answer to look at; a full or restarting engine is no problem."""
        if status == 200:
            return True
        self.tally.counts[f"status {status}"] += 1
        killed = any(time.monotonic() - when < RECOVERY_S for when in self.kills)
        full = 503 if path == "/generate" else 429  # SGLang's way
        if status != full and not (killed and status in (500, 503)):
            self.tally.problem(f"a good request was answered with {status}")
        return False

    def _compare(self, number: int, found, expected, how: str) -> None:
        self.tally.counts[f"answers checked, {how}"] += 1
        if found != expected:
            self.tally.problem(f"a wrong answer, {how}: {KINDS[number]}: {found} instead of {expected}"[:600])

    async def _kill(self) -> None:
        while True:
            await asyncio.sleep(self.options.kill_every)
            victims = await asyncio.to_thread(self.server.worker_pids)
            engines = await asyncio.to_thread(self.server.engine_pids)
            engine = self.random.random() < 0.5 and engines
            victim = self.random.choice(engines if engine else victims or engines or [0])
            if victim:
                self.kills.append(time.monotonic())
                self.tally.counts["kills of the engine" if engine else "kills of a worker"] += 1
                os.kill(victim, signal.SIGKILL)


def idle(server: Server) -> bool:
    """Whether nothing runs and every page is free."""
    try:
        status, stats = server.get("/v1/stats")
    except OSError:
        return False
    busy = stats.get("active_sequences", 1) or stats.get("waiting_sequences", 1)
    return status == 200 and not busy and stats["free_pages"] == stats["num_pages"]


def measure(server: Server) -> dict[str, tuple[float, int, int]]:
    """Memory in MB (what is the process's own), descriptors and threads, of workers together and engine."""
    found = {}
    for role, pids in (("worker", server.worker_pids()), ("engine", server.engine_pids())):
        processes = [psutil.Process(pid) for pid in pids]
        memory = sum(process.memory_full_info().uss for process in processes) / 1e6
        files, threads = sum(p.num_fds() for p in processes), sum(p.num_threads() for p in processes)
        found[role] = (memory, files, threads)
    return found


def compare(before: dict, after: dict, tally: Tally) -> None:
    """Notes what has not been given back."""
    for role, (memory, files, threads) in after.items():
        old = before[role]
        if memory - old[0] > MAX_GROWTH_MB[role]:
            tally.problem(f"the {role}'s memory grew from {old[0]:.0f} to {memory:.0f} MB")
        if files > old[1] + 2:
            tally.problem(f"the {role} has {files} open files, {old[1]} before")
        if threads > old[2] + 8:  # long bodies are parsed on threads that stay
            tally.problem(f"the {role} has {threads} threads, {old[2]} before")


def settled(server: Server, tally: Tally, when: str) -> dict:
    """`measure` once all is quiet."""
    try:
        server.wait_ready(60)
        wait_for(lambda: idle(server), 60)
    except AssertionError as error:
        tally.problem(f"not idle {when}: {error} {server.get('/v1/stats')}")
    time.sleep(1.0)  # connections that were just closed
    return measure(server)


def table(tally: Tally, before: dict, after: dict, took_s: float) -> str:
    """The run as text."""
    lines = [f"{name:32} {count:8}" for name, count in sorted(tally.counts.items())]
    lines += [f"{'seconds':32} {took_s:8.1f}", "", f"{'':10} {'memory':>18} {'descriptors':>18} {'threads':>14}"]
    for role in before:
        (memory, files, threads), (memory_after, files_after, threads_after) = before[role], after[role]
        sizes = f"{memory:.1f} -> {memory_after:.1f} MB"
        lines.append(f"{role:10} {sizes:>18} {f'{files} -> {files_after}':>18} {f'{threads} -> {threads_after}':>14}")
    return "\n".join(lines)


async def soak(server: Server, options: argparse.Namespace) -> tuple[Tally, str]:
    """One run against a ready server: the tally, and a table of it."""
    began, run = time.monotonic(), Soak(server, options)
    await run.learn()
    await run.run(0.3, killing=True)
    await asyncio.to_thread(settled, server, run.tally, "after the kills")
    await run.run(0.1, killing=False)  # who is new has to warm up
    before = await asyncio.to_thread(settled, server, run.tally, "before the undisturbed part")
    await run.run(0.6, killing=False)
    after = await asyncio.to_thread(settled, server, run.tally, "at the end")
    compare(before, after, run.tally)
    if "Traceback" in server.log():
        run.tally.problem("a traceback in the log: " + server.log()[server.log().index("Traceback") :][:1500])
    return run.tally, table(run.tally, before, after, time.monotonic() - began)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after so many, whatever is left")
    parser.add_argument("--concurrency", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill-every", type=float, default=6.0, help="seconds between kills, 0 for none")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    env = {"CRANE_DTYPE": "float32", "CRANE_MAX_QUEUE": "24", "CRANE_MAX_CONCURRENT": "16", "CRANE_KV_MEMORY": "700k",
           "CRANE_PAGE_SIZE": "4", "CRANE_ACCESS_LOG": "0"}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny(Path(folder) / "tiny", "qwen3", max_position=1024)
        with start_server(model, "-w", str(options.workers), env=env) as server:
            tally, text = asyncio.run(soak(server, options))
    print(text)
    for problem in tally.problems:
        print("PROBLEM:", problem)
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
