#!/usr/bin/env python3
"""Time the engine without HTTP, alone or against another engine: the same as `crane bench engine`.

    python tools/bench_engine.py --model-path MODEL --batch 1,8,32 --context 128,1024
    python tools/bench_engine.py --model-path MODEL.gguf --vs llama.cpp=/path/to/build/bin
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from crane.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["bench", "engine", *sys.argv[1:]]))
