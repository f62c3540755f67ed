"""Tile sizes, warps and stages, by GPU and shapes: data in `tuning.json`, chosen by measurement, read once.

The file has a list of rules for each kernel, `{"when": {...}, "use": {...}}`. The first one whose `when` agrees with
the call wins; what it does not mention, it does not mind. The last rule minds nothing.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from crane.kernels.lang import arch

_FILE = Path(__file__).with_name("tuning.json")
_listeners: list[Callable[[str, dict, dict], dict]] = []


@functools.cache
def rules() -> dict[str, list[dict]]:
    """All rules, by kernel."""
    return json.loads(_FILE.read_text())


@functools.cache
def _choose(kernel: str, arch: int, features: tuple[tuple[str, object], ...]) -> dict:
    known = dict(features, arch=arch)
    for rule in rules()[kernel]:
        if all(known[name] in value if isinstance(value, list) else known[name] == value
               for name, value in rule["when"].items()):  # fmt: skip
            return rule["use"]
    raise AssertionError(f"tuning.json has no last rule for {kernel}")


def pick(kernel: str, **features) -> dict:
    """The `use` of the rule for these features and this GPU, a new dict. A rule may name features and "arch"
    (`lang.arch`), each with one value or a list of them."""
    use = dict(_choose(kernel, arch(), tuple(features.items())))
    for listener in _listeners:
        use = listener(kernel, features, use)
    return use


@contextlib.contextmanager
def overridden(listener: Callable[[str, dict, dict], dict]) -> Iterator[None]:
    """Within it, `pick` gives what the listener makes of (kernel, features, the rule's own `use`): for tuning."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
