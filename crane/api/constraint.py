"""What an answer has to match, from a request's fields to a grammar in llguidance's Lark dialect. Pure.

A grammar that would not compile is refused here, with the field and the place in it. llguidance is loaded
by the first request that asks for structure.
"""

import functools
import json
import threading
from collections.abc import Iterator
from typing import Any

from crane.errors import RequestError

MAX_BYTES = 256 << 10  # of one schema, regular expression, list of choices or grammar
MAX_DEPTH = 64  # of arrays and objects in a schema
MAX_TOOLS_BYTES = 256 << 10  # of all tools together
TIME_LIMIT_S = 2.0  # for one grammar
# llguidance recurses as deep as rules refer to rules; a stack is only as large as what is used of it
_STACK_BYTES = 256 << 20
_MAX_PROBES = 200  # schemas that are compiled to find the place of an error
_KINDS = ("response_format", "json", "regex", "choice", "grammar")
# keywords of JSON Schema whose value is a schema, and those whose value holds schemas by name or place
_ONE = ("items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else")
_MANY = ("properties", "patternProperties", "$defs", "definitions", "prefixItems", "anyOf", "oneOf", "allOf")


def response_grammar(
    *,
    response_format: dict[str, Any] | None = None,
    json: Any = None,
    regex: str | None = None,
    choice: list[str] | None = None,
    grammar: str | None = None,
    field: str | None = None,
) -> str | None:
    """The grammar of the answer's text; None when nothing is asked for.

    response_format: as OpenAI's. json: a schema, or its text. grammar: Lark, or GBNF (with ::=). At most one
    of them. field: the field's name for errors, when it is not the argument's own.
    Raises RequestError with code "invalid_schema", naming the field and the place in it.
    """
    values = (response_format, json, regex, choice, grammar)
    given = [(kind, value) for kind, value in zip(_KINDS, values, strict=True) if value is not None]
    if len(given) > 1:
        raise _invalid(given[1][0], f"expected one constraint, got {' and '.join(kind for kind, _ in given)}")
    if not given:
        return None
    kind, value = given[0]
    make = {
        "response_format": _from_response_format,
        "json": _from_schema,
        "regex": _from_regex,
        "choice": _from_choices,
        "grammar": _from_grammar,
    }[kind]
    return make(value, field or kind)


def tools_grammar(
    tools: list[dict[str, Any]], tool_choice: str | dict[str, Any], form: str, response: str | None, parallel: bool
) -> str | None:
    """The grammar of an answer that may or must call tools; None when it is free.

    tool_choice: "auto", "required", or {"function": {"name": ...}}: exactly one call of it. form: the
    notation of calls: "hermes", "hunyuan", "xml" or "json". response: the grammar of an answer without
    calls, from `response_grammar`; without it, text is free until a call's tag opens. parallel: more than one
    call is allowed. A bare "json" call has no tag: it is constrained only when it is required.
    Raises RequestError with code "invalid_schema", naming the tool and the place in it.
    """
    if isinstance(tool_choice, dict):
        name = (tool_choice.get("function") or tool_choice).get("name")
        tools = [tool for tool in tools if tool["function"]["name"] == name]
        if not tools:
            raise _invalid("tool_choice", f"no tool is called {name!r}")
        parallel = False
    elif tool_choice not in ("auto", "required"):
        return response
    schemas = [_parameters(tool["function"], f"tools[{i}].function.parameters") for i, tool in enumerate(tools)]
    if sum(len(dumps(schema)) for schema in schemas) > MAX_TOOLS_BYTES:
        raise _invalid("tools", f"expected at most {MAX_TOOLS_BYTES} bytes of parameters")
    names = [tool["function"]["name"] for tool in tools]
    notation = {"hermes": _hermes, "hunyuan": _hunyuan, "xml": _xml, "json": _bare}[form]
    call, rules, tag = notation(names, schemas, parallel)
    must = tool_choice != "auto"
    if not must and response is None:
        if tag is None:
            return None
        grammar = _lazy(rules, tag, parallel)
    else:
        many = parallel and form in ("hermes", "xml")
        calls = f"crane_calls: {call}" + (f' ("\\n"? {call})*' if many else "")
        lead = "" if tag is None else '"\\n"? "\\n"? '
        grammar = f"start: {lead}crane_calls" if must else f"start: {lead}crane_calls | crane_answer"
        grammar += f"\n{calls}\n{rules}" + ("" if must else f"crane_answer: {_nested(response)}\n")
    check(grammar, "tools")
    return grammar


