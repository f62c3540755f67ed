"""When requests will start, from what has been measured: for `/v1/plan`, and for Retry-After. Torch-free.

Nothing here decides who runs. While requests wait, the rate at which they start is measured; before there is enough to
measure, it is what the time per prompt and output token and the mean sizes come to.
"""

from collections import deque

from crane.runtime.scheduler import Scheduler
from crane.runtime.sequence import Sequence
from crane.runtime.types import Generate, Plan

WINDOW_S = 30.0
MIN_WINDOW_S, MIN_STARTS = 1.0, 8  # fewer starts than that say little
MAX_RETRY_S = 300.0


class Rate:
    """Tokens per second of the time spent on them. half_s: time spent so long ago counts half; None: all the same."""

    def __init__(self, half_s: float | None = None):
        self.tokens = 0.0
        self.seconds = 0.0
        self._half_s = half_s

    def add(self, tokens: int, seconds: float) -> None:
        if self._half_s is not None:
            keep = 0.5 ** (seconds / self._half_s)
            self.tokens, self.seconds = self.tokens * keep, self.seconds * keep
        self.tokens += tokens
        self.seconds += seconds

    @property
    def value(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Forecast:
    """Of one scheduler. `step` is told of every step. max_queue: sequences that may wait to start."""

    def __init__(self, scheduler: Scheduler, max_queue: int):
        self.max_queue = max_queue
        self._scheduler = scheduler
        self._prefill, self._decode, self._steps = Rate(10.0), Rate(10.0), Rate(10.0)
        self._starts: deque[tuple[float, int]] = deque()  # when, and how many had started by then
        self._promised_s: dict[str, float] = {}  # until when each tenant's coming places are given away

    def step(self, num_prompt: int, num_drawn: int, prefill_s: float, decode_s: float) -> None:
        """A step computed so many prompt tokens and drew so many tokens, in so many seconds."""
        self._prefill.add(num_prompt, prefill_s)
        self._decode.add(num_drawn, decode_s)
        self._steps.add(1, prefill_s + decode_s)
        roster, now = self._scheduler.roster, self._scheduler.clock()
        if not roster.num_waiting:
            self._starts.clear()  # what starts at once says how fast requests come, not how fast they could
        elif not self._starts or now - self._starts[-1][0] >= 0.1:
            self._starts.append((now, roster.num_started))
            while now - self._starts[0][0] > WINDOW_S:
                self._starts.popleft()

    # --- the queue's bounds

    def has_place(self, tenant: str) -> bool:
        """Whether a request may join the queue. Of several tenants each may have as many waiting as there are
        places left: a flood fills half of the queue, two floods two thirds, and there is always room for others."""
        roster = self._scheduler.roster
        num_left = self.max_queue - roster.num_waiting
        return num_left > 0 and (not tenant or roster.waiting_by_tenant[tenant] < num_left)

    def refuse(self, tenant: str) -> tuple[str, float]:
        """Why there is no place, and in how many seconds one should be free: each start of a waiting one frees one,
        and those that are refused one after another are told to come one after another."""
        roster, now = self._scheduler.roster, self._scheduler.clock()
        text = f"{roster.num_waiting} requests are waiting"
        if tenant:
            text += f", {roster.waiting_by_tenant[tenant]} of this key"
        rate = self._start_rate() / max(len(roster.waiting_by_tenant), 1)
        if not rate:
            return text, 1.0
        self._promised_s = {name: at for name, at in self._promised_s.items() if at > now}
        turnover_s = min(roster.waiting_by_tenant[tenant] / rate, MAX_RETRY_S)
        at = min(max(self._promised_s.get(tenant, now), now) + 1 / rate, now + turnover_s)
        self._promised_s[tenant] = at
        return text, min(max(at - now, 1.0), MAX_RETRY_S)

    # --- one request

    def plan(self, request: Generate, problem: tuple | None) -> Plan:
        """What would become of a request now. problem: why it would be refused."""
        scheduler = self._scheduler
        sequence = Sequence(request, 0, 0, frozenset(), scheduler.clock())
        too_long = problem is not None and problem[0] == "too_long"
        plan = Plan(
            prompt_tokens=sequence.num_prompt,
            cached_tokens=scheduler.num_cached_now(sequence),
            max_tokens=max(min(sequence.max_tokens, scheduler.max_model_len - sequence.num_prompt), 0),
            fits=not too_long,
            waiting=scheduler.num_waiting,
            free_pages=scheduler.pool.num_free,
        )
        sequence.max_tokens = plan.max_tokens
        plan.pages = scheduler.most_pages(sequence)
        if problem is not None:
            plan.code, plan.message, plan.retry_after_s = (*problem, None)[:3]
        if problem is None or problem[0] == "queue_full":
            plan.queue_position = scheduler.slots.num_ahead(sequence)
            plan.wait_s = self._wait_s(sequence, plan.queue_position)
            plan.first_token_s = self._first_token_s(plan)
        return plan

    def _wait_s(self, sequence: Sequence, num_ahead: int) -> float | None:
        """Until it gets a slot; None when nothing is known."""
        scheduler, slots = self._scheduler, self._scheduler.slots
        step_s = 1 / self._steps.value if self._steps.value else None
        num_free = slots.max_running - len(slots.running)
        pages = scheduler.pages_needed(sequence) - sequence.num_cached // scheduler.pool.page_size
        spare = scheduler.pool.num_free - len(slots.running) - num_ahead * self._mean_pages() - pages
        if num_ahead < num_free and spare >= 0:
            return 0.0
        rate = self._start_rate()
        by_rate = (num_ahead + 1) / rate if rate else None
        if step_s is None or spare < 0:
            return by_rate
        # with pages for all, those past their quantum make way, and after each quantum as many as there are slots
        late = num_ahead - num_free - sum(s.quantum_used >= slots.quantum_tokens for s in slots.running)
        in_turn = step_s if late < 0 else step_s * slots.quantum_tokens * (late // slots.max_running + 1)
        return in_turn if by_rate is None else min(in_turn, by_rate)

    def _first_token_s(self, plan: Plan) -> float | None:
        if plan.wait_s is None or not self._prefill.value or not self._steps.value:
            return None
        running = self._scheduler.running
        ahead = sum(s.num_wanted for s in running if s.num_wanted > 1) + plan.prompt_tokens - plan.cached_tokens
        return plan.wait_s + ahead / self._prefill.value + 1 / self._steps.value

    def _mean_pages(self) -> int:
        roster, pool = self._scheduler.roster, self._scheduler.pool
        return pool.pages_for(round(roster.waiting_tokens / roster.num_waiting)) if roster.num_waiting else 0

    def _start_rate(self) -> float:
        """Starts per second while others wait; 0 when nothing is known."""
        roster = self._scheduler.roster
        if self._starts:
            seconds = self._scheduler.clock() - self._starts[0][0]
            started = roster.num_started - self._starts[0][1]
            if seconds >= MIN_WINDOW_S and started >= MIN_STARTS:
                return started / seconds
        if not self._decode.value:
            return 0.0
        if roster.num_ended:
            mean_output = roster.ended_output / roster.num_ended
        else:
            mean_output = sum(s.max_tokens for s in self._scheduler.running) / max(len(self._scheduler.running), 1)
        seconds = mean_output / self._decode.value
        if self._prefill.value and roster.num_started:
            seconds += roster.started_prompt / roster.num_started / self._prefill.value
        return 1 / seconds if seconds else 0.0
