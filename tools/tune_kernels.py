#!/usr/bin/env python3
"""Find better tiles for this GPU: a new tuning.json beside the one that crane has (crane/kernels/tuning.py).

    python tools/tune_kernels.py --out tuning.json

Every production case of the kernels that have rules is timed with its rule's numbers and with their neighbours: warps
and tiles halved and doubled, one stage more or less, the other of two ways (DEQUANTIZE, PTX), one change after another
as long as that gains. A candidate counts when its results agree with the rule's own within the kernel's tolerance. What
won by more than 3 % becomes a rule of its own for these features and this architecture, in front of the others.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402

from crane.kernels import lang, tuning  # noqa: E402
from tests.kernels.cases import all_kernels, error, mapped, tensors  # noqa: E402
from tools.bench_kernels import dtype_of, seconds  # noqa: E402

_GAIN = 1.03
_LIMITS = {"num_warps": (1, 16), "num_stages": (1, 6), "STAGES": (1, 6), "DEQUANTIZE": (0, 1), "PTX": (0, 1)}
_STEPPED = ("num_stages", "STAGES", "DEQUANTIZE", "PTX")  # by one


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", help="names of kernels (default: all that have rules)")
    parser.add_argument("--out", type=Path, required=True, help="where to write the new rules")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.05, help="time spent on each candidate (default: 0.05)")
    options = parser.parse_args()
    options.device = "cuda"
    if not torch.cuda.is_available() or (reason := lang.missing(torch.device("cuda"))):
        print(f"nothing to tune: {reason if torch.cuda.is_available() else 'no GPU here'}", file=sys.stderr)
        return 1
    rules = tuning.rules()
    new: dict[str, list[dict]] = {}
    with torch.inference_mode():
        for kernel in all_kernels():
            if options.kernels and kernel.name not in options.kernels:
                continue
            for case in (case for case in kernel.cases if case.production):
                for name, rule in tune(kernel, case, options).items():
                    if rule not in new.setdefault(name, []):
                        new[name].append(rule)
    merged = {name: new.get(name, []) + own for name, own in rules.items()}
    lines = (f' "{name}": [\n' + ",\n".join(f"  {json.dumps(rule)}" for rule in own) + "\n ]"
             for name, own in merged.items())  # fmt: skip
    options.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(json.dumps({"new_rules": sum(map(len, new.values())), "out": str(options.out)}))
    return 0


def tune(kernel, case, options) -> dict[str, dict]:
    """The rules that make this case faster, by their name in tuning.json; none where the present ones are best."""
    torch.manual_seed(0)
    arguments = case.make("cuda", dtype_of(case, options))
    asked: dict[str, tuple[dict, dict]] = {}  # name -> (features, numbers in use)

    def listen(name, features, use):
        asked.setdefault(name, (features, use))
        return use

    with tuning.overridden(listen):
        expected = tensors(kernel.triton(**mapped(arguments, torch.clone)))
    found = {}
    for name, (features, first) in asked.items():
        best, best_s = first, time_with(kernel, arguments, name, first, options)
        start_s, improved = best_s, True
        while improved:
            improved = False
            for candidate in neighbours(best):
                if not agrees(kernel, arguments, name, candidate, expected):
                    continue
                taken_s = time_with(kernel, arguments, name, candidate, options)
                if taken_s * _GAIN < best_s:
                    best, best_s, improved = candidate, taken_s, True
        print(f"{kernel.name}, {case.name}: {name} {first} {start_s * 1e6:.1f} us -> {best} {best_s * 1e6:.1f} us",
              flush=True)  # fmt: skip
        if best != first:
            found[name] = {"when": features | {"arch": lang.arch()}, "use": best}
    return found


def neighbours(use: dict) -> list[dict]:
    """The same numbers with one of them changed."""
    found = []
    for name, value in use.items():
        if type(value) is not int:
            continue
        steps = (value - 1, value + 1) if name in _STEPPED else (value // 2, value * 2)
        low, high = _LIMITS.get(name, (8, 256))
        found += [use | {name: step} for step in steps if low <= step <= high]
    return found


def with_use(name: str, use: dict):
    """Rules under which `name` gets these numbers."""
    return tuning.overridden(lambda asked, features, own: use if asked == name else own)


def agrees(kernel, arguments: dict, name: str, use: dict, expected: list) -> bool:
    """Whether a candidate compiles and gives what the rule gave."""
    try:
        with with_use(name, use):
            got = tensors(kernel.triton(**mapped(arguments, torch.clone)))
            torch.cuda.synchronize()
    except Exception as problem:  # too many registers, too much shared memory, a shape Triton refuses
        print(f"  {use}: {type(problem).__name__}", file=sys.stderr)
        return False
    pairs = zip(got, expected, strict=True)
    return all(error(ours, theirs) <= 2 * kernel.tolerances.get(ours.dtype, 0.0) for ours, theirs in pairs)


def time_with(kernel, arguments: dict, name: str, use: dict, options) -> float:
    """Seconds of one call under these numbers."""
    with with_use(name, use):
        return seconds(kernel.triton, [mapped(arguments, torch.clone)], options)


if __name__ == "__main__":
    sys.exit(main())
