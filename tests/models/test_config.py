"""ModelConfig: both spellings and both formats say the same; what crane cannot compute is refused."""

import json
import math

import pytest
from transformers import AutoConfig

from crane.errors import ModelError
from crane.models.config import GenerationDefaults, RopeConfig, load_config, load_generation_defaults
from crane.models.files import Checkpoint, TensorInfo, open_checkpoint
from tests.tiny import make_tiny, special_id

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen25", "qwen3": "qwen3", "hunyuan": "hunyuan"}
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 512, "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
HUNYUAN = {**LLAMA, "model_type": "hunyuan_v1_dense", "architectures": ["HunYuanDenseV1ForCausalLM"]}


def folder(path, config, generation=None):
    (path / "model.safetensors").touch()
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return open_checkpoint(path)


def gguf(metadata, architecture="llama", **shapes):
    """A GGUF checkpoint of given metadata; None takes a key away."""
    values = {
        "general.architecture": architecture,
        **{f"{architecture}.{name}": value for name, value in {
            "embedding_length": 64, "block_count": 2, "attention.head_count": 4, "feed_forward_length": 96,
            "context_length": 1024, "attention.layer_norm_rms_epsilon": 1e-5,
        }.items()},
        "tokenizer.ggml.tokens": [f"t{index}" for index in range(8)],
        "tokenizer.ggml.token_type": [1] * 8,
        "tokenizer.ggml.eos_token_id": 2,
        **metadata,
    }  # fmt: skip
    shapes = {"token_embd.weight": (16, 64), **shapes}
    tensors = {name: TensorInfo(name, "Q4_0", shape, "m.gguf", 0, 0) for name, shape in shapes.items()}
    return Checkpoint("m.gguf", "gguf", {name: v for name, v in values.items() if v is not None}, tensors)


# ---- the same model, told in four ways


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_both_spellings_and_gguf_give_the_same_sizes(tmp_path, arch):
    variant = {"head_dim": 32, "tied": True} if arch != "qwen2" else {"tied": True}
    old = load_config(open_checkpoint(make_tiny(tmp_path / "4", arch, spelling=4, **variant)))
    new = load_config(open_checkpoint(make_tiny(tmp_path / "5", arch, spelling=5, **variant)))
    assert old == new
    packed = load_config(open_checkpoint(make_tiny(tmp_path / "g", arch, fmt="gguf", **variant)))
    for name in old.__dataclass_fields__:
        if name not in ("rope", "rms_norm_eps"):
            assert getattr(packed, name) == getattr(old, name), name
    assert math.isclose(packed.rms_norm_eps, old.rms_norm_eps, rel_tol=1e-6)
    assert old.model_type == ARCHITECTURES[arch] and old.dtype == "float32"
    assert old.eos_token_ids == tuple(sorted((special_id("<|im_end|>"), special_id("<|endoftext|>"))))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_config_agrees_with_transformers(tmp_path, arch):
    path = make_tiny(tmp_path, arch, rope="yarn" if arch != "hunyuan" else "alpha")
    ours, theirs = load_config(open_checkpoint(path)), AutoConfig.from_pretrained(path)
    pairs = {
        "hidden_size": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads", "intermediate_size": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_position": "max_position_embeddings", "rms_norm_eps": "rms_norm_eps",
        "tie_word_embeddings": "tie_word_embeddings",
    }  # fmt: skip
    for our_name, their_name in pairs.items():
        assert getattr(ours, our_name) == getattr(theirs, their_name), our_name
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("rope", ["default", "linear", "yarn", "llama3"])
def test_rope_scaling_is_the_same_in_both_spellings_and_in_gguf(tmp_path, rope):
    old = load_config(open_checkpoint(make_tiny(tmp_path / "4", "llama", rope=rope)))
    new = load_config(open_checkpoint(make_tiny(tmp_path / "5", "llama", rope=rope, spelling=5)))
    assert old.rope == new.rope
    assert old.rope.kind == rope and old.rope.theta == 50000.0
    packed = load_config(open_checkpoint(make_tiny(tmp_path / "g", "llama", rope=rope, fmt="gguf")))
    # GGUF holds llama3's factors as a tensor
    assert packed.rope == (RopeConfig(50000.0) if rope == "llama3" else old.rope)


