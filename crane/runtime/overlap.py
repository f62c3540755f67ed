"""The host works one step ahead: a step is launched before the one that runs is read. Torch-free.

What a decoding sequence computes next is known but for its last token's id, and that one the device takes from where
it has just drawn it. So the device goes from step to step while the host hands out the tokens of the last one and
plans the next. A sequence whose end is not known beforehand may have a row too many, whose result nobody gets.

Where the host needs a token first, a step is alone: launched and read before the next one is planned.
"""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from crane.runtime.batch import Batch, Picked
from crane.runtime.recovery import CALM_STEPS, Recovery
from crane.runtime.scheduler import Scheduler


@dataclass(slots=True)
class Flight:
    """A step. launched: `runner.Launched`; None: it is computed when it is read. ahead: another one ran when it was
    launched."""

    batch: Batch
    launched: Any
    since_s: float
    ahead: bool


class Overlap:
    """Launches and reads the steps of one engine.

    why_off: why every step is alone, or None. num_ahead: steps launched while another one ran; alone: how many were
    followed by none, by why.
    """

    def __init__(self, scheduler: Scheduler, runner, recovery: Recovery, why_off: str | None):
        self.why_off = why_off
        self.num_ahead = 0
        self.alone: Counter[str] = Counter()
        self._scheduler = scheduler
        self._runner = runner
        self._recovery = recovery
        self._flights: list[Flight] = []
        self._num_calm = CALM_STEPS  # steps since one failed
        self._read_s = 0.0

    @property
    def next(self) -> Flight | None:
        """The step to be read next, if one was launched."""
        return self._flights[0] if self._flights else None

    def may_follow(self, batch: Batch) -> bool:
        """Whether a step may be launched before this one is read; counts why not."""
        reason = self.why_off
        if reason is None:
            reason = self._scheduler.why_alone(batch)
            if self._num_calm < CALM_STEPS or self._recovery.max_tokens is not None:
                reason = "a step failed a short time ago"
            if reason is not None:
                self.alone[reason] += 1
        return reason is None

    def launch(self, batch: Batch) -> Flight | None:
        """Launch a step; None when that failed and its tokens have to be planned again."""
        now_s = time.monotonic()
        if not self._flights and not self.may_follow(batch):
            return Flight(batch, None, now_s, False)
        before = self._flights[-1].launched if self._flights else None
        try:
            flight = Flight(batch, self._runner.launch(batch, before), now_s, before is not None)
        except Exception as error:  # whatever went wrong is met again when the step is alone
            self._failed(batch, error)
            return None
        self._scheduler.launch(batch)
        self._flights.append(flight)
        self.num_ahead += flight.ahead
        return flight

    def read(self, flight: Flight) -> tuple[list[Picked], dict[int, Exception], float] | None:
        """`Recovery.run` of the step, and since when it was the one that ran. None when it failed and its tokens have
        to be planned again, with those of the step after it."""
        broken: dict[int, Exception] = {}
        if flight.launched is None:
            self._num_calm += 1
            picked, broken = self._recovery.run(flight.batch)
        else:
            try:
                picked = self._runner.collect(flight.launched)
            except Exception as error:  # as in `launch`
                self.forget()
                self._failed(flight.batch, error)
                return None
            self._flights.remove(flight)
            self._scheduler.land(flight.batch)
            self._recovery.calm()
        since_s, self._read_s = max(flight.since_s, self._read_s), time.monotonic()
        return picked, broken, since_s

    def forget(self) -> None:
        """Nobody is to get what the launched steps give."""
        for flight in self._flights:
            self._scheduler.land(flight.batch)
        self._flights.clear()

    def _failed(self, batch: Batch, error: Exception) -> None:
        self._num_calm = 0
        self._recovery.note(batch, error)

    def report(self) -> dict:
        """For `EngineStats.overlap`."""
        return {"on": self.why_off is None, "why_off": self.why_off, "steps_ahead": self.num_ahead,
                "steps_alone": dict(self.alone)}  # fmt: skip
