"""Rotary position embedding, half-split: element i pairs with element i + dim/2.

(a, b) becomes (a cos - b sin, b cos + a sin), computed in float32.
"""

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head of every token by its position's angles.

    x: [num_tokens, num_heads, head_dim]; cos, sin: float32 [num_tokens, head_dim / 2],
    scaled already where a method asks for it. Returns a new tensor of x's shape and dtype.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)
