#!/usr/bin/env python3
"""Check every kernel, then time it against torch's way.

    python tools/bench_kernels.py                       every kernel on the GPU, or its torch reference on the CPU
    python tools/bench_kernels.py gguf_linear sample    these only
    python tools/bench_kernels.py --replays 1000 --check-only

Each small case is compared with the reference in float64, poisoned memory around it (tests/kernels/cases.py), and where
parts of the kernel are PTX, bit for bit with itself without; then --replays runs of one call have to agree bit for bit.
What fails is not timed. Times come with the fraction of the roofline: the least time that the device's own copy
bandwidth and matrix product, measured first, allow. Ends in one line of JSON.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from crane.kernels import lang, tuning  # noqa: E402
from crane.kernels.registry import Case, Kernel  # noqa: E402
from tests.kernels.cases import all_kernels, error, mapped, run_case, tensors, widened  # noqa: E402

# Inputs of a timing are rotated through copies that together exceed any cache.
_CACHE_BYTES = {"cuda": 160 << 20, "cpu": 64 << 20}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", help="names of kernels (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--sizes", choices=["production", "small"], help="(default: production on a GPU, else small)")
    parser.add_argument("--case", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.2, help="time spent on each figure (default: 0.2)")
    parser.add_argument("--replays", type=int, default=3, help="runs that must agree bit for bit (default: 3)")
    parser.add_argument("--check-only", action="store_true", help="do not time")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the roofline (needs matplotlib)")
    options = parser.parse_args()
    kernels = {kernel.name: kernel for kernel in all_kernels()}
    if unknown := set(options.kernels) - kernels.keys():
        parser.error(f"no kernel is called {', '.join(sorted(unknown))}; there are {', '.join(kernels)}")
    options.sizes = options.sizes or ("production" if options.device == "cuda" else "small")
    chosen = [kernels[name] for name in options.kernels] or list(kernels.values())
    with torch.inference_mode():
        failures = [failure for kernel in chosen for failure in check(kernel, options)]
        for failure in failures:
            print(f"WRONG {failure}", file=sys.stderr)
        document = {"device": device_name(options.device), "torch": torch.__version__, "failures": failures, "rows": []}
        if not options.check_only:
            wrong = {failure.split(",")[0] for failure in failures}
            measure([kernel for kernel in chosen if kernel.name not in wrong], options, document)
    if options.plot:
        plot(options.plot, document)
    print(json.dumps(document))
    return 1 if failures else 0


def device_name(device: str) -> str:
    """What the figures belong to."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def has_twin(device: str) -> bool:
    """Whether the Triton twins run there."""
    return device == "cuda" and lang.missing(torch.device(device)) is None


def check(kernel: Kernel, options: argparse.Namespace) -> list[str]:
    """What is wrong with a kernel: small cases against float64, and one case over and over."""
    failures = []
    for case in (case for case in kernel.cases if not case.production):
        for dtype in case.dtypes:
            name = f"{kernel.name}, {case.name}, {str(dtype)[6:]}"
            try:
                found = run_case(kernel, case, dtype, "cuda") if has_twin(options.device) else check_torch(
                    kernel, case, dtype, options.device)
                # torch's way rounds to the dtype in between
                limit = (case.tolerance or kernel.tolerances[dtype]) * (1 if has_twin(options.device) else 3)
                if found > limit:
                    failures.append(f"{name}: off by {found:.2e}, more than {limit:.2e}")
                if has_twin(options.device) and ptx_differs(kernel, case.make(options.device, dtype)):
                    failures.append(f"{name}: with inline PTX it gives other bits than without")
            except (AssertionError, RuntimeError) as problem:
                failures.append(f"{name}: {problem}")
    for case in cases(kernel, options):
        if differing := replay(kernel, case, options):
            failures.append(f"{kernel.name}, {case.name}: {differing} of {options.replays} replays differ")
    return failures


