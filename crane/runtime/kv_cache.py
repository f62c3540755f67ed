"""The device memory of all KV pages. The one place that knows their layout."""

import torch
from torch import Tensor

from crane.models.config import ModelConfig


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Memory of one page: K and V of `page_size` tokens in every layer."""
    return config.num_layers * 2 * page_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def allocate_pages(config: ModelConfig, num_pages: int, page_size: int, *, dtype: torch.dtype,
                   device: torch.device) -> Tensor:
    """Uninitialised pages: [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim].

    Page-major, so that all layers of one page are one piece of memory: swapping or copying a page is one
    copy. Within a layer a token's heads lie together, as flash kernels read them.
    """
    shape = (num_pages, config.num_layers, 2, page_size, config.num_kv_heads, config.head_dim)
    return torch.empty(shape, dtype=dtype, device=device)
