"""Chat templates against transformers' renderer, and the sandbox's bound on cost."""

import copy
import json
import time

import pytest

from crane.errors import ModelError, RequestError
from crane.models import sandbox
from crane.models.chat import ChatTemplate, load_chat_template
from crane.models.files import Checkpoint, open_checkpoint
from crane.models.tokenizer import load_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather <now> & later, in °C",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "How warm is it in Köln?"}
FUNCTION = {"name": "weather", "arguments": {"city": "Köln"}}
CALL = {
    "role": "assistant", "content": "", "tool_calls": [{"id": "c1", "type": "function", "function": FUNCTION}]
}  # fmt: skip
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "21 °C"}
THOUGHT = {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n21 degrees."}
CASES = {
    "user": ([USER], {}),
    "system": ([SYSTEM, USER], {}),
    "turns": ([SYSTEM, USER, THOUGHT, USER], {}),
    "tools": ([USER], {"tools": TOOLS}),
    "results": ([SYSTEM, USER, CALL, RESULT, RESULT, THOUGHT, USER], {"tools": TOOLS}),
    "thinking": ([USER], {"enable_thinking": True}),
    "no thinking": ([USER], {"enable_thinking": False}),
    "closed": ([USER, THOUGHT], {"add_generation_prompt": False}),
}


class FakeTokenizer:
    """What load_chat_template asks of a tokenizer."""

    def __init__(self, *known, **special_tokens):
        self.special_tokens = special_tokens
        self._known = known

    def token_to_id(self, token):
        return self._known.index(token) if token in self._known else None


def folder(tmp_path, template=None, config=None):
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Checkpoint(tmp_path, "safetensors")


def render(source, messages=(USER,), **options):
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(list(messages), **options)


@pytest.fixture(scope="module", params=["qwen3", "qwen_coder", "smollm2"])
def real(request):
    """A real template of ours and its source."""
    path = request.getfixturevalue("qwen3_tokenizer" if request.param == "qwen3" else request.param)
    checkpoint = Checkpoint(path, "safetensors") if request.param == "qwen3" else open_checkpoint(path)
    tokenizer = load_tokenizer(checkpoint)
    return load_chat_template(checkpoint, tokenizer, "qwen3"), tokenizer


@pytest.mark.parametrize("case", CASES)
def test_real_templates_render_as_in_transformers(real, case):
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    template, tokenizer = real
    messages, options = CASES[case]
    wanted = {"add_generation_prompt": True, "tools": None, **options, **tokenizer.special_tokens}
    (expected,), _ = utilities.render_jinja_template(
        [copy.deepcopy(messages)], chat_template=template.source, **wanted
    )
    assert template.render(messages, **options) == expected


def test_qwen3_folder_renders_as_its_transformers_tokenizer(qwen3_tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(qwen3_tokenizer, local_files_only=True)
    checkpoint = Checkpoint(qwen3_tokenizer, "safetensors")
    tokenizer = load_tokenizer(checkpoint)
    template = load_chat_template(checkpoint, tokenizer, "qwen3")
    for messages, options in CASES.values():
        wanted = {"add_generation_prompt": True, "tokenize": False, **options}
        text = template.render(messages, **options)
        assert text == theirs.apply_chat_template(messages, **wanted)
        ids = theirs.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, add_special_tokens=False) == ids


# --- messages


def test_rendering_leaves_the_messages_as_they_were(real):
    messages = copy.deepcopy([SYSTEM, USER, {**CALL, "content": None}, RESULT])
    before = copy.deepcopy(messages)
    real[0].render(messages, continue_final_message=True)
    assert messages == before


def test_tool_call_arguments_given_as_text_are_not_encoded_twice():
    source = "{% for call in messages[0].tool_calls %}{{ call.function.arguments | tojson }}{% endfor %}"
    call = {"function": {"name": "f", "arguments": '{"city": "Köln", "n": [1]}'}}
    assert render(source, [{"role": "assistant", "tool_calls": [call]}]) == '{"city": "Köln", "n": [1]}'
    call["function"]["arguments"] = ""
    assert render(source, [{"role": "assistant", "tool_calls": [call]}]) == "{}"


@pytest.mark.parametrize("arguments", ["{", "[1]", "null", "[" * 100_000])
def test_tool_call_arguments_that_are_no_object_are_refused(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    where = r"messages\[1\].tool_calls\[0\].function.arguments: expected a JSON object"
    with pytest.raises(RequestError, match=where):
        render("x", [USER, {"role": "assistant", "tool_calls": [call]}])


def test_text_parts_are_joined_and_null_content_is_empty():
    source = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, {"role": "user", "content": None}]
    assert render(source, messages) == "[a\nb][]"


def test_a_template_that_only_reads_parts_gets_parts():
    source = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
    assert render(source, [{"role": "user", "content": "a"}]) == "<a>"
    assert render(source, [{"role": "user", "content": "ab"}], continue_final_message=True) == "<ab"


@pytest.mark.parametrize(
    "content, where",
    [
        ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], r"messages\[0\].content\[0\]"),
        ([{"type": "text"}], r"messages\[0\].content\[0\]"),
        (7, r"messages\[0\].content"),
    ],
)
def test_content_that_is_not_text_is_refused_by_place(content, where):
    with pytest.raises(RequestError, match=where) as caught:
        render("x", [{"role": "user", "content": content}])
    assert caught.value.field == "messages"


