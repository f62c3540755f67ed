#!/usr/bin/env python3
"""Replay traces of requests through crane's real scheduler, page pool and policy, with a simulated clock.

    python tools/simulate.py                                   100,000 requests, all policies, one table
    python tools/simulate.py --scenario flood --policies fifo,fair
    python tools/simulate.py --trace requests.jsonl --max-running 64 --pages 4096
    python tools/simulate.py --measure MODEL                   the costs of a step, measured on a real engine

Nothing is computed: a step takes base + per row + per token seconds, and every request gets as many tokens as its
trace says. A line of it is {"at_s", "prompt_tokens", "output_tokens"} and maybe "tenant", "priority", "timeout_s",
"prefix" (prompts of one prefix begin with the same "prefix_tokens" tokens). The last line printed is one JSON document.
"""

import argparse
import heapq
import itertools
import json
import math
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from crane.runtime.batch import Batch, Picked  # noqa: E402
from crane.runtime.forecast import Forecast  # noqa: E402
from crane.runtime.pages import PagePool  # noqa: E402
from crane.runtime.scheduler import Scheduler  # noqa: E402
from crane.runtime.sequence import Sequence  # noqa: E402
from crane.runtime.types import Generate, SamplingParams  # noqa: E402

DRAWN, NOTHING = Picked(1), Picked()
POLICIES = {
    "fifo": "first come, first served: no classes, no tenants",
    "no-overtaking": "fifo, and nobody overtakes one that waits for pages",
    "priority": "classes alone",
    "fair": "tenants share alone",
    "default": "classes, and tenants share in each",
}


@dataclass(frozen=True)
class Cost:
    """Seconds of a step. The defaults follow from what docs/performance.md says of Qwen2.5-Coder-0.5B in bfloat16 on
    two CPU cores: 53 ms for one row, 146 for 32. page_copy_s, which counts with --host-pages only, is a guess."""

    base_s: float = 0.050
    row_s: float = 0.0
    token_s: float = 0.003
    page_copy_s: float = 0.0001

    def of(self, batch: Batch) -> float:
        copies = self.page_copy_s * len(batch.copies)
        return self.base_s + self.row_s * len(batch.rows) + self.token_s * batch.num_tokens + copies


