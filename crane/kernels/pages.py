"""Writing keys and values into KV pages.

`kv` is [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim], contiguous: all
layers of a page lie together. Seen as a flat list of token vectors, a slot of layer 0 has
one number, and the same slot of layer n lies `n * 2 * page_size` further on. So one index
tensor made at the start of a step serves every layer through a shifted view.
"""

import torch
from torch import Tensor


def slot_index(slots: Tensor, kv: Tensor) -> Tensor:
    """Numbers of `slots` (page_id * page_size + offset) in layer 0's flat view of keys.

    slots: int64, any shape. Returns int64 of the same shape.
    """
    _, num_layers, _, page_size, _, _ = kv.shape
    return slots + (slots // page_size) * ((2 * num_layers - 1) * page_size)


def layer_views(kv: Tensor, layer: int, width: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer as flat tables of `width`-wide vectors, without a copy.

    width: num_kv_heads * head_dim for whole tokens (index: `slot_index`), or head_dim for
    single heads (index: `slot_index * num_kv_heads + head`).
    """
    _, _, _, page_size, num_kv_heads, head_dim = kv.shape
    flat = kv.view(-1, width)
    shift = page_size * (num_kv_heads * head_dim // width)
    return flat[2 * layer * shift :], flat[(2 * layer + 1) * shift :]


def write_kv(kv: Tensor, layer: int, index: Tensor, k: Tensor, v: Tensor) -> None:
    """Put this step's keys and values of one layer into their slots, in place.

    index: int64 [num_tokens] from `slot_index`, no slot twice.
    k, v: [num_tokens, num_kv_heads, head_dim] of kv's dtype.
    """
    width = k.shape[1] * k.shape[2]
    keys, values = layer_views(kv, layer, width)
    keys.index_copy_(0, index, k.reshape(-1, width))
    values.index_copy_(0, index, v.reshape(-1, width))


def gather_heads(kv: Tensor, layer: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer, head by head.

    index: int64 [n], `slot_index * num_kv_heads + head`. Returns two [n, head_dim].
    """
    keys, values = layer_views(kv, layer, kv.shape[-1])
    return torch.index_select(keys, 0, index), torch.index_select(values, 0, index)
