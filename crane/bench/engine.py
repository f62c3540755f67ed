"""`crane bench engine`: prefill and decode speed of the engine without HTTP, alone or against another engine.

Prints a table and, as its last line, one JSON document. Before it times, it checks that decoding and computing the
same tokens as a prompt agree. With --vs every cell runs in alternation, crane and the peer after one another, and
what counts is the ratio: machines drift. In a ratio, more than 1 means that crane is faster. llama.cpp loads its model
anew for each cell; that is not part of its times.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from pathlib import Path

from crane.bench import SETTLE_S, subjects
from crane.bench.cell import Cell, Timing
from crane.bench.report import numbers, plot_bars, table
from crane.errors import CraneError, SettingsError
from crane.runtime.settings import Settings, num_cores, parse


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The options of `crane bench engine`."""
    parser.add_argument("--model-path", required=True, help="model folder, or path of a .gguf file")
    parser.add_argument("--batch", default="1,8,32", help="sequences at a time (default: 1,8,32)")
    parser.add_argument("--context", default="128", help="prompt tokens of each, e.g. 128,1024,4096 (default: 128)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded for each (default: 32)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each cell is measured (default: 5)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each engine (default: one per core)")
    parser.add_argument("--dtype", default="bfloat16", help="compute type of peers that are told one")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of crane's engine")
    parser.add_argument("--vs", metavar="PEER[=WHERE]",
                        help="also measure llama.cpp[=FOLDER OF ITS BINARIES], vllm[=PYTHON], transformers[=PYTHON] or "
                        "crane=NAME=VALUE,..., the same engine with other settings")
    parser.add_argument("--peer-model", help="the model in the peer's format, when it cannot read --model-path")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the decode speeds (needs matplotlib)")


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for. Returns the exit status."""
    try:
        document = measure(options)
    except CraneError as error:
        print(f"crane bench: {error}", file=sys.stderr)
        return 1
    if options.plot:
        columns = {name.split()[0]: name for name in document["rows"][0] if name.endswith("decode tok/s")}
        plot_bars(options.plot, document["rows"], columns,
                  lambda row: f"batch {row['batch']}\ncontext {row['context']}")
    print(json.dumps(document))
    return 0


def measure(options: argparse.Namespace) -> dict:
    """The document of one run. Raises SettingsError for a bad option or an engine that does not run."""
    threads = options.threads or num_cores()
    cells = [Cell(batch, context, options.tokens) for context in numbers("--context", options.context)
             for batch in numbers("--batch", options.batch)]  # fmt: skip
    settings = _settings("--set", options.set)
    engines = [subjects.crane(options.model_path, threads, cells, settings)]
    try:
        if options.vs and options.vs.startswith("crane="):
            other = options.vs.removeprefix("crane=")
            settings |= _settings("--vs crane", other.split(","))
            engines.append(subjects.crane(options.model_path, threads, cells, settings))
            engines[1].name = f"crane:{other}"
        elif options.vs:
            kind, _, where = options.vs.partition("=")
            if kind not in subjects.PEERS:
                raise SettingsError(f"--vs must be one of {', '.join(subjects.PEERS)}, got {kind!r}")
            model = options.peer_model or options.model_path
            engines.append(subjects.peer(kind, where, model, threads, cells, options.dtype))
        for engine in engines:
            print(f"{engine.name}: first token {engine.start_s:.2f} s after its start", flush=True)
        rows = [_row(cell, engines, options.rounds) for cell in cells]
        print(table(rows))
        memory = {engine.name: engine.peak_rss_bytes for engine in engines}
        print("  ".join(f"{name}: {size / 1e9:.2f} GB at most" for name, size in memory.items()))
    finally:
        for engine in engines:
            engine.close()
    return {
        "benchmark": "engine", "model": options.model_path, "threads": threads, "machine": _machine(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "rounds": options.rounds,
        "start_s": {engine.name: round(engine.start_s, 3) for engine in engines},
        "peak_rss_bytes": memory, "rows": rows,
    }  # fmt: skip


def _machine() -> str:
    """The processor's name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _row(cell: Cell, engines: list, rounds: int) -> dict:
    """One cell, measured `rounds` times by every engine in turn, after a round that does not count."""
    timings: list[list[Timing]] = [[] for _ in engines]
    for count in range(rounds + 1):
        for engine, seen in zip(engines, timings):
            time.sleep(SETTLE_S)
            timing = engine.measure(cell)
            if count:
                seen.append(timing)
    row = {"batch": cell.batch, "context": cell.context}
    for engine, seen in zip(engines, timings):
        name = engine.name.split()[0]
        row[f"{name} prefill tok/s"] = round(statistics.median(_prefill(cell, t) for t in seen), 1)
        row[f"{name} decode tok/s"] = round(statistics.median(_decode(t) for t in seen), 1)
    if len(engines) == 2:
        for label, speed in (("prefill", lambda t: _prefill(cell, t)), ("decode", _decode)):
            ratios = sorted(speed(ours) / speed(theirs) for ours, theirs in zip(*timings))
            row[f"{label} ratio"] = round(statistics.median(ratios), 2)
            row[f"{label} spread"] = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


def _prefill(cell: Cell, timing: Timing) -> float:
    return cell.batch * cell.context / timing.prefill_s


def _decode(timing: Timing) -> float:
    return timing.decoded / max(timing.decode_s, 1e-9)


def _settings(flag: str, pairs: list[str]) -> dict:
    """Settings given as NAME=VALUE, checked as `crane serve` checks its flags."""
    specs = {spec.name: spec for spec in dataclasses.fields(Settings)}
    given = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        name = name.replace("-", "_")
        if name not in specs:
            raise SettingsError(f"{flag} {pair}: there is no setting {name!r}")
        given[name] = parse(specs[name], text, f"{flag} {name}")
    return given
