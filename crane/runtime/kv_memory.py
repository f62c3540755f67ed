"""All memory for K and V of one engine: device pages, host pages, files; what fits in them; moving between them."""

import time

import torch

from crane.models.config import ModelConfig
from crane.runtime import device as devices
from crane.runtime.costs import Costs
from crane.runtime.disk import DiskTier
from crane.runtime.kv_cache import HostPages, allocate_pages, page_bytes
from crane.runtime.pages import PagePool
from crane.runtime.settings import Settings
from crane.runtime.tiers import DiskLink
from crane.runtime.types import EngineStats

# Lengths that the number of sequences that fit at once is told for.
_LENGTHS = (1024, 8192, 32768)


class KVMemory:
    """Pages, allocated once from the measured budgets, and the ledger of them.

    pages: [num_pages, num_layers, 2, page_size, num_kv_heads, head_dim]. disk: None without a disk tier.
    Raises SettingsError when --max-model-len does not fit.
    """

    def __init__(self, settings: Settings, config: ModelConfig, device: torch.device, dtype: torch.dtype,
                 disk: DiskTier | None):
        num_pages, self.max_model_len = devices.page_budget(settings, config, device, dtype)
        num_host_pages = devices.host_budget(settings, config, device, dtype, num_pages)
        self.pages = allocate_pages(config, num_pages, settings.page_size, dtype=dtype, device=device)
        self.pool = PagePool(num_pages, settings.page_size, num_host_pages)
        self._host = HostPages(self.pages, num_host_pages)
        size = page_bytes(config, settings.page_size, dtype)
        self.costs = Costs(size, settings.preemption, self._host.measure())
        self.disk = None if disk is None else DiskLink(self.pool, disk, self.costs, self._host.buffer)

    def move(self, copies: list[tuple[int, int]]) -> None:
        """Make the copies that are due, and start what waits for them."""
        if copies:
            started_s = time.perf_counter()
            self._host.apply(copies)
            if self.pages.device.type == "cpu":  # elsewhere they go on while the step runs
                self.costs.copied(len(copies), time.perf_counter() - started_s)
        if self.disk is not None and self.disk.has_work:
            self._host.settle()
            self.disk.hand_over()

    def wait(self) -> None:
        """There is nothing to compute."""
        if self.disk is not None:
            self.disk.wait()

    def close(self) -> None:
        """Write what is still to be written to disk, for a few seconds at most."""
        if self.disk is not None:
            self.disk.disk.close()

    def capacity(self) -> dict:
        """What fits: pages, tokens and bytes of every tier, and how many sequences of some lengths at once."""
        pool, size = self.pool, self.costs.page_bytes
        tokens = pool.num_pages * pool.page_size
        lengths = sorted({min(length, self.max_model_len) for length in (*_LENGTHS, self.max_model_len)})
        fits = {
            "page_bytes": size,
            "device": {"pages": pool.num_pages, "tokens": tokens, "bytes": pool.num_pages * size},
            "host": {"pages": pool.host.size, "tokens": pool.host.size * pool.page_size, "bytes": pool.host.size * size,
                     "copy_bytes_per_s": round(self.costs.copy_bytes_s)},
            "disk": None,
            "sequences": {str(length): pool.num_pages // pool.pages_for(length) for length in lengths},
        }  # fmt: skip
        if self.disk is not None:
            fits["disk"] = {"folder": str(self.disk.disk.root), "bytes": self.disk.disk.max_bytes}
        return fits

    def describe(self) -> str:
        """`capacity` in one line."""
        fits = self.capacity()
        device, host, disk = fits["device"], fits["host"], fits["disk"]
        lengths = ", ".join(f"{num:,} x {int(length):,}" for length, num in fits["sequences"].items())
        parts = [f"{device['pages']:,} KV pages of {self.pool.page_size} tokens ({_gigabytes(device['bytes'])})",
                 f"room for {lengths} tokens at once"]  # fmt: skip
        if host["pages"]:
            speed = _gigabytes(host["copy_bytes_per_s"])
            parts.append(f"{host['pages']:,} more in host memory ({_gigabytes(host['bytes'])}, copied at {speed}/s)")
        if disk:
            parts.append(f"{_gigabytes(disk['bytes'])} of files in {disk['folder']}")
        return "; ".join(parts)

    def count(self, stats: EngineStats) -> None:
        """Write the counters of the host and the disk tier."""
        stats.num_host_pages, stats.free_host_pages = self.pool.host.size, self.pool.host.num_free
        if self.disk is None:
            return
        disk = self.disk.disk
        stats.disk_bytes, stats.disk_files, stats.disk_bad_files = disk.num_bytes, disk.num_files, disk.num_bad
        stats.disk_pages_written, stats.disk_pages_read = disk.num_written, disk.num_read
        stats.disk_pages_skipped, stats.disk_writable = self.disk.num_skipped, disk.writable


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
