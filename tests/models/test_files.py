"""Checkpoints: headers agree with the reference readers, and no broken file gets through."""

import json
import os
import resource
import struct
import subprocess
import sys
import time

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from crane.errors import ModelError
from crane.models.files import open_checkpoint
from crane.models.gguf_header import BLOCK_TYPES

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(name: str, dims: list[int], kind: int, offset: int, num_dims: int | None = None) -> bytes:
    head = text(name) + struct.pack("<I", len(dims) if num_dims is None else num_dims)
    return head + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


def build(
    keys=(), tensors=(), data=b"\0" * 256, *, magic=b"GGUF", version=3, num_keys=None, num_tensors=None
) -> bytes:
    """A GGUF file from raw parts, the counts forged where asked."""
    num_keys = len(keys) if num_keys is None else num_keys
    num_tensors = len(tensors) if num_tensors is None else num_tensors
    head = magic + struct.pack("<IQQ", version, num_tensors, num_keys) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


ARCH = key("general.architecture", STRING, text("llama"))
GOOD = tensor("a", [8], 0, 0)

BROKEN_GGUF = {
    "empty": (b"", "too short"),
    "text": (b"hello, this is not a model file at all", "wrong magic"),
    "pickle": (b"\x80\x02}q\x00." + b"\0" * 64, "wrong magic"),
    "old version": (build(version=1), "version 1"),
    "future version": (build(version=4), "version 4"),
    "big endian": (build(version=3 << 24), "big-endian"),
    "many keys": (build(num_keys=1 << 60), "metadata keys cannot be right"),
    "many tensors": (build(num_tensors=1 << 60), "tensors cannot be right"),
    "one key too many": (build([ARCH], num_keys=2, data=b""), "file ends inside|cannot be right|empty"),
    "key of 2^63 bytes": (build([struct.pack("<Q", 1 << 63) + b"x" * 64]), "cannot be right"),
    "empty key": (build([key("", U32, b"\0" * 4)]), "empty"),
    "key twice": (build([ARCH, ARCH]), "given twice"),
    "key not utf-8": (build([key(b"\xff\xfe", U32, b"\0" * 4)]), "not UTF-8"),
    "unknown value type": (build([key("k", 13, b"\0" * 8)]), "unknown value type 13"),
    "boolean 2": (build([key("k", BOOL, b"\2")]), "boolean"),
    "string past the end": (build([key("k", STRING, struct.pack("<Q", 1 << 40))]), "cannot be right"),
    "string of 2^64 - 1": (build([key("k", STRING, b"\xff" * 8)]), "cannot be right"),
    "value not utf-8": (build([key("k", STRING, text(b"\xc3\x28"))]), "not UTF-8"),
    "array count": (build([key("k", ARRAY, array(U32, 1 << 62, b""))]), "claims"),
    "string array count": (build([key("k", ARRAY, array(STRING, 1 << 40, b""))]), "claims"),
    "string array overrun": (
        build([key("k", ARRAY, array(STRING, 3, text("a") + struct.pack("<Q", 1 << 50)))]),
        "file ends inside",
    ),
    "item not utf-8": (build([key("k", ARRAY, array(STRING, 1, text(b"\xff")))]), "item 0 of"),
    "unknown item type": (build([key("k", ARRAY, array(77, 1, b"\0" * 8))]), "unknown value type 77"),
    "arrays in arrays": (build([key("k", ARRAY, array(ARRAY, 1, b"") * 64)]), "unknown value type 9"),
    "alignment 0": (build([key("general.alignment", U32, struct.pack("<I", 0))]), "power of two"),
    "alignment 48": (build([key("general.alignment", U32, struct.pack("<I", 48))]), "power of two"),
    "alignment text": (build([key("general.alignment", STRING, text("32"))]), "power of two"),
    "no dimensions": (build(tensors=[tensor("a", [], 0, 0)]), "0 dimensions"),
    "five dimensions": (build(tensors=[tensor("a", [1] * 5, 0, 0)]), "5 dimensions"),
    "2^32 dimensions": (build(tensors=[tensor("a", [8], 0, 0, num_dims=0xFFFFFFFF)]), "dimensions"),
    "empty dimension": (build(tensors=[tensor("a", [8, 0], 0, 0)]), "empty dimension"),
    "product overflow": (build(tensors=[tensor("a", [1 << 63, 4], 0, 0)]), "past the end"),
    "product wraps to 0": (build(tensors=[tensor("a", [1 << 32, 1 << 32], 0, 0)]), "past the end"),
    "unknown type": (build(tensors=[tensor("a", [8], 99, 0)]), "unknown type 99"),
    "removed type": (build(tensors=[tensor("a", [32], 4, 0)]), "unknown type 4"),
    "half a block": (build(tensors=[tensor("a", [48], 8, 0)]), "do not fit blocks of 32"),
    "data cut off": (build(tensors=[tensor("a", [65], 0, 0)]), "past the end"),
    "offset past the end": (build(tensors=[tensor("a", [8], 0, 1 << 40)]), "past the end"),
    "offset 2^64 - 32": (build(tensors=[tensor("a", [8], 0, (1 << 64) - 32)]), "past the end"),
    "offset not aligned": (build(tensors=[tensor("a", [8], 0, 8)]), "not aligned"),
    "tensors overlap": (build(tensors=[tensor("a", [16], 0, 0), tensor("b", [8], 0, 32)]), "overlap"),
    "tensor twice": (build(tensors=[GOOD, tensor("a", [8], 0, 32)]), "given twice"),
    "tensor without name": (build(tensors=[tensor("", [8], 0, 0)]), "without a name"),
    "split": (build([key("split.count", 2, struct.pack("<H", 3))], [GOOD]), "split GGUF"),
}


