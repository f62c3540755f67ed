"""Reads what a model is: sizes, rotary embedding, stop tokens. Torch-free.

From config.json and generation_config.json, in the spellings of transformers 4 and 5,
or from GGUF metadata. Every number is checked, and a feature that crane does not
compute is refused by name: a wrong guess would still produce fluent text.
"""

from crane.errors import ModelError
from crane.models.config_gguf import read_gguf_config
from crane.models.files import Checkpoint
from crane.models.gguf_header import show
from crane.models.shape import (
    QK_NORMS, Fields, GenerationDefaults, ModelConfig, RopeConfig, checked, read_head_dim, stored_dtype,
    yarn_mscale,
)  # fmt: skip

__all__ = ["GenerationDefaults", "ModelConfig", "RopeConfig", "load_config", "load_generation_defaults"]

# what config.json calls a model: ours, and the class name that goes with it
_HF_TYPES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen25", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "hunyuan_v1_dense": ("hunyuan", "HunYuanDenseV1ForCausalLM"),
}
_ROPE_KEYS = {
    "type", "rope_type", "rope_theta", "factor", "alpha", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "original_max_position_embeddings", "attention_factor", "low_freq_factor",
    "high_freq_factor", "truncate", "partial_rotary_factor",
}  # fmt: skip
_DTYPES = ("float32", "float16", "bfloat16")


def load_config(checkpoint: Checkpoint, model_type: str = "auto") -> ModelConfig:
    """The ModelConfig of a checkpoint.

    model_type: "auto", or the expected type. Raises ModelError naming file and field
    for what is missing, malformed, contradictory or not supported.
    """
    config = read_gguf_config(checkpoint) if checkpoint.format == "gguf" else _hf_config(checkpoint)
    if model_type not in ("auto", config.model_type):
        raise ModelError(f"{checkpoint.path}: is a {config.model_type}, not a {show(model_type)} model")
    return config


def load_generation_defaults(checkpoint: Checkpoint) -> GenerationDefaults:
    """The model's own sampling values. Raises ModelError naming one that is out of range.

    With `do_sample: false` the sampling values are void, as in transformers.
    """
    if checkpoint.format == "gguf":
        fields = Fields(checkpoint.path, checkpoint.metadata, "general.sampling.")
        names = ("temp", "top_p", "top_k", "min_p", "penalty_repeat")
        sampling = True
    else:
        values = checkpoint.read_json("generation_config.json") or {}
        fields = Fields(checkpoint.path / "generation_config.json", values)
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        sampling = fields.boolean("do_sample", True)
    temperature, top_p, top_k, min_p, repetition = names
    return GenerationDefaults(
        temperature=fields.number(temperature, 0, 100, None) if sampling else None,
        top_p=fields.number(top_p, 0, 1, None) if sampling else None,
        top_k=fields.integer(top_k, 0, 1 << 31, None) if sampling else None,
        min_p=fields.number(min_p, 0, 1, None) if sampling else None,
        repetition_penalty=fields.number(repetition, 0.01, 100, None),
    )


def _hf_config(checkpoint: Checkpoint) -> ModelConfig:
    values = checkpoint.read_json("config.json")
    if values is None:
        raise ModelError(f"{checkpoint.path / 'config.json'}: missing")
    fields = Fields(checkpoint.path / "config.json", values)
    model_type = _hf_model_type(fields)
    hidden_size = fields.integer("hidden_size", 1, 1 << 17)
    num_layers = fields.integer("num_hidden_layers", 1, 1024)
    num_heads = fields.integer("num_attention_heads", 1, 1024)
    vocab_size = fields.integer("vocab_size", 1, 1 << 22)
    _refuse_unsupported(fields, model_type, num_layers)
    if model_type == "qwen3" and fields.get("head_dim", None) is None:
        head_dim = 128  # what transformers takes for this family, whatever the hidden size
    else:
        head_dim = read_head_dim(fields, "head_dim", hidden_size, num_heads)
    if fields.integer("attention_head_dim", 1, 4096, head_dim) != head_dim:
        raise fields.fail("attention_head_dim", f"head_dim ({head_dim})", values["attention_head_dim"])
    rope, max_position = _hf_rope(fields, model_type)
    attention_bias = fields.boolean("attention_bias", False)
    values = checkpoint.read_json("generation_config.json") or {}
    generation = Fields(checkpoint.path / "generation_config.json", values)
    eos = fields.token_ids("eos_token_id", vocab_size) | generation.token_ids("eos_token_id", vocab_size)
    config = ModelConfig(
        model_type=model_type,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", 1, 1024, num_heads),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size", 1, 1 << 20),
        vocab_size=vocab_size,
        max_position=max_position,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-12, 0.1),
        rope=rope,
        qkv_bias=attention_bias or model_type == "qwen25",
        output_bias=attention_bias and model_type != "qwen25",
        mlp_bias=fields.boolean("mlp_bias", False) and model_type == "llama",
        qk_norm=QK_NORMS.get(model_type),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        dtype=_hf_dtype(fields, checkpoint),
        eos_token_ids=tuple(sorted(eos)),
    )
    return checked(fields.path, config)


def _hf_model_type(fields: Fields) -> str:
    name = fields.get("model_type")
    if not isinstance(name, str) or name not in _HF_TYPES:
        raise fields.fail("model_type", "one of " + ", ".join(_HF_TYPES), name)
    model_type, architecture = _HF_TYPES[name]
    named = fields.get("architectures", [architecture])
    if named != [architecture]:
        raise fields.fail("architectures", f"[{architecture!r}]", named)
    return model_type


