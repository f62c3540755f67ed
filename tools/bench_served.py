#!/usr/bin/env python3
"""What serving takes from the engine: the same requests through `crane serve` and in an engine alone, in turns.

    python tools/bench_served.py MODEL --clients 1,8,32 --rounds 5
    python tools/bench_served.py MODEL --engine-on 0 --worker-on 1 --client-on 1     affinity

Clients stream over HTTP as those of `crane bench http` do, on the same cores as everything else. The engine alone is
another process, idle while the server works, that is given the same tokens in the same order. A client's next request
reaches it as long after an answer as the same round's clients took to send theirs (`turnaround_ms`): one that comes
when a step has just begun waits for its end, served or not. With --turnaround 0 it is there before the next step, as no
client's can be. A round that does not count comes first, and before it a check: one greedy request must give the same
text both ways. Ratios above 1: the server is ahead. Ends in one JSON line.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
import uuid
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from crane.bench import SETTLE_S, http  # noqa: E402
from crane.bench.report import numbers, table  # noqa: E402
from crane.models.files import open_checkpoint  # noqa: E402
from crane.models.tokenizer import load_tokenizer  # noqa: E402
from crane.runtime.settings import Settings  # noqa: E402
from crane.runtime.types import Generate, SamplingParams  # noqa: E402

CHECK = 999  # the salt of the request that is checked first
FIGURES = {"tokens_per_s": 1, "ttft_ms_p50": -1, "itl_ms_p50": -1}  # and whether more of it is better


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", default="1,8,32", help="streams at a time (default: 1,8,32)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--prompt-words", type=int, default=100)
    parser.add_argument("--requests", type=int, default=4, help="per run, at least two per client")
    parser.add_argument("--turnaround", type=float, help="ms from an answer to the next request of the engine alone's "
                        "client (default: what the server's clients took)")  # fmt: skip
    parser.add_argument("--engine-on", help="cores of the engine, e.g. 0,1: served and alone")
    parser.add_argument("--worker-on", help="cores of the API worker")
    parser.add_argument("--client-on", help="cores of this process, the clients")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        return alone(options)
    with serving(options.model) as (url, pids), engine_alone() as child:
        pin(options, pids, child.pid)
        rows = asyncio.run(measure(options, url, pids, child))
    print(table(rows))
    print(json.dumps({"benchmark": "served", "model": options.model, "rows": rows}))
    return 0


async def measure(options, url: str, pids: dict[str, int], child) -> list[dict]:
    """A row per load: medians of the figures, and of their ratios to those of the engine alone, with the range."""
    server = http.Server(url)
    model = (await server.json("GET", "/v1/models"))["data"][0]["id"]
    streamed = await server.stream(http.bodies_for(options, model, 1, CHECK)[-1])
    wanted = ask(child, 1, CHECK, 0)["text"]
    if streamed.error or streamed.text != wanted:
        sys.exit(f"bench_served: check failed: {streamed.error or streamed.text!r} is not {wanted!r}")
    rows = []
    for count in numbers("--clients", options.clients):
        pairs = []
        for salt in range(-1, options.rounds):
            await asyncio.sleep(SETTLE_S)
            used = {name: http.cpu_s(pid) for name, pid in pids.items()}
            started_s = time.perf_counter()
            results = await http.closed_loop(server, options, model, count, salt)
            ours = http.row(f"{count} streams", results, time.perf_counter() - started_s, 0, None)
            ours |= {f"cpu s {name}": round(http.cpu_s(pid) - used[name], 2) for name, pid in pids.items()}
            between_ms = turnaround_ms(results, count) if options.turnaround is None else options.turnaround
            time.sleep(SETTLE_S)
            pairs.append((ours | {"turnaround_ms": between_ms}, ask(child, count, salt, between_ms)["row"]))
        rows.append(compared(pairs[1:]))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def turnaround_ms(results: list[http.Result], count: int) -> float:
    """How long clients, so many, took from an answer's last token to their next request: the median."""
    ends = sorted(result.chunks_s[-1] for result in results)
    later = sorted(result.sent_s for result in results)[count:]  # in the order of the answers they follow
    return round(1000 * statistics.median(sent - end for end, sent in zip(ends, later)), 2)


