"""Attention of single tokens over paged keys and values, read where they lie, by the C kernels."""

from dataclasses import dataclass

from torch import Tensor

from crane.kernels import native


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
