"""`crane bench http`: speed of a server as clients that stream completions see it, alone or against another server.

    crane bench http http://127.0.0.1:8080 --clients 1,8,32
    crane bench http URL --rate 4 --requests 40      open loop: 4 requests a second arrive, answered or not
    crane bench http URL --vs http://127.0.0.1:9090  any OpenAI-compatible server, in alternation
    crane bench http URL --pid 1234                  and the CPU time of that process per 1,000 chunks

It checks first: the same greedy request must give the same text streamed and whole, and the usage must count as many
tokens as were asked for. Then it prints a table and, as its last line, one JSON document. It is one process: with
many clients it needs a core of its own.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from crane.bench import SETTLE_S
from crane.bench.report import numbers, plot_bars, table
from crane.errors import CraneError, SettingsError

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room"
).split()


@dataclass
class Result:
    """One request: when it was sent and when each chunk with text came, in seconds."""

    sent_s: float
    chunks_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_prompt: int = 0
    text: str = ""
    error: str = ""


class Server:
    """A minimal HTTP/1.1 client for one base URL."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise SettingsError(f"expected http://HOST:PORT, got {url!r}")
        self.host, self.port = parts.hostname, parts.port or 80
        self.base = parts.path.rstrip("/").removesuffix("/v1")

    async def request(self, method: str, path: str, body: dict | None = None):
        """(status, reader) with the response's headers read."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {self.base}{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        return status, reader, writer

    async def json(self, method: str, path: str, body: dict | None = None) -> dict:
        status, reader, writer = await self.request(method, path, body)
        data = (await reader.read()).decode()
        writer.close()
        found = data[data.index("{") : data.rindex("}") + 1] if "{" in data else ""
        if status != 200:
            raise SettingsError(f"{method} {path}: status {status}: {found[:300]}")
        return json.loads(found)

    async def stream(self, body: dict) -> Result:
        """One streamed completion."""
        result = Result(time.perf_counter())
        status, reader, writer = await self.request("POST", "/v1/completions", body)
        async for line in reader:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            now = time.perf_counter()
            event = json.loads(line[6:])
            if "error" in event:
                result.error = str(event["error"])
            usage = event.get("usage")
            if usage:
                result.num_tokens, result.num_prompt = usage["completion_tokens"], usage["prompt_tokens"]
            for choice in event.get("choices", ()):
                if choice.get("text"):
                    result.chunks_s.append(now)
                    result.text += choice["text"]
        writer.close()
        if status != 200:
            result.error = f"status {status}"
        return result


def body_for(options: argparse.Namespace, model: str, rng: random.Random) -> dict:
    """A greedy request of random words that runs to its limit, without the penalty that is crane's default alone."""
    prompt = " ".join(rng.choice(WORDS) for _ in range(options.prompt_words))
    return {
        "model": model, "prompt": prompt, "max_tokens": options.max_tokens, "temperature": 0, "ignore_eos": True,
        "repetition_penalty": 1, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


async def check(server: Server, options, model: str) -> None:
    """Raises SettingsError unless the server answers the same request the same way, streamed and whole."""
    body = body_for(options, model, random.Random(0))
    streamed = await server.stream(body)
    whole = await server.json("POST", "/v1/completions", {**body, "stream": False, "stream_options": None})
    if streamed.error:
        raise SettingsError(f"check failed: {streamed.error}")
    if streamed.text != whole["choices"][0]["text"]:
        raise SettingsError("check failed: the streamed text differs from the whole one")
    if streamed.num_tokens != options.max_tokens:
        raise SettingsError(f"check failed: {streamed.num_tokens} tokens came, not {options.max_tokens}")


def bodies_for(options: argparse.Namespace, model: str, num_clients: int, salt: int) -> list[dict]:
    """What so many clients ask for in a round, the last first. salt: other prompts for each round."""
    rng = random.Random(1000 * num_clients + salt)
    return [body_for(options, model, rng) for _ in range(max(options.requests, 2 * num_clients))]


async def closed_loop(server: Server, options, model: str, num_clients: int, salt: int) -> list[Result]:
    """Every client sends its next request when its last one is answered."""
    bodies, results = bodies_for(options, model, num_clients, salt), []

    async def client() -> None:
        while bodies:
            results.append(await server.stream(bodies.pop()))

    await asyncio.gather(*[client() for _ in range(num_clients)])
    return results


async def open_loop(server: Server, options, model: str, salt: int) -> list[Result]:
    """Requests arrive at `--rate` a second, at random, whether or not earlier ones are answered."""
    rng = random.Random(salt)
    tasks = []
    for _ in range(options.requests):
        tasks.append(asyncio.create_task(server.stream(body_for(options, model, rng))))
        await asyncio.sleep(rng.expovariate(options.rate))
    return await asyncio.gather(*tasks)


def cpu_s(pid: int | None) -> float:
    """User and system time of a process so far (Linux)."""
    if pid is None:
        return 0.0
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def row(label: str, results: list[Result], elapsed_s: float, used_s: float, pid: int | None) -> dict:
    """The figures of one run. Raises SettingsError when a request failed."""
    errors = [result.error for result in results if result.error]
    if errors:
        raise SettingsError(f"{label}: {len(errors)} of {len(results)} requests failed: {errors[0]}")
    first = sorted(result.chunks_s[0] - result.sent_s for result in results)
    gaps = sorted(b - a for r in results for a, b in zip(r.chunks_s, r.chunks_s[1:]))
    num_chunks = sum(len(result.chunks_s) for result in results)

    def at(values: list[float], share: float) -> float:
        return 1000 * values[min(int(share * len(values)), len(values) - 1)] if values else 0.0

    found = {
        "load": label,
        "requests": len(results),
        "tokens_per_s": round(sum(result.num_tokens for result in results) / elapsed_s, 1),
        "prompt_tokens": statistics.median(result.num_prompt for result in results),
        "ttft_ms_p50": round(at(first, 0.5), 1),
        "ttft_ms_p99": round(at(first, 0.99), 1),
        "itl_ms_p50": round(at(gaps, 0.5), 2),
        "itl_ms_p99": round(at(gaps, 0.99), 2),
    }
    if pid is not None:
        found["cpu_ms_per_1000_chunks"] = round(1e6 * used_s / max(num_chunks, 1), 1)
    return found


async def measure(options: argparse.Namespace) -> list[dict]:
    """A row per load. Raises SettingsError for a bad option, and when a check or a request fails."""
    servers = [Server(url) for url in (options.url, options.vs) if url]
    models = []
    for server in servers:
        listed = await server.json("GET", "/v1/models")
        models.append(options.model if options.model and not models else listed["data"][0]["id"])
        await check(server, options, models[-1])
    rows = []
    for label, count in _loads(options):
        found: list[list[dict]] = [[] for _ in servers]
        for salt in range(options.rounds):  # nobody has seen a round's prompts before
            for server, model, seen in zip(servers, models, found):
                await asyncio.sleep(SETTLE_S if options.vs else 0)
                used_s, started_s = cpu_s(options.pid), time.perf_counter()
                results = await (open_loop(server, options, model, salt) if count is None
                                 else closed_loop(server, options, model, count, salt))  # fmt: skip
                elapsed_s = time.perf_counter() - started_s
                pid = options.pid if server is servers[0] else None
                seen.append(row(label, results, elapsed_s, cpu_s(options.pid) - used_s, pid))
        rows.append(_middle(found[0]) | ({} if len(found) == 1 else _compared(*found)))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def _loads(options: argparse.Namespace) -> list[tuple[str, int | None]]:
    """Labels, and how many clients; None for an open loop."""
    if options.rate:
        return [(f"rate {options.rate}", None)]
    return [(f"{count} clients", count) for count in numbers("--clients", options.clients)]


def _middle(rows: list[dict]) -> dict:
    """The median of every figure."""
    return {name: value if isinstance(value, str) else round(statistics.median(row[name] for row in rows), 2)
            for name, value in rows[0].items()}  # fmt: skip


def _compared(ours: list[dict], theirs: list[dict]) -> dict:
    """The other server's figures, and by round how many times more tokens and how much earlier first tokens we give."""
    other = _middle(theirs)
    found = {f"other {name}": other[name] for name in ("tokens_per_s", "ttft_ms_p50", "itl_ms_p50")}
    for name, ratio in (("tokens_per_s", 1), ("ttft_ms_p50", -1)):
        ratios = sorted((mine[name] / max(other[name], 1e-9)) ** ratio for mine, other in zip(ours, theirs))
        found[f"{name} ratio"] = round(statistics.median(ratios), 2)
        found[f"{name} spread"] = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
    return found


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The options of `crane bench http`."""
    parser.add_argument("url", help="http://HOST:PORT of the server")
    parser.add_argument("--vs", metavar="URL", help="another server, measured in alternation; above 1 we are faster")
    parser.add_argument("--rounds", type=int, default=1, help="how often each load runs (default: 1)")
    parser.add_argument("--model", help="model name (default: the first of /v1/models)")
    parser.add_argument("--clients", default="1,8,32", help="closed loop: clients at a time, e.g. 1,8,32")
    parser.add_argument("--rate", type=float, help="open loop instead: requests a second")
    parser.add_argument("--requests", type=int, default=4, help="requests per run, at least two per client")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of each answer (default: 64)")
    parser.add_argument("--prompt-words", type=int, default=100, help="words of each prompt (default: 100)")
    parser.add_argument("--pid", type=int, help="also measure this process's CPU time per 1,000 chunks (Linux)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw tokens per second (needs matplotlib)")


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for. Returns the exit status."""
    try:
        rows = asyncio.run(measure(options))
    except (CraneError, OSError) as error:
        print(f"crane bench: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    if options.plot:
        columns = {"crane": "tokens_per_s", "other": "other tokens_per_s"}
        plot_bars(options.plot, rows, columns if options.vs else {"tokens/s": "tokens_per_s"}, lambda row: row["load"])
    print(json.dumps({"benchmark": "http", "url": options.url, "max_tokens": options.max_tokens, "rows": rows}))
    return 0
