#!/usr/bin/env python3
"""What drawing tokens takes: `Sampler.launch`, in C and in torch in turns, from logits to tokens on the host.

    python tools/bench_sampling.py --rows 32 --vocab 151936 --rounds 9

Checked first: every way of drawing has to give the tokens of the torch reference in float64; what differs is named, and
the exit status is 1. flat: normal logits of deviation 3, whose nucleus at 0.95 has 14,000 of 151,936 tokens; flatter:
the same at temperature 5, 130,000 tokens; peaked: a few dozen tokens far above the others, as models give them.
Ends in one line of JSON.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in an engine; else torch's threads spin while C works

import torch  # noqa: E402

from crane.bench.report import table  # noqa: E402
from crane.kernels import native, registry  # noqa: E402
from crane.runtime.sampler import Sampler  # noqa: E402
from crane.runtime.sequence import Sequence  # noqa: E402
from crane.runtime.settings import cache_dir  # noqa: E402
from crane.runtime.types import Generate, SamplingParams  # noqa: E402

WAYS = {  # logits, parameters
    "greedy": ("flat", dict(temperature=0.0)),
    "temperature 1": ("flat", dict()),
    "top-p 0.95, peaked": ("peaked", dict(temperature=0.8, top_p=0.95)),
    "top-p 0.95, flat": ("flat", dict(top_p=0.95)),
    "top-p 0.95, flatter": ("flat", dict(temperature=5.0, top_p=0.95)),
    "top-k 40, top-p 0.95": ("flat", dict(temperature=0.8, top_k=40, top_p=0.95)),
    "top-k 1000": ("flat", dict(temperature=0.8, top_k=1000)),
    "min-p 0.05": ("flat", dict(min_p=0.05)),
    "repetition 1.1, top-k 20": ("flat", dict(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1)),
    "greedy, log-probabilities 5": ("flat", dict(temperature=0.0, logprobs=5)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each, after one that is not")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--way", default="", help="ways whose name contains this")
    parser.add_argument("--c-only", action="store_true", help="do not time torch, which takes seconds for some")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if native.load(cache_dir(), options.threads) is None:
        parser.exit(1, f"there are no C kernels here: {native.reason()}\n")
    modes = ["auto"] if options.c_only else ["auto", "torch"]
    logits, rows, wrong = made(options), [], []
    with torch.inference_mode():
        for name, (kind, parameters) in WAYS.items():
            if options.way not in name:
                continue
            launch, exact = draws(logits[kind], parameters)
            given = logits[kind].clone()
            differing = sum(one != other for one, other in zip(launch(given), exact, strict=True))
            if differing:
                wrong.append(f"{name}: {differing} of {options.rows} tokens are not those of float64")
            rows.append({"way": name, **timed(launch, logits[kind], modes, options.rounds)})
    print(table([{key: each if key == "way" else f"{each:.2f}" for key, each in row.items()} for row in rows]))
    for each in wrong:
        print(f"WRONG {each}", file=sys.stderr)
    print(json.dumps({"rows": options.rows, "vocab": options.vocab, "threads": options.threads, "wrong": wrong,
                      "ways": rows}))  # fmt: skip
    return 1 if wrong else 0


def made(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Logits by kind: float32 [rows, vocab]."""
    generator = torch.Generator().manual_seed(0)
    flat, peaked = (torch.randn(options.rows, options.vocab, generator=generator) for _ in range(2))
    peaked[:, 10:40] += torch.linspace(5, 11, 30)
    return {"flat": flat * 3, "peaked": peaked * 2}


def draws(logits: torch.Tensor, parameters: dict):
    """(a function that draws once from logits, which it may change, and returns tokens, those of float64)."""
    sampling_params = SamplingParams(max_tokens=50, **({"temperature": 1.0} | parameters))
    sequences = [Sequence(Generate(str(row), list(range(100)), sampling_params), 0, row, frozenset())
                 for row in range(len(logits))]  # fmt: skip
    sampler = Sampler(logits.shape[1], torch.device("cpu"))

    def launch(given: torch.Tensor) -> list[int]:
        return sampler.launch(given, sequences, {}, [()] * len(sequences)).fetch().read()[0]

    with registry.force("torch"):
        return launch, launch(logits.double())


def timed(launch, logits: torch.Tensor, modes: list[str], rounds: int) -> dict[str, float]:
    """Medians in ms, the modes in turns, and the median of the rounds' ratios."""
    given = torch.empty_like(logits)
    taken: dict[str, list[float]] = {mode: [] for mode in modes}
    for _ in range(rounds + 1):
        for mode in modes:
            given.copy_(logits)
            with registry.force(mode):
                start_s = time.perf_counter()
                launch(given)
                taken[mode].append((time.perf_counter() - start_s) * 1e3)
    ours = taken["auto"][1:]
    found = {"c_ms": statistics.median(ours), "c_least_ms": min(ours)}
    if "torch" in taken:
        theirs = taken["torch"][1:]
        ratio = statistics.median(other / one for one, other in zip(ours, theirs, strict=True))
        found |= {"torch_ms": statistics.median(theirs), "ratio": ratio}
    return found


if __name__ == "__main__":
    sys.exit(main())
