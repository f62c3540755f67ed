"""Copying KV pages: inside the pool when a sequence forks, out of it into one piece and back when pages are swapped."""

from collections.abc import Sequence

import torch
from torch import Tensor

from crane.kernels.lang import jit, tl
from crane.kernels.registry import Case, kernel
from crane.kernels.transfer import upload

_BLOCK = 4096


def _copy_pages_torch(source: Tensor, sources: Sequence[int], target: Tensor, targets: Sequence[int]) -> None:
    """target[targets[i]] = source[sources[i]] for all i at once: no page may be both read and written.

    source, target: [num_pages, ...], contiguous, pages of the same shape and dtype; they may be the same tensor.
    """
    for place, to in zip(sources, targets, strict=True):
        target[to].copy_(source[place])


@jit(do_not_specialize=["words"])
def _copy_kernel(source_ptr, target_ptr, numbers_ptr, count, words, BLOCK: tl.constexpr):
    """Grid: (pages, blocks of a page). words: 16 bytes of each page; numbers: [2, count] pages read and written."""
    page = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    size = words.to(tl.int64) * 4
    start = tl.load(numbers_ptr + page) * size
    end = tl.load(numbers_ptr + count + page) * size
    held = tl.load(source_ptr + start + at, mask=at < size, other=0)
    tl.store(target_ptr + end + at, held, mask=at < size)


def _copy_pages_triton(source: Tensor, sources: Sequence[int], target: Tensor, targets: Sequence[int]) -> None:
    words = source[0].nbytes // 16
    numbers = upload([list(sources), list(targets)], torch.int64, source.device)
    grid = (len(sources), -(-words * 4 // _BLOCK))
    _copy_kernel[grid](source.view(torch.int32), target.view(torch.int32), numbers, len(sources), words, BLOCK=_BLOCK,
                       num_warps=8)  # fmt: skip


def _why_not(source: Tensor, sources: Sequence[int], target: Tensor, targets: Sequence[int]) -> str | None:
    if not (source.is_contiguous() and target.is_contiguous()) or source[0].nbytes % 16:
        return "pages are not contiguous pieces of 16 bytes"
    return None


def _case(num_pages: int, shape: tuple[int, ...], sources: list[int], targets: list[int], other: int = 0):
    """other: pages of another tensor to copy to; 0: within the same one."""

    def make(device: str, dtype: torch.dtype) -> dict:
        source = torch.randn(num_pages, *shape, device=device).to(dtype)
        target = torch.full((other, *shape), float("nan"), device=device, dtype=dtype) if other else source
        return {"source": source, "sources": sources, "target": target, "targets": targets}

    return make


def _traffic(source: Tensor, sources: Sequence[int], target: Tensor, targets: Sequence[int]) -> tuple[int, int]:
    return 2 * len(sources) * source[0].nbytes, 0


_PAGE_06B = (28, 2, 64, 8, 128)

copy_pages = kernel(
    "copy_pages", reference=_copy_pages_torch, triton=_copy_pages_triton, why_not=_why_not, traffic=_traffic,
    cases=(
        Case("within the pool", _case(6, (3, 2, 16, 2, 16), [4, 0, 5], [1, 3, 2])),
        Case("out of the pool", _case(6, (2, 2, 16, 1, 24), [5, 0, 3], [0, 1, 2], other=4)),
        Case("pages of Qwen3-0.6B", _case(8, _PAGE_06B, [0, 1, 2], [5, 6, 7]), (torch.bfloat16,), True),
    ),
)  # fmt: skip
