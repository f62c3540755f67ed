"""GGUF block types: weights kept as the file stores them, and what they mean.

Every type is a row of blocks, and every block comes down to integer codes with one scale, and for
some types one offset, per group of 16 or 32 codes:

    weight[i] = scale[i // group] * code[i] (+ offset[i // group])

in float32, each product and sum rounded once: the values ggml and the `gguf` package define, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements taken apart at a time: memory stays bounded, and calls are few enough not to count.
_PIECE = 1 << 18
_IQ4_CODES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Codes:
    """Blocks taken apart, nothing rounded: `scale` and `offset` follow from the fields as stored.

    codes: uint8 or int8 [num_blocks, num_groups, group]. d, m: float16 [num_blocks, 1].
    scales, mins: uint8 or int8 [num_blocks, num_groups], of types whose blocks hold several groups:
    the scale is then d * scales, and the offset -(m * mins), not m.
    """

    codes: Tensor
    d: Tensor
    scales: Tensor | None = None
    m: Tensor | None = None
    mins: Tensor | None = None

    @property
    def scale(self) -> Tensor:
        """float32 [num_blocks, num_groups]."""
        return self.d.float() if self.scales is None else self.d.float() * self.scales

    @property
    def offset(self) -> Tensor | None:
        """float32 [num_blocks, num_groups], or None where the type has none."""
        if self.m is None:
            return None
        return self.m.float() if self.mins is None else -(self.m.float() * self.mins)


@dataclass(frozen=True)
class BlockType:
    """One GGUF type: elements and bytes of a block, and how to take blocks apart (uint8 [num_blocks, nbytes])."""

    elements: int
    nbytes: int
    unpack: Callable[[Tensor], Codes]


@dataclass(frozen=True)
class BlockWeight:
    """A matrix in GGUF blocks.

    kind: a key of BLOCK_KINDS, such as "Q4_K". data: uint8 [out_features, row_bytes], rows contiguous.
    """

    kind: str
    data: Tensor

    def __post_init__(self):
        assert self.data.dtype == torch.uint8 and self.data.dim() == 2, "blocks are rows of bytes"
        assert self.data.shape[1] % BLOCK_KINDS[self.kind].nbytes == 0, "rows are whole blocks"

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        block = BLOCK_KINDS[self.kind]
        return self.data.shape[0], self.data.shape[1] // block.nbytes * block.elements

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self.data.device

    def rows(self, index: Tensor | slice) -> "BlockWeight":
        """Some rows, in the order of `index`: int64 [num_rows], or a slice (which shares memory)."""
        data = self.data[index] if isinstance(index, slice) else self.data.index_select(0, index)
        return BlockWeight(self.kind, data)


def unpack(kind: str, data: Tensor) -> Codes:
    """Take blocks apart. data: uint8 [..., row_bytes]."""
    block = BLOCK_KINDS[kind]
    return block.unpack(data.reshape(data.numel() // block.nbytes, block.nbytes))


def dequantize(weight: BlockWeight, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The values of a weight: [out_features, in_features], rounded once to `dtype` (or to that of `out`)."""
    num_rows, width = weight.shape
    if out is None:
        out = torch.empty(num_rows, width, dtype=dtype, device=weight.device)
    step = max(1, _PIECE // width)
    for start in range(0, num_rows, step):
        piece = unpack(weight.kind, weight.data[start : start + step])
        target = out[start : start + step]
        direct = out.dtype == torch.float32 and target.is_contiguous()
        values = target.view(piece.codes.shape).copy_(piece.codes) if direct else piece.codes.float()
        values.mul_(piece.scale.unsqueeze(2))
        if (offset := piece.offset) is not None:
            values.add_(offset.unsqueeze(2))
        if not direct:
            target.copy_(values.view(target.shape))
    return out


def _halves(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block: [num_blocks, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16)


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [num_blocks, n, bytes] -> [num_blocks, n, 2, bytes]: low nibbles first."""
    return torch.stack((packed & 15, packed >> 4), dim=2)


def _fields(packed: Tensor, bits: int) -> Tensor:
    """uint8 [num_blocks, n, bytes] -> [num_blocks, n, 8 / bits, bytes]: fields of `bits` bits, lowest first."""
    return torch.stack([(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], dim=2)


def _spread_bits(packed: Tensor) -> Tensor:
    """uint8 [num_blocks, bytes] -> [num_blocks, 1, 8 * bytes]: bit i of the little-endian number at place i."""
    return _fields(packed.unsqueeze(1), 1)[:, 0].transpose(1, 2).reshape(len(packed), 1, -1)


def _q8_0(blocks: Tensor) -> Codes:
    return Codes(blocks[:, None, 2:].view(torch.int8), _halves(blocks, 0))


def _q4_0(blocks: Tensor) -> Codes:
    codes = _nibbles(blocks[:, None, 2:]).view(torch.int8).view(len(blocks), 1, 32)
    return Codes(codes.sub_(8), _halves(blocks, 0))


def _q4_1(blocks: Tensor) -> Codes:
    codes = _nibbles(blocks[:, None, 4:]).view(len(blocks), 1, 32)
    return Codes(codes, _halves(blocks, 0), m=_halves(blocks, 2))


def _q5(blocks: Tensor, start: int) -> Tensor:
    """Codes 0..31 of a block whose four bytes of high bits lie at `start`, its nibbles behind them."""
    low = _nibbles(blocks[:, None, start + 4 :]).view(len(blocks), 1, 32)
    return low.bitwise_or_(_spread_bits(blocks[:, start : start + 4]) << 4)


def _q5_0(blocks: Tensor) -> Codes:
    return Codes(_q5(blocks, 2).view(torch.int8).sub_(16), _halves(blocks, 0))


def _q5_1(blocks: Tensor) -> Codes:
    return Codes(_q5(blocks, 4), _halves(blocks, 0), m=_halves(blocks, 2))


def k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 6-bit scales and minima of Q4_K and Q5_K: uint8 [num_blocks, 12] -> two uint8 [num_blocks, 8].

    Four bytes hold the first four scales, four the first four minima, each with two bits of a
    later one on top; the last four bytes hold the low nibbles of the later ones.
    """
    scales, minima, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (
        torch.cat((scales & 63, (low & 15) | ((scales >> 2) & 48)), 1),
        torch.cat((minima & 63, (low >> 4) | ((minima >> 2) & 48)), 1),
    )


def _k_codes(blocks: Tensor, codes: Tensor) -> Codes:
    scales, minima = k_scales(blocks[:, 4:16])
    return Codes(codes.view(-1, 8, 32), _halves(blocks, 0), scales, _halves(blocks, 2), minima)


def _q4_k(blocks: Tensor) -> Codes:
    return _k_codes(blocks, _nibbles(blocks[:, 16:].view(-1, 4, 32)))


def _q5_k(blocks: Tensor) -> Codes:
    low = _nibbles(blocks[:, 48:].view(-1, 4, 32)).view(-1, 8, 32)
    return _k_codes(blocks, low.bitwise_or_(_fields(blocks[:, None, 16:48], 1)[:, 0] << 4))


def _q6_k(blocks: Tensor) -> Codes:
    low = _nibbles(blocks[:, :128].view(-1, 2, 64)).view(-1, 256)
    high = _fields(blocks[:, 128:192].view(-1, 2, 32), 2).view(-1, 256)
    codes = low.bitwise_or_(high << 4).view(torch.int8).sub_(32)
    return Codes(codes.view(-1, 16, 16), _halves(blocks, 208), blocks[:, 192:208].view(torch.int8))


def _q2_k(blocks: Tensor) -> Codes:
    scales = blocks[:, :16]
    codes = _fields(blocks[:, 16:80].view(-1, 2, 32), 2).view(-1, 16, 16)
    return Codes(codes, _halves(blocks, 80), scales & 15, _halves(blocks, 82), scales >> 4)


def _q3_k(blocks: Tensor) -> Codes:
    # the offset of 4 is taken off where the mask's bit is clear
    high = (_fields(blocks[:, None, :32], 1).view(-1, 256) ^ 1) << 2
    codes = _fields(blocks[:, 32:96].view(-1, 2, 32), 2).view(-1, 256).view(torch.int8) - high.view(torch.int8)
    low = _nibbles(blocks[:, None, 96:104]).view(-1, 16)
    scales = low | (_fields(blocks[:, None, 104:108], 2).view(-1, 16) << 4)
    return Codes(codes.view(-1, 16, 16), _halves(blocks, 108), scales.view(torch.int8) - 32)


def _iq4(packed: Tensor) -> Tensor:
    """uint8 [num_blocks, num_groups, 16] -> int8 [num_blocks, num_groups, 32] through the table of IQ4."""
    table = torch.tensor(_IQ4_CODES, dtype=torch.int8, device=packed.device)
    return table[_nibbles(packed).view(len(packed), packed.shape[1], 32).int()]


def _iq4_nl(blocks: Tensor) -> Codes:
    return Codes(_iq4(blocks[:, None, 2:]), _halves(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Codes:
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), dim=2).view(-1, 8)
    high = _fields(blocks[:, None, 2:4], 2)[:, 0].transpose(1, 2).reshape(-1, 8)
    scales = (low | (high << 4)).view(torch.int8) - 32
    return Codes(_iq4(blocks[:, 8:].view(-1, 8, 16)), _halves(blocks, 0), scales)


BLOCK_KINDS = {
    "Q8_0": BlockType(32, 34, _q8_0),
    "Q4_0": BlockType(32, 18, _q4_0),
    "Q4_1": BlockType(32, 20, _q4_1),
    "Q5_0": BlockType(32, 22, _q5_0),
    "Q5_1": BlockType(32, 24, _q5_1),
    "Q2_K": BlockType(256, 84, _q2_k),
    "Q3_K": BlockType(256, 110, _q3_k),
    "Q4_K": BlockType(256, 144, _q4_k),
    "Q5_K": BlockType(256, 176, _q5_k),
    "Q6_K": BlockType(256, 210, _q6_k),
    "IQ4_NL": BlockType(32, 18, _iq4_nl),
    "IQ4_XS": BlockType(256, 136, _iq4_xs),
}
