"""What Triton makes of every production variant, for GPUs that are not here (tests/kernels/offline.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.cases import all_kernels  # noqa: E402
from tests.kernels.offline import ARCHITECTURES, RATCHET, SHARED_LIMIT, Variant, main_loop  # noqa: E402

ROOT = Path(__file__).parents[2]
# A compiler's whims in the last percent are no regression.
SLACK = 1.02


@pytest.fixture(scope="module")
def variants():
    """All variants of all architectures."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "tests.kernels.offline", "--json"], cwd=ROOT, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = [Variant(**json.loads(line)) for line in done.stdout.splitlines()]
    print(*found, sep="\n")
    return found


def test_every_architecture_has_every_variant(variants):
    keys = {arch: {variant.key for variant in variants if variant.arch == arch} for arch in ARCHITECTURES}
    cases = {arch: {key.rsplit(" | ", 1)[0] for key in each} for arch, each in keys.items()}
    assert cases["90"] and cases["90"] == cases["100"]
    for arch in ("80", "gfx942"):  # no float8_e4m3fn there
        assert cases[arch] <= cases["90"] and all("fp8" in key for key in cases["90"] - cases[arch])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_spills(variants, arch):
    assert [str(variant) for variant in variants if variant.arch == arch and variant.spills] == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shared_memory_is_within_what_a_program_may_have(variants, arch):
    limit = SHARED_LIMIT[arch]
    assert [str(variant) for variant in variants if variant.arch == arch and variant.shared > limit] == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_instructions_per_element_do_not_grow(variants, arch):
    """Where a change is worth its instructions: python -m tests.kernels.offline --update, and say why."""
    kept = json.loads(RATCHET.read_text())[arch]
    ours = {variant.key: variant.per_element for variant in variants if variant.arch == arch}
    assert ours.keys() == kept.keys(), "run python -m tests.kernels.offline --update"
    assert {key: (kept[key], now) for key, now in ours.items() if now > SLACK * kept[key]} == {}


def test_the_document_says_what_is_compiled_now():
    """Else: python -m tests.kernels.offline --arch 80 90 --markdown > docs/kernels.md"""
    lines = (ROOT / "docs" / "kernels.md").read_text().splitlines()
    names, *architectures = [cell.strip() for cell in next(line for line in lines if "sm_" in line).split("|")[4:-1]]
    assert (names, architectures) == ("function", ["sm_80", "sm_90"])
    written = {arch: {} for arch in ("80", "90")}
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        for arch, cell in zip(written, cells[4:]):
            if len(numbers := cell.split(", ")) == 4:
                written[arch][" | ".join(cells[:4])] = float(numbers[3])
    kept = json.loads(RATCHET.read_text())
    for arch, found in written.items():
        assert found.keys() == kept[arch].keys()
        assert {key for key, value in found.items() if abs(value - kept[arch][key]) > 0.02 * value + 0.006} == set()
    cases = {line.split("`")[1] for line in lines if line.startswith("| `")}
    assert cases == {kernel.name for kernel in all_kernels()}


def by_function(variants, arch, function, **fields):
    """Those of one Triton function whose fields are as given; there is at least one."""
    found = [variant for variant in variants if (variant.arch, variant.function) == (arch, function)
             and all(getattr(variant, name) == value for name, value in fields.items())]  # fmt: skip
    assert found
    return found


@pytest.mark.parametrize("arch, unit", [("80", "HMMA"), ("90", "HGMMA"), ("100", "UTCMMA"), ("gfx942", "MFMA")])
def test_prefill_runs_on_the_tensor_cores_of_its_generation(variants, arch, unit):
    for variant in by_function(variants, arch, "_prefill_kernel", dtype="bfloat16"):
        assert variant.counts[unit] > 0, variant


@pytest.mark.parametrize("arch", ["90", "100"])
def test_prefill_leaves_whole_tiles_to_the_copy_engine(variants, arch):
    for variant in by_function(variants, arch, "_prefill_kernel", dtype="bfloat16", kernel="paged_prefill"):
        by_hand = any(word in variant.case for word in ("pages of 16", "fp8", "head_dim 80"))
        assert (variant.counts["TMA"] == 0) == by_hand, variant
        assert variant.counts["TMA"] or variant.counts["LDGSTS"] > 8, variant


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_decode_copies_keys_and_values_asynchronously(variants, arch):
    for variant in by_function(variants, arch, "_decode_kernel"):
        assert variant.counts["LDGSTS"] >= 16, variant
        # queries, lengths, a page's number: what is read once may stall
        assert variant.counts["LDG"] <= 16, variant


@pytest.mark.parametrize("arch", ["90", "100"])
def test_decode_has_the_issue_slots_that_full_bandwidth_leaves(variants, arch):
    """An H200 issues about 31e12 lane instructions a second and reads 4.3e12 bytes."""
    for variant in by_function(variants, arch, "_decode_kernel"):
        bytes_each = 1 if "fp8" in variant.case else {"bfloat16": 2, "float16": 2, "float32": 4}[variant.dtype]
        if "5 new tokens" not in variant.case:
            assert variant.per_element < 31e12 / 4.3e12 * bytes_each, variant


def test_quantised_products_run_on_tensor_cores_and_wait_for_no_load(variants):
    linear = [variant for variant in variants if variant.function == "_linear_kernel" and variant.arch[0] != "g"]
    for variant in linear:
        assert any(variant.counts[name] for name in ("HMMA", "HGMMA", "UTCMMA")), str(variant)
        assert variant.counts["LDGSTS"] > variant.counts["LDG"], str(variant)
    assert {variant.arch for variant in linear} == {"80", "90", "100"}


def test_the_main_loop_is_the_first_with_products_or_else_the_longest():
    end = [(None, "EXIT"), (".L_8", "WAIT"), (".L_9", "BRA `(.L_9)"), (None, "BRA `(.L_0)")]
    assert main_loop([(".L_0", "MOV"), *end]) == 5
    short = [(".L_1", "ADD"), (None, "@P0 BRA `(.L_1)")]
    long = [(".L_2", "ADD"), (None, "MUL"), (None, "BRA `(.L_2)")]
    assert main_loop([(".L_0", "MOV"), *short, *long, *end]) == 3
    products = [(".L_3", "HMMA.16816.F32"), (None, "@!P1 BRA `(.L_3)")]
    assert main_loop([(".L_0", "MOV"), *long, *products, *end]) == 2
