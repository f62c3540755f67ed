"""Norm, rotation and gate against their formulas in float64."""

import pytest
import torch

from crane.kernels.activation import silu_mul
from crane.kernels.norm import rms_norm
from crane.kernels.rope import rope, rope_tables

DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]


def assert_near(got, expected, tolerance):
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 64), (3, 4, 16)])
def test_rms_norm_is_its_formula(dtype, tolerance, shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    got = rms_norm(x, weight, 1e-5)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert got.dtype == dtype
    assert_near(got, expected, tolerance)


def test_rms_norm_takes_one_weight_a_head():
    x, weight = torch.randn(3, 4, 16), torch.randn(4, 16)
    got = rms_norm(x, weight, 1e-6)
    for head in range(4):
        torch.testing.assert_close(got[:, head], rms_norm(x[:, head], weight[head], 1e-6))


def test_rms_norm_adds_into_the_residual_and_normalises_the_sum():
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.ones(8)
    total = x + residual
    untouched = x.clone()
    got = rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(residual, total)
    assert torch.equal(x, untouched)
    assert torch.equal(got, rms_norm(total, weight, 1e-6))


def test_rms_norm_of_large_float16_does_not_overflow():
    x = torch.full((1, 64), 3000.0, dtype=torch.float16)
    torch.testing.assert_close(rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-6), torch.ones_like(x))


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_rope_rotates_halves_as_complex_numbers(dtype, tolerance):
    torch.manual_seed(0)
    x, angles = torch.randn(5, 3, 16).to(dtype), torch.randn(5, 8) * 10
    got = rope(x, *rope_tables(angles, 1.5))
    turned = torch.complex(x[..., :8].double(), x[..., 8:].double()) * torch.polar(
        torch.full((5, 1, 8), 1.5, dtype=torch.float64), angles.double().unsqueeze(1)
    )
    assert got.dtype == dtype
    assert_near(got, torch.cat((turned.real, turned.imag), -1), tolerance)


def test_rope_leaves_its_input_alone():
    x = torch.randn(2, 1, 4)
    before = x.clone()
    rope(x, *rope_tables(torch.ones(2, 2)))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_silu_mul_is_its_formula(dtype, tolerance):
    torch.manual_seed(0)
    gate_up = torch.randn(4, 20).to(dtype)
    before = gate_up.clone()
    gate, up = gate_up.double().chunk(2, -1)
    assert_near(silu_mul(gate_up), gate * torch.sigmoid(gate) * up, tolerance)
    assert torch.equal(gate_up, before)
