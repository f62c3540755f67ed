"""Weights: every value equals the reference reader's, and nothing is guessed or dropped."""

import resource

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from crane.errors import ModelError
from crane.models.config import load_config
from crane.models.files import Checkpoint, open_checkpoint
from crane.models.gguf_header import BLOCK_TYPES
from crane.models.weights import Weights
from tests.tiny import make_tiny

UNSUPPORTED = {"Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64", "F64"}
DEQUANTIZABLE = [name for name, _, _ in BLOCK_TYPES.values() if name not in UNSUPPORTED]


def open_weights(path, dtype=torch.float32, **options):
    checkpoint = open_checkpoint(path)
    return Weights(checkpoint, load_config(checkpoint), device="cpu", dtype=dtype, **options)


def write_gguf(path, tensors):
    """A llama GGUF whose tensors are (array, type); the config around them is a tiny model's."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def llama_config(tmp_path_factory):
    return load_config(open_checkpoint(make_tiny(tmp_path_factory.mktemp("llama"), "llama")))


def random_blocks(kind, rows, columns):
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(kind)
    return random.integers(0, 256, (rows, columns // block_elements * block_bytes), dtype=np.uint8)


# ---- GGUF values


@pytest.mark.parametrize("name", DEQUANTIZABLE)
def test_every_block_type_equals_the_reference_dequantisation(tmp_path, llama_config, name):
    kind = gguf.GGMLQuantizationType[name]
    rows, columns = 300, 512  # more than one piece, and a ragged last one
    raw = random_blocks(kind, rows, columns)
    if name in ("F32", "F16"):
        raw = np.random.default_rng(0).standard_normal((rows, columns)).astype(name.replace("F", "float"))
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, kind)
        checkpoint = write_gguf(tmp_path / "m.gguf", {"output.weight": (raw, kind)})
        weights = Weights(checkpoint, llama_config, device="cpu", dtype=torch.float32)
        found = weights.tensor("lm_head.weight", (rows, columns))
    assert np.isfinite(expected).mean() > 0.5
    assert np.array_equal(found.numpy(), expected, equal_nan=True)


@pytest.mark.parametrize("name", ["Q8_1", "Q8_K", "I32"])
def test_a_type_that_cannot_hold_weights_is_refused_by_name(tmp_path, llama_config, name):
    kind = gguf.GGMLQuantizationType[name]
    raw = np.zeros((2, 256), dtype=np.int32) if name == "I32" else random_blocks(kind, 2, 256)
    checkpoint = write_gguf(tmp_path / "m.gguf", {"output.weight": (raw, kind)})
    weights = Weights(checkpoint, llama_config, device="cpu", dtype=torch.float32)
    with pytest.raises(ModelError, match=f"type {name} is not supported"):
        weights.tensor("lm_head.weight", checkpoint.tensors["output.weight"].shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "hunyuan"])
def test_folder_and_gguf_of_one_model_give_the_same_tensors(tmp_path, arch, dtype):
    variant = {"quant": "Q8_0", "heads": 4, "kv_heads": 2}
    folder = make_tiny(tmp_path / "s", arch, **variant)
    expected = load_file(folder / "model.safetensors")
    of_folder = open_weights(folder, dtype)
    of_gguf = open_weights(make_tiny(tmp_path / "g", arch, fmt="gguf", **variant), dtype)
    for name, values in expected.items():
        shape = tuple(values.shape)
        for weights in (of_folder, of_gguf):
            found = weights.tensor(name, shape)
            assert found.dtype == dtype and found.is_contiguous()
            assert torch.equal(found, values.to(dtype)), name
    of_folder.finish()
    of_gguf.finish()


def test_rows_of_llama_queries_and_biases_leave_rotary_pair_order(tmp_path):
    variant = {"attention_bias": True, "heads": 4, "kv_heads": 2}
    expected = load_file(make_tiny(tmp_path / "s", "llama", **variant) / "model.safetensors")
    path = make_tiny(tmp_path / "g", "llama", fmt="gguf", **variant)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    name = "model.layers.1.self_attn.k_proj"
    weights = open_weights(path)
    for kind, shape in (("weight", (32, 64)), ("bias", (32,))):
        found = weights.tensor(f"{name}.{kind}", shape)
        assert torch.equal(found, expected[f"{name}.{kind}"])
        assert not np.array_equal(found.numpy(), stored[f"blk.1.attn_k.{kind}"])


def test_real_llama_tensors_equal_the_reference_reader(smollm2):
    weights = open_weights(smollm2)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}

    def reference(name):
        return torch.from_numpy(gguf.dequantize(stored[name].data, stored[name].tensor_type))

    down = weights.tensor("model.layers.7.mlp.down_proj.weight", (576, 1536))
    assert torch.equal(down, reference("blk.7.ffn_down.weight"))
    pairs = reference("blk.3.attn_q.weight").view(9, 32, 2, 576)
    halves = torch.cat((pairs[:, :, 0], pairs[:, :, 1]), dim=1).view(576, 576)
    assert torch.equal(weights.tensor("model.layers.3.self_attn.q_proj.weight", (576, 576)), halves)
    assert not weights.has("lm_head.weight") and weights.has("model.embed_tokens.weight")


def test_real_qwen2_tensors_equal_the_reference_reader_and_load_in_bounded_memory(qwen_coder):
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(qwen_coder).tensors}
    expected = {}
    for name in ("blk.0.attn_q.weight", "blk.0.attn_v.bias", "blk.5.ffn_down.weight"):
        values = gguf.dequantize(stored[name].data, stored[name].tensor_type)
        expected[name] = torch.from_numpy(values.copy()).bfloat16()
    weights = open_weights(qwen_coder, torch.bfloat16)
    layer = "model.layers.0.self_attn"
    assert torch.equal(weights.tensor(f"{layer}.q_proj.weight", (896, 896)), expected["blk.0.attn_q.weight"])
    assert torch.equal(weights.tensor(f"{layer}.v_proj.bias", (128,)), expected["blk.0.attn_v.bias"])
    down = weights.tensor("model.layers.5.mlp.down_proj.weight", (896, 4864))
    assert torch.equal(down, expected["blk.5.ffn_down.weight"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    head = weights.tensor("lm_head.weight", (151_936, 896))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < head.nbytes + (64 << 20)
    assert not torch.equal(head[:100], weights.tensor("model.embed_tokens.weight", (151_936, 896))[:100])


# ---- safetensors values


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_safetensors_are_cast_as_torch_casts(tmp_path, stored, wanted):
    folder = make_tiny(tmp_path, "llama", tied=True)
    tensors = {name: values.to(stored) for name, values in load_file(folder / "model.safetensors").items()}
    tensors["big"] = torch.randn(1100, 1300).to(stored)
    save_file(tensors, folder / "model.safetensors")
    weights = open_weights(folder, wanted)
    for name in ("big", "model.norm.weight"):
        assert torch.equal(weights.tensor(name, tuple(tensors[name].shape)), tensors[name].to(wanted))


def test_a_safetensors_dtype_that_holds_no_weights_is_refused_by_name(tmp_path):
    folder = make_tiny(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match="'model.norm.weight': type F8_E4M3 is not supported"):
        open_weights(folder).tensor("model.norm.weight", (64,))


def test_values_beyond_float16_are_refused(tmp_path):
    folder = make_tiny(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match="range of float16"):
        open_weights(folder, torch.float16).tensor("model.norm.weight", (64,))
    open_weights(folder, torch.bfloat16).tensor("model.norm.weight", (64,))


# ---- asking


@pytest.mark.parametrize("fmt", ["safetensors", "gguf"])
def test_rows_are_stacked_in_one_allocation(tmp_path, fmt):
    weights = open_weights(make_tiny(tmp_path, "llama", fmt=fmt))
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    stacked = weights.rows(names, [(64, 64), (32, 64), (32, 64)])
    assert stacked.shape == (128, 64) and stacked.is_contiguous()
    parts = [weights.tensor(name, shape) for name, shape in zip(names, [(64, 64), (32, 64), (32, 64)])]
    assert torch.equal(stacked, torch.cat(parts))


@pytest.mark.parametrize("fmt", ["safetensors", "gguf"])
def test_missing_and_misshapen_tensors_are_named_with_their_shapes(tmp_path, fmt):
    weights = open_weights(make_tiny(tmp_path, "llama", fmt=fmt))
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.up_proj\.weight.* is missing.*\[96, 64\]"):
        weights.tensor("model.layers.2.mlp.up_proj.weight", (96, 64))
    with pytest.raises(ModelError, match=r"norm\.weight'.*expected shape \[65\], found \[64\]"):
        weights.tensor("model.norm.weight", (65,))


def test_gguf_names_of_its_own_are_found_too(tmp_path):
    weights = open_weights(make_tiny(tmp_path, "llama", fmt="gguf", rope="llama3"))
    assert weights.has("rope_freqs.weight")
    assert weights.tensor("rope_freqs.weight", (8,)).min() >= 1
    assert not open_weights(make_tiny(tmp_path / "plain", "llama", fmt="gguf")).has("rope_freqs.weight")


@pytest.mark.parametrize("fmt", ["safetensors", "gguf"])
def test_tensors_nobody_asked_for_are_named_at_the_end(tmp_path, fmt):
    weights = open_weights(make_tiny(tmp_path, "qwen2", fmt=fmt))
    for name, info in weights.checkpoint.tensors.items():
        if "norm" not in name and "bias" not in name:
            weights.used.add(info.name)
    with pytest.raises(ModelError, match="unknown tensors for qwen25: .*norm.* and [0-9]+ more"):
        weights.finish()


def test_a_stored_copy_of_a_tied_head_and_derived_tensors_are_harmless(tmp_path):
    folder = make_tiny(tmp_path, "llama", tied=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, folder / "model.safetensors")
    weights = open_weights(folder)
    for name in tensors:
        if "lm_head" not in name and "inv_freq" not in name:
            weights.tensor(name, tuple(tensors[name].shape))
    weights.finish()


@pytest.mark.parametrize("fmt", ["safetensors", "gguf"])
def test_progress_counts_each_tensor_once_and_ends_at_the_total(tmp_path, fmt):
    seen = []
    folder = make_tiny(tmp_path / "s", "qwen3")
    shapes = {name: tuple(values.shape) for name, values in load_file(folder / "model.safetensors").items()}
    path = make_tiny(tmp_path / "p", "qwen3", fmt=fmt)
    weights = open_weights(path, progress=lambda loaded, total: seen.append((loaded, total)))
    for name, shape in [*shapes.items(), *shapes.items()]:
        weights.tensor(name, shape)
    weights.finish()
    total = sum(info.nbytes for info in weights.checkpoint.tensors.values())
    assert [loaded for loaded, _ in seen] == sorted({loaded for loaded, _ in seen}) + [total]
    assert seen[-1] == (total, total) and len(seen) == len(shapes) + 1


def test_a_file_cut_after_it_was_opened_is_an_error_not_a_crash(tmp_path):
    path = make_tiny(tmp_path, "llama", fmt="gguf")
    weights = open_weights(path)
    last = max(weights.checkpoint.tensors.values(), key=lambda info: info.offset)
    with open(path, "r+b") as file:
        file.truncate(last.offset)
    raw = Checkpoint(path, "gguf", weights.checkpoint.metadata, {last.name: last})
    with pytest.raises(ModelError, match="became shorter"):
        Weights(raw, weights.config, device="cpu", dtype=torch.float32).tensor(last.name, last.shape)