@dataclass(frozen=True)
class Ask:
    """One request of a trace."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = "a"
    priority: int = 0
    timeout_s: float | None = None
    prefix: str = ""
    prefix_tokens: int = 0


@dataclass
class Outcome:
    """What became of one request. Times on the simulated clock; None: never."""

    ask: Ask
    started_s: float | None = None
    first_s: float | None = None
    ended_s: float | None = None
    reason: str = ""
    refusals: list[tuple[float, float]] = field(default_factory=list)  # when, and the Retry-After


class Prompts:
    """Token ids of prompts: those of one prefix begin alike, all others differ from the first token on."""

    def __init__(self):
        self._count = itertools.count(1)
        self._prefixes: dict[str, int] = {}

    def ids(self, ask: Ask) -> list[int]:
        shared = min(ask.prefix_tokens, ask.prompt_tokens) if ask.prefix else 0
        start = self._prefixes.setdefault(ask.prefix, next(self._count)) * 1_000_000
        own = next(self._count) * 1_000_000
        return [*range(start, start + shared), *range(own, own + ask.prompt_tokens - shared)]


class Simulation:
    """One policy and one trace. retries: refused clients come back when Retry-After says, else they give up."""

    def __init__(self, policy: str, options: argparse.Namespace, cost: Cost):
        self.now_s = 0.0
        self.policy = policy
        self.cost = cost
        self.max_queue = options.max_queue
        self.retries = options.retries
        self.scheduler = Scheduler(
            PagePool(options.pages, options.page_size, options.host_pages),
            max_running=options.max_running,
            quantum_tokens=options.quantum_tokens,
            max_step_tokens=options.max_step_tokens,
            max_model_len=min(options.max_model_len, options.pages * options.page_size),
            clock=lambda: self.now_s,
        )
        if policy == "no-overtaking":
            self.scheduler.slots.lookahead = 0
        self.scheduler.tables.costs.policy = "swap" if options.host_pages else "recompute"
        self.forecast = Forecast(self.scheduler, options.max_queue)
        self.finished: list[Outcome] = []
        self.num_steps = self.num_tokens = 0
        self.busy_s = self.plan_s = 0.0
        self.pages_in_use = 0.0  # page-seconds
        self.fairness = Fairness()
        self._live: dict[str, Outcome] = {}
        self._prompts = Prompts()
        self._returning: list[tuple[float, int, Outcome]] = []
        self._rids = itertools.count()

    def run(self, trace: list[Ask]) -> None:
        """Until every request has ended."""
        arrivals = iter(trace)
        coming = next(arrivals, None)
        while coming is not None or self._returning or self.scheduler.has_work:
            while coming is not None and coming.at_s <= self.now_s:
                self._offer(Outcome(coming))
                coming = next(arrivals, None)
            while self._returning and self._returning[0][0] <= self.now_s:
                self._offer(heapq.heappop(self._returning)[2])
            if self.scheduler.has_work:
                self._step()
            else:
                times = [self._returning[0][0]] if self._returning else []
                times += [coming.at_s] if coming is not None else []
                self.now_s = max(self.now_s, min(times, default=self.now_s))

    def _offer(self, outcome: Outcome) -> None:
        """A request arrives, or comes back."""
        ask = outcome.ask
        tenant = ask.tenant if self.policy in ("fair", "default") else ""
        if not self.forecast.has_place(tenant):
            wait_s = self.forecast.refuse(tenant)[1]
            outcome.refusals.append((self.now_s, wait_s))
            if self.retries:
                heapq.heappush(self._returning, (self.now_s + wait_s, next(self._rids), outcome))
            else:
                outcome.reason = "refused"
                self.finished.append(outcome)
            return
        request = Generate(str(next(self._rids)), self._prompts.ids(ask), SamplingParams(max_tokens=ask.output_tokens),
                           tenant=tenant, priority=ask.priority if self.policy in ("priority", "default") else 0,
                           timeout_s=ask.timeout_s)  # fmt: skip
        sequence = Sequence(request, 0, 0, frozenset(), self.now_s)
        sequence.outcome = outcome
        self._live[request.rid] = outcome
        self.fairness.waiting[ask.tenant] += 1
        self.scheduler.enqueue(sequence)

    def _step(self) -> None:
        scheduler = self.scheduler
        started = time.perf_counter()
        outputs = scheduler.expire()
        batch = scheduler.plan()
        self.plan_s += time.perf_counter() - started
        if batch.rows:
            outputs += self._compute(batch)
        elif not outputs:
            raise AssertionError("an idle step although requests wait")
        for output in outputs:
            if output.usage is None:
                continue
            outcome = self._live[output.rid]
            if outcome.first_s is None and output.token_ids:
                outcome.first_s = self.now_s
            if output.finish_reason is not None:
                outcome.ended_s, outcome.reason = self.now_s, output.finish_reason
                self.finished.append(self._live.pop(output.rid))
                if outcome.started_s is None:
                    self.fairness.waiting[outcome.ask.tenant] -= 1

    def _compute(self, batch: Batch) -> list:
        scheduler, step_s = self.scheduler, self.cost.of(batch)
        for row in batch.rows:
            outcome = row.sequence.outcome
            if outcome.started_s is None:
                outcome.started_s = self.now_s
                self.fairness.waiting[outcome.ask.tenant] -= 1
        self.now_s += step_s
        self.busy_s += step_s
        self.num_steps += 1
        num_tokens = batch.num_tokens
        self.num_tokens += num_tokens
        self.pages_in_use += step_s * (scheduler.pool.num_pages - scheduler.pool.num_free)
        self.fairness.step(batch, step_s)
        started = time.perf_counter()
        outputs = scheduler.commit(batch, [DRAWN if row.samples else NOTHING for row in batch.rows])
        self.plan_s += time.perf_counter() - started
        self.forecast.step(num_tokens, step_s)
        return outputs


class Fairness:
    """Jain's index of the tokens that tenants got, in every ten seconds in which two or more had requests waiting all
    along: 1 is equal shares, 1/n is one tenant getting all."""

    def __init__(self):
        self.waiting: Counter[str] = Counter()  # requests that have not started
        self._got: Counter[str] = Counter()
        self._all_along: set[str] | None = None
        self._elapsed_s = 0.0
        self._sum = self._weight = 0.0

    def step(self, batch: Batch, step_s: float) -> None:
        for row in batch.rows:
            self._got[row.sequence.outcome.ask.tenant] += row.count
        waiting = {name for name, count in self.waiting.items() if count}
        self._all_along = waiting if self._all_along is None else self._all_along & waiting
        self._elapsed_s += step_s
        if self._elapsed_s < 10.0:
            return
        shares = [self._got[name] for name in self._all_along]
        if len(shares) > 1 and any(shares):
            self._sum += sum(shares) ** 2 / (len(shares) * sum(x * x for x in shares))
            self._weight += 1
        self._got.clear()
        self._all_along, self._elapsed_s = None, 0.0

    @property
    def index(self) -> float | None:
        """The mean over these spans; None when there were none."""
        return self._sum / self._weight if self._weight else None


# --- traces


def synthetic(options: argparse.Namespace) -> list[Ask]:
    """Requests at random times, of random lengths; see --help of the scenarios."""
    rng = random.Random(options.seed)
    scenario, rate = options.scenario, options.rate
    if scenario == "flood":  # a sends everything at once, b now and then
        flood = [Ask(0.0, _length(rng, options.prompt), _length(rng, options.output), "a")
                 for _ in range(options.requests)]
        light = [Ask(1.0 + i / options.light_rate, _length(rng, options.prompt), _length(rng, options.output), "b")
                 for i in range(max(options.requests // 100, 20))]
        return sorted(flood + light, key=lambda ask: ask.at_s)
    asks, at_s = [], 0.0
    for i in range(options.requests):
        at_s += rng.expovariate(rate)
        number = min(int(rng.paretovariate(1.0)), options.tenants) - 1  # a few send most
        ask = Ask(at_s, _length(rng, options.prompt), _length(rng, options.output), f"t{number}")
        if scenario in ("mixed", "priority") and rng.random() < 0.1:
            ask = replace(ask, priority=-1)
        if scenario in ("mixed", "prefix") and rng.random() < 0.5:
            shared = 2 * round(options.prompt)
            ask = replace(ask, prefix=f"p{number % 7}", prefix_tokens=shared, prompt_tokens=shared + ask.prompt_tokens)
        if scenario == "big" and rng.random() < 0.02:
            ask = replace(ask, prompt_tokens=options.pages * options.page_size // 2 - 1000)
        if scenario == "mixed" and rng.random() < 0.05:
            ask = replace(ask, timeout_s=options.timeout_s)
        asks.append(ask)
    return asks


def _length(rng: random.Random, mean: float) -> int:
    return max(1, round(rng.lognormvariate(math.log(mean) - 0.32, 0.8)))  # a long tail, with this mean


def from_file(path: str) -> list[Ask]:
    """A trace, by time. Raises SystemExit naming the line that is wrong."""
    asks = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if line.strip():
            try:
                ask = Ask(**json.loads(line))
                assert ask.at_s >= 0 and ask.prompt_tokens > 0 and ask.output_tokens > 0, "numbers must be positive"
            except (TypeError, ValueError, AssertionError) as error:
                raise SystemExit(f"{path}:{number}: {error}") from None
            asks.append(ask)
    return sorted(asks, key=lambda ask: ask.at_s)


# --- what came of it


def quantile(values: list[float], q: float) -> float | None:
    """The smallest value that a share q of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(q * len(ordered)), 1) - 1] if ordered else None


