"""The harness itself: wrong twins are caught, and the interpreter computes with bfloat16 as torch does."""

import pytest
import torch

from crane.kernels import registry
from crane.kernels.lang import jit, tl
from crane.kernels.registry import Case
from tests.kernels.cases import run_case


@jit
def _double(x_ptr, out_ptr, size, READ: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + column, mask=column < size + READ, other=0.0)
    # what lies beyond the end counts when it was read
    x += 0.0 * tl.sum(tl.where(column < size, 0.0, x), 0)
    tl.store(out_ptr + column, (2.0 * x).to(out_ptr.dtype.element_ty), mask=column < size + WRITE)


def doubling(monkeypatch, *, read=0, write=0, touch=False):
    """A kernel whose twin reads or writes so many elements too many, or changes its argument."""

    def twin(x):
        out = torch.empty_like(x)
        if touch:
            x += 1
        _double[(1,)](x, out, x.numel(), READ=read, WRITE=write, BLOCK=32)
        return out

    monkeypatch.setattr(registry, "KERNELS", {})
    case = Case("", lambda device, dtype: {"x": torch.randn(20, device=device).to(dtype)})
    made = registry.kernel("double", reference=lambda x: 2 * x, triton=twin, why_not=lambda x: None, cases=(case,))
    return run_case(made, case, torch.float32)


def test_a_right_twin_passes(monkeypatch):
    assert doubling(monkeypatch) == 0.0


def test_reading_beyond_the_end_is_caught(monkeypatch):
    assert doubling(monkeypatch, read=1) == float("inf")


def test_writing_too_little_is_caught(monkeypatch):
    assert doubling(monkeypatch, write=-1) == float("inf")


def test_changing_an_argument_is_caught(monkeypatch):
    assert doubling(monkeypatch, touch=True) > 0.1


def test_writing_beside_an_argument_is_caught(monkeypatch):
    def twin(x):
        _double[(1,)](x, x, x.numel(), READ=0, WRITE=1, BLOCK=32)
        return x

    monkeypatch.setattr(registry, "KERNELS", {})
    case = Case("", lambda device, dtype: {"x": torch.ones(20, device=device).to(dtype)})
    made = registry.kernel("double", reference=lambda x: x.mul_(2), triton=twin, why_not=lambda x: None, cases=(case,))
    with pytest.raises(AssertionError, match="memory beside an argument was written"):
        run_case(made, case, torch.float32)


@jit
def _arithmetic(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + column), tl.load(y_ptr + column)
    tl.store(out_ptr + column, x + y)
    tl.store(out_ptr + BLOCK + column, x * y - 0.3)
    tl.store(out_ptr + 2 * BLOCK + column, tl.maximum(x, y))
    tl.store(out_ptr + 3 * BLOCK + column, tl.where(x < y, x, -y))
    tl.store(out_ptr + 4 * BLOCK + column, tl.zeros_like(x) + tl.max(x, 0))
    tl.store(out_ptr + 5 * BLOCK + column, column.to(tl.bfloat16) / 3)
    tl.store(out_ptr + 6 * BLOCK + column, (x * 100).to(tl.int32).to(tl.bfloat16))


@jit
def _product(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


def test_bfloat16_arithmetic_is_torchs():
    x, y, out = torch.randn(64).bfloat16(), torch.randn(64).bfloat16(), torch.empty(7, 64).bfloat16()
    _arithmetic[(1,)](x, y, out, BLOCK=64)
    expected = torch.stack((
        x + y, x * y - 0.3, torch.maximum(x, y), torch.where(x < y, x, -y), x.max().expand(64),
        torch.arange(64).bfloat16() / 3, (x * 100).int().bfloat16(),
    ))  # fmt: skip
    assert torch.equal(out, expected)


def test_bfloat16_products_are_exact_in_float32():
    a, b, out = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    _product[(1,)](a, b, out, SIZE=16)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)
