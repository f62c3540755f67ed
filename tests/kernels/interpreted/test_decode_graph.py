"""What CUDA graphs and repeatable serving need of decode attention: fixed launches, and results without neighbours."""

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from crane.kernels import paged_plan, plan_decode
from crane.kernels.paged_plan import plan_decode_rows
from crane.kernels.registry import force
from crane.kernels.rows import Rows, attend_rows, make_rows

LENGTHS = [[1, 1, 1], [700, 5, 0], [64, 65, 1500], [0, 0, 0]]


@pytest.fixture
def launches(monkeypatch):
    """Every launch of a Triton kernel, so that it can be made again as it was."""
    made = []
    run = InterpretedFunction.run

    def record(function, *args, grid, warmup, **named):
        made.append((function, args, grid, named))
        return run(function, *args, grid=grid, warmup=warmup, **named)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    yield lambda: [run(function, *args, grid=grid, warmup=False, **named) for function, args, grid, named in made]


def test_launches_captured_once_serve_every_length(launches):
    torch.manual_seed(0)
    arguments = make_rows([(1, 1500)] * 3, "cpu", torch.float32, heads=4, kv_heads=2, head_dim=32, page_size=64)
    q, kv, layer, full, scale = (arguments[name] for name in ("q", "kv", "layer", "rows", "scale"))
    contexts = torch.tensor(LENGTHS[0], dtype=torch.int32)
    rows = Rows(full.query_starts, full.query_lens, contexts, full.page_table, 1, 1500)
    with force("triton"):
        out = plan_decode_rows(rows, kv).attend(q, kv, layer, scale)
    for lengths in LENGTHS:
        contexts.copy_(torch.tensor(lengths))
        q.copy_(torch.randn(q.shape))
        out.fill_(float("nan"))
        assert len(launches()) == 3  # plan, parts, merge
        torch.testing.assert_close(out, attend_rows(q, kv, layer, rows, scale, None), rtol=1e-5, atol=1e-5)


def test_with_parts_of_fixed_size_a_row_does_not_notice_its_neighbours(monkeypatch):
    monkeypatch.setattr(paged_plan, "_FIXED_PART", 128)
    for cost in ("_START", "_MERGE"):  # division costs nothing, so that all that is free is divided, too
        monkeypatch.setattr(plan_decode, cost, 0)
    torch.manual_seed(0)
    shapes = [(1, 400), (1, 130), (2, 257)]
    arguments = make_rows(shapes, "cpu", torch.float32, heads=4, kv_heads=2, head_dim=32, page_size=16)
    q, kv, layer, rows, scale = (arguments[name] for name in ("q", "kv", "layer", "rows", "scale"))

    def attend(rows, fixed):
        with force("triton"):
            return plan_decode_rows(rows, kv, fixed).attend(q, kv, layer, scale)

    different = 0
    together, chosen = attend(rows, True), attend(rows, False)
    for row, (count, length) in enumerate(shapes):
        own = slice(row, row + 1)
        alone = Rows(rows.query_starts[own], rows.query_lens[own], rows.context_lens[own], rows.page_table[own],
                     count, length)  # fmt: skip
        tokens = slice(int(alone.query_starts), int(alone.query_starts) + count)
        assert torch.equal(attend(alone, True)[tokens], together[tokens])
        different += not torch.equal(attend(alone, False)[tokens], chosen[tokens])
    assert different > 0
