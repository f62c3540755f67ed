"""Checkpoint: one view of a safetensors folder or a .gguf file. Torch-free.

Tells what is in the files and where; reads no tensor. Headers are validated here,
against the files, whatever library reads the tensors later. Pickle is never opened.
"""

import json
import math
import re
import stat
import struct
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from crane.errors import ModelError
from crane.models.gguf_header import TensorInfo, read_gguf_header, show

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_TEXT_BYTES = 256 << 20
MAX_SAFETENSORS_HEADER_BYTES = 16 << 20
MAX_SHARDS = 4096

# bytes of one element; the sub-byte types have no whole number and are refused by name
_ELEMENT_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
    "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1, "C64": 8,
}  # fmt: skip

_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model on disk.

    path: the folder (safetensors) or the file (GGUF). metadata: GGUF key-values as
    Python values; empty for safetensors.
    """

    path: Path
    format: str  # "safetensors" | "gguf"
    metadata: dict[str, object] = field(default_factory=dict, repr=False)
    _gguf_tensors: dict[str, TensorInfo] | None = field(default=None, repr=False)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by its name in the file. Raises ModelError when a header is broken."""
        if self._gguf_tensors is not None:
            return self._gguf_tensors
        return _safetensors_index(self)

    def read_text(self, name: str) -> str | None:
        """The text of file `name` in the folder; None when absent or for GGUF. Raises ModelError."""
        if self.format == "gguf":
            return None
        path = self.path / name
        if not _is_plain_name(name):
            raise ModelError(f"{self.path}: refusing to read {show(name)}: it is not in the folder")
        if not path.exists():
            return None
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ModelError(f"{path}: not a regular file")
            if status.st_size > MAX_TEXT_BYTES:
                raise ModelError(f"{path}: {status.st_size} bytes, more than crane reads ({MAX_TEXT_BYTES})")
            return path.read_bytes().decode()
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ModelError(f"{path}: not UTF-8 at byte {error.start}") from None

    def read_json(self, name: str) -> dict | None:
        """The JSON object in file `name` of the folder; None when absent or for GGUF. Raises ModelError."""
        text = self.read_text(name)
        return None if text is None else _json_object(text, self.path / name)


def open_checkpoint(path: str | Path, format: str = "auto") -> Checkpoint:
    """The checkpoint at `path`: a folder, or a .gguf file.

    format: "auto" | "safetensors" | "gguf". A folder without safetensors that holds
    exactly one .gguf counts as that file. Raises ModelError naming file and reason.
    """
    if format not in ("auto", "safetensors", "gguf"):
        raise ModelError(f"format must be auto, safetensors or gguf, got {show(str(format))}")
    if not str(path) or "\0" in str(path):
        raise ModelError(f"model path must be a folder or a .gguf file, got {show(str(path))}")
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return _open_folder(path, format)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise ModelError(f"{path}: neither a folder nor a regular file")
    if path.suffix in PICKLE_SUFFIXES:
        raise ModelError(f"{path}: pickle weights are refused; convert them to safetensors")
    if path.suffix == ".safetensors":
        raise ModelError(f"{path}: give the folder that holds it, crane needs its config.json too")
    if format == "safetensors":
        raise ModelError(f"{path}: format is safetensors, which needs a folder, not a file")
    return _open_gguf(path)


def _open_folder(path: Path, format: str) -> Checkpoint:
    names = sorted(entry.name for entry in path.iterdir())
    safetensors = [name for name in names if name.endswith(".safetensors") or name == INDEX_NAME]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if format == "gguf" or (format == "auto" and ggufs and not safetensors):
        if len(ggufs) == 1:
            return _open_gguf(path / ggufs[0])
        found = f"holds {len(ggufs)} .gguf files: give the path of one" if ggufs else "holds no .gguf file"
        raise ModelError(f"{path}: {found}")
    if safetensors:
        return Checkpoint(path, "safetensors")
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise ModelError(f"{path / pickles[0]}: pickle weights are refused; convert them to safetensors")
    raise ModelError(f"{path}: holds neither .safetensors nor .gguf weights")