def ptx_differs(kernel: Kernel, arguments: dict) -> bool:
    """Whether the rule `inline_ptx`, if the kernel asks for it, makes a difference to any bit of its results."""
    asked = []

    def run(ptx: int) -> list[torch.Tensor]:
        def choose(name: str, features: dict, use: dict) -> dict:
            if name != "inline_ptx":
                return use
            asked.append(ptx)
            return {"PTX": ptx}

        with tuning.overridden(choose):
            results = tensors(kernel.triton(**mapped(arguments, torch.clone)))
        return [each.contiguous().view(torch.uint8) for each in results]

    fast = run(1)
    return bool(asked) and not all(map(torch.equal, fast, run(0)))


def check_torch(kernel: Kernel, case: Case, dtype: torch.dtype, device: str) -> float:
    """The error of the torch reference against itself in float64: its share of rounding, and that the case runs."""
    torch.manual_seed(0)
    arguments = case.make(device, dtype)
    exact = kernel.reference(**widened(arguments))
    got = kernel.reference(**arguments)
    return max((error(*pair) for pair in zip(tensors(got), tensors(exact), strict=True)), default=0.0)


def replay(kernel: Kernel, case: Case, options: argparse.Namespace) -> int:
    """How many of the runs on the same arguments differ from the first in any bit of results or arguments."""
    arguments = case.make(options.device, dtype_of(case, options))
    run = kernel.triton if has_twin(options.device) else kernel.reference

    def once() -> list[torch.Tensor]:
        copy = mapped(arguments, torch.clone)
        results = tensors(run(**copy))
        kept = {name: value for name, value in copy.items() if name not in kernel.scratch}
        return [each.contiguous().view(torch.uint8) if each.dim() else each for each in results + tensors(kept)]

    first, differing = once(), 0
    for _ in range(options.replays - 1):
        differing += not all(map(torch.equal, once(), first))
    return differing


def cases(kernel: Kernel, options: argparse.Namespace) -> list[Case]:
    """The cases to replay and to time."""
    return [case for case in kernel.cases
            if case.production == (options.sizes == "production") and options.case in case.name]  # fmt: skip


def dtype_of(case: Case, options: argparse.Namespace) -> torch.dtype:
    """The dtype asked for where the case has it, else its first."""
    wanted = getattr(torch, options.dtype)
    return wanted if wanted in case.dtypes else case.dtypes[0]


def measure(kernels: list[Kernel], options: argparse.Namespace, document: dict) -> None:
    """Print the table and put its rows into the document."""
    document["bytes_per_s"], document["flops_per_s"] = ceilings(options)
    print(f"{document['device']}: copies {document['bytes_per_s'] / 1e9:.0f} GB/s, "
          f"multiplies {document['flops_per_s'] / 1e12:.2f} TFLOP/s ({options.dtype})")
    print(f"{'kernel':<18} {'case':<34} {'dtype':<9} {'crane us':>10} {'torch us':>10} {'ratio':>6} {'GB/s':>8} "
          f"{'TFLOP/s':>8} {'roofline':>8}")
    for kernel in kernels:
        for case in cases(kernel, options):
            row = time_case(kernel, case, options, document)
            document["rows"].append(row)
            ours, theirs = row["crane_s"], row["torch_s"]
            timed = f"{ours * 1e6:>10.1f} {theirs * 1e6:>10.1f} {theirs / ours:>6.2f}" if ours else (
                f"{'-':>10} {theirs * 1e6:>10.1f} {'-':>6}")
            print(f"{kernel.name:<18} {case.name[:34]:<34} {row['dtype']:<9} {timed} "
                  f"{row['bytes_per_s'] / 1e9:>8.1f} {row['flops_per_s'] / 1e12:>8.2f} {row['roofline']:>8.1%}",
                  flush=True)


