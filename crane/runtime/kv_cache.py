"""The memory of all KV pages, on the device and in host memory. The one place that knows their layout."""

import itertools
import time

import torch
from torch import Tensor

from crane.errors import SettingsError
from crane.kernels.packed import in_huge_pages
from crane.kernels.page_copy import copy_pages
from crane.models.config import ModelConfig
from crane.models.files import Checkpoint
from crane.runtime.disk import DiskTier, fingerprint
from crane.runtime.settings import Settings

# Host memory is allocated in such pieces when it is first used: pinning all of it at once would delay the start.
_SLAB_BYTES = 64 << 20


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Memory of one page: K and V of `page_size` tokens in every layer."""
    return config.num_layers * 2 * page_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def allocate_pages(config: ModelConfig, num_pages: int, page_size: int, *, dtype: torch.dtype,
                   device: torch.device) -> Tensor:
    """Uninitialised pages: [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim].

    Page-major, so that all layers of one page are one piece of memory: swapping or copying a page is one
    copy. Within a layer a token's heads lie together, as flash kernels read them.
    """
    shape = (num_pages, config.num_layers, 2, page_size, config.num_kv_heads, config.head_dim)
    if device.type == "cpu":  # attention on small ones waits as long for their addresses as for what they contain
        return in_huge_pages(num_pages * page_bytes(config, page_size, dtype)).view(dtype).view(shape)
    return torch.empty(shape, dtype=dtype, device=device)


def open_disk(settings: Settings, checkpoint: Checkpoint, config: ModelConfig, device: torch.device,
              dtype: torch.dtype, kv_dtype: torch.dtype) -> DiskTier | None:
    """The disk tier of --kv-cache-dir, or None without. Raises SettingsError when it cannot be as asked.

    dtype: the compute type; with the device, --exact and --kernels it decides how pages are rounded.
    """
    if not settings.kv_cache_dir:
        return None
    if not settings.prefix_cache:
        raise SettingsError("--kv-cache-dir keeps what --no-prefix-cache forbids to keep: give one of them")
    size = page_bytes(config, settings.page_size, kv_dtype)
    page = allocate_pages(config, 1, settings.page_size, dtype=kv_dtype, device=torch.device("meta"))
    layout = (str(kv_dtype), settings.page_size, *page.shape)
    rounding = (device.type, str(dtype), settings.exact, settings.kernels)
    return DiskTier(settings.kv_cache_dir, settings.kv_cache_size, size,
                    lambda: fingerprint(checkpoint, config, layout, rounding))  # fmt: skip


class HostPages:
    """Pages of host memory, each as large as one of `kv`, and the copies between the two.

    kv: [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim]. On CUDA they are pinned and pages go
    out on a stream of their own, from a copy that the device makes first, so that the step does not wait for them.
    """

    def __init__(self, kv: Tensor, num_host_pages: int):
        self.kv = kv
        self.num_pages = len(kv)
        self.num_host_pages = num_host_pages
        self._cuda = kv.device.type == "cuda"
        self._stream = torch.cuda.Stream(kv.device) if self._cuda else None
        self._slab_pages = max(_SLAB_BYTES // max(kv[0].nbytes, 1), 1)
        self._slabs: list[Tensor | None] = [None] * -(-num_host_pages // self._slab_pages)

    def page(self, number: int) -> Tensor:
        """One host page: [num_layers, 2, page_size, num_kv_heads, head_dim]."""
        place, within = divmod(number, self._slab_pages)
        if self._slabs[place] is None:
            count = min(self._slab_pages, self.num_host_pages - place * self._slab_pages)
            self._slabs[place] = torch.empty((count, *self.kv.shape[1:]), dtype=self.kv.dtype, pin_memory=self._cuda)
        return self._slabs[place][within]

    def buffer(self, number: int) -> memoryview:
        """The bytes of one host page."""
        return self.page(number).view(-1).view(torch.uint8).numpy().data

    @torch.inference_mode()
    def apply(self, copies: list[tuple[int, int]]) -> None:
        """Make `PagePool.copies`, in order. What the device computes next sees them made."""
        for goes_out, run in itertools.groupby(copies, lambda copy: copy[1] >= self.num_pages):
            if goes_out:
                self._out(list(run))
                continue
            for source, target in run:
                if source >= self.num_pages:
                    self._in(self.page(source - self.num_pages), self.kv[target])
                else:
                    self.kv[target].copy_(self.kv[source])

    def _out(self, copies: list[tuple[int, int]]) -> None:
        if not self._cuda:
            for source, target in copies:
                self.page(target - self.num_pages).copy_(self.kv[source])
            return
        for start in range(0, len(copies), self._slab_pages):
            sources, targets = zip(*copies[start : start + self._slab_pages])
            # the pages themselves may be written to from here on
            staged = torch.empty((len(sources), *self.kv.shape[1:]), dtype=self.kv.dtype, device=self.kv.device)
            copy_pages(self.kv, sources, staged, range(len(sources)))
            self._stream.wait_stream(torch.cuda.current_stream(self.kv.device))
            with torch.cuda.stream(self._stream):
                for page, target in zip(staged, targets):
                    self.page(target - self.num_pages).copy_(page, non_blocking=True)
            staged.record_stream(self._stream)

    def _in(self, host_page: Tensor, page: Tensor) -> None:
        if self._cuda:  # it may be on its way out still
            torch.cuda.current_stream(page.device).wait_stream(self._stream)
        page.copy_(host_page, non_blocking=self._cuda)

    def settle(self) -> None:
        """Wait until host memory contains what was copied to it."""
        if self._cuda:
            self._stream.synchronize()

    def measure(self, num_pages: int = 8) -> float:
        """Bytes a second of copying pages out and in again; overwrites the first of both, so call it
        before anything is computed. 0 without host pages."""
        count = min(num_pages, self.num_pages, self.num_host_pages)
        out = [(place, self.num_pages + place) for place in range(count)]
        for page in self.kv[:count]:
            page.zero_()  # touched once, so that what is timed is not the system handing out memory
        self.apply(out)
        self.settle()
        started_s = time.perf_counter()
        self.apply(out + [(target, source) for source, target in out])
        self.settle()
        if self._cuda:
            torch.cuda.synchronize(self.kv.device)
        return 2 * count * self.kv[0].nbytes / max(time.perf_counter() - started_s, 1e-9)
