"""Writing keys and values into KV pages.

`kv` is [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim], contiguous: all
layers of a page lie together. Seen as a flat list of token vectors, a slot of layer 0 has
one number, and the same slot of layer n lies `n * 2 * page_size` further on. So one index
tensor made at the start of a step serves every layer through a shifted view.
"""

from torch import Tensor


def slot_index(slots: Tensor, kv: Tensor) -> Tensor:
    """Numbers of `slots` (page_id * page_size + offset) in layer 0's flat view of keys.

    slots: int64, any shape. Returns int64 of the same shape.
    """
    _, num_layers, _, page_size, _, _ = kv.shape
    return slots + (slots // page_size) * ((2 * num_layers - 1) * page_size)


def _layer_views(kv: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer for `slot_index`, without a copy: [n, num_kv_heads * head_dim]."""
    page_size = kv.shape[3]
    flat = kv.view(-1, kv.shape[4] * kv.shape[5])
    return flat[2 * layer * page_size :], flat[(2 * layer + 1) * page_size :]


def write_kv(kv: Tensor, layer: int, index: Tensor, k: Tensor, v: Tensor) -> None:
    """Put this step's keys and values of one layer into their slots, in place.

    index: int64 [num_tokens] from `slot_index`, no slot twice.
    k, v: [num_tokens, num_kv_heads, head_dim] of kv's dtype.
    """
    keys, values = _layer_views(kv, layer)
    keys.index_copy_(0, index, k.flatten(1))
    values.index_copy_(0, index, v.flatten(1))


def gather_kv(kv: Tensor, layer: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of the keys and of the values of one layer at some slots.

    index: int64 of any shape, from `slot_index`. Returns two [*index.shape, num_kv_heads, head_dim].
    """
    shape = (*index.shape, *kv.shape[4:])
    keys, values = (side.index_select(0, index.flatten()).view(shape) for side in _layer_views(kv, layer))
    return keys, values
