"""The commands: `crane serve`, `crane bench`, and `crane-oai`, which is `crane serve` under the seed's name.

Every field of Settings is a flag and a CRANE_* variable; flags win.
"""

import argparse
import dataclasses
import functools
import logging
import os
import socket
import sys
from collections.abc import Sequence

from crane import __version__
from crane.bench import engine as bench_engine, http as bench_http
from crane.errors import CraneError, SettingsError
from crane.runtime import launch
from crane.runtime.settings import Settings, parse

# the groups of --help, by the setting that each begins with, in the order of Settings
_GROUPS = {
    "model_path": "model and server",
    "dtype": "engine: how it computes",
    "page_size": "engine: memory for keys and values",
    "max_model_len": "engine: steps and guessed tokens",
    "max_queue": "engine: who runs first",
    "step_timeout_s": "engine: what it watches and keeps",
    "reasoning_field": "API workers",
    "max_body": "API workers: what one request may ask for, at most",
    "max_connections": "API workers: what one client may take, at most",
    "api_key": "API workers: keys and logs",
}
_BENCHES = {"engine": bench_engine, "http": bench_http}
WORKER_TIMEOUT_S = 120
KEEPALIVE_S = 5
_SERVE = {
    "description": "Serve one model over HTTP, with OpenAI's API.",
    "epilog": "Every flag is also a variable: --max-concurrent is CRANE_MAX_CONCURRENT. Flags win.",
    "allow_abbrev": False,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The `crane` command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="crane", description="crane, an LLM inference server.")
    parser.add_argument("--version", action="version", version=f"crane {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    add_flags(commands.add_parser("serve", help="serve a model over HTTP", **_SERVE))
    bench = commands.add_parser("bench", help="measure speed, alone or beside another engine")
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="kind")
    for name, module in _BENCHES.items():
        module.add_flags(kinds.add_parser(
            name, help=module.__doc__.partition(":")[2].partition(".")[0].strip(), description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        ))  # fmt: skip
    options = parser.parse_args(argv)
    return _BENCHES[options.kind].run(options) if options.command == "bench" else _serve(options)


def main_oai(argv: Sequence[str] | None = None) -> int:
    """The `crane-oai` command: the flags of `crane serve`, with or without the word."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="crane-oai", **_SERVE)
    parser.add_argument("--version", action="version", version=f"crane {__version__}")
    add_flags(parser)
    return _serve(parser.parse_args(argv[1:] if argv[:1] == ["serve"] else argv))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting. Flags that are not given leave no attribute."""
    for spec in dataclasses.fields(Settings):
        if spec.name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[spec.name])
        flag = "--" + spec.name.replace("_", "-")
        default = "" if spec.default in ("", False) else f" (default: {_shown(spec)})"
        text = (spec.metadata["help"] + default).replace("%", "%%")
        if spec.metadata["kind"] == "bool":
            action = argparse.BooleanOptionalAction if spec.default else "store_true"
            group.add_argument(flag, action=action, default=argparse.SUPPRESS, help=text)
        else:
            choices = spec.metadata["choices"]
            metavar = "{" + ",".join(choices) + "}" if choices else spec.name.rpartition("_")[2].upper()
            group.add_argument(flag, default=argparse.SUPPRESS, help=text, metavar=metavar)


def _shown(spec: dataclasses.Field) -> str:
    if spec.default is None:
        return "auto"
    if spec.metadata["kind"] == "bytes" and spec.default:
        return f"{spec.default >> 20}m" if spec.default >= 1 << 20 else f"{spec.default >> 10}k"
    return str(spec.default)


def settings_from(options: argparse.Namespace) -> Settings:
    """Flags over variables over defaults. Raises SettingsError naming the flag or the variable."""
    given = {}
    for spec in dataclasses.fields(Settings):
        if hasattr(options, spec.name):
            value = getattr(options, spec.name)
            flag = "--" + spec.name.replace("_", "-")
            given[spec.name] = parse(spec, value, flag) if isinstance(value, str) else value
    return Settings.from_env(**given)


def _serve(options: argparse.Namespace) -> int:
    try:
        settings = settings_from(options)
        if not settings.model_path:
            raise SettingsError("no model: give --model-path (or CRANE_MODEL_PATH) a folder or .gguf file")
        if not os.path.exists(settings.model_path):
            raise SettingsError(f"there is no model at {settings.model_path}")
        run_server(settings)
    except CraneError as error:
        print(f"crane: {error}", file=sys.stderr)
        return 1
    return 0


def run_server(settings: Settings) -> None:
    """Serve until stopped; ends the process as gunicorn does. Raises SettingsError or ModelError."""
    listener = _listen(settings.host, settings.port)
    address = listener.getsockname()
    with launch.engine_ahead(settings, os.getpid()):
        from gunicorn.app.base import BaseApplication

        from crane.api import App
        from crane.api.auth import load_keys
        from crane.api.served import ServedModel
        from crane.runtime.client import Link

        load_keys(settings)  # every worker does so itself, but a bad file is better known before there are any
        # read once, before the workers are forked: they share its memory, and a bad model ends it all here
        model = ServedModel.load(settings)

    # from here on gunicorn's own: another open copy would keep a stopping server's port half alive
    cfg = _gunicorn_options(settings, listener.detach())

    class Server(BaseApplication):
        """gunicorn with crane's options instead of gunicorn's command line."""

        def load_config(self):
            for name, value in cfg.items():
                self.cfg.set(name, value)

        def load(self):  # in every worker
            link = Link(settings)
            link.on_state.append(functools.partial(_announce, settings, model.name, address))
            return App(settings, link=link, model=model)

    launch.log_to_stderr(settings)
    # a worker has said in one line why it halts the server; gunicorn's account of that adds nothing
    logging.getLogger("gunicorn.error").addFilter(lambda record: not launch.claimed("halted", os.getpid()))
    try:
        Server(prog="crane").run()
    finally:
        launch.clear(os.getpid())


def _gunicorn_options(settings: Settings, listener_fd: int) -> dict:
    from crane.api.worker import CraneWorker

    return {
        "bind": f"fd://{listener_fd}",
        "workers": settings.workers,
        "worker_class": CraneWorker,
        "timeout": WORKER_TIMEOUT_S,
        "graceful_timeout": settings.graceful_timeout_s,
        "keepalive": KEEPALIVE_S,
        "loglevel": settings.log_level,
        "control_socket_disable": True,
    }


def _listen(host: str, port: int) -> socket.socket:
    """The socket to serve on. Raises SettingsError: a bad or taken address, in one line."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno)
        raise SettingsError(f"cannot listen on {host} port {port}: {reason}") from None


def _announce(settings: Settings, model_name: str, address: tuple, state) -> None:
    """Once per server, when the model is ready: where it is and how to try it."""
    if state.status != "ready" or not launch.claim("announced", launch.own_arbiter()):
        return
    everywhere = settings.host in ("0.0.0.0", "::", "")
    host = "127.0.0.1" if everywhere else f"[{address[0]}]" if ":" in address[0] else address[0]
    url = f"http://{host}:{address[1]}/v1"
    body = '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
    keyed = settings.api_key or settings.api_key_file
    header = ' -H "Authorization: Bearer $KEY"' if keyed else ""
    print(f"\ncrane {__version__} serves {model_name} at {url}\ntry: curl {url}/chat/completions{header} -d '{body}'")
    if everywhere and not keyed:
        how = "--api-key-file asks for a key, --host 127.0.0.1 keeps it local"
        print(f"note: every machine that reaches this one may use it; {how}")
    print(flush=True)
