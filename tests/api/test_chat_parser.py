"""What is read from the text of answers; and that it is the same however the text is cut into pieces."""

import itertools
import json

import pytest

from crane.api.chat_parser import ChatForm, ChatParser, Content, Reasoning, ToolArguments, ToolStart, new_call_id

QWEN2 = ChatForm(takes_tools=True)
QWEN3 = ChatForm(thinks=True, takes_tools=True)
HUNYUAN = ChatForm(thinks=True, answers=True, takes_tools=True, tools="hunyuan")
CODER = ChatForm(takes_tools=True, tools="xml")
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "hot": {"type": "boolean"}},
}
TOOLS = [{"function": {"name": "weather", "parameters": SCHEMA}}, {"function": {"name": "now"}}]
ARGUMENTS = '{"city": "Pa}r\\"is </tool_call> \\\\", "more": [1, {"a": null}]}'
CALL = '{"name": "weather", "arguments": %s}' % ARGUMENTS
NOW = '{"name": "now", "arguments": {}}'


def read(pieces, form, *, tools=TOOLS, reason="stop", **options):
    """(events, neighbours of a kind joined; the finish reason), with ids id0, id1, ..."""
    numbers = itertools.count()
    parser = ChatParser(form, tools, new_id=lambda: f"id{next(numbers)}", **options)
    events = [event for piece in pieces for event in parser.push(piece)]
    last, reason = parser.finish(reason)
    joined = []
    for event in events + last:
        same = joined and type(joined[-1]) is type(event) and joined[-1][:-1] == event[:-1]
        if same and not isinstance(event, ToolStart):
            joined[-1] = event._replace(text=joined[-1].text + event.text)
        else:
            joined.append(event)
    said = [event.text for event in joined if isinstance(event, Content)]
    assert "".join(said) == parser.content
    return joined, reason


def call(index, name="weather", arguments=ARGUMENTS):
    return [ToolStart(index, f"id{index}", name), ToolArguments(index, arguments)]


