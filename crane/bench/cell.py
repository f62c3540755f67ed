"""What the engine benchmark measures, and how one engine in a child process is asked for it. No packages needed.

A child prints lines that start with RESULT and hold one JSON document: first `{"ready": name}`, then one `Timing`
for each `Cell` that came in, a JSON document a line. Whatever else it prints is not looked at.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

MARK = "RESULT "


@dataclass(frozen=True)
class Cell:
    """`batch` prompts of `context` random tokens each, computed together, then `tokens` more tokens for each."""

    batch: int
    context: int
    tokens: int


@dataclass(frozen=True)
class Timing:
    """Seconds that one cell took. `decoded` tokens came out in `decode_s`, when all prompts were computed."""

    prefill_s: float
    decode_s: float
    decoded: int


def answer(name: str, measure: Callable[[Cell], Timing]) -> None:
    """The child's side: measure the cells that come in on standard input until it ends."""
    _say({"ready": name})
    for line in sys.stdin:
        _say(asdict(measure(Cell(**json.loads(line)))))


def answer_by_two_runs(name: str, vocab_size: int, generate: Callable[[list[list[int]], int], object]) -> None:
    """`answer` for an engine that tells no step times: a cell runs twice, once without its later tokens.
    generate(prompts, tokens): computes so many tokens after each prompt."""
    salts = itertools.count(1)

    def run(cell: Cell, tokens: int) -> float:
        ids = prompts(cell, vocab_size, next(salts))
        started = time.perf_counter()
        generate(ids, tokens)
        return time.perf_counter() - started

    def measure(cell: Cell) -> Timing:
        prefill_s = run(cell, 1)
        return Timing(prefill_s, run(cell, 1 + cell.tokens) - prefill_s, cell.batch * cell.tokens)

    answer(name, measure)


def prompts(cell: Cell, vocab_size: int, salt: int) -> list[list[int]]:
    """Token ids of a cell's prompts, other ones for each salt, so that no prefix cache knows them.

    A multiplicative sequence: the same in every engine, without numpy. Ids below 256 are left out: the special tokens
    of some vocabularies are among them.
    """
    state, rows = 12345 + salt, []
    for _ in range(cell.batch):
        row = []
        for _ in range(cell.context):
            state = state * 1103515245 + 12345 & 0x7FFFFFFF
            row.append(256 + state % (vocab_size - 512) if vocab_size > 1024 else state % vocab_size)
        rows.append(row)
    return rows


def peak_rss_bytes(pid: int) -> int:
    """The most memory a process and its descendants have had, added up (Linux); 0 elsewhere."""
    total = 0
    for process in [pid, *_descendants(pid)]:
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return total


def _descendants(pid: int) -> list[int]:
    try:
        children = [int(c) for task in Path(f"/proc/{pid}/task").iterdir()
                    for c in (task / "children").read_text().split()]
    except OSError:
        return []
    return children + [grandchild for child in children for grandchild in _descendants(child)]


def _say(document: dict) -> None:
    print(MARK + json.dumps(document), flush=True)
