"""Bodies that no client should send, made from /openapi.json: every route, every field, every kind of wrong value."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass

import jsonschema

DEPTH = 4  # of fields inside fields
HUGE_TEXT = "x" * 70_000
DEEP = json.loads("[" * 150 + "]" * 150)
VALUES = {
    "null": None, "true": True, "zero": 0, "minus one": -1, "half": 0.5, "million": 10**6, "2^31": 2**31, "2^63": 2**63,
    "-2^63-1": -(2**63) - 1, "2^64": 2**64, "10^300": 10**300, "1e308": 1e308, "-1e308": -1e308, "tiny": 5e-324,
    "no text": "", "text": "nonsense", "number as text": "1", "zero byte": "\x00", "huge text": HUGE_TEXT,
    "no list": [], "list of null": [None], "list of lists": [[[]]], "list of true": [True], "list of -1": [-1],
    "list of 10^9": [10**9], "long list": [0] * 5000, "long list of texts": ["a"] * 5000, "list of objects": [{}],
    "empty object": {}, "object": {"nonsense": 1}, "deep list": DEEP, "deep object": {"a": {"b": DEEP}},
    "wide object": {str(i): 1 for i in range(5000)},
}  # fmt: skip
# what JSON texts can say and values cannot; each goes where a field's value should be
RAW_VALUES = {
    "NaN": b"NaN", "infinity": b"Infinity", "-infinity": b"-Infinity", "1e999": b"1e999", "-1e999": b"-1e999",
    "5000 digits": b"9" * 5000, "lone high": b'"\\ud83d"', "lone low": b'"\\udc00"', "swapped": b'"\\udc00\\ud83d"',
    "surrogate bytes": b'"\xed\xa0\x80"', "latin-1": b'"\xe9"', "hex": b"0x10", "leading zero": b"01", "plus": b"+1",
    "single quotes": b"'a'", "comment": b"/**/1", "nothing": b"", "control": b'"\x01"', "cut": b'"a',
    "deep": b"[" * 100_000 + b"]" * 100_000,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One body. field: the last name on the way to what is wrong with it; "" when all of it is.
    wrong: it must be refused; else it may also be answered."""

    name: str
    path: str
    body: bytes
    field: str
    wrong: bool


def all_cases(document: dict, bases: dict[str, dict]) -> Iterator[Case]:
    """document: /openapi.json; bases: a valid body for each path with one."""
    for path, base in bases.items():
        operations = document["paths"][path]
        schema = next(iter(operations.values()))["requestBody"]["content"]["application/json"]["schema"]
        maker = _Maker(document, path, base)
        yield from maker.cases(schema, (), base, 0)
        yield from maker.whole()


class _Maker:
    """The cases of one route."""

    def __init__(self, document: dict, path: str, base: dict):
        self._schemas = document["components"]["schemas"]
        self._path = path
        self._base = base
        self._valid: dict[str, jsonschema.Draft202012Validator] = {}

    def cases(self, schema: dict, at: tuple, here: dict, depth: int) -> Iterator[Case]:
        """All cases in the object with `schema` that is at `at` of the base; here: a valid one."""
        schema = self._resolved(schema)
        yield self._case("unknown field", (*at, "nonsense"), 1, True)
        for name, each in schema.get("properties", {}).items():
            where = (*at, name)
            valid = jsonschema.Draft202012Validator({**each, "components": {"schemas": self._schemas}})
            for label, value in VALUES.items():
                yield self._case(label, where, value, not valid.is_valid(value))
            if depth == 0:
                for label, raw in RAW_VALUES.items():
                    yield self._raw_case(label, where, raw)
                yield self._duplicate(where)
            for inner, wrap in self._objects(each):
                if depth < DEPTH:
                    yield from self._inside(inner, wrap, where, here, depth)

    def _inside(self, inner: dict, wrap, where: tuple, here: dict, depth: int) -> Iterator[Case]:
        made = self._minimal(inner)
        holder = _put(self._base, where, wrap(made))
        at = (*where, 0) if wrap(0) == [0] else where
        outer, self._base = self._base, holder
        yield from self.cases(inner, at, made, depth + 1)
        self._base = outer

    def whole(self) -> Iterator[Case]:
        """Bodies that are no object, or no JSON."""
        good = json.dumps(self._base).encode()
        for label, value in VALUES.items():
            if not isinstance(value, dict):
                yield Case(f"body: {label}", self._path, json.dumps(value).encode(), "", True)
        for label, raw in {**RAW_VALUES, "cut": good[:-1], "twice": good * 2, "BOM": b"\xef\xbb\xbf" + good,
                           "UTF-16": good.decode().encode("utf-16"), "zeros": bytes(1000)}.items():
            yield Case(f"body: {label}", self._path, raw, "", True)

    def _resolved(self, schema: dict) -> dict:
        while "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        return schema

    def _objects(self, schema: dict) -> Iterator[tuple[dict, object]]:
        """The kinds of objects with declared fields that a value may be or hold, and how they are held."""
        for option in schema.get("anyOf") or schema.get("oneOf") or [schema]:
            option = self._resolved(option)
            if "properties" in option:
                yield option, lambda value: value
            elif option.get("type") == "array":
                items = option.get("items") or {}
                for inner in items.get("anyOf") or items.get("oneOf") or [items]:
                    inner = self._resolved(inner)
                    if "properties" in inner:
                        yield inner, lambda value: [value]

    def _minimal(self, schema: dict):
        """A small valid value."""
        schema = self._resolved(schema)
        for union in ("anyOf", "oneOf"):
            if union in schema:
                return self._minimal(schema[union][0])
        if "enum" in schema:
            return schema["enum"][0]
        kind = schema.get("type")
        if kind == "object":
            return {name: self._minimal(schema["properties"][name]) for name in schema.get("required", ())}
        if kind == "array":
            return [self._minimal(schema.get("items", {}))] if schema.get("minItems") else []
        if kind in ("integer", "number"):
            return max(schema.get("minimum", 1), 1)
        return "a" if kind == "string" else None if kind in ("null", None) else True

    def _case(self, label: str, where: tuple, value, wrong: bool) -> Case:
        body = json.dumps(_put(self._base, where, value)).encode()
        return Case(f"{_dotted(where)}: {label}", self._path, body, _name(where), wrong)

    def _raw_case(self, label: str, where: tuple, raw: bytes) -> Case:
        body = json.dumps(_put(self._base, where, "@@")).encode().replace(b'"@@"', raw, 1)
        return Case(f"{_dotted(where)}: {label}", self._path, body, "" if label == "deep" else _name(where), True)

    def _duplicate(self, where: tuple) -> Case:
        value = json.dumps(self._base.get(where[0])).encode()
        again = b'{%b: %b, %b: %b' % ((json.dumps(where[0]).encode(), value) * 2)
        rest = {name: each for name, each in self._base.items() if name != where[0]}
        tail = json.dumps(rest).encode()[1:]
        body = again + (b", " if rest else b"") + tail
        return Case(f"{_dotted(where)}: twice", self._path, body, _name(where), True)


def _put(base: dict, where: tuple, value) -> dict:
    changed = copy.deepcopy(base)
    holder = changed
    for step in where[:-1]:
        holder = holder[step]
    holder[where[-1]] = value
    return changed


def _dotted(where: tuple) -> str:
    return ".".join(map(str, where))


def _name(where: tuple) -> str:
    return next(step for step in reversed(where) if isinstance(step, str))
