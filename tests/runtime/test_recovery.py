"""What breaks in a step costs the request that broke it; too little memory costs nobody anything."""

import logging

import msgspec
import pytest
import torch

from crane.runtime.batch import Batch
from crane.runtime.recovery import CALM_STEPS, out_of_memory
from crane.runtime.types import Accepted, Generate
from tests.runtime.test_engine import GREEDY, PROMPTS, SAMPLED, make_engine, requests_for, run
from tests.tiny import make_tiny

SHORTAGES = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "python": MemoryError(),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
                        "you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3")


def inject(engine, fault):
    """From now on a batch for which `fault(batch)` is an exception raises it, after it has been computed."""
    compute = engine.runner.run
    batches = []

    def run_batch(batch: Batch):
        picked = compute(batch)
        batches.append(batch)
        error = fault(batch)
        if error:
            raise error
        return picked

    engine.runner.run = run_batch
    return batches


def tokens_of(got):
    return {key: tokens for key, (tokens, _) in got.items()}


@pytest.mark.parametrize("options", [{}, {"max_step_tokens": 8, "max_concurrent": 8}], ids=["whole", "chunked"])
def test_a_poisoned_request_fails_alone(tiny, caplog, options):
    plain = run(make_engine(tiny, **options), requests_for(SAMPLED))
    engine = make_engine(tiny, **options)
    poison = Generate("poison", [250] * 20, msgspec.structs.replace(SAMPLED, n=2))

    def fault(batch):
        rows = [row for row in batch.rows if row.sequence.rid == "poison" and row.sequence.num_output >= 3]
        return RuntimeError("a bad row") if rows else None

    inject(engine, fault)
    with caplog.at_level(logging.ERROR, "crane.engine"):
        got = run(engine, [*requests_for(SAMPLED)[:4], poison, *requests_for(SAMPLED)[4:]])
    failed = [got.pop(("poison", index))[1] for index in range(2)]
    assert all(o.finish_reason == "error" and "RuntimeError" in o.error for o in failed)
    assert tokens_of(got) == tokens_of(plain)
    assert (engine.stats().failed_requests, engine.stats().step_faults) == (1, 1)
    assert "a bad row" in caplog.text
    again = run(engine, [Generate("next", PROMPTS[0], GREEDY)])
    assert again["next", 0][1].finish_reason == "length"


def test_a_fault_that_does_not_come_again_costs_nobody_anything(tiny):
    plain = run(make_engine(tiny), requests_for(SAMPLED))
    engine, count = make_engine(tiny), iter(range(1000))
    inject(engine, lambda batch: ValueError("once") if next(count) in (3, 9) else None)
    assert tokens_of(run(engine, requests_for(SAMPLED))) == tokens_of(plain)
    assert (engine.stats().failed_requests, engine.stats().step_faults) == (0, 2)


@pytest.mark.parametrize("name", SHORTAGES)
def test_where_memory_runs_out_steps_become_smaller_and_nobody_fails(tiny, name):
    assert out_of_memory(SHORTAGES[name]) and not out_of_memory(RuntimeError("shapes differ"))
    plain = run(make_engine(tiny), requests_for(SAMPLED))
    engine = make_engine(tiny)
    batches = inject(engine, lambda batch: SHORTAGES[name] if batch.num_tokens > 10 else None)
    assert tokens_of(run(engine, requests_for(SAMPLED))) == tokens_of(plain)
    assert engine.stats().failed_requests == 0 and engine.stats().memory_shortages > 0
    sizes = [batch.num_tokens for batch in batches]
    assert max(sizes[-10:]) <= 10 < sizes[0]
    assert sum(size > 10 for size in sizes) < 20, "what did not fit is tried again and again"


def test_more_sequences_than_memory_can_decode_at_once_take_turns(tiny):
    plain = run(make_engine(tiny), requests_for(GREEDY))
    engine = make_engine(tiny)
    inject(engine, lambda batch: MemoryError() if len(batch.rows) > 3 else None)
    for request in requests_for(GREEDY):
        assert engine.add(request) == Accepted(request.rid)
    tokens = {}
    for _ in range(1000):
        for output in engine.step():
            assert output.finish_reason != "error"
            tokens.setdefault((output.rid, 0), []).extend(output.token_ids)
        if not engine.has_work:
            break
        counts = [s.num_output for s in engine.scheduler.running if s.num_output]
        assert not counts or max(counts) - min(counts) <= 12, "some are left behind"
    assert tokens == tokens_of(plain)


def test_after_calm_steps_they_grow_again(tiny):
    engine = make_engine(tiny)
    short = [True]
    batches = inject(engine, lambda batch: MemoryError() if short[0] and batch.num_tokens > 20 else None)
    long = msgspec.structs.replace(GREEDY, max_tokens=200)
    engine.add(Generate("a", list(range(40)), long))
    engine.step()
    short[0] = False
    assert engine.scheduler.step_limit == 20
    for _ in range(CALM_STEPS * 3):
        engine.step()
    assert engine.scheduler.step_limit is None
    engine.add(Generate("b", [9] * 50, long))
    engine.step()
    assert batches[-1].num_tokens == 51


def test_what_is_computed_twice_counts_once(tiny):
    """The mean of hidden states is summed up chunk by chunk."""
    request = Generate("mean", [(3 * i) % 300 for i in range(50)], GREEDY, "mean")
    options = {"max_step_tokens": 8, "max_concurrent": 8}
    plain = run(make_engine(tiny, **options), [request])["mean", 0][1].embedding
    engine, count = make_engine(tiny, **options), iter(range(1000))
    inject(engine, lambda batch: ValueError() if next(count) % 3 == 2 else None)
    engine.add(Generate("other", PROMPTS[1], GREEDY))
    got = run(engine, [request])
    assert got["mean", 0][1].embedding == pytest.approx(plain, abs=1e-5) and engine.stats().step_faults > 2


def test_a_ledger_that_is_wrong_is_found_when_the_engine_is_idle_and_starts_anew(tiny, caplog):
    engine = make_engine(tiny)
    plain = tokens_of(run(engine, requests_for(GREEDY)))
    engine.rest()
    assert engine.stats().ledger_faults == 0
    engine.scheduler.pool.take(3)  # somebody who forgets to give back
    with caplog.at_level(logging.CRITICAL, "crane.engine"):
        engine.rest()
    assert "page" in caplog.text and engine.stats().ledger_faults == 1
    assert engine.scheduler.pool.num_free == engine.info.num_pages
    assert tokens_of(run(engine, requests_for(GREEDY))) == plain
