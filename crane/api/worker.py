"""crane under gunicorn: the worker classes, and how they replace gunicorn's own.

`gunicorn crane.api:app` names no worker class, and gunicorn's default serves one
request at a time. So when `crane.api` is imported by a gunicorn worker that is
starting (or by the master, under --preload), `install` puts crane's class in the
place of gunicorn's: asgi for `sync` (unless CRANE_WORKER_SWAP=0) and for `asgi`,
threads for `gthread`. This leans on gunicorn 27; with another version it says so
and leaves everything as it is.
"""

import asyncio
import contextlib
import logging
import sys
import threading
from collections.abc import Iterator

import gunicorn
from gunicorn.arbiter import Arbiter
from gunicorn.workers import gasgi
from gunicorn.workers.base import Worker
from gunicorn.workers.gasgi import ASGIWorker
from gunicorn.workers.gthread import ThreadWorker
from gunicorn.workers.sync import SyncWorker

from crane.api.protocol import CraneProtocol, max_connections
from crane.errors import CraneError
from crane.runtime.launch import halt_server, log_to_stderr
from crane.runtime.settings import Settings

GUNICORN_MAJOR = 27
HEARTBEAT_S = 1.0

log = logging.getLogger("crane.api")


class CraneWorker(ASGIWorker):
    """gunicorn's asgi worker, with four changes.

    It gives signs of life while it drains: else gunicorn kills it, and its streams, after `timeout`. An
    application that cannot start stops the server with one line, from one worker. Connections have the bounds
    of `protocol.CraneProtocol`. And as many of them may wait to be accepted as gunicorn's `backlog` says: asyncio makes
    that 100, and the next one of a burst would try again after a second only.
    """

    _widened = False  # the queue of connections to be accepted

    def run(self):
        _show_logs()
        if not hasattr(self, "asgi"):
            self._take_over()
        self.settings = _settings_of(self.asgi)
        self.waiting: dict[CraneProtocol, None] = {}
        self.max_connections = max_connections(self.settings)
        gasgi.ASGIProtocol = CraneProtocol  # gunicorn's worker makes its connections by this name
        self.refused = getattr(self.asgi, "refused", None)
        self.asgi = _halting(self.asgi)
        super().run()

    def _take_over(self) -> None:
        """Become an asgi worker although started as another class, which `install` has changed meanwhile."""
        fresh = type(self)(self.age, self.ppid, self.sockets, self.app, self.timeout, self.cfg, self.log)
        fresh.tmp.close()
        for name, value in vars(fresh).items():
            self.__dict__.setdefault(name, value)
        self._setup_event_loop()
        self.init_signals()
        self.asgi = self.wsgi
        self.log.info("Using worker: asgi, for concurrent streams (CRANE_WORKER_SWAP=0 keeps sync)")

    def notify(self):
        super().notify()
        if self.alive and self.servers and not self._widened:  # they have just been started
            self._widened = True
            for listener in self.sockets:
                listener.sock.listen(self.cfg.backlog)

    async def _shutdown(self):
        beat = asyncio.ensure_future(self._beat())
        try:
            await super()._shutdown()
        finally:
            beat.cancel()

    async def _beat(self) -> None:
        while True:
            self.notify()
            await asyncio.sleep(HEARTBEAT_S)


class CraneThreadWorker(ThreadWorker):
    """gunicorn's gthread worker, which starts the engine when it boots instead of at the first request."""

    def run(self):
        _show_logs()
        start = getattr(self.wsgi, "start_blocking", None)
        if start is not None:
            threading.Thread(target=_start, args=(start,), daemon=True).start()
        super().run()


def _show_logs() -> None:
    """As `install` does, which does not run in a worker whose class the master has already imported."""
    with contextlib.suppress(CraneError):  # the application says what is wrong when it starts
        log_to_stderr(Settings.from_env())


def _start(start_blocking) -> None:
    try:
        site = start_blocking()
    except CraneError as error:
        halt_server(str(error))
    else:
        if site.model_error is not None:
            halt_server(str(site.model_error))


def _settings_of(app) -> Settings:
    """The settings of a crane application; the defaults for another, or one that will not start with its own."""
    try:
        return getattr(app, "settings", None) or Settings()
    except CraneError:
        return Settings()


def _halting(app):
    """`app`, whose failed start halts the server."""

    def guarded(scope, receive, send):
        async def send_or_halt(event):
            if event["type"] == "lifespan.startup.failed":
                halt_server(event.get("message", ""))
                # another worker halts the server; this one waits to be told to leave
                event = {"type": "lifespan.startup.complete"}
            await send(event)

        return app(scope, receive, send_or_halt if scope["type"] == "lifespan" else send)

    return guarded


def install() -> None:
    """Put crane's worker classes in place when gunicorn is importing `crane.api`; else do nothing."""
    owner = next(_importers(), None)
    if owner is None:
        return
    try:
        settings = Settings.from_env()
    except CraneError as error:
        halt_server(str(error))
        sys.exit(1)
    log_to_stderr(settings)
    major = gunicorn.version_info[0]
    if major != GUNICORN_MAJOR:
        text = "crane knows gunicorn %d, this is %d: name the worker class (-k asgi)"
        log.warning(text, GUNICORN_MAJOR, major)
    elif isinstance(owner, Arbiter):
        _install_in_arbiter(owner, settings.worker_swap)
    else:
        owner.__class__ = _replacement(type(owner), settings.worker_swap)


def _importers() -> Iterator[Arbiter | Worker]:
    """The gunicorn objects that import us, innermost first: a starting worker or a preloading master."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name in ("init_process", "setup") else None
        if isinstance(owner, Worker) or (isinstance(owner, Arbiter) and owner.cfg.preload_app):
            yield owner
        frame = frame.f_back


def _replacement(found: type, swap_sync: bool) -> type:
    """crane's class for gunicorn's `found`; others, and subclasses that somebody chose, are left alone."""
    replacements = {ASGIWorker: CraneWorker, ThreadWorker: CraneThreadWorker}
    if swap_sync:
        replacements[SyncWorker] = CraneWorker
    return replacements.get(found, found)


def _install_in_arbiter(arbiter: Arbiter, swap_sync: bool) -> None:
    """Under --preload: for the workers to come, and again after each reload, which reads the options anew."""
    reload = arbiter.app.reload

    def configure() -> None:
        cfg = arbiter.app.cfg
        cfg.set("worker_class", _replacement(cfg.worker_class, swap_sync))
        # its socket has one path per user: two servers would fight for it
        cfg.set("control_socket_disable", True)

    def reload_and_configure() -> None:
        reload()
        configure()

    configure()
    arbiter.worker_class = arbiter.app.cfg.worker_class
    arbiter.app.reload = reload_and_configure
