"""Which of its two ways a kernel runs, and what it says about that."""

import inspect
import logging
import subprocess
import sys

import pytest
import torch

from crane.errors import SettingsError
from crane.kernels import lang, registry
from crane.kernels.norm import rms_norm


class OnGpu:
    """As much of a CUDA tensor as dispatch looks at."""

    is_cuda = True
    device = torch.device("cuda")
    dtype = torch.bfloat16


@pytest.fixture
def twice(monkeypatch):
    """A kernel of its own registry that doubles: twin and reference tell who ran; refuses float64."""
    monkeypatch.setattr(registry, "KERNELS", {})
    monkeypatch.setattr(lang, "missing", lambda device: None if device.type == "cuda" else "no such device")
    return registry.kernel(
        "twice", reference=lambda x: "torch", triton=lambda x: "triton", cases=(),
        why_not=lambda x: "too wide" if x.dtype == torch.float64 else None,
    )  # fmt: skip


def test_the_twin_runs_on_a_gpu_and_the_reference_elsewhere(twice):
    assert twice(torch.ones(1)) == "torch"
    assert twice.state == "torch"
    assert twice(OnGpu()) == "triton"
    assert registry.report() == {"twice": "triton"}


def test_a_refused_call_falls_back_and_says_why_once(twice, caplog):
    wide = OnGpu()
    wide.dtype = torch.float64
    with caplog.at_level(logging.WARNING, "crane.kernels"):
        assert [twice(wide), twice(wide), twice(OnGpu())] == ["torch", "torch", "triton"]
    assert [record.getMessage() for record in caplog.records] == ["kernel twice runs in torch: too wide"]
    assert twice.state == "triton, at times torch: too wide"


def test_without_triton_a_gpu_runs_the_reference_and_says_so(twice, monkeypatch):
    monkeypatch.setattr(lang, "missing", lambda device: "triton is not installed")
    assert twice(OnGpu()) == "torch"
    assert twice.state == "torch: triton is not installed"


def test_forcing_holds_within_its_block_even_after_an_error(twice):
    with registry.force("torch"):
        assert twice(OnGpu()) == "torch"
        assert twice.state == "torch: ruled out"
        with registry.force("auto", "twice"):
            assert twice(OnGpu()) == "triton"
        assert twice(OnGpu()) == "torch"
    with pytest.raises(ZeroDivisionError), registry.force("torch"):
        raise ZeroDivisionError
    assert twice(OnGpu()) == "triton"


def test_forced_triton_that_cannot_run_is_an_error_with_the_reason(twice):
    wide = OnGpu()
    wide.dtype = torch.float64
    with registry.force("triton"):
        with pytest.raises(ValueError, match="twice cannot take this call: too wide"):
            twice(wide)
        with pytest.raises(ValueError, match="no such device"):
            twice(torch.ones(1))


def test_settings_rule_out_all_kernels_or_some(twice):
    gpu = torch.device("cuda")
    registry.configure("torch", "", gpu)
    assert twice(OnGpu()) == "torch"
    registry.configure("auto", " twice ,", gpu)
    assert twice(OnGpu()) == "torch"
    registry.configure("triton", "", gpu)
    assert twice(OnGpu()) == "triton"


def test_settings_that_cannot_hold_are_errors(twice):
    with pytest.raises(SettingsError, match="no kernel is called thrice; there are twice"):
        registry.configure("auto", "thrice", torch.device("cuda"))
    with pytest.raises(SettingsError, match="--kernels triton: no such device"):
        registry.configure("triton", "", torch.device("cpu"))


def test_a_kernel_shows_its_references_docstring_and_signature():
    assert "residual: same shape" in rms_norm.__doc__
    assert list(inspect.signature(rms_norm).parameters) == ["x", "weight", "eps", "residual"]


def test_every_kernel_loads_and_computes_where_triton_is_absent():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from tests.kernels.cases import all_kernels\n"
        "for kernel in (kernel for kernel in all_kernels() if kernel.cases):\n"
        "    case = next(case for case in kernel.cases if not case.production)\n"
        "    first, *rest = case.make('cpu', case.dtypes[0]).items()\n"
        "    kernel(first[1], **dict(rest))\n"
        "print(len(all_kernels()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
