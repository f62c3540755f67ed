"""Chat templates: messages in, the prompt's text out, as the model was trained to read it.

The text already has the BOS token where the template writes one, so it is encoded
with add_special_tokens=False. Torch-free.
"""

import json
import logging
from collections.abc import Iterable, Mapping

import jinja2

from crane.errors import ModelError, RequestError
from crane.models.files import Checkpoint
from crane.models.sandbox import TemplateCost, TemplateEnvironment
from crane.models.tokenizer import CONFIG_NAME, Tokenizer

log = logging.getLogger(__name__)

_FAILURES = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, NameError)
_FAILURES += (RecursionError, MemoryError)
_END = "\ue000crane-end\ue000"  # the last one in a text is ours, whatever the messages hold
_OWN_ARGUMENTS = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message"})

# What a Hunyuan checkpoint without a template means, by the tokens that it has.
_HUNYUAN_DENSE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {{- message.content + '<｜hy_place▁holder▁no▁3｜>' }}
    {%- elif message.role == 'user' %}
        {{- '<｜hy_User｜>' + message.content }}
    {%- elif message.role == 'assistant' %}
        {{- '<｜hy_Assistant｜>' + message.content + '<｜hy_place▁holder▁no▁2｜>' }}
    {%- else %}
        {{- raise_exception('this model takes no message of role ' + message.role + ' here') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜hy_Assistant｜>' }}{%- endif %}
{%- if tools %}{{- raise_exception('this model has no template for tools') }}{%- endif %}
"""
_HUNYUAN_LARGE = """\
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {{- '<|startoftext|>' + message.content + '<|extra_4|>' }}
    {%- elif message.role == 'user' %}
        {%- if not (loop.index0 == 1 and messages[0].role == 'system') %}{{- '<|startoftext|>' }}{%- endif %}
        {{- message.content + '<|extra_0|>' }}
    {%- elif message.role == 'assistant' %}
        {{- message.content + '<|eos|>' }}
    {%- else %}
        {{- raise_exception('this model takes no message of role ' + message.role + ' here') }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{- raise_exception('this model has no template for tools') }}{%- endif %}
"""


class ChatTemplate:
    """A model's chat template, compiled. Safe to share between threads.

    source: the template. tool_source: another one for requests with tools, or None.
    special_tokens: {"bos_token": text, ...}, names that the template may use.
    Raises jinja2.TemplateError when a source does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], tool_source: str | None = None):
        self.source = source
        self.tool_source = tool_source
        self._environment = TemplateEnvironment()
        self._template = self._tool_template = self._environment.from_string(source)
        if tool_source is not None:
            self._tool_template = self._environment.from_string(tool_source)
        self._special_tokens = dict(special_tokens)
        self._reserved = _OWN_ARGUMENTS.union(self._special_tokens, self._environment.globals)
        self._wants_parts = self._needs_parts()

    def render(
        self,
        messages: list[dict],
        /,
        *,
        tools: list[dict] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        **kwargs,
    ) -> str:
        """The prompt's text.

        add_generation_prompt: open the assistant's turn; by default, unless the final
        message is continued, which leaves that message's turn open instead.
        kwargs: further names for the template. Raises RequestError(field="messages") with
        the template's own message, and one naming any other argument that is at fault.
        """
        self.check_kwargs(kwargs)
        if add_generation_prompt and continue_final_message:
            message = "continue_final_message: cannot be combined with add_generation_prompt"
            raise RequestError(message, field="continue_final_message")
        messages = [_normalise(message, i, self._wants_parts) for i, message in enumerate(messages)]
        if continue_final_message:
            _mark_end(messages)
        opens_turn = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        values = {**kwargs, "messages": messages, "tools": tools or None, "add_generation_prompt": opens_turn}
        text = self._render(self._tool_template if tools else self._template, values)
        if not continue_final_message:
            return text
        end = text.rfind(_END)
        if end < 0:
            message = "continue_final_message: the chat template does not show the final message's content"
            raise RequestError(message, field="continue_final_message")
        return text[:end]

    def check_kwargs(self, kwargs: Mapping[str, object]) -> None:
        """Raises RequestError(field="chat_template_kwargs") for a name that is the template's own."""
        for name in kwargs:
            if name in self._reserved or name.startswith(("crane_", "_")):
                message = f"chat_template_kwargs: {name!r} may not be set here"
                raise RequestError(message, field="chat_template_kwargs", code="invalid_value")

    def _render(self, template: jinja2.Template, values: dict) -> str:
        try:
            return self._environment.render(template, {**self._special_tokens, **values})
        except _FAILURES as error:
            raise RequestError(_reason(error), field="messages") from None

    def _needs_parts(self) -> bool:
        """Whether the template shows a list of text parts, but not a plain string.

        Trying it out is also the dry run: a template that costs too much fails at load.
        """
        probe = "crane-probe"
        shown = []
        for content in (probe, [{"type": "text", "text": probe}]):
            values = {"messages": [{"role": "user", "content": content}], "add_generation_prompt": True}
            try:
                shown.append(self._environment.render(self._template, {**self._special_tokens, **values}))
            except TemplateCost:
                raise
            except _FAILURES:
                shown.append("")  # it refuses this shape, or a lone user message
        as_parts = probe in shown[1] and "'type'" not in shown[1] and '"type"' not in shown[1]
        return as_parts and probe not in shown[0]


