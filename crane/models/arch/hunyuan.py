"""Hunyuan Dense V1."""

from crane.models.decoder import Decoder
from crane.models.registry import architecture


@architecture("hunyuan")
class HunyuanDense(Decoder):
    """Query and key heads are normalised after the rotation, whose base alpha has stretched."""

    qk_norm_names = ("query_layernorm", "key_layernorm")