def summary(simulation: Simulation, wall_s: float) -> dict:
    """One policy's row of the table."""
    outcomes = simulation.finished
    served = [o for o in outcomes if o.first_s is not None]
    waits = [o.started_s - o.ask.at_s for o in outcomes if o.started_s is not None]
    firsts = [o.first_s - o.ask.at_s for o in served]
    urgent = [o.first_s - o.ask.at_s for o in served if o.ask.priority < 0]
    tenants = Counter(o.ask.tenant for o in outcomes)
    light = min(tenants, key=lambda name: (tenants[name], name)) if len(tenants) > 1 else None
    others = [o.first_s - o.ask.at_s for o in served if o.ask.tenant == light]
    refused = [o for o in outcomes if o.refusals]
    scheduler = simulation.scheduler
    return {
        "policy": simulation.policy,
        "requests": len(outcomes),
        "tokens_per_s": simulation.num_tokens / simulation.now_s,
        "requests_per_s": len(served) / simulation.now_s,
        **{f"wait_p{q}": quantile(waits, q / 100) for q in (50, 95, 99)},
        **{f"first_token_p{q}": quantile(firsts, q / 100) for q in (50, 95, 99)},
        "urgent_first_token_p95": quantile(urgent, 0.95),
        "lightest_tenant": light,
        "lightest_first_token_p50": quantile(others, 0.5),
        "lightest_first_token_p95": quantile(others, 0.95),
        "jain": simulation.fairness.index,
        "preemptions": scheduler.num_preemptions,
        "cached_tokens": scheduler.tables.num_cached_tokens,
        "pages_in_use": simulation.pages_in_use / simulation.busy_s / scheduler.pool.num_pages,
        "timeouts": sum(o.reason == "timeout" for o in outcomes),
        "refused": len(refused),
        "taken_at_first_return": _share(len(o.refusals) == 1 for o in refused) if simulation.retries else None,
        "longest_wait": max(waits, default=None),
        "simulated_s": simulation.now_s,
        "steps": simulation.num_steps,
        "scheduler_us_per_step": 1e6 * simulation.plan_s / max(simulation.num_steps, 1),
        "wall_s": wall_s,
    }


