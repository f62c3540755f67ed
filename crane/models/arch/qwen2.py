"""Qwen2 and Qwen2.5."""

from crane.models.decoder import Decoder
from crane.models.registry import architecture


@architecture("qwen25")
class Qwen2(Decoder):
    """The q, k and v projections have biases, the output has none."""
