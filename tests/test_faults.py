"""What breaks around a server: nothing hangs, nothing is left over, the next start works, and somebody says why."""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from crane.runtime import launch
from tests.serving import ROOT, Server, run_server, start_server, wait_for
from tests.tiny import make_tiny

ENDLESS = {"prompt": "a", "max_tokens": 50_000, "ignore_eos": True, "temperature": 0}
GREEDY = {"prompt": "a b", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", max_position=60_000)


def family(server) -> list[int]:
    return [server.process.pid, *server.worker_pids(), *server.engine_pids()]


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)


def lines_of_ours(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("crane: ")]


def test_an_engine_killed_before_it_is_ready_ends_the_server_with_a_reason(tiny):
    with start_server(tiny, "-w", "2", wait=False) as server:
        wait_for(lambda: server.engine_pids())
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert server.process.wait(20) not in (0, None)
        (line,) = lines_of_ours(server.log())
        assert "died while it was loading" in line and "Traceback" not in server.log()
        wait_for(lambda: not server.engine_pids())


def test_an_engine_killed_in_a_prefill_is_a_503_and_the_same_request_works_again(tiny):
    with start_server(tiny, env={"CRANE_MAX_STEP_TOKENS": "4", "CRANE_DTYPE": "float32"}) as server:
        alone = server.post("/v1/completions", GREEDY)[1]["choices"]
        long = {**GREEDY, "prompt": "the day " * 3000}
        answers = []
        asker = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", long)))
        asker.start()
        wait_for(lambda: server.get("/v1/stats")[1]["active_sequences"] == 1)
        os.kill(server.engine_pid(), signal.SIGKILL)
        asker.join(20)
        ((status, body),) = answers
        assert status == 503 and body["error"]["type"] == "server_error"
        server.wait_ready()
        assert server.post("/v1/completions", GREEDY)[1]["choices"] == alone
        stats = server.get("/v1/stats")[1]
        assert stats["free_pages"] == stats["num_pages"]


def test_when_everything_is_killed_at_once_the_next_start_works(tiny):
    with start_server(tiny) as server:
        pids = family(server)
        sockets = list(launch.run_dir().glob(f"{server.process.pid}-*.sock"))
        assert sockets
        for sign in (signal.SIGSTOP, signal.SIGKILL):  # nobody is to see another one's end and tidy up
            for pid in pids:
                os.kill(pid, sign)
        server.process.wait(5)
        wait_for(lambda: gone(pids))
        for path in sockets:  # as a server that got the same pid would find it
            assert path.exists() and path.is_socket()
    with start_server(tiny) as server:
        assert server.post("/v1/completions", GREEDY)[0] == 200
        assert not any(path.exists() for path in sockets), "the dead one's socket is swept away"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_an_impatient_signal_ends_everything_at_once(tiny, number):
    with start_server(tiny, "-w", "2") as server:
        stream = server.stream("/v1/completions", ENDLESS).flowing()
        pids = family(server)
        server.process.send_signal(number)
        server.process.wait(10)
        wait_for(lambda: gone(pids), 10)
        assert "[DONE]" not in stream.finish(5) and "Traceback" not in server.log()


def test_a_port_in_use_is_one_line(tiny):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, log, seconds = run_server(tiny, "--port", str(port), how="crane")
    assert status == 1 and seconds < 10
    assert log.splitlines() == [f"crane: cannot listen on 127.0.0.1 port {port}: Address already in use"]


def test_too_little_memory_for_a_single_page_is_one_line(tiny):
    status, log, seconds = run_server(tiny, how="crane", env={"CRANE_KV_MEMORY": "1k"})
    assert status not in (0, None) and seconds < 30
    (line,) = lines_of_ours(log)
    assert "memory" in line.lower() and "Traceback" not in log


def test_a_model_that_is_gone_when_the_engine_has_to_come_back_is_said_and_does_not_spin(tmp_path):
    model = make_tiny(tmp_path / "tiny", "qwen3")
    with start_server(model) as server:
        shutil.rmtree(model)
        os.kill(server.engine_pid(), signal.SIGKILL)
        wait_for(lambda: "failed" in json.dumps(server.get("/health")), 40)
        status, body = server.get("/health")
        assert status == 503 and str(model) in body["reason"]
        status, body = server.post("/v1/completions", GREEDY)
        assert status == 503 and str(model) in body["error"]["message"]
        time.sleep(2)
        assert not server.engine_pids() and "Traceback" not in server.log()


def test_weights_that_are_replaced_while_the_engine_runs_change_nothing(tmp_path):
    model = make_tiny(tmp_path / "tiny", "qwen3")
    with start_server(model, env={"CRANE_DTYPE": "float32"}) as server:
        alone = server.post("/v1/completions", GREEDY)[1]["choices"]
        weights = model / "model.safetensors"
        other = tmp_path / "other"
        other.write_bytes(os.urandom(weights.stat().st_size))
        os.replace(other, weights)
        assert server.post("/v1/completions", GREEDY)[1]["choices"] == alone
        os.truncate(weights, 100)
        assert server.post("/v1/completions", GREEDY)[1]["choices"] == alone


