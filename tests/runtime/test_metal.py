"""Metal runs the torch path: which operators that is, and that Metal has them all.

No Mac is here. The engine runs on the CPU without anything that only a CPU has, and every operator that its device
would see is noted; drawing is not among them, since the sampler works on the host there.
"""

from pathlib import Path

import pytest
import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from crane.kernels.registry import force
from crane.models import layers
from crane.runtime.engine import Engine
from crane.runtime.sampler import Sampler
from crane.runtime.settings import Settings
from crane.runtime.types import Accepted, Generate, SamplingParams
from tests.tiny import make_tiny

# What the torch path asks of a device. A new one is looked up below.
OPERATORS = {
    "add.Tensor", "add_.Tensor", "arange", "cat", "chunk", "copy_", "cos", "detach_", "div.Tensor", "embedding",
    "empty_like", "expand", "flatten.using_ints", "floor_divide", "full", "gather", "ge.Tensor", "index.Tensor",
    "index_copy_", "index_select", "lift_fresh", "linear", "masked_fill.Scalar", "masked_fill_.Scalar", "mean.dim",
    "mul.Tensor", "mul_.Tensor", "neg", "remainder.Scalar", "resolve_conj", "resolve_neg", "rsqrt",
    "scaled_dot_product_attention", "select.int", "silu", "sin", "slice.Tensor", "split_with_sizes", "square",
    "sum.dim_IntList", "to.dtype", "to.dtype_layout", "transpose.int", "triu_", "unflatten.int", "unsqueeze", "view",
    "zeros", "zeros_like",
}  # fmt: skip
# Metal has no float64.
DTYPES = {torch.bfloat16, torch.float32, torch.int64, torch.bool}


class Recorder(TorchDispatchMode):
    """Notes operators and the types of all tensors they take and give."""

    def __init__(self):
        super().__init__()
        self.operators, self.dtypes = set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.").removesuffix(".default")
        self.operators.add(name)
        for each in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(each, torch.Tensor):
                self.dtypes.setdefault(each.dtype, set()).add(name)
        return result


@pytest.fixture(autouse=True)
def as_on_metal(monkeypatch):
    """No C kernels, no layouts of oneDNN, and a sampler that is on the host."""

    def on_the_host(plain):
        def run(*args):
            with _disable_current_modes():
                return plain(*args)

        return run

    monkeypatch.setattr(layers, "_can_pack", lambda weight: False)
    for name in ("launch", "prompt_logprobs"):
        monkeypatch.setattr(Sampler, name, on_the_host(getattr(Sampler, name)))
    with force("auto"):
        yield


def requests():
    """Everything that makes the device do something else."""
    params = {"max_tokens": 12, "ignore_eos": True, "temperature": 0.7, "seed": 5}
    prompt = list(range(5, 38))
    return [
        Generate("plain", prompt, SamplingParams(**params, n=2)),
        Generate("prefix", prompt[:20], SamplingParams(**params, logprobs=3)),
        Generate("scored", prompt[3:], SamplingParams(**params, logprobs=2, prompt_logprobs=True)),
        Generate("fixed", prompt[1:], SamplingParams(**params, deterministic=True)),
        Generate("guessed", [9] * 18, SamplingParams(**params, num_draft_tokens=3, logit_bias={9: 100.0})),
        Generate("mean", prompt, SamplingParams(max_tokens=0), pooling="mean"),
        Generate("last", prompt, SamplingParams(max_tokens=0), pooling="last"),
    ]


@pytest.mark.parametrize("arch, fmt", [("hunyuan", "safetensors"), ("qwen2", "safetensors"), ("qwen3", "safetensors"),
                                       ("llama", "gguf")])  # fmt: skip
def test_exactly_the_listed_operators_are_used(arch, fmt, tmp_path):
    extra = {"fmt": "gguf", "quant": "Q8_0"} if fmt == "gguf" else {}
    path = make_tiny(tmp_path / ("tiny.gguf" if fmt == "gguf" else "tiny"), arch, **extra)
    engine = Engine(Settings(model_path=str(path), dtype="bfloat16", cpu=True, kernels="torch", threads=1, page_size=4,
                             max_model_len=96, kv_memory=40 << 10, host_kv_memory=4 << 20, preemption="swap",
                             max_step_tokens=24, speculative="ngram"))  # fmt: skip
    recorder = Recorder()
    with recorder:
        for request in requests():
            assert engine.add(request) == Accepted(request.rid)
        while engine.has_work:
            engine.step()
    stats = engine.stats()
    assert stats.completed_requests == 7 and stats.failed_requests == 0 and stats.step_faults == 0
    assert stats.swaps > 0 and stats.drafts > 0 and stats.cached_tokens > 0
    assert recorder.operators == OPERATORS, recorder.operators ^ OPERATORS
    assert recorder.dtypes.keys() <= DTYPES, recorder.dtypes


def test_metal_has_every_operator_of_the_list():
    """By torch's own list of operators: an entry for Metal, or made of other operators on every device."""
    yaml = pytest.importorskip("yaml")
    listed = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = {}
    for entry in yaml.load(listed.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        entries[entry["func"].split("(")[0]] = entry

    def on_metal(name: str) -> bool:
        entry = entries[name]
        keys = {key.strip() for keys in entry.get("dispatch", {}) for key in keys.split(",")}
        if "structured_delegate" in entry:
            return on_metal(entry["structured_delegate"])
        return "dispatch" not in entry or bool(keys & {"MPS", "CompositeImplicitAutograd", "CompositeExplicitAutograd",
                                                       "CompositeExplicitAutogradNonFunctional"})  # fmt: skip

    assert [name for name in sorted(OPERATORS) if not on_metal(name)] == []
    assert on_metal("add.Tensor") and not on_metal("linalg_eig")  # one that it has, one that it has not


def test_on_metal_the_sampler_works_on_the_host():
    assert Sampler(10, torch.device("mps")).device == torch.device("cpu")
