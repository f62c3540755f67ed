"""Compile what production would launch, for GPUs that are not here, and look at the machine code.

    python -m tests.kernels.offline [--arch 80 90 100 gfx942] [--kernel NAME ...] [--update]
    python -m tests.kernels.offline --arch 80 90 --markdown > docs/kernels.md

Every production case is launched on tensors without memory, with a stand-in for Triton's driver: the launch chooses
tiles, number types and alignments as on the GPU it is told of, Triton compiles, nothing runs. Prints a line per
compiled variant; --update writes instructions per element into ratchet.json, to which test_offline.py holds others.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

RATCHET = Path(__file__).with_name("ratchet.json")
ARCHITECTURES = ("90", "80", "100", "gfx942")
# dynamic shared memory one program may have
SHARED_LIMIT = {"80": 163 << 10, "90": 227 << 10, "100": 227 << 10, "gfx942": 64 << 10}
# SASS mnemonics worth knowing: tensor cores of three generations, asynchronous copies, memory spilled to
_COUNTED = {
    "HMMA": r"\bHMMA", "HGMMA": r"\bHGMMA", "UTCMMA": r"\bUTC\w*MMA", "LDGSTS": r"\bLDGSTS",
    "TMA": r"\bUTMALDG|\bUBLKCP", "LDG": r"\bLDG\b", "spills": r"\bLDL\b|\bSTL\b",
}  # fmt: skip


@dataclass
class Variant:
    """One compiled kernel. shared in bytes; per_element: lane instructions of the main loop per element."""

    arch: str
    kernel: str
    case: str
    dtype: str
    function: str
    warps: int
    registers: int
    shared: int
    spills: int
    instructions: int
    per_element: float
    counts: dict[str, int]

    @property
    def key(self) -> str:
        return f"{self.kernel} | {self.case} | {self.dtype} | {self.function}"

    def __str__(self) -> str:
        used = " ".join(f"{name} {count}" for name, count in self.counts.items() if count and name != "spills")
        return (f"{self.arch:>6}  {self.function:<28} {self.case:<34} {self.dtype:<9} warps {self.warps:<2} "
                f"registers {self.registers:>3} shared {self.shared:>6} spills {self.spills:<3} "
                f"instr/element {self.per_element:>7.2f}  {used}")  # fmt: skip


class _Driver:
    """Answers for a GPU that is not here."""

    def __init__(self, target):
        self.target = target
        self.binary_ext = "hsaco" if target.backend == "hip" else "cubin"

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target.arch)  # what the JIT compiled is kept by device

    def get_current_stream(self, device=0):
        return 0

    def is_active(self):
        return True


def compile_for(arch: str, names: list[str]) -> list[Variant]:
    """Every production variant of the named kernels, or of all, for one architecture. Call in a process of its own."""
    assert os.environ.get("TRITON_INTERPRET", "0") != "1"
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="crane-offline-")
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    from crane.kernels import lang
    from tests.kernels.cases import all_kernels

    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch), 32)
    triton.runtime.driver.set_active(_Driver(target))
    lang.arch.cache_clear()
    launched = []
    run = triton.runtime.JITFunction.run

    def warm_up(function, *args, grid, warmup, **named):
        compiled = run(function, *args, grid=grid, warmup=True, **named)
        launched.append((function, compiled))
        return compiled

    triton.runtime.JITFunction.run = warm_up
    found, seen = [], set()
    for kernel in all_kernels():
        for case in kernel.cases:
            if not case.production or (names and kernel.name not in names):
                continue
            for dtype in (torch.bfloat16,) if case.dtypes == lang.FLOATS else case.dtypes:
                launched.clear()
                arguments = case.make("meta", dtype)
                if kernel.why_not(**arguments) is not None:
                    continue  # this GPU cannot; which ones may be refused is tested
                try:
                    kernel.triton(**arguments)
                except Exception as error:
                    cause = error
                    while cause.__cause__ is not None:
                        cause = cause.__cause__
                    raise RuntimeError(f"{arch}: {kernel.name}, {case.name}, {dtype}: {cause}") from error
                for function, compiled in launched:
                    if id(compiled) not in seen:
                        seen.add(id(compiled))
                        found.append(_look_at(arch, kernel, case.name, str(dtype)[6:], function, compiled))
    return found


def _look_at(arch, kernel, case, dtype, function, compiled) -> Variant:
    constants = {function.arg_names[place[0]]: value for place, value in compiled.src.constants.items()}
    elements = kernel.elements(function.__name__, constants)
    if arch.startswith("gfx"):
        instructions, registers, counts = _amdgcn(compiled.asm["amdgcn"])
    else:
        instructions, registers, counts = _sass(compiled.asm["cubin"])
    counted = len(instructions) if function.__name__ in kernel.straight else main_loop(instructions)
    warps = compiled.metadata.num_warps
    lanes = warps * (64 if arch.startswith("gfx") else 32)
    return Variant(arch, kernel.name, case, dtype, function.__name__, warps, registers, compiled.metadata.shared,
                   counts["spills"], len(instructions), round(counted * lanes / elements, 3), counts)


def _sass(cubin: bytes) -> tuple[list[tuple[str | None, str]], int, dict[str, int]]:
    """(label, instruction) in order, registers, mnemonics counted."""
    from triton.backends import nvidia

    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
    registers = int(re.search(r"REG:(\d+)", usage.stdout + usage.stderr)[1])
    stack = int(re.search(r"STACK:(\d+)", usage.stdout + usage.stderr)[1])
    listing, label = [], None
    for line in text.splitlines():
        if found := re.match(r"\s*(\.L_\S+):", line):
            label = found[1]
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            if found[1] != "NOP":  # padding behind the end
                listing.append((label, found[1]))
                label = None
    body = "\n".join(instruction for _, instruction in listing)
    counts = {name: len(re.findall(pattern, body)) for name, pattern in _COUNTED.items()}
    counts["spills"] += stack > 0
    return listing, registers, counts


def _amdgcn(text: str) -> tuple[list[tuple[str | None, str]], int, dict[str, int]]:
    listing, label = [], None
    for line in text.splitlines():
        if found := re.match(r"(\.LBB\S+):", line):
            label = found[1]
        elif re.match(r"\t[sv]_|\tds_|\tglobal_|\tbuffer_|\tflat_", line):
            listing.append((label, line.strip()))
            label = None
    number = {name: int(found[1]) if (found := re.search(rf"\.{name}:\s+(\d+)", text)) else 0
              for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")}  # fmt: skip
    counts = {"MFMA": len(re.findall(r"v_mfma", text)), "spills": number["vgpr_spill_count"]}
    return listing, number["vgpr_count"], counts


def main_loop(listing: list[tuple[str | None, str]]) -> int:
    """Instructions in the first loop with tensor-core work, else in the longest; in the whole kernel if it has none.

    A loop ends with a branch back; those behind the kernel's end return from waits that are kept there.
    """
    ends = [number for number, (_, instruction) in enumerate(listing) if instruction.startswith(("EXIT", "s_endpgm"))]
    place, loops = {}, []
    for number, (label, instruction) in enumerate(listing[: ends[-1] + 1]):
        if label:
            place[label] = number
        target = re.search(r"BRA.*?`\((\.L_\S+)\)|s_c?branch\S*\s+(\.LBB\S+)", instruction)
        if target and (start := place.get(target[1] or target[2])) is not None and start < number:
            loops.append([instruction for _, instruction in listing[start : number + 1]])
    products = [len(body) for body in loops if any("MMA" in each or "mfma" in each for each in body)]
    return products[0] if products else max(map(len, loops), default=len(listing))


def compile_all(architectures: list[str], names: list[str]) -> Iterator[Variant]:
    """`compile_for` each, two at a time."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for found in pool.map(compile_for, architectures, [names] * len(architectures)):
            yield from found


