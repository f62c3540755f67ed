"""A tiny served model whose template thinks and calls tools, as Qwen3's does."""

import dataclasses
import json

import msgspec

from crane.models.chat import ChatTemplate
from crane.runtime.types import State
from tests.api.harness import INFO, speak
from tests.tiny import special_id

EOS = special_id("<|im_end|>")
ROOMY = State("ready", info=msgspec.structs.replace(INFO, max_model_len=4096))
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}
{% endif %}Tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}
Call them in <tool_call></tool_call>.<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>{{ message.content }}</tool_response><|im_end|>
{% elif not (message.role == 'system' and loop.first) %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""


def thinking_model(model):
    """`model` with TEMPLATE as its template."""
    return dataclasses.replace(model, template=ChatTemplate(TEMPLATE, {}))


def says(model, text: str, **options):
    """A script in which every request is answered with `text` and the end of the turn."""
    options = {"eos": EOS, **options}
    return lambda request: speak(model.tokenizer, text, request, **options)


def prompt_text(model, request) -> str:
    """The prompt of an engine request, special tokens spelled out."""
    return model.tokenizer.decode(request.prompt_ids, skip_special_tokens=False)


def typed_events(response) -> list[tuple[str, dict]]:
    """(event, data) of a stream of typed events; the two must agree on the type."""
    events = []
    for part in response.body.decode().split("\n\n"):
        if not part or part.startswith(":"):
            continue
        name, data = part.split("\n")
        payload = json.loads(data.removeprefix("data: "))
        assert name == f"event: {payload['type']}"
        events.append((payload["type"], payload))
    return events
