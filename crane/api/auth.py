"""API keys: where they come from, and the gate in front of every endpoint."""

from pathlib import Path

from crane.api.access import access_of
from crane.api.drivers import put_error
from crane.api.tenancy import Keys, parse_keys
from crane.errors import EngineError, RequestError, SettingsError
from crane.runtime.settings import Settings, variable

# what tells a load balancer whether to send requests here must not need one of its secrets
OPEN_PATHS = frozenset(("/health", "/health_generate", "/ready", "/ping"))
# a request with a body is one that rate limits count
COUNTED = frozenset(("POST", "PUT"))


def load_keys(settings: Settings) -> Keys | None:
    """The keys of which a request must carry one; None when no key is asked for.

    Raises SettingsError that shows no key: an unreadable file, a file or variable without keys, a key
    that no header can carry.
    """
    keys = []
    if settings.api_key:
        keys += parse_keys(settings.api_key.split(","), variable("api_key"))
    if settings.api_key_file:
        name = variable("api_key_file")
        try:
            lines = Path(settings.api_key_file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise SettingsError(f"{name}: cannot read {settings.api_key_file}: {reason}") from None
        keys += parse_keys((line for line in lines if not line.startswith("#")), settings.api_key_file)
    return Keys(keys) if keys else None


def needs_key(path: str, settings: Settings) -> bool:
    """Whether a request to this route must carry a key."""
    if not (settings.api_key or settings.api_key_file) or path in OPEN_PATHS:
        return False
    return path != "/metrics" or settings.metrics_key


class Gate:
    """falcon middleware: without a key, where keys are asked for, a request ends here with a 401; with one whose
    limits are reached, with a 429.

    The path is known, the body is not read yet. Preflights (OPTIONS) cannot carry a key and pass.
    """

    def __init__(self, get_site):
        self._get_site = get_site

    def process_resource(self, req, resp, resource, params) -> None:
        site = self._get_site()
        if req.method == "OPTIONS" or not needs_key(resource.path, site.settings):
            return
        given = _given(req)
        tenant = next((found for found in [site.keys.find(key) for key in given] if found), None)
        if tenant is None:
            what = "the API key is not valid" if given else "an API key is needed: send Authorization: Bearer KEY"
            _end(req, resp, resource, RequestError(what, code="invalid_api_key", status=401))
            return
        req.context.tenant = tenant.id
        access = access_of(req)
        access.tenant = tenant
        access.meter = site.meters.of(tenant)
        if access.meter is not None and req.method in COUNTED:
            try:
                access.lease = access.meter.admit()
            except EngineError as error:
                _end(req, resp, resource, error)

    async def process_resource_async(self, req, resp, resource, params) -> None:
        self.process_resource(req, resp, resource, params)

    def process_response(self, req, resp, resource, req_succeeded: bool) -> None:
        meter = access_of(req).meter
        if meter is not None:
            resp.set_headers(meter.headers())

    async def process_response_async(self, req, resp, resource, req_succeeded: bool) -> None:
        self.process_response(req, resp, resource, req_succeeded)


def _end(req, resp, resource, error: Exception) -> None:
    put_error(resp, error, resource.error_reply(req.method))
    resp.complete = True


def _given(req) -> list[str]:
    """The keys in a request's headers: OpenAI's way, and Anthropic's."""
    scheme, _, token = (req.get_header("authorization") or "").partition(" ")
    found = [token.strip() if scheme.lower() == "bearer" else "", (req.get_header("x-api-key") or "").strip()]
    return [key for key in found if key]
