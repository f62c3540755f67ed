"""Decode steps as recorded C calls: the same bits as steps computed call by call, or a reason why there are none."""

import contextlib
import ctypes
import gc
import random
import subprocess
import sys
import threading
import weakref

import pytest
import torch

from crane.kernels import native
from crane.kernels.norm import rms_norm
from crane.kernels.recording import Memory, NotRecordable, record
from crane.models.config import load_config
from crane.models.files import open_checkpoint
from crane.models.registry import load_model
from crane.runtime import recorded
from crane.runtime.batch import Row
from crane.runtime.engine import Engine
from crane.runtime.recorded import RecordedSteps
from crane.runtime.sampler import Sampler
from crane.runtime.sequence import Sequence
from crane.runtime.settings import Settings
from crane.runtime.types import Generate, SamplingParams
from tests.models.paged import PagedRun
from tests.tiny import make_tiny

PAGE = 4
NUM_PAGES = 640
pytestmark = pytest.mark.usefixtures("c_kernels")


def load(path, dtype=torch.bfloat16):
    checkpoint = open_checkpoint(path)
    return load_model(checkpoint, load_config(checkpoint), "cpu", dtype, exact=False)


@pytest.fixture
def model(tmp_path):
    return load(make_tiny(tmp_path, "qwen2", fmt="gguf", quant="Q8_0"))


