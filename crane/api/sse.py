"""Server-sent events: the bytes of frames and the headers they travel under."""

import msgspec

CONTENT_TYPE = "text/event-stream"
HEADERS = {
    "Content-Type": f"{CONTENT_TYPE}; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # else a proxy such as nginx holds tokens back
}
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_S = 10.0

_json = msgspec.json.Encoder().encode


def json_text(text: str) -> bytes:
    """`text` as a JSON string that stays on one line for every client.

    Some clients split lines as `str.splitlines` does, so the three separators
    that JSON leaves unescaped are escaped here.
    """
    return _json(text) if text.isascii() else json_line(text)


def json_line(value) -> bytes:
    """The same for any value."""
    raw = _json(value)
    if not raw.isascii():
        raw = raw.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
        raw = raw.replace(b"\xc2\x85", b"\\u0085")
    return raw


def frame(payload: bytes) -> bytes:
    """One event from one line of JSON."""
    return b"data: " + payload + b"\n\n"
