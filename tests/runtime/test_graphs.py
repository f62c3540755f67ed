"""CUDA graphs of decode steps: which sizes there are, when they are made, and on a GPU that they change nothing."""

import itertools

import pytest
import torch

from crane.runtime.batch import Row
from crane.runtime.engine import Engine
from crane.runtime.graphs import DecodeGraphs, DecodeStep, sizes
from crane.runtime.sequence import Sequence
from crane.runtime.settings import Settings
from crane.runtime.types import Generate, SamplingParams
from tests.tiny import make_tiny


def test_small_sizes_are_dense_and_the_largest_is_the_limit():
    assert sizes(1) == [1]
    assert sizes(3) == [1, 2, 3]
    assert sizes(32) == [1, 2, 4, 8, 16, 24, 32]
    assert sizes(20) == [1, 2, 4, 8, 16, 20]


class Graphs(DecodeGraphs):
    """Pretends to capture."""

    def __init__(self, monkeypatch, fails_at=None):
        super().__init__(None, torch.zeros(8, 1, 2, 4, 1, 8), 16, 32)
        self.reason, self._pool, self.order = None, object(), []

        def capture(step, pool):
            if step.num_rows == fails_at:
                raise torch.OutOfMemoryError("no room\nat all")
            self.order.append(step.num_rows)

        monkeypatch.setattr(DecodeStep, "capture", capture)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def row(count=1, **changes):
    sequence = Sequence(Generate("r", [1] * 8, SamplingParams(), **changes), 0, 1, frozenset())
    return Row(sequence, 7, count, True)


def test_graphs_are_captured_one_at_a_time_the_largest_first(monkeypatch):
    graphs = Graphs(monkeypatch)
    assert [graphs.capture_next() for _ in range(7)] == [True, True, True, True, False, False, False]
    assert graphs.order == [16, 8, 4, 2, 1]
    assert graphs.state == "for 1, 2, 4, 8, 16 rows"


def test_a_step_takes_the_smallest_graph_it_fits_in(monkeypatch):
    graphs = Graphs(monkeypatch)
    assert graphs.step_for([row()]) is None
    while graphs.capture_next():
        pass
    assert graphs.step_for([row()] * 3).num_rows == 4
    assert graphs.step_for([row()] * 16).num_rows == 16
    assert graphs.step_for([row()] * 17) is None
    assert graphs.step_for([row(), row(count=2)]) is None
    assert graphs.step_for([row(pooling="last")]) is None


def test_what_cannot_be_captured_is_said_once_and_the_others_stay(monkeypatch, caplog):
    graphs = Graphs(monkeypatch, fails_at=4)
    while graphs.capture_next():
        pass
    assert graphs.state == "for 8, 16 rows: 4 rows cannot be captured: no room"
    assert [record.message for record in caplog.records] == [
        "CUDA graphs are not used for more: 4 rows cannot be captured: no room"
    ]
    assert graphs.step_for([row()] * 3).num_rows == 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_and_overlapped_steps_change_no_token(tmp_path):
    model = str(make_tiny(tmp_path, "qwen3", head_dim=64))
    found = {}
    for graphs, overlap in itertools.product((False, True), ("off", "auto")):
        engine = Engine(Settings(model_path=model, dtype="float32", max_model_len=256, cuda_graphs=graphs,
                                 overlap=overlap))
        while engine.prepare():
            pass
        assert engine.runner.graphs.state.startswith("for ") if graphs else engine.runner.graphs is None
        tokens = found[graphs, overlap] = {}
        for place in range(5):
            sampling = SamplingParams(max_tokens=20 + 9 * place, ignore_eos=True, seed=place)
            engine.add(Generate(f"r{place}", list(range(3, 9 + 7 * place)), sampling))
        while engine.has_work:
            for output in engine.step():
                tokens.setdefault(output.rid, []).extend(output.token_ids)
        assert (engine.stats().overlap["steps_ahead"] > 20) == (overlap == "auto")
    assert all(tokens == found[False, "off"] for tokens in found.values())
