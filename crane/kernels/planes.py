"""GGUF blocks re-packed for a GPU: the same bits in planes that whole tiles can be read from.

A block of 18, 144 or 210 bytes can be read neither in 16-byte pieces nor side by side with its neighbours. So
each weight is taken apart once, at load. Planes are cut along the input into steps of 64 codes; a step holds all
output rows, one beside the other, so that a tile of rows is one contiguous piece of every plane. Scales travel
in words of four bytes, the least that a GPU copies in the background. Nothing is rounded.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crane.kernels.blocks import BLOCK_KINDS, BlockWeight, Codes, unpack

# Codes that lie together, and input columns of one step: two such runs.
RUN = 32
STEP = 2 * RUN
# Elements re-packed at a time, so that memory beside the planes stays bounded.
_PIECE = 1 << 24


@dataclass(frozen=True)
class PlaneFormat:
    """How one kind of block is laid out in planes.

    bits: of a code; 8 is a plane of int8, less are a plane of low nibbles, two runs to a byte, and one
    of what is above the nibble. zero: the code of value 0.
    """

    bits: int
    zero: int

    @property
    def steps_a_high_byte(self) -> int:
        """Steps whose high bits share the bytes of the high plane."""
        return 4 // (self.bits - 4)


PLANE_FORMATS = {
    "Q8_0": PlaneFormat(8, 0),
    "Q4_0": PlaneFormat(4, 8),
    "Q4_1": PlaneFormat(4, 0),
    "Q5_0": PlaneFormat(5, 16),
    "Q5_1": PlaneFormat(5, 0),
    "Q4_K": PlaneFormat(4, 0),
    "Q5_K": PlaneFormat(5, 0),
    "Q6_K": PlaneFormat(6, 32),
}


@dataclass(frozen=True)
class Planes:
    """A matrix [out_features, in_features] whose codes and scales lie in planes. What is missing from the last
    step is 0.

    codes: int8 [2 * num_steps, out, 32] where the kind has 8 bits, else the low nibbles, uint8 [num_steps, out, 32]:
        a step's first run in the low half of each byte, its second in the high half.
    high: the bits above the nibbles, first run lowest, uint8 [ceil(num_steps / steps_a_high_byte), out, 32].
    scales: int32 [num_steps, out], lowest first: two float16 `d`, one a run; of Q4_K and Q5_K four bytes, two
        `scales` and two `mins`; of Q6_K four `scales`, one for 16 codes.
    more: int32: two float16 `m` [num_steps, out]; of K types [num_blocks, out], `d` and then `m`, if there is one.
    """

    kind: str
    shape: tuple[int, int]
    codes: Tensor
    high: Tensor | None
    scales: Tensor
    more: Tensor | None

    @property
    def format(self) -> PlaneFormat:
        """The layout of this kind."""
        return PLANE_FORMATS[self.kind]

    @property
    def nested(self) -> bool:
        """Whether several groups share the float16 scale of a block."""
        return BLOCK_KINDS[self.kind].elements > 32

    @property
    def has_offset(self) -> bool:
        """Whether groups have an offset beside their scale."""
        return self.kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")

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
        return self.codes, self.high, self.scales, self.more


def pack_planes(weight: BlockWeight) -> Planes:
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
    codes = _whole_steps(fields.codes.reshape(num_rows, -1, RUN))
    high = None
    if form.bits < 8:
        codes = codes.view(torch.uint8) + form.zero
        high = _merge(codes >> 4, form.bits - 4) if form.bits > 4 else None
        codes = _merge(codes & 15, 4)
    d, scales, m, mins = (
        None if values is None else values.reshape(num_rows, -1, 1)
        for values in (fields.d, fields.scales, fields.m, fields.mins)
    )
    if scales is None:
        scales, more = (None if half is None else _whole_steps(half) for half in (d, m))
    else:
        if mins is not None:
            scales = torch.cat((scales.view(num_rows, -1, 2), mins.view(num_rows, -1, 2)), 2)
        more = torch.cat((d, torch.zeros_like(d) if m is None else m), 2)

    def words(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.flatten().view(torch.int32).view(num_rows, -1).T.contiguous()

    planes = [None if plane is None else plane.transpose(0, 1).contiguous() for plane in (codes, high)]
    return [*planes, words(scales), words(more)]


def _whole_steps(runs: Tensor, count: int = 2) -> Tensor:
    """[num_rows, num_runs, size], zeros added to make the number of runs a multiple of `count`."""
    return F.pad(runs, (0, 0, 0, -runs.shape[1] % count))


def _merge(codes: Tensor, bits: int) -> Tensor:
    """uint8 [num_rows, num_runs, 32] of `bits` bits each -> 8 / bits runs in one, missing ones 0."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)[:, None]
    codes = _whole_steps(codes, len(shifts)).unflatten(1, (-1, len(shifts)))
    # no two share a bit, so their sum is their union
    return (codes << shifts).sum(2, dtype=torch.uint8)