def markdown(found: list[Variant]) -> str:
    """docs/kernels.md: every kernel with its cases and tolerances, and what was compiled for each architecture."""
    import torch

    from crane.kernels import lang
    from tests.kernels.cases import all_kernels

    def dtypes(case) -> str:
        own = "" if case.dtypes == lang.FLOATS else ", ".join(str(dtype)[6:] for dtype in case.dtypes)
        return " (" + "; ".join(filter(None, (own, f"{case.tolerance:g}" if case.tolerance else ""))) + ")"

    lines = [
        "# Triton kernels, proven without a GPU",
        "",
        "Printed by `python -m tests.kernels.offline --arch 80 90 --markdown`. No GPU has run any of it: nothing here "
        "is a time or a speed.",
        "",
        "## Cases",
        "",
        "Each runs under Triton's interpreter against the torch reference in float64, with NaN around its arguments "
        "and in unused memory, in bfloat16, float16 and float32 unless it says otherwise. An error is relative to the "
        "value plus the mean size of all.",
        "",
        "| kernel | tolerance, bfloat16 / float16 / float32 | cases |",
        "|---|---|---|",
    ]
    for kernel in all_kernels():
        limits = " / ".join(f"{kernel.tolerances[dtype]:g}" for dtype in (torch.bfloat16, torch.float16, torch.float32))
        cases = (f"{case.name}{dtypes(case).replace(' ()', '')}" for case in kernel.cases if not case.production)
        lines.append(f"| `{kernel.name}` | {limits} | {'; '.join(cases) or 'none of its own: it plans'} |")
    architectures = list(dict.fromkeys(variant.arch for variant in found))
    lines += [
        "",
        "## Compiled code",
        "",
        "What production launches, compiled for each architecture: registers of a thread, bytes of shared memory of a "
        "program, spilled (must be 0), lane instructions of the main loop per element (of the whole program where the "
        "work is outside of loops).",
        "",
        "| kernel | case | type | function | " + " | ".join(f"sm_{arch}" for arch in architectures) + " |",
        "|---|---|---|---|" + "---|" * len(architectures),
    ]
    rows: dict[str, dict[str, Variant]] = {}
    for variant in found:
        rows.setdefault(variant.key, {})[variant.arch] = variant
    for key, row in rows.items():
        cells = [f"{v.registers}, {v.shared}, {v.spills}, {v.per_element:.2f}" if (v := row.get(arch)) else "-"
                 for arch in architectures]  # fmt: skip
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.kernels.offline", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--kernel", nargs="+", default=[], help="these only")
    parser.add_argument("--update", action="store_true", help="write ratchet.json")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--markdown", action="store_true", help="print docs/kernels.md instead of a table")
    options = parser.parse_args()
    found = []
    for variant in compile_all(options.arch, options.kernel):
        if not options.markdown:
            print(json.dumps(asdict(variant)) if options.json else variant)
        found.append(variant)
    if options.markdown:
        print(markdown(found))
    if options.update:
        kept = json.loads(RATCHET.read_text()) if RATCHET.exists() else {}
        for arch in options.arch:
            mine = {variant.key: variant.per_element for variant in found if variant.arch == arch}
            kept[arch] = dict(sorted(({**kept.get(arch, {}), **mine} if options.kernel else mine).items()))
        RATCHET.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
