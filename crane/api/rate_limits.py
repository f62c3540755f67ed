"""Limits of tenants, counted once for all workers of a server.

A tenant with limits has a small file in the server's run folder. Requests and tokens per minute are two buckets in
it, filled at the rate of the limit and holding a minute's worth. Requests at once are bytes of it, each locked while
its request is answered: when a worker is killed, the kernel gives its locks back.
"""

import contextlib
import fcntl
import os
import struct
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from crane.api.tenancy import Tenant
from crane.errors import EngineError
from crane.runtime import launch

_STATE = struct.Struct("<ddd")  # requests left, tokens left, when (monotonic, the same clock in every process)
_STATE_BYTE, _FIRST_SLOT = 0, 64
_MINUTE_S = 60.0


class Meter:
    """One tenant's limits, shared with the other workers through `path` (None: with nobody).

    left: (requests, tokens) when this process looked last.
    """

    def __init__(self, tenant: Tenant, path: Path | None):
        self.tenant = tenant
        self.left = (float(tenant.rpm), float(tenant.tpm))
        self._file = tempfile.TemporaryFile() if path is None else _opened(path)
        self._lock = threading.Lock()  # the kernel's locks are between processes only
        self._held: set[int] = set()

    def admit(self) -> "Lease":
        """One more request. Raises EngineError ("rate_limited") saying when it makes sense to try again."""
        slot = self._take_slot()
        try:
            self.take(1.0, 0.0)
        except EngineError:
            self.free_slot(slot)
            raise
        return Lease(self, slot)

    def headers(self) -> dict[str, str]:
        """What OpenAI's API says about its limits, of those that there are."""
        found = {}
        for name, limit, left in zip(("requests", "tokens"), (self.tenant.rpm, self.tenant.tpm), self.left):
            if limit:
                found[f"x-ratelimit-limit-{name}"] = str(limit)
                found[f"x-ratelimit-remaining-{name}"] = str(max(int(left), 0))
                found[f"x-ratelimit-reset-{name}"] = _duration((limit - left) * _MINUTE_S / limit)
        return found

    def take(self, requests: float, tokens: float, check: bool = True) -> None:
        """Both or nothing, of what there is; negative amounts are given back. check: False takes also what is not
        there, which then has to fill up first. Raises EngineError as `admit`."""
        rpm, tpm = self.tenant.rpm, self.tenant.tpm
        with self._lock, self._locked():
            now = time.monotonic()
            raw = os.pread(self._file.fileno(), _STATE.size, 0)
            left = (float(rpm), float(tpm))
            if len(raw) == _STATE.size:
                old = _STATE.unpack(raw)
                passed_s = max(now - old[2], 0.0)
                filled = passed_s / _MINUTE_S
                left = (min(old[0] + filled * rpm, float(rpm)), min(old[1] + filled * tpm, float(tpm)))
            for name, limit, have, want in (("requests", rpm, left[0], requests), ("tokens", tpm, left[1], tokens)):
                if check and limit and have < want:
                    self.left = left
                    raise _limited(self.tenant, f"{limit} {name} per minute", (want - have) * _MINUTE_S / limit)
            # what has no limit runs up no debt, which would count once it gets one
            self.left = (min(left[0] - requests, float(rpm)) if rpm else 0.0,
                         min(left[1] - tokens, float(tpm)) if tpm else 0.0)  # fmt: skip
            os.pwrite(self._file.fileno(), _STATE.pack(*self.left, now), 0)

    @contextlib.contextmanager
    def _locked(self):
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _STATE_BYTE)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _STATE_BYTE)

    def _take_slot(self) -> int | None:
        if not self.tenant.concurrent:
            return None
        with self._lock:
            for slot in range(self.tenant.concurrent):
                if slot in self._held:
                    continue
                try:
                    fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _FIRST_SLOT + slot)
                except OSError:
                    continue  # another worker's
                self._held.add(slot)
                return slot
        raise _limited(self.tenant, f"{self.tenant.concurrent} requests at once", 1.0)

    def free_slot(self, slot: int | None) -> None:
        if slot is not None:
            with self._lock:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _FIRST_SLOT + slot)
                self._held.discard(slot)


@dataclass
class Lease:
    """One admitted request of a tenant with limits. reserved: tokens that were taken for it, a minute's worth at most:
    a request for more may run when the bucket is full."""

    meter: Meter
    slot: int | None
    reserved: int = 0
    over: bool = False

    def reserve(self, tokens: int) -> None:
        """Take the tokens that the request can come to. Raises EngineError as `Meter.admit`."""
        if self.meter.tenant.tpm:
            self.meter.take(0.0, float(min(tokens, self.meter.tenant.tpm)))
            self.reserved = min(tokens, self.meter.tenant.tpm)

    def end(self, tokens: int) -> None:
        """The request is over and came to `tokens`; what was taken for more is given back. Idempotent."""
        if self.over:
            return
        self.over = True
        if self.meter.tenant.tpm and tokens != self.reserved:
            self.meter.take(0.0, float(tokens - self.reserved), check=False)
        self.meter.free_slot(self.slot)


class Meters:
    """The meters of one worker. They begin when a tenant asks for the first time."""

    def __init__(self, arbiter_pid: int):
        self._arbiter_pid = arbiter_pid
        self._meters: dict[str, Meter] = {}
        self._lock = threading.Lock()

    def of(self, tenant: Tenant) -> Meter | None:
        """None for a tenant without limits."""
        if not tenant.limited:
            return None
        with self._lock:
            meter = self._meters.get(tenant.id)
            if meter is None:
                shared = self._arbiter_pid != os.getpid()
                path = launch.note_path(f"limits-{tenant.id}", self._arbiter_pid) if shared else None
                meter = self._meters[tenant.id] = Meter(tenant, path)
            return meter


def _opened(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")


def _limited(tenant: Tenant, what: str, wait_s: float) -> EngineError:
    message = f"the limit of {tenant.name} is reached: {what}; try again in {_duration(wait_s)}"
    return EngineError("rate_limited", message, max(wait_s, 0.001))


def _duration(seconds: float) -> str:
    """As OpenAI writes them: 120ms, 7.5s, 2m0s."""
    if seconds < 1:
        return f"{max(round(1000 * seconds), 0)}ms"
    if seconds < 60:
        return f"{seconds:.1f}s"
    return f"{int(seconds) // 60}m{int(seconds) % 60}s"
