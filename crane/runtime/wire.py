"""Frames on the engine socket: 4-byte little-endian length, then msgpack.

One table of message types each way (`ToEngine`, `ToApi`); anything else, or a
frame over MAX_FRAME_BYTES, is a `WireError` and the connection is dropped.
"""

import struct

import msgspec

from crane.errors import CraneError
from crane.runtime.types import ToApi, ToEngine

PROTOCOL = 1
MAX_FRAME_BYTES = 64 << 20

_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()


class WireError(CraneError):
    """The peer sent something that is not a frame of this protocol."""


def pack(message: ToEngine | ToApi) -> bytes:
    """One message as one frame."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"message of {len(body)} bytes exceeds the frame limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Bytes in, messages out, for one direction of one connection.

    side: "engine" reads `ToEngine`, "api" reads `ToApi`.
    """

    def __init__(self, side: str):
        self._decoder = msgspec.msgpack.Decoder(ToEngine if side == "engine" else ToApi)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list:
        """The messages completed by `data`. Raises WireError."""
        buffer = self._buffer
        buffer += data
        messages = []
        start = 0
        while len(buffer) - start >= 4:
            (size,) = _LENGTH.unpack_from(buffer, start)
            if size > MAX_FRAME_BYTES:
                raise WireError(f"frame of {size} bytes exceeds the limit of {MAX_FRAME_BYTES}")
            end = start + 4 + size
            if len(buffer) < end:
                break
            try:
                messages.append(self._decoder.decode(memoryview(buffer)[start + 4 : end]))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise WireError(f"malformed frame: {error}") from error
            start = end
        if start:
            del buffer[:start]
        return messages
