"""What the engine counts for dashboards: histograms of times and sizes, and how requests ended. Torch-free.

Names are those of the exposition, without its prefix (`crane.api.metrics`).
"""

import time
from bisect import bisect_left

from crane.runtime.batch import Batch
from crane.runtime.types import Output

_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
_BOUNDS = {
    "time_to_first_token_seconds": _LONG_S,
    "inter_token_latency_seconds": _SHORT_S,
    "request_time_per_output_token_seconds": _SHORT_S,
    "e2e_request_latency_seconds": _LONG_S,
    "request_queue_time_seconds": _LONG_S,
    "request_prefill_time_seconds": _LONG_S,
    "request_decode_time_seconds": _LONG_S,
    "request_prompt_tokens": _TOKENS,
    "request_generation_tokens": _TOKENS,
    "iteration_tokens_total": _TOKENS,
}


class Histogram:
    """How many values fell at or below each bound and above the one before; the last count has no bound."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Metrics:
    """Fed by the engine after each commit and each forced end; a few comparisons per token."""

    def __init__(self):
        self.histograms = {name: Histogram(bounds) for name, bounds in _BOUNDS.items()}
        self.finished = {"stop": 0, "length": 0, "abort": 0, "error": 0, "timeout": 0}
        self._first_token = self.histograms["time_to_first_token_seconds"]
        self._next_token = self.histograms["inter_token_latency_seconds"]

    def step(self, batch: Batch, outputs: list[Output]) -> None:
        """One step, committed: `outputs` are what it gave."""
        now = time.monotonic()
        for row in batch.rows:
            sequence = row.sequence
            if not row.samples or row.void:
                continue
            if sequence.last_token_s is None:
                self._first_token.observe(now - sequence.arrival_s)
            else:  # tokens of one step have its time between them
                for _ in range(1 + row.num_accepted):
                    self._next_token.observe((now - sequence.last_token_s) / (1 + row.num_accepted))
            sequence.last_token_s = now
        self.histograms["iteration_tokens_total"].observe(batch.num_tokens)
        for output in outputs:
            if output.finish_reason is not None:
                self.end(output)

    def end(self, output: Output, reason: str | None = None) -> None:
        """The last output of one choice. reason: instead of the one it names."""
        self.finished[reason or output.finish_reason] += 1
        usage = output.usage
        if usage is None:
            return
        values = {
            "e2e_request_latency_seconds": usage.queue_s + usage.prefill_s + usage.decode_s,
            "request_queue_time_seconds": usage.queue_s,
            "request_prefill_time_seconds": usage.prefill_s,
            "request_decode_time_seconds": usage.decode_s,
            "request_prompt_tokens": usage.prompt_tokens,
            "request_generation_tokens": usage.completion_tokens,
        }
        if usage.completion_tokens > 1:
            values["request_time_per_output_token_seconds"] = usage.decode_s / (usage.completion_tokens - 1)
        for name, value in values.items():
            self.histograms[name].observe(value)

    def snapshot(self) -> dict:
        """{"finished": {reason: count}, "histograms": {name: {"bounds", "counts", "sum"}}}"""
        histograms = {
            name: {"bounds": each.bounds, "counts": each.counts, "sum": each.total}
            for name, each in self.histograms.items()
        }
        return {"finished": self.finished, "histograms": histograms}
