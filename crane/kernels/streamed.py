"""Attention over paged keys and values, read where they lie, by the C kernels: of single tokens, and of prompts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crane.kernels import native

_TILE = 16  # rows of a tile of AMX, which are 32 elements of bfloat16 wide


@dataclass(frozen=True)
class StreamedRows:
    """Tokens that attend to their pages one by one; int64 each.

    tokens: [count], places in per-token tensors. table_rows: [count], rows of `page_table`. lengths: [count],
    positions to attend to. page_table: [num_rows, max_pages].
    """

    tokens: Tensor
    table_rows: Tensor
    lengths: Tensor
    page_table: Tensor


@dataclass(frozen=True)
class TiledRows:
    """Rows of many tokens, which AMX computes 16 at a time.

    rows: int64 [count, 4], place of the first new token in per-token tensors, number of new tokens, row of
    `page_table`, and tokens in pages including the new ones. page_table: int64 [num_rows, max_pages].
    """

    rows: Tensor
    page_table: Tensor


def streams(kv: Tensor) -> bool:
    """Whether `streamed_attention` can read such pages, which look as in `pages`."""
    dim = kv.shape[5]
    return (
        native.library() is not None and kv.device.type == "cpu" and kv.dtype in native.DTYPES
        and kv.is_contiguous() and dim % 16 == 0 and dim <= 256
    )  # fmt: skip


def streamed_attention(q: Tensor, out: Tensor, kv: Tensor, layer: int, rows: StreamedRows, scale: float) -> None:
    """Attention of `rows` in one layer, into their places in `out`; pages as `streams` wants them.

    q, out: [num_tokens, num_heads, head_dim] of kv's dtype; a token's heads are contiguous. Statistics are float32.
    """
    failed = native.library().crane_decode(
        q.data_ptr(), out.data_ptr(), kv.data_ptr(), rows.tokens.data_ptr(), rows.table_rows.data_ptr(),
        rows.lengths.data_ptr(), rows.page_table.data_ptr(), len(rows.tokens), rows.page_table.shape[1], q.stride(0),
        q.shape[1], kv.shape[4], q.shape[2], kv.shape[3], kv.shape[1], layer, scale, native.DTYPES[q.dtype],
    )  # fmt: skip
    if failed:
        raise MemoryError("attention over long contexts ran out of memory")


def tiles(kv: Tensor) -> bool:
    """Whether `tiled_attention` can read such pages, which look as in `pages`."""
    whole = kv.shape[3] % _TILE == 0 and kv.shape[5] % (2 * _TILE) == 0
    return whole and streams(kv) and kv.dtype == torch.bfloat16 and native.has_amx()


def tiled_attention(q: Tensor, out: Tensor, kv: Tensor, layer: int, rows: TiledRows, scale: float) -> None:
    """Causal attention of `rows` in one layer, into their places in `out`; pages as `tiles` wants them.

    q, out: bfloat16 [num_tokens, num_heads, head_dim]; a token's heads are contiguous. Weights are rounded to bfloat16,
    sums are float32. A token's result does not depend on which others are computed with it.
    """
    failed = native.library().crane_prefill(
        q.data_ptr(), out.data_ptr(), kv.data_ptr(), rows.rows.data_ptr(), rows.page_table.data_ptr(),
        len(rows.rows), rows.page_table.shape[1], q.stride(0), q.shape[1], kv.shape[4], q.shape[2], kv.shape[3],
        kv.shape[1], layer, scale,
    )  # fmt: skip
    if failed:
        raise MemoryError("attention of prompts ran out of memory")
