"""A real server under hostile requests: each is refused by name or answered, and nobody else notices."""

import http.client
import os
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.api.hostile import all_cases
from tests.serving import start_server, wait_for
from tests.tiny import make_tiny

# of the cases, every so many-th; 1 for a long look by hand
STRIDE = int(os.environ.get("HOSTILE_STRIDE", "12"))
HI = [{"role": "user", "content": "Hi"}]
GREEDY = {"max_tokens": 4, "temperature": 0}
BASES = {
    "/v1/chat/completions": {"messages": HI, **GREEDY},
    "/v1/chat/completions/render": {"messages": HI},
    "/v1/completions": {"prompt": "a", **GREEDY},
    "/v1/tokenize": {"text": "a"},
    "/v1/detokenize": {"tokens": [1]},
    "/v1/embeddings": {"input": "a"},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v1/messages": {"messages": HI, **GREEDY},
    "/v1/messages/count_tokens": {"messages": HI},
    "/v1/responses": {"input": "a", "max_output_tokens": 4, "temperature": 0, "store": False},
    "/v1/responses/input_tokens": {"input": "a"},
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 4, "temperature": 0}},
    "/v1/plan": {"messages": HI},
    "/abort_request": {"rid": "nobody"},
}
STREAMING = {"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/generate"}
SAME = {"/tokenize", "/detokenize", "/score", "/rerank", "/v2/rerank"}  # other names of routes above
REFUSALS = (400, 404, 413)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", max_position=128)


@pytest.fixture(scope="module")
def server(tiny):
    with start_server(tiny, env={"CRANE_DTYPE": "float32", "CRANE_ACCESS_LOG": "0"}) as server:
        yield server


class Talker:
    """One client with a connection of its own."""

    def __init__(self, server):
        self._address = urllib.parse.urlsplit(server.url).netloc
        self._connection = None

    def post(self, path: str, body: bytes, method: str = "POST") -> tuple[int, str, bytes]:
        """(status, content type, body)."""
        for _ in range(2):
            if self._connection is None:
                self._connection = http.client.HTTPConnection(self._address, timeout=30)
            try:
                self._connection.request(method, path, body)
                response = self._connection.getresponse()
                return response.status, response.headers.get("content-type", ""), response.read()
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                self._connection = None  # an idle connection that the server has closed meanwhile
        raise AssertionError(f"no answer to {path} {body[:200]}")


def greedy(server):
    answers = [server.post("/v1/completions", {"prompt": "a b c", "max_tokens": 12, "temperature": 0, "logprobs": 1}),
               server.post("/v1/chat/completions", {"messages": HI, "max_tokens": 12, "temperature": 0})]
    assert [status for status, _ in answers] == [200, 200], answers
    return [answer["choices"] for _, answer in answers]


def idle(server) -> bool:
    stats = server.get("/v1/stats")[1]
    return stats["active_sequences"] == stats["waiting_sequences"] == 0 and stats["free_pages"] == stats["num_pages"]


def check(talker: Talker, case) -> str:
    """What is wrong with the answer to a case; "" when nothing is."""
    status, kind, body = talker.post(case.path, case.body)
    text = body.decode(errors="replace")
    # 429: a valid request for more than the queue holds; SGLang says 503 of that
    in_time = status != 504 or case.field == "timeout_s" and not case.wrong
    if status not in (200, 429, 504, *REFUSALS) and not (status == 503 and case.path == "/generate") or not in_time:
        return f"status {status}: {text[:200]}"
    if not case.wrong:
        return ""
    if status not in REFUSALS:
        return f"was taken: {text[:200]}"
    if "json" not in kind or "Traceback" in text or "/crane/" in text or len(body) > 4000:
        return f"was refused badly: {text[:200]}"
    named = case.field in text or case.name.endswith("object") and "nknown field" in text
    return "" if named else f"was refused without naming {case.field}: {text[:200]}"


def streamed(case):
    """The same, asked for as a stream."""
    return replace(case, name=f"stream, {case.name}", body=b'{"stream": true, ' + case.body[1:])


def test_every_field_of_every_route_refuses_what_it_cannot_take_and_the_next_request_answers_as_before(server):
    document = server.get("/openapi.json")[1]
    bodies = {path for path, operations in document["paths"].items()
              if any("requestBody" in operation for operation in operations.values())}
    assert bodies == BASES.keys() | SAME
    before = greedy(server)
    cases = list(all_cases(document, BASES))[::STRIDE]
    cases += [streamed(case) for case in cases[::3] if case.wrong and case.path in STREAMING and case.field
              and "stream" not in case.name]

    def run(part):
        talker = Talker(server)
        return [f"{case.path} {case.name} {problem}" for case in part if (problem := check(talker, case))]

    with ThreadPoolExecutor(4) as pool:
        problems = sum(pool.map(run, (cases[i::4] for i in range(4))), [])
    print(f"{len(cases)} hostile requests, {len(problems)} problems")
    assert not problems, "\n".join(problems[:40])
    wait_for(lambda: idle(server))
    assert greedy(server) == before and "Traceback" not in server.log()
