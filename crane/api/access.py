"""The access log: one line per request, without anything a client said but the path."""

import logging
import time
import urllib.parse

from crane.api.endpoint import Generation
from crane.runtime.types import Output

log = logging.getLogger("crane.access")


class Access:
    """What the log will say of one request. Written by the driver that answers it.

    Times are counted from when the application got the request: its headers under ASGI, all of it under
    gunicorn's threads.
    """

    def __init__(self, method: str, path: str):
        self._method = method
        # a path may hold anything, also line breaks
        self._path = urllib.parse.quote(path[:200], safe="/:@!$&'()*+,;=~")
        self._started_s = time.perf_counter()
        self._first_s: float | None = None
        self._num_bytes = 0
        self._generation: Generation | None = None
        self._num_prompt = 0
        self._num_completion = 0
        self._over = False
        self.status = 0
        self.request_id = "-"

    def begins(self, generation: Generation) -> None:
        """The engine is asked for this."""
        self._generation = generation
        self._num_prompt = sum(len(request.prompt_ids) for request in generation.requests)

    def got(self, outputs: list[Output]) -> None:
        """The engine gave this."""
        for output in outputs:
            self._num_completion += len(output.token_ids)

    def wrote(self, size: int) -> None:
        """So many bytes of the body went out."""
        if not self._num_bytes and size:
            self._first_s = time.perf_counter() - self._started_s
        self._num_bytes += size

    def ends(self) -> None:
        """Write the line, once."""
        if self._over:
            return
        self._over = True
        elapsed_s = time.perf_counter() - self._started_s
        words = [self._method, self._path, str(self.status), f"bytes={self._num_bytes}", f"ms={1000 * elapsed_s:.1f}"]
        if self._first_s is not None:
            words.append(f"first_ms={1000 * self._first_s:.1f}")
        if self._generation is not None:
            words.append(f"prompt_tokens={self._num_prompt} completion_tokens={self._num_completion}")
            if not self._generation.finished:
                words.append("cut")  # the client left, or the engine was lost
        log.info("%s id=%s", " ".join(words), self.request_id)


def watch_send(access: Access, send):
    """ASGI's `send`, seen by `access`."""

    async def watched(event):
        if event["type"] == "http.response.start":
            access.status = event["status"]
            for name, value in event["headers"]:
                if name == b"x-request-id":
                    access.request_id = value.decode()
        else:
            access.wrote(len(event.get("body", b"")))
        await send(event)

    return watched


def watch_start(access: Access, start_response):
    """WSGI's `start_response`, seen by `access`."""

    def watched(status, headers, exc_info=None):
        access.status = int(status[:3])
        for name, value in headers:
            if name == "x-request-id":
                access.request_id = value
        return start_response(status, headers, exc_info) if exc_info else start_response(status, headers)

    return watched


class WatchedBody:
    """A WSGI answer, seen by `access`. The server calls close() whatever happens."""

    def __init__(self, access: Access, chunks):
        self._access = access
        self._chunks = chunks

    def __iter__(self):
        for chunk in self._chunks:
            self._access.wrote(len(chunk))
            yield chunk

    def close(self) -> None:
        try:
            if hasattr(self._chunks, "close"):
                self._chunks.close()
        finally:
            self._access.ends()
