"""The parts decoders are made of. Each owns its weights; what varies by step is an argument."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from crane.kernels.activation import silu_mul
from crane.kernels.attention import paged_attention
from crane.kernels.gguf_embedding import gguf_embedding
from crane.kernels.gguf_linear import gguf_linear
from crane.kernels.norm import rms_norm
from crane.kernels.packed import PackedLinear
from crane.kernels.planes import Planes
from crane.kernels.qkv_post import qkv_post
from crane.kernels.rope import position_tables
from crane.models.config import ModelConfig, RopeConfig
from crane.models.context import ForwardContext
from crane.models.weights import Weights

# rows the packed layout is tuned for: the usual size of a decode batch
_PACK_ROWS = 32


class Linear:
    """y = x @ weight.T + bias.

    On the CPU the weight is kept in oneDNN's own layout and nowhere else: for a few rows
    that reads it two to three times faster than the plain layout does.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight: [out_features, in_features]; bias: [out_features]."""
        self.bias = bias
        self.packed = _can_pack(weight)
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_rows, in_features]. Returns [num_rows, out_features]."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


class QuantisedLinear:
    """y = x @ weight.T + bias on a GPU, weights in GGUF blocks, one below the other, of one type or of several."""

    def __init__(self, parts: list[Planes], bias: Tensor | None = None):
        """bias: [out_features] of all parts."""
        sizes = [part.shape[0] for part in parts]
        self.parts = list(zip(parts, [None] * len(parts) if bias is None else bias.split(sizes), strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_rows, in_features]. Returns [num_rows, out_features]."""
        found = [gguf_linear(x, planes, bias) for planes, bias in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def load_linear(
    weights: Weights, names: list[str], rows: list[int], columns: int, bias: bool, gated: bool = False
) -> Linear | PackedLinear | QuantisedLinear:
    """One product with the weights called `names`, stacked along the output.

    rows: output features of each. bias: whether each also has a bias. gated: they are gate and up of an MLP.
    """
    matrices, shapes = [f"{name}.weight" for name in names], [(count, columns) for count in rows]
    stacked = weights.rows([f"{name}.bias" for name in names], [(count,) for count in rows]) if bias else None
    if planes := weights.planes(matrices, shapes):
        return QuantisedLinear(planes, stacked)
    if parts := weights.packed(matrices, shapes, gated):
        return PackedLinear(parts, stacked)
    return Linear(weights.rows(matrices, shapes), stacked)


class Embedding:
    """Rows of a table, one per token id. One of `weight`, `packed` and `planes` has the table."""

    def __init__(self, weights: Weights, config: ModelConfig, name: str):
        names, shapes = [f"{name}.weight"], [(config.vocab_size, config.hidden_size)]
        self.dtype = weights.dtype
        self.planes = self.packed = self.weight = None
        if planes := weights.planes(names, shapes):
            self.planes = planes[0]
        elif parts := weights.packed(names, shapes):
            self.packed = parts[0]
        else:
            self.weight = weights.rows(names, shapes)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids: int64 [num_tokens]. Returns [num_tokens, hidden]."""
        if self.planes:
            return gguf_embedding(token_ids, self.planes, self.dtype)
        if self.packed:
            return self.packed.rows(token_ids, self.dtype)
        return F.embedding(token_ids, self.weight)


class RMSNorm:
    """Normalisation of the last dimension with a learned weight."""

    def __init__(self, weights: Weights, name: str, size: int, eps: float):
        self.weight = weights.tensor(f"{name}.weight", (size,))
        self.eps = eps

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise x; or add it to `residual` in place and normalise the sum."""
        return rms_norm(x, self.weight, self.eps, residual)


class Rope:
    """The rotation of every position, computed once a step for all layers."""

    def __init__(self, config: ModelConfig, weights: Weights, device: torch.device):
        self.inv_freq, self.scale = rope_frequencies(config.rope, config.head_dim)
        self.inv_freq = self.inv_freq.to(device)
        if weights.has("rope_freqs.weight"):
            # GGUF keeps the divisors that llama3 scaling amounts to instead of its parameters;
            # rounded to bfloat16 they would turn far positions by whole radians
            divisors = weights.tensor("rope_freqs.weight", (config.head_dim // 2,), torch.float32)
            self.inv_freq = self.inv_freq / divisors

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: int64 [num_tokens]. Returns the `rope_tables` of its tokens."""
        return position_tables(positions, self.inv_freq, self.scale)


class Attention:
    """Self-attention of one layer: fused q/k/v, optional head norms, rotary, paged K/V."""

    def __init__(self, weights: Weights, config: ModelConfig, layer: int, norm_names: tuple[str, str] | None):
        """norm_names: what the q and k head norms are called, or None for a model without."""
        prefix = f"model.layers.{layer}.self_attn"
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        widths = [count * config.head_dim for count in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        names = [f"{prefix}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        hidden = config.hidden_size
        self.qkv = load_linear(weights, names, widths, hidden, config.qkv_bias)
        self.output = load_linear(weights, [f"{prefix}.o_proj"], [hidden], widths[0], config.output_bias)
        self.bias = None
        if isinstance(self.qkv, Linear) and self.qkv.weight.device.type == "cuda":
            # where one kernel does all that follows the product, it adds the bias, too
            self.bias, self.qkv.bias = self.qkv.bias, None
        self.eps = config.rms_norm_eps
        self.norm_first = config.qk_norm == "before_rope"
        self.norm_weight = None
        if config.qk_norm:
            q_name, k_name = (f"{prefix}.{name}.weight" for name in norm_names)
            q_weight = weights.tensor(q_name, (self.head_dim,)).expand(self.num_heads, -1)
            k_weight = weights.tensor(k_name, (self.head_dim,)).expand(self.num_kv_heads, -1)
            # one row a head, so that q and k are normalised together
            self.norm_weight = torch.cat((q_weight, k_weight))

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], ctx: ForwardContext) -> Tensor:
        """x: [num_tokens, hidden]; angles: what `Rope` gives. Returns [num_tokens, hidden]."""
        q, k, v = qkv_post(
            self.qkv(x), ctx.kv, self.layer, ctx.slot_index, *angles, self.num_heads, norm_weight=self.norm_weight,
            norm_first=self.norm_first, eps=self.eps, bias=self.bias, kv_scales=ctx.kv_scales, keep_kv=ctx.wants_new_kv,
        )  # fmt: skip
        attended = paged_attention(q, k, v, ctx.kv, self.layer, ctx.attention_plan, self.scale, ctx.kv_scales)
        return self.output(attended)


class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up as one product."""

    def __init__(self, weights: Weights, config: ModelConfig, layer: int):
        prefix = f"model.layers.{layer}.mlp"
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        self.gate_up = load_linear(weights, names, [inner, inner], hidden, bias, gated=True)
        self.down = load_linear(weights, [f"{prefix}.down_proj"], [hidden], inner, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden]. Returns [num_tokens, hidden]."""
        at_once = isinstance(self.gate_up, PackedLinear) and self.gate_up.is_paired and silu_mul.mode == "auto"
        return self.down(self.gate_up.gated(x) if at_once else silu_mul(self.gate_up(x)))


class LMHead:
    """Scores of the whole vocabulary; the embedding's own rows when the config ties them."""

    def __init__(self, weights: Weights, config: ModelConfig, embedding: Embedding):
        if not config.tie_word_embeddings:
            self.linear = load_linear(weights, ["lm_head"], [config.vocab_size], config.hidden_size, False)
        elif embedding.planes:
            self.linear = QuantisedLinear([embedding.planes])
        else:
            self.linear = PackedLinear([embedding.packed]) if embedding.packed else Linear(embedding.weight)

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden: [num_rows, hidden]. Returns float32 [num_rows, vocab_size]."""
        if isinstance(self.linear, PackedLinear):
            return self.linear(hidden, torch.float32)
        return self.linear(hidden).float()

    def add_screen(self) -> None:
        """Let `PackedLinear.best` read less, where C kernels compute it: see there."""
        if isinstance(self.linear, PackedLinear):
            self.linear.add_screen()

    @property
    def screened(self) -> str | None:
        """What that spared, in one line."""
        return self.linear.screened if isinstance(self.linear, PackedLinear) else None


def rope_frequencies(config: RopeConfig, dim: int) -> tuple[Tensor, float]:
    """Angle per position of each rotated pair, and the factor on cos and sin.

    dim: elements of a head. Returns float32 [dim / 2] on the CPU and a float.
    """
    theta = config.theta
    if config.kind == "dynamic_alpha":
        theta *= config.alpha ** (dim / (dim - 2))
    inv_freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if config.kind == "linear":
        return inv_freq / config.factor, 1.0
    if config.kind == "llama3":
        return _llama3_frequencies(config, inv_freq), 1.0
    if config.kind == "yarn":
        return _yarn_frequencies(config, inv_freq), config.attention_factor
    assert config.kind in ("default", "dynamic_alpha"), config.kind
    return inv_freq, 1.0


def _llama3_frequencies(config: RopeConfig, inv_freq: Tensor) -> Tensor:
    # turns within the original context: few turns are stretched, many are kept, a ramp between
    turns = config.original_max_position * inv_freq / (2 * math.pi)
    keep = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    keep = keep.clamp(0, 1)
    return inv_freq * (keep + (1 - keep) / config.factor)


def _yarn_frequencies(config: RopeConfig, inv_freq: Tensor) -> Tensor:
    pairs = inv_freq.shape[0]

    def pair_of(turns: float) -> float:
        """The (fractional) pair that makes so many turns within the original context."""
        wavelength = config.original_max_position / turns
        return pairs * math.log(wavelength / (2 * math.pi)) / math.log(config.theta)

    low, high = pair_of(config.beta_fast), pair_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    if low == high:
        high += 0.001
    keep = 1 - ((torch.arange(pairs, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return inv_freq * (keep + (1 - keep) / config.factor)
