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
    "ggml-vocab-bert-bge.gguf": "fbcbe22278fb302694d5f4a41bfe48c5f90e8e3554eab1c0435387dff654a854",
    "ggml-vocab-command-r.gguf": "a2f8cfea952ef7c391a6d92a1c309d0bd32e36384d9b9230569a7425732f27d9",
    "ggml-vocab-deepseek-coder.gguf": "91cb1379f2e33af1c4866b194622b7a0e12e8f0c9dba7ba2f10d55978730bec1",
    "ggml-vocab-deepseek-llm.gguf": "867f77537b54565f0d81d508c04edc41aa1d4ffc1a92745f225b4c1b02755f76",
    "ggml-vocab-falcon.gguf": "9f0bf8b0733680398b72e652e90f260f43782f326e75545fc0e49611a5ba35ad",
    "ggml-vocab-gpt-2.gguf": "cedc56ca6e2e89f63e781696d1fd76b4b1d49e6720dee86463e915f6e90016ac",
    "ggml-vocab-llama-bpe.gguf": "97272e430d53bc7688f52d5e0ad8ea8f163ede9f1bbd1694feaa504797d5d96e",
    "ggml-vocab-llama-spm.gguf": "16c3724582d59aa8bf84711894e833f916ee46a31d80e21312759c48bf8d0e69",
    "ggml-vocab-mpt.gguf": "59dc382612866d1fc6c11ea531318d327598f3412d9c8f8600607cdf3030898f",
    "ggml-vocab-phi-3.gguf": "967d7190d11c4842eab697079d98d56c2116e10eb617be355a2733bfc132e326",
    "ggml-vocab-qwen2.gguf": "44c2f46b715f585c6ab513970e8a006bfa5badd6108560054921cf598d154d8c",
    "ggml-vocab-qwen35.gguf": "63ed952ff338996cf0bdf24a7b10015124273f75c6dc9bb427356aa3f67ec62c",
    "ggml-vocab-refact.gguf": "ac3ceda902fed91ccf74312b305d9b86c37e4f8e35fa9cc6ef3ce34fca7d4678",
    "ggml-vocab-starcoder.gguf": "fedb892b4e1bd3c1f2fcdae356440b14fb458f4264d586e5c987ed93df4e174d",
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
