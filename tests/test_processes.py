"""Whole servers: gunicorn's master, API workers and the engine, with a tiny real model."""

import contextlib
import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.serving import run_server, start_server, wait_for
from tests.tiny import make_tiny

WAYS = {
    "no option": (),
    "asgi": ("-k", "asgi"),
    "gthread": ("-k", "gthread", "--threads", "64"),
    "two workers": ("-w", "2"),
    "preload": ("--preload", "-w", "2"),
    "preload gthread": ("--preload", "-k", "gthread", "--threads", "64"),
}
ENDLESS = {"prompt": "a", "max_tokens": 50_000, "ignore_eos": True, "temperature": 0}
SHORT = {**ENDLESS, "max_tokens": 8}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", max_position=60_000)


@pytest.fixture(scope="module")
def pair(tiny):
    """A server with two workers, for the tests that leave it as they found it."""
    with start_server(tiny, "-w", "2", "--timeout", "5") as server:
        yield server


def endless(server, count: int = 1) -> list:
    streams = [server.stream("/v1/completions", ENDLESS) for _ in range(count)]
    return [stream.flowing() for stream in streams]


def owners(server, streams) -> dict[int, list]:
    """The streams of each worker, by whose socket the client's is connected to."""
    found = {pid: [] for pid in server.worker_pids()}
    for pid, mine in found.items():
        with contextlib.suppress(psutil.NoSuchProcess):
            ports = {c.raddr.port for c in psutil.Process(pid).net_connections() if c.raddr}
            mine += [stream for stream in streams if stream.port in ports]
    return found


def streams_on_both(server) -> dict[int, list]:
    """Endless streams, at least one on each of the two workers."""
    streams = endless(server, 2)
    for _ in range(20):
        found = owners(server, streams)
        if len(found) == 2 and all(found.values()):
            return found
        streams += endless(server)
    raise AssertionError(f"one worker got all {len(streams)} streams")


def idle(server) -> bool:
    with contextlib.suppress(OSError):
        status, stats = server.get("/v1/stats")
        return status == 200 and stats["active_sequences"] == 0 and stats["free_pages"] == stats["num_pages"]
    return False


def hang_up(server, streams) -> None:
    for stream in streams:
        stream.hang_up()
    wait_for(lambda: idle(server))


def ask(server, prompt: str) -> tuple[int, dict]:
    return server.post("/v1/completions", {**SHORT, "prompt": prompt})


def is_error(event: str) -> bool:
    return "error" in json.loads(event)


def maps_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_has_one_engine_and_many_concurrent_streams(tiny, way):
    with start_server(tiny, *WAYS[way]) as server:
        streams = endless(server, 6)
        assert all(stream.status == 200 for stream in streams)
        started = time.monotonic()
        assert server.get("/health") == (200, {"status": "ok"})
        assert time.monotonic() - started < 2
        assert server.get("/v1/stats")[1]["active_sequences"] == 6
        assert len(server.engine_pids()) == 1 and maps_torch(server.engine_pid())
        assert len(server.worker_pids()) == (2 if "2" in WAYS[way] else 1)
        assert not any(maps_torch(pid) for pid in (server.process.pid, *server.worker_pids()))
        hang_up(server, streams)
        answers = [server.post("/v1/completions", SHORT) for _ in range(2)]
        assert answers[0][0] == 200 and answers[0][1]["choices"] == answers[1][1]["choices"]
        engine = server.engine_pid()
        server.process.terminate()
        assert server.process.wait(10) == 0
        wait_for(lambda: not psutil.pid_exists(engine), 5)
        assert "Traceback" not in server.log()


def test_a_killed_worker_aborts_its_own_requests_only(pair):
    found = streams_on_both(pair)
    engine = pair.engine_pid()
    (victim, broken), (survivor, others) = found.items()
    os.kill(victim, signal.SIGKILL)
    for stream in broken:
        assert "[DONE]" not in stream.finish()
    wait_for(lambda: pair.get("/v1/stats")[1]["active_sequences"] == len(others))
    for stream in others:
        stream.flowing()
    assert pair.engine_pid() == engine
    wait_for(lambda: len(pair.worker_pids()) == 2 and victim not in pair.worker_pids())
    hang_up(pair, others)