def _open_gguf(path: Path) -> Checkpoint:
    if not stat.S_ISREG(path.stat().st_mode):
        raise ModelError(f"{path}: not a regular file")
    metadata, tensors = read_gguf_header(path)
    num_parts = metadata.get("split.count", 1)
    if num_parts not in (0, 1):
        raise ModelError(f"{path}: one of {show(str(num_parts))} parts of a split GGUF: merge the parts")
    return Checkpoint(path, "gguf", metadata, tensors)


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and len(name) < 200 and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _json_object(text: str | bytes, path: Path, pairs_hook=None) -> dict:
    try:
        value = json.loads(text, object_pairs_hook=pairs_hook)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, ValueError) else "nested too deeply"
        raise ModelError(f"{path}: not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    if _HALF_PAIR.search(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ModelError(f"{path}: holds half of a surrogate pair, which is not text") from None
    return value


def _safetensors_index(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """All tensors of a folder: model.safetensors, or the shards of the index, or the only file."""
    folder = checkpoint.path
    if (folder / "model.safetensors").exists():
        return _safetensors_header(folder / "model.safetensors")
    index = checkpoint.read_json(INDEX_NAME)
    if index is None:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise ModelError(f"{folder}: holds {len(files)} .safetensors files and no {INDEX_NAME}")
        return _safetensors_header(files[0])
    index_path = folder / INDEX_NAME
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index_path}: weight_map must be an object of tensor names to file names")
    for shard in weight_map.values():
        if not _is_plain_name(shard) or not shard.endswith(".safetensors"):
            raise ModelError(f"{index_path}: {show(str(shard))} is not a .safetensors file beside it")
    shards = sorted(set(weight_map.values()))
    if len(shards) > MAX_SHARDS:
        raise ModelError(f"{index_path}: {len(shards)} shards cannot be right")
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        if not (folder / shard).exists():
            raise ModelError(f"{folder / shard}: named in {INDEX_NAME} but missing")
        for name, tensor in _safetensors_header(folder / shard).items():
            if name in tensors:
                raise ModelError(f"{folder / shard}: tensor {show(name)} is in {tensors[name].path.name} too")
            if weight_map.get(name) != shard:
                raise ModelError(f"{folder / shard}: tensor {show(name)} is not listed in {INDEX_NAME}")
            tensors[name] = tensor
    missing = next((name for name in weight_map if name not in tensors), None)
    if missing is not None:
        raise ModelError(f"{folder / weight_map[missing]}: lacks tensor {show(missing)} of {INDEX_NAME}")
    return tensors


def _safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one .safetensors file, which must fill it without hole or overlap."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            if size < 8:
                raise ModelError(f"{path}: too short for a safetensors file")
            (num_bytes,) = struct.unpack("<Q", file.read(8))
            if num_bytes > min(size - 8, MAX_SAFETENSORS_HEADER_BYTES):
                raise ModelError(f"{path}: a header of {num_bytes} bytes cannot be right in a file of {size}")
            raw = file.read(num_bytes)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    header = _json_object(raw, path, lambda pairs: _without_duplicates(pairs, path))
    header.pop("__metadata__", None)
    tensors = {name: _safetensors_entry(name, entry, 8 + num_bytes, path) for name, entry in header.items()}
    end = 8 + num_bytes
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            raise ModelError(f"{path}: tensor {show(tensor.name)} overlaps another or leaves a hole")
        end += tensor.nbytes
    if end != size:
        raise ModelError(f"{path}: holds {size} bytes, its header describes {end} (truncated download?)")
    return tensors


def _safetensors_entry(name: str, entry: object, start: int, path: Path) -> TensorInfo:
    fail = f"{path}: tensor {show(name)}"
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ModelError(f"{fail} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ELEMENT_BYTES:
        raise ModelError(f"{fail} has unsupported dtype {show(str(dtype))}")
    for label, values in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(values, list) or len(values) > 8 or not all(map(_is_size, values)):
            raise ModelError(f"{fail} has a malformed {label}")
    nbytes = math.prod(shape) * _ELEMENT_BYTES[dtype]
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise ModelError(f"{fail}: data_offsets {offsets} do not fit {dtype} {shape} of {nbytes} bytes")
    return TensorInfo(name, dtype, tuple(shape), path, start + offsets[0], nbytes)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _without_duplicates(pairs: list, path: Path) -> dict:
    out = {}
    for name, value in pairs:
        if name in out:
            raise ModelError(f"{path}: {show(name)} is given twice in the header")
        out[name] = value
    return out
