"""Histograms and counts of the engine."""

import time
from types import SimpleNamespace

import pytest

from crane.runtime.metrics import Histogram, Metrics
from crane.runtime.types import Output, Usage


def test_histogram_counts_a_value_at_the_first_bound_that_is_not_below_it():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5, 99.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 2] and histogram.total == 106.5


def row(sequence, samples=True):
    return SimpleNamespace(sequence=sequence, samples=samples, num_accepted=0, void=False)


def test_first_token_counts_from_arrival_and_later_ones_from_the_one_before():
    metrics = Metrics()
    sequence = SimpleNamespace(arrival_s=time.monotonic() - 3.0, last_token_s=None)
    chunk = SimpleNamespace(rows=[row(sequence, samples=False)], num_tokens=500)
    step = SimpleNamespace(rows=[row(sequence)], num_tokens=1)
    metrics.step(chunk, [])
    assert sequence.last_token_s is None
    metrics.step(step, [])
    sequence.last_token_s -= 0.2
    metrics.step(step, [])
    first = metrics.histograms["time_to_first_token_seconds"]
    later = metrics.histograms["inter_token_latency_seconds"]
    assert sum(first.counts) == sum(later.counts) == 1
    assert first.total == pytest.approx(3.0, abs=0.1) and later.total == pytest.approx(0.2, abs=0.1)
    assert metrics.histograms["iteration_tokens_total"].total == 502


def test_an_end_counts_its_reason_sizes_and_times():
    metrics = Metrics()
    usage = Usage(100, 5, queue_s=1.0, prefill_s=2.0, decode_s=4.0)
    metrics.step(SimpleNamespace(rows=[], num_tokens=1), [Output("a", 0, [1], "length", usage=usage)])
    metrics.end(Output("b", 0, [], "abort", usage=usage), "stop")
    metrics.end(Output("c", 0, [], "error"))
    snapshot = metrics.snapshot()
    assert snapshot["finished"] == {"stop": 1, "length": 1, "abort": 0, "error": 1, "timeout": 0}
    sums = {name: each["sum"] for name, each in snapshot["histograms"].items()}
    assert sums["e2e_request_latency_seconds"] == 14.0 and sums["request_prompt_tokens"] == 200
    assert sums["request_time_per_output_token_seconds"] == 2.0 and sums["request_queue_time_seconds"] == 2.0


def test_a_step_costs_little():
    metrics = Metrics()
    sequences = [SimpleNamespace(arrival_s=0.0, last_token_s=None) for _ in range(32)]
    batch = SimpleNamespace(rows=[row(sequence) for sequence in sequences], num_tokens=32)
    started = time.process_time()
    for _ in range(100):
        metrics.step(batch, [])
    assert (time.process_time() - started) / 100 < 1e-3
