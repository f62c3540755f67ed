"""What goes to a GPU in one copy. The copy itself is made on a GPU only."""

import numpy as np
import torch

from crane.kernels.transfer import _pack, _unpack, upload_all

ARRAYS = [
    np.arange(3, dtype=np.int32), np.empty((0, 0), np.int32), np.array([0.5, -np.inf], np.float32),
    np.array([[2**62], [-1]], np.int64), np.empty(0, np.float32), np.arange(10, dtype=np.int32).reshape(2, 5)[:, 1:3],
]  # fmt: skip


def test_arrays_come_out_of_a_parcel_as_they_went_in_at_multiples_of_16():
    parcel = _pack(ARRAYS, pin_memory=False)
    found = _unpack(parcel, ARRAYS)
    for array, tensor in zip(ARRAYS, found, strict=True):
        assert tensor.shape == array.shape and tensor.dtype == torch.from_numpy(array).dtype
        assert np.array_equal(tensor.numpy(), array)
        assert (tensor.storage_offset() * tensor.itemsize) % 16 == 0
        assert tensor.untyped_storage().data_ptr() == parcel.untyped_storage().data_ptr()


def test_on_the_cpu_nothing_is_copied():
    for array, tensor in zip(ARRAYS, upload_all(ARRAYS, torch.device("cpu")), strict=True):
        assert tensor.data_ptr() == (array.ctypes.data if array.size else 0)