def test_hunyuan_alpha_is_kept_apart_from_theta_and_already_in_ggufs_theta(tmp_path):
    old = load_config(open_checkpoint(make_tiny(tmp_path / "4", "hunyuan", head_dim=128)))
    assert old.rope == RopeConfig(10000.0, "dynamic_alpha", alpha=1000.0)
    packed = load_config(open_checkpoint(make_tiny(tmp_path / "g", "hunyuan", fmt="gguf", head_dim=128)))
    assert packed.rope.kind == "default" and math.isclose(packed.rope.theta, 11158839.925, rel_tol=1e-6)


def test_architectures_differ_where_their_families_do(tmp_path):
    found = {}
    for arch in ARCHITECTURES:
        config = load_config(open_checkpoint(make_tiny(tmp_path / arch, arch)))
        found[arch] = (config.qkv_bias, config.output_bias, config.qk_norm)
    assert found == {
        "llama": (False, False, None),
        "qwen2": (True, False, None),
        "qwen3": (False, False, "before_rope"),
        "hunyuan": (False, False, "after_rope"),
    }


# ---- config.json


def test_defaults_are_those_of_the_family(tmp_path):
    config = load_config(folder(tmp_path, LLAMA))
    assert (config.num_kv_heads, config.head_dim, config.rope) == (4, 16, RopeConfig(10000.0))
    assert config.tie_word_embeddings is False and config.dtype == "bfloat16"
    assert config.eos_token_ids == ()
    qwen3 = {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    assert load_config(folder(tmp_path, qwen3)).head_dim == 128


def test_stop_ids_are_the_union_of_both_files(tmp_path):
    checkpoint = folder(tmp_path, {**LLAMA, "eos_token_id": 7}, {"eos_token_id": [9, 7, 3]})
    assert load_config(checkpoint).eos_token_ids == (3, 7, 9)


def test_yarn_scales_attention_and_the_longest_position(tmp_path):
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}
    config = load_config(folder(tmp_path, {**LLAMA, "rope_scaling": scaling}))
    assert math.isclose(config.rope.attention_factor, 0.1 * math.log(4) + 1)
    assert config.max_position == 4000 and config.rope.original_max_position == 1000
    scaling.update(mscale=2.0, mscale_all_dim=1.0, beta_fast=16, truncate=False)
    rope = load_config(folder(tmp_path, {**LLAMA, "rope_scaling": scaling})).rope
    assert math.isclose(rope.attention_factor, (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1))
    assert (rope.beta_fast, rope.beta_slow, rope.truncate) == (16.0, 1.0, False)
    scaling.update(attention_factor=1.5)
    assert load_config(folder(tmp_path, {**LLAMA, "rope_scaling": scaling})).rope.attention_factor == 1.5


def test_a_window_that_is_switched_off_is_no_window(tmp_path):
    off = {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1}
    load_config(folder(tmp_path, {**QWEN2, **off}))
    load_config(folder(tmp_path, {**QWEN2, **off, "use_sliding_window": True, "max_window_layers": 2}))


