"""Fields of a request as grammars: what they accept, and what is refused with the place of the mistake."""

import json
import subprocess
import sys

import jsonschema
import pytest

from crane.api.constraint import MAX_BYTES, check, response_grammar, tools_grammar
from crane.errors import RequestError
from crane.models.files import Checkpoint
from crane.models.tokenizer import load_tokenizer
from crane.runtime.grammar import GrammarCompiler
from tests.tiny import make_tiny

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip
WEATHER = '{"name": "weather", "arguments": {"city": "Bern"}}'
NOW = '{"name": "now", "arguments": {}}'
ANSWER = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
          "additionalProperties": False}  # fmt: skip
NAMED = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module", params=["tiny", "qwen3"])
def compiler(request, tmp_path_factory):
    """Of a vocabulary that spells tags out, and of one where they are tokens."""
    if request.param == "tiny":
        path = make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3")
    else:
        path = request.getfixturevalue("qwen3_tokenizer")
    tokenizer = load_tokenizer(Checkpoint(path, "safetensors"))
    made = GrammarCompiler(tokenizer, tokenizer.vocab_size, frozenset())
    made.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    return made


def fits(compiler, grammar, text):
    """Whether the grammar accepts the whole text."""
    matcher = compiler.compile(grammar).result().deep_copy()
    return matcher.consume_tokens(compiler.encode(text)) and matcher.is_accepting()


def refused(*args, **kwargs):
    with pytest.raises(RequestError) as caught:
        (response_grammar if not args else tools_grammar)(*args, **kwargs)
    assert caught.value.code == "invalid_schema" and caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    "fields, good, bad",
    [
        ({"response_format": {"type": "json_object"}}, ['{"a": [1, null]}', "{}"], ["[1]", "a", '{"a"']),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": ANSWER}}},
         ['{"ok": true}', '{"ok":false}'], ['{"ok": 1}', "{}", '{"ok": true, "b": 1}']),
        ({"json": json.dumps(ANSWER)}, ['{"ok": true}'], ["{}"]),
        ({"regex": r"a/b\d+|x\ny"}, ["a/b12", "x\ny"], ["a/b", "ab1"]),
        ({"regex": "a\nb"}, ["a\nb"], ["ab"]),
        ({"choice": ["yes", 'a "b"\n', "yesterday", "ä"]}, ["yes", 'a "b"\n', "yesterday", "ä"], ["ye", "no"]),
        ({"grammar": 'start: item+\nitem: /[a-z]/ ";"'}, ["a;", "a;b;"], ["a", "A;"]),
        ({"grammar": 'root ::= "yes" | num+\nnum ::= [0-9] ";"'}, ["yes", "1;2;"], ["no", "1"]),
    ],
)  # fmt: skip
def test_a_field_accepts_what_it_describes_and_nothing_else(compiler, fields, good, bad):
    grammar = response_grammar(**fields)
    for text in good:
        assert fits(compiler, grammar, text), text
    for text in bad:
        assert not fits(compiler, grammar, text), text


def test_nothing_asked_for_is_no_grammar():
    assert response_grammar() is None
    assert response_grammar(response_format={"type": "text"}) is None
    assert tools_grammar(TOOLS, "none", "hermes", None, True) is None