def load_chat_template(checkpoint: Checkpoint, tokenizer: Tokenizer, model_type: str) -> ChatTemplate | None:
    """The checkpoint's template; None when it has none. Raises ModelError when it does not compile.

    Sought in chat_template.jinja, tokenizer_config.json, GGUF metadata; Hunyuan has a fallback.
    """
    sources, place = _sources(checkpoint)
    if not sources and model_type == "hunyuan":
        sources, place = _hunyuan(tokenizer), "the fallback for hunyuan"
        if sources:
            log.warning("%s: has no chat template; using Hunyuan's usual form", checkpoint.path)
    default = sources.get("default") or sources.get("tool_use")
    if default is None:
        if sources:
            log.warning("%s: %s has no default, only %s", checkpoint.path, place, sorted(sources))
        return None
    try:
        return ChatTemplate(default, tokenizer.special_tokens, sources.get("tool_use"))
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"{checkpoint.path}: {place} line {error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, RecursionError) as error:
        raise ModelError(f"{checkpoint.path}: {place}: {_reason(error)}") from None


def _sources(checkpoint: Checkpoint) -> tuple[dict[str, str], str]:
    """{"default": source, "tool_use": source} as far as present, and where they stand."""
    if checkpoint.format == "gguf":
        key = "tokenizer.chat_template"
        metadata = checkpoint.metadata
        found = {"default": metadata.get(key), "tool_use": metadata.get(f"{key}.tool_use")}
        return {name: source for name, source in found.items() if isinstance(source, str)}, key
    text = checkpoint.read_text("chat_template.jinja")
    if text is not None:
        return {"default": text}, "chat_template.jinja"
    value = (checkpoint.read_json(CONFIG_NAME) or {}).get("chat_template")
    place = f"{CONFIG_NAME} chat_template"
    if value is None:
        return {}, place
    if isinstance(value, str):
        return {"default": value}, place
    try:
        return {entry["name"]: str(entry["template"]) for entry in value}, place
    except (TypeError, KeyError):
        reason = f"{place} must be a string or a list of name and template"
        raise ModelError(f"{checkpoint.path}: {reason}") from None


def _hunyuan(tokenizer: Tokenizer) -> dict[str, str]:
    if tokenizer.token_to_id("<｜hy_User｜>") is not None:
        return {"default": _HUNYUAN_DENSE}
    if tokenizer.token_to_id("<|extra_0|>") is not None:
        return {"default": _HUNYUAN_LARGE}
    return {}


def _reason(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateError) and error.message:
        return error.message
    return f"the chat template failed: {type(error).__name__}: {error}"


def _normalise(message: dict, i: int, wants_parts: bool) -> dict:
    """One message as templates expect it: text content, tool-call arguments as objects."""
    message = dict(message)
    content = message.get("content")
    if content is None:
        content = ""
    if isinstance(content, list):
        texts = list(_texts(content, f"messages[{i}].content"))
        content = "\n".join(texts)
    elif not isinstance(content, str):
        raise _wrong(f"messages[{i}].content", "a string or a list of parts", content)
    message["content"] = [{"type": "text", "text": content}] if wants_parts else content
    if message.get("tool_calls"):
        message["tool_calls"] = [
            _tool_call(call, f"messages[{i}].tool_calls[{j}]") for j, call in enumerate(message["tool_calls"])
        ]
    return message


def _texts(parts: list, where: str) -> Iterable[str]:
    for j, part in enumerate(parts):
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            yield part["text"]
        else:
            kind = part.get("type") if isinstance(part, dict) else part
            raise _wrong(f"{where}[{j}]", "a part of type text, the only one that this model takes", kind)


def _tool_call(call: dict, where: str) -> dict:
    """With arguments as an object: templates write them out as JSON themselves."""
    if not isinstance(call, dict):
        raise _wrong(where, "an object", call)
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    where = f"{where}.function.arguments"
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        raise _wrong(where, "a JSON object", function["arguments"]) from None
    if not isinstance(arguments, dict):
        raise _wrong(where, "a JSON object", function["arguments"])
    return {**call, "function": {**function, "arguments": arguments}}


def _mark_end(messages: list[dict]) -> None:
    """Puts a mark after the final message's content, to find its end in the rendered text."""
    final = messages[-1] if messages else {}
    content = final.get("content")
    text = content[0]["text"] if isinstance(content, list) else content
    if not text:
        message = "continue_final_message: the final message has no content to continue"
        raise RequestError(message, field="continue_final_message")
    final["content"] = [{"type": "text", "text": text + _END}] if isinstance(content, list) else text + _END


def _wrong(where: str, expected: str, got: object) -> RequestError:
    shown = repr(got)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return RequestError(f"{where}: expected {expected}, got {shown}", field="messages", code="invalid_value")
