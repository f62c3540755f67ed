"""Whose a request is: API keys with names and limits, as a key file lists them.

    # a comment
    sk-plain
    sk-alice name=alice rpm=600 tpm=200000 concurrent=8

Keys of one name are one tenant: they share its limits, its cached prefixes and its turns in the engine.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields

import msgspec

from crane.errors import SettingsError
from crane.runtime.types import Generate

_KEY = re.compile(r"[!-+\--~]+")  # printable ASCII, as a header can carry it, without the comma
_NAME = re.compile(r"[\w.@+-]{1,64}", re.ASCII)
_MAX_LIMIT = 10**9


@dataclass(frozen=True)
class Tenant:
    """Who sends a key. name: as logs show it. id: what the engine and the rate limits' files know it by.

    rpm, tpm: requests and tokens per minute; concurrent: requests being answered at once, at most 1,000; 0 is no
    limit.
    """

    name: str
    id: str
    rpm: int = 0
    tpm: int = 0
    concurrent: int = 0

    @property
    def limited(self) -> bool:
        return bool(self.rpm or self.tpm or self.concurrent)


class Keys:
    """Keys that can only be compared with, in the same time whatever is given."""

    def __init__(self, keys: Iterable[tuple[str, Tenant]]):
        self._tenants = [(_digest(key), tenant) for key, tenant in keys]

    def find(self, given: str) -> Tenant | None:
        """Whose key `given` is; None when it is nobody's. Looks at all keys in every case."""
        digest, found = _digest(given), None
        for known, tenant in self._tenants:
            if hmac.compare_digest(digest, known):
                found = tenant
        return found

    @property
    def limited(self) -> bool:
        """Whether any of them has limits."""
        return any(tenant.limited for _, tenant in self._tenants)


def parse_keys(lines: Iterable[str], source: str) -> list[tuple[str, Tenant]]:
    """Keys and whose they are, from lines as above. Raises SettingsError that shows no key."""
    found: list[tuple[str, Tenant]] = []
    by_name: dict[str, Tenant] = {}
    for line in lines:
        words = line.partition(" #")[0].split()
        if not words:
            continue
        number = len(found) + 1
        if not _KEY.fullmatch(words[0]):
            raise SettingsError(
                f"{source}: key {number} has characters other than printable ASCII without , and space"
            )
        tenant = _tenant(words[0], words[1:], f"{source}: key {number}")
        known = by_name.setdefault(tenant.name, tenant)
        if known != tenant:
            raise SettingsError(f"{source}: key {number}: the keys of {tenant.name} must have the same limits")
        found.append((words[0], tenant))
    if not found:
        raise SettingsError(f"{source} holds no API key")
    return found


def tenant_of_key(key: str) -> str:
    """A name for whoever sends this API key that does not tell the key."""
    return hashlib.sha256(b"crane tenant\0" + key.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def isolated(requests: list[Generate], tenant_id: str) -> list[Generate]:
    """The same, but sharing computed prefixes with nobody else's."""
    return [msgspec.structs.replace(each, cache_salt=f"{tenant_id} {each.cache_salt}") for each in requests]


def _tenant(key: str, words: list[str], where: str) -> Tenant:
    options: dict[str, str] = {}
    known = [spec.name for spec in fields(Tenant) if spec.name != "id"]
    for word in words:
        name, equals, value = word.partition("=")
        # the word may be half of a key with a space in it, so it is not shown
        if not equals or name not in known or name in options:
            raise SettingsError(f"{where}: behind the key expected each at most once of {', '.join(known)}, with =")
        options[name] = value
    own_name = options.pop("name", None)
    if own_name is not None and not _NAME.fullmatch(own_name):
        raise SettingsError(f"{where}: a name has up to 64 letters, digits and . _ @ + -")
    numbers = {}
    for name, text in options.items():
        top = 1000 if name == "concurrent" else _MAX_LIMIT
        if not (text.isascii() and text.isdigit() and len(text) < 11 and int(text) <= top):
            raise SettingsError(f"{where}: {name} must be a number from 0 (no limit) to {top}")
        numbers[name] = int(text)
    tenant_id = tenant_of_key(key if own_name is None else f"name {own_name}")
    return Tenant(own_name or f"key-{tenant_id[:8]}", tenant_id, **numbers)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
