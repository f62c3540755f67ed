"""Weights in the layout of the C kernels, and products with them.

    y = x @ weight.T + bias

A matrix in GGUF blocks keeps its codes of 4, 5, 6 or 8 bits, in another order, beside float16 scales. Products with
few rows round x to 8 bits, 32 values a scale; products with more rows are exact in x and round the weight to
bfloat16, as dequantising to bfloat16 does. A bfloat16 matrix is only laid out anew; nothing is rounded.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from crane.kernels import native
from crane.kernels.blocks import BlockWeight, unpack

# (bits, scales per 32 columns, whether there are offsets, what makes the codes unsigned) of each GGUF type
_KINDS = {
    "Q8_0": (8, 1, 0, 128), "IQ4_NL": (8, 1, 0, 128), "IQ4_XS": (8, 1, 0, 128),
    "Q4_0": (4, 1, 0, 8), "Q4_1": (4, 1, 1, 0), "Q5_0": (5, 1, 0, 16), "Q5_1": (5, 1, 1, 0),
    "Q2_K": (4, 2, 1, 0), "Q3_K": (4, 2, 0, 8), "Q4_K": (4, 1, 1, 0), "Q5_K": (5, 1, 1, 0), "Q6_K": (6, 2, 0, 32),
}  # fmt: skip
_PANEL_ROWS, _TILE_COLUMNS = 16, 32
# elements taken apart at a time, while they are in a core's cache
_PIECE = 1 << 19
# From so many rows of x AMX is faster than integers: it pays for widening the weight first.
_AMX_ROWS = 12


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


def can_pack(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a matrix of a GGUF type, or of "BF16", can be kept in panels for inputs of `dtype`."""
    if native.library() is None or len(shape) != 2 or shape[1] % _TILE_COLUMNS:
        return False
    if kind == "BF16":
        return dtype == torch.bfloat16 and native.has_amx()
    return kind in _KINDS and dtype in native.DTYPES


def pack_blocks(weight: BlockWeight) -> PackedWeight:
    """A matrix in GGUF blocks, which `can_pack`."""
    num_rows, columns = weight.shape
    bits, groups, has_offset, shift = _KINDS[weight.kind]
    packed = _empty(num_rows, columns, bits, groups, has_offset, shift)
    step = max(_PANEL_ROWS, _PIECE // columns // _PANEL_ROWS * _PANEL_ROWS)
    for start in range(0, num_rows, step):
        count = min(step, num_rows - start)
        piece = unpack(weight.kind, weight.data[start : start + count])
        codes, scale = piece.codes.contiguous(), piece.scale.contiguous()
        offset = piece.offset.contiguous() if has_offset else None
        native.library().crane_pack(
            ctypes.byref(packed.struct), codes.data_ptr(), scale.data_ptr(),
            offset.data_ptr() if has_offset else None, start, count,
        )  # fmt: skip
    return packed


def pack_bf16(weight: Tensor) -> PackedWeight:
    """A bfloat16 matrix, which `can_pack`."""
    packed = _empty(*weight.shape, 16, 0, 0, 0)
    weight = weight.contiguous()
    native.library().crane_pack_bf16(ctypes.byref(packed.struct), weight.data_ptr(), 0, weight.shape[0])
    return packed


def _empty(num_rows: int, columns: int, *kind: int) -> PackedWeight:
    struct = native.Weight(None, None, num_rows, columns, *kind)
    panels = torch.empty(native.library().crane_weight_bytes(ctypes.byref(struct)), dtype=torch.uint8)
    struct.panels = panels.data_ptr()
    return PackedWeight(panels, struct)


class PackedLinear:
    """y = x @ weight.T + bias for matrices one below the other, of the same or of different types."""

    def __init__(self, parts: list[PackedWeight], bias: Tensor | None = None):
        """bias: [out_features] of all parts."""
        self.parts = parts
        self.out_features = sum(part.shape[0] for part in parts)
        self.in_features = parts[0].shape[1]
        self._call = native.library().crane_linear
        amx = native.has_amx()
        start = 0
        self._plan = []  # (the struct's address, first output feature, rows of x from which AMX multiplies)
        for part in parts:
            count = part.shape[0]
            if bias is not None:
                part.bias = bias[start : start + count].float().contiguous()
                part.struct.bias = part.bias.data_ptr()
            from_rows = (1 if part.struct.bits == 16 else _AMX_ROWS) if amx else 1 << 62
            self._plan.append((ctypes.addressof(part.struct), start, from_rows))
            start += count

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x: [num_rows, in_features]. Returns [num_rows, out_features] of `dtype`, else of x's."""
        num_rows, width = x.shape[0], self.out_features
        x = x.contiguous()
        out = torch.empty(num_rows, width, dtype=dtype or x.dtype)
        code, out_code, at, size = native.DTYPES[x.dtype], native.DTYPES[out.dtype], out.data_ptr(), out.itemsize
        for struct, start, amx_rows in self._plan:
            method = num_rows >= amx_rows and x.dtype == torch.bfloat16
            self._call(struct, x.data_ptr(), num_rows, code, at + start * size, width, out_code, method)
        return out
