"""Questions to the engine whose answer has to wait for what it does. Torch-free."""

import time
import uuid
from dataclasses import dataclass
from typing import Any

from crane.runtime.types import Call, Generate, Output, Rejected, Reply, SamplingParams

_PROBE = SamplingParams(max_tokens=1, temperature=0.0)


@dataclass(frozen=True)
class _Question:
    """Who waits for what, until when (on the monotonic clock)."""

    peer: Any
    call: Call
    until_s: float


class Waiting:
    """Open questions of the ops below. Written by the stepper's thread only.

    "probe": answered by the next output of anybody's request; an idle engine is given a request of its own
        for that. Reply: {"alive": true}, or an error when that request fails.
    "flush_cache": once nothing runs, the prefix cache is emptied. Payload: {"timeout_s": how long to wait for
        that}. Reply: {"flushed": bool, "pages": how many became blank}.
    """

    OPS = ("probe", "flush_cache")

    def __init__(self):
        self._questions: list[_Question] = []
        self._probe_rid = ""  # of the request that was made for a probe last

    def add(self, peer: Any, call: Call) -> None:
        """Take a question with one of `OPS`."""
        timeout_s = (call.payload or {}).get("timeout_s", 0.0)
        self._questions.append(_Question(peer, call, time.monotonic() + timeout_s))

    def forget(self, peer: Any) -> None:
        """The peer is gone."""
        self._questions = [question for question in self._questions if question.peer is not peer]

    def prepare(self, engine) -> list[tuple[Any, Reply]]:
        """Before a step: what an idle engine can answer, and something for it to do if it is to be probed."""
        answers = self._answer("flush_cache", lambda question: _flush(engine) if not engine.has_work else None)
        if engine.has_work or not any(question.call.op == "probe" for question in self._questions):
            return answers
        self._probe_rid = f"probe-{uuid.uuid4().hex}"
        taken = engine.add(Generate(self._probe_rid, [0], _PROBE))
        if isinstance(taken, Rejected):
            answers += self._answer("probe", lambda question: taken.message)
        return answers

    def follow(self, outputs: list[Output]) -> list[tuple[Any, Reply]]:
        """After a step that gave `outputs`."""
        answers = []
        if any(output.finish_reason not in ("error", "abort") for output in outputs):
            answers = self._answer("probe", lambda question: {"alive": True})
        elif any(output.finish_reason == "error" and output.rid == self._probe_rid for output in outputs):
            answers = self._answer("probe", lambda question: "the engine cannot generate")
        now = time.monotonic()
        late = {"flushed": False, "pages": 0}
        return answers + self._answer("flush_cache", lambda question: late if now >= question.until_s else None)

    def _answer(self, op: str, decide) -> list[tuple[Any, Reply]]:
        """decide(question): its payload, an error message, or None to wait on."""
        answers, left = [], []
        for question in self._questions:
            decided = decide(question) if question.call.op == op else None
            if decided is None:
                left.append(question)
            elif isinstance(decided, str):
                answers.append((question.peer, Reply(question.call.id, error=decided)))
            else:
                answers.append((question.peer, Reply(question.call.id, decided)))
        self._questions = left
        return answers


def _flush(engine) -> dict:
    return {"flushed": True, "pages": engine.flush_cache()}
