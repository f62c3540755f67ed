"""Weights in the layout of the C kernels, and products with them.

    y = x @ weight.T + bias

A matrix in GGUF blocks keeps its codes of 4, 5, 6 or 8 bits, in another order, beside float16 scales. Products with
few rows round x to 8 bits, 32 values a scale; products with more rows are exact in x and round the weight to
bfloat16, as dequantising to bfloat16 does. A bfloat16 matrix is only laid out anew; nothing is rounded.
"""

import contextlib
import ctypes
import errno
import itertools
import math
import mmap
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from crane.kernels import native
from crane.kernels.blocks import unpack

# (bits, scales per 32 columns, whether there are offsets, what makes the codes unsigned) of each GGUF type
_KINDS = {
    "Q8_0": (8, 1, 0, 128), "IQ4_NL": (8, 1, 0, 128), "IQ4_XS": (8, 1, 0, 128),
    "Q4_0": (4, 1, 0, 8), "Q4_1": (4, 1, 1, 0), "Q5_0": (5, 1, 0, 16), "Q5_1": (5, 1, 1, 0),
    "Q2_K": (4, 2, 1, 0), "Q3_K": (4, 2, 0, 8), "Q4_K": (4, 1, 1, 0), "Q5_K": (5, 1, 1, 0), "Q6_K": (6, 2, 0, 32),
}  # fmt: skip
# types whose blocks C takes apart itself, in the order of their numbers there; `unpack` does it for the others
_IN_C = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "BF16"]
PANEL_ROWS, _TILE_COLUMNS = 16, 32
# Rows of x from which AMX may be faster than integers, although it widens the weight first: what is tried.
_AMX_ROWS = (4, 6, 7, 8, 10, 12, 16, 24, 32)
_NEVER = 0
_MOST_SCREENED = 16384  # columns for which screen.c bounds what it misses
_BLOCK_ROWS = 64  # what a screen spares, or not, together
_CACHE_BYTES = 6 << 20  # more than two cores keep for themselves
_ROOM_BYTES = 64 << 20
_room = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True)
class Stored:
    """Rows of a matrix in an open file, one behind the other, of a type that `is_read_by_c`."""

    path: Path
    descriptor: int
    offset: int  # of the first row
    num_rows: int
    row_bytes: int

    def __len__(self) -> int:
        return self.num_rows


@dataclass
class PackedWeight:
    """A matrix of shape [out_features, in_features] in panels. Keeps no other copy of it."""

    panels: Tensor  # uint8
    struct: native.Weight
    bias: Tensor | None = None  # float32 [out_features]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.struct.num_rows, self.struct.num_columns

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the matrix, an embedding's look-up. ids: int64 [num_rows]. Returns [num_rows, in_features]."""
        out = torch.empty(len(ids), self.struct.num_columns, dtype=dtype)
        native.library().crane_rows(
            ctypes.byref(self.struct), ids.contiguous().data_ptr(), len(ids), out.data_ptr(), native.DTYPES[dtype]
        )
        return out


def is_packable(kind: str) -> bool:
    """Whether panels can keep a GGUF type as it is."""
    return kind in _KINDS


def is_read_by_c(kind: str) -> bool:
    """Whether rows of a GGUF type, or of "BF16", can be packed as they lie in the file."""
    return kind in _IN_C