def test_a_killed_engine_ends_every_stream_with_an_error_and_a_new_one_serves(pair):
    streams = sum(streams_on_both(pair).values(), [])
    engine = pair.engine_pid()
    os.kill(engine, signal.SIGKILL)
    started = time.monotonic()
    for stream in streams:
        events = stream.finish(5)
        assert "[DONE]" not in events and stream.ended == "eof"
        assert is_error(events[-1]) and not any(is_error(event) for event in events[:-1])
    assert time.monotonic() - started < 2
    pair.wait_ready()
    assert pair.engine_pid() != engine
    wait_for(lambda: all(pair.get("/health")[0] == 200 for _ in range(8)))
    assert pair.post("/v1/completions", SHORT)[0] == 200


def test_sighup_changes_the_workers_and_keeps_engine_and_streams(pair):
    streams = [pair.stream("/v1/completions", {**ENDLESS, "max_tokens": 600}).flowing() for _ in range(3)]
    workers, engine = set(pair.worker_pids()), pair.engine_pid()
    os.kill(pair.process.pid, signal.SIGHUP)
    wait_for(lambda: len(set(pair.worker_pids()) - workers) == 2)
    for stream in streams:
        assert stream.finish(20)[-1] == "[DONE]"
    wait_for(lambda: not workers & set(pair.worker_pids()), 15)
    assert pair.engine_pid() == engine
    assert pair.post("/v1/completions", SHORT)[0] == 200


def test_after_sighup_a_preloaded_server_still_streams_concurrently(tiny):
    with start_server(tiny, "--preload") as server:
        (worker,), engine = server.worker_pids(), server.engine_pid()
        os.kill(server.process.pid, signal.SIGHUP)
        wait_for(lambda: server.worker_pids() and worker not in server.worker_pids())
        server.wait_ready()
        streams = endless(server, 3)
        assert server.get("/health", timeout_s=2)[0] == 200 and server.engine_pid() == engine
        hang_up(server, streams)


def test_the_sync_worker_stays_when_asked_for_and_says_what_that_means(tiny):
    with start_server(tiny, env={"CRANE_WORKER_SWAP": "0"}) as server:
        assert "one request at a time" in server.log()
        assert server.stream("/v1/completions", SHORT).finish()[-1] == "[DONE]"


def test_an_app_made_with_its_own_settings_needs_no_variable(tiny):
    app = f"crane.api:create_app(model_path={str(tiny)!r}, model_name='own')"
    with start_server("", "-w", "2", app=app) as server:
        assert server.get("/v1/models")[1]["data"][0]["id"] == "own"
        assert len(server.engine_pids()) == 1


def test_many_clients_at_once_get_their_own_answers(pair):
    prompts = [f"{i} is" for i in range(32)]
    alone = [ask(pair, prompt)[1]["choices"][0]["text"] for prompt in prompts]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda prompt: ask(pair, prompt), prompts))
    assert [status for status, _ in together] == [200] * 32
    assert [body["choices"][0]["text"] for _, body in together] == alone


def test_killing_the_arbiter_leaves_no_process(tiny):
    with start_server(tiny, "-w", "2") as server:
        streams = endless(server, 2)
        pids = [server.engine_pid(), *server.worker_pids()]
        server.process.kill()
        wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids), 8)
        assert all("[DONE]" not in stream.finish(1) for stream in streams)


def takes_connections(server):
    try:
        server.get("/health", timeout_s=2)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("args", [(), ("-k", "gthread", "--threads", "8")], ids=["asgi", "gthread"])
def test_sigterm_drains_running_streams_and_refuses_new_ones(tiny, args):
    with start_server(tiny, "--timeout", "2", *args) as server:
        # enough work to last until nobody is let in: a tiny model alone decodes a token in a millisecond
        busy = {**ENDLESS, "max_tokens": 1500, "n": 8, "logprobs": 5}
        streams = [server.stream("/v1/completions", busy).flowing() for _ in range(4)]
        engine = server.engine_pid()
        server.process.terminate()
        wait_for(lambda: not takes_connections(server))
        assert not streams[-1].ended
        assert all(stream.finish(30)[-1] == "[DONE]" for stream in streams)
        assert server.process.wait(10) == 0
        wait_for(lambda: not psutil.pid_exists(engine), 5)


