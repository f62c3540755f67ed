"""Streams that outlive their connection and their worker: a real server with two workers and a tiny model."""

import contextlib
import http.client
import json
import os
import signal
import time
import urllib.parse

import psutil
import pytest

from tests.serving import start_server, wait_for
from tests.tiny import make_tiny

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "a crane", "max_tokens": 160, "ignore_eos": True, "seed": 3, "stream": True, "n": 2}
GRACE_S = 2.5


@pytest.fixture(scope="module", params=["asgi", "gthread"])
def server(request, tmp_path_factory):
    tiny = make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", max_position=60_000)
    how = ("-k", "gthread", "--threads", "16") if request.param == "gthread" else ()
    env = {"CRANE_DTYPE": "float32", "CRANE_JOURNAL_S": str(GRACE_S)}
    with start_server(tiny, "-w", "2", *how, env=env) as running:
        yield running


class Reader:
    """A client that reads one event at a time. events: {id: data}, in order."""

    def __init__(self, server, method, path, body=None, last_id=""):
        self._connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=30)
        headers = {"Last-Event-ID": last_id} if last_id else {}
        self._connection.request(method, path, json.dumps(body) if body else None, headers)
        self.port = self._connection.sock.getsockname()[1]
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self.events: dict[str, str] = {}
        self._id = ""

    @property
    def last_id(self):
        return list(self.events)[-1]

    def read(self, count=1 << 30):
        """So many more events, or all."""
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            while count and (line := self._response.readline()):
                if line.startswith(b"id: "):
                    self._id = line[4:].decode().strip()
                elif line.startswith(b"data: "):
                    assert not self._id or self._id not in self.events, "an event came twice"
                    self.events[self._id] = line[6:].decode().strip()
                    count -= 1
        return self

    def drop(self):
        with contextlib.suppress(OSError, AttributeError):
            self._connection.sock.shutdown(2)
        self._connection.close()
        self._response.close()

    def json(self):
        return json.loads(self._response.read())


def texts(events):
    """The text of each choice."""
    found = {}
    for data in events:
        if data != "[DONE]":
            for choice in json.loads(data)["choices"]:
                found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return found


def start(server, **extra):
    return Reader(server, "POST", COMPLETIONS, {**LONG, "resumable": True, **extra})


def go_on(server, last_id, how="GET"):
    if how == "GET":
        return Reader(server, "GET", f"/v1/streams/{last_id.rpartition(':')[0]}", last_id=last_id)
    return Reader(server, "POST", COMPLETIONS, {**LONG, "resumable": True}, last_id)


def whole(server, **extra):
    """The same, uninterrupted and not resumable."""
    plain = server.stream(COMPLETIONS, {**LONG, **extra}).finish()
    assert plain[-1] == "[DONE]"
    return texts(plain)


def check(parts, expected):
    """All parts together are one stream, without a gap or a repetition, and say what an uninterrupted one says."""
    events = {}
    for part in parts:
        assert not events.keys() & part.events.keys(), "an event was repeated"
        events |= part.events
    assert [int(name.rpartition(":")[2]) for name in events] == list(range(1, len(events) + 1)), "events are missing"
    assert list(events.values())[-1] == "[DONE]"
    assert texts(events.values()) == expected


def owner(server, reader):
    """The worker that this client is connected to."""
    for pid in server.worker_pids():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(c.raddr and c.raddr.port == reader.port for c in psutil.Process(pid).net_connections()):
                return pid
    raise AssertionError("no worker has this connection")


def active(server):
    with contextlib.suppress(OSError):
        return server.get("/v1/stats")[1]["active_sequences"]


@pytest.mark.parametrize("how", ["GET", "POST"])
def test_a_dropped_connection_loses_and_repeats_nothing(server, how):
    expected = whole(server)
    parts = [start(server).read(20)]
    for count in (30, 0, 15):  # dropped again and again, once before anything came
        parts[-1].drop()
        last_id = [name for part in parts for name in part.events][-1]
        parts.append(go_on(server, last_id, how).read(count))
        assert parts[-1].status == 200
    parts[-1].drop()
    last_id = [name for part in parts for name in part.events][-1]
    parts.append(go_on(server, last_id, how).read())
    check(parts, expected)


def test_a_killed_worker_loses_and_repeats_nothing(server):
    expected = whole(server)
    first = start(server).read(30)
    victim, engine = owner(server, first), server.engine_pid()
    os.kill(victim, signal.SIGKILL)
    first.read()  # what was on its way still
    assert "[DONE]" not in first.events.values()
    rest = go_on(server, first.last_id).read()
    check([first, rest], expected)
    assert server.engine_pid() == engine
    wait_for(lambda: len(server.worker_pids()) == 2 and victim not in server.worker_pids())


def test_a_stream_that_ended_without_its_client_is_there_for_a_while(server):
    expected = whole(server, max_tokens=60)
    first = start(server, max_tokens=60).read(5)
    first.drop()
    wait_for(lambda: active(server) == 0)
    check([first, go_on(server, first.last_id).read()], expected)
    again = Reader(server, "GET", f"/v1/streams/{first.last_id.rpartition(':')[0]}").read()
    check([again], expected)
    time.sleep(GRACE_S + 0.5)
    gone = go_on(server, first.last_id)
    assert gone.status == 404 and gone.json()["error"]["code"] == "stream_not_found"


def test_nobody_who_comes_back_ends_the_work_after_the_grace_period(server):
    first = start(server, max_tokens=50_000).read(5)
    first.drop()
    time.sleep(GRACE_S / 2)
    assert active(server) == 2
    wait_for(lambda: active(server) == 0, GRACE_S + 5)
    assert go_on(server, first.last_id).status == 404


def test_whoever_resumes_takes_the_stream_over(server):
    expected = whole(server)
    first = start(server).read(20)
    second = go_on(server, first.last_id)
    second.read()
    check([first, second], expected)
    late = {**first.events}
    first.read()
    assert "[DONE]" not in [data for name, data in first.events.items() if name not in late]


def test_a_stop_string_that_comes_up_while_nobody_listens_still_ends_the_answer(server):
    text = whole(server, n=1, max_tokens=120)[0]
    stop = text[90:96]
    expected = whole(server, n=1, max_tokens=120, stop=[stop])
    assert expected[0] == text[: text.index(stop)]
    first = start(server, n=1, max_tokens=120, stop=[stop]).read(5)
    first.drop()
    time.sleep(0.5)
    check([first, go_on(server, first.last_id).read()], expected)


def test_requests_that_do_not_ask_for_it_end_with_their_client_at_once(server):
    plain = Reader(server, "POST", COMPLETIONS, {**LONG, "max_tokens": 50_000})
    assert list(plain.read(3).events) == [""]  # no event has an id
    plain.drop()
    wait_for(lambda: active(server) == 0, 2)