@pytest.mark.parametrize("name", BROKEN_GGUF)
def test_broken_gguf_gives_one_line_naming_file_and_reason(tmp_path, name):
    content, reason = BROKEN_GGUF[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(ModelError, match=reason) as caught:
        open_checkpoint(path)
    assert time.perf_counter() - start < 1.0
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_the_unbroken_form_of_the_broken_files_opens(tmp_path):
    path = tmp_path / "model.gguf"
    nested = key("n", ARRAY, array(ARRAY, 2, array(U32, 1, b"\1\0\0\0") + array(BOOL, 2, b"\0\1")))
    names = key("s", ARRAY, array(STRING, 2, text("é") + text("")))
    path.write_bytes(build([ARCH, nested, names], [GOOD, tensor("b", [32, 2], 8, 64)]))
    checkpoint = open_checkpoint(path)
    expected = {"general.architecture": "llama", "n": [[1], [False, True]], "s": ["é", ""]}
    assert checkpoint.metadata == expected
    assert checkpoint.tensors["b"].shape == (2, 32) and checkpoint.tensors["b"].nbytes == 68
    assert checkpoint.tensors["b"].offset == os.path.getsize(path) - 256 + 64


def test_every_cut_and_every_flipped_byte_of_a_header_opens_or_gives_a_model_error(tmp_path):
    content = build([ARCH, key("v", ARRAY, array(STRING, 2, text("ab") + text("c")))], [GOOD])
    path = tmp_path / "model.gguf"
    refused = 0
    for position in range(len(content) - 256):
        flipped = bytearray(content)
        flipped[position] ^= 0xFF
        for variant in (content[:position], bytes(flipped)):
            path.write_bytes(variant)
            try:
                open_checkpoint(path).tensors
            except ModelError:
                refused += 1
    assert refused > len(content) - 256


def test_forged_counts_do_not_cost_memory(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(build([key("k", ARRAY, array(0, 1 << 23, b"\0" * (1 << 23)))] * 3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError):
        open_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10


def test_block_sizes_are_those_of_the_gguf_package():
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: theirs.get(kind) for kind in BLOCK_TYPES} == BLOCK_TYPES
    assert set(theirs) >= set(BLOCK_TYPES)


def assert_equals_reference(path):
    checkpoint = open_checkpoint(path)
    reader = gguf.GGUFReader(path)
    fields = {name: value for name, value in reader.fields.items() if not name.startswith("GGUF.")}
    assert checkpoint.metadata.keys() == fields.keys()
    for name, value in fields.items():
        assert checkpoint.metadata[name] == value.contents(), name
    assert list(checkpoint.tensors) == [theirs.name for theirs in reader.tensors]
    for theirs in reader.tensors:
        ours = checkpoint.tensors[theirs.name]
        assert ours.shape == tuple(int(size) for size in reversed(theirs.shape))
        found = (ours.dtype, ours.offset, ours.nbytes)
        assert found == (theirs.tensor_type.name, theirs.data_offset, theirs.n_bytes)


def test_real_llama_header_equals_the_reference_reader(smollm2):
    assert_equals_reference(smollm2)


def test_vocabulary_files_equal_the_reference_reader(vocabs_dir):
    for name in ("llama-spm", "bert-bge"):
        assert_equals_reference(vocabs_dir / f"ggml-vocab-{name}.gguf")


def test_real_header_with_a_large_vocabulary_opens_in_well_under_a_second(qwen_coder):
    start = time.process_time()
    checkpoint = open_checkpoint(qwen_coder)
    assert time.process_time() - start < 1.0
    assert len(checkpoint.metadata["tokenizer.ggml.tokens"]) == 151_936
    assert len(checkpoint.tensors) == 291 and checkpoint.tensors["output.weight"].dtype == "Q8_0"


def test_opening_a_gguf_loads_no_tensor_library(smollm2):
    code = (
        "import sys; from crane.models.files import open_checkpoint;"
        "from crane.models.config import load_config;"
        f"load_config(open_checkpoint({str(smollm2)!r}));"
        "print(sorted({'torch', 'numpy', 'gguf', 'safetensors', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- safetensors


def raw_safetensors(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ONE = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
TWICE = b"{" + ONE + b"," + ONE + b"}"
BROKEN_SAFETENSORS = {
    "empty": (b"", "too short"),
    "length past the end": (raw_safetensors({}, length=1 << 40), "cannot be right"),
    "length 2^64 - 1": (raw_safetensors({}, length=(1 << 64) - 1), "cannot be right"),
    "not json": (raw_safetensors(b"{nope}"), "not valid JSON"),
    "not utf-8": (raw_safetensors(b'{"\xff": 1}'), "not valid JSON"),
    "deep json": (raw_safetensors(b"[" * 200_000), "not valid JSON"),
    "not an object": (raw_safetensors(b"[1]"), "JSON object"),
    "name twice": (raw_safetensors(TWICE, b"\0" * 8), "given twice"),
    "entry is text": (raw_safetensors({"a": "x"}), "must have dtype"),
    "no offsets": (raw_safetensors({"a": {"dtype": "F32", "shape": [2]}}), "must have dtype"),
    "unknown dtype": (raw_safetensors({"a": entry("F4")}, b"\0" * 8), "unsupported dtype"),
    "dtype is a list": (raw_safetensors({"a": entry(["F32"])}, b"\0" * 8), "unsupported dtype"),
    "negative size": (raw_safetensors({"a": entry(shape=[-2])}, b"\0" * 8), "malformed shape"),
    "boolean size": (raw_safetensors({"a": entry(shape=[True])}, b"\0" * 4), "malformed shape"),
    "float size": (raw_safetensors({"a": entry(shape=[2.0])}, b"\0" * 8), "malformed shape"),
    "huge size": (raw_safetensors({"a": entry(shape=[1 << 62])}, b"\0" * 8), "malformed shape"),
    "size and offsets differ": (raw_safetensors({"a": entry(shape=[3])}, b"\0" * 8), "do not fit"),
    "reversed offsets": (raw_safetensors({"a": entry(offsets=[8, 0])}, b"\0" * 8), "do not fit"),
    "hole": (raw_safetensors({"a": entry(), "b": entry(offsets=[16, 24])}, b"\0" * 24), "hole"),
    "overlap": (raw_safetensors({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12), "overlaps"),
    "data cut off": (raw_safetensors({"a": entry()}, b"\0" * 7), "truncated"),
    "data left over": (raw_safetensors({"a": entry()}, b"\0" * 9), "holds"),
}


@pytest.mark.parametrize("name", BROKEN_SAFETENSORS)
def test_broken_safetensors_gives_one_line_naming_file_and_reason(tmp_path, name):
    content, reason = BROKEN_SAFETENSORS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(ModelError, match=reason) as caught:
        open_checkpoint(tmp_path).tensors
    assert time.perf_counter() - start < 1.0
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def shards(folder, weight_map, **files):
    for name, names in files.items():
        save_file({each: np.arange(4, dtype=np.float32) for each in names}, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return open_checkpoint(folder)


def test_shards_give_the_tensors_of_all_files(tmp_path):
    checkpoint = shards(tmp_path, {"x": "one.safetensors", "y": "two.safetensors"}, one=["x"], two=["y"])
    assert checkpoint.format == "safetensors" and checkpoint.metadata == {}
    info = checkpoint.tensors["y"]
    assert (info.path.name, info.dtype, info.shape, info.nbytes) == ("two.safetensors", "F32", (4,), 16)
    with open(info.path, "rb") as file:
        file.seek(info.offset)
        assert np.frombuffer(file.read(16), dtype=np.float32).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "weight_map, reason",
    [
        ({"x": "../one.safetensors"}, "beside it"),
        ({"x": "/one.safetensors"}, "beside it"),
        ({"x": "sub\\one.safetensors"}, "beside it"),
        ({"x": "one.bin"}, "beside it"),
        ({"x": 3}, "beside it"),
        ({}, "weight_map"),
        (["one.safetensors"], "weight_map"),
        ({"x": "one.safetensors", "y": "absent.safetensors"}, "missing"),
        ({"x": "one.safetensors", "y": "one.safetensors"}, "lacks tensor 'y'"),
        ({"x": "one.safetensors", "z": "two.safetensors"}, "is in one.safetensors too|not listed"),
    ],
)
def test_an_index_that_lies_or_leaves_the_folder_is_refused(tmp_path, weight_map, reason):
    with pytest.raises(ModelError, match=reason):
        shards(tmp_path, weight_map, one=["x"], two=["x", "z"]).tensors


def test_several_safetensors_files_need_an_index(tmp_path):
    for name in ("a", "b"):
        save_file({name: np.zeros(2, dtype=np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match="2 .safetensors files and no model.safetensors.index.json"):
        open_checkpoint(tmp_path).tensors


# ---- folders


def test_a_folder_with_one_gguf_is_that_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(build([ARCH], [GOOD]))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "gguf" and checkpoint.path.name == "m.gguf"
    assert checkpoint.read_json("config.json") is None and checkpoint.read_text("config.json") is None
    (tmp_path / "n.gguf").write_bytes(build([ARCH], [GOOD]))
    with pytest.raises(ModelError, match="holds 2 .gguf files"):
        open_checkpoint(tmp_path)


def test_the_format_setting_decides_between_safetensors_and_gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(build([ARCH], [GOOD]))
    save_file({"a": np.zeros(2, dtype=np.float32)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).format == "safetensors"
    assert open_checkpoint(tmp_path, "gguf").format == "gguf"
    with pytest.raises(ModelError, match="needs a folder"):
        open_checkpoint(tmp_path / "m.gguf", "safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_weights_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ModelError, match="pickle weights are refused"):
            open_checkpoint(path)


def test_paths_that_hold_no_model_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    for path, reason in [
        (tmp_path / "absent", "No such file"),
        (tmp_path / "pipe.gguf", "regular file"),
        (tmp_path, "regular file"),
        ("", "model path"),
        ("a\0b", "model path"),
    ]:
        with pytest.raises(ModelError, match=reason):
            open_checkpoint(path)
    os.remove(tmp_path / "pipe.gguf")
    with pytest.raises(ModelError, match="neither .safetensors nor .gguf"):
        open_checkpoint(tmp_path)


def test_sibling_files_are_read_from_the_folder_only(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(raw_safetensors({"a": entry()}, b"\0" * 8))
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "list.json").write_text("[1]")
    (folder / "broken.json").write_text("{")
    (folder / "latin.txt").write_bytes(b"\xe9")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.read_json("config.json") == {"hidden_size": 8}
    assert checkpoint.read_json("absent.json") is None
    for name, reason in [
        ("../secret.json", "not in the folder"),
        ("list.json", "JSON object"),
        ("broken.json", "not valid JSON"),
        ("latin.txt", "not UTF-8"),
    ]:
        with pytest.raises(ModelError, match=reason):
            checkpoint.read_json(name)