def time_case(kernel: Kernel, case: Case, options: argparse.Namespace, ceiling: dict) -> dict:
    """One row. crane_s is None where no Triton twin runs: what is rated then is torch's way."""
    dtype = dtype_of(case, options)
    arguments = case.make(options.device, dtype)
    size = sum(each.nbytes for each in tensors(arguments)) or 1
    copies = [arguments] + [mapped(arguments, torch.clone)
                            for _ in range(min(_CACHE_BYTES[options.device] // size, 15))]
    ours = seconds(kernel.triton, copies, options) if has_twin(options.device) else None
    theirs = seconds(*torch_way(kernel, copies), options)
    moved, flops = kernel.traffic(**arguments) if kernel.traffic else (0, 0)
    taken = ours or theirs
    least = max(moved / ceiling["bytes_per_s"], flops / ceiling["flops_per_s"])
    return {
        "kernel": kernel.name, "case": case.name, "dtype": str(dtype)[6:], "crane_s": ours, "torch_s": theirs,
        "bytes": moved, "flops": flops, "bytes_per_s": moved / taken, "flops_per_s": flops / taken,
        "roofline": least / taken,
    }  # fmt: skip


def torch_way(kernel: Kernel, copies: list[dict]):
    """(function, arguments) of what one would do without the kernel: its reference, unless torch knows better."""
    if kernel.name == "gguf_linear":  # a model dequantised at load
        from crane.kernels.planes import dequantize_planes

        return F.linear, [
            {"input": each["x"], "weight": dequantize_planes(each["planes"], each["x"].dtype), "bias": each["bias"]}
            for each in copies[:2]
        ]
    if kernel.name == "sample":
        return sort_and_draw, copies
    return kernel.reference, copies


def sort_and_draw(logits, draws, changes):
    """Top-k, top-p and min-p as most samplers in torch do them: by sorting the whole row. Without the changes."""
    ordered, ids = (logits / draws.temperature.clamp(min=1e-5)[:, None]).sort(dim=1, descending=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    limit = torch.where(draws.top_k == 0, logits.shape[1], draws.top_k)[:, None]
    probabilities = ordered.masked_fill(rank >= limit, -torch.inf).softmax(1)
    sums = probabilities.cumsum(1)
    kept = sums - probabilities < draws.top_p[:, None]
    kept &= probabilities >= draws.min_p[:, None] * probabilities[:, :1]
    return ids.gather(1, (probabilities * kept).multinomial(1))


def seconds(function, copies: list[dict], options: argparse.Namespace) -> float:
    """Median time of one call, over calls on one copy of the arguments after the other."""
    def one_round():
        for each in copies:
            function(**each)

    one_round()
    if options.device == "cuda":
        one_round = captured(one_round)
    times, until_s = [], time.monotonic() + options.seconds
    while len(times) < 3 or (time.monotonic() < until_s and len(times) < 200):
        times.append(time_of(one_round, options.device) / len(copies))
    return statistics.median(times)


def captured(one_round):
    """The same as a CUDA graph, so that launches from Python are not timed; as it is where it cannot be captured."""
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one_round()
        return graph.replay
    except RuntimeError:  # it asks the device something
        torch.cuda.synchronize()
        return one_round


def time_of(function, device: str) -> float:
    """Seconds of one call."""
    if device != "cuda":
        start_s = time.perf_counter()
        function()
        return time.perf_counter() - start_s
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ceilings(options: argparse.Namespace) -> tuple[float, float]:
    """Bytes per second of a large copy, read and write counted, and operations per second of a large product."""
    count, width = ((1 << 30), 8192) if options.device == "cuda" else ((64 << 20), 1024)
    source = torch.ones(count // 4, device=options.device)
    target = torch.empty_like(source)
    copy_s = seconds(lambda target, source: target.copy_(source), [{"target": target, "source": source}], options)
    a = torch.randn(width, width, device=options.device).to(getattr(torch, options.dtype))
    product_s = seconds(lambda a: a @ a, [{"a": a}], options)
    return 2 * count / copy_s, 2 * width**3 / product_s


def plot(path: str, document: dict) -> None:
    """The roofline and a point for every row, as a picture."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path}: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    rows = [row for row in document["rows"] if row["bytes"] and row["flops"]]
    density = [row["flops"] / row["bytes"] for row in rows]
    xs = [2.0**power for power in range(-6, 14)]
    axes.plot(xs, [min(x * document["bytes_per_s"], document["flops_per_s"]) for x in xs], color="black")
    for name in sorted({row["kernel"] for row in rows}):
        mine = [(x, row["flops_per_s"]) for x, row in zip(density, rows) if row["kernel"] == name]
        axes.scatter(*zip(*mine), label=name)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second",
             title=document["device"])  # fmt: skip
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
