"""/metrics: Prometheus' text form of what the engine answers."""

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from crane.runtime.metrics import Metrics
from crane.runtime.settings import Settings
from crane.runtime.types import EngineStats, Output, State, Usage
from tests.api.harness import INFO


def payload():
    """What an engine answers, as it comes off the wire."""
    import msgspec

    metrics = Metrics()
    metrics.end(Output("a", 0, [1], "stop", usage=Usage(30, 4, queue_s=0.02, prefill_s=0.1, decode_s=0.3)))
    stats = EngineStats(
        total_requests=3, prompt_tokens=40, generated_tokens=9, preemptions=2, active_sequences=5, waiting_sequences=6,
        num_pages=64, free_pages=48, cached_tokens=10,
    )  # fmt: skip
    answer = metrics.snapshot() | {"stats": msgspec.to_builtins(stats)}
    return msgspec.msgpack.decode(msgspec.msgpack.encode(answer))


def samples(text: str) -> dict:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(value for name, value in sorted(sample.labels.items()) if name != "model_name")
            found[sample.name, *labels] = sample.value
            assert sample.labels["model_name"] == "org/tiny"
    return found


def test_counters_and_gauges_have_the_names_that_dashboards_know(client):
    here = client(answer=payload())
    response = here.get("/metrics")
    assert response.status == 200 and response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert here.link.calls == [("metrics", None)]
    values = samples(response.body.decode())
    assert values["crane:num_requests_running",] == 5 and values["crane:num_requests_waiting",] == 6
    assert values["crane:kv_cache_usage_perc",] == 0.25 and values["crane:cache_hit_rate",] == 0.25
    assert values["crane:prompt_tokens_total",] == 40 and values["crane:generation_tokens_total",] == 9
    assert values["crane:num_preemptions_total",] == 2 and values["crane:num_requests_total",] == 3
    assert values["crane:request_success_total", "stop"] == 1 and values["crane:request_success_total", "abort"] == 0


def test_histograms_are_cumulative_and_end_with_infinity(client):
    values = samples(client(answer=payload()).get("/metrics").body.decode())
    bucket = "crane:e2e_request_latency_seconds_bucket"
    assert values[bucket, "0.25"] == 0 and values[bucket, "0.5"] == 1 and values[bucket, "+Inf"] == 1
    assert values["crane:e2e_request_latency_seconds_count",] == 1
    assert abs(values["crane:e2e_request_latency_seconds_sum",] - 0.42) < 1e-9
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "request_queue_time_seconds"):
        assert (f"crane:{name}_count",) in values


@pytest.mark.parametrize("setting, shown", [
    ("none", ()), ("vllm", ("vllm",)), ("sglang", ("sglang",)), ("both", ("vllm", "sglang")),
])  # fmt: skip
def test_dashboards_of_other_servers_find_their_names_when_asked_to(client, setting, shown):
    here = client(answer=payload(), settings=Settings(metric_aliases=setting))
    values = samples(here.get("/metrics").body.decode())
    assert {name.partition(":")[0] for name, *_ in values} == {"crane", *shown}
    if "vllm" in shown:
        assert values["vllm:num_requests_waiting",] == 6 and values["vllm:prefix_cache_hits_total",] == 10
        assert values["vllm:e2e_request_latency_seconds_bucket", "+Inf"] == 1
        assert values["vllm:request_success_total", "stop"] == 1
    if "sglang" in shown:
        assert values["sglang:num_running_reqs",] == 5 and values["sglang:token_usage",] == 0.25
        assert values["sglang:generation_tokens_total",] == 9 and values["sglang:queue_time_seconds_count",] == 1


def test_every_metric_explains_itself(client):
    text = client(answer=payload()).get("/metrics").body.decode()
    assert len(re.findall(r"^# TYPE crane:", text, re.M)) == len(re.findall(r"^# HELP crane:\S+ \w", text, re.M)) > 20


def test_metrics_are_there_while_the_engine_drains_and_503_when_it_is_gone(client):
    assert client(state=State("draining", info=INFO), answer=payload()).get("/metrics").status == 200
    gone = client(state=State("lost")).get("/metrics")
    assert gone.status == 503 and gone.headers["retry-after"]
