"""Weights: tensors out of a checkpoint, by the names config.json's world gives them.

Both formats are read the same way: a piece of the file at a time, by threads, straight
into the tensor that the model keeps. Pieces are small enough to stay in a core's cache
and the only memory beside the result.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from crane.errors import ModelError
from crane.kernels import lang
from crane.kernels.blocks import BlockWeight
from crane.kernels.gguf_linear import gguf_linear
from crane.kernels.packed import PANEL_ROWS, PackedWeight, Stored, can_pack, is_packable, is_read_by_c, pack
from crane.kernels.planes import PLANE_FORMATS, Planes, pack_planes
from crane.models.files import Checkpoint, TensorInfo
from crane.models.gguf_header import BLOCK_TYPES, show
from crane.models.shape import ModelConfig

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCKS = {name: (elements, nbytes) for name, elements, nbytes in BLOCK_TYPES.values()}
# elements cast in one call: below the 32,768 from which torch starts threads of its own inside each of ours
_CAST = 127 * 256
# elements read and dequantised in one go, a multiple of every block size; and those of one task of the pool
_PIECE = 4 * _CAST
_TASK = 8 * _PIECE
# bytes of a matrix read, and packed, at a time
_READ = 4 << 20
# stored by some converters although nothing reads them: derived from the config
_HARMLESS_SUFFIXES = (".rotary_emb.inv_freq",)
_TIED_HEAD = "lm_head.weight"


class Weights:
    """The tensors of one checkpoint, cast to `dtype`, on `device`. Used by one thread.

    exact: whether weights are rounded to `dtype` and nothing is rounded further; see `packed`.
    progress(loaded_bytes, total_bytes): called after each tensor, bytes as in the file.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype,
                 exact: bool = True, progress: Callable[[int, int], None] | None = None):
        """Raises ModelError when a header is broken."""
        self.checkpoint = checkpoint
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self.exact = exact
        self.progress = progress
        self.names = _gguf_names(checkpoint, config) if checkpoint.format == "gguf" else None
        self.total_bytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        self.loaded_bytes = 0
        self.used: set[str] = set()
        self.files: dict[Path, int] = {}
        self.pool = ThreadPoolExecutor(max(1, torch.get_num_threads()), "crane-weights")

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds `name`."""
        return self._stored_name(name) in self.checkpoint.tensors

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """The tensor called `name`, in `dtype` instead of the model's own when given.

        Raises ModelError when it is missing or has another shape.
        """
        return self.rows([name], [shape], dtype)

    def rows(self, names: list[str], shapes: list[tuple[int, ...]], dtype: torch.dtype | None = None) -> Tensor:
        """Several tensors, one below the other along dimension 0, in one allocation.

        Raises ModelError naming the tensor that is missing, misshapen or unreadable.
        """
        infos = [self._find(name, tuple(shape)) for name, shape in zip(names, shapes, strict=True)]
        num_rows = sum(shape[0] for shape in shapes)
        out = torch.empty((num_rows, *shapes[0][1:]), dtype=dtype or self.dtype, device=self.device)
        start = 0
        for name, info in zip(names, infos):
            self._fill(out[start : start + info.shape[0]], name, info)
            start += info.shape[0]
        return out

    def packed(self, names: list[str], shapes: list[tuple[int, ...]], gated: bool = False) -> list[PackedWeight] | None:
        """What `rows` gives, laid out for the C kernels: one weight for each run of tensors of one type.

        GGUF blocks stay quantised unless `exact`. gated: they are an MLP's gate and up, paired where they make one
        weight. None where the kernels cannot take one of the tensors; then nothing was read. Raises ModelError as
        `rows` does.
        """
        infos = [self._find(name, tuple(shape)) for name, shape in zip(names, shapes, strict=True)]
        kinds = ["BF16" if self.exact or not is_packable(info.dtype) else info.dtype for info in infos]
        if self.device.type != "cpu" or not all(map(can_pack, kinds, shapes, [self.dtype] * len(kinds))):
            return None
        found, runs = [], []
        for kind, name, info in zip(kinds, names, infos, strict=True):
            # a run goes on while its types are the same and its tensors end where panels do
            if not runs or runs[-1][0] != kind or runs[-1][1][-1][1].shape[0] % PANEL_ROWS:
                runs.append((kind, []))
            runs[-1][1].append((name, info))
        for kind, run in runs:
            num_rows = sum(info.shape[0] for _, info in run)
            pieces = (piece for name, info in run for piece in self._stored(kind, name, info))
            try:
                found.append(pack(kind, num_rows, shapes[0][1], pieces, gated and len(runs) == 1))
            except OSError as error:
                raise ModelError(f"{error.filename}: cannot be read: {error.strerror}") from None
        return found

    def planes(self, names: list[str], shapes: list[tuple[int, ...]]) -> list[Planes] | None:
        """What `rows` gives, in GGUF blocks that stay quantised on a GPU: one weight for each run of tensors of one
        type, on the device.

        None where the Triton kernels do not run or cannot take one of the types; then nothing was read. Raises
        ModelError as `rows` does.
        """
        infos = [self._find(name, tuple(shape)) for name, shape in zip(names, shapes, strict=True)]
        wanted = self.device.type == "cuda" or gguf_linear.mode == "triton"
        if gguf_linear.mode == "torch" or not wanted or lang.missing(self.device):
            return None
        if any(info.dtype not in PLANE_FORMATS for info in infos):
            return None
        found = []
        for kind, run in itertools.groupby(zip(names, infos, strict=True), key=lambda each: each[1].dtype):
            pieces = [piece.to(self.device) for name, info in run for piece in self._pieces(kind, name, info)]
            found.append(pack_planes(BlockWeight(kind, torch.cat(pieces))))
        return found

    def _stored(self, kind: str, name: str, info: TensorInfo) -> Iterator[Tensor | Stored]:
        """The rows of a matrix, for `pack`: where they lie, if they can be packed as they are, else themselves."""
        if kind != info.dtype or self._permuted_heads(name) or not is_read_by_c(kind):
            yield from self._pieces(kind, name, info)
            return
        num_rows = info.shape[0]
        yield Stored(info.path, self._descriptor(info.path), info.offset, num_rows, info.nbytes // num_rows)
        self._count(info)

    def _pieces(self, kind: str, name: str, info: TensorInfo) -> Iterator[Tensor]:
        """The rows of a matrix, some at a time: its blocks as bytes, or in bfloat16."""
        num_heads = self._permuted_heads(name)
        row_bytes = info.nbytes // info.shape[0]
        step = max(PANEL_ROWS, _READ // row_bytes // PANEL_ROWS * PANEL_ROWS)
        if kind == "BF16" and (num_heads or info.dtype not in _PLAIN):
            yield self.tensor(name, info.shape, torch.bfloat16)
            return
        for start in range(0, info.shape[0], info.shape[0] if num_heads else step):
            count = info.shape[0] if num_heads else min(step, info.shape[0] - start)
            data = torch.empty(count, row_bytes, dtype=torch.uint8)
            _read_exactly(self._descriptor(info.path), info, data.view(-1).numpy(), info.offset + start * row_bytes)
            if kind == "BF16":
                data = data.view(_PLAIN[info.dtype]).to(torch.bfloat16)
            yield _unpermute(data, num_heads) if num_heads else data
        self._count(info)

    def finish(self) -> None:
        """Close the files. Raises ModelError naming tensors that the model did not ask for."""
        self.pool.shutdown()
        for descriptor in self.files.values():
            os.close(descriptor)
        self.files.clear()
        left = [name for name in self.checkpoint.tensors if not (name in self.used or self._harmless(name))]
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            listed = ", ".join(show(name) for name in left[:3])
            family = self.config.model_type
            raise ModelError(f"{self.checkpoint.path}: unknown tensors for {family}: {listed}{more}")
        if self.progress:
            self.progress(self.total_bytes, self.total_bytes)

    def _harmless(self, name: str) -> bool:
        return name.endswith(_HARMLESS_SUFFIXES) or (name == _TIED_HEAD and self.config.tie_word_embeddings)

    def _stored_name(self, name: str) -> str:
        if self.names is None:
            return name
        return self.names.get_name(name, try_suffixes=(".weight", ".bias")) or name

    def _find(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        stored = self._stored_name(name)
        info = self.checkpoint.tensors.get(stored)
        if info is None:
            called = stored if stored == name else f"{stored} ({name})"
            expected = f"expected shape {list(shape)}"
            raise ModelError(f"{self.checkpoint.path}: tensor {called} is missing, {expected}")
        if info.shape != shape:
            found = f"expected shape {list(shape)}, found {list(info.shape)}"
            raise ModelError(f"{info.path}: tensor {show(stored)}: {found}")
        if info.dtype not in _PLAIN and not _can_dequantize(info.dtype):
            raise ModelError(f"{info.path}: tensor {show(stored)}: type {info.dtype} is not supported")
        return info

    def _fill(self, out: Tensor, name: str, info: TensorInfo) -> None:
        """Read one tensor into `out`, which has its shape."""
        num_heads = self._permuted_heads(name)
        # the pieces are written by the CPU, in the file's order of rows
        direct = self.device.type == "cpu" and not num_heads
        target = out if direct else torch.empty(out.shape, dtype=out.dtype)
        self._read(info, target.view(-1))
        if num_heads:
            target = _unpermute(target, num_heads)
        if not direct:
            out.copy_(target)
        if out.dtype == torch.float16 and not torch.isfinite(out).all():
            raise ModelError(f"{info.path}: tensor {show(info.name)} exceeds the range of float16")
        self._count(info)

    def _count(self, info: TensorInfo) -> None:
        """Note that a tensor was read."""
        if info.name not in self.used:
            self.used.add(info.name)
            self.loaded_bytes += info.nbytes
            if self.progress:
                self.progress(self.loaded_bytes, self.total_bytes)

    def _permuted_heads(self, name: str) -> int:
        """Number of heads whose rows the file keeps in rotary-pair order; 0 for all other tensors.

        GGUF keeps q and k of the llama architecture so, and of no other that crane runs.
        """
        if self.names is None or self.config.model_type != "llama":
            return 0
        projection = name.rsplit(".", 2)[-2]
        return {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}.get(projection, 0)

    def _read(self, info: TensorInfo, out: Tensor) -> None:
        """Read, dequantise and cast into the flat CPU tensor `out`, in parallel when it is worth it."""
        descriptor = self._descriptor(info.path)
        starts = range(0, out.numel(), _TASK)
        if len(starts) == 1:
            _read_pieces(descriptor, info, out, 0)
        else:
            list(self.pool.map(lambda start: _read_pieces(descriptor, info, out, start), starts))

    def _descriptor(self, path: Path) -> int:
        if path not in self.files:
            try:
                self.files[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
        return self.files[path]


def _gguf_names(checkpoint: Checkpoint, config: ModelConfig) -> gguf.TensorNameMap:
    architectures = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    architecture = architectures[checkpoint.metadata["general.architecture"]]
    return gguf.get_tensor_name_map(architecture, config.num_layers)


def _can_dequantize(dtype: str) -> bool:
    # the package has one class for each block type that it can take apart
    return dtype in _BLOCKS and hasattr(gguf.quants, dtype)


def _read_pieces(descriptor: int, info: TensorInfo, out: Tensor, start: int) -> None:
    """Elements [start, start + _TASK) of a tensor, or as many as there are, into `out`."""
    end = min(start + _TASK, out.numel())
    block_elements, block_bytes = _BLOCKS[info.dtype]
    buffer = np.empty(_PIECE // block_elements * block_bytes, dtype=np.uint8)
    for first in range(start, end, _PIECE):
        last = min(first + _PIECE, end)
        piece = buffer[: (last - first) // block_elements * block_bytes]
        _read_exactly(descriptor, info, piece, info.offset + first // block_elements * block_bytes)
        if info.dtype in _PLAIN:
            values = torch.from_numpy(piece).view(_PLAIN[info.dtype])
        else:
            # as one row: the package splits its input into groups of rows, which would be tiny ones
            values = torch.from_numpy(gguf.dequantize(piece[None], gguf.GGMLQuantizationType[info.dtype])[0])
        for target, source in zip(out[first:last].split(_CAST), values.split(_CAST)):
            target.copy_(source)


def _read_exactly(descriptor: int, info: TensorInfo, piece: np.ndarray, offset: int) -> None:
    try:
        num_bytes = os.preadv(descriptor, [piece], offset)
    except OSError as error:
        raise ModelError(f"{info.path}: cannot be read: {error.strerror}") from None
    if num_bytes != piece.nbytes:
        raise ModelError(f"{info.path}: the file became shorter while it was read")


def _unpermute(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows of q or k from rotary-pair order (0, d/2, 1, d/2 + 1, ...) to half-split order (0, 1, 2, ...)."""
    half = tensor.shape[0] // num_heads // 2
    rest = tensor.shape[1:]
    return tensor.view(num_heads, half, 2, math.prod(rest)).transpose(1, 2).reshape(-1, *rest)