def _split(merged: Tensor, bits: int) -> Tensor:
    """The inverse of `_merge` on planes: uint8 [n, rows, 32] -> [n * 8 / bits, rows, 32]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=merged.device)[:, None, None]
    return ((merged[:, None] >> shifts) & ((1 << bits) - 1)).flatten(0, 1)


def unpack_planes(planes: Planes, rows: Tensor | slice = slice(None)) -> Codes:
    """The fields of the blocks of some rows, blocks in order: the inverse of `pack_planes`.

    rows: int64 [num_rows], or a slice.
    """
    form, block, num_runs = planes.format, BLOCK_KINDS[planes.kind], planes.shape[1] // RUN
    codes, high, scales, more = (None if plane is None else plane[:, rows] for plane in planes.tensors())
    if form.bits < 8:
        codes = _split(codes, 4)
        if high is not None:
            codes = codes | (_split(high, form.bits - 4)[: len(codes)] << 4)
        codes = (codes - form.zero).view(torch.int8)
    groups_a_block = 16 if planes.kind == "Q6_K" else block.elements // RUN
    codes = codes[:num_runs].transpose(0, 1).reshape(-1, groups_a_block, block.elements // groups_a_block)

    def halves(words: Tensor) -> Tensor:
        # flat first: a single word a row counts as contiguous whatever its stride
        return words.T.flatten().view(torch.float16).view(words.shape[1], 2 * words.shape[0])

    if not planes.nested:
        d, m = (None if words is None else halves(words)[:, :num_runs].reshape(-1, 1) for words in (scales, more))
        return Codes(codes, d, m=m)
    d, m = halves(more).view(-1, 2).split(1, 1)
    scales = scales.T.flatten().view(torch.uint8)
    if not planes.has_offset:
        return Codes(codes, d, scales.view(torch.int8).view(-1, groups_a_block))
    scales, mins = (part.reshape(-1, groups_a_block) for part in scales.view(-1, 2, 2).unbind(1))
    return Codes(codes, d, scales, m, mins)


def dequantize_planes(planes: Planes, dtype: torch.dtype, rows: Tensor | slice = slice(None)) -> Tensor:
    """The values of some rows: [num_rows, in_features], computed in float32 and rounded once to `dtype`.

    rows: int64 [num_rows], or a slice. dtype: float64 is computed in float64.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    fields = unpack_planes(planes, rows)
    values = fields.codes.to(wide).mul_(fields.scale.unsqueeze(2))  # scale and offset are exact in float32
    if (offset := fields.offset) is not None:
        values.add_(offset.unsqueeze(2))
    return values.reshape(-1, planes.shape[1]).to(dtype)


def random_planes(kind: str, num_rows: int, width: int, device: torch.device | str) -> Planes:
    """A weight of random codes and scales, values near 0.1 in size: for tests and timing."""
    form, num_steps = PLANE_FORMATS[kind], -(-width // STEP)
    nested = BLOCK_KINDS[kind].elements > RUN

    def codes(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max + 1, shape, dtype=dtype, device=device)

    def halves(count: int, size: float) -> Tensor:
        values = torch.rand(count, num_rows, 2, device=device).add_(0.1).mul_(size)
        return values.half().view(torch.int32)[..., 0]

    size = 0.2 / (1 << form.bits)
    high = codes(-(-num_steps // form.steps_a_high_byte), num_rows, RUN) if 4 < form.bits < 8 else None
    if form.bits == 8:
        low = codes(2 * num_steps, num_rows, RUN, dtype=torch.int8)
    else:
        low = codes(num_steps, num_rows, RUN)
    if nested:
        scales, more = codes(num_steps, num_rows, dtype=torch.int32), halves(-(-width // 256), size / 64)
    else:
        scales, more = halves(num_steps, size), halves(num_steps, 0.1) if kind[-1] == "1" else None
    return Planes(kind, (num_rows, width), low, high, scales, more)
