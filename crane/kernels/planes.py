"""GGUF blocks re-packed for a GPU: the same bits in planes that whole tiles can be read from.

A block of 18, 144 or 210 bytes can be read neither in 16-byte pieces nor side by side with its
neighbours. So each weight is taken apart once, at load: codes, scales and offsets each get a plane,
groups of the input outermost, then output rows, then the codes of the group. A tile of rows is one
contiguous piece in each plane, and one step along the input is one group. Nothing is rounded.

    weight[n, k] = scale[k // group, n] * (code[k // group, n, k % group] - zero) + offset[k // group, n]
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crane.kernels.blocks import BLOCK_KINDS, BlockWeight, Codes, unpack

# Elements re-packed at a time, so that memory beside the planes stays bounded.
_PIECE = 1 << 24


@dataclass(frozen=True)
class PlaneFormat:
    """How one kind of block is laid out in planes.

    bits: of a code; 8 is a plane of int8, less are a plane of low nibbles, two groups to a byte, and one
    of what is above the nibble. group: codes that share a scale. zero: the code of value 0.
    """

    bits: int
    group: int
    zero: int

    @property
    def groups_a_high_byte(self) -> int:
        """Groups whose high bits share the bytes of the high plane."""
        return 8 // (self.bits - 4)


PLANE_FORMATS = {
    "Q8_0": PlaneFormat(8, 32, 0),
    "Q4_0": PlaneFormat(4, 32, 8),
    "Q4_1": PlaneFormat(4, 32, 0),
    "Q5_0": PlaneFormat(5, 32, 16),
    "Q5_1": PlaneFormat(5, 32, 0),
    "Q4_K": PlaneFormat(4, 32, 0),
    "Q5_K": PlaneFormat(5, 32, 0),
    "Q6_K": PlaneFormat(6, 16, 32),
}


@dataclass(frozen=True)
class Planes:
    """A matrix [out_features, in_features] whose codes and scales lie in planes.

    codes: int8 [num_groups, out, group] where the kind has 8 bits, else the low nibbles, uint8
        [ceil(num_groups / 2), out, group]: group 2i in the low half of a byte, 2i + 1 in the high half.
    high: the bits above the nibbles, lowest group first, uint8 [ceil(num_groups / groups_a_high_byte), out, group].
    d, m: float16 [num_groups / groups of one block, out]; scales, mins: [num_groups, out]; see `Codes`.
    """

    kind: str
    shape: tuple[int, int]
    codes: Tensor
    high: Tensor | None
    d: Tensor
    scales: Tensor | None
    m: Tensor | None
    mins: Tensor | None

    @property
    def format(self) -> PlaneFormat:
        """The layout of this kind."""
        return PLANE_FORMATS[self.kind]

    @property
    def device(self) -> torch.device:
        """Where the planes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Memory of all planes."""
        return sum(plane.nbytes for plane in self.tensors() if plane is not None)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The planes, in the order kernels take them."""
        return self.codes, self.high, self.d, self.scales, self.m, self.mins


def pack(weight: BlockWeight) -> Planes:
    """Re-pack a weight, on its own device. Its kind must be one of PLANE_FORMATS."""
    num_rows, width = weight.shape
    step = max(1, _PIECE // width)
    planes: list[Tensor | None] = []
    for start in range(0, num_rows, step):
        piece = weight.rows(slice(start, start + step))
        parts = _pack_rows(weight.kind, piece.shape[0], unpack(weight.kind, piece.data))
        planes = planes or [
            None if part is None else part.new_empty(part.shape[0], num_rows, *part.shape[2:]) for part in parts
        ]
        for plane, part in zip(planes, parts, strict=True):
            if part is not None:
                plane[:, start : start + step] = part
    return Planes(weight.kind, weight.shape, *planes)


def _pack_rows(kind: str, num_rows: int, fields: Codes) -> list[Tensor | None]:
    """The planes of some rows, in the order of `Planes.tensors`."""
    form = PLANE_FORMATS[kind]
    codes = fields.codes.reshape(num_rows, -1, form.group)  # [num_rows, num_groups, group]
    high = None
    if form.bits < 8:
        codes = codes.view(torch.uint8) + form.zero
        high = _merge(codes >> 4, form.bits - 4) if form.bits > 4 else None
        codes = _merge(codes & 15, 4)

    def spread(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(num_rows, -1).T.contiguous()

    planes = [codes.transpose(0, 1).contiguous(), None if high is None else high.transpose(0, 1).contiguous()]
    return planes + [spread(values) for values in (fields.d, fields.scales, fields.m, fields.mins)]


def _merge(codes: Tensor, bits: int) -> Tensor:
    """uint8 [num_rows, num_groups, group] of `bits` bits each -> 8 / bits groups in one, missing ones 0."""
    count = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[1] % count))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)[:, None]
    # no two share a bit, so their sum is their union
    return (codes.unflatten(1, (-1, count)) << shifts).sum(2, dtype=torch.uint8)


def _split(merged: Tensor, bits: int, num_groups: int) -> Tensor:
    """The inverse of `_merge` on planes: uint8 [n, rows, group] -> [num_groups, rows, group]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=merged.device)[:, None, None]
    return ((merged[:, None] >> shifts) & ((1 << bits) - 1)).flatten(0, 1)[:num_groups]


def unpack_planes(planes: Planes, rows: Tensor | slice = slice(None)) -> Codes:
    """The fields of the blocks of some rows, blocks in order: the inverse of `pack`.

    rows: int64 [num_rows], or a slice.
    """
    form, block = planes.format, BLOCK_KINDS[planes.kind]
    num_groups, groups_a_block = planes.shape[1] // form.group, block.elements // form.group
    codes, high, *fields = (None if plane is None else plane[:, rows] for plane in planes.tensors())
    if form.bits < 8:
        codes = _split(codes, 4, num_groups)
        if high is not None:
            codes = codes | (_split(high, form.bits - 4, num_groups) << 4)
        codes = (codes - form.zero).view(torch.int8)
    codes = codes.transpose(0, 1).reshape(-1, groups_a_block, form.group)
    d, scales, m, mins = (None if values is None else values.T for values in fields)
    return Codes(
        codes,
        d.reshape(-1, 1),
        None if scales is None else scales.reshape(-1, groups_a_block),
        None if m is None else m.reshape(-1, 1),
        None if mins is None else mins.reshape(-1, groups_a_block),
    )


def dequantize_planes(planes: Planes, dtype: torch.dtype, rows: Tensor | slice = slice(None)) -> Tensor:
    """The values of some rows: [num_rows, in_features], rounded once to `dtype`.

    rows: int64 [num_rows], or a slice.
    """
    fields = unpack_planes(planes, rows)
    values = fields.codes.float().mul_(fields.scale.unsqueeze(2))
    if (offset := fields.offset) is not None:
        values.add_(offset.unsqueeze(2))
    return values.reshape(-1, planes.shape[1]).to(dtype)
