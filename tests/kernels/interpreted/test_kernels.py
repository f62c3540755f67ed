"""Every case of every kernel: the Triton twin against the torch reference in float64."""

import pytest
import torch

from crane.kernels.registry import force
from tests.kernels.cases import all_kernels, run_case

SMALL = [
    pytest.param(kernel, case, dtype, id=f"{kernel.name}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for kernel in all_kernels()
    for case in kernel.cases
    if not case.production
    for dtype in case.dtypes
]


@pytest.mark.parametrize("kernel, case, dtype", SMALL)
def test_the_twin_gives_what_the_reference_gives_in_float64(kernel, case, dtype):
    assert run_case(kernel, case, dtype) <= (case.tolerance or kernel.tolerances[dtype])


@pytest.mark.parametrize("kernel", [kernel for kernel in all_kernels() if kernel.cases], ids=lambda kernel: kernel.name)
def test_a_call_reaches_the_twin_when_it_is_forced(kernel, monkeypatch):
    case = next(case for case in kernel.cases if not case.production)
    first, *rest = case.make("cpu", case.dtypes[0]).items()
    ran = []
    monkeypatch.setattr(kernel, "triton", lambda *args, **named: ran.append("twin"))
    with force("triton", kernel.name):
        kernel(first[1], **dict(rest))
    assert ran == ["twin"]


def test_the_sum_left_in_the_residual_is_torchs_bit_for_bit():
    kernel = next(kernel for kernel in all_kernels() if kernel.name == "rms_norm")
    for dtype in (torch.bfloat16, torch.float16):
        x, residual, weight = torch.randn(3, 512).to(dtype), torch.randn(3, 512).to(dtype), torch.ones(512).to(dtype)
        expected = residual + x
        kernel.triton(x, weight, 1e-6, residual)
        assert torch.equal(residual, expected)