def check(grammar: str, field: str = "grammar") -> None:
    """Raises RequestError when a grammar does not compile, saying why and where."""
    problem = _problem(grammar)
    if problem:
        raise _invalid(field, problem)


def dumps(value: Any) -> str:
    """JSON as grammars have it."""
    return json.dumps(value, ensure_ascii=False)


# --- the answer's text


def _from_response_format(value: dict[str, Any], field: str) -> str | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _from_schema({"type": "object"}, field)
    if kind != "json_schema":
        raise _invalid(f"{field}.type", f"expected text, json_object or json_schema, got {kind!r}")
    wanted = value.get("json_schema")
    if not isinstance(wanted, dict) or wanted.get("schema") is None:
        raise _invalid(f"{field}.json_schema.schema", "expected a JSON schema")
    return _from_schema(wanted["schema"], f"{field}.json_schema.schema", lenient=wanted.get("strict") is False)


def _from_schema(schema: Any, field: str, lenient: bool = False) -> str:
    """lenient: keywords that llguidance does not know are not an error."""
    return f"start: %json {dumps(_checked_schema(schema, field, lenient))}\n"


def _from_regex(regex: str, field: str) -> str:
    import llguidance

    _check_size(regex, field)
    if not regex:
        raise _invalid(field, "expected a regular expression, got an empty one")
    pattern = llguidance.regex_to_lark(regex).replace("\n", "\\n")
    grammar = f"start: /{pattern}/\n"
    check(grammar, field)
    return grammar


def _from_choices(choices: list[str], field: str) -> str:
    for i, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            raise _invalid(f"{field}[{i}]", f"expected a text that is not empty, got {choice!r}")
    if not choices:
        raise _invalid(field, "expected at least one choice")
    _check_size(dumps(choices), field)
    grammar = f"start: {' | '.join(map(dumps, dict.fromkeys(choices)))}\n"
    check(grammar, field)
    return grammar


def _from_grammar(text: str, field: str) -> str:
    _check_size(text, field)
    if "::=" in text:
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            text = any_to_lark(text)
        except Exception as error:  # whatever its parser stumbles over
            raise _invalid(field, f"this GBNF cannot be read, write it in Lark: {error}") from None
    check(text, field)
    return text


def _nested(grammar: str) -> str:
    """The body of a rule that stands for a whole grammar."""
    head, _, rest = grammar.partition("\n")
    if head.startswith("start: ") and not rest.strip():
        return head.removeprefix("start: ")
    return f"%lark {{\n{grammar}\n}}"


# --- schemas


