"""The header of a GGUF file: metadata and where each tensor lies. Torch-free.

Every count, size and offset is held against the file before it is used, so a
broken or hostile file gives one ModelError, quickly and without allocating more
than it brings. Layout: magic, version, counts, key-values, tensor records, then
the tensors themselves at multiples of the alignment.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from crane.errors import ModelError

MAX_DIMS = 4
MAX_KEYS = 65_536
MAX_TENSORS = 1 << 20
MAX_NAME_BYTES = 4096
MAX_ARRAY_ITEMS = 1 << 24  # all arrays of one file together; a list costs 8 bytes an item
MAX_ARRAY_DEPTH = 4
MAX_ALIGNMENT = 1 << 20

# ggml type number -> name, elements in one block, bytes of one block
BLOCK_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U64 = struct.Struct("<Q").unpack_from


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. shape is row-major ([out, in]); offset counts from the start of `path`."""

    name: str
    dtype: str  # "F32" "F16" "BF16" "Q4_0" "Q4_K" ...
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


def read_gguf_header(path: Path) -> tuple[dict[str, object], dict[str, TensorInfo]]:
    """Metadata and tensors of one GGUF file. Raises ModelError naming file and reason."""
    try:
        with open(path, "rb") as file:
            if file.seek(0, 2) < 24:
                raise ModelError(f"{path}: too short for a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).read()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None


def show(text: str) -> str:
    """A name out of a file, quoted, on one line and short, fit for a message."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")


class _Reader:
    """A position in a mapped file; each method reads one thing there and moves on."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.size = len(data)
        self.pos = 0
        self.num_items = 0

    def fail(self, reason: str) -> ModelError:
        return ModelError(f"{self.path}: {reason}")

    def read(self) -> tuple[dict[str, object], dict[str, TensorInfo]]:
        num_tensors, num_keys = self.counts()
        metadata: dict[str, object] = {}
        alignment = 32
        for _ in range(num_keys):
            key = self.string("a metadata key")
            if not key or key in metadata:
                raise self.fail(f"metadata key {show(key)} is {'given twice' if key else 'empty'}")
            kind = self.scalar("I", f"the type of {show(key)}")
            metadata[key] = self.value(kind, key)
            if key == "general.alignment":
                alignment = self.alignment(metadata[key])
        records = [self.tensor_record() for _ in range(num_tensors)]
        start = -(-self.pos // alignment) * alignment
        return metadata, self.place(records, start, alignment)

    def counts(self) -> tuple[int, int]:
        """Check magic and version; give the numbers of tensors and keys."""
        if self.take(4, "the magic") != b"GGUF":
            raise self.fail("not a GGUF file (wrong magic)")
        version = self.scalar("I", "the version")
        if version not in (2, 3):
            if version & 0xFFFF == 0:
                raise self.fail("big-endian GGUF files are not supported")
            raise self.fail(f"GGUF version {version} is not supported (supported: 2, 3)")
        num_tensors, num_keys = self.scalar("Q", "the counts"), self.scalar("Q", "the counts")
        # the smallest record of each kind: a key with one byte, a tensor with one dimension
        if num_keys > min(MAX_KEYS, self.size // 13):
            raise self.fail(f"{num_keys} metadata keys cannot be right")
        if num_tensors > min(MAX_TENSORS, self.size // 32):
            raise self.fail(f"{num_tensors} tensors cannot be right")
        return num_tensors, num_keys

    def take(self, num_bytes: int, what: str) -> bytes:
        end = self.pos + num_bytes
        if end > self.size:
            raise self.fail(f"file ends inside {what}")
        piece = self.data[self.pos:end]
        self.pos = end
        return piece

    def scalar(self, code: str, what: str):
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str, max_bytes: int = MAX_NAME_BYTES) -> str:
        num_bytes = self.scalar("Q", what)
        if num_bytes > max_bytes:
            raise self.fail(f"{what} of {num_bytes} bytes at byte {self.pos - 8} cannot be right")
        try:
            return self.take(num_bytes, what).decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} at byte {self.pos - num_bytes} is not UTF-8") from None

    def value(self, kind: int, key: str, depth: int = 0):
        """One metadata value of ggml value type `kind`, as a Python value."""
        what = f"the value of {show(key)}"
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind == _BOOL:
            return self.booleans(1, key)[0]
        if kind == _STRING:
            return self.string(what, max_bytes=self.size)
        if kind == _ARRAY and depth < MAX_ARRAY_DEPTH:
            return self.array(key, depth)
        raise self.fail(f"metadata key {show(key)} has unknown value type {kind}")

    def array(self, key: str, depth: int) -> list:
        what = f"the array {show(key)}"
        kind, count = self.scalar("I", what), self.scalar("Q", what)
        smallest = {_STRING: 8, _ARRAY: 12}.get(kind) or struct.calcsize("<" + _SCALARS.get(kind, "B"))
        self.num_items += count
        if count * smallest > self.size - self.pos or self.num_items > MAX_ARRAY_ITEMS:
            raise self.fail(f"{what} claims {count} items, more than the file can hold or crane reads")
        if kind in _SCALARS:
            return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self.take(count * smallest, what)))
        if kind == _STRING:
            return self.strings(count, what)
        if kind == _BOOL:
            return self.booleans(count, key)
        return [self.value(kind, key, depth + 1) for _ in range(count)]

    def booleans(self, count: int, key: str) -> list[bool]:
        values = self.take(count, f"the value of {show(key)}")
        if values.translate(None, b"\0\1"):
            raise self.fail(f"metadata key {show(key)} holds a boolean that is neither 0 nor 1")
        return [value == 1 for value in values]

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings in a row: the vocabulary and merges, so the hot loop of the header."""
        data, pos, size, out = self.data, self.pos, self.size, []
        append = out.append
        try:
            for _ in range(count):
                start = pos + 8
                pos = start + _U64(data, pos)[0]
                if pos > size:
                    raise self.fail(f"file ends inside {what}")
                append(data[start:pos].decode())
        except struct.error:
            raise self.fail(f"file ends inside {what}") from None
        except UnicodeDecodeError:
            raise self.fail(f"item {len(out)} of {what} is not UTF-8") from None
        self.pos = pos
        return out

    def alignment(self, value: object) -> int:
        if type(value) is not int or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
            raise self.fail(f"general.alignment must be a power of two, got {show(str(value))}")
        return value

    def tensor_record(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """Name, dtype, row-major shape, size in bytes and offset of the next tensor."""
        name = self.string("a tensor name")
        num_dims = self.scalar("I", f"tensor {show(name)}")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.fail(f"tensor {show(name)} has {num_dims} dimensions (supported: 1 to {MAX_DIMS})")
        dims = struct.unpack(f"<{num_dims}Q", self.take(8 * num_dims, f"tensor {show(name)}"))
        kind, offset = struct.unpack("<IQ", self.take(12, f"tensor {show(name)}"))
        if kind not in BLOCK_TYPES:
            raise self.fail(f"tensor {show(name)} has unknown type {kind}")
        dtype, block_elements, block_bytes = BLOCK_TYPES[kind]
        if 0 in dims:
            raise self.fail(f"tensor {show(name)} has an empty dimension: {list(dims)}")
        if dims[0] % block_elements:
            raise self.fail(f"tensor {show(name)}: rows of {dims[0]} do not fit blocks of {block_elements}")
        return name, dtype, dims[::-1], math.prod(dims) // block_elements * block_bytes, offset

    def place(self, records: list, start: int, alignment: int) -> dict[str, TensorInfo]:
        """Absolute places of all tensors, each inside the file, aligned and alone."""
        tensors: dict[str, TensorInfo] = {}
        for name, dtype, shape, nbytes, offset in records:
            if not name or name in tensors:
                raise self.fail(f"tensor {show(name)} is {'given twice' if name else 'without a name'}")
            if offset % alignment:
                raise self.fail(f"tensor {show(name)} at offset {offset} is not aligned to {alignment} bytes")
            if start + offset + nbytes > self.size:
                raise self.fail(f"tensor {show(name)} ends past the end of the file (truncated download?)")
            tensors[name] = TensorInfo(name, dtype, shape, self.path, start + offset, nbytes)
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in zip(ordered, ordered[1:]):
            if before.offset + before.nbytes > after.offset:
                raise self.fail(f"tensors {show(before.name)} and {show(after.name)} overlap")
        return tensors
