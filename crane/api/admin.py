"""Endpoints for whoever runs the server: health, what it serves, caches, aborts. The seed's and SGLang's."""

import dataclasses
import math
import shlex
import time

import msgspec

from crane import __version__
from crane.api import sglang
from crane.api.bodies import invalid
from crane.api.endpoint import Answer, Context, Endpoint, Question, Reply, Request
from crane.api.errors import error_reply
from crane.api.sglang_bodies import AbortBody
from crane.errors import EngineError, RequestError
from crane.runtime.settings import Settings

PROBE_S = 30.0
MAX_WAIT_S = 600.0
TEXT = {"Content-Type": "text/plain; charset=utf-8"}

_json = msgspec.json.Encoder().encode


def health(context: Context, request: Request) -> Reply:
    """Tell whether the engine takes requests. 200 when it does, else 503 with its state."""
    state = context.state
    if state.status == "ready":
        return Reply(_json({"status": "ok"}))
    body = {"status": state.status, "reason": state.reason}
    if state.total_bytes:
        body |= {"loaded_bytes": state.loaded_bytes, "total_bytes": state.total_bytes}
    return Reply(_json(body), 503, {"Retry-After": "2"})


def health_generate(context: Context, request: Request) -> Answer:
    """Tell whether the engine generates. 200 once it has, a probe's token if nobody else wants any; 503 after 30 s."""
    if context.state.status != "ready":
        return health(context, request)
    return Question("probe", lambda payload: Reply(_json({"status": "ok"})), timeout_s=PROBE_S)


def probe_failed(error: Exception) -> Reply:
    """How /health_generate says that the engine did not answer."""
    if isinstance(error, RequestError):  # no probe at all
        return error_reply(error)
    reason = str(error) if isinstance(error, EngineError) else "internal error"
    return Reply(_json({"status": "failed", "reason": reason}), 503, {"Retry-After": "2"})


def stats(context: Context, request: Request) -> Answer:
    """Show the engine's counters. They are the same from every worker."""
    return Question("stats", lambda counters: Reply(_json(counters)))


def trace(context: Context, request: Request) -> Answer:
    """What happened to the last requests, as a Chrome trace: open it in Perfetto or chrome://tracing."""
    return Question("trace", lambda events: Reply(_json(events)))


def model_info(context: Context, request: Request) -> Reply:
    """Describe what is served. The seed's fields and SGLang's. dtype and device are null until the engine is ready."""
    settings, model, info = context.settings, context.model, context.state.info
    own = {name: value for name, value in dataclasses.asdict(model.defaults).items() if value is not None}
    return Reply(_json({
        "model_path": settings.model_path,
        "tokenizer_path": settings.model_path,
        "served_model_name": model.name,
        "model_type": model.config.model_type,
        "architectures": model.architectures,
        "is_generation": True,
        "preferred_sampling_params": own or None,
        "weight_version": "default",
        "load_format": settings.format,
        "reasoning_parser": None,
        "tool_call_parser": None,
        "disaggregation_mode": "null",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "dtype": info and info.dtype,
        "device": info and info.device,
        "max_model_len": context.max_model_len,
        "vocab_size": model.num_ids,
    }))  # fmt: skip


def server_info(context: Context, request: Request) -> Answer:
    """Describe the server. All settings but secret ones, what the engine made of them, and its counters."""
    return Question("stats", lambda counters: Reply(_json(_server_info(context, counters))))


def flush_cache(context: Context, request: Request) -> Answer:
    """Forget cached prefixes. 200 when nothing runs or waits within ?timeout=s (default 0), else 400."""
    timeout_s = _timeout_s(request.query.get("timeout", "0"))

    def render(payload: dict) -> Reply:
        if payload["flushed"]:
            return Reply(b"Cache flushed.\n", headers=TEXT)
        return Reply(b"Flush cache failed: requests are running or waiting.\n", 400, TEXT)

    # with time for the answer to come
    return Question("flush_cache", render, {"timeout_s": timeout_s}, timeout_s=timeout_s + 30.0)


def abort_request(context: Context, request: Request) -> Answer:
    """End requests, of any worker. Those whose id begins with `rid`, or all. Ids that do not run are no error.

    Of the own key only, unless keys share everything (--no-isolate-keys).
    """
    body = sglang.native_body(AbortBody, request.body, context)

    def render(num_aborted: int) -> Reply:
        return Reply(_json({"success": True, "num_aborted": num_aborted}))

    if context.state.status not in ("ready", "draining") or not (body.rid or body.abort_all):
        return render(0)
    owner = context.tenant if context.settings.isolate_keys else ""
    return Question("abort", render, (None if body.abort_all else body.rid, owner))


def _server_info(context: Context, counters: dict) -> dict:
    settings, info = context.settings, context.state.info
    shown = {
        spec.name: getattr(settings, spec.name)
        for spec in dataclasses.fields(settings)
        if not spec.metadata["secret"]
    }
    capacity = info.num_pages * info.page_size
    return {
        **shown,
        **msgspec.to_builtins(info),
        "version": __version__,
        "served_model_name": context.model.name,
        "launch_command": shlex.join(["crane", "serve", *_flags(settings, shown)]),
        "startup_time": round(time.time() - counters["uptime_s"], 3),
        "max_total_num_tokens": capacity,
        "context_length": context.max_model_len,
        "max_running_requests": info.max_concurrent,
        "stats": counters,
        "internal_states": [
            {
                "last_gen_throughput": counters["avg_decode_tokens_per_sec"],
                "memory_usage": {"token_capacity": capacity},
                "effective_max_running_requests_per_dp": info.max_concurrent,
                "num_running": counters["active_sequences"],
                "num_waiting": counters["waiting_sequences"],
            }
        ],
    }


def _flags(settings: Settings, shown: dict) -> list[str]:
    """The flags that make these settings, as far as they may be shown."""
    flags = []
    for spec in dataclasses.fields(settings):
        value, flag = shown.get(spec.name, spec.default), spec.name.replace("_", "-")
        if value == spec.default:
            continue
        flags.append(f"--{flag}={value}" if not isinstance(value, bool) else f"--{flag}" if value else f"--no-{flag}")
    return flags


def _timeout_s(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_WAIT_S:
        raise invalid("timeout", f"expected seconds in 0..{MAX_WAIT_S:g}, got {text[:40]!r}")
    return seconds


ENDPOINTS = (
    *(Endpoint("GET", path, health, needs="nothing") for path in ("/health", "/ready", "/ping")),
    Endpoint("GET", "/health_generate", health_generate, needs="nothing", error_reply=probe_failed),
    Endpoint("GET", "/v1/stats", stats, needs="link"),
    Endpoint("GET", "/v1/trace", trace, needs="link"),
    *(Endpoint("GET", path, model_info, needs="model") for path in ("/model_info", "/get_model_info")),
    *(Endpoint("GET", path, server_info) for path in ("/server_info", "/get_server_info")),
    *(
        Endpoint(method, "/flush_cache", flush_cache, query={"timeout": {"type": "number", "minimum": 0}},
                 content_type="text/plain", error_reply=sglang.error_reply)
        for method in ("GET", "POST")
    ),
    Endpoint("POST", "/abort_request", abort_request, needs="nothing", body=AbortBody,
             error_reply=sglang.error_reply),
)  # fmt: skip
