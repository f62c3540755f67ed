"""The pre-norm decoder that all architectures of today share."""

from torch import Tensor

from crane.models.config import ModelConfig
from crane.models.context import ForwardContext
from crane.models.layers import Attention, Embedding, GatedMLP, LMHead, RMSNorm, Rope
from crane.models.weights import Weights


class DecoderLayer:
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, weights: Weights, config: ModelConfig, layer: int, norm_names: tuple[str, str] | None):
        prefix = f"model.layers.{layer}"
        size, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(weights, f"{prefix}.input_layernorm", size, eps)
        self.attention = Attention(weights, config, layer, norm_names)
        self.mlp_norm = RMSNorm(weights, f"{prefix}.post_attention_layernorm", size, eps)
        self.mlp = GatedMLP(weights, config, layer)


class Decoder:
    """A causal language model: token ids in, hidden states or scores out.

    A subclass says what its family does differently; `config` says the rest.
    """

    qk_norm_names: tuple[str, str] | None = None

    def __init__(self, config: ModelConfig, weights: Weights):
        """Takes every tensor out of `weights`. Raises ModelError for one that is missing."""
        self.config = config
        self.embedding = Embedding(weights, config, "model.embed_tokens")
        self.rope = Rope(config, weights, weights.device)
        self.layers = [
            DecoderLayer(weights, config, layer, self.qk_norm_names) for layer in range(config.num_layers)
        ]
        self.norm = RMSNorm(weights, "model.norm", config.hidden_size, config.rms_norm_eps)
        self.head = LMHead(weights, config, self.embedding)

    def __call__(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """token_ids: int64 [num_tokens], row after row. Returns hidden [num_tokens, hidden].

        Writes the tokens' keys and values into their slots of `ctx.kv`.
        """
        residual = self.embedding(token_ids)
        angles = self.rope(ctx.positions)
        update = None
        for layer in self.layers:
            # the first layer has nothing to add to the embeddings yet
            x = layer.attention_norm(residual) if update is None else layer.attention_norm(update, residual)
            x = layer.attention(x, angles, ctx)
            update = layer.mlp(layer.mlp_norm(x, residual))
        return self.norm(update, residual)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [num_rows, hidden], any rows of what the model returned.

        Returns float32 [num_rows, vocab_size], padded vocabulary included.
        """
        return self.head(hidden)
