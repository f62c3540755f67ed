"""When requests will start, from what has been measured: for `/v1/plan`, and for Retry-After. Torch-free.

Nothing here decides who runs. While requests wait, the rate at which they start is measured; before there is enough to
measure, it follows from the mean sizes of requests and the time of a step.
"""

from collections import deque

from crane.runtime.costs import StepTime
from crane.runtime.scheduler import Scheduler
from crane.runtime.sequence import Sequence
from crane.runtime.types import Generate, Plan

WINDOW_S = 30.0
MIN_WINDOW_S, MIN_STARTS = 1.0, 8  # fewer starts than that say little
MAX_RETRY_S = 60.0  # clients of OpenAI's obey no more than that
_MEMORY = 0.99  # what each step leaves of the weight of those before


class Forecast:
    """Of one scheduler. `step` is told of every step. max_queue: sequences that may wait to start."""

    def __init__(self, scheduler: Scheduler, max_queue: int):
        self.max_queue = max_queue
        self._scheduler = scheduler
        self._time = StepTime(_MEMORY)
        self._starts: deque[tuple[float, int]] = deque()  # when, and how many had started by then
        self._promised_s: dict[str, float] = {}  # until when each tenant's coming places are given away

    def step(self, num_tokens: int, seconds: float) -> None:
        """A step computed so many tokens in so many seconds."""
        self._time.learn(num_tokens, seconds)
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
        at = min(max(self._promised_s.get(tenant, now), now) + 1 / rate, now + MAX_RETRY_S)
        self._promised_s[tenant] = at
        return text, max(at - now, 1.0)

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
        num_free = slots.max_running - len(slots.running)
        pages = scheduler.pages_needed(sequence) - sequence.num_cached // scheduler.pool.page_size
        to_start = slots.waiting.num_ahead(sequence.level, sequence.tenant)
        spare = scheduler.pool.num_free - len(slots.running) - to_start * self._mean_pages() - pages
        if num_ahead < num_free and spare >= 0:
            return 0.0
        rate = self._start_rate()
        by_rate = (to_start + 1) / rate if rate else None
        if not self._time or spare < 0:
            return by_rate
        step_s = self._step_s(slots.max_running)
        # with pages for all, those past their quantum make way, and after each quantum as many as there are slots
        late = num_ahead - num_free - sum(s.quantum_used >= slots.quantum_tokens for s in slots.running)
        in_turn = step_s if late < 0 else step_s * slots.quantum_tokens * (late // slots.max_running + 1)
        return in_turn if by_rate is None or not to_start else min(in_turn, by_rate)

    def _first_token_s(self, plan: Plan) -> float | None:
        if plan.wait_s is None or not self._time:
            return None
        scheduler = self._scheduler
        ahead = sum(s.num_wanted for s in scheduler.running if s.num_wanted > 1)
        num_tokens = ahead + plan.prompt_tokens - plan.cached_tokens
        num_decoding = min(len(scheduler.running), scheduler.max_step_tokens - 1)
        num_steps = -(-num_tokens // (scheduler.max_step_tokens - num_decoding))
        base_s, token_s = self._time.line
        return plan.wait_s + num_steps * (base_s + token_s * num_decoding) + token_s * num_tokens

    def _step_s(self, num_tokens: int) -> float:
        base_s, token_s = self._time.line
        return base_s + token_s * num_tokens

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
        if not self._time:
            return 0.0
        slots, pool = self._scheduler.slots, self._scheduler.pool
        num_ended = roster.num_ended or len(slots.running)
        output = roster.ended_output if roster.num_ended else sum(s.max_tokens for s in slots.running)
        mean_output = output / max(num_ended, 1)
        mean_prompt = roster.started_prompt / max(roster.num_started, 1)
        # with all slots in use, or as many as there are pages for
        pages = max(pool.pages_for(round(mean_prompt + mean_output)), 1)
        num_rows = max(min(slots.max_running, pool.num_pages // pages), 1)
        base_s, token_s = self._time.line
        seconds = mean_prompt * token_s + mean_output * (base_s / num_rows + token_s)
        return 1 / seconds if seconds else 0.0
