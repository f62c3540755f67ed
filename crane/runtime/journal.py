"""What requests that asked for it have been given so far, so that another connection can have it again. Torch-free."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from crane.runtime.types import Output

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Output).decode
# An entry takes about so much beside its texts.
_ENTRY_BYTES = 500
_OUTPUT_BYTES = 50


@dataclass
class Entry:
    """One request. note: what the API worker needs to go on, opaque here. outputs: packed, in order.

    until_s: when it is forgotten, on the journal's clock; None while somebody listens.
    """

    note: bytes
    num_open: int
    outputs: list[bytes] = field(default_factory=list)
    num_bytes: int = 0
    until_s: float | None = None


class Journal:
    """At most `max_bytes` of outputs; each is kept `keep_s` seconds after its client has left or it has ended.

    Written by the stepper's thread only.
    """

    def __init__(self, max_bytes: int, keep_s: float, clock: Callable[[], float] = time.monotonic):
        self._max_bytes = max_bytes
        self._keep_s = keep_s
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, rid: str) -> bool:
        return rid in self._entries

    def open(self, rid: str, note: bytes, num_choices: int) -> None:
        """From now on outputs of this request are kept."""
        self._drop(rid)
        self._entries[rid] = Entry(note, num_choices)
        self._grow(rid, len(note) + _ENTRY_BYTES)

    def add(self, output: Output) -> None:
        """An output of any request."""
        entry = self._entries.get(output.rid)
        if entry is None:
            return
        packed = _encode(output)
        entry.outputs.append(packed)
        if output.finish_reason is not None:
            entry.num_open -= 1
            if not entry.num_open:
                entry.until_s = self._clock() + self._keep_s
        self._grow(output.rid, len(packed) + _OUTPUT_BYTES)

    def leave(self, rid: str) -> None:
        """Nobody listens to this request any more."""
        entry = self._entries[rid]
        entry.until_s = entry.until_s or self._clock() + self._keep_s

    def note(self, rid: str) -> bytes | None:
        """What `open` was given; None when the request is not kept (any more)."""
        entry = self._entries.get(rid)
        return entry.note if entry is not None and not self._is_over(entry) else None

    def resume(self, rid: str) -> list[Output] | None:
        """All outputs so far, for somebody who listens from now on; None when the request is not kept (any more)."""
        entry = self._entries.get(rid)
        if entry is None or self._is_over(entry):
            return None
        entry.until_s = self._clock() + self._keep_s if not entry.num_open else None
        return [_decode(packed) for packed in entry.outputs]

    def expire(self) -> list[str]:
        """Forget what is over. Returns the requests among it that have not ended."""
        over = [rid for rid, entry in self._entries.items() if self._is_over(entry)]
        return [rid for rid in over if self._drop(rid).num_open]

    def _is_over(self, entry: Entry) -> bool:
        return entry.until_s is not None and self._clock() >= entry.until_s

    def _grow(self, rid: str, num_bytes: int) -> None:
        self._entries[rid].num_bytes += num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self._max_bytes:
            # the one that ended first, else the one that is too large: its stream goes on, but cannot be resumed
            ended = (other for other, entry in self._entries.items() if not entry.num_open and other != rid)
            victim = next(ended, rid)
            self._drop(victim)
            if victim == rid:
                return

    def _drop(self, rid: str) -> Entry | None:
        entry = self._entries.pop(rid, None)
        if entry is not None:
            self.num_bytes -= entry.num_bytes
        return entry