def _checked_schema(schema: Any, field: str, lenient: bool) -> Any:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise _invalid(field, f"expected a JSON schema, got text that is not JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise _invalid(field, f"expected a JSON schema, got {type(schema).__name__}")
    if _depth(schema, MAX_DEPTH) > MAX_DEPTH:
        raise _invalid(field, f"expected a schema of at most {MAX_DEPTH} levels")
    _check_size(dumps(schema), field)
    if isinstance(schema, dict) and "x-guidance" in schema:
        raise _invalid(f"{field}.x-guidance", "is not supported")
    if lenient and isinstance(schema, dict):
        schema = {"x-guidance": {"lenient": True}, **schema}
    problem = _problem(f"start: %json {dumps(schema)}\n")
    if problem:
        raise _invalid(field + _place(schema, problem), problem)
    return schema


def _depth(value: Any, limit: int) -> int:
    """How deep arrays and objects are nested; looks no deeper than `limit` + 1."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not isinstance(value, dict | list):
        return 0
    return 1 if limit <= 0 else 1 + max((_depth(each, limit - 1) for each in inner), default=0)


def _place(schema: Any, problem: str) -> str:
    """Where in the schema the error comes from: the innermost part with the same error, as ".a.b[0]"."""
    place, probes = "", 0
    found = True
    while found and isinstance(schema, dict):
        found = False
        shared = {key: schema[key] for key in ("$defs", "definitions", "x-guidance") if key in schema}
        for step, part in _parts(schema):
            probes += 1
            if probes > _MAX_PROBES:
                return place
            part = {**shared, **part} if isinstance(part, dict) else part
            if _problem(f"start: %json {dumps(part)}\n") == problem:
                place, schema, found = place + step, part, True
                break
    return place


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in _ONE:
        if isinstance(schema.get(key), dict):
            yield f".{key}", schema[key]
    for key in _MANY:
        inner = schema.get(key)
        if isinstance(inner, dict) and key not in ("$defs", "definitions"):
            yield from ((f".{key}.{name}", part) for name, part in inner.items())
        elif isinstance(inner, list):
            yield from ((f".{key}[{i}]", part) for i, part in enumerate(inner))


# --- tool calls: (what one call is, its rules, the tag that begins it)


def _parameters(function: dict[str, Any], field: str) -> dict[str, Any]:
    schema = function.get("parameters")
    if schema is None or schema is True or schema == {}:
        return {"type": "object"}
    if not isinstance(schema, dict):
        raise _invalid(field, f"expected a JSON schema of an object, got {type(schema).__name__}")
    if "$ref" not in schema:
        schema = {"type": "object", **schema}
        if schema["type"] != "object":
            raise _invalid(f"{field}.type", f"expected 'object', got {schema['type']!r}")
    return _checked_schema(schema, field, lenient=not function.get("strict"))


def _call_schema(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _objects(names: list[str], schemas: list[dict[str, Any]]) -> tuple[str, str]:
    """A rule that matches one call's JSON object, and the rules it needs."""
    rules = ""
    for i, (name, parameters) in enumerate(zip(names, schemas, strict=True)):
        parameters = dict(parameters)
        # references are looked up from the top, so the definitions have to be there
        top = {key: parameters.pop(key) for key in ("x-guidance", "$defs", "definitions") if key in parameters}
        rules += f"crane_object_{i}: %json {dumps({**top, **_call_schema(name, parameters)})}\n"
    choices = " | ".join(f"crane_object_{i}" for i in range(len(names)))
    return "crane_object", f"crane_object: {choices}\n{rules}"


def _hermes(names, schemas, parallel) -> tuple[str, str, str]:
    one, rules = _objects(names, schemas)
    body = f'crane_body: "\\n"? {one} "\\n"? "</tool_call>"\n'
    return "crane_call", f'crane_call: "<tool_call>" crane_body\n{body}{rules}', "<tool_call>"


def _hunyuan(names, schemas, parallel) -> tuple[str, str, str]:
    one, rules = _objects(names, schemas)
    more = f' ("," /[ \\n]/? {one})*' if parallel else ""
    body = f'crane_body: "\\n"? "[" "\\n"? {one}{more} "\\n"? "]" "\\n"? "</tool_calls>"\n'
    return "crane_call", f'crane_call: "<tool_calls>" crane_body\n{body}{rules}', "<tool_calls>"


def _bare(names, schemas, parallel) -> tuple[str, str, None]:
    one, rules = _objects(names, schemas)
    return one, rules, None


def _xml(names, schemas, parallel) -> tuple[str, str, str]:
    rules, functions = "", []
    for i, (name, schema) in enumerate(zip(names, schemas, strict=True)):
        parts = []
        top = {key: schema[key] for key in ("x-guidance", "$defs", "definitions") if key in schema}
        for j, (key, part) in enumerate((schema.get("properties") or {}).items()):
            rule = f"crane_value_{i}_{j}"
            opening = dumps(f"<parameter={key}>\n")
            parts.append(f"({opening} {rule})" + ("" if key in schema.get("required", ()) else "?"))
            if isinstance(part, dict) and part.get("type") == "string" and "enum" not in part:
                rules += f'{rule}[lazy]: /(.|\\n)*/ "\\n</parameter>\\n"\n'
            elif isinstance(part, dict) and part.get("type") == "string":
                rules += f'{rule}: ({" | ".join(dumps(each) for each in part["enum"])}) "\\n</parameter>\\n"\n'
            else:
                value = {**top, **part} if isinstance(part, dict) else part
                rules += f'{rule}: {rule}_json "\\n</parameter>\\n"\n{rule}_json: %json {dumps(value)}\n'
        functions.append(f'{dumps(f"<function={name}>" + chr(10))} {" ".join(parts)} "</function>\\n"')
    body = f'crane_body: "\\n" ({" | ".join(functions)}) "</tool_call>"\n'
    return "crane_call", f'crane_call: "<tool_call>" crane_body\n{body}{rules}', "<tool_call>"


def _lazy(rules: str, tag: str, parallel: bool) -> str:
    """Free text until a tag; from there on a call. After the only call, the answer is over."""
    text = f'CRANE_TEXT: /(.|\\n)*/\ncrane_head[lazy]: CRANE_TEXT {dumps(tag)}\n{rules}'
    if parallel:
        return f"start: (crane_head crane_body)* CRANE_TEXT\n{text}"
    return f"start: crane_head crane_body | CRANE_TEXT\n{text}"


# --- llguidance


@functools.lru_cache(maxsize=128)
def _problem(grammar: str) -> str | None:
    """Why a grammar does not compile, or None. Takes at most about `TIME_LIMIT_S`."""
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(_look(grammar)), daemon=True)
    default = threading.stack_size(_STACK_BYTES)
    try:
        thread.start()
    finally:
        threading.stack_size(default)
    thread.join(TIME_LIMIT_S)
    return found[0] if found else f"takes longer than {TIME_LIMIT_S:g} s to compile"


