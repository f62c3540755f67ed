"""Decode steps at fixed addresses, as CUDA graphs replay them, on the Triton kernels under the interpreter."""

import pytest

from crane.kernels import paged_plan
from crane.kernels.registry import force
from crane.runtime.engine import Engine
from crane.runtime.graphs import DecodeGraphs
from crane.runtime.settings import Settings
from crane.runtime.types import Accepted, Generate, SamplingParams
from tests.tiny import make_tiny

PROMPTS = {"a": list(range(5, 22)), "b": [9, 8, 7], "c": list(range(40, 73))}
LIMITS = {"a": 9, "b": 4, "c": 6}


@pytest.fixture(autouse=True)
def kernel_modes():
    """Engines choose for the whole process; other tests must not notice."""
    with force("auto"):
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", head_dim=32))


def make_engine(tiny, **settings):
    chosen = {"dtype": "float32", "cpu": True, "threads": 1, "max_model_len": 64, "max_concurrent": 4,
              "kv_memory": 4 << 20}
    return Engine(Settings(model_path=tiny, **(chosen | settings)))


def answers(engine):
    """Tokens of all requests; `b` ends first, so the rows of a step move up and are fewer."""
    for rid, prompt in PROMPTS.items():
        sampling = SamplingParams(max_tokens=LIMITS[rid], ignore_eos=True, temperature=0.7, seed=3)
        assert engine.add(Generate(rid, prompt, sampling)) == Accepted(rid)
    found = {rid: [] for rid in PROMPTS}
    while engine.has_work:
        for output in engine.step():
            found[output.rid] += output.token_ids
    return found


def with_steps(engine, *sizes):
    """Let the engine use uncaptured steps for these numbers of rows; counts their runs by size."""
    graphs, counts = engine.runner.graphs, dict.fromkeys(sizes, 0)
    for size in sizes:
        step = graphs._make(size)

        def run(*args, plain=step.run, size=size):
            counts[size] += 1
            return plain(*args)

        step.run = run
        graphs._steps[size] = step
    return counts


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_padded_steps_at_fixed_addresses_give_the_same_tokens(tiny, overlap):
    """Overlapped ones take each row's token from where the step before drew it."""
    expected = answers(make_engine(tiny, kernels="torch"))
    engine = make_engine(tiny, kernels="triton", overlap=overlap)
    counts = with_steps(engine, 1, 4)
    assert answers(engine) == expected
    assert counts[4] >= 4 and counts[1] >= 1
    assert (engine.stats().overlap["steps_ahead"] >= 8) == (overlap == "on")
    engine.scheduler.check()


def test_padding_writes_to_no_page(tiny):
    engine = make_engine(tiny, kernels="triton")
    counts = with_steps(engine, 4)
    engine.runner.kv[:] = 7.0
    used = set()
    engine.add(Generate("one", [1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True, temperature=0.0)))
    while engine.has_work:
        used |= {page for sequence in engine.scheduler.running for page in sequence.pages}
        engine.step()
        used |= {page for sequence in engine.scheduler.running for page in sequence.pages}
    assert counts[4] == 2 and len(used) == 1
    untouched = [page for page in range(len(engine.runner.kv)) if page not in used]
    assert (engine.runner.kv[untouched] == 7.0).all()


def test_a_device_without_graphs_captures_none_and_says_why(tiny):
    engine = make_engine(tiny, kernels="triton")
    assert engine.prepare() is False
    assert engine.runner.graphs.reason == "there are none on cpu"
    graphs = DecodeGraphs(engine.runner.model, engine.runner.kv, 4, 64)
    assert graphs.step_for([]) is None and graphs.state.startswith("none")


def test_a_deterministic_request_gets_the_same_bits_alone_and_among_others(tiny, monkeypatch):
    monkeypatch.setattr(paged_plan, "_FIXED_PART", 64)  # of contexts as short as these
    plans = []
    plan = paged_plan.plan_decode_rows
    monkeypatch.setattr(paged_plan, "plan_decode_rows", lambda *args: plans.append(args[2]) or plan(*args))
    params = {"max_tokens": 2, "ignore_eos": True, "temperature": 0.7, "seed": 3, "logprobs": 2}
    fixed = Generate("fixed", list(range(5, 140)), SamplingParams(**params, deterministic=True))
    other = Generate("other", list(range(9, 99)), SamplingParams(**params))

    def answer(requests):
        engine = make_engine(tiny, kernels="torch", dtype="bfloat16", max_model_len=192)
        assert all(engine.add(request) == Accepted(request.rid) for request in requests)
        found = []
        with force("triton", "attention", "plan_decode", "paged_decode"):  # what looks at several rows at once
            while engine.has_work:
                found += [(o.token_ids, o.logprobs) for o in engine.step() if o.rid == "fixed" and o.token_ids]
        return found

    alone = answer([fixed])
    assert sum(len(ids) for ids, _ in alone) == 2 and True in plans
    assert answer([other, fixed]) == alone