def can_pack(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a matrix of a GGUF type, or of "BF16", can be kept in panels for inputs of `dtype`."""
    if native.library() is None or len(shape) != 2 or shape[1] % _TILE_COLUMNS:
        return False
    if kind == "BF16":
        return dtype == torch.bfloat16 and native.has_amx()
    return kind in _KINDS and dtype in native.DTYPES


def pack(
    kind: str, num_rows: int, columns: int, pieces: Iterable[Tensor | Stored], paired: bool = False
) -> PackedWeight:
    """A matrix which `can_pack`, from its rows in order. Every piece but the last has a multiple of 16 rows.

    pieces: GGUF blocks as uint8 [count, row_bytes]; for "BF16" bfloat16 [count, columns]; or where either lies.
    paired: whether it is gate and up of an MLP, in halves of whole panels, for `PackedLinear.gated`.
    Raises OSError where a file cannot be read.
    """
    struct = native.Weight(None, None, num_rows, columns, *_KINDS.get(kind, (16, 0, 0, 0)), paired)
    address = ctypes.byref(struct)
    panels = _allocate(native.library().crane_weight_bytes(address))
    struct.panels = panels.data_ptr()
    start = 0
    for piece in pieces:
        assert start % PANEL_ROWS == 0, "pieces are whole panels"
        if isinstance(piece, Stored):
            _pack_stored(address, kind, piece, start)
        elif kind in _IN_C:
            piece = piece.contiguous()
            number = _IN_C.index(kind) + 1
            native.library().crane_pack(
                address, number, piece.data_ptr(), piece.shape[1], None, None, start, len(piece)
            )
        else:
            codes = unpack(kind, piece)
            given = [None if each is None else each.contiguous() for each in (codes.codes, codes.scale, codes.offset)]
            places = [None if each is None else each.data_ptr() for each in given]
            native.library().crane_pack(address, 0, places[0], 0, *places[1:], start, len(piece))
        start += len(piece)
    assert start == num_rows
    return PackedWeight(panels, struct)


def _pack_stored(weight, kind: str, piece: Stored, start: int) -> None:
    """Read and pack rows from `start` on. weight: its struct's address. Raises OSError."""
    number = native.library().crane_pack_file(
        weight, _IN_C.index(kind) + 1, piece.descriptor, piece.offset, piece.row_bytes, start, len(piece)
    )
    if number < 0:
        raise OSError(errno.ENODATA, "the file became shorter while it was read", str(piece.path))
    if number:
        raise OSError(number, os.strerror(number), str(piece.path))


def _allocate(nbytes: int) -> Tensor:
    """Memory for panels, from large pieces in huge pages: small pages cost 5 to 10 % of the speed they are read at."""
    global _room
    if nbytes > len(_room):
        _room = in_huge_pages(max(nbytes, _ROOM_BYTES))
    taken, _room = _room[:nbytes], _room[-(-nbytes // 64) * 64 :]
    return taken


def in_huge_pages(nbytes: int) -> Tensor:
    """Memory of zeros, uint8 [nbytes]; in huge pages where the system has them."""
    piece = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            piece.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(piece, dtype=torch.uint8)


def _measure_amx_rows(kind: tuple[int, int, int], num_rows: int, columns: int) -> int:
    """The least rows of x for which AMX multiplies such a weight faster than integers do. Takes 10 to 40 ms."""
    struct = native.Weight(None, None, num_rows, columns, *kind, 0)
    call, address = native.library().crane_linear, ctypes.addressof(struct)
    nbytes = native.library().crane_weight_bytes(address)
    # written, as untouched memory is one page over and over; so many copies that none is still in a core's cache
    copies = itertools.cycle(torch.empty(1 + _CACHE_BYTES // nbytes, nbytes, dtype=torch.uint8).zero_())
    x = torch.randn(_AMX_ROWS[-1], columns).bfloat16()
    out = torch.empty(_AMX_ROWS[-1], num_rows, dtype=torch.bfloat16)

    def seconds(rows: int, amx_rows: int) -> float:
        struct.panels, struct.amx_rows = next(copies).data_ptr(), amx_rows
        started = time.perf_counter()
        call(address, x.data_ptr(), rows, 1, out.data_ptr(), num_rows, 1)
        return time.perf_counter() - started

    for rows in _AMX_ROWS:
        integers, amx = zip(*((seconds(rows, _NEVER), seconds(rows, 1)) for _ in range(12)))
        if min(amx) < min(integers):
            return rows
    return _NEVER


def _amx_rows(kind: tuple[int, int, int], *shape: int) -> int:
    """From how many rows of x on AMX multiplies a weight of this kind (bits, groups, has_offset) and about this shape.

    Measured for each kind and, rounded to powers of two, shape; see `native.measured`.
    """
    if kind[0] == 16:
        return 1
    if not native.has_amx():
        return _NEVER
    sides = [min(max(1 << round(math.log2(side)), 512), 4096) for side in shape]
    return native.measured("amx_rows {}.{}.{} {}x{}".format(*kind, *sides), lambda: _measure_amx_rows(kind, *sides))


class PackedLinear:
    """y = x @ weight.T + bias for matrices one below the other, of the same or of different types."""

    def __init__(self, parts: list[PackedWeight], bias: Tensor | None = None):
        """bias: [out_features] of all parts."""
        self.parts = parts
        self.out_features = sum(part.shape[0] for part in parts)
        self.in_features = parts[0].shape[1]
        self._call = native.library().crane_linear
        self.screen: native.Screen | None = None
        start = 0
        self._plan = []  # (the struct's address, first output feature)
        for part in parts:
            struct = part.struct
            if bias is not None:
                part.bias = bias[start : start + part.shape[0]].float().contiguous()
                struct.bias = part.bias.data_ptr()
            struct.amx_rows = _amx_rows((struct.bits, struct.groups, struct.has_offset), *part.shape)
            self._plan.append((ctypes.addressof(struct), start))
            start += part.shape[0]

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x: [num_rows, in_features]. Returns [num_rows, out_features] of `dtype`, else of x's."""
        num_rows, width = x.shape[0], self.out_features
        x = x.contiguous()
        out = torch.empty(num_rows, width, dtype=dtype or x.dtype)
        code, out_code, at, size = native.DTYPES[x.dtype], native.DTYPES[out.dtype], out.data_ptr(), out.itemsize
        for struct, start in self._plan:
            self._call(struct, x.data_ptr(), num_rows, code, at + start * size, width, out_code)
        return out

    @property
    def is_paired(self) -> bool:
        """Whether it can be `gated`."""
        return bool(self.parts[0].struct.is_paired)

    def gated(self, x: Tensor) -> Tensor:
        """`silu_mul` of y, of which no more is written: [num_rows, out_features / 2] of x's dtype."""
        ((struct, _),) = self._plan
        x = x.contiguous()
        out = torch.empty(len(x), self.out_features // 2, dtype=x.dtype)
        native.library().crane_gated(struct, x.data_ptr(), len(x), native.DTYPES[x.dtype], out.data_ptr())
        return out

    def add_screen(self, seed: int | None = None) -> None:
        """Let `best` read a copy in 4 bits first, and little else, of a weight of one part that has many more.

        seed: of 64 bits, for how the copy is rounded; else one that nobody knows. See `cpu/screen.c`.
        """
        (weight,) = self.parts
        if weight.struct.bits not in (6, 8) or self.in_features > _MOST_SCREENED:
            return
        self.screen = native.Screen(native.Weight(None, weight.struct.bias, *weight.shape, 4, 1, 0, 8))
        self.screen_panels = _allocate(native.library().crane_weight_bytes(ctypes.byref(self.screen.weight)))
        self.screen.weight.panels = self.screen_panels.data_ptr()
        seed = secrets.randbits(64) if seed is None else seed
        native.library().crane_screen(ctypes.byref(weight.struct), ctypes.byref(self.screen), seed)

    @property
    def screened(self) -> str | None:
        """One line: how often the screen was used, and what that spared."""
        if self.screen is None:
            return None
        share = self.screen.num_blocks * _BLOCK_ROWS / max(self.screen.num_screened * self.out_features, 1)
        return f"{self.screen.num_screened} steps computed {share:.1%} of the layer, {self.screen.num_whole} all of it"

    def best(self, x: Tensor, columns: int, changes: native.Changes | None = None) -> Tensor:
        """Where y has its maximum among the first `columns`, of equals the lowest: int64 [num_rows]. Of one part.
        changes: what is done to y before, but masks; a recorded call reads anew what they are."""
        ((struct, _),) = self._plan
        x, ids = x.contiguous(), torch.empty(len(x), dtype=torch.int64)
        code, screen = native.DTYPES[x.dtype], self.screen and ctypes.byref(self.screen)
        places = screen, ctypes.byref(changes or native.Changes()), ids.data_ptr()
        if native.library().crane_best(struct, x.data_ptr(), len(x), code, columns, *places):
            raise MemoryError("no memory to look for the best tokens in")
        return ids
