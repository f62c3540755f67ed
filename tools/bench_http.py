#!/usr/bin/env python3
"""Time streaming completions of any OpenAI-compatible server: the same as `crane bench http`.

    python tools/bench_http.py http://127.0.0.1:8080 --clients 1,8,32
    python tools/bench_http.py http://127.0.0.1:8080 --vs http://127.0.0.1:9090
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from crane.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["bench", "http", *sys.argv[1:]]))
