"""Every setting of crane: one frozen dataclass, one field a flag and a CRANE_* variable.

This is the only file that reads the environment. Precedence: flags (which
`crane serve` turns into variables for its workers) over CRANE_* variables over
the defaults here. Torch-free.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from crane.errors import SettingsError

MODEL_TYPES = ("auto", "hunyuan", "qwen25", "qwen3", "llama")
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def _setting(default, help, *, choices=None, minimum=None, maximum=None, kind=None, secret=False):
    meta = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "secret": secret}
    return field(default=default, metadata=meta | {"kind": kind or type(default).__name__}, repr=not secret)


@dataclass(frozen=True)
class Settings:
    """All settings. `engine` ones shape the engine process, the rest the API workers."""

    # the seed's flags, with its defaults
    model_path: str = _setting("", "model folder, or path of a .gguf file (required)")
    model_type: str = _setting("auto", "model architecture", choices=MODEL_TYPES)
    model_name: str = _setting("", "name shown in the API (default: the folder's or file's name)")
    host: str = _setting("0.0.0.0", "address to bind")
    port: int = _setting(8080, "port to bind", minimum=0, maximum=65535)
    cpu: bool = _setting(False, "use the CPU even where a GPU is present")
    max_concurrent: int = _setting(32, "sequences decoded at the same time, at most", minimum=1)
    decode_tokens_per_seq: int = _setting(
        16, "tokens a sequence decodes before it gives way when more want to run than fit", minimum=1
    )
    format: str = _setting("auto", "weight format", choices=("auto", "safetensors", "gguf"))
    # engine
    dtype: str = _setting("auto", "compute type", choices=("auto", "float32", "bfloat16", "float16"))
    kernels: str = _setting(
        "auto",
        "what computes: auto is Triton on a GPU and, where there is a C compiler, crane's own C on a CPU, wherever "
        "they can take a call, else torch; torch is torch alone; triton is an error where auto would fall back",
        choices=("auto", "torch", "triton"),
    )
    cuda_graphs: bool = _setting(True, "on a GPU, replay decode steps as CUDA graphs")
    recorded_steps: bool = _setting(True, "on a CPU, replay decode steps as recorded lists of C calls")
    screen: bool = _setting(
        True, "on a CPU, find the next tokens of up to 8 greedy sequences with a 4-bit copy of an 8-bit output layer, "
        "and compute the layer itself only where it may be largest",
    )
    overlap: str = _setting(
        "auto",
        "launch a step before the tokens of the one before are read, so that the device need not wait for the host: "
        "auto is on on a GPU and off on a CPU, where host and model share the cores",
        choices=("auto", "on", "off"),
    )
    kv_dtype: str = _setting(
        "auto", "type of KV pages: the compute type, or fp8 (e4m3) on GPUs that know it", choices=("auto", "fp8")
    )
    torch_kernels: str = _setting("", "kernels that run in torch all the same, by name, separated by commas")
    exact: bool = _setting(
        False, "on a CPU round GGUF weights to the compute type and nothing further, as --dtype float32 does, too"
    )
    threads: int = _setting(0, "CPU threads of the engine (0: one per core)", minimum=0)
    page_size: int = _setting(0, "tokens in one KV page (0: 16 on a CPU, 64 on a GPU)", minimum=0)
    prefix_cache: bool = _setting(True, "keep computed prompts for later requests that start the same way")
    kv_memory: int | float = _setting(
        0, "memory for KV pages, e.g. 2g or 500m, or 40% or 0.4 of what is free (0: measured)", minimum=0, kind="memory"
    )
    host_kv_memory: int | float | None = _setting(
        None, "host memory for KV pages that had to give way, in the same units (auto: measured; 0: none)",
        minimum=0, kind="memory",
    )
    preemption: str = _setting(
        "auto", "sequences that give up their pages are copied to host memory, recomputed, or what measures cheaper",
        choices=("auto", "swap", "recompute"),
    )
    kv_cache_dir: str = _setting("", "folder where computed prompts are kept across restarts (default: none)")
    kv_cache_size: int = _setting(
        0, "disk space for them, e.g. 20g (0: a tenth of what is free)", minimum=0, kind="bytes"
    )
    max_model_len: int = _setting(0, "longest prompt plus output in tokens (0: the model's own)", minimum=0)
    max_step_tokens: int = _setting(512, "tokens computed in one step, at most", minimum=1)
    speculative: str = _setting(
        "off", "guess tokens from what followed the same tokens before, and verify several in one step",
        choices=("off", "ngram"),
    )
    num_draft_tokens: int = _setting(8, "tokens guessed at a time, at most", minimum=1)
    ngram_min: int = _setting(2, "tokens that must have stood there before, for a guess", minimum=1)
    ngram_max: int = _setting(5, "tokens compared to choose between places to guess from", minimum=1)
    max_queue: int = _setting(
        256, "choices waiting to start, at most; beyond it 429. Where several share the engine, each may have as many "
        "waiting as there are places left", minimum=1,
    )
    fair_by: str = _setting(
        "key", "who shares the engine fairly, by tokens: API keys, users of a key (the request's safety_identifier "
        "or user), or nobody", choices=("key", "user", "none"),
    )
    fair_output_weight: float = _setting(
        2.0, "what an output token counts there; a computed prompt token counts 1", minimum=0
    )
    priority_order: str = _setting(
        "lowest-first", "which of the requests' priorities run first: the lowest as in vLLM, or the highest as in "
        "SGLang", choices=("lowest-first", "highest-first"),
    )
    step_timeout_s: float = _setting(
        120.0, "seconds after which a step counts as stuck, and /health says so (0: never)", minimum=0
    )
    journal_memory: int = _setting(
        64 << 20, "memory for outputs of resumable streams (0: no stream is resumable)", minimum=0, kind="bytes"
    )
    journal_s: float = _setting(
        60.0, "seconds a resumable stream goes on without its client, and is kept after its end", minimum=0
    )
    trace_requests: int = _setting(
        0, "time the last so many requests, for GET /v1/trace (0: only those that ask for a timeline)", minimum=0
    )
    linger_s: float = _setting(10.0, "seconds the engine outlives its last API worker", minimum=0)
    # API workers
    reasoning_field: str = _setting(
        "reasoning_content",
        "field of a chat's answer that has the reasoning: reasoning_content, or both it and reasoning",
        choices=("reasoning_content", "both"),
    )
    incremental_streaming_output: bool = _setting(
        False, "events of a streamed /generate have the new text and ids only, as with SGLang's flag of this name"
    )
    metric_aliases: str = _setting(
        "none", "also show /metrics under the names that dashboards for these servers look for",
        choices=("none", "vllm", "sglang", "both"),
    )
    workers: int = _setting(1, "API worker processes of `crane serve`", minimum=1)
    engine_socket: str = _setting("", "socket of an engine to use instead of starting one")
    response_store: int = _setting(
        64 << 20, "disk space for stored responses of /v1/responses (0: nothing is stored)", minimum=0, kind="bytes"
    )
    # how much one request may ask for
    max_body: int = _setting(32 << 20, "largest request body", minimum=1, kind="bytes")
    max_prompt_chars: int = _setting(
        0, "characters of one prompt, at most (0: 32 for each token of the context, a million at least)", minimum=0
    )
    max_messages: int = _setting(4096, "messages of one chat, at most", minimum=1)
    max_tools: int = _setting(128, "tools of one request, at most", minimum=0)
    max_n: int = _setting(128, "n and best_of, at most", minimum=1, maximum=1024)
    max_logprobs: int = _setting(20, "log-probabilities of alternatives to a token, at most", minimum=0, maximum=1000)
    max_stop: int = _setting(64, "stop strings of one request, at most", minimum=0)
    max_stop_chars: int = _setting(1000, "characters of one stop string, at most", minimum=1)
    max_logit_bias: int = _setting(4096, "tokens in one logit_bias, at most", minimum=0)
    max_schema: int = _setting(
        64 << 10, "largest schema, grammar, regular expression or list of choices", minimum=1, maximum=256 << 10,
        kind="bytes",
    )
    # how much of a worker's time and memory one client may take (asgi workers)
    max_connections: int = _setting(4096, "connections of one API worker, at most", minimum=1)
    header_timeout_s: float = _setting(15.0, "seconds for a request's headers to come", minimum=0.1, maximum=86400)
    body_timeout_s: float = _setting(120.0, "seconds for a request's body to come", minimum=0.1, maximum=86400)
    write_timeout_s: float = _setting(60.0, "seconds a client may take none of its answer", minimum=0.1, maximum=86400)
    graceful_timeout_s: int = _setting(60, "seconds running requests get after SIGTERM", minimum=0)
    api_key: str = _setting(
        "", "keys, separated by commas, of which clients must send one (in a file: --api-key-file)", secret=True
    )
    api_key_file: str = _setting(
        "", "file of such keys, one a line, with names and limits: KEY name=... rpm=... tpm=... concurrent=..."
    )
    isolate_keys: bool = _setting(True, "share no computed prefixes between the keys of different names")
    user_special_tokens: bool = _setting(
        False, "let special tokens that users and tools spell out in messages act as such, instead of being text"
    )
    metrics_key: bool = _setting(False, "ask for a key at /metrics, too")
    cors_origins: str = _setting("", "web origins whose pages may call the API, separated by commas, or * for all")
    access_log: bool = _setting(True, "log a line per request")
    audit_log: str = _setting("", "file to which a line of JSON is added per request")
    worker_swap: bool = _setting(True, "let plain `gunicorn crane.api:app` use the asgi worker")
    log_level: str = _setting("info", "log level of every process", choices=("debug", "info", "warning", "error"))

    def __post_init__(self):
        for spec in dataclasses.fields(self):
            _check(spec, getattr(self, spec.name))
        if self.ngram_max < self.ngram_min:
            raise SettingsError(f"{variable('ngram_max')} must be at least {variable('ngram_min')} ({self.ngram_min})")

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None, **overrides) -> "Settings":
        """Settings from CRANE_* variables, then `overrides`. An unknown variable is an error."""
        env = os.environ if env is None else env
        specs = {variable(spec.name): spec for spec in dataclasses.fields(cls)}
        values = {}
        for name, text in env.items():
            if not name.startswith("CRANE_"):
                continue
            if name not in specs:
                raise SettingsError(f"unknown variable {name}; known: {', '.join(sorted(specs))}")
            values[specs[name].name] = parse(specs[name], text, name)
        return cls(**{**values, **overrides})

    def to_env(self) -> dict[str, str]:
        """The variables that make `from_env` give these settings, defaults left out."""
        out = {}
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if value != spec.default:
                out[variable(spec.name)] = str(int(value)) if isinstance(value, bool) else str(value)
        return out

    @property
    def served_name(self) -> str:
        """The model's name in the API: --model-name, else the folder's or .gguf file's name."""
        if self.model_name:
            return self.model_name
        path = Path(self.model_path).resolve()
        return path.stem if path.suffix == ".gguf" else path.name


