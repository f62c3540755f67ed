"""Llama 2 and 3, SmolLM2, and others that keep to the shape."""

from crane.models.decoder import Decoder
from crane.models.registry import architecture


@architecture("llama")
class Llama(Decoder):
    """Optional biases of attention and MLP come from the config."""
