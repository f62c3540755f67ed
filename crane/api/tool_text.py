"""The notations in which models write tool calls, read piece by piece.

JSON objects {"name": ..., "arguments": {...}}, whose arguments are passed on while they
grow, and Qwen3-Coder's <function=name><parameter=key>value</parameter></function>.
"""

import json
import re
from typing import Any, Literal, NamedTuple

_OUTSIDE = re.compile(r'["{}\[\],\s]')
_INSIDE = re.compile(r'["\\\x00-\x1f]')
_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_NAME = None  # stands for a string in the list below
_HEAD = (("{",), ('"name"',), (":",), _NAME, (",",), ('"arguments"', '"parameters"'), (":",))


class JsonFollower:
    """Finds the end of one JSON value in text that comes in pieces.

    depth: how many brackets are open already. Control characters inside strings, which
    models write when they write code, are escaped; else the text is passed on as it is.
    """

    def __init__(self, depth: int = 0):
        self._depth = depth
        self._in_string = self._escaped = self._begun = False

    @property
    def in_string(self) -> bool:
        return self._in_string

    def feed(self, text: str) -> tuple[str, int, bool]:
        """What of `text` belongs to the value, how much of it was read, and whether the value ended."""
        written: list[str] = []
        at = 0
        while at < len(text):
            if self._escaped:
                written.append(text[at])
                at += 1
                self._escaped = False
                continue
            match = (_INSIDE if self._in_string else _OUTSIDE).search(text, at)
            end = match.start() if match else len(text)
            self._begun |= end > at
            written.append(text[at:end])
            at = end
            if match is None:
                break
            piece, ended = self._inside(text[at]) if self._in_string else self._outside(text[at])
            if piece is None:
                return "".join(written), at, True
            written.append(piece)
            at += 1
            if ended:
                return "".join(written), at, True
        return "".join(written), at, False

    def _inside(self, character: str) -> tuple[str, bool]:
        if character == '"':
            self._in_string = False
            return character, self._depth == 0
        if character == "\\":
            self._escaped = True
            return character, False
        return json.dumps(character)[1:-1], False

    def _outside(self, character: str) -> tuple[str | None, bool]:
        """None as the piece: the value ended before this character."""
        if character in "{[":
            self._depth += 1
        elif self._depth == 0 and character != '"' and (self._begun or not character.isspace()):
            return None, True
        elif character in "}]":
            self._depth -= 1
            return character, self._depth == 0
        elif character == '"':
            self._in_string = True
        return character, False


class Head(NamedTuple):
    """How far a text is the beginning of a call, up to where its arguments begin.

    name: once it is complete. end: offset of the arguments when state is "yes".
    """

    state: Literal["wait", "no", "yes"]
    name: str | None = None
    end: int = 0


def read_head(text: str) -> Head:
    """Whether `text` begins with {"name": "...", "arguments": or may still come to."""
    at, name = 0, None
    for words in _HEAD:
        at = _SPACE.match(text, at).end()
        if at == len(text):
            return Head("wait", name)
        if words is _NAME:
            match = _STRING.match(text, at)
            if match is None:
                return Head("wait" if text[at] == '"' else "no")
            name, at = _text_of(match[0]), match.end()
            if not name:
                return Head("no")
            continue
        word = next((word for word in words if text.startswith(word, at)), None)
        if word is None:
            rest = text[at:]
            return Head("wait" if any(word.startswith(rest) for word in words) else "no", name)
        at += len(word)
    return Head("yes", name, at)


def whole_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a complete call whose keys stand in any order; None when it is not one."""
    try:
        call = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        return None
    arguments = call.get("arguments", call.get("parameters"))
    return call["name"], plain_arguments(json.dumps(arguments, ensure_ascii=False))


def plain_arguments(text: str) -> str:
    """Arguments as text of a JSON object, where a model wrote null or put the object into a string."""
    try:
        value = json.loads(text, strict=False)
        if value is None or value == "":
            return "{}"
        if isinstance(value, str) and isinstance(json.loads(value, strict=False), dict):
            return value
    except (ValueError, RecursionError):
        pass
    return text


def parameter_value(text: str, schema: dict[str, Any], key: str) -> str:
    """JSON of one <parameter=key>: as its schema's type says, and a string where that says nothing.

    The line breaks next to the tags are not part of the value.
    """
    text = text.removeprefix("\n").removesuffix("\n")
    properties = schema.get("properties")
    declared = properties.get(key) if isinstance(properties, dict) else None
    kind = declared.get("type", "string") if isinstance(declared, dict) else "string"
    if kind != "string":
        try:
            return json.dumps(json.loads(text), ensure_ascii=False)
        except (ValueError, RecursionError):
            if kind == "boolean" and text.strip().lower() in ("true", "false"):
                return text.strip().lower()
    return json.dumps(text, ensure_ascii=False)


def _text_of(literal: str) -> str | None:
    try:
        return json.loads(literal, strict=False)
    except ValueError:
        return None
