"""Endpoints for whoever runs the server."""

import msgspec

from crane.api.endpoint import Answer, Context, Endpoint, Question, Reply, Request

_json = msgspec.json.Encoder().encode


def health(context: Context, request: Request) -> Reply:
    """200 when the engine takes requests, else 503 with its state."""
    state = context.state
    if state.status == "ready":
        return Reply(_json({"status": "ok"}))
    body = {"status": state.status, "reason": state.reason}
    if state.total_bytes:
        body |= {"loaded_bytes": state.loaded_bytes, "total_bytes": state.total_bytes}
    return Reply(_json(body), 503, {"Retry-After": "2"})


def stats(context: Context, request: Request) -> Answer:
    """The engine's counters: the same from every worker."""
    return Question("stats", lambda counters: Reply(_json(counters)))


ENDPOINTS = (
    Endpoint("GET", "/health", health, needs="nothing"),
    Endpoint("GET", "/v1/stats", stats),
)