class World:
    """Sequences over random keys and values: their next tokens by recorded steps and, on pages of its own, plainly.

    sampling: what they all want.
    """

    VOCAB = 90  # tokens that may be drawn, fewer than the model has

    def __init__(self, model, dtype=torch.bfloat16, max_rows=5, sampling=SamplingParams()):
        self.sampling = sampling
        torch.manual_seed(0)
        self.plain = PagedRun(model, NUM_PAGES, PAGE, dtype)
        self.plain.kv[:] = torch.randn(self.plain.kv.shape)
        self.kv = self.plain.kv.clone()
        self.steps = RecordedSteps(model, self.kv, max_rows, 700, Sampler(self.VOCAB, self.kv.device))
        self.rows: dict[str, Row] = {}

    def add(self, name, start):
        """A sequence whose first `start` tokens are computed."""
        sequence = Sequence(Generate(name, [7] * (start + 1), self.sampling), 0, 1, frozenset())
        sequence.pages = self.plain.pages[name] = [self.plain.free.pop() for _ in range(start // PAGE + 1)]
        self.plain.computed[name] = start
        self.rows[name] = Row(sequence, start, 1, True)

    def drop(self, name):
        self.plain.drop(name)
        del self.rows[name]

    def step(self):
        """One token for each; asserts that both ways give the same bits."""
        rows = list(self.rows.values())
        assert self.steps.step_for(rows) is self.steps
        hidden, found = self.steps.run(rows, {}, None)
        tokens = [(name, row.sequence.token_ids[row.start :]) for name, row in self.rows.items()]
        expected = torch.cat(self.plain.step(tokens))  # which gives the sequences their next pages, too
        sampler, sequences = Sampler(self.VOCAB, self.kv.device), [row.sequence for row in rows]
        best = sampler.launch(expected.clone(), sequences, {}, [()] * len(rows)).ids
        assert torch.equal(found, best if found.dtype == torch.int64 else expected)
        assert (found.dtype == torch.int64) == self.sampling.greedy
        assert torch.isfinite(hidden.float()).all()
        assert torch.equal(self.kv.view(torch.uint8), self.plain.kv.view(torch.uint8))
        for row, token_id in zip(rows, best.tolist(), strict=True):
            row.start += 1
            row.sequence.token_ids.append(token_id)
            if row.start % PAGE == 0:
                row.sequence.pages.append(self.plain.free.pop())


@pytest.mark.parametrize("sampling", [
    SamplingParams(temperature=1.0), SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.2, logit_bias={7: 0.5, 80: 9.0}),
], ids=["logits", "best", "best-of-changed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "hunyuan"])
def test_a_recorded_step_gives_what_the_plain_one_gives_to_the_last_bit(tmp_path, arch, dtype, sampling):
    quant = "Q4_0" if arch == "llama" else "Q8_0"
    model = load(make_tiny(tmp_path, arch, fmt="gguf", quant=quant, tied=arch == "qwen3"), dtype)
    world = World(model, dtype, sampling=sampling)
    for name, start in (("a", 0), ("b", 509), ("c", 30)):
        world.add(name, start)
    for _ in range(9):  # pages fill up, and b's context becomes two chunks
        world.step()
    world.drop("a")  # the others move up
    for _ in range(3):
        world.step()
    world.add("d", 64)  # three again, on other pages
    for _ in range(3):
        world.step()
    assert world.steps.state == "for 2, 3 rows so far"


def test_numbers_of_rows_take_turns_in_the_same_memory(model):
    world = World(model)
    sizes = {}
    for count in (1, 2, 3, 4, 5, 3, 1, 5, 2, 4):
        for name in "abcde":
            if name in world.rows and "abcde".index(name) >= count:
                world.drop(name)
            if name not in world.rows and "abcde".index(name) < count:
                world.add(name, random.Random(count).randrange(90))
        world.step()
        world.step()
        sizes.setdefault(count, world.steps.num_bytes)
    assert len(set(sizes.values())) == 1, "blocks are as large as the largest step needs from the start"


def test_only_so_many_are_kept_and_none_leaks(model, monkeypatch):
    monkeypatch.setattr(recorded, "_MOST_STEPS", 2)
    world, kept = World(model), []
    for name in "abc":
        world.add(name, 5)
        world.step()
        kept.append(weakref.ref(next(reversed(world.steps._steps.values()))))
    gc.collect()
    assert [one() is None for one in kept] == [True, False, False]
    before = world.steps.num_bytes
    for _ in range(20):
        world.steps._steps.clear()
        world.steps._proved.clear()
        world.step()
        world.step()
    assert world.steps.num_bytes == before


def test_rows_that_want_something_special_are_left_to_others(model):
    steps = World(model).steps

    def row(count=1, samples=True, prompt_logits=False, **changes):
        sequence = Sequence(Generate("r", [1] * 8, SamplingParams(), **changes), 0, 1, frozenset())
        return Row(sequence, 7, count, samples, prompt_logits)

    assert steps.step_for([row()] * 5) is steps
    for rows in ([row()] * 6, [row(), row(2)], [row(samples=False)], [row(prompt_logits=True)], [row(pooling="last")]):
        assert steps.step_for(rows) is None


def test_a_step_that_torch_has_a_part_in_says_so_and_is_computed_plainly(tmp_path, caplog):
    world = World(load(make_tiny(tmp_path, "qwen3"), torch.float32), torch.float32)
    world.add("a", 3)
    with caplog.at_level("INFO"):
        hidden, logits = world.steps.run(list(world.rows.values()), {}, None)
    (expected,) = world.plain.step([("a", [7])])
    assert torch.equal(logits, expected)
    assert "torch computes" in world.steps.state and world.steps.state in caplog.text
    assert world.steps.step_for(list(world.rows.values())) is None and world.steps.num_bytes == 0


def test_a_model_that_decides_in_python_is_found_out(model, caplog):
    class Deciding:
        config, logits = model.config, staticmethod(model.logits)

        def __call__(self, token_ids, context):
            position = ctypes.c_int64.from_address(context.positions.data_ptr())  # which torch does not see
            return rms_norm(model(token_ids, context), model.norm.weight, position.value)

    world = World(Deciding())
    world.add("a", 3)
    world.step()
    world.step()  # right as well
    assert world.steps.state == "a recorded step of 1 rows gives something else"
    assert "something else" in caplog.text


def test_another_thread_may_use_the_kernels_meanwhile(model):
    world, stop, errors = World(model), threading.Event(), []
    x, weight = torch.randn(300, 256), torch.randn(256)
    expected = rms_norm(x, weight, 1e-6)

    def compute():
        while not stop.is_set():
            if not torch.equal(rms_norm(x, weight, 1e-6), expected):
                errors.append("wrong")

    other = threading.Thread(target=compute)
    other.start()
    try:
        for name in "abcde":
            world.add(name, 40)
        for _ in range(60):
            world.step()
    finally:
        stop.set()
        other.join()
    assert not errors and world.steps.state == "for 5 rows so far"


@pytest.mark.parametrize("does, what", [
    (lambda x: rms_norm(x, x[0] * 1.0, 1e-6), "mul"), (lambda x: rms_norm(x, torch.ones(16), 1e-6), "ones"),
    (lambda x: rms_norm(x.T.contiguous().T, x[0], 1e-6), ""), (lambda x: rms_norm(x, x[0], x.sum().item()), "sum"),
    (lambda x: rms_norm(x, torch.tensor([1.0] * 16), 1e-6), "lift_fresh"),
])  # fmt: skip
def test_operations_of_torch_are_named(does, what):
    x = torch.randn(4, 16)
    with torch.inference_mode(), pytest.raises(NotRecordable, match=f"torch computes {what}"):
        record(lambda: (does(x),), Memory())
    recording = record(lambda: (rms_norm(x, x[0], 1e-6),), Memory())  # the one before has left nothing behind
    assert [name for name, _ in recording.timed()] == ["norm"]
    x.mul_(3)
    recording.replay()
    assert torch.equal(recording.results[0], rms_norm(x, x[0], 1e-6))


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_an_engine_gives_the_same_answers_with_and_without(tmp_path, overlap):
    path, found = str(make_tiny(tmp_path, "qwen3", fmt="gguf", quant="Q8_0")), {}
    for wanted in (True, False):
        engine = Engine(Settings(model_path=path, dtype="bfloat16", cpu=True, threads=2, max_model_len=128,
                                 page_size=PAGE, max_concurrent=4, recorded_steps=wanted, overlap=overlap))  # fmt: skip
        answers = found[wanted] = {}
        for place in range(6):
            sampling = SamplingParams(temperature=place % 2, seed=place, max_tokens=5 + 9 * place, ignore_eos=True,
                                      logprobs=2, repetition_penalty=1.0 + place % 3 / 10)  # fmt: skip
            engine.add(Generate(f"r{place}", list(range(3, 9 + 7 * place)), sampling))
        while engine.has_work:
            for output in engine.step():
                answers.setdefault(output.rid, []).extend(zip(output.token_ids, output.logprobs, strict=True))
        state = engine.stats().kernels["recorded_steps"]
        assert state.startswith("for 1, 2, 3, 4 rows") if wanted else state == "not used"
    assert found[True] == found[False]


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_greedy_sequences_with_penalties_get_the_same_tokens_without_logits(tmp_path, overlap):
    path, found = str(make_tiny(tmp_path, "qwen3", fmt="gguf", quant="Q8_0")), {}
    changed = [
        {}, dict(repetition_penalty=1.3), dict(repetition_penalty=0.8, presence_penalty=-0.5), dict(min_tokens=9),
        dict(frequency_penalty=1.5, logit_bias={9: -100.0, 40: 3.0}), dict(presence_penalty=2.0),
    ]  # fmt: skip
    for wanted in (True, False):
        engine = Engine(Settings(model_path=path, dtype="bfloat16", cpu=True, threads=2, max_model_len=128,
                                 page_size=PAGE, max_concurrent=6, recorded_steps=wanted, overlap=overlap))  # fmt: skip
        for place, changes in enumerate(changed):
            sampling = SamplingParams(temperature=0.0, max_tokens=25 + 9 * place, **changes)
            engine.add(Generate(f"r{place}", list(range(3, 9 + 7 * place)), sampling))
        answers = found[wanted] = {}
        while engine.has_work:
            for output in engine.step():
                answers.setdefault(output.rid, []).extend(output.token_ids)
        assert not wanted or engine.runner.graphs.recording(1, best=True)
    assert found[True] == found[False]
    assert len({tuple(tokens[:9]) for tokens in found[True].values()}) > 3


@pytest.mark.parametrize("dtype, page_size", [("bfloat16", 16), ("bfloat16", 8), ("float32", 16)])
def test_threads_stay_awake_in_steps_with_prompts_that_torch_has_no_part_in(tmp_path, monkeypatch, dtype, page_size):
    path, wanted = str(make_tiny(tmp_path, "qwen3", head_dim=32)), []
    engine = Engine(Settings(model_path=path, dtype=dtype, cpu=True, threads=2, page_size=page_size))
    monkeypatch.setattr(native, "held", lambda asked: wanted.append(asked) or contextlib.nullcontext())
    engine.add(Generate("r", list(range(3, 40)), SamplingParams(max_tokens=2, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    assert wanted[0] == (dtype == "bfloat16" and page_size == 16 and native.has_amx())


def test_the_first_recorded_step_does_not_load_torchs_compiler(tmp_path):
    path = str(make_tiny(tmp_path, "qwen3", fmt="gguf", quant="Q8_0"))
    program = """if True:
        import sys
        from crane import LLM, SamplingParams
        llm = LLM(sys.argv[1], cpu=True, dtype="bfloat16", max_model_len=64)
        llm.generate([[3, 4, 5]], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
        print(llm.engine.stats().kernels["recorded_steps"], "torch._dynamo" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=100)
    assert done.stdout == "for 1 rows so far False\n", done.stderr
