"""The shape of a model, and careful reading of the values it is made from. Torch-free."""

import math
from dataclasses import dataclass
from pathlib import Path

from crane.errors import ModelError
from crane.models.files import Checkpoint
from crane.models.gguf_header import show

# where the families that normalise query and key heads do it
QK_NORMS = {"qwen3": "before_rope", "hunyuan": "after_rope"}
_NO_TOKEN = (-1, 0xFFFFFFFF)
_UNSET = object()


@dataclass(frozen=True)
class RopeConfig:
    """How positions turn into angles; numbers beside theta matter to the kinds named with them."""

    theta: float  # as in the file: "dynamic_alpha" still multiplies it by alpha ** (d / (d - 2))
    kind: str = "default"  # "default" | "linear" | "dynamic_alpha" | "yarn" | "llama3"
    factor: float = 1.0  # linear, yarn, llama3: how far the context is stretched
    alpha: float = 1.0  # dynamic_alpha
    original_max_position: int = 0  # yarn, llama3: tokens the model was trained on before stretching
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. max_position in tokens, rope scaling included."""

    model_type: str  # "llama" | "qwen25" | "qwen3" | "hunyuan"
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int  # rows of the embedding; the tokenizer may know fewer
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: str | None  # None | "before_rope" | "after_rope"
    tie_word_embeddings: bool
    dtype: str  # of the checkpoint: "float32" | "float16" | "bfloat16"; quantised blocks count as bfloat16
    eos_token_ids: tuple[int, ...]  # every id that ends an answer, ascending


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling values that the model recommends; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class Fields:
    """Typed, bounded access to untrusted values. `None` in the file means absent.

    A getter without `default` requires the field.
    """

    def __init__(self, path: Path, values: dict, prefix: str = ""):
        self.path = path
        self.values = values
        self.prefix = prefix

    def fail(self, name: str, expected: str, got: object) -> ModelError:
        return ModelError(f"{self.path}: {self.prefix}{name} must be {expected}, got {show(str(got))}")

    def refuse(self, name: str, reason: str) -> ModelError:
        return ModelError(f"{self.path}: {self.prefix}{name}: {reason}")

    def get(self, name: str, default=_UNSET):
        value = self.values.get(self.prefix + name)
        if value is None and default is _UNSET:
            raise ModelError(f"{self.path}: {self.prefix}{name} is missing")
        return default if value is None else value

    def integer(self, name: str, low: int, high: int, default=_UNSET) -> int:
        value = self.get(name, default)
        if value is not default and (type(value) is not int or not low <= value <= high):
            raise self.fail(name, f"a whole number in [{low}, {high}]", value)
        return value

    def number(self, name: str, low: float, high: float, default=_UNSET) -> float:
        value = self.get(name, default)
        if value is default:
            return value
        # NaN fails the comparison
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.fail(name, f"a number in [{low:g}, {high:g}]", value)
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            raise self.fail(name, "true or false", value)
        return value

    def uniform(self, name: str, low: int, high: int, default=_UNSET) -> int:
        """An integer that GGUF may give once per layer; the layers must agree."""
        value = self.get(name, default)
        if isinstance(value, list):
            if not value or any(item != value[0] for item in value):
                raise self.refuse(name, "layers that differ are not supported")
            return Fields(self.path, {self.prefix + name: value[0]}, self.prefix).integer(name, low, high)
        return self.integer(name, low, high, default)

    def section(self, name: str) -> "Fields":
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.fail(name, "an object", value)
        return Fields(self.path, {f"{name}.{key}": item for key, item in value.items()}, f"{name}.")

    def token_ids(self, name: str, vocab_size: int) -> set[int]:
        """One id or a list of ids, each inside the vocabulary; -1 stands for none."""
        value = self.get(name, [])
        ids = value if isinstance(value, list) else [value]
        for token_id in ids:
            if type(token_id) is not int or token_id not in _NO_TOKEN and not 0 <= token_id < vocab_size:
                raise self.fail(name, f"token ids below the vocabulary size {vocab_size}", value)
        return set(ids) - set(_NO_TOKEN)


def checked(path: Path, config: ModelConfig) -> ModelConfig:
    """The config when its sizes fit together. Raises ModelError."""
    if config.num_heads % config.num_kv_heads:
        raise ModelError(f"{path}: {config.num_heads} heads cannot share {config.num_kv_heads} KV heads")
    if config.head_dim % 2 or config.head_dim < 4:
        raise ModelError(f"{path}: head size must be even and at least 4, got {config.head_dim}")
    return config


def read_head_dim(fields: Fields, name: str, hidden_size: int, num_heads: int) -> int:
    """Field `name`, else the hidden size split among the heads. Raises ModelError."""
    head_dim = fields.integer(name, 2, 4096, None)
    if head_dim is None:
        if hidden_size % num_heads:
            raise ModelError(f"{fields.path}: hidden size {hidden_size} is no multiple of {num_heads} heads")
        head_dim = hidden_size // num_heads
    return head_dim


def yarn_mscale(factor: float, mscale: float) -> float:
    """What YaRN multiplies cos and sin by for a context stretched `factor` times."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that most elements are stored in; blocks and anything else count as bfloat16."""
    elements: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        name = {"F32": "float32", "F16": "float16"}.get(tensor.dtype, "bfloat16")
        elements[name] = elements.get(name, 0) + math.prod(tensor.shape)
    return max(elements, key=elements.get, default="float32")
