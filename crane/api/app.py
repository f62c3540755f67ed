"""The application: route table, error handlers, and one callable that is WSGI and ASGI."""

import asyncio
import inspect
import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import falcon
import falcon.asgi

from crane.api import (
    admin, completions, embeddings, messages, metrics, openai, openapi, plan, responses, resumable, score, sglang,
    tokens,
)  # fmt: skip
from crane.api.access import Access, AuditLog, WatchedBody, access_of
from crane.api.access import log as access_log
from crane.api.auth import Gate, Keys, load_keys
from crane.api.drivers import AsgiResource, WsgiResource, put, put_error
from crane.api.endpoint import Context, Endpoint, Reply
from crane.api.errors import http_error_reply, not_ready
from crane.api.rate_limits import Meters
from crane.api.served import ServedModel
from crane.api.tether import Pulse, Tether
from crane.errors import CraneError, ModelError, RequestError
from crane.runtime.client import Link, LinkThread
from crane.runtime.launch import own_arbiter
from crane.runtime.settings import Settings
from crane.runtime.types import State

ENDPOINTS: tuple[Endpoint, ...] = (
    *openai.ENDPOINTS,
    *completions.ENDPOINTS,
    *tokens.ENDPOINTS,
    *embeddings.ENDPOINTS,
    *score.ENDPOINTS,
    *messages.ENDPOINTS,
    *responses.ENDPOINTS,
    *sglang.ENDPOINTS,
    *plan.ENDPOINTS,
    *resumable.ENDPOINTS,
    *admin.ENDPOINTS,
    *metrics.ENDPOINTS,
)
ENDPOINTS += openapi.endpoints_for(ENDPOINTS)

log = logging.getLogger("crane.api")

_REQUEST_ID = re.compile(r"[!-~]{1,128}")


@dataclass
class Site:
    """What one worker process serves.

    model_error: why it can serve nothing, ever; then there is no model and no link. keys, cors: None when off.
    """

    settings: Settings
    keys: Keys | None = None
    cors: falcon.CORSMiddleware | None = None
    model: ServedModel | None = None
    link: Link | LinkThread | None = None
    model_error: ModelError | None = None
    audit: AuditLog | None = None
    meters: Meters = field(default_factory=lambda: Meters(own_arbiter()))

    @property
    def logs_access(self) -> bool:
        return self.settings.access_log and access_log.isEnabledFor(logging.INFO)

    def access(self, method: str, path: str, client: str) -> Access:
        """For one request."""
        return Access(method, path, client, logs=self.logs_access, audit=self.audit, isolate=self.settings.isolate_keys)

    def context(self, needs: str, tenant: str = "") -> Context:
        """For one request of an endpoint with `needs`. Raises EngineError when they are not met."""
        state = self.link.state if self.model_error is None else State("failed", reason=str(self.model_error))
        wanted = {"engine": ("ready",), "link": ("ready", "draining")}.get(needs)
        if wanted and state.status not in wanted or needs == "model" and self.model is None:
            raise not_ready(state)
        return Context(self.settings, self.model, state, tenant)


class App:
    """`app(environ, start_response)` is WSGI, `app(scope, receive, send)` is ASGI.

    Reads no setting, loads nothing and connects to nothing before the first
    lifespan event or request, and again so in every forked worker.
    """

    def __init__(self, settings: Settings | None = None, *, link=None, model: ServedModel | None = None):
        """settings: default CRANE_* variables. link, model: instead of those that settings name."""
        self._settings = settings
        self._given_link = link
        self._given_model = model
        self._lock = threading.Lock()
        self._site: Site | None = None
        self._pid = 0
        self._starting: asyncio.Task | None = None
        self._pulse = Pulse()
        self._warned = False
        parts = [Watch(), Cors(self._current_site), Gate(self._current_site)]
        self._wsgi = _build(falcon.App(middleware=parts), WsgiResource, self._current_site)
        self._asgi = _build(falcon.asgi.App(middleware=parts), AsgiResource, self._current_site)

    def __call__(self, first, second, third=None):
        if third is not None:
            return self._call_asgi(first, second, third)
        if not first.get("wsgi.multithread") and not self._warned:
            self._warned = True
            log.warning("one request at a time: this worker needs -k asgi, or -k gthread with --threads")
        site = self.start_blocking()
        client = first.get("REMOTE_ADDR", "")
        access = first["crane.access"] = site.access(first["REQUEST_METHOD"], first.get("PATH_INFO", ""), client)
        return WatchedBody(access, self._wsgi(first, second))

    @property
    def settings(self) -> Settings:
        """Those it was made with, else what the environment says. Raises SettingsError."""
        return self._settings if self._settings is not None else Settings.from_env()

    def start_blocking(self) -> Site:
        """Load the text side and connect (or start) the engine, from a WSGI worker; idempotent."""
        with self._lock:
            if not self._started_here():
                site = self._open_site()
                self._join(site, LinkThread)
                self._site, self._pid = site, os.getpid()
            return self._site

    async def start(self) -> Site:
        """The same on a running event loop; concurrent callers share one start."""
        if not self._started_here():
            if self._starting is None or self._pid != os.getpid():
                self._site, self._pid = None, os.getpid()
                self._starting = asyncio.create_task(self._start())
            await asyncio.shield(self._starting)
        return self._site

    async def stop(self) -> None:
        """Close the link to the engine; the engine itself outlives it."""
        site, self._site, self._starting = self._site, None, None
        if site is not None and site.link is not None:
            await site.link.stop()

    async def _start(self) -> None:
        site = await asyncio.to_thread(self._open_site)
        self._join(site, Link)
        self._site = site

    def _open_site(self) -> Site:
        settings = self.settings
        site = Site(settings, load_keys(settings), _cors(settings))
        site.audit = AuditLog(settings.audit_log) if settings.audit_log else None
        try:
            site.model = self._given_model or ServedModel.load(settings)
        except ModelError as error:
            site.model_error = error
        return site

    def _join(self, site: Site, link_type) -> None:
        # only now: with a broken model there is no engine to start
        if site.model_error is None:
            site.link = self._given_link or link_type(site.settings)
            site.link.start()

    def refused(self, client: str, status: int) -> None:
        """The HTTP layer has answered for us: the lines of a request whose method and path nobody knows."""
        if self._site is not None:
            access = self._site.access("-", "-", client)
            access.status = status
            access.ends()

    def _started_here(self) -> bool:
        return self._site is not None and self._pid == os.getpid()

    def _current_site(self) -> Site:
        return self._site

    async def _call_asgi(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})  # a 403; there is no such route
            return
        if not self._started_here():
            await self.start()
        tether = scope["crane.tether"] = Tether(receive, send, self._pulse)
        client = (scope.get("client") or ("",))[0]
        access = scope["crane.access"] = self._site.access(scope["method"], scope["path"], client)
        try:
            await self._asgi(scope, _eager, tether.send)
        finally:
            tether.release()
            access.ends()

    async def _lifespan(self, receive, send) -> None:
        while True:
            event = await receive()
            if event["type"] == "lifespan.shutdown":
                await self.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return
            try:
                error = (await self.start()).model_error
            except CraneError as raised:
                error = raised
            if error is None:
                await send({"type": "lifespan.startup.complete"})
            else:
                await send({"type": "lifespan.startup.failed", "message": str(error)})