def prefer_waiting_threads() -> None:
    """Let OpenMP's threads sleep while they wait, unless the environment says otherwise. Call before torch loads.

    By default they spin, which starves whoever shares the cores, API workers and clients first: served on two
    cores, that made the whole two to three times slower (docs/performance.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def child_env(**more: str) -> dict[str, str]:
    """The environment of a child process: ours, and `more`."""
    return {**os.environ, **more}


def cache_dir() -> Path:
    """Where crane keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crane"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def variable(name: str) -> str:
    """The environment variable of one setting."""
    return f"CRANE_{name.upper()}"


def parse(spec: dataclasses.Field, text: str, source: str):
    """One setting from text. Raises SettingsError naming `source`."""
    kind = spec.metadata["kind"]
    try:
        if kind == "bool":
            return {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False,
                    "off": False, "": False}[text.strip().lower()]
        if kind == "memory" and text.strip().lower() == "auto":
            return None
        if kind == "memory" and (share := re.fullmatch(r"(\d+(?:\.\d+)?) ?%|([01]?\.\d+)", text.strip())):
            return _fraction(float(share[1]) / 100 if share[1] else float(share[2]))
        if kind in ("bytes", "memory"):
            number, unit = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([bkmgt]?)i?b?", text.strip().lower()).groups()
            return int(float(number) * _UNITS[unit])
        return {"int": int, "float": float, "str": str}[kind](text)
    except (KeyError, AttributeError, ValueError, OverflowError):
        wanted = {"bool": "0 or 1", "bytes": "a size such as 500m or 2g", "int": "a whole number", "float": "a number",
                  "memory": "a size such as 500m or 2g, or a part such as 40% or 0.4"}  # fmt: skip
        raise SettingsError(f"{source} must be {wanted[kind]}, got {text!r}") from None


def _fraction(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(value)
    return value


def _check(spec: dataclasses.Field, value) -> None:
    choices, minimum = spec.metadata["choices"], spec.metadata["minimum"]
    if choices and value not in choices:
        raise SettingsError(f"{variable(spec.name)} must be one of {', '.join(choices)}, got {value!r}")
    if minimum is not None and value is not None and not value >= minimum:
        raise SettingsError(f"{variable(spec.name)} must be at least {minimum}, got {value!r}")
    if spec.metadata["maximum"] is not None and not value <= spec.metadata["maximum"]:
        raise SettingsError(f"{variable(spec.name)} must be at most {spec.metadata['maximum']}, got {value!r}")
    if spec.name == "page_size" and value & (value - 1):
        raise SettingsError(f"{variable(spec.name)} must be a power of two, got {value!r}")
