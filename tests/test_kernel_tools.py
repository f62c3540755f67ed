"""The tools for kernels and GPUs, on a CPU: they check before they time, and say what they cannot do."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crane.kernels import tuning
from crane.kernels.registry import Case, Kernel
from tests.models.paged import PagedRun, load
from tests.test_tools import ROOT, run_tool
from tools import bench_kernels, tune_kernels

OPTIONS = argparse.Namespace(device="cpu", dtype="float32", sizes="small", case="", replays=3, seconds=0.01)


def test_bench_kernels_checks_times_and_ends_in_json():
    done = run_tool("bench_kernels.py", "rms_norm", "silu_mul", "--device", "cpu", "--seconds", "0.002",
                    "--case", "row")  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["failures"] == [] and document["bytes_per_s"] > 0 and document["flops_per_s"] > 0
    assert {row["kernel"] for row in document["rows"]} == {"rms_norm", "silu_mul"} and len(document["rows"]) == 4
    for row in document["rows"]:
        assert row["torch_s"] > 0 and row["crane_s"] is None and row["roofline"] > 0
        assert row["case"] in done.stdout


def test_bench_kernels_names_the_kernels_there_are():
    done = run_tool("bench_kernels.py", "rms_morn")
    assert done.returncode == 2
    assert "no kernel is called rms_morn" in done.stderr and "rms_norm" in done.stderr


def kernel_of(reference):
    cases = (Case("a case", lambda device, dtype: {"x": torch.ones(4, dtype=dtype)}, (torch.float32,)),)
    return Kernel("doubtful", reference, reference, lambda x: None, cases, None, (), None, lambda *_: 1)


def test_bench_kernels_finds_a_kernel_that_is_wrong():
    right, wrong = kernel_of(lambda x: x * 2), kernel_of(lambda x: x * (2 if x.dtype == torch.float64 else 3))
    assert bench_kernels.check(right, OPTIONS) == []
    (failure,) = bench_kernels.check(wrong, OPTIONS)
    assert failure.startswith("doubtful, a case, float32: off by")


def test_bench_kernels_finds_ptx_that_gives_other_bits_than_plain_triton(monkeypatch):
    def doubled(x, wrong):
        return x * 2 + (wrong if tuning.pick("inline_ptx", kind="Q4_0", dtype="float32")["PTX"] else 0.0)

    monkeypatch.setattr(bench_kernels, "has_twin", lambda device: True)
    monkeypatch.setattr(bench_kernels, "run_case", lambda *_: 0.0)
    right, wrong = kernel_of(lambda x: doubled(x, 0.0)), kernel_of(lambda x: doubled(x, 2.0**-22))
    assert bench_kernels.check(right, OPTIONS) == []
    (failure,) = bench_kernels.check(wrong, OPTIONS)
    assert failure == "doubtful, a case, float32: with inline PTX it gives other bits than without"
    assert bench_kernels.check(kernel_of(lambda x: x * 2), OPTIONS) == []  # never asks


def test_bench_kernels_finds_a_kernel_that_gives_another_result_the_next_time():
    seen = iter(range(100))
    shaky = kernel_of(lambda x: x + (1e-7 * (next(seen) % 2) if x.dtype == torch.float32 else 0))
    assert bench_kernels.check(shaky, OPTIONS) == ["doubtful, a case: 1 of 3 replays differ"]


def test_tune_kernels_needs_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run_tool("tune_kernels.py", "--out", str(tmp_path / "tuning.json"))
    assert done.returncode == 1 and "no GPU here" in done.stderr
    assert not (tmp_path / "tuning.json").exists()


def test_tune_kernels_tries_every_number_up_and_down_within_limits():
    tried = tune_kernels.neighbours({"BM": 16, "AFTER": True, "STAGES": 1, "num_warps": 16})
    assert all(use["AFTER"] is True for use in tried)
    assert [(use["BM"], use["STAGES"], use["num_warps"]) for use in tried] == [
        (8, 1, 16), (32, 1, 16), (16, 2, 16), (16, 1, 8)]  # fmt: skip
    assert tune_kernels.neighbours({"DEQUANTIZE": 1}) == [{"DEQUANTIZE": 0}]
    assert tune_kernels.neighbours({"DEQUANTIZE": 0}) == [{"DEQUANTIZE": 1}]


def test_rules_can_be_overridden_for_a_while():
    own = tuning.pick("gguf_linear", rows=8, group=32, kind="Q4_K")
    with tuning.overridden(lambda kernel, features, use: use | {"BN": features["rows"]}):
        assert tuning.pick("gguf_linear", rows=8, group=32, kind="Q4_K") == own | {"BN": 8}
    assert tuning.pick("gguf_linear", rows=8, group=32, kind="Q4_K") == own


def test_a_random_model_of_a_known_shape_is_a_model(tmp_path):
    done = run_tool("random_model.py", "tiny", str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    logits = PagedRun(load(tmp_path / "model"), num_pages=4).step([("a", [1, 2, 3])])[0]
    assert torch.isfinite(logits).all() and logits.std() > 0.1


def gpu_check(*arguments):
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh"), *arguments]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "HOME": str(Path.home())}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_gpu_check_goes_through_its_steps_and_sums_them_up(tmp_path):
    done = gpu_check("--device", "cpu", "--tiny", "--replays", "2", "--only", "check,kernels",
                     "--kernels", "sample log_probabilities gguf_dequantize",
                     "--out", str(tmp_path / "out"))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "check: ok" in summary and "kernels: ok" in summary and "FAILED" not in summary
    checked = json.loads((tmp_path / "out" / "check.txt").read_text().splitlines()[-1])
    assert checked["failures"] == []


def test_gpu_check_says_that_there_is_no_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = gpu_check("--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "no GPU here" in done.stderr or "missing here: triton" in done.stderr


def test_bench_sampling_checks_every_way_of_drawing_and_ends_in_json(c_kernels):
    done = run_tool("bench_sampling.py", "--rows", "3", "--vocab", "20000", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["wrong"] == [] and len(document["ways"]) >= 10
    for row in document["ways"]:
        assert row["c_ms"] > 0 and row["torch_ms"] > 0 and row["way"] in done.stdout
