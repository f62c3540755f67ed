"""How a decode step's attention is divided: whole rows, or parts of long ones that run side by side.

A row's keys come in tiles. `size` tiles make a part; a part takes about `size + START` tile times, as many parts as fit
the GPU run at once, and rows in several parts have to be merged afterwards:

    time(size) = ceil(parts(size) / width) * (size + START) + (MERGE if any row is divided)

The least time among a few sizes wins. All of it happens on the device, from the lengths there: no host ever waits,
and a CUDA graph captured once serves every length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crane.kernels.lang import jit, next_power_of_2, tl
from crane.kernels.registry import Case, kernel

# In the time of one tile: starting a program up to its first product, and merging parts.
_START = 6
_MERGE = 12
# Sizes tried beyond the least that lets all parts run at once, in steps of an eighth of it.
_NUM_SIZES = 16
_MOST_ROWS = 4096


@dataclass(frozen=True)
class DecodeWork:
    """Parts of rows, each for one program a K/V head.

    parts: int32 [max_parts, 4]: row, first tile, number of tiles, 1 if the row has other parts; a row of -1 is none.
    starts: int32 [num_rows + 1]: a row's parts are starts[row] .. starts[row + 1].
    tile: tokens in a tile.
    """

    parts: Tensor
    starts: Tensor
    tile: int


def _plan_torch(context_lens: Tensor, tile: int, width: int, max_parts: int, fixed_size: int = 0) -> DecodeWork:
    """Divide rows of these lengths.

    context_lens: int32 [num_rows]; a row of length 0 has one part without tiles. width: parts that run at once.
    fixed_size: tiles a part, whatever the batch, so that a row's result depends on nothing but its length; 0: chosen.
    max_parts: no less than num_rows + width, or, with fixed_size, than all parts that may be.
    """
    tiles = [-(-length // tile) for length in context_lens.tolist()]
    size = fixed_size or _best_size(tiles, width)
    parts, starts = [], [0]
    for row, count in enumerate(tiles):
        each = size if fixed_size else -(-count // max(-(-count // size), 1))  # parts of even length
        firsts = range(0, count, each) if count else [0]
        parts += [[row, first, min(each, count - first), int(len(firsts) > 1)] for first in firsts]
        starts.append(len(parts))
    parts += [[-1, 0, 0, 0]] * (max_parts - len(parts))
    ints = {"dtype": torch.int32, "device": context_lens.device}
    return DecodeWork(torch.tensor(parts, **ints), torch.tensor(starts, **ints), tile)


def _best_size(tiles: list[int], width: int) -> int:
    least, most = max(-(-sum(tiles) // width), 1), max(*tiles, 1)
    sizes = [most] + [least + number * max(least // 8, 1) for number in range(_NUM_SIZES)]

    def time(size: int) -> int:
        parts = sum(max(-(-count // size), 1) for count in tiles)
        return -(-parts // width) * (min(size, most) + _START) + (_MERGE if size < most else 0)

    return min(sizes, key=time)  # of equals the first


@jit
def _parts_of(tiles, size, inside):
    return tl.where(inside, tl.maximum(tl.cdiv(tiles, size), 1), 0)


@jit(do_not_specialize=["num_rows", "width", "max_parts"])
def _plan_kernel(lens_ptr, parts_ptr, starts_ptr, num_rows, width, max_parts,
                 TILE: tl.constexpr, FIXED: tl.constexpr, START: tl.constexpr, MERGE: tl.constexpr,
                 SIZES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """One program. BLOCK >= num_rows."""
    row = tl.arange(0, BLOCK)
    inside = row < num_rows
    tiles = tl.cdiv(tl.load(lens_ptr + row, mask=inside, other=0), TILE)
    if FIXED > 0:
        each = tl.zeros_like(tiles) + FIXED
    else:
        most = tl.maximum(tl.max(tiles, 0), 1)
        least = tl.maximum(tl.cdiv(tl.sum(tiles, 0), width), 1)
        best = most
        best_time = tl.cdiv(num_rows, width) * (most + START)
        for number in range(SIZES):
            size = least + number * tl.maximum(least // 8, 1)
            rounds = tl.cdiv(tl.sum(_parts_of(tiles, size, inside), 0), width)
            time = rounds * (tl.minimum(size, most) + START) + tl.where(size < most, MERGE, 0)
            best = tl.where(time < best_time, size, best)
            best_time = tl.minimum(time, best_time)
        each = tl.maximum(tl.cdiv(tiles, _parts_of(tiles, best, inside | (row >= 0))), 1)
    parts = _parts_of(tiles, each, inside)
    ends = tl.cumsum(parts, 0)
    total = tl.sum(parts, 0)
    tl.store(starts_ptr + row, ends - parts, mask=inside)
    tl.store(starts_ptr + num_rows + row * 0, total, mask=row == 0)
    for number in range(0, tl.max(parts, 0)):
        at = parts_ptr + (ends - parts + number) * 4
        mine = number < parts
        first = number * each
        tl.store(at, row, mask=mine)
        tl.store(at + 1, first, mask=mine)
        tl.store(at + 2, tl.minimum(each, tiles - first), mask=mine)
        tl.store(at + 3, (parts > 1).to(tl.int32), mask=mine)
    for first in range(total, max_parts, BLOCK_PARTS):
        at = first + tl.arange(0, BLOCK_PARTS)
        for field in tl.static_range(4):
            tl.store(parts_ptr + at * 4 + field, -1 if field == 0 else 0, mask=at < max_parts)


def _plan_triton(context_lens: Tensor, tile: int, width: int, max_parts: int, fixed_size: int = 0) -> DecodeWork:
    num_rows = context_lens.shape[0]
    parts = torch.empty((max_parts, 4), dtype=torch.int32, device=context_lens.device)
    starts = torch.empty(num_rows + 1, dtype=torch.int32, device=context_lens.device)
    _plan_kernel[(1,)](
        context_lens, parts, starts, num_rows, width, max_parts, TILE=tile, FIXED=fixed_size, START=_START,
        MERGE=_MERGE, SIZES=_NUM_SIZES, BLOCK=max(next_power_of_2(num_rows), 32), BLOCK_PARTS=128, num_warps=4,
    )  # fmt: skip
    return DecodeWork(parts, starts, tile)


def _why_not(context_lens: Tensor, tile: int, width: int, max_parts: int, fixed_size: int = 0) -> str | None:
    return f"more than {_MOST_ROWS} rows" if context_lens.shape[0] > _MOST_ROWS else None


def _case(lengths: list[int], width: int, fixed_size: int = 0):
    def make(device: str, dtype: torch.dtype) -> dict:
        max_parts = len(lengths) + width
        if fixed_size:
            max_parts = sum(max(-(-length // (64 * fixed_size)), 1) for length in lengths) + 3
        return {"context_lens": torch.tensor(lengths, dtype=torch.int32, device=device), "tile": 64, "width": width,
                "max_parts": max_parts, "fixed_size": fixed_size}  # fmt: skip

    return make


plan_decode = kernel(
    "plan_decode", reference=_plan_torch, triton=_plan_triton, why_not=_why_not,
    cases=(
        Case("one long row", _case([10_000], 12), (torch.float32,)),
        Case("more rows than fit at once", _case([70, 1, 64, 65, 900, 128] * 6, 8), (torch.float32,)),
        Case("one row far longer than the others", _case([5, 3000, 17, 0, 64], 20), (torch.float32,)),
        Case("padding only", _case([0, 0, 0], 4), (torch.float32,)),
        Case("parts of fixed size", _case([1, 5000, 1024, 1025, 0], 4, 16), (torch.float32,)),
        Case("256 rows", _case([1024] * 256, 49), (torch.bfloat16,), production=True),
    ),
)  # fmt: skip
