#!/usr/bin/env python3
"""Where one decode step's time goes, by part of the engine, beside the time that reading the weights takes.

    python tools/profile_step.py MODEL --batch 1 --context 512

A recorded step (on a CPU with C kernels) says itself how long each kernel took; "outside" is what the same steps took
beyond that. Other steps, and all with --call-by-call, run under Python's profiler, which makes small parts look larger
than they are. "plain" is a step without either. "limit" is the bytes of weights, for attention those of keys and
values, over the read bandwidth measured here: nothing can be shorter that stays in no cache. Ends in one JSON line.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402

from crane.bench.cell import Cell, prompts  # noqa: E402
from crane.kernels.packed import PackedLinear  # noqa: E402
from crane.kernels.recording import Recording  # noqa: E402
from crane.models.layers import Linear  # noqa: E402
from crane.runtime.engine import Engine  # noqa: E402
from crane.runtime.recorded import RecordedSteps  # noqa: E402
from crane.runtime.settings import Settings  # noqa: E402
from crane.runtime.types import Generate, SamplingParams  # noqa: E402

# The first part whose file or function name is in the profiler's entry takes its time.
PARTS = (
    ("products", ("kernels/packed.py", "_linear_pointwise", "linear")),
    ("attention", ("kernels/attention.py", "kernels/streamed.py", "scaled_dot", "index_select")),
    ("norms", ("kernels/norm.py",)),
    ("rotation, K/V", ("kernels/qkv_post.py", "kernels/rope.py", "kernels/pages.py")),
    ("gate", ("kernels/activation.py",)),
    ("drawing", ("kernels/sampling.py", "runtime/sampler.py", "argmax", "amax", "topk", "tolist")),
    ("dispatch", ("kernels/registry.py", "models/")),
    ("scheduling", ("runtime/",)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--exact", action="store_true", help="as `crane serve --exact`")
    parser.add_argument("--call-by-call", action="store_true", help="do not replay recorded steps")
    options = parser.parse_args()
    length = options.context + 3 * options.steps + 8
    engine = Engine(Settings(model_path=options.model, max_concurrent=options.batch, max_model_len=length,
                             exact=options.exact, recorded_steps=not options.call_by_call))  # fmt: skip
    start(engine, options.batch, options.context)
    plain_ms = 1000 * statistics.median(timed(engine.step) for _ in range(options.steps))
    steps, pages = engine.runner.graphs, engine.runner.kv
    recording = steps.recording(options.batch, best=True) if isinstance(steps, RecordedSteps) else None
    parts = by_kernel(engine, recording, options.steps) if recording else profiled(engine, options.steps)
    bandwidth = read_bandwidth()
    limit_ms = 1000 * weight_bytes(engine.runner.model) / bandwidth
    # pages: [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim]
    kv_limit_ms = 1000 * options.batch * options.context * pages[0, :, :, 0].nbytes / bandwidth
    for name, ms in [("plain", plain_ms), ("limit", limit_ms), ("sum", sum(parts.values())), *parts.items()]:
        print(f"{name:>14} {ms:8.2f} ms" + (f", limit {kv_limit_ms:.2f}" if name == "attention" else ""))
    print(json.dumps({"benchmark": "step", "model": options.model, "batch": options.batch, "context": options.context,
                      "plain_ms": plain_ms, "limit_ms": limit_ms, "parts_ms": parts}))  # fmt: skip
    return 0


def by_kernel(engine: Engine, recording: Recording, steps: int) -> dict[str, float]:
    """Milliseconds a step in each kernel and outside of them; medians."""
    replays, inside = [], []
    recording.replay = lambda: inside.append(timed(lambda: replays.append(recording.timed())))
    outside = [timed(engine.step) - inside[-1] for _ in range(steps)]
    found: Counter[str] = Counter(outside=1000 * statistics.median(outside))
    for place, (name, _) in enumerate(replays[0]):
        found[name] += 1000 * statistics.median(calls[place][1] for calls in replays)
    return {name: round(ms, 3) for name, ms in found.most_common()}


def profiled(engine: Engine, steps: int) -> dict[str, float]:
    """`split` of some steps under Python's profiler."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(steps):
        engine.step()
    profile.disable()
    return split(profile, steps)


def start(engine: Engine, batch: int, context: int) -> None:
    """Bring `batch` sequences to where they decode."""
    for place, ids in enumerate(prompts(Cell(batch, context, 1), engine.info.vocab_size, 1)):
        engine.add(Generate(f"r{place}", ids, SamplingParams(max_tokens=10**6, temperature=0.0, ignore_eos=True)))
    waiting = {f"r{place}" for place in range(batch)}
    while waiting:
        waiting -= {output.rid for output in engine.step()}


def timed(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def split(profile: cProfile.Profile, steps: int) -> dict[str, float]:
    """Milliseconds a step in each of PARTS, and in the rest."""
    found: Counter[str] = Counter()
    for (path, _, function), (_, _, own_s, _, _) in pstats.Stats(profile).stats.items():
        where = f"{path} {function}"
        part = next((name for name, marks in PARTS if any(mark in where for mark in marks)), "the rest")
        found[part] += 1000 * own_s / steps
    return {name: round(ms, 3) for name, ms in found.most_common()}


def weight_bytes(model) -> int:
    """Bytes of all matrices that a decode step reads."""
    linears = [model.head.linear]
    for layer in model.layers:
        linears += [layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down]
    total = 0
    for linear in linears:
        if isinstance(linear, PackedLinear) and linear.screen:
            total += linear.screen_panels.nbytes  # and a little of the rest, as a rule
        elif isinstance(linear, PackedLinear):
            total += sum(part.panels.nbytes for part in linear.parts)
        elif isinstance(linear, Linear):
            total += linear.weight.nbytes or linear.weight.numel() * linear.weight.element_size()
    return total


def read_bandwidth() -> float:
    """Bytes a second of reading a large tensor, the best of some rounds."""
    data = torch.ones(1 << 27)
    return data.nbytes / min(timed(data.sum) for _ in range(7))


if __name__ == "__main__":
    sys.exit(main())
