"""Keys, metrics, the access log and CORS over real sockets, with real workers and a real engine."""

import contextlib
import http.client
import json
import re
import signal
import socket
import time
import urllib.parse

import psutil
import pytest

from tests.serving import run_server, start_server, wait_for
from tests.tiny import make_tiny

BODY = {"prompt": "hello", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
DRIVERS = {"asgi": (), "gthread": ("-k", "gthread", "--threads", "8")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("manage") / "tiny-qwen2", "qwen2")


@pytest.fixture(scope="module", params=list(DRIVERS))
def server(request, tiny):
    """Two workers, one engine, one key."""
    env = {"CRANE_API_KEY": "sk-test", "CRANE_MAX_BODY": "100k", "CRANE_CORS_ORIGINS": "https://app.example"}
    with start_server(tiny, "-w", "2", *DRIVERS[request.param], env=env) as running:
        yield running


def ask(server, method, path, body=None, **headers):
    """(status, headers, body) on a connection of its own, so that any worker may answer."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=30)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, names)
    response = connection.getresponse()
    with contextlib.closing(connection):
        return response.status, dict(response.getheaders()), response.read()


def counter(server, name: str) -> float:
    text = ask(server, "GET", "/metrics")[2].decode()
    return float(re.search(rf"^crane:{name}(?:{{[^}}]*}})? (\S+)$", text, re.M)[1])


def complete(server, **headers):
    return ask(server, "POST", "/v1/completions", json.dumps(BODY).encode(), authorization="Bearer sk-test", **headers)


def test_only_a_key_opens_the_door(server):
    assert ask(server, "GET", "/v1/models")[0] == 401
    assert ask(server, "GET", "/v1/models", x_api_key="sk-test")[0] == 200
    assert ask(server, "GET", "/health")[0] == 200
    assert complete(server)[0] == 200


def test_counters_are_the_same_whichever_worker_answers(server):
    before = counter(server, "generation_tokens_total")
    for _ in range(6):
        assert complete(server)[0] == 200
    assert {counter(server, "generation_tokens_total") for _ in range(8)} == {before + 36}
    assert counter(server, "time_to_first_token_seconds_count") == counter(server, "num_requests_total")


def test_the_access_log_has_a_line_from_the_worker_that_answered(server):
    complete(server, x_request_id="find-me")
    line = (r"POST /v1/completions 200 bytes=\d+ ms=\S+ first_ms=\S+ prompt_tokens=\d+ completion_tokens=6 "
            r"key=key-[0-9a-f]{8} id=find-me")
    wait_for(lambda: re.search(line, server.log()), 5, server.log)


def test_the_key_is_in_no_log_and_in_no_process_list(server):
    complete(server)
    assert "sk-test" not in server.log()
    processes = [server.process.pid, *server.worker_pids(), *server.engine_pids()]
    assert len(processes) >= 4
    assert not any("sk-test" in " ".join(psutil.Process(pid).cmdline()) for pid in processes)


def test_a_page_of_an_allowed_origin_may_ask(server):
    status, headers, _ = ask(server, "OPTIONS", "/v1/completions", origin="https://app.example",
                             access_control_request_method="POST")  # fmt: skip
    assert status == 200 and headers["access-control-allow-origin"] == "https://app.example"
    assert complete(server, origin="https://app.example")[1]["access-control-allow-origin"] == "https://app.example"


def test_too_long_a_body_is_refused_before_it_is_sent(server):
    host = urllib.parse.urlsplit(server.url)
    with socket.create_connection((host.hostname, host.port), timeout=10) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nx-api-key: sk-test\r\nContent-Length: 9000000\r\n\r\n"
        connection.sendall(head.encode())
        started = time.monotonic()
        assert connection.recv(100).startswith(b"HTTP/1.1 413") and time.monotonic() - started < 5


@pytest.mark.parametrize("text, reason", [(None, "cannot read"), ("# no key\n", "holds no API key")])
@pytest.mark.parametrize("how", ["crane", "gunicorn"])
def test_a_key_file_of_no_use_stops_the_server_with_one_line(tiny, tmp_path, how, text, reason):
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    status, log, _ = run_server(tiny, how=how, env={"CRANE_API_KEY_FILE": str(path)})
    assert status != 0 and str(path) in log and reason in log and "Traceback" not in log


def test_the_open_house_note_goes_away_with_a_key(tiny, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("sk-test\n")
    for options, expected in (((), True), (("--api-key-file", str(keys)), False)):
        with start_server(tiny, "--host", "0.0.0.0", *options, how="crane") as server:
            wait_for(lambda: "try: curl" in server.log(), 10, server.log)
            assert ("every machine that reaches this one" in server.log()) is expected
            assert ("Authorization: Bearer" in server.log()) is not expected


def test_keys_are_changed_by_a_sighup(tiny, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("sk-old\n")
    with start_server(tiny, "--api-key-file", str(keys), how="crane") as server:
        assert ask(server, "GET", "/v1/models", x_api_key="sk-old")[0] == 200
        keys.write_text("sk-new\n")
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: ask(server, "GET", "/v1/models", x_api_key="sk-new")[0] == 200, 20, server.log)
        wait_for(lambda: ask(server, "GET", "/v1/models", x_api_key="sk-old")[0] == 401, 20, server.log)
