"""Reads what a model is from the metadata of a GGUF file. Torch-free."""

from crane.errors import ModelError
from crane.models.files import Checkpoint
from crane.models.gguf_header import show
from crane.models.shape import (
    QK_NORMS, Fields, ModelConfig, RopeConfig, checked, read_head_dim, stored_dtype, yarn_mscale,
)  # fmt: skip

_GGUF_TYPES = {"llama": "llama", "qwen2": "qwen25", "qwen3": "qwen3", "hunyuan-dense": "hunyuan"}
# GGUF keys of an architecture that change the computation, and the value that changes nothing
_GGUF_NEUTRAL = {
    "expert_count": 0, "attention.scale": 0.0, "logit_scale": 0.0, "residual_scale": 0.0,
    "embedding_scale": 0.0, "attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0, "attention.causal": True,
    "use_parallel_residual": False, "rope.dimension_sections": None, "rope.scale_linear": 1.0,
    "nextn_predict_layers": 0,
}  # fmt: skip
# tokens that end a turn or a text wherever a GGUF vocabulary has them as control tokens
_END_TOKENS = {
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|eos|>",
    "<｜hy_place▁holder▁no▁2｜>",
}  # fmt: skip
_CONTROL_TOKEN = 3


def read_gguf_config(checkpoint: Checkpoint) -> ModelConfig:
    """The ModelConfig of a GGUF. Raises ModelError naming file and key.

    Biases and a separate output are known by their tensors: GGUF has no keys for them.
    """
    path, metadata, tensors = checkpoint.path, checkpoint.metadata, checkpoint.tensors
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _GGUF_TYPES:
        supported = ", ".join(_GGUF_TYPES)
        raise Fields(path, metadata).fail("general.architecture", f"one of {supported}", architecture)
    if not tensors:
        raise ModelError(f"{path}: holds no tensors (a vocabulary-only GGUF)")
    model_type = _GGUF_TYPES[architecture]
    fields = Fields(path, metadata, f"{architecture}.")
    hidden_size = fields.integer("embedding_length", 1, 1 << 17)
    num_layers = fields.integer("block_count", 1, 1024)
    num_heads = fields.uniform("attention.head_count", 1, 1024)
    head_dim = read_head_dim(fields, "attention.key_length", hidden_size, num_heads)
    rope, max_position = _gguf_rope(fields)
    _refuse_unsupported(fields, hidden_size // num_heads, head_dim, max_position)
    vocab_size = _gguf_vocab_size(checkpoint)
    tokenizer = Fields(path, metadata, "tokenizer.ggml.")
    config = ModelConfig(
        model_type=model_type,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.uniform("attention.head_count_kv", 1, 1024, num_heads),
        head_dim=head_dim,
        intermediate_size=fields.uniform("feed_forward_length", 1, 1 << 20),
        vocab_size=vocab_size,
        max_position=max_position,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon", 1e-12, 0.1),
        rope=rope,
        qkv_bias=model_type == "qwen25" or "blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        qk_norm=QK_NORMS.get(model_type),
        tie_word_embeddings="output.weight" not in tensors,
        dtype=stored_dtype(checkpoint),
        eos_token_ids=_gguf_eos(tokenizer, vocab_size),
    )
    return checked(path, config)


def _refuse_unsupported(fields: Fields, default_head_dim: int, head_dim: int, max_position: int) -> None:
    """Raise ModelError for a feature that would change the computation."""
    for name, neutral in _GGUF_NEUTRAL.items():
        value = fields.get(name, neutral)
        if value != neutral:
            raise fields.refuse(name, f"{show(str(value))} is not supported")
    # key_length alone does not set the size of values
    if fields.integer("attention.value_length", 1, 4096, default_head_dim) != head_dim:
        raise fields.refuse("attention.value_length", f"must equal the size of a key ({head_dim})")
    if fields.integer("rope.dimension_count", 1, 4096, head_dim) != head_dim:
        raise fields.refuse("rope.dimension_count", f"must equal the head size ({head_dim})")
    if 0 < fields.integer("attention.sliding_window", 0, 1 << 32, 0) < max_position:
        raise fields.refuse("attention.sliding_window", "sliding-window attention is not supported")


def _gguf_rope(fields: Fields) -> tuple[RopeConfig, int]:
    """Rope and the longest position it serves. Factors of llama3 come as a tensor, not from here."""
    max_position = fields.integer("context_length", 1, 1 << 25)
    theta = fields.number("rope.freq_base", 1, 1e15, 10_000.0)
    scaling = Fields(fields.path, fields.values, f"{fields.prefix}rope.scaling.")
    kind = scaling.get("type", "none")
    if kind == "none":
        return RopeConfig(theta), max_position
    factor = scaling.number("factor", 0, 1e6, 0.0) or 1.0
    if kind == "linear":
        return RopeConfig(theta, "linear", factor), max_position
    if kind != "yarn":
        raise scaling.refuse("type", f"rope scaling {show(str(kind))} is not supported")
    for name in ("yarn_ext_factor", "yarn_log_multiplier"):
        if scaling.number(name, -1e6, 1e6, -1.0) not in (-1.0, 0.0 if name == "yarn_log_multiplier" else 1.0):
            raise scaling.refuse(name, "not supported")
    extra = scaling.number("attn_factor", 1e-3, 1e3, 1.0) * scaling.number("yarn_attn_factor", 1e-3, 1e3, 1.0)
    original = scaling.integer("original_context_length", 1, 1 << 25, max_position)
    scaled = RopeConfig(
        theta,
        "yarn",
        factor,
        original_max_position=original,
        attention_factor=extra * yarn_mscale(factor, 1.0),
        beta_fast=scaling.number("yarn_beta_fast", 1e-3, 1e6, 32.0),
        beta_slow=scaling.number("yarn_beta_slow", 1e-3, 1e6, 1.0),
    )
    return scaled, max(max_position, int(original * factor))


def _gguf_vocab_size(checkpoint: Checkpoint) -> int:
    """Rows of the embedding, which must hold every token of the vocabulary."""
    embedding = checkpoint.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{checkpoint.path}: tensor token_embd.weight is missing or not a matrix")
    rows = embedding.shape[0]
    tokens = checkpoint.metadata.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list) or len(tokens) > rows or rows > 1 << 22:
        raise ModelError(f"{checkpoint.path}: tokenizer.ggml.tokens does not fit an embedding of {rows} rows")
    return rows


def _gguf_eos(tokenizer: Fields, vocab_size: int) -> tuple[int, ...]:
    """End tokens that the metadata names, and those that are known by their text."""
    ids: set[int] = set()
    for name in ("eos_token_id", "eot_token_id", "eom_token_id"):
        ids |= tokenizer.token_ids(name, vocab_size)
    tokens, kinds = tokenizer.get("tokens", []), tokenizer.get("token_type", [])
    if not isinstance(kinds, list) or len(kinds) not in (0, len(tokens)):
        raise tokenizer.fail("token_type", f"a list of {len(tokens)} types", kinds)
    for index, kind in enumerate(kinds):
        if kind == _CONTROL_TOKEN and isinstance(tokens[index], str) and tokens[index] in _END_TOKENS:
            ids.add(index)
    return tuple(sorted(ids))
