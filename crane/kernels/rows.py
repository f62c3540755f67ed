"""The rows of a step over KV pages, as `paged_decode` and `paged_prefill` take them: all of it on the device.

Both compute the same, each for its kind of rows:

    out[t, h] = softmax(scale * q[t, h] . K[0..p(t), h // group]) @ V[0..p(t), h // group]

where p(t) is the token's position in its sequence. Here are the reference of both and the makings of their cases.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crane.kernels.lang import FLOATS, has_fp8


@dataclass(frozen=True)
class Rows:
    """Row i computes `query_lens[i]` tokens that end at `context_lens[i]`, which counts them; their places in
    per-token tensors start at `query_starts[i]`.

    query_starts, query_lens, context_lens: int32 [num_rows]. A context of 0 pads: its tokens' output is 0.
    page_table: int32 or int64 [num_rows, max_pages]; entries beyond a row's own pages may be any page's.
    max_query_len, max_context_len: host ints, no less than the longest.
    """

    query_starts: Tensor
    query_lens: Tensor
    context_lens: Tensor
    page_table: Tensor
    max_query_len: int
    max_context_len: int


def attend_rows(q: Tensor, kv: Tensor, layer: int, rows: Rows, scale: float, kv_scales: Tensor | None,
                out: Tensor | None = None) -> Tensor:
    """Attention row by row, in torch, in q's type widened to float32: the reference. Asks the device for lengths.

    q: [num_tokens, num_heads, head_dim]. kv: [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim], q's type or
    float8_e4m3fn. kv_scales: float32 [num_layers, 2], what kv's keys and values are multiplied with, or None.
    out: [num_tokens, num_heads, head_dim], where rows' tokens go. Returns it, or a new one of q's type.
    """
    out = torch.zeros_like(q, memory_format=torch.contiguous_format) if out is None else out
    lengths = zip(*(each.tolist() for each in (rows.query_starts, rows.query_lens, rows.context_lens)), strict=True)
    for row, (start, count, length) in enumerate(lengths):
        if length == 0:
            out[start : start + count] = 0
            continue
        pages = rows.page_table[row, : -(-length // kv.shape[3])].long()
        # [2, num_kv_heads, length, head_dim]
        own = kv[pages, layer].movedim(1, 0).flatten(1, 2)[:, :length]
        keys, values = own.to(_wide(q)).transpose(1, 2)
        if kv_scales is not None:
            keys, values = keys * kv_scales[layer, 0], values * kv_scales[layer, 1]
        queries = q[start : start + count].to(_wide(q)).unflatten(1, (kv.shape[4], -1))
        scores = torch.einsum("thgd,hcd->hgtc", queries, keys) * scale
        place = torch.arange(length, device=q.device)
        late = place > place[length - count :, None]
        weights = scores.masked_fill(late, float("-inf")).softmax(-1)
        out[start : start + count] = torch.einsum("hgtc,hcd->thgd", weights, values).flatten(1, 2).to(out.dtype)
    return out


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def why_not_pages(kv: Tensor) -> str | None:
    """Why the Triton kernels cannot read such pages, or None."""
    page_size, head_dim = kv.shape[3], kv.shape[5]
    if kv.dtype not in (*FLOATS, torch.float8_e4m3fn):
        return f"{kv.dtype} is not a number type it knows"
    if kv.dtype == torch.float8_e4m3fn and not has_fp8():
        return "this GPU does not convert float8_e4m3fn"
    if head_dim > 256 or head_dim % 16:
        return f"head_dim {head_dim} is not a multiple of 16 up to 256"
    if page_size < 16 or page_size & (page_size - 1):
        return f"page size {page_size} is not a power of two from 16"
    return None if kv.is_contiguous() else "pages are not contiguous"


def why_not_rows(q: Tensor, kv: Tensor) -> str | None:
    """Why the Triton kernels cannot compute such queries over such pages, or None."""
    if q.dtype not in FLOATS or kv.dtype not in (q.dtype, torch.float8_e4m3fn):
        return f"queries of {q.dtype} over pages of {kv.dtype} are not number types it knows"
    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        return "heads are not contiguous"
    return why_not_pages(kv)


def make_rows(shapes: list[tuple[int, int]], device: str, dtype: torch.dtype, *, heads: int, kv_heads: int,
              head_dim: int, page_size: int, layers: int = 2, kv_dtype: torch.dtype | None = None,
              gap: int = 0) -> dict:
    """q, kv, layer, rows, scale and kv_scales of a case.

    shapes: (query_len, context_len) of each row. Pages are handed out in random order; every slot that no row owns
    holds NaN, as do all other layers. gap: elements between q's tokens. On device "meta" only sizes are right.
    """
    needed = [-(-length // page_size) for _, length in shapes]
    counts = [count for count, _ in shapes]
    num_pages, width = sum(needed) + 2, max(*needed, 1) + 1
    ints = {"dtype": torch.int32, "device": device}
    rows = Rows(
        query_starts=torch.tensor([sum(counts[:row]) for row in range(len(shapes))], **ints),
        query_lens=torch.tensor(counts, **ints),
        context_lens=torch.tensor([length for _, length in shapes], **ints),
        page_table=torch.zeros(len(shapes), width, **ints),
        max_query_len=max(counts),
        max_context_len=max(length for _, length in shapes),
    )
    q = torch.randn(sum(counts), heads * head_dim + gap, device=device).to(dtype)
    q = q[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    kv_dtype = kv_dtype or dtype
    kv = torch.empty(num_pages, layers, 2, page_size, kv_heads, head_dim, dtype=kv_dtype, device=device)
    layer = layers - 1
    if torch.device(device).type != "meta":
        kv.fill_(float("nan"))
        order = torch.randperm(num_pages, device=device, dtype=torch.int32).tolist()
        for row, (_, length) in enumerate(shapes):
            pages = [order.pop() for _ in range(needed[row])]
            rows.page_table[row, : needed[row]] = torch.tensor(pages, **ints)
            for place in range(0, length, page_size):
                size = min(page_size, length - place)
                own = torch.randn(2, size, kv_heads, head_dim, device=device)
                kv[pages[place // page_size], layer, :, :size] = own.to(kv_dtype)
    scales = None
    if kv_dtype != dtype:
        scales = torch.tensor([[0.5, 2.0]] * layers, device=device)
    return {"q": q, "kv": kv, "layer": layer, "rows": rows, "scale": head_dim**-0.5, "kv_scales": scales}
