"""The two thin drivers: they carry out what endpoints ask for, over ASGI and over WSGI.

All I/O of the API is here: reading bodies, asking the engine, writing frames,
and noticing that a client is gone, which aborts its requests.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterator

import falcon

from crane.api import sse
from crane.api.access import Access
from crane.api.endpoint import JSON, Answer, Endpoint, Generation, Question, Reply, Request
from crane.api.errors import RETRY_AFTER_S, error_frame, error_reply
from crane.errors import CraneError, EngineError, RequestError
from crane.runtime.types import Output

LONG_BODY_BYTES = 8192  # longer ones are parsed off the event loop
LOOK_S = 0.2  # how often a WSGI worker looks whether its client is still there
ACCEPT_TIMEOUT_S = 30.0
CLIENT_GONE = Reply(b"", 499)

log = logging.getLogger("crane.api")


class Resource:
    """The endpoints of one path. get_site: the worker's `app.Site`."""

    def __init__(self, endpoints: list[Endpoint], get_site: Callable):
        self.path = endpoints[0].path
        self._error_replies = {endpoint.method: endpoint.error_reply for endpoint in endpoints}
        for endpoint in endpoints:
            responder = self._responder(endpoint, get_site)
            setattr(self, f"on_{endpoint.method.lower()}", responder)
            if endpoint.method == "GET" and endpoint.content_type != sse.CONTENT_TYPE:
                self.on_head = responder  # falcon drops the body of a HEAD response itself

    def error_reply(self, method: str) -> Callable[[Exception], Reply]:
        """How errors are written to clients that call this path with `method`."""
        return self._error_replies.get(method) or error_reply

    @contextlib.contextmanager
    def _errors_into(self, resp, endpoint: Endpoint) -> Iterator[None]:
        """What goes wrong inside becomes the response; what falcon raises, falcon answers."""
        try:
            yield
        except falcon.HTTPError:
            raise
        except Exception as error:
            put_error(resp, error, self.error_reply(endpoint.method))


class AsgiResource(Resource):
    """The endpoints of one path, for falcon.asgi."""

    def _responder(self, endpoint: Endpoint, get_site: Callable):
        async def answer_of(site, req, resp, params) -> Reply | None:
            tether = req.scope["crane.tether"]
            body = await _read_async(tether.receive, req.content_length or 0, site.settings.max_body)
            context = site.context(endpoint.needs, tenant_of(req))
            request = Request(endpoint.method, req.path, params, _query(req), body, _last_event_id(req))
            if len(body) > LONG_BODY_BYTES:
                answer = await asyncio.to_thread(endpoint.run, context, request)
            else:
                answer = endpoint.run(context, request)
            if isinstance(answer, Question):
                answer = answer.render(await site.link.call(answer.op, answer.payload, answer.timeout_s))
            if isinstance(answer, Reply):
                return answer
            return await _generate_async(site.link, answer, req.scope, resp)

        async def respond(req, resp, **params):
            with self._errors_into(resp, endpoint):
                put(resp, await answer_of(get_site(), req, resp, params))

        return respond


class WsgiResource(Resource):
    """The endpoints of one path, for falcon's WSGI side."""

    def _responder(self, endpoint: Endpoint, get_site: Callable):
        def answer_of(site, req, resp, params) -> Reply | None:
            body = b"" if endpoint.method == "GET" else _read_blocking(req, site.settings.max_body)
            request = Request(endpoint.method, req.path, params, _query(req), body, _last_event_id(req))
            answer: Answer = endpoint.run(site.context(endpoint.needs, tenant_of(req)), request)
            if isinstance(answer, Question):
                answer = answer.render(site.link.call(answer.op, answer.payload, answer.timeout_s))
            if isinstance(answer, Reply):
                return answer
            return _generate_blocking(site.link, answer, req.env, resp)

        def respond(req, resp, **params):
            with self._errors_into(resp, endpoint):
                put(resp, answer_of(get_site(), req, resp, params))

        return respond


class BlockingFrames:
    """The chunks of one WSGI stream; close() aborts what still runs, also before the first chunk."""

    def __init__(self, link, stream, generation: Generation, client: "WsgiClient", access: Access):
        self._stream = stream
        self._chunks = self._make(link, generation, client, access)

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def close(self) -> None:
        self._chunks.close()
        self._stream.close()

    def _make(self, link, generation: Generation, client: "WsgiClient", access: Access) -> Iterator[bytes]:
        sent_at = time.monotonic()
        chunk = generation.start()
        if chunk:
            access.wrote(len(chunk))
            yield chunk
        while not generation.finished:
            outputs = wait_blocking(self._stream, client, sent_at + sse.KEEP_ALIVE_S)
            if outputs == []:
                return
            chunk = sse.KEEP_ALIVE if outputs is None else advance(link, generation, outputs)
            if chunk:
                sent_at = time.monotonic()
                access.wrote(len(chunk))
                yield chunk


