"""What the engine's process does before it loads a model: what it imports, and the memory it has made ready."""

import importlib.util
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from crane.runtime import server
from tests.tiny import make_tiny

MIB = 1 << 20
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_huge_pages = pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="this system has no huge pages"
)
linux_only = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="memory is touched on Linux only")


@pytest.mark.parametrize("forced", [False, True])
def test_the_engine_process_loads_triton_only_where_it_may_be_used(tmp_path, forced):
    path = str(make_tiny(tmp_path, "qwen3"))
    program = """if True:
        import sys
        from crane.errors import SettingsError
        from crane.runtime.server import load_engine
        from crane.runtime.settings import Settings
        try:
            load_engine(Settings(model_path=sys.argv[1], cpu=True, kernels=sys.argv[2], max_model_len=64))
        except SettingsError as error:
            print(error)
        print("triton" in sys.modules)
    """
    given = [path, "triton" if forced else "auto"]
    done = subprocess.run([sys.executable, "-c", program, *given], capture_output=True, text=True, timeout=100)
    if forced and importlib.util.find_spec("triton"):
        assert done.stdout == "--kernels triton: triton does not run on cpu\nTrue\n", done.stderr
    else:
        assert done.stdout.splitlines()[-1] == "False", done.stderr


@pytest.fixture
def started(monkeypatch):
    """The processes that are started."""
    found, start = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **named: found.append(start(*args, **named)) or found[-1])
    monkeypatch.setattr(server, "num_cores", lambda: 2)
    return found


def weights(path: Path, num_bytes: int) -> str:
    """A file of so many bytes that takes no room on disk."""
    path.touch()
    os.truncate(path, num_bytes)
    return str(path)


@linux_only
@pytest.mark.parametrize("names", [["w.gguf"], ["a.safetensors", "b.safetensors"]])
def test_as_much_memory_is_touched_as_the_weights_files_are_large_by_a_process_of_its_own(tmp_path, started, names):
    paths = [weights(tmp_path / name, 96 * MIB // len(names)) for name in names]
    with server._memory_at_hand(paths[0] if len(names) == 1 else str(tmp_path)):
        assert started[0].args[-1] == str(96 * MIB) and started[0].wait(60) == 0


@needs_huge_pages
def test_touching_takes_all_of_the_memory_from_the_system():
    look = "\nprint(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-ISc", server._TOUCH + look, str(96 * MIB)], capture_output=True, text=True)
    assert int(re.search(r"VmHWM:\s+(\d+)", done.stdout)[1]) >= 96 * 1024, done.stderr


@linux_only
def test_a_model_of_any_size_has_a_limited_amount_touched_and_an_error_ends_it(tmp_path, started):
    with pytest.raises(ImportError), server._memory_at_hand(weights(tmp_path / "w.gguf", 40 << 30)):
        assert int(started[0].args[-1]) == 1 << 30
        raise ImportError
    assert started[0].returncode is not None


@pytest.mark.parametrize("name", ["small.gguf", "missing", "pipe.gguf", "a\0b", ""])
def test_nothing_is_touched_for_small_files_or_where_there_are_none(tmp_path, monkeypatch, started, name):
    monkeypatch.chdir(tmp_path)
    weights(tmp_path / "small.gguf", 63 * MIB)
    os.mkfifo(tmp_path / "pipe.gguf")
    with server._memory_at_hand(name):
        pass
    assert started == []


def test_one_core_has_no_time_for_it(tmp_path, started, monkeypatch):
    monkeypatch.setattr(server, "num_cores", lambda: 1)
    with server._memory_at_hand(weights(tmp_path / "w.gguf", 96 * MIB)):
        assert started == []
