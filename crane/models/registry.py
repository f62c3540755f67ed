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


def architecture(model_type: str) -> Callable[[type[Decoder]], type[Decoder]]:
    """Enter a class as the one that runs `model_type`, a name of `models.config`."""

    def enter(cls: type[Decoder]) -> type[Decoder]:
        assert model_type not in _MODELS, model_type
        _MODELS[model_type] = cls
        return cls

    return enter


def models() -> dict[str, type[Decoder]]:
    """Every class by model_type."""
    for module in pkgutil.iter_modules(arch.__path__):
        importlib.import_module(f"{arch.__name__}.{module.name}")
    return dict(_MODELS)


def load_model(checkpoint: Checkpoint, config: ModelConfig, device: torch.device | str, dtype: torch.dtype,
               progress: Callable[[int, int], None] | None = None, exact: bool = True) -> Decoder:
    """The model of a checkpoint, its weights on `device` in `dtype`, ready to run.

    exact: whether nothing is rounded further than to `dtype`; else weights in GGUF blocks may stay quantised.
    progress(loaded_bytes, total_bytes) is called as tensors are placed.
    Raises ModelError when a tensor is missing, misshapen or unknown.
    """
    known = models()
    if config.model_type not in known:
        supported = ", ".join(sorted(known))
        raise ModelError(f"{checkpoint.path}: no class for {config.model_type!r}; supported: {supported}")
    with torch.no_grad():
        device = torch.device(device)
        weights = Weights(checkpoint, config, device=device, dtype=dtype, exact=exact, progress=progress)
        model = known[config.model_type](config, weights)
        weights.finish()
    return model
