"""Tiny random checkpoints of every architecture, as a safetensors folder or a GGUF file.

Made by hand from numpy, so that a test that only needs some model does not pay for torch
or transformers. The weights are a function of the arguments alone, and a folder and a
file made with the same arguments hold the same values: transformers on the folder is the
oracle for both.
"""

import functools
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUM_TEXT_TOKENS = 320
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CORPUS = (
    "The quick brown fox jumps over the lazy dog. Why is the sky blue? Because light is scattered by air.",
    "A crane is a bird, and a machine that lifts things. 12 + 30 = 42; it's what we'd call a sum.",
    "def main():\n    return [i for i in range(10)]\n\nIn the beginning there was one line of text.",
    "Größe, café, naïve; 中文字符 and 日本語 and emoji 🙂 are bytes too.",
)
_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", "qwen3"),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", "hunyuan-dense"),
}
_QK_NORM = {"qwen3": ("q_norm", "k_norm"), "hunyuan": ("query_layernorm", "key_layernorm")}
_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What may differ between tiny models.

    rope: "default", "linear", "yarn", "llama3" or "alpha". quant: the GGUF type of the
    matrices; the safetensors folder then holds the dequantised values.
    eos: token ids of generation_config.json (config.json names the first only).
    spelling: 4 or 5, the transformers version whose config.json is imitated.
    """

    tied: bool = False
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None
    intermediate: int = 96
    vocab: int = 512
    max_position: int = 1024
    rope: str = "default"
    attention_bias: bool = False
    mlp_bias: bool = False
    quant: str = "F32"
    sharded: bool = False
    spelling: int = 4
    eos: tuple[int, ...] | None = None
    seed: int = 0

    @property
    def width(self) -> int:
        return self.head_dim or self.hidden // self.heads


def make_tiny(folder: Path, arch: str, *, fmt: str = "safetensors", **variant) -> Path:
    """Write a tiny checkpoint into `folder` and return the model path.

    arch: "llama", "qwen2", "qwen3" or "hunyuan". fmt: "safetensors" (the path is the
    folder) or "gguf" (the path is the file in it). variant: fields of `Variant`; Hunyuan's
    rope is "alpha" unless told otherwise.
    """
    if arch == "hunyuan":
        variant = {"rope": "alpha", **variant}
    spec = Variant(**variant)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _weights(arch, spec)
    if fmt == "gguf":
        return _write_gguf(folder / f"tiny-{arch}.gguf", arch, spec, tensors)
    assert fmt == "safetensors", fmt
    return _write_folder(folder, arch, spec, tensors)


@functools.cache
def tiny_tokenizer():
    """The `tokenizers.Tokenizer` of all tiny models: byte-level BPE, pre-tokenised like gpt-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=NUM_TEXT_TOKENS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def special_id(token: str) -> int:
    """The id of one of SPECIAL_TOKENS."""
    return tiny_tokenizer().token_to_id(token)


