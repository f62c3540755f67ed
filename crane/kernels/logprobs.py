"""`sampling.log_probabilities` in one launch: a program a row reads it once, then takes its best one by one.

The pass leaves the maximum of every 64 tokens. Each of the best is in the sub-block of the largest maximum, of equals
the first; what is left in that sub-block gives its next maximum. Of equal logits the lowest id comes first.
"""

import torch
from torch import Tensor

from crane.kernels import sampling
from crane.kernels.draw import NOTHING, from_key, to_key
from crane.kernels.lang import jit, next_power_of_2, tl
from crane.kernels.registry import Case, kernel

_SUB = 64
_CHUNK = 4096


@jit(do_not_specialize=["num_places", "num_top"])
def _logprobs_kernel(
    logits_ptr, rows_ptr, tokens_ptr, listed_ptr, maxima_ptr, picked_ptr, top_ids_ptr, top_ptr,
    vocab, stride, num_maxima, num_places, num_top,
    SUB: tl.constexpr, BLOCK: tl.constexpr, MAXIMA: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """maxima: float32 [count, num_maxima], scratch. num_places: ids listed for each row and its token."""
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index).to(tl.int64)
    logits_ptr += row * stride
    maxima_ptr += index * num_maxima
    # each of BLOCK / SUB lanes has sub-blocks of its own, with a maximum and a sum
    lane = tl.arange(0, BLOCK // SUB)
    j = lane[:, None] * SUB + tl.arange(0, SUB)[None, :]
    tops = tl.full([BLOCK // SUB], -float("inf"), tl.float32)
    sums = tl.zeros([BLOCK // SUB], tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + start + j, mask=start + j < vocab, other=-float("inf"))
        maxima = tl.max(x, 1)
        tl.store(maxima_ptr + start // SUB + lane, maxima, mask=start // SUB + lane < num_maxima)
        higher = tl.maximum(tops, maxima)
        base = tl.where(higher == -float("inf"), 0.0, higher)
        sums = sums * tl.exp(tops - base) + tl.sum(tl.exp(x - base[:, None]), 1)
        tops = higher
    best = tl.max(tops, 0)
    norm = best + tl.log(tl.sum(sums * tl.exp(tops - best), 0))
    for start in range(0, num_places, PLACES):
        place = start + tl.arange(0, PLACES)
        own = tl.load(tokens_ptr + row)
        others = tl.load(listed_ptr + index * (num_places - 1) + place - 1,
                         mask=(place > 0) & (place < num_places), other=0)
        ids = tl.where(place == 0, own, others.to(tl.int64))
        x = tl.load(logits_ptr + ids, mask=place < num_places, other=0.0)
        tl.store(picked_ptr + index * num_places + place, x - norm, mask=place < num_places)
    tl.debug_barrier()
    sub, inner = tl.arange(0, MAXIMA), tl.arange(0, SUB)
    keys = to_key(tl.load(maxima_ptr + sub, mask=sub < num_maxima, other=-float("inf")))
    keys = tl.where(sub < num_maxima, keys, NOTHING)
    last_key, last_id = tl.max(keys, 0) + 1, vocab * 0
    for number in range(num_top):
        best_key = tl.max(keys, 0)
        first = tl.min(tl.where(keys == best_key, sub, MAXIMA), 0)
        ids = first * SUB + inner
        own = to_key(tl.load(logits_ptr + ids, mask=ids < vocab, other=-float("inf")))
        own = tl.where(ids < vocab, own, NOTHING)
        left = (own < last_key) | ((own == last_key) & (ids > last_id))
        last_id = tl.min(tl.where(left & (own == best_key), ids, vocab), 0)
        last_key = best_key
        tl.store(top_ids_ptr + index * num_top + number, last_id.to(tl.int64))
        tl.store(top_ptr + index * num_top + number, from_key(last_key) - norm)
        left = (own < last_key) | ((own == last_key) & (ids > last_id))
        keys = tl.where(sub == first, tl.max(tl.where(left, own, NOTHING), 0), keys)


def _log_probabilities_triton(logits: Tensor, rows: Tensor, tokens: Tensor, listed: Tensor,
                              num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    vocab, (count, num_listed) = logits.shape[1], listed.shape
    num_maxima = -(-vocab // _SUB)

    def empty(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(count, width, dtype=dtype, device=logits.device)

    picked, top_ids, top = empty(1 + num_listed), empty(num_top, torch.int64), empty(num_top)
    _logprobs_kernel[(count,)](
        logits, rows, tokens, listed, empty(num_maxima), picked, top_ids, top,
        vocab, logits.stride(0), num_maxima, 1 + num_listed, num_top,
        SUB=_SUB, BLOCK=_CHUNK, MAXIMA=next_power_of_2(num_maxima), PLACES=64, num_warps=16,
    )  # fmt: skip
    return picked, top_ids, top


def _why_not(logits: Tensor, rows: Tensor, tokens: Tensor, listed: Tensor, num_top: int) -> str | None:
    if logits.dtype != torch.float32:
        return f"logits are {logits.dtype}, not float32"
    if logits.stride(1) != 1 or len(rows) == 0:
        return "logits are not rows of contiguous numbers"
    return None if listed.is_contiguous() and tokens.is_contiguous() else "ids are not plain lists"


def _case(vocab: int, num_rows: int, rows: list[int], num_listed: int, num_top: int, gap: int = 0):
    def make(device: str, dtype: torch.dtype) -> dict:
        return {
            "logits": torch.randn(num_rows, vocab + gap, device=device).mul_(3.0)[:, :vocab],
            "rows": torch.tensor(rows, dtype=torch.int32, device=device),
            "tokens": torch.randint(0, vocab, (num_rows,), device=device),
            "listed": torch.randint(0, vocab, (len(rows), num_listed), dtype=torch.int32, device=device),
            "num_top": num_top,
        }

    return make


def _traffic(logits: Tensor, rows: Tensor, **_) -> tuple[int, int]:
    size = len(rows) * logits.shape[1]
    return 4 * size, 4 * size


log_probabilities = kernel(
    "log_probabilities", reference=sampling.log_probabilities, triton=_log_probabilities_triton, why_not=_why_not,
    traffic=_traffic, in_c=sampling.log_probabilities_in_c,
    cases=(
        Case("some rows", _case(5000, 5, [0, 3, 4], 3, 20), (torch.float32,)),
        Case("the token alone", _case(4096, 3, [0, 1, 2], 0, 0), (torch.float32,)),
        Case("more listed than fit at once", _case(700, 2, [1], 150, 5), (torch.float32,)),
        Case("all of a small vocabulary", _case(70, 2, [0, 1], 2, 70, gap=10), (torch.float32,)),
        Case("128 rows of Qwen", _case(151936, 128, list(range(128)), 0, 20), (torch.float32,), production=True),
    ),
)  # fmt: skip
