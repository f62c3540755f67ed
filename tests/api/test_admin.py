"""What the server says of itself, and its aborts, probes and flushes: shapes under both drivers, no engine."""

import pytest

from crane import __version__
from crane.errors import EngineError
from crane.runtime.settings import Settings
from crane.runtime.types import State
from tests.api.harness import INFO

LOADING = State("loading")
DRAINING = State("draining", info=INFO)
COUNTERS = {"total_requests": 3, "uptime_s": 5.0, "avg_decode_tokens_per_sec": 9.5, "active_sequences": 1,
            "waiting_sequences": 2}  # fmt: skip


@pytest.fixture
def refusing(client):
    """refusing(error) -> a client whose link refuses every question with it."""

    def make(error):
        here = client()

        async def later(*args):
            raise error

        def now(*args):
            raise error

        here.link.call = now if here.kind == "wsgi" else later
        return here

    return make


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info_has_the_seeds_and_sglangs_fields(client, path):
    body = client(settings=Settings(model_path="m")).get(path).json()
    assert body == {
        "model_path": "m", "tokenizer_path": "m", "served_model_name": "org/tiny", "model_type": "qwen25",
        "architectures": ["Qwen2ForCausalLM"], "is_generation": True, "preferred_sampling_params": None,
        "weight_version": "default", "load_format": "auto", "reasoning_parser": None, "tool_call_parser": None,
        "disaggregation_mode": "null", "has_image_understanding": False, "has_audio_understanding": False,
        "dtype": "float32", "device": "cpu", "max_model_len": 256, "vocab_size": 323,
    }  # fmt: skip
    loading = client(state=LOADING).get(path)
    assert loading.status == 200 and loading.json()["device"] is None


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info_has_settings_engine_and_counters(client, path):
    settings = Settings(model_path="m", port=8081, cpu=True, api_key="sesame")
    here = client(settings=settings, answer=dict(COUNTERS))
    response = here.get(path, headers={"authorization": "Bearer sesame"})
    body = response.json()
    assert b"sesame" not in response.body and "api_key" not in body
    seeds = ("version", "model_path", "model_type", "host", "port", "max_concurrent", "decode_tokens_per_seq")
    assert [body[name] for name in seeds] == [__version__, "m", "qwen25", "0.0.0.0", 8081, 8, 16]
    assert body["stats"] == COUNTERS
    assert body["launch_command"] == "crane serve --model-path=m --port=8081 --cpu"
    assert body["max_total_num_tokens"] == 64 * 16 and body["startup_time"] > 1e9
    (state,) = body["internal_states"]
    assert (state["last_gen_throughput"], state["memory_usage"]["token_capacity"]) == (9.5, 1024)
    assert state["effective_max_running_requests_per_dp"] == 8
    assert client(state=LOADING).get(path).status == 503


@pytest.mark.parametrize("path", ["/ready", "/ping", "/health"])
def test_readiness_is_the_engines(client, path):
    assert (client().get(path).status, client().get(path).json()) == (200, {"status": "ok"})
    assert client(state=LOADING).get(path).status == 503


def test_health_generate_asks_the_engine_for_a_token(client):
    here = client(answer={"alive": True})
    response = here.get("/health_generate")
    assert (response.status, response.json()) == (200, {"status": "ok"})
    assert [call[0] for call in here.link.calls] == ["probe"]
    loading = client(state=LOADING)
    response = loading.get("/health_generate")
    assert (response.status, response.json()["status"], loading.link.calls) == (503, "loading", [])


def test_health_generate_is_503_when_nothing_is_generated(refusing):
    response = refusing(EngineError("internal", "no answer to 'probe' within 30 s")).get("/health_generate")
    assert (response.status, response.headers["retry-after"]) == (503, "2")
    assert response.json() == {"status": "failed", "reason": "no answer to 'probe' within 30 s"}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_flush_cache_is_text_and_400_when_busy(client, method):
    here = client(answer={"flushed": True, "pages": 4})
    done = here.request(method, "/flush_cache")
    assert (done.status, done.body) == (200, b"Cache flushed.\n")
    assert done.headers["content-type"] == "text/plain; charset=utf-8"
    here = client(answer={"flushed": False, "pages": 0})
    busy = here.request(method, "/flush_cache?timeout=2.5")
    assert busy.status == 400 and busy.body.startswith(b"Flush cache failed")
    assert here.link.calls == [("flush_cache", {"timeout_s": 2.5})]


@pytest.mark.parametrize("timeout", ["x", "-1", "nan", "601"])
def test_flush_cache_wants_a_sane_timeout(client, timeout):
    response = client().get(f"/flush_cache?timeout={timeout}")
    expected = f"timeout: expected seconds in 0..600, got '{timeout}'"
    assert (response.status, response.json()) == (400, {"error": {"message": expected}})


@pytest.mark.parametrize("body, call", [
    ({"rid": "a"}, ("abort", ("a", ""))),
    ({"abort_all": True}, ("abort", (None, ""))),
    ({"rid": "a", "abort_all": True}, ("abort", (None, ""))),
])  # fmt: skip
@pytest.mark.parametrize("state", [None, DRAINING])
def test_abort_reaches_the_engine(client, body, call, state):
    here = client(answer=2, **({"state": state} if state else {}))
    response = here.post("/abort_request", body)
    assert (response.status, response.json()) == (200, {"success": True, "num_aborted": 2})
    assert here.link.calls == [call]


@pytest.mark.parametrize("body", [{}, {"rid": ""}, {"rid": None}, {"rid": "a", "abort_all": False}])
def test_abort_of_nothing_is_200(client, body):
    here = client(answer=0, **({"state": LOADING} if body.get("rid") else {}))
    response = here.post("/abort_request", body)
    assert (response.status, response.json()) == (200, {"success": True, "num_aborted": 0})
    assert here.link.calls == []


def test_abort_with_an_unknown_field_is_400(client):
    response = client().post("/abort_request", {"id": "a"})
    assert response.status == 400 and response.json()["message"] == "unknown field 'id'"


def test_health_says_that_the_engine_is_stuck_and_why(client):
    here = client(state=State("stuck", reason="a step has been running for more than 120 s"))
    for path in ("/health", "/ready", "/health_generate"):
        answer = here.get(path)
        assert answer.status == 503 and answer.headers["retry-after"] == "2"
        assert answer.json() == {"status": "stuck", "reason": "a step has been running for more than 120 s"}
    refused = here.post("/v1/completions", {"prompt": "a"})
    assert refused.status == 503 and "stuck: a step has been" in refused.json()["error"]["message"]
    assert here.get("/v1/models").status == 200
