"""A function of fixed tensors as a list of C calls, which one call makes again: what a CUDA graph is on a GPU.

    recording = record(lambda: model(token_ids, context), memory)
    token_ids[:] = ...
    recording.replay()  # recording.results are what the function would return now

It can be recorded if the C kernels compute all of it. torch may allocate memory and make views meanwhile; any other
operation of torch's would be missing from the list, so it is noticed and refused.
"""

import ctypes
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crane.kernels import native

_VIEWS = {"view", "split", "split_with_sizes", "flatten", "unflatten", "select", "slice", "unsqueeze", "expand"}


class NotRecordable(Exception):
    """Why a function cannot be recorded, in words for the log."""


class Memory:
    """Blocks that recorded functions compute in. All share them, so only one may run at a time."""

    def __init__(self):
        self.blocks: list[Tensor] = []  # uint8 [num_bytes]
        self._free: list[Tensor] = []

    def tensor(self, shape: list[int], dtype: torch.dtype, times: int) -> Tensor:
        """A tensor with memory of its own while it, or any view of it, exists; what it contains then stays.

        times: how much larger a block is to be, if one has to be made, than this tensor needs.
        """
        num_bytes = max(torch.Size(shape).numel() * dtype.itemsize, 1)
        block = min((each for each in self._free if len(each) >= num_bytes), key=len, default=None)
        if block is None:
            block = torch.empty(num_bytes * times, dtype=torch.uint8)
            self.blocks.append(block)
        else:
            self._free = [each for each in self._free if each is not block]
        held = block.numpy()[:num_bytes]  # lives as long as the storage that torch makes of it
        weakref.finalize(held, self._free_again, block)
        return torch.from_numpy(held).view(dtype).view(shape)

    def _free_again(self, block: Tensor) -> None:
        self._free.append(block)

    def unowned(self, tensor: Tensor) -> Tensor:
        """The same as `tensor`, a contiguous one from here, but its block does not wait for it."""
        for block in self.blocks:
            start = tensor.data_ptr() - block.data_ptr()
            if 0 <= start < len(block):
                return block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        raise NotRecordable("a result is no tensor of its own")


class Recording:
    """The calls of a function, from `record`. results: the tensors it returns, overwritten by every replay of any
    recording in the same memory."""

    def __init__(self, handle: int, memory: Memory, results: tuple[Tensor, ...]):
        self.results = results
        self._library, self._handle, self._memory = native.library(), handle, memory
        weakref.finalize(self, self._library.crane_forget, handle)

    def replay(self) -> None:
        """Compute again from what the function's tensors contain now. Raises MemoryError."""
        if self._library.crane_replay(self._handle, None, None):
            raise MemoryError("attention over long contexts ran out of memory")

    def timed(self) -> list[tuple[str, float]]:
        """`replay`, and the name of each kernel and the seconds it took, in order."""
        count = self._library.crane_num_calls(self._handle)
        names, seconds = (ctypes.c_char_p * count)(), (ctypes.c_double * count)()
        if self._library.crane_replay(self._handle, names, seconds):
            raise MemoryError("attention over long contexts ran out of memory")
        return [(name.decode(), each) for name, each in zip(names, seconds)]


class _Recorder(TorchDispatchMode):
    """Sees every operation of torch's on this thread."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch loads its compiler to keep it out of here: 0.6 s and 70 MB in the first step

    def __init__(self, memory: Memory, times: int):
        super().__init__()
        self._memory, self._times = memory, times

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = {key: value for key, value in (kwargs or {}).items() if value not in (None, False)}
        name = operation.overloadpacket.__name__
        if name == "empty" and kwargs.keys() <= {"dtype", "device"}:
            return self._memory.tensor(args[0], kwargs.get("dtype") or torch.get_default_dtype(), self._times)
        if name == "empty_like" and (not kwargs or kwargs == {"memory_format": torch.contiguous_format}):
            if kwargs or args[0].is_contiguous():
                return self._memory.tensor(args[0].shape, args[0].dtype, self._times)
        if name in _VIEWS:
            made = operation(*args, **kwargs)
            address = args[0].untyped_storage().data_ptr()
            if all(each.untyped_storage().data_ptr() == address for each in (made if type(made) is list else [made])):
                return made
        raise NotRecordable(f"torch computes {name}")


def record(function: Callable[[], tuple[Tensor, ...]], memory: Memory, times: int = 1) -> Recording:
    """Run `function` on the CPU and keep its C calls; the recording's `results` are there already.

    It must return contiguous tensors that it made, and read its inputs with C kernels only. times: see `Memory.tensor`.
    Raises NotRecordable, perhaps in the middle of it, and MemoryError.
    """
    library = native.library()
    if library is None:
        raise NotRecordable(f"there are no C kernels: {native.reason()}")
    if library.crane_record():
        raise MemoryError("no memory to record calls")
    try:
        with _Recorder(memory, times):
            made = function()
        results = tuple(map(memory.unowned, made))
    except BaseException:
        library.crane_forget(library.crane_recorded())
        raise
    handle = library.crane_recorded()
    if handle is None:
        raise MemoryError("no memory to record calls")
    return Recording(handle, memory, results)