# a server asks before it calls; a plain method that returns a coroutine must say so
if sys.version_info >= (3, 12):
    inspect.markcoroutinefunction(App.__call__)
else:
    App.__call__._is_coroutine = asyncio.coroutines._is_coroutine


class Watch:
    """falcon middleware around all others: every response carries the client's x-request-id, or a new one; and the
    access log gets to know it, the status, and the size of an answer that is no stream."""

    def process_request(self, req, resp) -> None:
        access, given = access_of(req), req.get_header("x-request-id")
        access.request_id = given if given and _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()
        resp.set_header("x-request-id", access.request_id)

    def process_response(self, req, resp, resource, req_succeeded: bool) -> None:
        access = access_of(req)
        access.status = resp.status_code
        if resp.data and req.method != "HEAD":
            access.wrote(len(resp.data))

    async def process_request_async(self, req, resp) -> None:
        self.process_request(req, resp)

    async def process_response_async(self, req, resp, resource, req_succeeded: bool) -> None:
        self.process_response(req, resp, resource, req_succeeded)


class Cors:
    """falcon middleware: falcon's own CORS, once the settings are known and if they ask for it."""

    def __init__(self, get_site):
        self._get_site = get_site

    def process_response(self, req, resp, resource, req_succeeded: bool) -> None:
        cors = self._get_site().cors
        if cors is not None:
            resp.append_header("Vary", "Origin")
            cors.process_response(req, resp, resource, req_succeeded)

    async def process_response_async(self, req, resp, resource, req_succeeded: bool) -> None:
        self.process_response(req, resp, resource, req_succeeded)


def _cors(settings: Settings) -> falcon.CORSMiddleware | None:
    origins = [text.strip().rstrip("/") for text in settings.cors_origins.split(",") if text.strip()]
    if not origins:
        return None
    return falcon.CORSMiddleware("*" if "*" in origins else origins, expose_headers="x-request-id, retry-after")


async def _eager() -> dict:
    """What falcon takes for the first event: it waits for one before it looks at the headers, by which a request may be
    refused. The body is read from the server (`drivers`)."""
    return {"type": "http.request", "body": b"", "more_body": False}


def create_app(settings: Settings | None = None, **overrides) -> App:
    """A new application. settings: default CRANE_* variables, with `overrides` by setting name."""
    if overrides:
        settings = Settings.from_env(**overrides)
    return App(settings)


def _build(app, resource_type, get_site):
    """Routes, error shapes and options on a falcon app, WSGI or ASGI."""
    by_path: dict[str, list[Endpoint]] = {}
    for endpoint in ENDPOINTS:
        by_path.setdefault(endpoint.path, []).append(endpoint)
    for path, endpoints in by_path.items():
        app.add_route(path, resource_type(endpoints, get_site))
    app.req_options.strip_url_path_trailing_slash = True
    app.set_error_serializer(_serialize_http_error)
    if isinstance(app, falcon.asgi.App):
        app.add_error_handler(Exception, _handle_async)
    else:
        app.add_error_handler(Exception, _handle)
    return app


def _handle(req, resp, error, params) -> None:
    put_error(resp, error)


async def _handle_async(req, resp, error, params) -> None:
    put_error(resp, error)


def _serialize_http_error(req, resp, error: falcon.HTTPError) -> None:
    messages = {
        404: f"unknown route: {req.method} {req.path}",
        405: f"{req.method} is not allowed for {req.path}",
    }
    message = messages.get(error.status_code) or error.description or error.title
    render = _dialect(req.path)
    if render is None:
        put(resp, http_error_reply(error.status_code, message))
    else:
        put(resp, render(RequestError(message, status=error.status_code)))


def _dialect(path: str) -> Callable[[Exception], Reply] | None:
    """How errors are written below the path of an endpoint that has its own way."""
    for endpoint in ENDPOINTS:
        if endpoint.error_reply is not None and (path + "/").startswith(endpoint.path + "/"):
            return endpoint.error_reply
    return None
