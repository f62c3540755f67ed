"""API keys: where they come from, and the gate in front of every endpoint."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from crane.api.drivers import put_error
from crane.errors import RequestError, SettingsError
from crane.runtime.settings import Settings, variable

# what tells a load balancer whether to send requests here must not need one of its secrets
OPEN_PATHS = frozenset(("/health", "/health_generate", "/ready", "/ping"))
_KEY = re.compile(r"[!-+\--~]+")  # printable ASCII, as a header can carry it, without the comma


class Keys:
    """A set of keys that can only be compared with, in the same time whatever is given."""

    def __init__(self, keys: Iterable[str]):
        self._digests = [_digest(key) for key in keys]

    def have(self, given: str) -> bool:
        """Whether `given` is one of them. Looks at all of them in every case."""
        digest = _digest(given)
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def load_keys(settings: Settings) -> Keys | None:
    """The keys of which a request must carry one; None when no key is asked for.

    Raises SettingsError that shows no key: an unreadable file, a file or variable without keys, a key
    that no header can carry.
    """
    keys = []
    if settings.api_key:
        keys += _checked(settings.api_key.split(","), variable("api_key"))
    if settings.api_key_file:
        name = variable("api_key_file")
        try:
            lines = Path(settings.api_key_file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise SettingsError(f"{name}: cannot read {settings.api_key_file}: {reason}") from None
        keys += _checked((line for line in lines if not line.startswith("#")), settings.api_key_file)
    return Keys(keys) if keys else None


def needs_key(path: str, settings: Settings) -> bool:
    """Whether a request to this route must carry a key."""
    if not (settings.api_key or settings.api_key_file) or path in OPEN_PATHS:
        return False
    return path != "/metrics" or settings.metrics_key


class Gate:
    """falcon middleware: without a key, where keys are asked for, a request ends here with a 401.

    The path is known, the body is not read yet. Preflights (OPTIONS) cannot carry a key and pass.
    """

    def __init__(self, get_site):
        self._get_site = get_site

    def process_resource(self, req, resp, resource, params) -> None:
        site = self._get_site()
        if req.method == "OPTIONS" or not needs_key(resource.path, site.settings):
            return
        given = _given(req)
        if any([site.keys.have(key) for key in given]):
            return
        what = "the API key is not valid" if given else "an API key is needed: send Authorization: Bearer KEY"
        error = RequestError(what, code="invalid_api_key", status=401)
        put_error(resp, error, resource.error_reply(req.method))
        resp.complete = True

    async def process_resource_async(self, req, resp, resource, params) -> None:
        self.process_resource(req, resp, resource, params)


def _given(req) -> list[str]:
    """The keys in a request's headers: OpenAI's way, and Anthropic's."""
    scheme, _, token = (req.get_header("authorization") or "").partition(" ")
    found = [token.strip() if scheme.lower() == "bearer" else "", (req.get_header("x-api-key") or "").strip()]
    return [key for key in found if key]


def _checked(texts: Iterable[str], source: str) -> list[str]:
    keys = [text.strip() for text in texts if text.strip()]
    if not keys:
        raise SettingsError(f"{source} holds no API key")
    for number, key in enumerate(keys, 1):
        if not _KEY.fullmatch(key):
            raise SettingsError(f"{source}: key {number} has characters other than printable ASCII without , and space")
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
