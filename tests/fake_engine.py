"""An engine process with no model: `python -m tests.fake_engine`, for tests of links and processes.

The model folder steers loading by files: `broken` (its text is the reason), `slow` (seconds),
`die` (the process ends), and collects a line per start in `starts`. The first prompt token steers
a request: see the constants. Otherwise token i of a request is i, one per step of STEP_S.
"""

import os
import sys
import time
from pathlib import Path

from crane.errors import ModelError
from crane.runtime import server
from crane.runtime.types import (
    Accepted, EngineInfo, EngineStats, Generate, Output, Rejected, Usage,
)

STEP_S = 0.01
BREAK_STEP, BREAK_EVERY_STEP, BREAK_ADD, REFUSE, FLOOD, STALL = 101, 102, 103, 104, 105, 106


class FakeEngine:
    """As much of `crane.runtime.engine.Engine` as its process uses."""

    def __init__(self, settings, progress):
        self.folder = Path(settings.model_path)
        with open(self.folder / "starts", "a") as starts:
            starts.write(f"{os.getpid()}\n")
        if self._said("die"):
            os._exit(9)
        seconds = float(self._said("slow") or 0)
        for part in range(1, 21):
            time.sleep(seconds / 20)
            progress(part * 5_000_000, 100_000_000)
        if self._said("broken"):
            raise ModelError(self._said("broken"))
        self.settings = settings
        self.running: dict[tuple[str, int], int] = {}  # (rid, choice): the next token
        self.requests: dict[str, Generate] = {}
        self.num_added = 0
        self.info = EngineInfo(
            pid=os.getpid(), model_path=settings.model_path, model_type="llama", dtype="float32",
            device="cpu", max_model_len=1 << 20, vocab_size=1000, num_pages=1, page_size=16,
            max_concurrent=32, decode_tokens_per_seq=16,
        )

    def _said(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def add(self, request: Generate) -> Accepted | Rejected:
        kind = request.prompt_ids[0]
        if kind == BREAK_ADD:
            raise RuntimeError("add is broken")
        if kind == REFUSE:
            return Rejected(request.rid, "queue_full", "too many", 2.0)
        self.requests[request.rid] = request
        self.running |= {(request.rid, index): 0 for index in range(request.sampling.n)}
        self.num_added += 1
        return Accepted(request.rid)

    def abort(self, rid: str | None, index: int | None = None) -> list[Output]:
        keys = [key for key in self.running if rid in (None, key[0]) and index in (None, key[1])]
        return self._end(keys, "abort")

    def fail_all(self, message: str) -> list[Output]:
        return self._end(list(self.running), "error", message)

    def _end(self, keys, reason: str, message: str | None = None) -> list[Output]:
        for key in keys:
            del self.running[key]
        return [Output(*key, [], finish_reason=reason, error=message) for key in keys]

    def step(self) -> list[Output]:
        time.sleep(STEP_S)
        kinds = [self.requests[rid].prompt_ids[0] for rid, _ in self.running]
        if BREAK_STEP in kinds or BREAK_EVERY_STEP in kinds:
            if BREAK_EVERY_STEP in kinds:
                self.step = self._broken
            raise RuntimeError("step is broken")
        if STALL in kinds:  # for as long as the test wants
            while self._said("stall"):
                time.sleep(0.01)
        outputs = []
        for (rid, index), token in list(self.running.items()):
            request = self.requests[rid]
            last = token + 1 == request.sampling.max_tokens
            token_ids = [token] * (10_000 if request.prompt_ids[0] == FLOOD else 1)
            usage = Usage(1, token + 1) if last else None
            reason = "length" if last else None
            outputs.append(Output(rid, index, token_ids, finish_reason=reason, usage=usage))
            self.running[rid, index] = token + 1
            if last:
                del self.running[rid, index]
        return outputs

    def prepare(self) -> bool:
        return False

    def rest(self) -> None:
        with open(self.folder / "rests", "a") as rests:
            rests.write(f"{len(self.running)}\n")

    def close(self) -> None:
        pass

    def _broken(self) -> list[Output]:
        raise RuntimeError("every step is broken")

    def stats(self) -> EngineStats:
        return EngineStats(total_requests=self.num_added, active_sequences=len(self.running))


if __name__ == "__main__":
    server.STALL_S = 0.5
    server.main(engine_factory=FakeEngine)
    sys.exit(1)
