"""Numbers on their way to the device and back, without a host that waits for the device."""

import itertools

import numpy as np
import torch
from torch import Tensor


def upload(values: list | np.ndarray, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """These numbers on the device: a tensor of `dtype`, shaped as they are. The device copies them when it comes to it.

    From pinned memory, which torch gives to nobody else before the copy is made; from other memory the copy would
    wait for all that the device has to do.
    """
    if torch.device(device).type != "cuda":
        return torch.as_tensor(values, dtype=dtype).to(device)
    return torch.as_tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


def upload_all(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """These arrays on the device, in one copy. On the CPU they share their memory."""
    if device.type != "cuda":
        tensors = list(map(torch.from_numpy, arrays))
        return tensors if device.type == "cpu" else [tensor.to(device) for tensor in tensors]
    # kernels are compiled for addresses that are multiples of 16
    ends = list(itertools.accumulate(-(-array.nbytes // 16) * 16 for array in arrays))
    host = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
    starts = [0, *ends[:-1]]
    for array, start in zip(arrays, starts):
        host.numpy()[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    parcel = host.to(device, non_blocking=True)
    return [parcel[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
            for array, start in zip(arrays, starts)]  # fmt: skip


def download(tensor: Tensor) -> Tensor:
    """A tensor in host memory that will contain this one's numbers once the device has come so far."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def fill_in(numbers: Tensor, values: Tensor) -> Tensor:
    """`numbers` with values[-1 - n] in place of every n below 0. Both hold integers, values: [num_values]."""
    return torch.where(numbers < 0, values[(-1 - numbers).clamp(min=0)], numbers)
