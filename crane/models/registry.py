"""Which class runs which model. Every file of `arch/` enters its own."""

import importlib
import pkgutil
from collections.abc import Callable

import torch

from crane.errors import ModelError
from crane.models import arch
from crane.models.config import ModelConfig
from crane.models.decoder import Decoder
from crane.models.files import Checkpoint
from crane.models.weights import Weights

_MODELS: dict[str, type[Decoder]] = {}
