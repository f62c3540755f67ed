"""Tile sizes, warps and stages, by GPU and shapes: data in `tuning.json`, chosen by measurement, read once.

The file has a list of rules for each kernel, `{"when": {...}, "use": {...}}`. The first one whose `when` agrees with
the call wins; what it does not mention, it does not mind. The last rule minds nothing.
"""

import functools
import json
from pathlib import Path

from crane.kernels.lang import arch

_FILE = Path(__file__).with_name("tuning.json")


@functools.cache
def _rules() -> dict[str, list[dict]]:
    return json.loads(_FILE.read_text())


@functools.cache
def _choose(kernel: str, arch: int, features: tuple[tuple[str, object], ...]) -> dict:
    known = dict(features, arch=arch)
    for rule in _rules()[kernel]:
        if all(known[name] in value if isinstance(value, list) else known[name] == value
               for name, value in rule["when"].items()):  # fmt: skip
            return rule["use"]
    raise AssertionError(f"tuning.json has no last rule for {kernel}")


def pick(kernel: str, **features) -> dict:
    """The `use` of the rule for these features and this GPU, a new dict. A rule may name features and "arch"
    (`lang.arch`), each with one value or a list of them."""
    return dict(_choose(kernel, arch(), tuple(features.items())))