def _look(grammar: str) -> str | None:
    import llguidance

    limits = llguidance.LLParserLimits(verbose_errors=False)
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, limits=limits)
    if failed:
        return _plain(messages[0])
    if messages:  # it names tokens, which only the engine knows; or keywords that are not strict
        return None
    # what can be said but never matched shows in the first mask
    matcher = llguidance.LLMatcher(_byte_vocabulary(), grammar, log_level=0, limits=limits)
    matcher.compute_bitmask()
    return "nothing can match it" if matcher.is_error() or matcher.is_stopped() else None


@functools.lru_cache(maxsize=1)
def _byte_vocabulary():
    import llguidance

    class Bytes:
        is_tokenizer_wrapper = True
        bos_token_id = None
        eos_token_id = 256
        tokens = [bytes([i]) for i in range(256)] + [b"<|end|>"]
        special_token_ids = [256]

        def __call__(self, text):
            return list(text.encode() if isinstance(text, str) else text)

    return llguidance.LLTokenizer(Bytes(), n_vocab=257, eos_token=256, slices=[])


def _plain(message: str) -> str:
    """An error of llguidance without what we wrapped the user's text in."""
    text = message.split("\n   1 |")[0]
    for mark in ("failed to compile JSON schema: ", "(in regex): "):
        text = text.split(mark)[-1]
    return " ".join(text.split())[:500]


def _check_size(text: str, field: str) -> None:
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise _invalid(field, f"expected at most {MAX_BYTES} bytes")


def _invalid(field: str, message: str) -> RequestError:
    return RequestError(f"{field}: {message}", field=field, code="invalid_schema")
