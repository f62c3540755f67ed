"""A step is launched without a word from the device: every operation of it, on a device that is made up.

torch's meta device has shapes and types and no numbers, so whatever asks for one fails. It stands for a GPU: kernels
are launched with real arguments and do nothing. What goes between host and device has to pass through `transfer`.
"""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crane.kernels import lang, paged_plan, paged_prefill, transfer
from crane.kernels.registry import force
from crane.runtime import graphs, runner, sampler
from crane.runtime.batch import Batch, Row
from crane.runtime.sequence import Sequence
from crane.runtime.types import Generate, SamplingParams
from tests.runtime.test_engine import make_engine
from tests.tiny import make_tiny

triton = pytest.importorskip("triton")
GPU = torch.device("meta")
LOGPROBS = {"logprobs": 3, "logprob_ids": (4, 5)}
PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "logit_bias": {3: 1.0}, "min_tokens": 9}


class Transfers:
    """`transfer` to and from that device. counts: calls by name."""

    def __init__(self):
        self.counts = dict.fromkeys(("upload", "upload_all", "download"), 0)

    def upload(self, values, dtype, device):
        self.counts["upload"] += 1
        assert torch.device(device) == GPU
        return torch.empty(torch.as_tensor(values).shape, dtype=dtype, device=GPU)

    def upload_all(self, arrays, device):
        self.counts["upload_all"] += 1
        return [torch.empty(array.shape, dtype=torch.from_numpy(array).dtype, device=GPU) for array in arrays]

    def download(self, tensor):
        self.counts["download"] += 1
        assert tensor.device == GPU
        return torch.empty(tensor.shape, dtype=tensor.dtype)


class NoTransfer(TorchDispatchMode):
    """Nothing else goes between host and device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [each for each in torch.utils._pytree.tree_leaves((args, kwargs, result)) if torch.is_tensor(each)]
        devices = {each.device for each in tensors if each.dim() or each.device == GPU}
        assert len(devices) < 2, f"{function} goes from device to device"
        return result


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """(runner, transfers, names of the kernels that were launched), all tensors on the device."""
    engine = make_engine(make_tiny(tmp_path, "qwen3", head_dim=32), page_size=16, kernels="torch", max_model_len=64)
    transfers, launched = Transfers(), []

    def launch(kernel, grid):
        launched.append(kernel.__name__)
        return lambda *args, **named: grid(named) if callable(grid) else None

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "__getitem__", launch)
    monkeypatch.setattr(lang, "missing", lambda device: None)
    plain = torch.tensor

    def tensor(*args, **named):
        assert torch.device(named.get("device") or "cpu").type == "cpu", "torch.tensor copies and waits"
        return plain(*args, **named)

    monkeypatch.setattr(torch, "tensor", tensor)
    for module in (transfer, runner, sampler, paged_plan, paged_prefill):
        for name in transfers.counts:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(transfers, name))
    with ExitStack() as stack:
        stack.enter_context(force("triton"))
        stack.enter_context(torch.inference_mode())
        model = onto_gpu(engine.runner.model, set())
        kv = torch.empty(engine.runner.kv.shape, dtype=torch.float32, device=GPU)
        stack.enter_context(NoTransfer())
        yield runner.ModelRunner(model, kv, sampler.Sampler(engine.info.vocab_size, kv.device)), transfers, launched


def onto_gpu(thing, seen):
    """The same object with its tensors on the device."""
    if id(thing) in seen or not hasattr(thing, "__dict__"):
        return thing
    seen.add(id(thing))
    for name, value in vars(thing).items():
        if torch.is_tensor(value):
            setattr(thing, name, torch.empty(value.shape, dtype=value.dtype, device=GPU))
        elif isinstance(value, list):
            [onto_gpu(each, seen) for each in value]
        elif type(value).__module__.startswith("crane.models"):
            onto_gpu(value, seen)
    return thing


def decoding(number, **sampling):
    """A row of one token that the step before draws."""
    sequence = Sequence(Generate(f"r{number}", list(range(20)), SamplingParams(**sampling)), 0, 1, frozenset((2,)))
    sequence.pages = [2 * number, 2 * number + 1]
    return Row(sequence, 20, 1, True)


def prompt(number, count, **fields):
    request = Generate(f"p{number}", list(range(count)), SamplingParams(**LOGPROBS), **fields)
    sequence = Sequence(request, 0, 1, frozenset())
    sequence.pages = [2 * number, 2 * number + 1]
    return Row(sequence, 0, count, not sequence.pooling)


def before(rows):
    """What the step before launched."""
    step = runner.Launched([])
    step.drew(torch.empty(len(rows), dtype=torch.int64, device=GPU), [row.sequence for row in rows])
    return step


BATCHES = {
    "greedy": [decoding(0, temperature=0.0), decoding(1, temperature=0.0)],
    "sampled": [decoding(0), decoding(1, temperature=0.7, top_k=20, top_p=0.9, min_p=0.05, **LOGPROBS)],
    "penalised": [decoding(0, **PENALTIES), decoding(1, temperature=0.0, **PENALTIES, **LOGPROBS), decoding(2)],
    "mixed": [decoding(0, **PENALTIES), prompt(1, 30), prompt(2, 6), prompt(3, 20, pooling="mean")],
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_launch_asks_the_device_for_nothing(gpu, kind):
    engine, transfers, launched = gpu
    rows = BATCHES[kind]
    step = engine.launch(Batch(rows), before(rows[:1] if kind == "mixed" else rows))
    assert step.drawn.device == GPU
    assert {"_rms_norm_kernel", "_decode_kernel", "_scan_kernel", "_pick_kernel"} <= set(launched)
    assert ("_logprobs_kernel" in launched) == any(row.sequence.sampling.logprobs is not None for row in rows)
    assert transfers.counts["download"] >= 1


def test_a_step_at_fixed_addresses_takes_its_tokens_from_the_device(gpu, monkeypatch):
    engine, transfers, launched = gpu
    monkeypatch.setattr(graphs, "_Numbers", lambda *sizes: SimpleNamespace(fill=lambda *a: None, send=lambda to: None))
    engine.graphs = graphs.DecodeGraphs(engine.model, engine.kv, 4, 64)
    engine.graphs._steps[4] = engine.graphs._make(4)
    rows = BATCHES["sampled"]
    engine.launch(Batch(rows), before(rows))
    assert "_pick_kernel" in launched and transfers.counts["upload"] <= 1, "the rows to draw from, nothing else"


def test_what_asks_the_device_is_found(gpu):
    """The draw in torch looks at numbers."""
    engine, _, _ = gpu
    with force("torch", "sample"), pytest.raises((RuntimeError, AssertionError)):
        engine.launch(Batch(BATCHES["sampled"]), before(BATCHES["sampled"]))
