"""Clients that are slow, rude or malicious, over real sockets: nobody else notices, and nothing is left behind."""

import contextlib
import json
import re
import socket
import struct
import threading
import time
import urllib.parse
from pathlib import Path

import psutil
import pytest

from tests.serving import start_server, wait_for
from tests.tiny import make_tiny

MAX_CONNECTIONS, MAX_BODY = 150, 200_000
SOMAXCONN = int(Path("/proc/sys/net/core/somaxconn").read_text())
HEADER_S, BODY_S, WRITE_S = 1.0, 1.5, 1.5
GREEDY = {"prompt": "a b", "max_tokens": 6, "temperature": 0}
ENDLESS = {"prompt": "a", "max_tokens": 50_000, "ignore_eos": True, "temperature": 0, "stream": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", max_position=60_000)


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    return tmp_path_factory.mktemp("audit") / "lines"


@pytest.fixture(scope="module")
def server(tiny, audit):
    env = {"CRANE_MAX_CONNECTIONS": str(MAX_CONNECTIONS), "CRANE_MAX_BODY": str(MAX_BODY), "CRANE_DTYPE": "float32",
           "CRANE_HEADER_TIMEOUT_S": str(HEADER_S), "CRANE_BODY_TIMEOUT_S": str(BODY_S),
           "CRANE_WRITE_TIMEOUT_S": str(WRITE_S), "CRANE_AUDIT_LOG": str(audit)}  # fmt: skip
    with start_server(tiny, env=env) as server:
        yield server


@pytest.fixture(autouse=True)
def nobody_notices(server, request):
    """Around each attack: another client's answers stay right and soon, and afterwards all is as it was."""
    worker = psutil.Process(server.worker_pids()[0])
    alone = server.post("/v1/completions", GREEDY)[1]["choices"]
    files, threads, engine = worker.num_fds(), worker.num_threads(), server.engine_pid()
    done, answers, slowest, cut = threading.Event(), [], [0.0], []

    def ask():
        while not done.is_set():
            started = time.monotonic()
            try:
                answers.append(server.post("/v1/completions", GREEDY, timeout_s=20))
            except ConnectionError as error:
                cut.append(error)
            slowest[0] = max(slowest[0], time.monotonic() - started)

    bystander = threading.Thread(target=ask)
    bystander.start()
    yield
    done.set()
    bystander.join(30)
    assert not cut or "connection_is_being" in request.node.name or "room_for" in request.node.name, cut
    if "connection_is_being" in request.node.name:
        answers = [answer for answer in answers if answer[0] != 503]  # perhaps none got in
    else:
        assert answers
    assert all(status == 200 and body["choices"] == alone for status, body in answers)
    assert slowest[0] < 5, "an answer took long"
    assert (worker.pid, engine) == (server.worker_pids()[0], server.engine_pid())
    wait_for(lambda: worker.num_fds() <= files + 1, 20, lambda: f"{worker.num_fds()} open files, {files} before")
    assert worker.num_threads() <= threads + 8  # those that long bodies are parsed on
    stats = server.get("/v1/stats")[1]
    wait_for(lambda: server.get("/v1/stats")[1]["active_sequences"] == 0)
    assert stats["num_pages"] and "Traceback" not in server.log()


def dial(server, wait_s=20, **options) -> socket.socket:
    address = urllib.parse.urlsplit(server.url)
    link = socket.socket()
    for name, value in options.items():
        link.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    link.settimeout(wait_s)
    link.connect((address.hostname, address.port))
    link.settimeout(20)
    return link


def read_all(link) -> bytes:
    """Everything until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := link.recv(65536):
            parts.append(part)
    return b"".join(parts)


def say(server, raw: bytes) -> bytes:
    """All that a connection answers to these bytes until it is closed."""
    with dial(server) as link:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            link.sendall(raw)
        return read_all(link)


def statuses(answer: bytes) -> list[int]:
    return [int(each) for each in re.findall(rb"HTTP/1\.[01] (\d+)", answer)]


def post(body: bytes, *headers: str, path="/v1/completions", length: bool = True) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", *([f"Content-Length: {len(body)}"] if length else []), *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


GOOD = json.dumps(GREEDY).encode()
CLOSE = "Connection: close"
NEXT = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


CHUNKED = "Transfer-Encoding: chunked"


def test_a_body_above_the_limit_is_refused_by_its_length_and_by_counting(server):
    big = b'{"prompt": "' + b"a" * MAX_BODY + b'"}'
    assert statuses(say(server, post(big, CLOSE))) == [413]
    pieces = b"".join(chunk(big[i : i + 5000]) for i in range(0, len(big), 5000)) + b"0\r\n\r\n"
    assert statuses(say(server, post(pieces, CHUNKED, CLOSE, length=False))) == [413]
    assert statuses(say(server, post(b"", f"Content-Length: {10**15}", length=False))) == [413]
    assert statuses(say(server, post(chunk(GOOD) + b"0\r\n\r\n", CHUNKED, CLOSE, length=False))) == [200]


BAD_CHUNKS = {
    "no number": b"ZZ\r\nabc\r\n0\r\n\r\n",
    "negative": b"-5\r\nhello\r\n0\r\n\r\n",
    "signed": b"+5\r\nhello\r\n0\r\n\r\n",
    "prefix": b"0x5\r\nhello\r\n0\r\n\r\n",
    "underscore": b"1_0\r\n" + b"a" * 16 + b"\r\n0\r\n\r\n",
    "overflow": b"FFFFFFFFFFFFFFFFF\r\nhello\r\n0\r\n\r\n",
    "too short": b"3\r\nhello\r\n0\r\n\r\n",
    "bare LF": b"5\nhello\n0\n\n",
    "endless extension": b"5;" + b"a" * 1_000_000,
    "endless digits": b"0" * 1_000_000,
    "endless trailer": b"0\r\nA: " + b"a" * 1_000_000,
    "length as a trailer": b"0\r\nContent-Length: 50\r\n\r\n",
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_bad_chunking_is_refused_and_the_connection_closed(server, name):
    answer = say(server, post(BAD_CHUNKS[name], CHUNKED, length=False) + NEXT)
    assert len(statuses(answer)) <= 1 and all(400 <= status < 500 for status in statuses(answer)), answer


SMUGGLING = {
    "length and chunks": post(b"0\r\n\r\n" + NEXT, CHUNKED),
    "two lengths": post(GOOD + NEXT, f"Content-Length: {len(GOOD)}", "Content-Length: 1", length=False),
    "list of lengths": post(GOOD + NEXT, f"Content-Length: {len(GOOD)}, 1", length=False),
    "signed length": post(GOOD + NEXT, f"Content-Length: +{len(GOOD)}", length=False),
    "negative length": post(GOOD + NEXT, "Content-Length: -1", length=False),
    "hex length": post(GOOD + NEXT, "Content-Length: 0x10", length=False),
    "unicode digits": post(GOOD + NEXT, "Content-Length: \xb2", length=False),
    "length of 5000 digits": post(GOOD + NEXT, "Content-Length: " + "9" * 5000, length=False),
    "chunked twice": post(chunk(GOOD) + b"0\r\n\r\n" + NEXT, "Transfer-Encoding: chunked, chunked", length=False),
    "chunked, then not": post(chunk(GOOD) + b"0\r\n\r\n" + NEXT, "Transfer-Encoding: chunked, identity", length=False),
    "unknown coding": post(GOOD + NEXT, "Transfer-Encoding: xchunked", length=False),
    "vertical tab": post(GOOD + NEXT, "Transfer-Encoding: \x0bchunked", length=False),
    "space before colon": post(GOOD + NEXT, f"Content-Length : {len(GOOD)}", length=False),
    "folded": post(GOOD + NEXT, f"Content-Length:\r\n {len(GOOD)}", length=False),
    "bare LF": post(GOOD, CLOSE).replace(b"\r\n", b"\n") + NEXT,
    "bare CR": post(GOOD + NEXT, "X: a\rContent-Length: 0"),
    "zero byte": post(GOOD + NEXT, "X: a\0b"),
    "no name": post(GOOD + NEXT, ": a"),
    "name with a space": post(GOOD + NEXT, "X Y: a"),
    "two hosts": post(GOOD + NEXT, "Host: y"),
}


@pytest.mark.parametrize("name", SMUGGLING)
def test_what_two_parsers_could_read_differently_is_refused_and_the_connection_closed(server, name):
    answer = say(server, SMUGGLING[name])
    assert len(statuses(answer)) <= 1 and set(statuses(answer)) <= {400, 501}, answer


ABSOLUTE = "http://169.254.169.254/latest"
ODD = {
    "nothing": b"\r\n\r\n\r\n",
    "text": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(50),
    "HTTP/9": b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    "binary": bytes(range(256)) * 10,
    "long line": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "long header": b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 100_000 + b"\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"A%d: b\r\n" % i for i in range(5000)) + b"\r\n",
    "websocket": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                 b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
    "connect": b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "absolute": f"GET {ABSOLUTE} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_request_for_this_server_is_refused(server, name):
    answer = say(server, ODD[name])
    assert all(400 <= status < 502 and status != 500 for status in statuses(answer)), answer
    if name not in ("nothing", "websocket"):
        assert statuses(answer) and b'{"error":{"message":' in answer, answer


def test_what_gets_no_further_than_the_parser_has_a_line_in_the_audit_log_and_the_rest_no_second_one(server, audit):
    for name, status in (("text", 400), ("long line", 414), ("absolute", 404)):
        num_before = audit.read_text().count("\n")
        assert statuses(say(server, ODD[name])) == [status]
        wait_for(lambda: any(f'"status":{status}' in line for line in audit.read_text().splitlines()[num_before:]))
        lines = [json.loads(line) for line in audit.read_text().splitlines()[num_before:]]
        (mine,) = [line for line in lines if line["path"] != "/v1/completions"]
        assert mine["status"] == status and mine["client"] == "127.0.0.1"
        assert (mine["path"], mine["method"]) == ((ABSOLUTE, "GET") if name == "absolute" else ("-", "-"))


def test_pipelined_requests_are_answered_in_order(server):
    answer = say(server, post(GOOD) + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + NEXT)
    assert statuses(answer) == [200] * 3
    places = [answer.index(mark) for mark in (b"text_completion", b'"status"', b'"list"')]
    assert places == sorted(places)


def test_a_client_that_expects_100_gets_it(server):
    with dial(server) as link:
        link.sendall(post(b"", "Expect: 100-continue", CLOSE, f"Content-Length: {len(GOOD)}", length=False))
        assert link.recv(100).startswith(b"HTTP/1.1 100")
        link.sendall(GOOD)
        assert statuses(read_all(link)) == [200]


def drip(server, head: bytes, tail: bytes, count: int) -> list[bytes]:
    """What `count` connections get that send `head` at once and `tail` a byte at a time."""
    links = [dial(server) for _ in range(count)]
    for link in links:
        link.sendall(head)
    for byte in tail[:40]:
        time.sleep(0.1)
        for link in links:
            with contextlib.suppress(OSError):
                link.sendall(bytes([byte]))
    answers = []
    for link in links:
        answers.append(read_all(link))
        link.close()
    return answers


def test_slow_headers_and_slow_bodies_are_cut(server):
    started = time.monotonic()
    assert {tuple(statuses(each)) for each in drip(server, b"POST /v1/", b"completions" * 4, 40)} <= {(408,), ()}
    head = post(b"", f"Content-Length: {len(GOOD) + 100}", length=False)
    assert {tuple(statuses(each)) for each in drip(server, head, GOOD, 40)} <= {(408,), ()}
    assert time.monotonic() - started < 30


def test_an_idle_connection_is_closed(server):
    answers = [read_all(link) for link in [dial(server) for _ in range(30)]]
    assert all(statuses(answer) == [408] for answer in answers)


def test_more_idle_connections_than_there_is_room_for_keep_nobody_out(server):
    links = [dial(server) for _ in range(3 * MAX_CONNECTIONS)]
    assert server.post("/v1/completions", GREEDY)[0] == 200
    for link in links:
        link.close()


def test_when_every_connection_is_being_answered_one_more_is_told_so(server):
    body = json.dumps({**ENDLESS, "max_tokens": 1}).encode()  # stays a request as long as its body is not there
    head = post(b"", f"Content-Length: {len(body)}", length=False)
    links = [dial(server) for _ in range(MAX_CONNECTIONS)]
    told = []
    for link in links:
        with contextlib.suppress(OSError):  # those that there was no room for while the bystander was there
            link.sendall(head)
    # the bystander's connections, the last one and the next, may have kept places free: these take what is left
    while not told and len(links) < MAX_CONNECTIONS + 10:
        links.append(dial(server))
        with contextlib.suppress(OSError):
            links[-1].sendall(head)
        links[-1].settimeout(0.1)
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            told = statuses(links[-1].recv(65536))
    for link in links:
        link.close()
    assert told == [503]


@pytest.mark.skipif(SOMAXCONN < 500, reason="the system lets only a few connections wait")
def test_a_burst_of_connections_finds_room_for_itself_and_need_not_try_again(server):
    worker = psutil.Process(server.worker_pids()[0])
    worker.suspend()
    try:
        links = [dial(server, wait_s=0.9) for _ in range(400)]  # else TimeoutError: a second try is a second later
    finally:
        worker.resume()
    for link in links:
        link.close()


def reset(link) -> None:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    link.close()


def test_resets_at_any_moment_leave_nothing(server):
    stream = post(json.dumps(ENDLESS).encode())
    for cut in (0, 1, 20, len(stream) - 10, len(stream) - 1, len(stream)):
        for _ in range(8):
            link = dial(server)
            link.sendall(stream[:cut])
            reset(link)
    for _ in range(8):
        link = dial(server)
        link.sendall(stream)
        assert link.recv(100)
        reset(link)
    wait_for(lambda: server.get("/v1/stats")[1]["active_sequences"] <= 1)


def test_a_body_that_ends_early_is_not_taken_for_the_whole(server):
    with dial(server) as link:
        link.sendall(post(json.dumps(ENDLESS).encode(), "Content-Length: 5000", length=False))
        link.shutdown(socket.SHUT_WR)
        assert statuses(read_all(link)) in ([], [400])


def test_a_client_that_reads_nothing_is_cut(server):
    link = dial(server, SO_RCVBUF=4096)
    link.sendall(post(json.dumps({**ENDLESS, "logprobs": 20}).encode()))
    assert link.recv(50)
    wait_for(lambda: server.get("/v1/stats")[1]["active_sequences"] >= 1)
    wait_for(lambda: "took nothing of its answer" in server.log(), 40)
    wait_for(lambda: server.get("/v1/stats")[1]["active_sequences"] <= 1, 10)
    link.close()


def test_a_client_that_closes_its_half_after_asking_counts_as_gone(server):
    with dial(server) as link:
        link.sendall(post(json.dumps(ENDLESS).encode()))
        link.shutdown(socket.SHUT_WR)
        read_all(link)
    wait_for(lambda: server.get("/v1/stats")[1]["active_sequences"] <= 1, 10)
