"""The fields of a body that say what the answer's text has to match, and the grammar they amount to."""

import msgspec

from crane.api.bodies import GenerateBody, StructuredOutputs, invalid
from crane.api.constraint import response_grammar

# each of these fields stands for one kind of constraint
_FIELDS = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
}


def response_constraint(body: GenerateBody) -> str | None:
    """The grammar of the answer's text; None when it is free. Raises RequestError naming the field."""
    given = []
    if body.response_format is not None and body.response_format.type != "text":
        given.append(("response_format", "response_format", msgspec.to_builtins(body.response_format)))
    if body.structured_outputs is not None:
        given += _vllm_fields(body.structured_outputs)
    for name, kind in _FIELDS.items():
        if getattr(body, name) is not None:
            given.append((name, kind, getattr(body, name)))
    if not given:
        return None
    if len(given) > 1:
        names = ", ".join(field for field, _, _ in given)
        raise invalid(given[1][0], f"expected one constraint of the answer's text, got {names}")
    field, kind, value = given[0]
    return response_grammar(**{kind: value}, field=field)


def _vllm_fields(wanted: StructuredOutputs) -> list[tuple[str, str, object]]:
    found = []
    for name in ("json", "regex", "choice", "grammar"):
        if getattr(wanted, name) is not None:
            found.append((f"structured_outputs.{name}", name, getattr(wanted, name)))
    if wanted.json_object:
        found.append(("structured_outputs.json_object", "response_format", {"type": "json_object"}))
    if not found:
        raise invalid("structured_outputs", "expected one of json, regex, choice, grammar, json_object")
    return found
