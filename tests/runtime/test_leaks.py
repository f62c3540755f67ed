"""Ten thousand requests with clients that come and go: nothing of them is left."""

import gc
import os
import random
import threading
import time

import psutil
import pytest

from crane.runtime.engine import Engine
from crane.runtime.settings import Settings
from crane.runtime.stepper import Stepper
from crane.runtime.types import Abort, Accepted, Call, Generate, Rejected, Reply, SamplingParams, Step, Thinking
from tests.tiny import make_tiny

NUM_REQUESTS = 10_000
KINDS = [
    dict(max_tokens=3, temperature=0.0),
    dict(max_tokens=6, seed=1, repetition_penalty=1.2),
    dict(max_tokens=4, n=2, logprobs=1),
    dict(max_tokens=8, temperature=0.0, num_draft_tokens=4),
    dict(max_tokens=5, grammar="start: /[a-c]{1,4}/"),
    dict(max_tokens=5, thinking=Thinking((1,), (2,), True, 3)),
    dict(max_tokens=5, grammar="start: nothing-of-the-kind"),  # refused
]


class Crowd:
    """The stepper's listener, and all clients: what they have asked for and what has ended."""

    def __init__(self):
        self.open: dict[str, int] = {}  # rid -> choices that have not ended
        self.replies: list[Reply] = []
        self.lock = threading.Lock()

    def tell(self, method, *args):
        method(*args)

    def loading(self, loaded_bytes, total_bytes):
        pass

    def ready(self, info):
        pass

    def failed(self, reason):
        raise AssertionError(reason)

    def drained(self):
        pass

    def deliver(self, messages):
        with self.lock:
            for peer, message in messages:
                if isinstance(message, Rejected):
                    self.open.pop(message.rid, None)
                elif isinstance(message, Step):
                    for output in message.outputs:
                        if output.finish_reason and output.rid in self.open:
                            self.open[output.rid] -= 1
                            if not self.open[output.rid]:
                                del self.open[output.rid]
                elif isinstance(message, Reply):
                    self.replies.append(message)
                else:
                    assert isinstance(message, Accepted)


def peer_of(number: int) -> str:
    return f"peer{number % 8}-{number // 500}"


def memory_mb() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss / 1e6


def play(stepper, crowd, rng, numbers, kinds):
    """So many requests from eight peers; some are aborted, some peers leave."""
    for number in numbers:
        while len(crowd.open) > 60:
            time.sleep(0.001)
        peer, rid = peer_of(number), f"r{number}"
        kind = rng.choice(kinds)
        with crowd.lock:
            crowd.open[rid] = kind.get("n", 1)
        prompt = [rng.randrange(300) for _ in range(rng.choice((3, 10, 30)))]
        stepper.post(peer, Generate(rid, prompt, SamplingParams(**kind)))
        if rng.random() < 0.2:
            stepper.post(peer, Abort(f"r{number - rng.randrange(30)}"))
        if rng.random() < 0.01:
            stepper.post(peer, None)
            with crowd.lock:  # it will not hear of its requests
                crowd.open = {rid: count for rid, count in crowd.open.items() if peer_of(int(rid[1:])) != peer}
    deadline = time.monotonic() + 60
    while crowd.open:
        assert time.monotonic() < deadline, f"{len(crowd.open)} requests never ended"
        time.sleep(0.005)


@pytest.mark.parametrize("overlap, num_requests", [("off", NUM_REQUESTS), ("on", 4000)])
def test_ten_thousand_requests_with_random_aborts_leave_nothing_behind(tmp_path, overlap, num_requests):
    path = make_tiny(tmp_path, "qwen3", layers=1, hidden=32, intermediate=32)
    # small steps: oneDNN keeps what it has built for every number of tokens
    options = dict(dtype="float32", cpu=True, threads=1, kv_memory=1 << 20, max_model_len=128, max_step_tokens=32,
                   overlap=overlap)
    settings = Settings(model_path=str(path), **options)
    kinds = KINDS if overlap == "off" else KINDS[:3] * 200 + KINDS  # few of those that have steps alone
    crowd, rng = Crowd(), random.Random(1)
    engines = []

    def factory(*args):
        engines.append(Engine(*args))
        return engines[0]

    stepper = Stepper(settings, factory, crowd.tell, crowd)
    stepper.start()
    play(stepper, crowd, rng, range(2000), kinds)  # first everything grows to its size: caches, pools, torch's arenas
    fds, mb, threads = len(os.listdir("/proc/self/fd")), memory_mb(), threading.active_count()
    play(stepper, crowd, rng, range(2000, num_requests), kinds)
    stepper.post("last", Call(1, "flush_cache", {"timeout_s": 5.0}))
    while not crowd.replies:
        time.sleep(0.01)
    assert crowd.replies[0].payload["flushed"]
    stepper.drain()
    stepper.join(10)
    (engine,) = engines
    gc.collect()
    engine.scheduler.check()
    stats = engine.stats()
    assert stats.total_requests > 0.8 * num_requests and stats.completed_requests > 0.5 * num_requests
    assert stats.aborted_requests > 0.05 * num_requests and stats.step_faults == 0
    assert (stats.overlap["steps_ahead"] > 100) == (overlap == "on") and not engine.scheduler.flights
    assert stats.ledger_faults == 0
    assert engine.scheduler.pool.num_free == engine.info.num_pages == stats.num_pages
    assert not stepper._owners and not engine._compiling
    assert not len(engine.runner.sampler._seen) and not len(engine.runner._sums)
    assert len(os.listdir("/proc/self/fd")) <= fds and threading.active_count() <= threads
    assert memory_mb() < mb + 15, f"{mb:.0f} MB after 2,000 requests, {memory_mb():.0f} after {num_requests}"