@pytest.mark.parametrize(
    "fields, place, why",
    [
        ({"json": {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "strin"}}}}},
         "json.properties.a.items", "strin"),
        ({"json": {"$defs": {"q": {"not": {}}}, "anyOf": [{"type": "null"}, {"$ref": "#/$defs/q"}]}},
         "json.anyOf[1]", "not"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/$defs/gone"}}}},
         "response_format.json_schema.schema", "gone"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema", "expected"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        ({"json": '{"type"'}, "json", "not JSON"),
        ({"json": [1]}, "json", "list"),
        ({"json": {"$ref": "#"}}, "json", "nothing can match"),
        ({"json": {"type": "object", "required": ["z"], "additionalProperties": False}}, "json", "z"),
        ({"json": {"enum": ["x" * MAX_BYTES]}}, "json", "bytes"),
        ({"json": {"x-guidance": {}}}, "json.x-guidance", "supported"),
        ({"regex": "(?=a)b"}, "regex", "look-around"),
        ({"regex": ""}, "regex", "empty"),
        ({"choice": ["a", ""]}, "choice[1]", "empty"),
        ({"choice": []}, "choice", "at least one"),
        ({"grammar": "start: gone"}, "grammar", "gone"),
        ({"grammar": "root ::= [a"}, "grammar", "GBNF"),
        ({"grammar": "start: start"}, "grammar", "nothing can match"),
        ({"regex": "a", "choice": ["a"]}, "choice", "one constraint"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_with_its_place(fields, place, why):
    error = refused(**fields)
    assert error.field == place
    assert why in str(error) and place in str(error)


def test_the_caller_names_the_field_of_an_error():
    assert refused(json={"properties": {"a": {"not": {}}}}, field="guided_json").field == "guided_json.properties.a"


def test_a_schema_too_deep_is_refused_before_it_is_compiled():
    schema = {}
    for _ in range(5000):
        schema = {"items": schema}
    assert "levels" in str(refused(json=schema))


def test_rules_that_refer_to_rules_a_thousand_times_over_do_not_end_the_process(compiler):
    rules = "\n".join(f'r{i}: (("b"|("c" r{i + 1}?)+))*' for i in range(1500))
    assert fits(compiler, response_grammar(grammar=f'start: r0\n{rules}\nr1500: "a"'), "bcb")
    parts = {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(1000)}
    schema = {"$defs": {**parts, "a1000": {}}, "$ref": "#/$defs/a0"}
    assert fits(compiler, response_grammar(json=schema), '{"x": {"x": {}}}')


def test_strict_false_lets_unknown_keywords_pass():
    schema = {"type": "object", "properties": {"a": {"not": {"type": "null"}}}}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema, "strict": False}}
    assert "%json" in response_grammar(response_format=wanted)
    assert refused(response_format={**wanted, "json_schema": {"schema": schema}}).field.endswith("properties.a")


def test_check_passes_what_compiles():
    check('start: "a" | "b"')
    with pytest.raises(RequestError, match="gone"):
        check("start: gone", "field")


def hermes(call):
    return f"<tool_call>\n{call}\n</tool_call>"


CALLS = {
    "hermes": (hermes(WEATHER), hermes(NOW), hermes(WEATHER) + "\n" + hermes(NOW)),
    "hunyuan": (f"<tool_calls>[{WEATHER}]</tool_calls>", f"<tool_calls>[{NOW}]</tool_calls>",
                f"<tool_calls>[{WEATHER}, {NOW}]</tool_calls>"),
    "xml": ("<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n</function>\n</tool_call>",
            "<tool_call>\n<function=now>\n</function>\n</tool_call>",
            "<tool_call>\n<function=weather>\n<parameter=city>\nBern <b>\n</parameter>\n<parameter=days>\n3\n"
            "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>"),
    "json": (WEATHER, NOW, None),
}  # fmt: skip


@pytest.mark.parametrize("form", CALLS)
def test_a_required_call_is_all_there_can_be(compiler, form):
    weather, now, both = CALLS[form]
    grammar = tools_grammar(TOOLS, "required", form, None, True)
    assert fits(compiler, grammar, weather) and fits(compiler, grammar, now)
    assert not fits(compiler, grammar, "Hello") and not fits(compiler, grammar, weather[:-1])
    assert not fits(compiler, grammar, weather.replace("weather", "wether"))
    assert not fits(compiler, grammar, weather.replace("city", "town"))
    if both:
        assert fits(compiler, grammar, both)
        assert not fits(compiler, tools_grammar(TOOLS, "required", form, None, False), both)


@pytest.mark.parametrize("form", CALLS)
def test_a_named_choice_is_one_call_of_that_tool(compiler, form):
    weather, now, both = CALLS[form]
    grammar = tools_grammar(TOOLS, NAMED, form, None, True)
    assert fits(compiler, grammar, now)
    assert not fits(compiler, grammar, weather) and not fits(compiler, grammar, f"{now}\n{now}")
    assert refused(TOOLS, {"function": {"name": "gone"}}, form, None, True).field == "tool_choice"


