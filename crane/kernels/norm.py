"""RMS normalisation: y = x / sqrt(mean(x^2) + eps) * weight, statistics in float32."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Normalise the last dimension; of `residual + x` when a residual is given.

    x: [..., size]; weight: [size], or [num_heads, size] for one weight a head.
    residual: same shape and dtype as x; it is updated in place to `residual + x`.
    Returns a new tensor of x's shape and dtype.
    """
    if residual is not None:
        x = residual.add_(x)
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * scale).mul_(weight).to(x.dtype)
