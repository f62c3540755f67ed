"""Models that know tags for thinking and tools, and clients' eyes for their answers."""

import dataclasses
import json

import msgspec
import tokenizers

from crane.api.served import ServedModel
from crane.models.chat import ChatTemplate
from crane.runtime.settings import Settings
from crane.runtime.types import State
from tests.api.harness import INFO
from tests.tiny import NUM_TEXT_TOKENS, tiny_tokenizer

CHAT = "/v1/chat/completions"
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_calls>", "</tool_calls>")
FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
# a model with random weights may never get over the white space that JSON allows
NO_SPACES = {str(i): -100 for i in range(NUM_TEXT_TOKENS) if not tiny_tokenizer().decode([i]).strip()}
ROOMY = State("ready", info=msgspec.structs.replace(INFO, max_model_len=4096))
HI = [{"role": "user", "content": "Hi"}]

_TURNS = """\
{%- if tools %}T:{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '\\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content is defined %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}{{ OPEN }}
{{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}' }}{{ CLOSE }}
{%- endfor %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}ENDING{% endif %}"""
_THINK = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"


def template(*, tags="tool_call", ending="") -> ChatTemplate:
    """A chat template with tools in `tags`. ending: what follows the opened turn."""
    source = _TURNS.replace("{{ OPEN }}", f"<{tags}>").replace("{{ CLOSE }}", f"</{tags}>")
    return ChatTemplate(source.replace("ENDING", ending), {})


def talking(model: ServedModel, *, thinks=True, opens=False, **options) -> ServedModel:
    """`model` with tools, and with thinking. opens: its prompts begin the thinking section."""
    if opens:
        ending = "{{ '<think>\\n' }}{# </think> #}"
    else:
        ending = _THINK if thinks else ""
    made = template(ending=ending, **options)
    if not thinks:
        made = ChatTemplate(made.source.replace("<think>", "").replace("</think>", ""), {})
    return dataclasses.replace(model, template=made)


def with_special_tags(folder, tags) -> ServedModel:
    """The tiny model at `folder`, to whose tokenizer `tags` are added as special tokens."""
    path = str(folder / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.add_special_tokens(list(tags))
    tokenizer.save(path)
    return ServedModel.load(Settings(model_path=str(folder), model_name="org/tiny"))


def answer(response) -> dict:
    """The one choice of an answer, streamed or not, as if it had not been streamed."""
    if "event-stream" not in response.headers["content-type"]:
        (choice,) = response.json()["choices"]
        return choice
    message, calls, reason = {"role": "assistant", "content": ""}, {}, None
    *chunks, done = response.data()
    assert done == "[DONE]"
    for chunk in chunks:
        for choice in chunk["choices"]:
            reason = choice["finish_reason"] or reason
            delta = choice["delta"]
            for name in ("content", "reasoning_content", "reasoning"):
                if delta.get(name):
                    message[name] = message.get(name, "") + delta[name]
            for part in delta.get("tool_calls") or []:
                if "id" in part:
                    assert part["index"] == len(calls) and part["function"]["arguments"] == ""
                    calls[part["index"]] = {key: part[key] for key in ("id", "type", "function")}
                else:
                    assert set(part) == {"index", "function"}
                    calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    if calls:
        message["tool_calls"] = list(calls.values())
        message["content"] = message["content"] or None
    return {"message": message, "finish_reason": reason}


def called(choice: dict) -> list[tuple[str, dict]]:
    """(name, parsed arguments) of a choice's tool calls."""
    calls = [call["function"] for call in choice["message"].get("tool_calls", [])]
    return [(function["name"], json.loads(function["arguments"])) for function in calls]
