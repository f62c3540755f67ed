"""/openapi.json, made of the types that check the requests, and /docs, a page that shows it without a network."""

import functools
import re
from typing import get_args

import msgspec

from crane import __version__
from crane.api import docs_page, sse
from crane.api.auth import needs_key
from crane.api.endpoint import JSON, Context, Endpoint, Reply, Request
from crane.runtime.settings import Settings

_SCHEMAS = "#/components/schemas/{name}"

_ERRORS = {
    "400": "The request cannot be honoured; `param` names the field.",
    "401": "No valid API key.",
    "404": "No such thing, or a model that is not served here.",
    "413": "The body is too large.",
    "429": "The queue is full, or a limit of the key is reached; Retry-After says when to come back.",
    "500": "A fault of the server.",
    "503": "The engine is loading, draining or gone; Retry-After says when to come back.",
    "504": "The request's timeout_s was over before its first token.",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}


def document(endpoints: tuple[Endpoint, ...], settings: Settings) -> dict:
    """The OpenAPI 3.1 description of `endpoints`."""
    bodies = list({body: None for endpoint in endpoints for body in _bodies(endpoint)})
    refs, schemas = msgspec.json.schema_components(bodies, ref_template=_SCHEMAS)
    by_body = dict(zip(bodies, refs, strict=True))
    paths: dict[str, dict] = {}
    for endpoint in endpoints:
        path = re.sub(r"\{(\w+):\w+\}", r"{\1}", endpoint.path)
        operation = _operation(endpoint, path, [by_body[body] for body in _bodies(endpoint)], settings)
        paths.setdefault(path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "crane", "version": __version__, "description": "An LLM inference server."},
        "paths": paths,
        "components": {
            "schemas": schemas | {"Error": _ERROR},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(endpoint: Endpoint, path: str, bodies: list[dict], settings: Settings) -> dict:
    summary, description = _words(endpoint)
    operation = {
        "summary": summary,
        "description": description,
        "operationId": re.sub(r"\W+", "_", f"{endpoint.method.lower()}{path}").rstrip("_"),
        "tags": [endpoint.run.__module__.rpartition(".")[2]],
        "responses": _responses(endpoint, settings),
    }
    named = {"type": "string", "minLength": 1}
    parameters = [
        *({"name": name, "in": "path", "required": True, "schema": named} for name in re.findall(r"\{(\w+)\}", path)),
        *({"name": name, "in": "query", "schema": schema} for name, schema in endpoint.query.items()),
    ]
    if parameters:
        operation["parameters"] = parameters
    if bodies:
        schema = bodies[0] if len(bodies) == 1 else {"anyOf": bodies}
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    if needs_key(endpoint.path, settings):
        operation["security"] = [{"bearer": []}, {"header": []}]
    return operation


def _responses(endpoint: Endpoint, settings: Settings) -> dict:
    content, text = {endpoint.content_type: {}}, "The answer."
    codes = ["500"]
    fields = endpoint.body.__struct_fields__ if isinstance(endpoint.body, type) else ()
    if "timeout_s" in fields:
        codes.append("504")
    if "stream" in fields:
        content[sse.CONTENT_TYPE] = {}
        text += " With `stream: true`, server-sent events; an error after the first byte is an event of its own."
    if endpoint.body is not None or "{" in endpoint.path:
        codes += ["400", "404"]
    if endpoint.query:
        codes.append("400")
    if endpoint.method != "GET":
        codes += ["400", "413"]
    if needs_key(endpoint.path, settings):
        codes.append("401")
    if endpoint.needs != "nothing":
        codes.append("503")
    if endpoint.needs == "engine":
        codes.append("429")
    error = {JSON: {"schema": {"$ref": _SCHEMAS.format(name="Error")}}}
    if endpoint.error_reply is not None:  # a dialect with errors of its own
        error = {JSON: {}, endpoint.content_type: {}}
    errors = {code: {"description": _ERRORS[code], "content": error} for code in sorted(set(codes))}
    if endpoint.query or "{" in endpoint.path:
        errors["414"] = {"description": "The address is too long; said by the HTTP server, as text."}
    return {"200": {"description": text, "content": content}} | errors


def _bodies(endpoint: Endpoint) -> tuple[type, ...]:
    """The Structs of which a request's body is one."""
    return () if endpoint.body is None else get_args(endpoint.body) or (endpoint.body,)


def _words(endpoint: Endpoint) -> tuple[str, str]:
    """Summary and description, out of the docstring of what answers."""
    text = " ".join((endpoint.run.__doc__ or "").split())
    text = re.sub(r"^(GET|POST|PUT|DELETE) /[^\s:,]*?[:.](\s+|$)", "", text)
    text = text[:1].upper() + text[1:]
    summary = re.split(r"(?<=[.;:])\s", text)[0].rstrip(".;:")
    return summary or endpoint.run.__name__.replace("_", " ").capitalize(), text


def endpoints_for(others: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    """The two endpoints that describe `others` and themselves."""

    @functools.cache
    def described(settings: Settings) -> dict:
        return document((*others, *own), settings)

    def openapi(context: Context, request: Request) -> Reply:
        """Describe the API as an OpenAPI document. It is made of the types that check the requests."""
        return Reply(msgspec.json.encode(described(context.settings)))

    def docs(context: Context, request: Request) -> Reply:
        """Describe the API as a page for people. It has no scripts and needs nothing from elsewhere."""
        headers = {
            "Content-Type": docs_page.HTML,
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
        }
        return Reply(docs_page.page(described(context.settings)), headers=headers)

    own = (
        Endpoint("GET", "/openapi.json", openapi, needs="nothing"),
        Endpoint("GET", "/docs", docs, needs="nothing", content_type=docs_page.HTML),
    )
    return own