def test_the_templates_own_objection_reaches_the_user():
    with pytest.raises(RequestError, match="^roles must alternate$") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.field == "messages"


def test_a_template_that_trips_over_a_message_blames_the_messages():
    with pytest.raises(RequestError, match="chat template failed: TypeError") as caught:
        render("{{ messages[0].content + 1 }}")
    assert caught.value.field == "messages"


# --- arguments


def test_the_final_message_can_be_continued(real):
    template = real[0]
    for content in ("Sure, i", "ends in a space ", "a\n"):
        text = template.render([USER, {"role": "assistant", "content": content}], continue_final_message=True)
        assert text.endswith(content)
        assert "\ue000" not in text


def test_a_continued_message_may_hold_the_mark_itself():
    source = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    content = "x\ue000crane-end\ue000y"
    assert render(source, [{"role": "assistant", "content": content}], continue_final_message=True) == content


def test_continuing_what_is_not_shown_is_refused():
    for source, content in (("x", "a"), ("{{ messages[0].content }}", "")):
        with pytest.raises(RequestError) as caught:
            render(source, [{"role": "assistant", "content": content}], continue_final_message=True)
        assert caught.value.field == "continue_final_message"


def test_opening_a_turn_and_continuing_one_exclude_each_other():
    with pytest.raises(RequestError) as caught:
        render("x", add_generation_prompt=True, continue_final_message=True)
    assert caught.value.field == "continue_final_message"


@pytest.mark.parametrize(
    "name", ["messages", "bos_token", "raise_exception", "range", "crane_budget", "__class__"]
)
def test_template_kwargs_may_not_override_the_templates_own_names(name):
    template = ChatTemplate("x", {"bos_token": "<s>"})
    with pytest.raises(RequestError, match=name) as caught:
        template.render([USER], **{name: "mine"})
    assert caught.value.field == "chat_template_kwargs"


def test_all_of_the_templates_own_arguments_are_refused_as_kwargs():
    template = ChatTemplate("x", {})
    for name in ("messages", "tools", "add_generation_prompt", "continue_final_message"):
        with pytest.raises(RequestError, match=name):
            template.check_kwargs({name: 1})
    template.check_kwargs({"enable_thinking": False})


# --- where templates come from


def test_chat_template_jinja_goes_before_the_configuration(tmp_path):
    checkpoint = folder(tmp_path, "from the file", {"chat_template": "from the configuration"})
    assert load_chat_template(checkpoint, FakeTokenizer(), "qwen3").render([USER]) == "from the file"


def test_named_templates_are_chosen_by_the_presence_of_tools(tmp_path):
    with_tools = {"name": "tool_use", "template": "with {{ tools | length }}"}
    named = [{"name": "default", "template": "plain"}, with_tools]
    template = load_chat_template(folder(tmp_path, config={"chat_template": named}), FakeTokenizer(), "qwen3")
    assert template.render([USER]) == "plain"
    assert template.render([USER], tools=TOOLS) == "with 1"
    assert template.render([USER], tools=[]) == "plain"


def test_gguf_metadata_holds_templates():
    key = "tokenizer.chat_template"
    metadata = {key: "{{ bos_token }}plain", f"{key}.tool_use": "tools"}
    checkpoint = Checkpoint("model.gguf", "gguf", metadata)
    template = load_chat_template(checkpoint, FakeTokenizer(bos_token="<s>"), "llama")
    assert (template.render([USER]), template.render([USER], tools=TOOLS)) == ("<s>plain", "tools")


def test_a_model_without_template_has_none(tmp_path):
    assert load_chat_template(folder(tmp_path), FakeTokenizer(), "qwen3") is None
    assert load_chat_template(folder(tmp_path), FakeTokenizer(), "hunyuan") is None


