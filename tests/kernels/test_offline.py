"""What Triton makes of every production variant, for GPUs that are not here (tests/kernels/offline.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

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
    assert keys["90"] and keys["80"] and keys["100"]
    assert {key.split(" | ")[0] for key in keys["80"]} == {key.split(" | ")[0] for key in keys["90"]}
    assert keys["90"] == keys["100"]


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


def test_the_main_loop_is_the_longest_one_that_goes_back():
    straight = [(None, "MOV"), (None, "EXIT")]
    assert main_loop(straight) == 2
    trap = [*straight, (".L_9", "BRA `(.L_9)")]
    assert main_loop(trap) == 3
    loop = [(None, "MOV"), (".L_1", "ADD"), (None, "MUL"), (None, "@P0 BRA `(.L_1)"), *trap]
    assert main_loop(loop) == 3
