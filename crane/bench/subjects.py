"""The engines that a benchmark compares, each in processes of its own."""

import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from crane.bench.cell import MARK, Cell, Timing, peak_rss_bytes
from crane.errors import SettingsError
from crane.runtime.settings import child_env

ROOT = Path(__file__).parents[2]
PEERS = ("llama.cpp", "vllm", "transformers")


class Child:
    """An engine that stays loaded between cells; see `cell`. It sleeps while others are measured.

    Raises SettingsError when it ends or does not get ready, with the end of what it said.
    """

    def __init__(self, command: list[str], env: dict[str, str] | None = None):
        started = time.perf_counter()
        self._log: list[str] = []
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            # crane must be importable in a peer's Python, too: its `cell` module needs nothing else
            env=child_env(PYTHONPATH=str(ROOT), **(env or {})),
        )  # fmt: skip
        self.name = self._read()["ready"]
        self.measure(Cell(1, 8, 1))
        self.start_s = time.perf_counter() - started

    def measure(self, cell: Cell) -> Timing:
        """Run one cell."""
        self._process.stdin.write(json.dumps(cell.__dict__) + "\n")
        self._process.stdin.flush()
        return Timing(**self._read())

    @property
    def peak_rss_bytes(self) -> int:
        return peak_rss_bytes(self._process.pid)

    def close(self) -> None:
        """End the child."""
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict:
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
            self._log = [*self._log[-15:], line]
        self._process.wait()
        raise SettingsError("a benchmark child ended:\n" + "".join(self._log))


class LlamaCpp:
    """llama.cpp through its llama-batched-bench, which loads the model (from the page cache) for each cell."""

    def __init__(self, binary: str, model: str, threads: int):
        self._binary, self._model, self._threads = binary, model, threads
        self.name = "llama.cpp"
        self.peak_rss_bytes = 0
        started = time.perf_counter()
        self.measure(Cell(1, 8, 1))
        self.start_s = time.perf_counter() - started

    def measure(self, cell: Cell) -> Timing:
        """Run one cell."""
        room = cell.batch * (cell.context + cell.tokens)
        command = [
            self._binary, "-m", self._model, "-t", str(self._threads), "-tb", str(self._threads), "-fa", "on",
            "-c", str(max(room, 512)), "-b", "2048", "-ub", "512", "--output-format", "jsonl",
            "-npp", str(cell.context), "-ntg", str(cell.tokens), "-npl", str(cell.batch),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not rows:
            raise SettingsError(f"{self._binary} failed:\n{done.stderr[-1500:]}")
        self.peak_rss_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        return Timing(rows[-1]["t_pp"], rows[-1]["t_tg"], cell.batch * cell.tokens)

    def close(self) -> None:
        """Nothing runs between cells."""


def crane(model: str, threads: int, cells: list[Cell], settings: dict) -> Child:
    """crane's engine, with room for every cell."""
    longest = max(cell.context + cell.tokens for cell in cells)
    given = {"model_path": model, "threads": threads, "max_concurrent": max(max(cell.batch for cell in cells), 1),
             "max_queue": 4096, "max_model_len": longest + 64, **settings}  # fmt: skip
    return Child([sys.executable, "-m", "crane.bench.child_crane", json.dumps(given)])


def peer(kind: str, where: str, model: str, threads: int, cells: list[Cell], dtype: str) -> Child | LlamaCpp:
    """Another engine. where: llama.cpp's binary or the folder of it, or the Python that has the package.

    Raises SettingsError when it is not there.
    """
    if kind == "llama.cpp":
        path = Path(where) / "llama-batched-bench" if where and Path(where).is_dir() else where or "llama-batched-bench"
        found = shutil.which(path)
        if found is None:
            raise SettingsError(f"--vs llama.cpp: there is no {path}; name its folder as --vs llama.cpp=FOLDER")
        return LlamaCpp(found, model, threads)
    python = where or sys.executable
    if shutil.which(python) is None:
        raise SettingsError(f"--vs {kind}: there is no {python}; name the Python that has it as --vs {kind}=PYTHON")
    arguments = [model, dtype]
    env = {"OMP_NUM_THREADS": str(threads)}
    if kind == "vllm":
        arguments.append(str(max(cell.context + cell.tokens for cell in cells) + 16))
        room_gb = max(cell.batch * (cell.context + cell.tokens) for cell in cells) * 256 * 1024 // 2**30 + 1
        env |= {"VLLM_CPU_KVCACHE_SPACE": str(room_gb), "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}
        env |= {"VLLM_LOGGING_LEVEL": "WARNING"}
    return Child([python, "-m", f"crane.bench.child_{kind}", *arguments], env)