@pytest.mark.parametrize(
    "source, message",
    [
        ("{% for %}", "chat_template.jinja line 1"),
        ("ok\n{{ 'x' | nosuch }}", "chat_template.jinja line 2: No filter named 'nosuch'"),
        ("{{ messages | pprint }}", "No filter named 'pprint'"),
        ("{% for i in range(100000000) %}{% endfor %}", "makes more than"),
    ],
)
def test_a_template_that_cannot_work_is_refused_at_load(tmp_path, source, message):
    with pytest.raises(ModelError, match=message):
        load_chat_template(folder(tmp_path, source), FakeTokenizer(), "qwen3")


def test_a_malformed_list_of_templates_is_refused(tmp_path):
    with pytest.raises(ModelError, match="chat_template must be"):
        checkpoint = folder(tmp_path, config={"chat_template": [{"name": "default"}]})
        load_chat_template(checkpoint, FakeTokenizer(), "qwen3")


def test_hunyuan_dense_has_a_form_of_its_own(tmp_path):
    tokenizer = FakeTokenizer("<｜hy_User｜>", bos_token="<｜hy_begin▁of▁sentence｜>")
    template = load_chat_template(folder(tmp_path), tokenizer, "hunyuan")
    turns = [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = (
        "<｜hy_begin▁of▁sentence｜>Be brief.<｜hy_place▁holder▁no▁3｜>"
        "<｜hy_User｜>Hi<｜hy_Assistant｜>Hello<｜hy_place▁holder▁no▁2｜>"
    )
    assert template.render(turns, add_generation_prompt=False) == text
    assert template.render([*turns, {"role": "user", "content": "More"}]) == (
        text + "<｜hy_User｜>More<｜hy_Assistant｜>"
    )
    for refused in ({"messages": [RESULT]}, {"messages": [USER], "tools": TOOLS}):
        with pytest.raises(RequestError):
            template.render(refused.pop("messages"), **refused)


def test_large_hunyuan_has_another_form(tmp_path):
    template = load_chat_template(folder(tmp_path), FakeTokenizer("<|extra_0|>"), "hunyuan")
    turns = [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}, USER]
    assert template.render(turns) == (
        "<|startoftext|>Be brief.<|extra_4|>Hi<|extra_0|>Yo<|eos|>"
        "<|startoftext|>How warm is it in Köln?<|extra_0|>"
    )


# --- the language of templates


