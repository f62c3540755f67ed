"""Rotary position embedding, half-split: element i pairs with element i + dim/2.

(a, b) becomes (a cos - b sin, b cos + a sin), computed in float32: x * cos + swapped * sin
with swapped = (b, a) and the minus kept in sin.
"""

import torch
from torch import Tensor


def rope_tables(angles: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """What `rope` multiplies with: cos and sin of both halves, sin of the first one negated.

    angles: float32 [num_tokens, head_dim / 2]; scale: a factor on both.
    Returns two float32 [num_tokens, 1, head_dim].
    """
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head of every token by its position's angles.

    x: [num_tokens, num_heads, head_dim]; cos, sin: float32 [num_tokens, 1, head_dim] from
    `rope_tables`. Returns a new tensor of x's shape and dtype.
    """
    first, second = x.chunk(2, dim=-1)
    return (x * cos).add_(torch.cat((second, first), dim=-1) * sin).to(x.dtype)