def compared(pairs: list[tuple[dict, dict]]) -> dict:
    """Medians of both sides, and of the rounds' ratios."""
    ours, theirs = zip(*pairs)
    found = {name: value if isinstance(value, str) else round(statistics.median(row[name] for row in ours), 2)
             for name, value in ours[0].items()}  # fmt: skip
    for name, better in FIGURES.items():
        found[f"alone {name}"] = round(statistics.median(row[name] for row in theirs), 2)
        ratios = sorted((mine[name] / max(other[name], 1e-9)) ** better for mine, other in pairs)
        found[f"{name} ratio"] = f"{statistics.median(ratios):.3f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    return found


def alone(options) -> int:
    """The child: an engine that is asked for a load a line, [clients, salt, turnaround_ms], and answers."""
    from crane.runtime.server import load_engine

    engine, tokenizer = load_engine(Settings(model_path=options.model)), load_tokenizer(open_checkpoint(options.model))
    engine.rest()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        count, salt, between_ms = json.loads(line)
        todo = http.bodies_for(options, "", count, salt)
        if salt == CHECK:
            todo = todo[-1:]
        started_s = time.perf_counter()
        results, tokens = run_closed(engine, tokenizer, todo, count, between_ms / 1000)
        row = http.row("alone", results, time.perf_counter() - started_s, 0, None)
        print(json.dumps({"row": row, "text": tokenizer.decode(tokens)}), flush=True)
    return 0


def run_closed(engine, tokenizer, bodies: list[dict], count: int, between_s: float) -> tuple[list[http.Result], list]:
    """All bodies, so many at a time; a chunk is what one step gives. The last result's tokens besides."""
    results: dict[str, http.Result] = {}
    tokens: dict[str, list[int]] = {}
    prompts = deque(tokenizer.encode(body["prompt"], True) for body in reversed(bodies))
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=bodies[-1]["max_tokens"])
    due = deque([time.perf_counter()] * min(count, len(prompts)))  # when requests come
    while engine.has_work or due:
        if not engine.has_work:
            time.sleep(max(due[0] - time.perf_counter(), 0))
        while due and due[0] <= time.perf_counter():
            rid, ids = uuid.uuid4().hex, prompts.popleft()
            results[rid], tokens[rid] = http.Result(due.popleft(), num_prompt=len(ids)), []
            engine.add(Generate(rid, ids, params))
        for output in engine.step():
            result = results[output.rid]
            result.chunks_s.append(time.perf_counter())
            result.num_tokens += len(output.token_ids)
            tokens[output.rid] += output.token_ids
            if output.finish_reason and len(due) < len(prompts):
                due.append(time.perf_counter() + between_s)
    return list(results.values()), tokens[next(reversed(tokens))]


def ask(child, count: int, salt: int, between_ms: float) -> dict:
    """What the engine alone answers to a load: see `alone`."""
    child.stdin.write(json.dumps([count, salt, between_ms]) + "\n")
    child.stdin.flush()
    return json.loads(child.stdout.readline() or sys.exit("bench_served: the engine alone has ended"))


@contextlib.contextmanager
def engine_alone():
    """The child process, with this one's options, once it is ready."""
    command = [sys.executable, __file__, "--alone", *sys.argv[1:]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        if child.stdout.readline().strip() != '"ready"':
            sys.exit("bench_served: the engine alone did not start")
        yield child
        child.stdin.close()


@contextlib.contextmanager
def serving(model: str):
    """(URL, process ids by what they are) of a `crane serve` of its own, once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "crane", "serve", "--model-path", model, "--host", "127.0.0.1", "--port",
               str(port), "--workers", "1"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"http://127.0.0.1:{port}/ready").status == 200:
                    break
            time.sleep(0.2)
        else:
            sys.exit(f"bench_served: crane serve ended with status {process.returncode}")
        time.sleep(2.5)  # what is prepared in the first second without work
        yield f"http://127.0.0.1:{port}", children(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def children(pid: int) -> dict[str, int]:
    """The engine's and the worker's process id, of a `crane serve` with one worker."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        is_engine = b"crane.runtime.server" in Path(f"/proc/{child}/cmdline").read_bytes()
        found["engine" if is_engine else "worker"] = int(child)
    return found


def pin(options, pids: dict[str, int], alone_pid: int) -> None:
    """Bind processes, all their threads, to the cores that the options name."""
    bound = [(options.engine_on, pids["engine"]), (options.engine_on, alone_pid), (options.worker_on, pids["worker"]),
             (options.client_on, os.getpid())]  # fmt: skip
    for cores, pid in bound:
        for task in os.listdir(f"/proc/{pid}/task") if cores else ():
            os.sched_setaffinity(int(task), {int(core) for core in cores.split(",")})


if __name__ == "__main__":
    sys.exit(main())