def test_sigterm_to_the_engine_drains_it_and_the_next_one_serves(pair):
    stream = pair.stream("/v1/completions", {**ENDLESS, "max_tokens": 600}).flowing()
    engine = pair.engine_pid()
    os.kill(engine, signal.SIGTERM)
    wait_for(lambda: pair.get("/health")[1]["status"] != "ok")
    status, body = pair.post("/v1/completions", SHORT)
    assert status == 503 and body["error"]["message"]
    assert stream.finish()[-1] == "[DONE]"
    pair.wait_ready()
    assert pair.engine_pid() != engine


BAD_MODELS = {
    "absent": lambda folder: folder / "nothing",
    "empty folder": lambda folder: folder,
    "not a model": lambda folder: _written(folder / "model.gguf", b"GGUF is not enough"),
}


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "kind, way",
    [(kind, way) for kind in BAD_MODELS for way in ("crane", "gunicorn -w 2")]
    + [("not a model", "gunicorn"), ("not a model", "gunicorn gthread")],
)
def test_a_model_that_cannot_be_read_gives_one_line_and_an_exit_status(tmp_path, kind, way):
    check_refusal(BAD_MODELS[kind](tmp_path), way)


def test_weights_that_only_the_engine_finds_broken_give_one_line_too(tiny, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] += 32
    (folder / "config.json").write_text(json.dumps(config))
    check_refusal(folder, "gunicorn -w 2")
    check_refusal(folder, "crane")


def check_refusal(model: Path, way: str) -> None:
    how, _, options = way.partition(" ")
    args = {"": (), "-w 2": ("-w", "2"), "gthread": ("-k", "gthread", "--threads", "4")}[options]
    status, log, seconds = run_server(model, *args, how=how)
    assert status not in (0, None) and seconds < 15
    lines = [line for line in log.splitlines() if line.startswith("crane: ")]
    assert len(lines) == 1 and str(model) in lines[0], log
    assert "Traceback" not in log
    if how == "crane":  # nobody else has anything to say about it
        assert not [line for line in log.splitlines() if "[ERROR]" in line], log


def test_a_bad_variable_gives_one_line(tiny):
    for how in ("gunicorn", "crane"):
        status, log, _ = run_server(tiny, how=how, env={"CRANE_PAGE_SIZE": "24"})
        assert status not in (0, None) and "Traceback" not in log
        assert [line for line in log.splitlines() if line.startswith("crane: ")] == [
            "crane: CRANE_PAGE_SIZE must be a power of two, got 24"
        ]


def test_crane_serve_tells_once_how_to_try_it_and_what_it_tells_works(tiny):
    with start_server(tiny, "--workers", "2", "--model-name", "crane/tiny", how="crane") as server:
        wait_for(lambda: "try: curl" in server.log())
        assert all(server.get("/health")[0] == 200 for _ in range(8))
        (line,) = [line for line in server.log().splitlines() if line.startswith("try: ")]
        assert f"crane serves crane/tiny at {server.url}/v1" in server.log().replace("crane 0.1.0", "crane")
        url, body = line.removeprefix("try: curl ").split(" -d ")
        assert url == f"{server.url}/v1/chat/completions"
        assert server.post("/v1/chat/completions", {**json.loads(body.strip("'")), "max_tokens": 4})[0] == 200
        assert len(server.engine_pids()) == 1 and len(server.worker_pids()) == 2
        os.kill(server.process.pid, signal.SIGHUP)
        time.sleep(1)
        server.wait_ready()
        assert len(server.engine_pids()) == 1
        engine = server.engine_pid()
        server.process.terminate()
        assert server.process.wait(10) == 0
        wait_for(lambda: not psutil.pid_exists(engine), 5)
        assert server.log().count("try: curl") == 1 and "Traceback" not in server.log()
