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
    """These arrays on the device, a CUDA GPU, in one copy; or on the CPU, where they share their memory."""
    if device.type == "cpu":
        return list(map(torch.from_numpy, arrays))
    return _unpack(_pack(arrays, pin_memory=True).to(device, non_blocking=True), arrays)


def _starts(arrays: list[np.ndarray]) -> list[int]:
    """Where each array's bytes start in the parcel of all, and where it ends."""
    # kernels are compiled for addresses that are multiples of 16
    return list(itertools.accumulate((-(-array.nbytes // 16) * 16 for array in arrays), initial=0))


def _pack(arrays: list[np.ndarray], pin_memory: bool) -> Tensor:
    """All of them in one tensor: uint8 [num_bytes]."""
    *starts, size = _starts(arrays)
    parcel = torch.empty(size, dtype=torch.uint8, pin_memory=pin_memory)
    for array, start in zip(arrays, starts, strict=True):
        parcel.numpy()[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    return parcel


def _unpack(parcel: Tensor, arrays: list[np.ndarray]) -> list[Tensor]:
    """Views of the parcel, wherever it is, with the arrays' types and shapes."""
    return [parcel[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
            for array, start in zip(arrays, _starts(arrays))]  # fmt: skip


def download(tensor: Tensor) -> Tensor:
    """A tensor in host memory that will contain this one's numbers once the device has come so far."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def fill_in(numbers: Tensor, values: Tensor) -> Tensor:
    """`numbers` with values[-1 - n] in place of every n below 0. Both hold integers, values: [num_values]."""
    return torch.where(numbers < 0, values[(-1 - numbers).clamp(min=0)], numbers)
