"""When what happened to a request: its timeline, and those of the last requests as a Chrome trace. Torch-free.

Written by looking at the sequences that have a timeline after each step, so whatever else runs costs nothing more.
"""

import time
from collections import deque
from dataclasses import dataclass, field

import msgspec

from crane.runtime.batch import Batch, Row
from crane.runtime.sequence import Sequence, Status
from crane.runtime.types import Output

# Timelines kept for the trace, of requests that asked for one.
NUM_KEPT = 100


@dataclass
class Timeline:
    """One choice. events: {"event", "ms" since its arrival, and what belongs to it}; those that last have
    "duration_ms". Steps that decode in a row are one event."""

    rid: str
    index: int
    arrival_s: float
    unix_s: float
    asked: bool
    events: list[dict] = field(default_factory=list)
    num_preemptions: int = 0
    waits: bool = True  # it is queued, or has given up its pages

    def mark(self, event: str, at_s: float, since_s: float | None = None, **fields) -> None:
        """An event at `at_s` of the monotonic clock, or one that lasted from `since_s` until then."""
        entry = {"event": event, "ms": _ms((since_s or at_s) - self.arrival_s)}
        if since_s is not None:
            entry["duration_ms"] = _ms(at_s - since_s)
        self.events.append(entry | fields)

    def step(self, row: Row, since_s: float, now_s: float, num_output: int) -> None:
        """The sequence was part of a step."""
        if row.start < row.sequence.num_prompt - 1 or row.count > 1 + len(row.drafts):
            self.mark("prefill", now_s, since_s, tokens=row.count)
            return
        last = self.events[-1] if self.events else {"event": ""}
        if last["event"] != "decode":
            self.mark("decode", now_s, since_s, tokens=0, steps=0, drafted=0, accepted=0)
            last = self.events[-1]
        last["duration_ms"] = _ms(now_s - self.arrival_s - last["ms"] / 1000)
        last["tokens"] += num_output
        last["steps"] += 1
        last["drafted"] += len(row.drafts)
        last["accepted"] += row.num_accepted


class Timelines:
    """All timelines: of live sequences, and the last ones for the trace. num_kept: 0 times only those that ask."""

    def __init__(self, num_kept: int):
        self._every = num_kept > 0
        self._live: dict[tuple[str, int], tuple[Sequence, Timeline]] = {}
        self._done: deque[Timeline] = deque(maxlen=num_kept or NUM_KEPT)

    def begin(self, sequence: Sequence, asked: bool) -> None:
        """A new sequence; it gets a timeline if it asked for one or everybody does."""
        if asked or self._every:
            line = Timeline(sequence.rid, sequence.index, sequence.arrival_s, time.time(), asked)
            line.mark("queued", sequence.arrival_s)
            self._live[sequence.rid, sequence.index] = (sequence, line)

    def step(self, batch: Batch, since_s: float, outputs: list[Output]) -> None:
        """A step of `batch` that began at `since_s` has been committed."""
        if not self._live:
            return
        now_s, rows = time.monotonic(), {id(row.sequence): row for row in batch.rows}
        num_output = {(output.rid, output.index): len(output.token_ids) for output in outputs}
        for key, (sequence, line) in self._live.items():
            if line.num_preemptions < sequence.num_preemptions:
                line.num_preemptions, line.waits = sequence.num_preemptions, True
                line.mark("preempted", since_s, kept="host memory" if sequence.host_pages else "nothing")
            row = rows.get(id(sequence))
            if row is None:
                continue
            if line.waits and line.num_preemptions:
                line.mark("resumed", since_s, computed_tokens=row.start)
            elif line.waits:
                line.mark("admitted", sequence.admitted_s, prompt_tokens=sequence.num_prompt,
                          cached_tokens=sequence.num_cached)  # fmt: skip
            line.waits = False
            had_token = any(event["event"] == "first_token" for event in line.events[:20])
            line.step(row, since_s, now_s, num_output.get(key, 0))
            if sequence.first_token_s is not None and not had_token:
                line.mark("first_token", sequence.first_token_s)

    def end(self, outputs: list[Output]) -> list[Output]:
        """`outputs`, the last ones of choices that asked with their timelines."""
        if not self._live:
            return outputs
        return [output if output.finish_reason is None else self._ended(output) for output in outputs]

    def _ended(self, output: Output) -> Output:
        sequence, line = self._live.pop((output.rid, output.index), (None, None))
        if line is None:
            return output
        assert sequence.status is Status.FINISHED
        line.mark("finished", time.monotonic(), reason=output.finish_reason, output_tokens=sequence.num_output)
        self._done.append(line)
        return msgspec.structs.replace(output, timeline=line.events) if line.asked else output

    def trace(self) -> dict:
        """The last timelines in Chrome's trace event format (JSON object form; times in microseconds).

        A request is a process, a choice a thread of it; what lasts is a complete event, the rest instants.
        """
        events = []
        pids: dict[str, int] = {}
        for line in self._done:
            pid = pids.setdefault(line.rid, len(pids) + 1)
            where = {"pid": pid, "tid": line.index}
            names = (("process_name", line.rid), ("thread_name", f"choice {line.index}"))
            events += [{"name": name, "ph": "M", **where, "args": {"name": text}} for name, text in names]
            for entry, following in zip(line.events, [*line.events[1:], None], strict=True):
                start_us = 1e6 * line.unix_s + 1e3 * entry["ms"]
                args = {key: value for key, value in entry.items() if key not in ("event", "ms", "duration_ms")}
                event = {"name": entry["event"], "cat": "request", "ts": start_us, **where, "args": args}
                duration_ms = entry.get("duration_ms")
                if entry["event"] in ("queued", "preempted") and following is not None:  # until what comes next
                    duration_ms = max(following["ms"] - entry["ms"], 0.0)
                if duration_ms is None:
                    events.append(event | {"ph": "i", "s": "t"})
                else:
                    events.append(event | {"ph": "X", "dur": 1e3 * duration_ms})
        return {"traceEvents": events, "displayTimeUnit": "ms"}


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