REFUSED = {
    "model type": ({"model_type": "gemma3"}, "model_type must be one of .*'gemma3'"),
    "mixture of experts": ({"model_type": "qwen3_moe"}, "qwen3_moe"),
    "no model type": ({"model_type": None}, "model_type is missing"),
    "other class": ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    "experts": ({"num_experts": 8}, "num_experts"),
    "AWQ": ({"quantization_config": {"quant_method": "awq"}}, "quantisation 'awq'"),
    "empty quantisation": ({"quantization_config": {}}, "quantization_config"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act must be silu"),
    "dtype": ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype must be"),
    "dtype 5": ({"dtype": "int8"}, " dtype must be"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
    "dynamic alpha": ({"rope_scaling": {"type": "dynamic", "alpha": 1000.0}}, "'dynamic' is not supported"),
    "longrope": ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope' is not supported"),
    "long factors": ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor"),
    "unknown rope": ({"rope_parameters": {"rope_type": ["yarn"]}}, "not supported"),
    "rope per layer": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    "rope as text": ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    "factor below 1": ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a number"),
    "llama3 order": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
        "high_freq_factor",
    ),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "partial rotary inside": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "layer types": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "window": (
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
        "use_sliding_window",
    ),
    "missing size": ({"hidden_size": None}, "hidden_size is missing"),
    "text size": ({"hidden_size": "64"}, "hidden_size must be a whole number"),
    "boolean size": ({"num_hidden_layers": True}, "num_hidden_layers must be"),
    "float size": ({"vocab_size": 512.0}, "vocab_size must be"),
    "zero heads": ({"num_attention_heads": 0}, "num_attention_heads must be"),
    "negative kv heads": ({"num_key_value_heads": -1}, "num_key_value_heads must be"),
    "huge layers": ({"num_hidden_layers": 1 << 40}, "num_hidden_layers must be"),
    "heads and kv heads": ({"num_key_value_heads": 3}, "cannot share 3"),
    "hidden and heads": ({"num_attention_heads": 5}, "no multiple of 5"),
    "odd head": ({"head_dim": 15}, "must be even"),
    "eps": ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    "eps infinite": ({"rms_norm_eps": math.inf}, "rms_norm_eps"),
    "theta NaN": ({"rope_theta": math.nan}, "rope_theta"),
    "eos outside": ({"eos_token_id": 512}, "eos_token_id"),
    "eos negative": ({"eos_token_id": [1, -2]}, "eos_token_id"),
    "eos boolean": ({"eos_token_id": True}, "eos_token_id"),
    "tie as text": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_in_config_json_is_refused_by_name(tmp_path, name):
    change, reason = REFUSED[name]
    checkpoint = folder(tmp_path, {**LLAMA, **change})
    with pytest.raises(ModelError, match=reason) as caught:
        load_config(checkpoint)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"use_qk_norm": False}, {"use_cla": True}, {"mlp_bias": True}, {"attention_head_dim": 8}]
)
def test_hunyuan_switches_that_crane_does_not_compute_are_refused(tmp_path, change):
    load_config(folder(tmp_path, {**HUNYUAN, "use_cla": False, "attention_head_dim": 16}))
    with pytest.raises(ModelError, match=next(iter(change))):
        load_config(folder(tmp_path, {**HUNYUAN, **change}))


def test_a_missing_config_is_named(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="config.json: missing"):
        load_config(open_checkpoint(tmp_path))


def test_an_explicit_model_type_must_agree_with_the_file(tmp_path):
    checkpoint = folder(tmp_path, QWEN2)
    assert load_config(checkpoint, "qwen25").model_type == "qwen25"
    with pytest.raises(ModelError, match="is a qwen25, not a 'llama' model"):
        load_config(checkpoint, "llama")


# ---- GGUF


def test_gguf_defaults_and_optional_tensors():
    config = load_config(gguf({}))
    assert (config.num_kv_heads, config.head_dim, config.vocab_size) == (4, 16, 16)
    assert config.rope == RopeConfig(10000.0) and config.tie_word_embeddings and config.dtype == "bfloat16"
    shapes = {"output.weight": (16, 64), "blk.0.attn_q.bias": (64,), "blk.0.ffn_down.bias": (64,)}
    config = load_config(gguf({"llama.attention.head_count_kv": [2, 2]}, **shapes))
    assert config.num_kv_heads == 2 and not config.tie_word_embeddings
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, False, True)


def test_gguf_stop_ids_are_the_named_ones_and_known_control_tokens():
    tokens = ["<|im_end|>", "<|eot_id|>", "eos", "<|endoftext|>", "<｜hy_place▁holder▁no▁2｜>", "eot", "a", "b"]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 1, 3, 3, 3, 3, 1, 1],
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.eom_token_id": 0xFFFFFFFF,
    }
    assert load_config(gguf(metadata)).eos_token_ids == (0, 2, 3, 4, 5)


def test_gguf_yarn_multiplies_the_attention_factor():
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 1024, "attn_factor": 0.5}
    config = load_config(gguf({f"llama.rope.scaling.{name}": value for name, value in scaling.items()}))
    assert math.isclose(config.rope.attention_factor, 0.5 * (0.1 * math.log(4) + 1))
    assert config.max_position == 4096