CASES = {
    "plain text": ("Hi <b> there, a < b  ", QWEN2, {}, [Content("Hi <b> there, a < b  ")], "stop"),
    "only space": (" \n", QWEN2, {}, [Content(" \n")], "stop"),
    "thinking": (
        "<think>\nhm, x < y\n</think>\n\nIt is  4.\n",
        QWEN3,
        {},
        [Reasoning("hm, x < y"), Content("It is  4.\n")],
        "stop",
    ),
    "no thinking": ("It <think> is 4.", QWEN3, {}, [Content("It <think> is 4.")], "stop"),
    "empty thinking": ("<think>\n\n</think>\n\nYes", QWEN3, {}, [Content("Yes")], "stop"),
    "opened by the prompt": (
        "hm\n</think>\n\nok",
        QWEN3,
        {"thinking_open": True},
        [Reasoning("hm"), Content("ok")],
        "stop",
    ),
    "cut while thinking": ("<think>\nhm and </thi", QWEN3, {"reason": "length"}, [Reasoning("hm and")], "length"),
    "answer tags": (
        "<think>\na\n</think>\n<answer>\nHello <i>\n</answer>",
        HUNYUAN,
        {"tools": None},
        [Reasoning("a"), Content("Hello <i>")],
        "stop",
    ),
    "hermes": (f"<tool_call>\n{CALL}\n</tool_call>", QWEN2, {}, call(0), "tool_calls"),
    "hermes, two, after thinking": (
        f"<think>\na\n</think>\n\nSo:\n\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{NOW}\n</tool_call>",
        QWEN3,
        {},
        [Reasoning("a"), Content("So:"), *call(0), *call(1, "now", "{}")],
        "tool_calls",
    ),
    "text after a call": (
        f"<tool_call>{NOW}</tool_call>\nDone.",
        QWEN2,
        {},
        [*call(0, "now", "{}"), Content("Done.")],
        "tool_calls",
    ),
    "hunyuan": (
        f"<think>\na\n</think>\n<answer>\nok\n<tool_calls>[{CALL}, {NOW}]</tool_calls>\n</answer>",
        HUNYUAN,
        {},
        [Reasoning("a"), Content("ok"), *call(0), *call(1, "now", "{}")],
        "tool_calls",
    ),
    "arguments first": (
        '<tool_call>{"arguments": {"a": 1}, "name": "now"}</tool_call>',
        QWEN2,
        {},
        call(0, "now", '{"a": 1}'),
        "tool_calls",
    ),
    "parameters for arguments": (
        '<tool_call>{"name": "now", "parameters": {"a": 1}, "id": 7}</tool_call>',
        QWEN2,
        {},
        call(0, "now", '{"a": 1}'),
        "tool_calls",
    ),
    "arguments in a string": (
        '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>',
        QWEN2,
        {},
        call(0, "now", '{"a": 1}'),
        "tool_calls",
    ),
    "null arguments": (
        '<tool_call>{"name": "now", "arguments": null}</tool_call>',
        QWEN2,
        {},
        call(0, "now", "{}"),
        "tool_calls",
    ),
    "line breaks inside strings": (
        '<tool_call>{"name": "now", "arguments": {"code": "a\n\tb"}}</tool_call>',
        QWEN2,
        {},
        call(0, "now", '{"code": "a\\n\\tb"}'),
        "tool_calls",
    ),
    "a brace too few, a brace too many": (
        '<tool_call>\n{"name": "now", "arguments": {"a": 1}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {"a": 2}}}\n</tool_call>',
        QWEN2,
        {},
        [*call(0, "now", '{"a": 1}'), *call(1, "now", '{"a": 2}')],
        "tool_calls",
    ),
    "an opening tag in place of the closing one": (
        f"<tool_call>{NOW}<tool_call>{NOW}</tool_call>",
        QWEN2,
        {},
        [*call(0, "now", "{}"), *call(1, "now", "{}")],
        "tool_calls",
    ),
    "no call between the tags": ("<tool_call>\nnope\n</tool_call> x", QWEN2, {}, [Content("nopex")], "stop"),
    "no call, and not closed": (
        f"<tool_call>nope<tool_call>{NOW}</tool_call>",
        QWEN2,
        {},
        [Content("nope"), *call(0, "now", "{}")],
        "tool_calls",
    ),
    "bare, with the tag that closes": (f"{NOW}\n</tool_call>", QWEN2, {}, call(0, "now", "{}"), "tool_calls"),
    "bare": (CALL, QWEN2, {}, call(0), "tool_calls"),
    "bare, twice": (f"\n{CALL}\n{NOW}\n", QWEN2, {}, [*call(0), *call(1, "now", "{}")], "tool_calls"),
    "bare, then text": (f"{NOW}\n\nDone.", QWEN2, {}, [*call(0, "now", "{}"), Content("Done.")], "tool_calls"),
    "bare, after thinking": (f"<think>\na\n</think>\n\n{NOW}", QWEN3, {}, [Reasoning("a"), *call(0, "now", "{}")],
                             "tool_calls"),
    "in a fence": (f"```json\n{CALL}\n```", QWEN2, {}, call(0), "tool_calls"),
    "in the tags of the prompt": (f"<tools>\n{CALL}\n</tools>", QWEN2, {}, call(0), "tool_calls"),
    "bare, unknown name": (
        '{"name": "other", "arguments": {}}',
        QWEN2,
        {},
        [Content('{"name": "other", "arguments": {}}')],
        "stop",
    ),
    "an object that is no call": ('{"name": "now"}', QWEN2, {}, [Content('{"name": "now"}')], "stop"),
    "a fence of code": ("```python\nx = {}\n```", QWEN2, {}, [Content("```python\nx = {}\n```")], "stop"),
    "no tools": (f"<tool_call>{CALL}</tool_call>", QWEN2, {"tools": None},
                 [Content(f"<tool_call>{CALL}</tool_call>")], "stop"),
    "xml": (
        "ok\n<tool_call>\n<function=weather>\n<parameter=city>\nNew\nYork\n</parameter>\n<parameter=days>\n3\n"
        "</parameter>\n<parameter=hot>\nTrue\n</parameter>\n</function>\n</tool_call>",
        CODER,
        {},
        [Content("ok"), *call(0, "weather", '{"city": "New\\nYork", "days": 3, "hot": true}')],
        "tool_calls",
    ),
    "xml without its tag": (
        "<function=now>\n</function>\n</tool_call>",
        CODER,
        {},
        call(0, "now", "{}"),
        "tool_calls",
    ),
    "cut inside a call": (
        f"<tool_call>\n{CALL[:-20]}",
        QWEN2,
        {"reason": "length"},
        call(0, arguments=ARGUMENTS[:-19]),
        "length",
    ),
    "cut before a name": ('x <tool_call>\n{"name": "wea', QWEN2, {"reason": "length"}, [Content("x")], "length"),
    "cut inside a tag": ("x <tool_c", QWEN2, {"reason": "length"}, [Content("x ")], "length"),
    "one call wanted": (
        f"<tool_call>{NOW}</tool_call><tool_call>{NOW}</tool_call>",
        QWEN2,
        {"parallel": False},
        call(0, "now", "{}"),
        "tool_calls",
    ),
}  # fmt: skip


@pytest.mark.parametrize("text, form, options, events, reason", CASES.values(), ids=CASES)
def test_events_are_the_same_however_the_text_is_cut(text, form, options, events, reason):
    assert read([text], form, **options) == (events, reason)
    assert read(list(text), form, **options) == (events, reason)
    for i in range(1, len(text)):
        assert read([text[:i], text[i:]], form, **options) == (events, reason), text[:i]


def test_every_piece_of_a_call_comes_out_as_soon_as_it_is_read():
    parser = ChatParser(QWEN2, TOOLS)
    assert parser.push('<tool_call>\n{"name": "weather", "argu') == []
    (start, arguments) = parser.push('ments": {"city": "Par')
    assert start.name == "weather" and arguments.text == '{"city": "Par'
    assert parser.push('is"') == [ToolArguments(0, 'is"')]
    assert parser.push("}}\n</tool_call>") == [ToolArguments(0, "}")]
    assert json.loads(parser.calls[0].arguments) == {"city": "Paris"} and parser.calls[0].complete


def test_a_call_that_was_cut_is_marked_incomplete():
    parser = ChatParser(QWEN2, TOOLS)
    parser.push(f"<tool_call>{NOW}</tool_call><tool_call>" + '{"name": "weather", "arguments": {"ci')
    assert parser.finish("length")[1] == "length"
    assert [each.complete for each in parser.calls] == [True, False]


def test_parser_says_when_it_thinks_and_when_no_more_is_wanted():
    parser = ChatParser(QWEN3, TOOLS, parallel=False)
    parser.push("<thi")
    assert not parser.thinking
    parser.push("nk>a")
    assert parser.thinking and not parser.done
    parser.push(f"</think>{NOW}")
    assert not parser.thinking and parser.done


def test_ids_of_calls_are_unique_and_of_openais_length():
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100 and all(len(each) == 29 and each.startswith("call_") for each in ids)
