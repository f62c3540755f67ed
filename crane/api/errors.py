"""Every failure as one error object, OpenAI's: {"error": {message, type, param, code}}."""

import math
from typing import Any

import msgspec

from crane.api import sse
from crane.api.endpoint import Reply
from crane.errors import EngineError, RequestError
from crane.runtime.types import State

_UNAVAILABLE = (503, "server_error", "engine_unavailable")
_ENGINE = {
    "queue_full": (429, "rate_limit_error", "rate_limit_exceeded"),
    "rate_limited": (429, "rate_limit_error", "rate_limit_exceeded"),
    "loading": _UNAVAILABLE,
    "draining": _UNAVAILABLE,
    "stuck": _UNAVAILABLE,
    "not_found": (404, "invalid_request_error", "stream_not_found"),
    "lost": _UNAVAILABLE,
    "failed": _UNAVAILABLE,
    "duplicate_rid": (400, "invalid_request_error", "duplicate_rid"),
    "too_long": (400, "invalid_request_error", "context_length_exceeded"),
    "bad_request": (400, "invalid_request_error", None),
    "timeout": (504, "timeout_error", "timeout"),
    "internal": (500, "server_error", "internal_error"),
}
RETRY_AFTER_S = {429: 1, 503: 2}
_RETRY_AFTER_BY_STATUS_S = {
    "starting": 2.0, "loading": 2.0, "draining": 5.0, "stuck": 10.0, "lost": 2.0, "failed": 30.0,
}  # fmt: skip


def error_object(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and error object of any exception; nothing internal leaks into it."""
    if isinstance(error, RequestError):
        kind = "authentication_error" if error.status == 401 else "invalid_request_error"
        return error.status, _object(str(error), kind, error.field, error.code)
    if isinstance(error, EngineError):
        status, kind, code = _ENGINE.get(error.code, _ENGINE["internal"])
        return status, _object(str(error), kind, None, code)
    message = "internal error: the server's log has the details"
    return 500, _object(message, "server_error", None, "internal_error")


def error_reply(error: Exception) -> Reply:
    """The response that stands for `error`, with Retry-After where a retry makes sense."""
    status, body = error_object(error)
    headers = {}
    wait_s = getattr(error, "retry_after_s", None) or RETRY_AFTER_S.get(status)
    if wait_s:
        headers["Retry-After"] = str(math.ceil(wait_s))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    # the same again would not help: too long it stays, and the time that the client gave is over
    if body["error"]["code"] in ("context_length_exceeded", "timeout"):
        headers["x-should-retry"] = "false"
    return Reply(msgspec.json.encode(body), status, headers)


def error_frame(error: Exception) -> bytes:
    """The event that ends a stream which broke after its first byte."""
    return sse.frame(msgspec.json.encode(error_object(error)[1]))


def http_error_reply(status: int, message: str) -> Reply:
    """What the HTTP layer itself refuses: unknown routes, wrong methods, malformed requests."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return Reply(msgspec.json.encode(_object(message, kind, None, None)), status)


def out_of_time() -> EngineError:
    """A request of which there is nothing yet when its timeout_s is over."""
    return EngineError("timeout", "timeout_s: the time is over, and the request has not come to its first token")


def not_ready(state: State) -> EngineError:
    """Why an engine in `state` takes no request now."""
    code = "loading" if state.status == "starting" else state.status
    message = {
        "loading": "the model is still loading",
        "draining": "the server is shutting down",
        "stuck": "the engine is stuck",
        "lost": "the engine was lost and is being restarted",
        "failed": "the engine failed",
    }[code]
    if state.reason:
        message += f": {state.reason}"
    return EngineError(code, message, _RETRY_AFTER_BY_STATUS_S[state.status])


def _object(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    # what a client sent may be in them, and need not all come back
    message, param = message[:1000], param and param[:200]
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
