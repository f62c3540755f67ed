"""Real servers for tests: gunicorn or `crane serve` on a free port, with all their processes cleaned up."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from crane.runtime import launch

ROOT = Path(__file__).resolve().parents[1]
START_S = 60.0
COMMANDS = {
    "gunicorn": ("-m", "gunicorn", "--bind", "127.0.0.1:0"),
    "crane": ("-m", "crane", "serve", "--host", "127.0.0.1", "--port", "0"),
}


class Server:
    """A running server. process is the arbiter; url has no trailing slash and no /v1."""

    def __init__(self, process: subprocess.Popen, log_path: Path):
        self.process = process
        self.url = ""
        self._log_path = log_path

    def log(self) -> str:
        """All that its processes have printed."""
        return self._log_path.read_text(errors="replace")

    def engine_pids(self) -> list[int]:
        return engine_pids(self.process.pid)

    def engine_pid(self) -> int:
        """The one engine's pid."""
        (pid,) = self.engine_pids()
        return pid

    def worker_pids(self) -> list[int]:
        """The API workers: the arbiter's children, engines excluded."""
        engines = self.engine_pids()
        children = psutil.Process(self.process.pid).children()
        return [child.pid for child in children if child.pid not in engines and child.status() != "zombie"]

    def get(self, path: str, timeout_s: float = 10.0) -> tuple[int, dict]:
        """(status, JSON body) of a GET."""
        return _fetch(urllib.request.Request(self.url + path), timeout_s)

    def post(self, path: str, body: dict, timeout_s: float = 60.0) -> tuple[int, dict]:
        """(status, JSON body) of a POST."""
        return _fetch(urllib.request.Request(self.url + path, json.dumps(body).encode()), timeout_s)

    def stream(self, path: str, body: dict) -> "EventStream":
        return EventStream(self.url, path, body)

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Until /health says so. AssertionError with the log when the server ends or takes too long."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            assert self.process.poll() is None, f"the server ended:\n{self.log()}"
            if not self.url:
                found = re.search(r"Listening at: (http://\S+)", self.log())
                self.url = found[1] if found else ""
            if self.url:
                with contextlib.suppress(OSError):
                    if self.get("/health")[0] == 200:
                        return
            time.sleep(0.02)
        raise AssertionError(f"the server was not ready within {timeout_s:g} s:\n{self.log()}")


class EventStream(threading.Thread):
    """One streamed POST, read by a thread of its own. Started at once.

    events: the data of every event so far, "[DONE]" included. ended: how it ended, once it has: "eof"
    or the name of the client's error.
    """

    def __init__(self, url: str, path: str, body: dict):
        super().__init__(daemon=True)
        self.events: list[str] = []
        self.status = 0
        self.ended = ""
        self.port = 0
        self._body = json.dumps({**body, "stream": True})
        self._path = path
        self._connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)
        self.start()

    def run(self) -> None:
        try:
            self._connection.connect()
            self.port = self._connection.sock.getsockname()[1]
            self._connection.request("POST", self._path, self._body)
            response = self._connection.getresponse()
            self.status = response.status
            for line in response:
                if line.startswith(b"data: "):
                    self.events.append(line[6:].decode().strip())
            self.ended = "eof"
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            self.ended = type(error).__name__

    def wait(self, condition, timeout_s: float = 20.0) -> "EventStream":
        """Until condition(self). Raises AssertionError."""
        say = lambda: f"status {self.status}, {self.events[-2:]}, {self.ended}"  # noqa: E731
        wait_for(lambda: condition(self), timeout_s, say)
        return self

    def flowing(self, count: int = 3) -> "EventStream":
        """Until `count` more events than now have come."""
        goal = len(self.events) + count
        return self.wait(lambda stream: len(stream.events) >= goal)

    def finish(self, timeout_s: float = 30.0) -> list[str]:
        """All events, once the stream has ended."""
        self.join(timeout_s)
        assert self.ended, f"still open after {timeout_s:g} s"
        return self.events

    def hang_up(self) -> None:
        """Leave, as a client whose process ends."""
        with contextlib.suppress(OSError, AttributeError):
            self._connection.sock.shutdown(2)


def wait_for(condition, timeout_s: float = 20.0, say=lambda: "") -> None:
    """Poll until condition() is true. Raises AssertionError."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {say()}"
        time.sleep(0.02)


def engine_pids(arbiter_pid: int) -> list[int]:
    """Engine processes that belong to this arbiter, alive or not."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "crane.runtime.server" in words and str(arbiter_pid) in words:
            found.append(process.pid)
    return found


@contextlib.contextmanager
def start_server(model_path, *args: str, how: str = "gunicorn", env: dict | None = None,
                 app: str = "crane.api:app", wait: bool = True) -> Iterator[Server]:
    """A server of the model, ready unless wait is False. args: further options of gunicorn or `crane serve`.

    It runs in a folder of its own, so that nothing works because of where it was started.
    """
    command = [sys.executable, *COMMANDS[how], *args, *([app] if how == "gunicorn" else [])]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("CRANE_")}
    variables |= {"PYTHONPATH": str(ROOT), "CRANE_MODEL_PATH": str(model_path), "CRANE_CPU": "1",
                  "CRANE_KV_MEMORY": "64m", "CRANE_THREADS": "1", **(env or {})}
    with tempfile.TemporaryDirectory(prefix="crane-test-") as folder:
        log_path = Path(folder) / "log"
        with open(log_path, "wb") as log:
            process = subprocess.Popen(
                command, cwd=folder, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        server = Server(process, log_path)
        try:
            if wait:
                server.wait_ready()
            yield server
        finally:
            _end(process)


def run_server(model_path, *args: str, how="gunicorn", env: dict | None = None) -> tuple[int, str, float]:
    """For a server that cannot start: (exit status, what it printed, seconds it took)."""
    started = time.monotonic()
    with start_server(model_path, *args, how=how, env=env, wait=False) as server:
        status = server.process.wait(START_S)
        return status, server.log(), time.monotonic() - started


def _fetch(request, timeout_s: float) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def _end(process: subprocess.Popen) -> None:
    """Stop the arbiter, then kill whatever of its processes is left."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in {child.pid for child in family} | set(engine_pids(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for path in launch.run_dir().glob(f"{process.pid}-*"):
        path.unlink(missing_ok=True)
