"""The C kernels of norm, gate, rotation and attention against the torch references they stand in for."""

import pytest
import torch

from crane.kernels import native, registry
from crane.kernels.activation import silu_mul
from crane.kernels.attention import paged_attention, plan_attention
from crane.kernels.norm import rms_norm
from crane.kernels.qkv_post import _case as qkv_post_case
from crane.kernels.qkv_post import qkv_post
from crane.kernels.registry import Case as KernelCase
from crane.kernels.rope import position_tables, rope_tables
from tests.kernels.cases import run_case
from tests.kernels.test_attention import ROWS, Case

DTYPES = [torch.float32, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("c_kernels")


# what is left to torch: layers of a decoder never ask for it
LEFT_TO_TORCH = {
    ("rms_norm", "one weight a head"), ("silu_mul", "rows of a wider tensor"), ("qkv_post", "Qwen3"),
    ("qkv_post", "Qwen2"), ("qkv_post", "Qwen2, pages only"), ("qkv_post", "everything, head_dim 80"),
    ("qkv_post", "head_dim 96, tokens without a slot"), ("qkv_post", "fp8 pages"),
}  # fmt: skip
CASES = [
    pytest.param(kernel, case, id=f"{kernel.name}-{case.name}")
    for kernel in (rms_norm, silu_mul, qkv_post)
    for case in kernel.cases
    if not case.production
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel, case", CASES)
def test_the_c_of_a_kernel_gives_what_the_reference_gives_in_float64(kernel, case, dtype):
    error = run_case(kernel, case, dtype, in_c=True)
    assert (error is None) == ((kernel.name, case.name) in LEFT_TO_TORCH)
    assert error is None or error <= (case.tolerance or kernel.tolerances[dtype])


@pytest.mark.parametrize("norm", ["first", "last"])
@pytest.mark.parametrize("head_dim", [6, 64, 128])
def test_heads_of_any_width_are_normalised_and_rotated(norm, head_dim):
    case = KernelCase("plain", qkv_post_case(37, 6, 2, head_dim, norm=norm))
    for dtype in DTYPES:
        assert run_case(qkv_post, case, dtype, in_c=True) <= qkv_post.tolerances[dtype]


def test_the_gate_holds_at_the_ends_of_the_range():
    gate = torch.tensor([-1e4, -200.0, -87.5, -1.0, -0.0, 1.0, 88.0, 200.0, 1e30] * 4).view(2, 18)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        both = torch.cat((gate, torch.ones_like(gate)), 1).to(dtype)
        expected = torch.nn.functional.silu(both[:, :18].double())
        torch.testing.assert_close(silu_mul.in_c(both).double(), expected, rtol=tolerance, atol=1e-30)


def test_positions_turn_as_far_as_the_reference_turns_them():
    positions, frequencies = torch.tensor([0, 1, 77, 4095, 131071, 999_999]), torch.rand(24)
    angles = (positions.unsqueeze(1).float() * frequencies).double()
    for got, expected in zip(position_tables(positions, frequencies, 1.25), rope_tables(angles, 1.25), strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("rows", [*ROWS.values(), [(1, 1300), (1, 513), (8, 1027), (9, 20)]], ids=[*ROWS, "long"])
@pytest.mark.parametrize(
    "heads, kv_heads, page_size", [(4, 2, 16), (14, 2, 16), (18, 9, 16), (40, 1, 32), (20, 1, 4), (3, 3, 1)]
)
def test_attention_over_pages_equals_attention_written_out(rows, heads, kv_heads, page_size):
    for dtype, head_dim, tolerance in ((torch.float32, 48, 1e-5), (torch.bfloat16, 64, 2e-2)):
        case = Case(rows, heads=heads, kv_heads=kv_heads, page_size=page_size, head_dim=head_dim, dtype=dtype)
        case.q *= 3
        torch.testing.assert_close(case.run().double(), case.expected(), rtol=tolerance, atol=tolerance)


def test_bfloat16_keeps_scores_in_float32():
    case = Case(ROWS["all kinds in one step"], head_dim=64, dtype=torch.bfloat16, page_size=16)
    case.q *= 8  # scores of about 100, where bfloat16 would be off by 0.25
    assert (case.run().double() - case.expected()).abs().max() < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_bit_for_bit_alone_and_in_company(dtype):
    rows = [(1, length) for length in (33, 1040, 47, 600, 12)]
    make = {"page_size": 16, "head_dim": 64, "dtype": dtype}
    together = Case(rows, **make).run()
    for row in range(len(rows)):
        case = Case(rows, **make)
        case.q, case.slots = case.q[row : row + 1], case.slots[row : row + 1]
        case.keys, case.values = case.keys[row : row + 1], case.values[row : row + 1]
        case.query_lens, case.query_starts, case.context_lens = [1], [0], [rows[row][1]]
        case.page_table = case.page_table[row : row + 1]
        assert torch.equal(case.run()[0], together[row])


def test_short_rows_are_streamed_and_long_ones_are_not():
    case = Case([(1, 40), (8, 8), (9, 21)])
    assert not plan(case).decode and len(plan(case).prefill) == 1
    assert plan(case).streamed.tokens.tolist() == list(range(9))
    assert plan(case).streamed.lengths.tolist() == [40, *range(1, 9)]


PROMPTS = {
    "short": [(9, 9), (17, 17)],
    "beside single tokens": [(1, 40), (33, 33), (1, 300), (12, 270), (3, 9)],
    "behind a prefix": [(130, 700), (9, 257), (300, 513)],
    "ends of blocks and tiles": [(256, 256), (32, 512), (16, 272), (257, 257)],
}
TILED = {"page_size": 16, "head_dim": 64, "dtype": torch.bfloat16}


@pytest.fixture
def amx(c_kernels):
    """For what is computed on AMX only."""
    if not native.has_amx():
        pytest.skip("no AMX here")


def plan(case):
    return plan_attention(case.kv, case.query_lens, case.query_starts, case.context_lens, case.page_table)


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, page_size",
    [(14, 2, 64, 16), (4, 4, 128, 32), (40, 1, 32, 16), (6, 2, 96, 64), (2, 1, 256, 48)],
)
def test_attention_of_prompts_on_amx_equals_attention_written_out(rows, heads, kv_heads, head_dim, page_size):
    case = Case(rows, **TILED | {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size})
    case.q *= 3
    assert len(plan(case).tiled.rows) == sum(count > 8 for count, _ in rows) and not plan(case).prefill
    torch.testing.assert_close(case.run().double(), case.expected(), rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("amx")
def test_weights_of_prompts_hold_where_scores_are_large():
    case = Case([(40, 300)], **TILED)
    case.q *= 30  # scores of some hundreds: all but one weight of a token vanish
    torch.testing.assert_close(case.run().double(), case.expected(), rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("amx")
def test_a_prompts_token_is_the_same_bit_for_bit_alone_in_company_and_in_pieces():
    rows = [(300, 300), (20, 290), (513, 800), (1, 40)]
    case = Case(rows, heads=7, kv_heads=1, **TILED)
    together = case.run()
    for row, (count, length) in enumerate(rows):
        for first in (0, 1, 13, 128, 200, 262):
            left, start = count - first, case.query_starts[row] + first
            if left > 8:
                steps = plan_attention(case.kv, [left], [0], [length], case.page_table[row : row + 1])
                q = case.q[start : start + left]
                alone = paged_attention(q, None, None, case.kv, case.layer, steps, case.scale)
                assert torch.equal(alone, together[start : start + left])


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("other", [{"dtype": torch.float32}, {"head_dim": 48}, {"page_size": 8}], ids=str)
def test_prompts_that_tiles_cannot_take_stay_in_torch(other):
    assert [len(plan(Case([(9, 21)], **TILED | each)).prefill) for each in ({}, other)] == [0, 1]


def test_a_kernel_that_is_ruled_out_computes_in_torch():
    x, weight = torch.randn(4, 64), torch.ones(64)
    with registry.force("torch", "rms_norm"):
        assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm.reference(x, weight, 1e-6))
