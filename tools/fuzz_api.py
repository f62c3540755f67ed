"""Throw what /openapi.json allows, and what it forbids, at a real server: `python tools/fuzz_api.py MODEL`.

Needs schemathesis on the PATH (or named with --schemathesis), in an environment of its own: crane does not
use it. MODEL is a model folder or .gguf file; a small one. Exits with schemathesis' status: 0 when no answer was
a 5xx or other than documented.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "ignored_auth",
)  # fmt: skip
KEY = "sk-fuzz"


def main() -> int:
    """Start a server, run schemathesis, stop the server."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--schemathesis", default="schemathesis", help="its command")
    parser.add_argument("--seconds", type=int, default=280, help="time for all of it")
    parser.add_argument("--examples", type=int, default=15, help="per route")
    parser.add_argument("--port", type=int, default=18740)
    options = parser.parse_args()
    url = f"http://127.0.0.1:{options.port}"
    # short sequences: what is tested is the API, and many requests ask for as many tokens as they get
    serve = [sys.executable, "-m", "crane", "serve", "--model-path", options.model, "--host", "127.0.0.1",
             "--port", str(options.port), "--api-key", KEY, "--max-model-len", "96", "--max-body", "1m",
             "--kv-memory", "64m", "--cpu", "--threads", "1", "--log-level", "warning"]  # fmt: skip
    folder = tempfile.mkdtemp(prefix="crane-fuzz-")
    server = subprocess.Popen(serve)
    try:
        wait_ready(url, server)
        described = write_description(url, Path(folder) / "openapi.json")
        fuzz = [options.schemathesis, "run", str(described), "--url", url, "-H", f"Authorization: Bearer {KEY}",
                "--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "-n", str(options.examples),
                "--workers", "2", "--request-timeout", "60", "--max-time", str(options.seconds),
                "--continue-on-failure", "--no-color"]  # fmt: skip
        return subprocess.run(fuzz, cwd=folder).returncode
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(folder)


def write_description(url: str, path: Path) -> Path:
    """The server's OpenAPI document, in which `model` is only ever the served one, else most bodies are a 404, and
    timeout_s is no shorter than an answer takes, else it is a 504."""

    def get(route: str) -> dict:
        request = urllib.request.Request(url + route, headers={"x-api-key": KEY})
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    name, document = get("/v1/models")["data"][0]["id"], get("/openapi.json")
    for schema in document["components"]["schemas"].values():
        known = schema.get("properties", {})
        if "model" in known:
            known["model"] = {"type": "string", "enum": [name]}
        if "timeout_s" in known:
            known["timeout_s"] = {"type": "number", "minimum": 60, "maximum": 3600}
    path.write_text(json.dumps(document))
    return path


def wait_ready(url: str, server: subprocess.Popen) -> None:
    """Until the server's /health says so. Raises SystemExit when it ends or takes a minute."""
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit("the server ended")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server was not ready within a minute")


if __name__ == "__main__":
    sys.exit(main())
