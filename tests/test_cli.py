"""The `crane` and `crane-oai` commands."""

import argparse
import dataclasses
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from crane import __version__
from crane.cli import add_flags, main, main_oai, settings_from
from crane.errors import SettingsError
from crane.runtime.settings import Settings

ROOT = Path(__file__).resolve().parents[1]


def parsed(*argv: str) -> Settings:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser)
    return settings_from(parser.parse_args(argv))


def test_every_setting_has_a_flag_and_help_shows_it(capsys):
    with pytest.raises(SystemExit) as end:
        main(["serve", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    text = re.sub(r"\s+", " ", shown)
    for spec in dataclasses.fields(Settings):
        assert f"--{spec.name.replace('_', '-')}" in text
        assert spec.metadata["help"] in text
    _, *groups = [line for line in shown.splitlines() if line.endswith(":") and line[0] != " "]
    assert groups[0] == "model and server:" and groups[-1] == "API workers: keys and logs:"
    assert len(groups) == len(set(groups)) == 10


def test_the_seeds_flags_have_the_seeds_defaults():
    settings = parsed("--model-path", "m")
    assert (settings.model_type, settings.model_name, settings.format) == ("auto", "", "auto")
    assert (settings.host, settings.port) == ("0.0.0.0", 8080)
    assert (settings.cpu, settings.max_concurrent, settings.decode_tokens_per_seq) == (False, 32, 16)


def test_flags_become_settings():
    settings = parsed("--model-path", "m", "--cpu", "--port", "9000", "--kv-memory", "2g",
                      "--linger-s", "0.5", "--no-worker-swap", "--model-type", "qwen3")
    assert settings == Settings(model_path="m", cpu=True, port=9000, kv_memory=2 << 30, linger_s=0.5,
                                worker_swap=False, model_type="qwen3")


def test_flags_win_over_variables_even_when_they_repeat_the_default(monkeypatch):
    monkeypatch.setenv("CRANE_PORT", "9000")
    monkeypatch.setenv("CRANE_CPU", "1")
    assert parsed().port == 9000 and parsed().cpu
    assert parsed("--port", "8080").port == 8080


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--port", "http"], "--port must be a whole number, got 'http'"),
        (["--port", "65536"], "CRANE_PORT must be at most 65535, got 65536"),
        (["--format", "onnx"], "CRANE_FORMAT must be one of auto, safetensors, gguf, got 'onnx'"),
        (["--kv-memory", "much"],
         "--kv-memory must be a size such as 500m or 2g, or a part such as 40% or 0.4, got 'much'"),
    ],
)
def test_bad_flags_are_named(argv, message):
    with pytest.raises(SettingsError) as error:
        parsed(*argv)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "crane: no model: give --model-path (or CRANE_MODEL_PATH) a folder or .gguf file"),
        (["--model-path", "/no/such"], "crane: there is no model at /no/such"),
        (["--model-path", ".", "--page-size", "24"], "crane: CRANE_PAGE_SIZE must be a power of two, got 24"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [lambda argv: main(["serve", *argv]), main_oai, lambda argv: main_oai(["serve", *argv])],
    ids=["crane serve", "crane-oai", "crane-oai serve"],
)
def test_what_cannot_be_served_is_one_line_and_status_1(command, argv, message, capsys):
    assert command(argv) == 1
    assert capsys.readouterr().err == message + "\n"


def test_a_taken_port_is_one_line_and_status_1(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--model-path", str(ROOT), "--host", "127.0.0.1", "--port", str(port)]) == 1
    line = f"crane: cannot listen on 127.0.0.1 port {port}: Address already in use\n"
    assert capsys.readouterr().err == line


def test_a_host_that_does_not_exist_is_one_line_and_status_1(capsys):
    assert main(["serve", "--model-path", str(ROOT), "--host", "no.such.invalid", "--port", "0"]) == 1
    assert capsys.readouterr().err.startswith("crane: cannot listen on no.such.invalid port 0: ")


@pytest.mark.parametrize("argv", [["--prot", "1"], ["serv"], ["serve", "--max", "3"], []])
def test_unknown_words_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2 and "usage: crane" in capsys.readouterr().err


def test_the_version_is_shown_by_every_door(capsys):
    for door in (main, main_oai):
        with pytest.raises(SystemExit) as end:
            door(["--version"])
        assert end.value.code == 0
        assert capsys.readouterr().out.split()[-1] == __version__
    command = [sys.executable, "-m", "crane", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == f"crane {__version__}\n"


def test_version_and_help_come_without_the_heavy_imports():
    code = ("import sys; import crane.cli; "
            "print([m for m in ('torch', 'falcon', 'gunicorn', 'tokenizers') if m in sys.modules])")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "[]\n"
