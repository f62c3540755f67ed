#!/usr/bin/env python3
"""Fuzz what reads files, requests and frames, guided by coverage.

    pip install atheris                     in an environment of its own that also has crane's packages
    python tools/fuzz_parsers.py gguf -max_total_time=600
    python tools/fuzz_parsers.py --list

The targets and what they must hold are in tests/fuzzing.py. The options behind the target's name are libFuzzer's. An
input that breaks something is written to the working folder; mend it, and keep the input in tests/corpus/TARGET.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> int:
    import atheris

    with atheris.instrument_imports(include=["crane"]):
        from tests import fuzzing
    name = sys.argv[1] if len(sys.argv) > 1 else "--list"
    if name not in fuzzing.TARGETS:
        print("targets:", *fuzzing.TARGETS)
        return 0 if name == "--list" else 2
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(fuzzing.seeds(name)):
            (Path(folder) / f"seed-{number}").write_bytes(data)
        atheris.Setup([sys.argv[0], *sys.argv[2:], folder], fuzzing.TARGETS[name])
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
