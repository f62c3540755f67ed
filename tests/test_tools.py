"""The tools that people run by hand, run here on something small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from crane.kernels import native
from crane.runtime.settings import cache_dir
from tests.serving import start_server
from tests.tiny import make_tiny

ROOT = Path(__file__).parents[1]


def run_tool(name, *arguments, timeout_s=120):
    command = [sys.executable, str(ROOT / "tools" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with start_server(make_tiny(tmp_path_factory.mktemp("tiny"), "qwen2")) as running:
        yield running


def test_bench_http_prints_a_row_per_load_and_ends_in_json(server):
    done = run_tool("bench_http.py", server.url, "--clients", "1,4", "--max-tokens", "8", "--prompt-words", "5",
                    "--pid", str(server.process.pid))  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert [row["load"] for row in document["rows"]] == ["1 clients", "4 clients"]
    assert [row["requests"] for row in document["rows"]] == [4, 8]
    for row in document["rows"]:
        assert row["tokens_per_s"] > 0 and 0 < row["ttft_ms_p50"] <= row["ttft_ms_p99"]
        assert row["cpu_ms_per_1000_chunks"] >= 0


def test_bench_http_compares_two_servers_in_turns(server):
    done = run_tool("bench_http.py", server.url, "--vs", server.url, "--clients", "2", "--max-tokens", "4",
                    "--prompt-words", "5", "--rounds", "2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    low, high = map(float, row["tokens_per_s spread"].split("-"))
    assert low <= row["tokens_per_s ratio"] <= high and row["other tokens_per_s"] > 0


def test_bench_http_takes_an_arrival_rate(server):
    done = run_tool("bench_http.py", server.url, "--rate", "50", "--requests", "6", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rows"][0]["requests"] == 6


def test_bench_http_times_nothing_when_its_check_fails(server):
    done = run_tool("bench_http.py", server.url, "--model", "another", "--clients", "1")
    assert done.returncode == 1
    assert "status 404" in done.stderr and done.stdout == ""
    done = run_tool("bench_http.py", "http://127.0.0.1:9")
    assert done.returncode == 1 and done.stderr.startswith("crane bench: ")


def test_api_cost_compares_the_api_with_a_bare_application(tmp_path):
    model = make_tiny(tmp_path / "tiny", "qwen2")
    done = run_tool("api_cost.py", str(model), "--loads", "2:1", "--rounds", "1", "--seconds", "0.1")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["path"] for row in rows] == ["/v1/chat/completions", "/v1/completions"]
    for row in rows:
        assert row["ms_per_1000_chunks_of_64"]["bare"] > 0 and row["ms_per_1000_chunks_of_512"]["crane"] > 0


def test_bench_served_compares_a_server_with_the_engine_alone(tmp_path):
    model = make_tiny(tmp_path / "tiny", "qwen2")
    done = run_tool("bench_served.py", str(model), "--clients", "2", "--rounds", "1", "--max-tokens", "8",
                    "--prompt-words", "5", "--engine-on", "0", "--worker-on", "0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert row["requests"] == 4 and row["alone tokens_per_s"] > 0 and row["cpu s engine"] >= 0
    assert float(row["tokens_per_s ratio"].split()[0]) > 0


@pytest.mark.parametrize("recorded", [False, True])
def test_profile_step_divides_a_step_into_its_parts(tmp_path, recorded):
    if recorded and (native.load(cache_dir(), 2) is None or not native.has_amx()):
        pytest.skip("models of the default type are not computed in C alone here")
    native.unload()
    model = make_tiny(tmp_path / "tiny", "qwen2", fmt="gguf", quant="Q8_0")
    how = ["--steps", "3"] if recorded else ["--steps", "3", "--call-by-call"]
    done = run_tool("profile_step.py", str(model), "--batch", "2", "--context", "8", *how)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["plain_ms"] > 0 and document["limit_ms"] > 0
    parts = document["parts_ms"]
    wanted = {"product", "best token", "outside"} if recorded else {"products", "norms", "drawing"}
    assert wanted | {"attention"} <= parts.keys() and all(ms >= 0 for ms in parts.values())


def test_fetch_model_finds_the_default_model_in_the_cache_and_checks_it(smollm2):
    done = run_tool("fetch_model.py")
    assert done.returncode == 0 and done.stdout.strip() == str(smollm2)


def test_soak_finds_nothing_wrong_while_it_kills_and_checks():
    done = run_tool("soak.py", "--requests", "10000", "--kill-every", "1.0", "--seconds", "180", timeout_s=240)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines() if line and line[-1].isdigit())
    assert "PROBLEM" not in done.stdout and any(name.startswith("kills of") for name in rows)
    assert all(int(rows[f"answers checked, {how}"]) > 20 for how in ("whole", "stream", "slow"))


def test_soak_fails_a_run_for_what_it_looks_for():
    from tools import soak

    tally = soak.Tally()
    soak.compare({"worker": (50.0, 20, 4)}, {"worker": (52.0, 21, 6)}, tally)
    assert not tally.problems
    soak.compare({"worker": (50.0, 20, 4)}, {"worker": (90.0, 60, 40)}, tally)
    assert [word in text for word, text in zip(("memory", "open files", "threads"), tally.problems)] == [True] * 3
    with pytest.raises(soak.Lost):
        soak.joined([b'{"error": {"message": "the engine has left"}}'])
    answer = {"choices": [{"index": 0, "text": "a", "finish_reason": "stop", "logprob": 0.12345}], "id": "x"}
    other = json.loads(json.dumps(answer).replace("0.12345", "0.12501").replace('"x"', '"y"'))
    assert soak.essence(answer) != soak.essence(other) and soak.texts(answer) == soak.texts(other)


@pytest.mark.parametrize("raw, whole", [(b"2\r\nab\r\n0\r\n\r\n", True), (b"2\r\nab\r\n", False), (b"5\r\nab", False)])
def test_soak_tells_a_stream_that_was_cut_from_one_that_ended(raw, whole):
    import asyncio

    from tools import soak

    async def read():
        reader = asyncio.StreamReader()
        reader.feed_data(raw)
        reader.feed_eof()
        return await soak._Chunks(reader).read()

    if whole:
        assert asyncio.run(read()) == b"ab"
    else:
        with pytest.raises(soak.Lost):
            asyncio.run(read())
