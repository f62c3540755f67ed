"""Qwen3, dense."""

from crane.models.decoder import Decoder
from crane.models.registry import architecture


@architecture("qwen3")
class Qwen3(Decoder):
    """Query and key heads are normalised before the rotation; head_dim is the config's own."""

    qk_norm_names = ("q_norm", "k_norm")
