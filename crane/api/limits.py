"""How much one request may ask for: bounds that are settings, checked once the body has its declared shape.

One table says which fields are bounded by which setting; every route's bodies pass through `refuse_excess`.
"""

import json
from typing import Any

import msgspec

from crane.api.endpoint import Context
from crane.errors import RequestError

_CHARS_PER_TOKEN = 32  # a prompt with more of them than that for each token of the context cannot fit
_MIN_PROMPT_CHARS = 1 << 20

# field -> the setting that bounds its value, or each value of a list
_NUMBERS = {
    "n": "max_n",
    "best_of": "max_n",
    "logprobs": "max_logprobs",
    "top_logprobs": "max_logprobs",
    "prompt_logprobs": "max_logprobs",
    "top_logprobs_num": "max_logprobs",
}
# field -> the setting that bounds its number of entries
_COUNTS = {
    "stop": "max_stop",
    "stop_sequences": "max_stop",
    "logit_bias": "max_logit_bias",
    "messages": "max_messages",
    "input": "max_messages",
    "tools": "max_tools",
}
_SCHEMAS = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "json_schema", "regex", "ebnf", "choice", "text.format", "output_config",
)  # fmt: skip
# texts that make one prompt together, and lists of texts that make one prompt each
_JOINED = ("messages", "tools", "system", "instructions", "suffix", "instruction", "query")
_APART = ("prompt", "text", "input", "documents", "queries", "items", "text_1", "text_2")


def given(body: msgspec.Struct) -> list[tuple[str, Any]]:
    """The fields of a body that say something, with their values."""
    fields = zip(body.__struct_fields__, msgspec.structs.astuple(body))
    return [(name, value) for name, value in fields if value is not None and value is not msgspec.UNSET]


def refuse_excess(body: msgspec.Struct, raw: bytes, context: Context) -> None:
    """Raises RequestError naming the first field that asks for more than the settings allow. raw: the body as sent."""
    settings = context.settings
    for name, value in given(body):
        several = value if isinstance(value, list) else [value]
        if name in _NUMBERS:
            for number in several:
                if type(number) is int and number > getattr(settings, _NUMBERS[name]):
                    raise _excess(name, _NUMBERS[name], settings, number)
        elif name in _COUNTS and isinstance(value, list | dict) and not _are_texts(name, value):
            if len(value) > getattr(settings, _COUNTS[name]):
                raise _excess(name, _COUNTS[name], settings, len(value), "entries")
        if name in ("stop", "stop_sequences"):
            for i, text in enumerate(several):
                if len(text) > settings.max_stop_chars:
                    where = f"{name}[{i}]" if several is value else name
                    raise _excess(where, "max_stop_chars", settings, len(text), "characters")
        elif name == "sampling_params":
            for each in several:
                refuse_excess(each, raw, context)
    if len(raw) > settings.max_schema:
        _refuse_large_schemas(body, settings)
    if len(raw) > prompt_chars(context):
        _refuse_long_prompts(body, context)


def refuse_duplicates(raw: bytes) -> None:
    """Raises RequestError for a key that one object of the body has twice: which of the two is meant?

    raw: a body that is known to be JSON.
    """
    try:
        _pairs.decode(raw.decode())
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None


def prompt_chars(context: Context) -> int:
    """How many characters one prompt may have."""
    given = context.settings.max_prompt_chars
    return given or max(_MIN_PROMPT_CHARS, _CHARS_PER_TOKEN * context.max_model_len)


def _once(pairs: list) -> None:
    if len(pairs) > 1:
        seen = set()
        for name, _ in pairs:
            if name in seen:
                raise RequestError(f"{name[:100]} is given twice", field=name, code="duplicate_field")
            seen.add(name)


_pairs = json.JSONDecoder(object_pairs_hook=_once, parse_int=len, parse_float=len)


def _are_texts(name: str, value) -> bool:
    """Whether a list called `input` holds texts or ids to embed; as messages, it holds objects."""
    return name == "input" and not (value and isinstance(value[0], dict))


def _refuse_large_schemas(body: msgspec.Struct, settings) -> None:
    for name in _SCHEMAS:
        value = body
        for part in name.split("."):
            value = getattr(value, part, None) if isinstance(value, msgspec.Struct) else None
        if value is not None:
            size = len(msgspec.json.encode(value))
            if size > settings.max_schema:
                raise _excess(name, "max_schema", settings, size, "bytes")


def _refuse_long_prompts(body: msgspec.Struct, context: Context) -> None:
    limit, total = prompt_chars(context), 0
    for name in body.__struct_fields__:
        value = getattr(body, name)
        if name in _APART and isinstance(value, list) and not _are_messages(value):
            sizes = [_chars(each) for each in value]
        elif name in _APART or name in _JOINED:
            sizes = [_chars(value)]
            total += sizes[0]
        else:
            continue
        if max(*sizes, total) > limit:
            got = max(*sizes, total)
            message = f"{name}: expected at most {limit} characters of a prompt (--max-prompt-chars), got {got}"
            raise RequestError(message, field=name, code="context_length_exceeded")


def _are_messages(value: list) -> bool:
    return bool(value) and isinstance(value[0], dict)


def _chars(value) -> int:
    """Characters of all texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + _chars(each) for key, each in value.items())
    if isinstance(value, list):
        return sum(map(_chars, value))
    if isinstance(value, msgspec.Struct):
        return sum(_chars(getattr(value, name)) for name in value.__struct_fields__)
    return 0


def _excess(field: str, setting: str, settings, got: int, unit: str = "") -> RequestError:
    limit = getattr(settings, setting)
    flag = "--" + setting.replace("_", "-")
    message = f"{field}: expected at most {limit}{' ' + unit if unit else ''} ({flag}), got {got}"
    return RequestError(message, field=field, code="invalid_value")
