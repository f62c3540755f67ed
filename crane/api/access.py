"""What is kept about a request while it is answered, and written down when it is over: one line in the access log,
one of JSON in the audit log, and its tenant's account. Nothing a client said is in them but the path.
"""

import datetime
import functools
import logging
import logging.handlers
import time
import urllib.parse

import msgspec

from crane.api.endpoint import Generation
from crane.api.rate_limits import Lease, Meter
from crane.api.tenancy import Tenant, isolated
from crane.errors import SettingsError

log = logging.getLogger("crane.access")


class Access:
    """What the log will say of one request. Written by the driver that answers it.

    Times are counted from when the application got the request: its headers under ASGI, all of it under
    gunicorn's threads. log, audit: whether there is to be a line, and where one of JSON goes. client: its address.
    isolate: whether its tenant shares no computed prefixes with others. tenant, meter, lease: set by `auth.Gate`.
    """

    def __init__(self, method: str, path: str, client: str = "", *, logs: bool = True, audit: "AuditLog | None" = None,
                 isolate: bool = False):
        self.tenant: Tenant | None = None
        self.meter: Meter | None = None
        self.lease: Lease | None = None
        self._logs = logs
        self._audit = audit
        self._client = client
        self._isolate = isolate
        self._method = method
        self._path = _shown(path)
        self._started_s = time.perf_counter()
        self._first_s: float | None = None
        self._num_bytes = 0
        self._generation: Generation | None = None
        self._num_prompt = 0
        self._accepted = False
        self._over = False
        self.status = 500  # unless an answer says otherwise
        self.request_id = "-"

    def begins(self, generation: Generation) -> None:
        """The engine is about to be asked for this. Raises EngineError when it is more than the tenant has left."""
        self._generation = generation
        self._num_prompt = sum(len(request.prompt_ids) for request in generation.requests)
        if self.lease is not None and not getattr(generation, "resumes", False):  # that is paid for
            most = sum(each.sampling.n * each.sampling.max_tokens for each in generation.requests)
            self.lease.reserve(self._num_prompt + most)
        if self._isolate and self.tenant is not None:
            generation.requests[:] = isolated(generation.requests, self.tenant.id)

    def accepted(self) -> None:
        """The engine has taken it: from now on it costs the tenant something."""
        self._accepted = True

    def wrote(self, size: int) -> None:
        """So many bytes of the body went out."""
        if not self._num_bytes and size:
            self._first_s = time.perf_counter() - self._started_s
        self._num_bytes += size

    def ends(self) -> None:
        """Settle the account and write the lines, once."""
        if self._over:
            return
        self._over = True
        if self.lease is not None:
            self.lease.end(self._cost())
        if self._audit is not None:
            self._audit.add(self._record())
        if self._logs:
            self._write_line()

    def _cost(self) -> int:
        """Tokens that the request has come to."""
        generation = self._generation
        if not (self._accepted and self.lease.reserved):
            return 0
        if getattr(generation, "resumes", None) is not None and not generation.finished:
            return self.lease.reserved  # the engine goes on without its client, who may fetch the rest at any time
        return self._num_prompt + generation.num_tokens

    def _record(self) -> dict:
        record = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "client": self._client,
            "key": self.tenant and self.tenant.name,
            "method": self._method,
            "path": self._path,
            "status": self.status,
            "bytes": self._num_bytes,
            "ms": round(1000 * (time.perf_counter() - self._started_s), 1),
            "first_ms": self._first_s and round(1000 * self._first_s, 1),
        }
        if self._accepted:
            record |= {"prompt_tokens": self._num_prompt, "completion_tokens": self._generation.num_tokens,
                       "cut": not self._generation.finished}  # fmt: skip
        return record

    def _write_line(self) -> None:
        elapsed_s = time.perf_counter() - self._started_s
        words = [self._method, self._path, str(self.status), f"bytes={self._num_bytes}", f"ms={1000 * elapsed_s:.1f}"]
        if self._first_s is not None:
            words.append(f"first_ms={1000 * self._first_s:.1f}")
        generation = self._generation
        if self._accepted:
            words.append(f"prompt_tokens={self._num_prompt} completion_tokens={generation.num_tokens}")
            if not generation.finished:
                words.append("cut")  # the client left, or the engine was lost
        if self.tenant is not None:
            words.append(f"key={self.tenant.name}")
        words.append(f"id={self.request_id}")
        # as log.info does, but for the search for the line of code that says it
        log.handle(log.makeRecord(log.name, logging.INFO, "", 0, " ".join(words), None, None))


@functools.lru_cache
def _shown(path: str) -> str:
    """A path may hold anything, also line breaks."""
    return urllib.parse.quote(path[:200], safe="/:@!$&'()*+,;=~")


class AuditLog:
    """A file that gets a line of JSON per request; workers share it, and it may be moved away at any time."""

    def __init__(self, path: str):
        """Raises SettingsError when it cannot be written."""
        try:
            self._handler = _AuditHandler(path)
        except OSError as error:
            raise SettingsError(f"CRANE_AUDIT_LOG: cannot write {path}: {error.strerror}") from None

    def add(self, record: dict) -> None:
        """A full disk loses lines, not requests."""
        line = msgspec.json.encode(record).decode()
        self._handler.handle(logging.LogRecord("crane.audit", logging.INFO, "", 0, line, None, None))


class _AuditHandler(logging.handlers.WatchedFileHandler):
    def handleError(self, record) -> None:
        log.error("the audit log cannot be written", exc_info=True)


def access_of(req) -> Access:
    """That of a falcon request, WSGI or ASGI."""
    return (req.env if isinstance(getattr(req, "env", None), dict) else req.scope)["crane.access"]


class WatchedBody:
    """A WSGI answer, whose end is the request's. The server calls close() whatever happens."""

    def __init__(self, access: Access, chunks):
        self._access = access
        self._chunks = chunks

    def __iter__(self):
        return iter(self._chunks)

    def close(self) -> None:
        try:
            if hasattr(self._chunks, "close"):
                self._chunks.close()
        finally:
            self._access.ends()