@pytest.mark.parametrize(
    "source, expected",
    [
        ("{{ {'a': '<&\\'é'} | tojson }}", '{"a": "<&\'é"}'),
        ("{{ {'a': [1]} | tojson(indent=2) }}", '{\n  "a": [\n    1\n  ]\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for i in 'ab' %}{{ loop.index }}{{ loop.length }}{{ loop.last }}{% endfor %}", "12False22True"),
        ("{% for i in 'abc' %}{{ loop.previtem }}{{ loop.nextitem }};{% endfor %}", "b;ac;b;"),
        ("{% for i in [] %}x{% else %}none{% endfor %}", "none"),
        ("{% for k, v in {'a': 1}.items() %}{{ k ~ v }}{% endfor %}", "a1"),
        ("{% for n in [[1, [2]]] recursive %}{{ n if n is number else loop(n) }}{% endfor %}", "12"),
        ("a\n    {% if true %}\nb\n    {% endif %}\n", "a\nb\n"),
        ("{% generation %}a{{ 1 }}{% endgeneration %}b", "a1b"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') + m('b') }}", "<a><b>"),
        ("{% set s = namespace(n=1) %}{% for i in 'abc' %}{% set s.n = s.n * 2 %}{% endfor %}{{ s.n }}", "8"),
        ("{{ '%s-%d' % ('a', 3) }}{{ '{}{:>3}'.format('b', 1) }}{{ 'c%s' | format(1) }}", "a-3b  1c1"),
        ("{{ ['a', 'b'] | join(', ') }}{{ '-'.join('cd') }}{{ 'aa' | replace('a', 'b') }}", "a, bc-dbb"),
        ("{{ [1, 2] | sum }}{{ 2.5 | round | int }}{{ 'a\nb' | indent(2) }}{{ 1 | string }}", "32a\n  b1"),
        ("{{ strftime_now('%Y') | length }}{{ messages[0]['content'][:3] }}{{ undefined_name }}", "4How"),
        ("{{ bos_token }}{{ eos_token }}{{ x }}", "<s></s>7"),
    ],
)
def test_templates_can_say_what_models_need(source, expected):
    if "{{ x }}" in source and "bos_token" in source:
        assert render(source, x=7) == expected
    else:
        assert render(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}{{ raise_exception.__globals__ }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_reaches_nothing_outside(source):
    try:
        text = render(source)
    except RequestError:
        return
    assert "class" not in text and "root:" not in text


BOMBS = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loop over text": "{% for i in 'x' * 999999 %}{% for j in 'x' * 999999 %}{% endfor %}{% endfor %}",
    "range": "{{ range(10**12) | list | length }}",
    "product": "{{ 'x' * 10**10 }}",
    "product of lists": "{{ ([1] * 10**10) | length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": "{% set n = namespace(v=3) %}{% for i in range(99) %}{% set n.v = n.v * n.v %}{% endfor %}",
    "doubling by +": "{% set n=namespace(v='x') %}{% for i in range(99) %}{% set n.v=n.v+n.v %}{% endfor %}",
    "doubling by ~": "{% set n=namespace(v='x') %}{% for i in range(99) %}{% set n.v=n.v~n.v %}{% endfor %}",
    "doubling by set": (
        "{% set n = namespace(v='xx') %}{% for i in range(99) %}"
        "{% set v %}{{ n.v }}{{ n.v }}{% endset %}{% set n.v = v %}{% endfor %}"
    ),
    "doubling of lists": (
        "{% set n = namespace(v=[1]) %}"
        "{% for i in range(99) %}{% set n.v = [n.v, n.v] %}{% endfor %}{{ n.v }}"
    ),
    "padding": "{{ '%1000000000d' % 1 }}",
    "padding by argument": "{{ '%*d' % (10**9, 1) }}",
    "padding by format": "{{ '{:1000000000}'.format(1) }}",
    "padding by nested format": "{{ '{:{}}'.format(1, 10**9) }}",
    "padding by filter": "{{ '%1000000000d' | format(1) }}",
    "padding by method": "{{ 'x'.ljust(10**10) }}",
    "zeros": "{{ '1'.zfill(10**10) }}",
    "bytes": "{{ (1).to_bytes(10**10) }}",
    "tabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "replace": "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}",
    "replace by method": "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
    "join": "{{ range(100000) | join('x' * 100000) }}",
    "join of large": "{{ ['x' * 100000] * 100000 | join }}{{ (['x' * 100000] * 100000) | join }}",
    "join by method": "{{ ('x' * 100000).join(range(100000) | map('string')) }}",
    "text of nested": "{{ ([['x' * 100000] * 100000] | string) | length }}",
    "json of nested": "{{ [['x' * 100000] * 100000] | tojson }}",
    "json indent": "{{ [1] | tojson(indent=10**9) }}",
    "indent": "{{ ('\n' * 100000) | indent(100000, blank=true) }}",
    "digits": "{{ 1.5 | round(10**9, 'ceil') }}",
    "sum of lists": "{{ (range(20000) | map('string') | map('list') | sum(start=[])) | length }}",
    "macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loop": "{% for i in range(999) recursive %}{{ loop(range(999)) }}{% endfor %}",
    "long body": "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "long body in a macro": (
        "{% macro m() %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endmacro %}{{ m() }}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_costly_template_is_stopped_soon(name):
    # triggered by the request, so that loading is not what stops it
    template = ChatTemplate("{% if go %}" + BOMBS[name] + "{% endif %}", {})
    start = time.process_time()
    with pytest.raises(RequestError):
        template.render([USER], go=True)
    assert time.process_time() - start < 8
    assert template.render([USER]) == ""


def test_rendered_text_has_a_limit(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_RENDERED_CHARS", 1000)
    assert len(render("{{ messages[0].content }}", [{"role": "user", "content": "x" * 1000}])) == 1000
    with pytest.raises(RequestError, match="renders more than 1000 characters"):
        render("{{ messages[0].content }}", [{"role": "user", "content": "x" * 1001}])


def test_a_slow_template_is_stopped_by_the_clock(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_CPU_S", 0.0)
    with pytest.raises(RequestError, match="runs for more than"):
        ChatTemplate("{% if go %}{% for i in 'abc' %}{% endfor %}{% endif %}", {}).render([USER], go=True)


def test_a_long_conversation_is_not_too_costly(real):
    turns = [SYSTEM] + [USER, {"role": "assistant", "content": "word " * 200}] * 2000 + [USER]
    text = real[0].render(turns)
    assert text.count("word ") == 400_000
