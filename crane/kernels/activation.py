"""The gate of a gated MLP: silu(gate) * up."""

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu of the first half times the second half.

    gate_up: [num_tokens, 2 * size], gate first. Returns a new [num_tokens, size] of the
    same dtype; silu is computed in float32 and rounded to the dtype before the product.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
