"""Endpoints that generate nothing: models, tokens, health, stats, and routes that do not exist."""

import json

import pytest

from crane.runtime.types import State
from tests.api.harness import INFO

LOADING = State("loading", loaded_bytes=3, total_bytes=10)


def test_models_lists_the_served_model(client):
    body = client().get("/v1/models").json()
    assert body["object"] == "list"
    (entry,) = body["data"]
    assert isinstance(entry.pop("created"), int)
    assert entry == {"id": "org/tiny", "object": "model", "owned_by": "crane", "max_model_len": 256}


@pytest.mark.parametrize("path", ["/v1/models/org/tiny", "/v1/models/org%2Ftiny", "/v1/models/"])
def test_model_ids_with_slashes_are_found(client, path):
    here = client()
    path = path.replace("%2F", "/")  # servers unquote before the application sees the path
    body = here.get(path).json()
    assert body.get("id", body.get("data", [{}])[0].get("id")) == "org/tiny"


def test_unknown_model_is_404(client):
    response = client().get("/v1/models/nope/x")
    assert response.status == 404
    error = response.json()["error"]
    assert (error["code"], error["param"], error["type"]) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )


@pytest.mark.parametrize("prefix", ["/v1", ""])
def test_tokenize_and_detokenize_are_inverse(client, prefix):
    here = client()
    body = here.post(f"{prefix}/tokenize", {"text": "The sky is blue."}).json()
    assert body["count"] == len(body["tokens"]) > 3 and body["max_model_len"] == 256
    back = here.post(f"{prefix}/detokenize", {"tokens": body["tokens"]}).json()
    assert back == {"text": "The sky is blue.", "prompt": "The sky is blue."}


def test_tokenize_speaks_every_dialect(client, model):
    here = client()
    single = here.post("/v1/tokenize", {"prompt": "ab"}).json()["tokens"]
    many = here.post("/tokenize", {"prompt": ["ab", "cdé"], "return_token_strs": True}).json()
    assert many["tokens"][0] == single and many["count"] == [len(ids) for ids in many["tokens"]]
    assert "".join(many["token_strs"][0]) == "ab"
    chat = here.post("/v1/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}).json()
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert chat["tokens"] == model.tokenizer.encode(text, add_special_tokens=False)
    bare = {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": False}
    assert here.post("/v1/tokenize", bare).json()["count"] < chat["count"]


def test_detokenize_speaks_every_dialect(client, model):
    here = client()
    ids = model.tokenizer.encode("<|im_start|>a")
    assert here.post("/detokenize", {"tokens": [ids, ids]}).json()["text"] == ["a", "a"]
    assert (
        here.post("/detokenize", {"tokens": ids, "skip_special_tokens": False}).json()["text"]
        == "<|im_start|>a"
    )
    assert here.post("/detokenize", {"tokens": []}).json()["text"] == ""


def test_tokens_and_models_answer_while_the_engine_loads(client):
    here = client(state=LOADING)
    assert here.get("/v1/models").status == 200
    body = here.post("/v1/tokenize", {"text": "a"}).json()
    assert body["max_model_len"] == 1024  # the model's own, until the engine says what it serves


def test_health_is_ok_only_when_the_engine_is_ready(client):
    ready = client().get("/health")
    assert (ready.status, ready.json()) == (200, {"status": "ok"})
    loading = client(state=LOADING).get("/health")
    assert loading.status == 503 and loading.headers["retry-after"]
    assert loading.json() == {"status": "loading", "reason": "", "loaded_bytes": 3, "total_bytes": 10}
    failed = client(state=State("failed", reason="no memory")).get("/health")
    assert (failed.status, failed.json()) == (503, {"status": "failed", "reason": "no memory"})


def test_stats_are_the_engines_own(client):
    here = client(answer={"total_requests": 3})
    assert here.get("/v1/stats").json() == {"total_requests": 3}
    assert here.link.calls == [("stats", None)]
    assert client(state=LOADING).get("/v1/stats").status == 503


@pytest.mark.parametrize(
    "status, code", [("starting", "engine_unavailable"), ("loading", "engine_unavailable"),
                     ("draining", "engine_unavailable"), ("lost", "engine_unavailable"),
                     ("failed", "engine_unavailable")]
)  # fmt: skip
def test_generation_is_503_with_retry_after_unless_ready(client, status, code):
    info = INFO if status == "draining" else None
    here = client(state=State(status, reason="because", info=info))
    response = here.post("/v1/completions", {"prompt": "a", "stream": True})
    assert response.status == 503 and int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", code) and "because" in error["message"]
    assert here.link.opened == []


def test_unknown_route_is_404_in_openais_shape(client):
    response = client().get("/v2/nothing")
    assert response.status == 404
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert "/v2/nothing" in response.json()["error"]["message"]


def test_wrong_method_of_a_probe_says_nothing_of_the_engine(client):
    for path in ("/health", "/health_generate", "/generate", "/flush_cache", "/abort_request"):
        assert client().request("PATCH", path).status == 405


@pytest.mark.parametrize("method, path, status, kind", [
    ("GET", "/v1/messages", 405, "invalid_request_error"), ("POST", "/v1/messages/batches", 404, "not_found_error"),
    ("PATCH", "/v1/messages/count_tokens", 405, "invalid_request_error"),
])  # fmt: skip
def test_routes_that_are_not_there_are_refused_in_the_dialect_of_their_place(client, method, path, status, kind):
    response = client().request(method, path)
    assert response.status == status
    error = response.json()
    assert error["type"] == "error" and error["error"]["type"] == kind and path in error["error"]["message"]
    elsewhere = client().request(method, path.replace("messages", "messages_"))
    assert elsewhere.status == 404 and elsewhere.json()["error"]["param"] is None


def test_wrong_method_is_405_and_names_the_right_ones(client):
    response = client().get("/v1/chat/completions")
    assert response.status == 405 and "POST" in response.headers["allow"]
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/org/tiny"])
def test_head_is_get_without_a_body(client, path):
    response = client().request("HEAD", path)
    assert (response.status, response.body) == (200, b"")
    assert response.headers["content-length"] == str(len(client().get(path).body))


def test_request_id_is_echoed_or_made(client):
    here = client()
    assert here.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = {here.get("/nowhere").headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    assert here.get("/health", headers={"x-request-id": "a b" * 99}).headers["x-request-id"] != "a b" * 99
    assert json.loads(here.get("/health").body) == {"status": "ok"}