REFUSED_GGUF = {
    "architecture": ({"general.architecture": "gemma3"}, "general.architecture must be one of"),
    "no architecture": ({"general.architecture": None}, "general.architecture must be"),
    "architecture type": ({"general.architecture": ["llama"]}, "general.architecture must be"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count: '8' is not supported"),
    "longrope": ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported"),
    "yarn extension": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor",
    ),
    "window": ({"llama.attention.sliding_window": 128}, "llama.attention.sliding_window"),
    "partial rotary": ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count"),
    "value size": ({"llama.attention.value_length": 32}, "llama.attention.value_length"),
    "key size alone": ({"llama.attention.key_length": 32}, "llama.attention.value_length"),
    "softcap": ({"llama.attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "layers differ": ({"llama.attention.head_count_kv": [4, 2]}, "layers that differ"),
    "missing": ({"llama.block_count": None}, "llama.block_count is missing"),
    "zero heads": ({"llama.attention.head_count": 0}, "llama.attention.head_count must be"),
    "array of text": ({"llama.attention.head_count": ["4"]}, "llama.attention.head_count must be"),
    "huge width": ({"llama.embedding_length": 1 << 31}, "llama.embedding_length must be"),
    "eps NaN": ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "layer_norm_rms_epsilon"),
    "vocabulary too large": ({"tokenizer.ggml.tokens": ["t"] * 17}, "tokenizer.ggml.tokens"),
    "token types as number": ({"tokenizer.ggml.token_type": 3}, "tokenizer.ggml.token_type"),
    "token types": ({"tokenizer.ggml.token_type": [1]}, "tokenizer.ggml.token_type"),
    "eos outside": ({"tokenizer.ggml.eos_token_id": 16}, "tokenizer.ggml.eos_token_id"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_GGUF)
def test_what_cannot_be_honoured_in_gguf_metadata_is_refused_by_name(name):
    change, reason = REFUSED_GGUF[name]
    with pytest.raises(ModelError, match=reason) as caught:
        load_config(gguf(change))
    assert str(caught.value).startswith("m.gguf: ")


def test_a_vocabulary_only_gguf_is_no_model(vocabs_dir):
    with pytest.raises(ModelError, match="no tensors"):
        load_config(open_checkpoint(vocabs_dir / "ggml-vocab-qwen2.gguf"))


def test_real_llama_config(smollm2):
    config = load_config(open_checkpoint(smollm2), "llama")
    sizes = (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim)
    assert sizes == (576, 30, 9, 3, 64)
    assert config.rope == RopeConfig(100000.0) and config.max_position == 8192 and config.tie_word_embeddings
    assert config.eos_token_ids == (0, 2)


def test_real_qwen2_config(qwen_coder):
    config = load_config(open_checkpoint(qwen_coder))
    sizes = (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim)
    assert (config.model_type, sizes) == ("qwen25", (896, 24, 14, 2, 64))
    assert config.rope == RopeConfig(1e6) and config.qkv_bias and not config.tie_word_embeddings
    assert config.vocab_size == 151_936 and config.eos_token_ids == (151643, 151645)


# ---- sampling defaults


def test_generation_defaults_are_what_the_model_says(tmp_path):
    said = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    defaults = load_generation_defaults(folder(tmp_path, LLAMA, said))
    assert defaults == GenerationDefaults(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
    greedy = load_generation_defaults(folder(tmp_path, LLAMA, {**said, "do_sample": False}))
    assert greedy == GenerationDefaults(repetition_penalty=1.05)
    (tmp_path / "generation_config.json").unlink()
    assert load_generation_defaults(open_checkpoint(tmp_path)) == GenerationDefaults()


def test_generation_defaults_come_from_gguf_metadata_too():
    said = {"temp": 0.5, "top_k": 40, "penalty_repeat": 1.1}
    metadata = {f"general.sampling.{name}": value for name, value in said.items()}
    expected = GenerationDefaults(temperature=0.5, top_k=40, repetition_penalty=1.1)
    assert load_generation_defaults(gguf(metadata)) == expected


@pytest.mark.parametrize(
    "name, value",
    [("temperature", -1), ("temperature", "0.7"), ("top_p", 1.5), ("top_k", 2.5), ("min_p", math.nan)],
)
def test_generation_defaults_out_of_range_are_refused(tmp_path, name, value):
    with pytest.raises(ModelError, match=f"generation_config.json: {name} must be"):
        load_generation_defaults(folder(tmp_path, LLAMA, {name: value}))