@pytest.mark.parametrize("form", ["hermes", "hunyuan", "xml"])
def test_text_is_free_until_a_call_opens(compiler, form):
    weather, now, both = CALLS[form]
    grammar = tools_grammar(TOOLS, "auto", form, None, True)
    for text in ("Hello", "", "a < b <tool_cal\n<x>", '{"name": 1}', f"I look.\n{weather}", f"{both}\nDone. ä", now):
        assert fits(compiler, grammar, text), text
    tag = weather[: weather.index(">") + 1]
    assert not fits(compiler, grammar, f"So: {tag} and on")
    assert not fits(compiler, grammar, f"So: {weather.replace('city', 'town')}")
    single = tools_grammar(TOOLS, "auto", form, None, False)
    assert fits(compiler, single, f"So: {weather}") and fits(compiler, single, "Hello")
    assert not fits(compiler, single, both) and not fits(compiler, single, f"{weather} Done.")


def test_a_call_without_tags_is_not_looked_for_in_free_text():
    assert tools_grammar(TOOLS, "auto", "json", None, True) is None


@pytest.mark.parametrize("form", CALLS)
@pytest.mark.parametrize("answer", [{"json": ANSWER}, {"grammar": 'start: "{" a "}"\na: "\\"ok\\": true"'},
                                    {"grammar": 'root ::= "{" a "}"\na ::= "\\"ok\\": true"'}])  # fmt: skip
def test_tools_and_a_response_format_are_calls_or_that_answer(compiler, form, answer):
    weather, now, both = CALLS[form]
    grammar = tools_grammar(TOOLS, "auto", form, response_grammar(**answer), True)
    assert fits(compiler, grammar, weather) and fits(compiler, grammar, '{"ok": true}')
    if both:
        assert fits(compiler, grammar, both)
    for text in ("Hello", '{"ok": 1}', weather.replace("city", "town"), weather + '{"ok": true}'):
        assert not fits(compiler, grammar, text), text


def test_definitions_of_a_tool_are_found_from_its_arguments(compiler):
    parameters = {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"],
                  "$defs": {"a": {"type": "object", "properties": {"next": {"$ref": "#/$defs/a"}},
                                  "additionalProperties": False}}}  # fmt: skip
    arguments = {"a": {"next": {"next": {}}}}
    jsonschema.validate(arguments, parameters)
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    grammar = tools_grammar(tools, "required", "hermes", None, True)
    assert fits(compiler, grammar, hermes(json.dumps({"name": "f", "arguments": arguments})))
    assert not fits(compiler, grammar, hermes('{"name": "f", "arguments": {"a": {"next": 1}}}'))


@pytest.mark.parametrize(
    "function, place",
    [
        ({"name": "f", "parameters": {"type": "array"}}, "tools[1].function.parameters.type"),
        ({"name": "f", "parameters": 7}, "tools[1].function.parameters"),
        ({"name": "f", "parameters": {"properties": {"a": {"type": "strin"}}}},
         "tools[1].function.parameters.properties.a"),
        ({"name": "f", "strict": True, "parameters": {"properties": {"a": {"not": {}}}}},
         "tools[1].function.parameters.properties.a"),
    ],
)  # fmt: skip
def test_a_bad_tool_is_refused_with_its_place(function, place):
    tools = [TOOLS[1], {"type": "function", "function": function}]
    before = json.dumps(tools)
    assert refused(tools, "auto", "hermes", None, True).field == place
    assert json.dumps(tools) == before


def test_keywords_of_a_tool_that_is_not_strict_may_be_unknown():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}]
    assert tools_grammar(tools, "required", "hermes", None, True)


def test_only_a_request_for_structure_loads_the_grammar_library():
    modules = ("crane.api.app", "crane.api.constraint", "crane.runtime.types", "crane.runtime.scheduler",
               "crane.runtime.sequence", "crane.runtime.grammar")  # fmt: skip
    code = f"import sys, {', '.join(modules)}; print([m for m in ('llguidance', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr
    code += "; crane.api.constraint.response_grammar(json={}); print('llguidance' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["[]", "True"], done.stdout + done.stderr
