"""`crane bench` on tiny models: what it prints, and that it refuses what it cannot measure."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from crane.bench.cell import Cell, Timing, prompts
from crane.bench.child_crane import check
from crane.bench.report import table
from crane.cli import main
from crane.runtime.engine import Engine
from crane.runtime.settings import Settings
from crane.runtime.types import Generate, SamplingParams
from tests.tiny import make_tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("tiny"), "qwen2"))


def bench(model, *arguments):
    return main(["bench", "engine", "--model-path", model, *arguments])


def test_the_engine_alone_gives_a_row_per_cell_and_ends_in_json(model, capsys):
    assert bench(model, "--batch", "1,2", "--context", "16", "--tokens", "4", "--rounds", "1") == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["batch"], row["context"]) for row in document["rows"]] == [(1, 16), (2, 16)]
    for row in document["rows"]:
        assert row["crane prefill tok/s"] > 0 and row["crane decode tok/s"] > 0
    assert document["machine"]
    (start_s,), (memory,) = document["start_s"].values(), document["peak_rss_bytes"].values()
    assert start_s > 0 and (memory > 50e6 or sys.platform != "linux")


def test_a_peer_is_measured_beside_it_and_compared(model, capsys):
    arguments = ["--batch", "2", "--context", "16", "--tokens", "4", "--rounds", "2", "--dtype", "float32"]
    assert bench(model, *arguments, "--vs", "transformers") == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]
    assert row["transformers decode tok/s"] > 0
    low, high = map(float, row["decode spread"].split("-"))
    assert low <= row["decode ratio"] <= high


def test_other_settings_are_measured_beside_those_given(model, capsys):
    arguments = ["--batch", "2", "--context", "16", "--tokens", "4", "--rounds", "1", "--set", "overlap=on"]
    assert bench(model, *arguments, "--vs", "crane=overlap=off,page_size=32") == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]
    assert row["crane:overlap=off,page_size=32 decode tok/s"] > 0 and row["decode ratio"] > 0


@pytest.mark.parametrize(("arguments", "said"), [
    (["--vs", "crane=pages=3"], "there is no setting 'pages'"),
    (["--vs", "ollama"], "--vs must be one of llama.cpp, vllm, transformers, got 'ollama'"),
    (["--vs", "llama.cpp=/nowhere"], "there is no /nowhere"),
    (["--batch", "1,x"], "--batch must be whole numbers above 0"),
    (["--set", "pages=3"], "there is no setting 'pages'"),
    (["--set", "page_size=three"], "--set page_size must be a whole number"),
])
def test_a_bad_option_is_named(model, capsys, arguments, said):
    assert bench(model, "--context", "8", "--tokens", "1", *arguments) == 1
    assert said in capsys.readouterr().err


def test_a_model_that_does_not_load_says_why(tmp_path, capsys):
    assert bench(str(tmp_path)) == 1
    assert "holds neither .safetensors nor .gguf weights" in capsys.readouterr().err


def test_the_check_fails_when_decoding_goes_astray(model):
    engine = Engine(Settings(model_path=model, dtype="float32"))

    def add(rid, ids, **params):
        engine.add(Generate(rid, ids, SamplingParams(temperature=0.0, ignore_eos=True, **params)))

    check(engine, add)
    honest = engine.step

    def step():
        return [msgspec.structs.replace(o, token_ids=[(t + 7) % 100 for t in o.token_ids]) for o in honest()]

    engine.step = step
    with pytest.raises(SystemExit, match="check failed"):
        check(engine, add)


def test_prompts_differ_by_salt_and_stay_inside_the_vocabulary():
    cell = Cell(2, 50, 1)
    first, second = prompts(cell, 2000, 1), prompts(cell, 2000, 2)
    assert len(first) == 2 and {len(row) for row in first} == {50}
    assert first != second and first[0] != first[1] and prompts(cell, 2000, 1) == first
    assert all(0 <= token < 64 for row in prompts(cell, 64, 1) for token in row)
    assert all(256 <= token < 1744 for row in first for token in row)


def test_the_table_has_a_column_for_everything_any_row_has():
    lines = table([{"a": 1, "b": "xy"}, {"a": 22, "c": 3}]).splitlines()
    assert [line.split() for line in lines] == [["a", "b", "c"], ["1", "xy"], ["22", "3"]]


def test_the_tool_is_the_same_command():
    for command in ([str(ROOT / "tools" / "bench_engine.py")], ["-m", "crane", "bench", "engine"]):
        done = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and "--vs" in done.stdout


def test_a_timing_survives_the_trip_between_processes():
    assert Timing(**json.loads(json.dumps(Timing(0.5, 1.5, 3).__dict__))) == Timing(0.5, 1.5, 3)
