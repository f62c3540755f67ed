"""What requests that asked for it have been given so far, so that another connection can have it again. Torch-free."""

import itertools
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
    """One request. note: what the API worker needs to go on, opaque here. outputs: packed, in order."""

    note: bytes
    num_open: int
    outputs: list[bytes] = field(default_factory=list)
    num_bytes: int = 0


class Journal:
    """At most `max_bytes` of outputs; each is kept `keep_s` seconds after its client has left or it has ended.

    Written by the stepper's thread only.
    """

    def __init__(self, max_bytes: int, keep_s: float, clock: Callable[[], float] = time.monotonic):
        self._max_bytes = max_bytes
        self._keep_s = keep_s
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        # When those that nobody listens to are forgotten. All are kept equally long, so the first is the first to go.
        self._until_s: dict[str, float] = {}
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, rid: str) -> bool:
        return rid in self._entries

    def open(self, rid: str, note: bytes, num_choices: int) -> None:
        """From now on outputs of this request are kept."""
        self.forget(rid)
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
                self._keep(output.rid)
        self._grow(output.rid, len(packed) + _OUTPUT_BYTES)

    def leave(self, rid: str) -> None:
        """Nobody listens to this request any more."""
        if rid not in self._until_s:
            self._keep(rid)

    def note(self, rid: str) -> bytes | None:
        """What `open` was given; None when the request is not kept (any more)."""
        entry = self._entries.get(rid)
        return entry.note if entry is not None and not self._is_over(rid) else None

    def resume(self, rid: str) -> list[Output] | None:
        """All outputs so far, for somebody who listens from now on; None when the request is not kept (any more)."""
        entry = self._entries.get(rid)
        if entry is None or self._is_over(rid):
            return None
        if entry.num_open:
            self._until_s.pop(rid, None)
        else:
            self._keep(rid)
        return [_decode(packed) for packed in entry.outputs]

    def expire(self) -> list[str]:
        """Forget what is over. Returns the requests among it that have not ended."""
        over = list(itertools.takewhile(self._is_over, self._until_s))
        return [rid for rid in over if self.forget(rid).num_open]

    def forget(self, rid: str) -> Entry | None:
        """Keep nothing of this request, if there was anything."""
        self._until_s.pop(rid, None)
        entry = self._entries.pop(rid, None)
        if entry is not None:
            self.num_bytes -= entry.num_bytes
        return entry

    def _keep(self, rid: str) -> None:
        """From now on for `keep_s`."""
        self._until_s.pop(rid, None)
        self._until_s[rid] = self._clock() + self._keep_s

    def _is_over(self, rid: str) -> bool:
        return rid in self._until_s and self._clock() >= self._until_s[rid]

    def _grow(self, rid: str, num_bytes: int) -> None:
        self._entries[rid].num_bytes += num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self._max_bytes:
            # the one that ended first, else the one that is too large: its stream goes on, but cannot be resumed
            ended = (other for other, entry in self._entries.items() if not entry.num_open and other != rid)
            victim = next(ended, rid)
            self.forget(victim)
            if victim == rid:
                return
