#!/usr/bin/env python3
"""Fetch the real inputs of the tests by package name with pip, check them, and say where they are.

    python tools/fetch_test_inputs.py [DEST]        (default: the user's cache, crane/)

DEST/vocabs  llama.cpp's vocabulary-only GGUF files with their test vectors, taken as data out of the
             llama-cpp-python source archive; never built or installed. Kept when already there.
DEST/models  real models: see --models, which names the script that fetches them (it is not part of crane).
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ARCHIVE = "llama-cpp-python==0.3.36"
VOCABS = {
    "ggml-vocab-qwen2.gguf": "44c2f46b715f585c6ab513970e8a006bfa5badd6108560054921cf598d154d8c",
    "ggml-vocab-llama-bpe.gguf": "97272e430d53bc7688f52d5e0ad8ea8f163ede9f1bbd1694feaa504797d5d96e",
    "ggml-vocab-llama-spm.gguf": "16c3724582d59aa8bf84711894e833f916ee46a31d80e21312759c48bf8d0e69",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crane"
    parser.add_argument("dest", nargs="?", type=Path, default=default)
    parser.add_argument("--models", type=Path, help="script called as `python SCRIPT DEST/models`")
    args = parser.parse_args()
    fetch_vocabs(args.dest / "vocabs")
    if args.models:
        subprocess.run([sys.executable, str(args.models), str(args.dest / "models")], check=True)
    return 0


def fetch_vocabs(dest: Path) -> None:
    """Every file of VOCABS with its .inp and .out in `dest`."""
    wanted = [name + suffix for name in VOCABS for suffix in ("", ".inp", ".out")]
    if all((dest / name).exists() for name in wanted):
        return
    dest.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder]
        subprocess.run([*command, ARCHIVE], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            for member in tar:
                name = os.path.basename(member.name)
                if name in wanted and "/vendor/llama.cpp/models/" in member.name:
                    data = tar.extractfile(member).read()
                    check(name, data)
                    (dest / name).write_bytes(data)
    missing = [name for name in wanted if not (dest / name).exists()]
    if missing:
        raise SystemExit(f"fetch_test_inputs: {ARCHIVE} does not hold {', '.join(missing)}")


def check(name: str, data: bytes) -> None:
    """Compare the SHA-256 of a vocabulary with the one pinned here."""
    digest = hashlib.sha256(data).hexdigest()
    if name in VOCABS and VOCABS[name] != digest:
        raise SystemExit(f"fetch_test_inputs: {name}: SHA-256 mismatch ({digest}), nothing kept")


if __name__ == "__main__":
    sys.exit(main())