def _refuse_unsupported(fields: Fields, model_type: str, num_layers: int) -> None:
    """Raise ModelError for a feature that would change the computation."""
    for name in ("quantization_config", "compression_config"):
        section = fields.get(name, None)
        if section is not None:
            method = section.get("quant_method") if isinstance(section, dict) else section
            raise fields.refuse(name, f"quantisation {show(str(method))} is not supported for safetensors")
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise fields.fail("hidden_act", "silu", fields.get("hidden_act"))
    for name in ("num_experts", "num_local_experts"):
        if fields.integer(name, 0, 1 << 16, 1) > 1:
            raise fields.refuse(name, "mixture-of-experts models are not supported")
    for name in ("use_cla", "use_mrope", "position_embedding_xdrope"):
        if fields.boolean(name, False):
            raise fields.refuse(name, "not supported")
    if model_type == "hunyuan" and not fields.boolean("use_qk_norm", True):
        raise fields.refuse("use_qk_norm", "Hunyuan without it is not supported")
    if model_type != "llama" and fields.boolean("mlp_bias", False):
        raise fields.refuse("mlp_bias", f"not a feature of {model_type}")
    _refuse_sliding_window(fields, num_layers)


def _refuse_sliding_window(fields: Fields, num_layers: int) -> None:
    layer_types = fields.get("layer_types", None)
    if layer_types is not None:
        if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
            raise fields.refuse("layer_types", "attention other than full_attention is not supported")
    elif fields.boolean("use_sliding_window", False) and fields.get("sliding_window", None) is not None:
        if fields.integer("max_window_layers", 0, 1 << 16, 0) < num_layers:
            raise fields.refuse("use_sliding_window", "sliding-window attention is not supported")


def _hf_rope(fields: Fields, model_type: str) -> tuple[RopeConfig, int]:
    """Rope and the longest position it serves."""
    max_position = fields.integer("max_position_embeddings", 1, 1 << 25)
    top_theta = fields.number("rope_theta", 1, 1e15, 10_000.0)
    if fields.number("partial_rotary_factor", 0, 1, 1.0) != 1.0:
        raise fields.refuse("partial_rotary_factor", "partial rotary embedding is not supported")
    rope = fields.section("rope_scaling" if fields.get("rope_scaling", None) else "rope_parameters")
    for key, value in rope.values.items():
        if key.removeprefix(rope.prefix) not in _ROPE_KEYS and value is not None:
            raise ModelError(f"{fields.path}: {show(key)} is not supported")
    if rope.number("partial_rotary_factor", 0, 1, 1.0) != 1.0:
        raise rope.refuse("partial_rotary_factor", "partial rotary embedding is not supported")
    theta = rope.number("rope_theta", 1, 1e15, top_theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta), max_position
    if kind == "linear":
        return RopeConfig(theta, "linear", factor=rope.number("factor", 1, 1e6)), max_position
    if kind == "dynamic" and model_type == "hunyuan" and rope.get("alpha", 0):
        return RopeConfig(theta, "dynamic_alpha", alpha=rope.number("alpha", 1e-3, 1e9)), max_position
    original = fields.integer(
        "original_max_position_embeddings", 1, 1 << 25,
        rope.integer("original_max_position_embeddings", 1, 1 << 25, max_position),
    )  # fmt: skip
    if kind == "llama3":
        low, high = rope.number("low_freq_factor", 1e-3, 1e6), rope.number("high_freq_factor", 1e-3, 1e6)
        if high <= low:
            raise rope.fail("high_freq_factor", f"above low_freq_factor ({low:g})", high)
        factor = rope.number("factor", 1, 1e6)
        scaled = RopeConfig(
            theta, kind, factor, original_max_position=original, low_freq_factor=low, high_freq_factor=high
        )
        return scaled, max_position
    if kind == "yarn":
        return _hf_yarn(rope, theta, original, max_position)
    # plain "dynamic" grows its base with the length of each sequence, which a shared KV page cannot follow
    raise rope.refuse("rope_type", f"rope scaling {show(str(kind))} is not supported for {model_type}")


def _hf_yarn(rope: Fields, theta: float, original: int, max_position: int) -> tuple[RopeConfig, int]:
    factor = rope.number("factor", 1, 1e6, max(1.0, max_position / original))
    mscale, mscale_all = rope.number("mscale", 0, 100, 0.0), rope.number("mscale_all_dim", 0, 100, 0.0)
    attention = yarn_mscale(factor, 1.0)
    if mscale and mscale_all:
        attention = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all)
    scaled = RopeConfig(
        theta,
        "yarn",
        factor,
        original_max_position=original,
        attention_factor=rope.number("attention_factor", 1e-3, 1e3, attention),
        beta_fast=rope.number("beta_fast", 0, 1e6, 0.0) or 32.0,
        beta_slow=rope.number("beta_slow", 0, 1e6, 0.0) or 1.0,
        truncate=rope.boolean("truncate", True),
    )
    return scaled, max(max_position, int(original * factor))


def _hf_dtype(fields: Fields, checkpoint: Checkpoint) -> str:
    name = fields.get("dtype", fields.get("torch_dtype", None))
    if name is None:
        return stored_dtype(checkpoint)
    if not isinstance(name, str) or name.removeprefix("torch.") not in _DTYPES:
        raise fields.fail("dtype" if fields.get("dtype", None) else "torch_dtype", f"one of {_DTYPES}", name)
    return name.removeprefix("torch.")
