"""What a request may say about its place in the queue: its class, its time limit, and whose it is."""

from typing import Any

import msgspec

from crane.api.bodies import QueuedBody
from crane.api.endpoint import Context
from crane.api.tenancy import tenant_of_key
from crane.runtime.types import Generate


def claims(context: Context, body: QueuedBody) -> dict[str, Any]:
    """The fields of `Generate` that say where in the queue a request of this body belongs."""
    priority = body.priority or 0
    return {
        "priority": -priority if context.settings.priority_order == "highest-first" else priority,
        "timeout_s": body.timeout_s,
        "tenant": _tenant(context, body),
        "owner": context.tenant,
    }


def claim(context: Context, body: QueuedBody, requests: list[Generate]) -> list[Generate]:
    """`requests` with these fields."""
    fields = claims(context, body)
    return [msgspec.structs.replace(request, **fields) for request in requests]


def _tenant(context: Context, body: QueuedBody) -> str:
    fair_by = context.settings.fair_by
    if fair_by == "none":
        return ""
    user = getattr(body, "safety_identifier", None) or getattr(body, "user", None)
    if fair_by == "user" and user:
        return tenant_of_key(f"{context.tenant}\0{user}")
    return context.tenant