def shapes(arch: str, spec: Variant) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, as in safetensors."""
    hidden, inner = spec.hidden, spec.intermediate
    q_width, kv_width = spec.heads * spec.width, spec.kv_heads * spec.width
    shapes = {"model.embed_tokens.weight": (spec.vocab, hidden), "model.norm.weight": (hidden,)}
    if not spec.tied:
        shapes["lm_head.weight"] = (spec.vocab, hidden)
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}."
        for name, shape, bias in (
            ("self_attn.q_proj", (q_width, hidden), spec.attention_bias or arch == "qwen2"),
            ("self_attn.k_proj", (kv_width, hidden), spec.attention_bias or arch == "qwen2"),
            ("self_attn.v_proj", (kv_width, hidden), spec.attention_bias or arch == "qwen2"),
            ("self_attn.o_proj", (hidden, q_width), spec.attention_bias),
            ("mlp.gate_proj", (inner, hidden), spec.mlp_bias),
            ("mlp.up_proj", (inner, hidden), spec.mlp_bias),
            ("mlp.down_proj", (hidden, inner), spec.mlp_bias),
        ):
            shapes[f"{prefix}{name}.weight"] = shape
            if bias:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
        for name in _QK_NORM.get(arch, ()):
            shapes[f"{prefix}self_attn.{name}.weight"] = (spec.width,)
    return shapes


def _weights(arch: str, spec: Variant) -> dict[str, np.ndarray]:
    # large enough that every part of the model moves the logits
    tensors = {}
    for name, shape in shapes(arch, spec).items():
        random = np.random.default_rng([spec.seed, zlib.crc32(name.encode())])
        values = random.standard_normal(shape, dtype=np.float32)
        if name == "model.embed_tokens.weight":
            values *= np.float32(0.5)
        elif len(shape) == 2:
            values *= np.float32(shape[1] ** -0.5)
        elif name.endswith(".bias"):
            values *= np.float32(0.5)
        else:
            values = 1 + np.float32(0.2) * values
        if spec.quant != "F32" and len(shape) == 2:
            values = _dequantize(_quantize(values, spec.quant), spec.quant)
        tensors[name] = values
    return tensors


def _quantize(values: np.ndarray, quant: str) -> np.ndarray:
    import gguf

    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[quant])


def _dequantize(blocks: np.ndarray, quant: str) -> np.ndarray:
    import gguf

    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[quant])


def _rope(arch: str, spec: Variant) -> dict:
    original = spec.max_position // 4
    theta = 10000.0 if arch == "hunyuan" else 50000.0
    scaling = {
        "default": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": 4.0},
        "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original},
        "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": original},
        "alpha": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1,
                  "mscale": 1.0, "mscale_all_dim": 1.0},
    }[spec.rope]  # fmt: skip
    return {"rope_theta": theta, **scaling}


def config(arch: str, spec: Variant) -> dict:
    """What config.json holds."""
    rope = _rope(arch, spec)
    config = {
        "architectures": [_ARCHITECTURES[arch][0]],
        "model_type": _ARCHITECTURES[arch][1],
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "intermediate_size": spec.intermediate,
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.max_position,
        "rms_norm_eps": 1e-5 if arch == "hunyuan" else 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": spec.tied,
        "bos_token_id": special_id("<|endoftext|>"),
        "eos_token_id": _eos(spec)[0],
        "pad_token_id": special_id("<|endoftext|>"),
    }
    if arch != "qwen2":
        config["head_dim"] = spec.width
        config["attention_bias"] = spec.attention_bias
    if arch == "llama":
        config["mlp_bias"] = spec.mlp_bias
    if arch in ("qwen2", "qwen3"):
        config.update(use_sliding_window=False, sliding_window=None, max_window_layers=spec.layers)
    if arch == "hunyuan":
        config["use_qk_norm"] = True
    if spec.spelling == 5:
        return {**config, "rope_parameters": rope, "dtype": "float32"}
    theta = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    name = "type" if kind in ("linear", "yarn", "dynamic") else "rope_type"
    scaling = None if kind == "default" else {name: kind, **rope}
    return {**config, "rope_theta": theta, "rope_scaling": scaling, "torch_dtype": "float32"}


def _eos(spec: Variant) -> tuple[int, ...]:
    return spec.eos or (special_id("<|im_end|>"), special_id("<|endoftext|>"))


def _write_folder(folder: Path, arch: str, spec: Variant, tensors: dict[str, np.ndarray]) -> Path:
    from safetensors.numpy import save_file

    names = sorted(tensors)
    if spec.sharded:
        shards = {f"model-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
        weight_map = {name: shard for shard, held in shards.items() for name in held}
        size = sum(values.nbytes for values in tensors.values())
        _write_json(folder / "model.safetensors.index.json",
                    {"metadata": {"total_size": size}, "weight_map": weight_map})  # fmt: skip
    else:
        shards = {"model.safetensors": names}
    for shard, held in shards.items():
        arrays = {name: np.ascontiguousarray(tensors[name]) for name in held}
        save_file(arrays, folder / shard, metadata={"format": "pt"})
    _write_json(folder / "config.json", config(arch, spec))
    _write_json(folder / "generation_config.json", {"eos_token_id": list(_eos(spec)), "do_sample": False})
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "add_bos_token": False, "clean_up_tokenization_spaces": False,
        "model_max_length": spec.max_position, "chat_template": CHAT_TEMPLATE,
    })  # fmt: skip
    return folder


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def _write_gguf(path: Path, arch: str, spec: Variant, tensors: dict[str, np.ndarray]) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, _ARCHITECTURES[arch][2])
    writer.add_name(f"tiny {arch}")
    writer.add_context_length(spec.max_position)
    writer.add_embedding_length(spec.hidden)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.intermediate)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.width)
    writer.add_value_length(spec.width)
    writer.add_layer_norm_rms_eps(1e-5 if arch == "hunyuan" else 1e-6)
    writer.add_vocab_size(spec.vocab)
    _add_rope(writer, arch, spec)
    _add_vocabulary(writer, spec)
    for name, values in tensors.items():
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            values = _interleave(values, spec.heads if ".q_proj." in name else spec.kv_heads)
        stem, _, kind = name.rpartition(".")
        if stem.startswith("model.layers."):
            layer, _, rest = stem.removeprefix("model.layers.").partition(".")
            stem = f"blk.{layer}.{_GGUF_NAMES[rest]}"
        else:
            stem = _GGUF_NAMES[stem]
        if spec.quant != "F32" and values.ndim == 2:
            blocks = _quantize(values, spec.quant)
            assert np.array_equal(_dequantize(blocks, spec.quant), values), "requantising changed the values"
            writer.add_tensor(f"{stem}.{kind}", blocks, raw_dtype=gguf.GGMLQuantizationType[spec.quant])
        else:
            writer.add_tensor(f"{stem}.{kind}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleave(values: np.ndarray, heads: int) -> np.ndarray:
    # rows of a head from (first half, second half) to pairs, the order GGUF keeps for llama
    shape = values.shape
    return values.reshape(heads, 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape)


def _add_rope(writer, arch: str, spec: Variant) -> None:
    import gguf

    rope = _rope(arch, spec)
    theta, width = rope["rope_theta"], spec.width
    writer.add_rope_dimension_count(width)
    if spec.rope == "alpha":
        theta *= rope["alpha"] ** (width / (width - 2))
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(1.0)
    elif spec.rope == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif spec.rope == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif spec.rope == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, width))
    writer.add_rope_freq_base(theta)


def _llama3_factors(rope: dict, width: int) -> np.ndarray:
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)
    turns = rope["original_max_position_embeddings"] / wavelengths
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _add_vocabulary(writer, spec: Variant) -> None:
    import gguf

    tokenizer = tiny_tokenizer()
    known = tokenizer.get_vocab_size()
    tokens = [tokenizer.id_to_token(index) for index in range(known)]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    types = [control if token in SPECIAL_TOKENS else normal for token in tokens]
    # the tail that pads the vocabulary up to the width of the weights
    tokens += [f"[PAD{index}]" for index in range(known, spec.vocab)]
    types += [gguf.TokenType.UNUSED] * (spec.vocab - known)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_eos_token_id(_eos(spec)[0])
    writer.add_bos_token_id(special_id("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
