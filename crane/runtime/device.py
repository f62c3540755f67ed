"""Which device and number type a model runs in, and how many KV pages fit beside it."""

import dataclasses
import os
from pathlib import Path

import torch

from crane.errors import SettingsError
from crane.kernels import lang, native, registry
from crane.models.config import ModelConfig
from crane.runtime.kv_cache import page_bytes
from crane.runtime.settings import Settings, cache_dir, num_cores

# Shares of the memory that is free once the weights are loaded. A CPU shares it with everything else
# that runs there, a GPU is ours.
_CPU_SHARE = 0.5
_GPU_SHARE = 0.9
# The same of host memory, for pages that give way.
_HOST_SHARE_CPU = 0.25
_HOST_SHARE_GPU = 0.5
# Tokens in a page unless --page-size says otherwise.
_CPU_PAGE, _GPU_PAGE = 16, 64
# Files of pages pass through host memory, a part of it at a time.
_MIN_HOST_PAGES = 16


def pick_device(settings: Settings) -> torch.device:
    """CUDA, else Metal, else the CPU; the CPU when asked for."""
    if settings.cpu:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda:0")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def pick_page_size(settings: Settings, device: torch.device) -> Settings:
    """The settings with --page-size filled in: on a GPU a tile of attention's work should lie in one page; elsewhere
    small pages waste less and share more."""
    if settings.page_size:
        return settings
    return dataclasses.replace(settings, page_size=_GPU_PAGE if device.type == "cuda" else _CPU_PAGE)


def pick_dtype(settings: Settings, device: torch.device, checkpoint_dtype: str) -> torch.dtype:
    """--dtype, or: the checkpoint's own on a GPU (bfloat16 for float32 ones); on a CPU bfloat16 where
    it multiplies bfloat16 in hardware, else float32."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.float16 if checkpoint_dtype == "float16" else torch.bfloat16


def why_no_overlap(settings: Settings, device: torch.device) -> str | None:
    """Why no step is launched before the one before is read (--overlap), or None. After `registry.configure`."""
    if settings.overlap != "auto":
        return None if settings.overlap == "on" else "ruled out"
    if device.type != "cuda":
        return f"on {device.type} the host would wait for what it launches"
    if lang.missing(device) or registry.KERNELS["sample"].mode == "torch":
        return "tokens are drawn in torch, which waits for the device"
    return None


def pick_kv_dtype(settings: Settings, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """--kv-dtype, or the compute type. Raises SettingsError where the kernels cannot read float8."""
    if settings.kv_dtype == "auto":
        return dtype
    if reason := lang.missing(device):
        raise SettingsError(f"--kv-dtype fp8: {reason}")
    if not lang.has_fp8():
        raise SettingsError("--kv-dtype fp8: this GPU knows no float8; it takes one of compute capability 8.9 or later")
    return torch.float8_e4m3fn


def set_threads(settings: Settings) -> None:
    """Give torch --threads threads, or one per core this process may use."""
    torch.set_num_threads(settings.threads or num_cores())


def load_native(settings: Settings, device: torch.device) -> None:
    """Make the C kernels available on a CPU, unless --kernels rules them out."""
    if device.type == "cpu" and settings.kernels == "auto":
        native.load(cache_dir(), torch.get_num_threads())
    else:
        native.unload()


def is_exact(settings: Settings) -> bool:
    """Whether nothing may be rounded further than to the compute type."""
    return settings.exact or settings.dtype == "float32"


def page_budget(settings: Settings, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    """(num_pages, max_model_len): what fits in --kv-memory, or in a share of the memory free now.

    Never more than --max-concurrent sequences of the longest length can use. Raises SettingsError when
    not even one sequence of --max-model-len fits.
    """
    size = page_bytes(config, settings.page_size, dtype)
    share = _GPU_SHARE if device.type == "cuda" else _CPU_SHARE
    budget = _bytes(settings.kv_memory or share, free_memory_bytes(device))
    longest = settings.max_model_len or config.max_position
    if settings.max_model_len > config.max_position:
        raise SettingsError(
            f"--max-model-len {settings.max_model_len} exceeds the model's own limit of {config.max_position} tokens"
        )
    num_pages = min(budget // size, settings.max_concurrent * -(-longest // settings.page_size))
    fits = num_pages * settings.page_size
    if fits < longest and settings.max_model_len:
        raise SettingsError(
            f"--max-model-len {longest} needs {-(-longest // settings.page_size) * size} bytes of KV pages, "
            f"but only {budget} are available: raise --kv-memory or lower --max-model-len"
        )
    if num_pages < 1:
        raise SettingsError(f"not one KV page of {size} bytes fits into {budget} bytes: raise --kv-memory")
    return num_pages, min(longest, fits)


def host_budget(settings: Settings, config: ModelConfig, device: torch.device, dtype: torch.dtype,
                num_pages: int) -> int:
    """How many more pages fit in --host-kv-memory, or in a share of the host memory that is left.

    Beside a GPU half of it; on a CPU, where it is the same memory, a quarter, and no more than the pages themselves.
    """
    count = _host_pages(settings, page_bytes(config, settings.page_size, dtype), device, num_pages)
    if settings.kv_cache_dir and count < _MIN_HOST_PAGES:
        raise SettingsError(f"--kv-cache-dir needs --host-kv-memory for at least {_MIN_HOST_PAGES} pages, "
                            f"but there are {count}")  # fmt: skip
    return count


def _host_pages(settings: Settings, size: int, device: torch.device, num_pages: int) -> int:
    free = free_memory_bytes(torch.device("cpu"))
    if device.type == "cuda":
        return _bytes(_HOST_SHARE_GPU if settings.host_kv_memory is None else settings.host_kv_memory, free) // size
    free = max(free - num_pages * size, 0)  # pages that nothing was written to count as free still
    if settings.host_kv_memory is None:
        return min(_bytes(_HOST_SHARE_CPU, free) // size, num_pages)
    return _bytes(settings.host_kv_memory, free) // size


def _bytes(setting: int | float, free: int) -> int:
    """A setting of kind "memory": bytes, or a fraction of what is free."""
    return int(setting * free) if isinstance(setting, float) else setting


def free_memory_bytes(device: torch.device) -> int:
    """Memory free for us on the device; for the CPU the least of what the system and our cgroup have left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    available = _meminfo_available()
    cgroup = _cgroup_left()
    return available if cgroup is None else min(available, cgroup)


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: fall through to what POSIX knows
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _cgroup_left() -> int | None:
    """What a container's memory limit leaves (cgroup v2), or None without one."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return None
        return max(int(limit) - int((root / "memory.current").read_text()), 0)
    except (OSError, ValueError):
        return None
