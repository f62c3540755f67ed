"""Numbers on their way to the device and back, without a host that waits for the device."""

import numpy as np
import torch
from torch import Tensor


def upload(values: list | np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """These numbers on the device: a tensor of `dtype`, shaped as they are. The device copies them when it comes to it.

    From pinned memory, which torch gives to nobody else before the copy is made; from other memory the copy would
    wait for all that the device has to do.
    """
    if device.type != "cuda":
        return torch.as_tensor(values, dtype=dtype)
    return torch.as_tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """A tensor in host memory that will contain this one's numbers once the device has come so far."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
