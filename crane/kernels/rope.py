"""Rotary position embedding, half-split: element i pairs with element i + dim/2.

(a, b) becomes (a cos - b sin, b cos + a sin), computed in float32: x * cos + swapped * sin
with swapped = (b, a) and the minus kept in sin.
"""

import torch
from torch import Tensor

from crane.kernels import native


def rope_tables(angles: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """What `rope` multiplies with: cos and sin of both halves, sin of the first one negated.

    angles: float32 [num_tokens, head_dim / 2]; scale: a factor on both.
    Returns two float32 [num_tokens, 1, head_dim].
    """
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def position_tables(positions: Tensor, frequencies: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """`rope_tables` of positions: int64 [num_tokens]. frequencies: float32 [head_dim / 2], an angle per position."""
    if native.library() is None or positions.device.type != "cpu":
        return rope_tables(positions.unsqueeze(1).float() * frequencies, scale)
    count, half = len(positions), len(frequencies)
    cos, sin = torch.empty(count, 1, 2 * half), torch.empty(count, 1, 2 * half)
    native.library().crane_angles(
        positions.data_ptr(), frequencies.data_ptr(), cos.data_ptr(), sin.data_ptr(), count, half, scale
    )
    return cos, sin


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head of every token by its position's angles.

    x: [num_tokens, num_heads, head_dim]; cos, sin: float32 [num_tokens, 1, head_dim] from
    `rope_tables`. Returns a new tensor of x's shape and dtype.
    """
    first, second = x.chunk(2, dim=-1)
    return (x * cos).add_(torch.cat((second, first), dim=-1) * sin).to(x.dtype)