def _share(flags) -> float | None:
    values = list(flags)
    return sum(values) / len(values) if values else None


COLUMNS = {
    "policy": "policy", "tok/s": "tokens_per_s", "wait p50": "wait_p50", "p95": "wait_p95", "p99": "wait_p99",
    "first p50": "first_token_p50", "p95 ": "first_token_p95", "p99 ": "first_token_p99",
    "lightest p95": "lightest_first_token_p95", "urgent p95": "urgent_first_token_p95", "Jain": "jain",
    "preempted": "preemptions", "pages": "pages_in_use", "late": "timeouts", "refused": "refused",
    "us/step": "scheduler_us_per_step", "wall s": "wall_s",
}  # fmt: skip


def table(rows: list[dict]) -> str:
    """Times in seconds."""
    cells = [list(COLUMNS)] + [[_shown(row[key]) for key in COLUMNS.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells)


def _shown(value) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:.0f}" \
        if isinstance(value, float) else str(value)


# --- the costs of a real engine's steps


def measure(model_path: str) -> Cost:
    """Fit the three constants to steps of a real engine, by least squares on relative errors."""
    import numpy as np

    from crane.runtime.engine import Engine
    from crane.runtime.settings import Settings, prefer_waiting_threads

    prefer_waiting_threads()
    engine = Engine(Settings(model_path=model_path, max_concurrent=32, prefix_cache=False))
    rows = []
    for repeat, (num, length) in itertools.product(range(3), ((1, 16), (4, 16), (16, 16), (32, 16), (1, 400), (8, 60))):
        sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        for i in range(num):
            engine.add(Generate(f"{repeat}-{num}-{length}-{i}", [(7 * i + j) % 1000 for j in range(length)], sampling))
        while engine.has_work:
            sizes: list[tuple[int, int]] = []
            commit = engine.scheduler.commit
            engine.scheduler.commit = lambda batch, picked: (
                sizes.append((len(batch.rows), batch.num_tokens)), commit(batch, picked))[1]
            started = time.perf_counter()
            engine.step()
            rows.append((*sizes[0], time.perf_counter() - started))
            engine.scheduler.commit = commit
    seconds = np.array([row[2] for row in rows[6:]])  # the first ones warm up
    sizes = np.array([[1.0, row[0], row[1]] for row in rows[6:]])
    fitted = np.linalg.lstsq(sizes / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
    base_s, row_s, token_s = np.maximum(fitted, 0.0)
    copy_s = engine.scheduler.tables.costs.swap_s(1) / 2
    return Cost(float(base_s), float(row_s), float(token_s), float(copy_s) or Cost.page_copy_s)


# --- the command


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="policies: " + "; ".join(
        f"{name}: {text}" for name, text in POLICIES.items()))
    made.add_argument("--scenario", default="mixed", choices=("mixed", "flood", "priority", "prefix", "big", "plain"),
                      help="mixed: tenants, classes, shared prefixes and time limits; flood: a sends all at once, "
                      "b a little; big: 2 %% need nearly half of the pages (default: mixed)")
    made.add_argument("--trace", help="file of JSON lines, instead of a scenario")
    made.add_argument("--policies", default=",".join(POLICIES), help="of the table, separated by commas")
    for name, kind, default, text in (
        ("requests", int, 100_000, "how many"), ("rate", float, 5.0, "requests that arrive in a second"),
        ("prompt", float, 48.0, "mean prompt tokens"), ("output", float, 16.0, "mean output tokens"),
        ("tenants", int, 20, "who send, the first ones most"),
        ("light-rate", float, 0.1, "flood: b's requests a second"),
        ("timeout-s", float, 60.0, "mixed: the time limit of one in twenty"), ("seed", int, 0, "of the trace"),
        ("pages", int, 1024, "KV pages"), ("page-size", int, 16, "tokens in one"),
        ("host-pages", int, 0, "pages to swap to"),
        ("max-running", int, 32, "--max-concurrent"), ("quantum-tokens", int, 16, "--decode-tokens-per-seq"),
        ("max-step-tokens", int, 512, "--max-step-tokens"), ("max-queue", int, 200_000, "--max-queue"),
        ("max-model-len", int, 16384, "--max-model-len"),
    ):  # fmt: skip
        made.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: %(default)s)")
    made.add_argument("--retries", action="store_true", help="refused requests come back when Retry-After says")
    for name, value in asdict(Cost()).items():
        made.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, help="default: %(default)s")
    made.add_argument("--measure", metavar="MODEL", help="measure these four on a real engine first, and use them")
    return made


