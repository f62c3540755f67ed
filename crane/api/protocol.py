"""One client's connection to an asgi worker: gunicorn's, with bounds on the time and the connections clients may take.

gunicorn bounds how long a connection may stay idle between requests, but not before the first one, nor how slowly
a body may come or an answer be taken, nor how many connections there are.
"""

import asyncio
import logging
import resource

from gunicorn.asgi.protocol import ASGIProtocol

from crane.api.errors import http_error_reply
from crane.runtime.settings import Settings

# descriptors that a worker needs for anything but clients
SPARE_FILES = 128

log = logging.getLogger("crane.api")


class CraneProtocol(ASGIProtocol):
    """See above. The worker has `settings`, in `waiting` the connections that are in no request, oldest first, and in
    `refused` what takes note of what gets no further than this, or None."""

    def __init__(self, worker):
        super().__init__(worker)
        self._limits: Settings = worker.settings
        self._timer: asyncio.TimerHandle | None = None  # until the headers are there, then until the body is
        self._write_timer: asyncio.TimerHandle | None = None
        self._reached_app = False  # the request that is being read or answered

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        worker = self.worker
        if worker.nr_conns > worker.max_connections:
            oldest = next(iter(worker.waiting), None)
            if oldest is None:  # all of them are being answered
                self._refuse(503, "too many connections", (("Retry-After", "1"),))
                return
            del worker.waiting[oldest]  # the next one of a burst has to find another
            oldest.transport.abort()
        worker.waiting[self] = None
        self._time_out(self._limits.header_timeout_s, "the request's headers did not come")

    def connection_lost(self, error) -> None:
        self._stop_timers()
        self.worker.waiting.pop(self, None)
        super().connection_lost(error)

    def pause_writing(self) -> None:
        super().pause_writing()
        wait_s = self._limits.write_timeout_s
        self._write_timer = self.worker.loop.call_later(wait_s, self._give_up_writing)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _on_headers_complete(self):
        self.worker.waiting.pop(self, None)
        self._reached_app = True
        self._time_out(self._limits.body_timeout_s, "the request's body did not come")
        return super()._on_headers_complete()

    def _on_message_complete(self):
        self._stop_timer()
        super()._on_message_complete()

    def _arm_keepalive_timer(self):
        self.worker.waiting[self] = None
        self._reached_app = False
        super()._arm_keepalive_timer()

    def _feed_callback_parser(self, data):
        try:
            return super()._feed_callback_parser(data)
        except ValueError as error:  # such as a length of 5,000 digits, which gunicorn's parser trips over
            log.debug("a malformed request", exc_info=error)
            self._refuse(400, "malformed request")
            return False

    def _send_error_response(self, status, message, extra_headers=()):
        """What the HTTP layer refuses, as a JSON error object."""
        reply = http_error_reply(status, message)
        extra = "".join(f"{name}: {value}\r\n" for name, value in extra_headers)
        head = f"HTTP/1.1 {status} {self._get_reason_phrase(status)}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(reply.body)}\r\n{extra}Connection: close\r\n\r\n"
        self._safe_write(head.encode("latin-1") + reply.body)
        if self.worker.refused is not None and not self._reached_app:
            peer = self.transport.get_extra_info("peername")
            self.worker.refused(str(peer[0]) if isinstance(peer, tuple) else "", status)

    def _time_out(self, wait_s: float, what: str) -> None:
        self._stop_timer()
        message = f"{what} within {wait_s:g} s"
        self._timer = self.worker.loop.call_later(wait_s, self._refuse, 408, message)

    def _refuse(self, status: int, message: str, extra_headers=()) -> None:
        self._stop_timers()
        self._send_error_response(status, message, extra_headers)
        self._close_transport()
        if self._request_ready is not None:
            self._request_ready.set()  # so that the connection's task sees that it is closed

    def _give_up_writing(self) -> None:
        log.warning("a client took nothing of its answer for %g s: cut", self._limits.write_timeout_s)
        self.transport.abort()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_timers(self) -> None:
        self._stop_timer()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def max_connections(settings: Settings) -> int:
    """How many connections this process may have: the setting, or what its limit on open files allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            log.warning("the limit on open files (%d) allows for %d connections", soft, soft - SPARE_FILES)
    return settings.max_connections if soft == resource.RLIM_INFINITY else max(min(wanted, soft) - SPARE_FILES, 1)