class WsgiClient:
    """Whether the peer of a WSGI request is still there, looked up at most every LOOK_S."""

    def __init__(self, environ: dict):
        self._socket = environ.get("gunicorn.socket")
        self._next_look = time.monotonic() + LOOK_S

    def gone(self) -> bool:
        now = time.monotonic()
        if self._socket is None or now < self._next_look:
            return False
        self._next_look = now + LOOK_S
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except (BlockingIOError, InterruptedError):
            return False
        except ValueError:  # TLS sockets cannot be peeked at; a failing write will tell
            return False
        except OSError:
            return True


def advance(link, generation: Generation, outputs: list[Output]) -> bytes:
    """Feed one batch of outputs and return all that can be sent now, the end included."""
    try:
        chunk = generation.feed(outputs)
    except Exception as error:  # the status line is out: an error event is the only way to answer
        if not generation.stream:
            raise
        log.exception("a stream broke")
        generation.failed = EngineError("internal", "internal error")
        return getattr(generation, "broken", error_frame)(error)  # each dialect has its own
    if generation.aborts:
        for rid, index in generation.aborts:
            link.abort(rid, index)
        generation.aborts.clear()
    if generation.finished and generation.stream:
        chunk += generation.finish()
    return chunk


def wait_blocking(stream, client: WsgiClient, until: float) -> list[Output] | None:
    """Outputs; [] when the client is gone; None when the clock passed `until`."""
    while True:
        outputs = stream.next(LOOK_S)
        if client.gone():
            return []
        if outputs is not None:
            return outputs
        if time.monotonic() >= until:
            return None


def put(resp, reply: Reply | None) -> None:
    """A Reply as falcon's response, WSGI or ASGI. None: it is a stream already."""
    if reply is None:
        return
    resp.status = reply.status
    resp.data = reply.body
    resp.content_type = JSON
    resp.set_headers(dict(reply.headers))
    if reply.status in RETRY_AFTER_S and resp.get_header("Retry-After") is None:
        resp.set_header("Retry-After", str(RETRY_AFTER_S[reply.status]))


def put_error(resp, error: Exception, render: Callable[[Exception], Reply] = error_reply) -> None:
    """The answer to a request that raised `error`; what is not ours to raise is logged."""
    if not isinstance(error, CraneError):
        log.error("a request broke", exc_info=error)
    put(resp, render(error))


async def _generate_async(link, generation: Generation, scope: dict, resp) -> Reply | None:
    """Runs a generation; None when `resp` streams it."""
    tether, access = scope["crane.tether"], scope["crane.access"]
    access.begins(generation)
    await tether.hold(_opened(link, generation)).accepted()  # so that a refusal still has a status of its own
    access.accepted()
    if generation.stream:
        resp.set_headers(sse.HEADERS)
        resp.stream = tether.frames(link, generation, access)
        return None
    await tether.answer(link, generation, access)
    return Reply(generation.body()) if generation.finished else CLIENT_GONE


def _generate_blocking(link, generation: Generation, environ: dict, resp) -> Reply | None:
    """Runs a generation; None when `resp` streams it."""
    access: Access = environ["crane.access"]
    access.begins(generation)
    stream = _opened(link, generation)
    client = WsgiClient(environ)
    streaming = False
    try:
        stream.accepted(ACCEPT_TIMEOUT_S)
        access.accepted()
        if generation.stream:
            resp.set_headers(sse.HEADERS)
            resp.stream = BlockingFrames(link, stream, generation, client, access)
            streaming = True
            return None
        while not generation.finished:
            outputs = wait_blocking(stream, client, float("inf"))
            if not outputs:
                return CLIENT_GONE
            advance(link, generation, outputs)
        return Reply(generation.body())
    finally:
        if not streaming:
            stream.close()


def _opened(link, generation: Generation):
    return (link.resume if getattr(generation, "resumes", False) else link.open)(generation.requests)


def _last_event_id(req) -> str:
    return req.get_header("last-event-id") or ""


def tenant_of(req) -> str:
    """Who asks, as `auth.Gate` found out; "" where no key is asked for."""
    return getattr(req.context, "tenant", "")


def _query(req) -> dict[str, str]:
    """The query's parameters. Raises RequestError for one that is given twice: which is meant?"""
    for name, value in req.params.items():
        if isinstance(value, list):
            raise RequestError(f"{name[:100]} is given {len(value)} times in the query", field=name)
    return req.params


async def _read_async(receive, length: int, limit: int) -> bytes:
    """The body, whatever its content type. Raises RequestError (413) above `limit` bytes."""
    if length > limit:
        raise _too_large(limit)
    parts, size, more = [], 0, True
    while more:
        event = await receive()
        part = event.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
        more = event.get("more_body", False)
    if size < length:
        raise RequestError(f"the body ends after {size} of {length} bytes")
    return b"".join(parts)


def _read_blocking(req, limit: int) -> bytes:
    if (req.content_length or 0) > limit:
        raise _too_large(limit)
    chunked = req.content_length is None and req.env.get("wsgi.input_terminated")
    body = (req.env["wsgi.input"] if chunked else req.bounded_stream).read(limit + 1)
    if len(body) > limit:
        raise _too_large(limit)
    if len(body) < (req.content_length or 0):
        raise RequestError(f"the body ends after {len(body)} of {req.content_length} bytes")
    return body


def _too_large(limit: int) -> RequestError:
    return RequestError(f"the body is larger than the limit of {limit} bytes", status=413)