def main(argv: list[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(argv)
    unknown = set(options.policies.split(",")) - set(POLICIES)
    if unknown:
        raise SystemExit(f"simulate: unknown policy {', '.join(sorted(unknown))}; known: {', '.join(POLICIES)}")
    cost = measure(options.measure) if options.measure else Cost(
        options.base_s, options.row_s, options.token_s, options.page_copy_s)
    trace = from_file(options.trace) if options.trace else synthetic(options)
    longest = max((ask.prompt_tokens for ask in trace), default=0)
    if longest >= min(options.max_model_len, options.pages * options.page_size):
        raise SystemExit(f"simulate: a prompt of {longest} tokens fits neither the context nor the pages")
    print(f"{len(trace)} requests, {options.pages} pages of {options.page_size}, {options.max_running} slots; a step "
          f"takes {1e3 * cost.base_s:.3g} ms + {1e3 * cost.row_s:.3g} a row + {1e3 * cost.token_s:.3g} a token")
    rows = []
    for policy in options.policies.split(","):
        simulation = Simulation(policy, options, cost)
        started = time.perf_counter()
        simulation.run(trace)
        rows.append(summary(simulation, time.perf_counter() - started))
    print(table(rows))
    scenario = options.trace or options.scenario
    print(json.dumps({"tool": "simulate", "scenario": scenario, "cost": asdict(cost), "rows": rows}))


if __name__ == "__main__":
    main()