def test_a_full_disk_under_the_cache_folder_costs_nothing_but_the_cache(tiny, tmp_path):
    env = {"CRANE_KV_CACHE_DIR": str(tmp_path / "kv"), "CRANE_DTYPE": "float32", "CRANE_PAGE_SIZE": "256",
           "CRANE_KV_MEMORY": "4m", "CRANE_ACCESS_LOG": "0"}  # fmt: skip
    prompts = [f"{word} " * 600 for word in ("day", "time")]
    bounds = resource.getrlimit(resource.RLIMIT_FSIZE)
    answers = []
    for limit in (bounds[0], 16_000):  # a file may not grow beyond it, as on a full disk; the log stays below
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, bounds[1]))
        try:
            with start_server(tiny, env=env) as server:
                resource.setrlimit(resource.RLIMIT_FSIZE, bounds)
                found = [server.post("/v1/completions", {**GREEDY, "prompt": each}) for each in prompts * 2]
                assert [status for status, _ in found] == [200] * 4, found
                answers.append([body["choices"] for _, body in found])
                assert server.get("/health")[0] == 200 and "Traceback" not in server.log()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, bounds)
        shutil.rmtree(tmp_path / "kv", ignore_errors=True)
    assert answers[0] == answers[1]


def unsound(path) -> bool:
    """Whether a file of the cache folder is not whole: by its size, its name and its checksum."""
    data = path.read_bytes()
    named = data[:8] == b"crane-kv" and data[40:72].hex() == path.stem
    return not named or hashlib.sha256(data[:-32]).digest() != data[-32:]


def test_an_engine_killed_while_it_swaps_and_writes_leaves_a_folder_that_the_next_one_can_use(tiny, tmp_path):
    prompts = [[number, *(7 * number + 3 * i % 40 for i in range(60))] for number in range(6)]
    bodies = [{"prompt": each, "max_tokens": 120, "ignore_eos": True, "temperature": 0} for each in prompts]
    folder = tmp_path / "kv"
    env = {"CRANE_KV_CACHE_DIR": str(folder), "CRANE_PREEMPTION": "swap", "CRANE_HOST_KV_MEMORY": "64m",
           "CRANE_KV_MEMORY": "400k", "CRANE_DECODE_TOKENS_PER_SEQ": "4", "CRANE_DTYPE": "float32",
           "CRANE_PAGE_SIZE": "16", "CRANE_ACCESS_LOG": "0", "CRANE_MAX_MODEL_LEN": "256"}  # fmt: skip
    found, over = [], threading.Event()

    def ask(place):
        while not over.is_set():
            salt = f"{place}"  # nobody's pages are of use to another, so all are written
            status, body = server.post("/v1/completions", {**bodies[place % 6], "cache_salt": salt})
            found.append((place % 6, status, body))
            place += 6
            time.sleep(0 if status == 200 else 0.05)

    with start_server(tiny, env=env) as server:
        alone = [server.post("/v1/completions", body)[1]["choices"] for body in bodies]
        askers = [threading.Thread(target=ask, args=(place,)) for place in range(6)]
        for asker in askers:
            asker.start()
        try:
            for _ in range(2):
                busy = lambda stats: stats["swaps"] > 5 and stats["disk_pages_written"] > 5  # noqa: E731
                stats = lambda: server.get("/v1/stats")[1]  # noqa: E731
                wait_for(lambda: busy(stats()), 10, lambda: str(stats()))
                killed = server.engine_pid()
                os.kill(killed, signal.SIGKILL)
                pages = list(folder.glob("*/*/*.kv"))
                assert pages and not [path.name for path in pages if unsound(path)]
                wait_for(lambda: server.engine_pids() not in ([], [killed]))
                server.wait_ready()
        finally:
            over.set()
            for asker in askers:
                asker.join(60)
        assert {status for _, status, _ in found} <= {200, 503}, found
        given = [(place, body["choices"]) for place, status, body in found if status == 200]
        assert len(given) > 10 and all(choices == alone[place] for place, choices in given)
        assert [server.post("/v1/completions", body)[1]["choices"] for body in bodies] == alone
        stats = server.get("/v1/stats")[1]
        assert stats["disk_bad_files"] == 0 and stats["disk_writable"] and stats["ledger_faults"] == 0
        assert stats["free_pages"] == stats["num_pages"] and "Traceback" not in server.log()
    left = folder / "00" / ".tmp-left"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"half a page")
    os.utime(left, (1, 1))
    with start_server(tiny, env=env) as server:  # a new server finds in the folder what the killed ones computed
        assert [server.post("/v1/completions", body)[1]["choices"] for body in bodies] == alone
        stats = server.get("/v1/stats")[1]
        assert stats["disk_cached_tokens"] > 0 and stats["disk_bad_files"] == 0 and not left.exists()


STEP = """
import sys, time
real, begun = time.time, time.monotonic()
def stepping():
    return real() + (-86400 * 365 if int(time.monotonic() - begun) % 2 else 86400 * 365)
time.time = stepping
sys.argv = ["crane", *sys.argv[1:]]
from crane.cli import main
sys.exit(main())
"""


def test_a_clock_that_jumps_by_a_year_every_second_disturbs_nobody(tiny, tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("CRANE_")}
    flags = f"serve --model-path {tiny} --host 127.0.0.1 --port 0 --cpu --kv-memory 64m --threads 1"
    command = [sys.executable, "-c", STEP, *flags.split()]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env={**env, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log)
    server = Server(process, tmp_path / "log")
    try:
        server.wait_ready()
        streams = [server.stream("/v1/completions", {**ENDLESS, "max_tokens": 700}) for _ in range(2)]
        assert all(stream.finish(60)[-1] == "[DONE]" for stream in streams)
        engine = server.engine_pid()
        os.kill(engine, signal.SIGKILL)
        wait_for(lambda: server.engine_pids() not in ([], [engine]))
        server.wait_ready()
        assert server.post("/v1/completions", GREEDY)[0] == 200 and "Traceback" not in server.log()
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
