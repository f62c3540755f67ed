"""From the text of an answer to reasoning, content and tool calls, while it grows. Pure.

However the text is cut into pieces, the events say the same. What may be the beginning
of a tag is held back; tags themselves never come out.
"""

import functools
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from crane.api.served import ServedModel
from crane.models.chat import ChatTemplate
from crane.api.tool_text import JsonFollower, parameter_value, plain_arguments, read_head, whole_call

THINK, END_THINK = "<think>", "</think>"
_CLOSERS = {"<tool_call>": "</tool_call>", "<tool_calls>": "</tool_calls>", "<function=": "</tool_call>"}
CUT = ("length", "timeout")  # finish reasons of answers that are not whole
_ANSWER_TAGS = ("<answer>", "</answer>")
_STRAY = ("</tool_call>", "</tool_calls>")  # without the tag that opens: to be left out
MARKUP = (THINK, END_THINK, *_ANSWER_TAGS, *_CLOSERS, *_CLOSERS.values())
# around a call that a model writes without its tags, at the start of its answer
_WRAPPERS = {"```json": "```", "```": "```", "<tools>": "</tools>", "": ""}
_WRAPPED = re.compile(r"\s*(```(?:json)?|<tools>)?\s*")
_FUNCTION = re.compile(r"<function=([^<>\n]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>(.*?)</parameter>", re.DOTALL)


class Reasoning(NamedTuple):
    """Text of the thinking section."""

    text: str


class Content(NamedTuple):
    """Text of the answer."""

    text: str


class ToolStart(NamedTuple):
    """A tool call begins; `ToolArguments` of the same index follow."""

    index: int
    id: str
    name: str


class ToolArguments(NamedTuple):
    """A piece of a call's arguments; all pieces joined are the text of a JSON object."""

    index: int
    text: str


ChatEvent = Reasoning | Content | ToolStart | ToolArguments


@dataclass(frozen=True)
class ChatForm:
    """How a model marks up its answers, as its chat template shows.

    thinks: it knows <think>. answers: it wraps content into <answer>. takes_tools: its
    template shows tools. tools: the notation of its calls; "json" is the bare object.
    """

    thinks: bool = False
    answers: bool = False
    takes_tools: bool = False
    tools: Literal["hermes", "hunyuan", "xml", "json"] = "hermes"


def chat_form(model: ServedModel) -> ChatForm:
    """The form of a model's answers."""
    return _form_of(model.template)


@functools.lru_cache
def _form_of(template: ChatTemplate | None) -> ChatForm:
    source = "" if template is None else template.source + (template.tool_source or "")
    tools = "json"
    if "<tool_calls>" in source:
        tools = "hunyuan"
    elif "<function=" in source:
        tools = "xml"
    elif "<tool_call>" in source:
        tools = "hermes"
    return ChatForm(END_THINK in source, "<answer>" in source, "tools" in source, tools)


@dataclass
class Call:
    """One tool call. complete: its arguments came to an end."""

    index: int
    id: str
    name: str
    arguments: str = ""
    complete: bool = False


def new_call_id() -> str:
    """A tool call's id, unique in every conversation."""
    return "call_" + uuid.uuid4().hex[:24]


@dataclass
class ChatParser:
    """One choice's answer, read as it grows: `push` by `push`, then `finish`.

    tools: those that may be called, as {"function": {"name", "parameters"}}; without any, the
    answer is not searched for calls. thinking_open: the prompt ends inside the thinking section.
    parallel: whether more than one call is wanted; if not, `done` is set after the first, on
    which the caller may abort the request. reasoning, content, calls: all that came so far.
    verbatim: all further text is content as it is; it need not be pushed when its event is not wanted.
    """

    form: ChatForm
    tools: list[dict] | None = None
    thinking_open: bool = False
    parallel: bool = True
    new_id: Callable[[], str] = new_call_id
    thinking: bool = False
    done: bool = False
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self):
        functions = [tool["function"] for tool in self.tools or ()]
        self._schemas = {function["name"]: function.get("parameters") or {} for function in functions}
        self._marks: tuple[str, ...] = ()
        if functions:
            openers = tuple(_CLOSERS) if self.form.tools == "xml" else tuple(_CLOSERS)[:2]
            self._marks = (*openers, *_STRAY)
        if self.form.answers:
            self._marks += _ANSWER_TAGS
        self._buffer = ""
        self._last = self._cut = False  # no text will follow; because the answer was cut
        self._events: list[ChatEvent] = []
        self._parts: dict[type, list[str]] = {Reasoning: [], Content: []}
        self._strip = False  # white space that comes next is markup
        self._closer = ""  # the tag that ends the calls
        self._wrapper: str | None = None  # of a call without tags: what closes the text around it
        self._held = ""  # a call, or what may be one, as it was written
        self._json = JsonFollower()
        self._streams = False  # arguments are passed on as they come
        self._read = self._start
        self.verbatim = not (self._marks or self.thinking_open or self.form.thinks)
        if self.thinking_open:
            self._think()
        elif not self.form.thinks:
            self._to_content(strip=False)

    @property
    def reasoning(self) -> str:
        """All reasoning so far."""
        return "".join(self._parts[Reasoning])

    @property
    def content(self) -> str:
        """All content so far."""
        return "".join(self._parts[Content])

    def push(self, text: str) -> list[ChatEvent]:
        """The events that `text` completes."""
        if self.verbatim and text:
            self._parts[Content].append(text)
            return [Content(text)]
        self._buffer += text
        while self._buffer and not self.done and self._read():
            pass
        events, self._events = self._events, []
        return events

    def finish(self, finish_reason: str) -> tuple[list[ChatEvent], str]:
        """The last events, and the reason the answer ended for: "tool_calls" when it has calls,
        unless it was cut or fell apart inside one; that call stays incomplete."""
        self._last, self._cut = True, finish_reason in CUT
        while not self.done and self._read():
            pass
        events, self._events = self._events, []
        if self.done or (finish_reason == "stop" and self.calls and self.calls[-1].complete):
            finish_reason = "tool_calls"
        return events, finish_reason

    # The readers below take what they can from the buffer, and say whether there is more to do.

    def _start(self) -> bool:
        text = self._buffer.lstrip()
        if text.startswith(THINK):
            self._buffer = text[len(THINK) :]
            self._think()
        elif self._last or not THINK.startswith(text):
            self._to_content(strip=False)
        else:
            return False
        return True

    def _think(self) -> None:
        self.thinking = self._strip = True
        self._read = self._thought

    def _thought(self) -> bool:
        if self._give_until((END_THINK,), Reasoning, trim=True) is None:
            return False
        self.thinking = False
        self._to_content(strip=True)
        return True

    def _to_content(self, *, strip: bool) -> None:
        self._strip |= strip
        self._read = self._untagged if self._schemas else self._plain

    def _untagged(self) -> bool:
        """At the start of content, where a call may stand without its tags."""
        match = _WRAPPED.match(self._buffer)
        rest = self._buffer[match.end() :]
        if rest.startswith("{"):
            self._wrapper = _WRAPPERS[match[1] or ""]
            self._held, self._buffer = self._buffer[: match.end()], rest
            self._read = self._untagged_head
            return True
        begun = self._buffer.strip()
        if not self._last and any(w.startswith(begun) for w in _WRAPPERS):
            return False
        self._read = self._plain
        return True

    def _untagged_head(self) -> bool:
        head = read_head(self._buffer)
        known = head.name is None or head.name in self._schemas
        if head.state == "yes" and known and self._buffer[head.end :].strip():
            self._held = ""
            self._begin(head.name, head.end)
            return True
        if head.state != "no" and known and not self._last:
            return False
        self._buffer, self._held, self._wrapper = self._held + self._buffer, "", None
        self._read = self._plain
        return True

    def _plain(self) -> bool:
        if not self._marks and not self._strip:
            self.verbatim = True
        mark = self._give_until(self._marks, Content, trim=bool(self._marks))
        if mark is None:
            return False
        self._strip = True
        if mark in _CLOSERS:
            self._closer = _CLOSERS[mark]
            self._read = self._between
            if mark == "<function=":
                self._buffer = mark + self._buffer
        elif mark == "<answer>":
            self._to_content(strip=True)
        return True

    def _between(self) -> bool:
        """Inside the tags, before, between and after calls."""
        text = self._buffer = self._buffer.lstrip(" \t\r\n[],}")
        opener = self._closer.replace("/", "")
        if any(mark.startswith(text) and mark != text for mark in (self._closer, opener, "<function=")):
            return False
        if text[0] == "{":
            self._read = self._head
        elif text.startswith("<function="):
            self._read = self._function
        elif text.startswith(self._closer):
            self._buffer = text[len(self._closer) :]
            self._to_content(strip=True)
        elif text.startswith(opener):
            self._buffer = text[len(opener) :]  # the last one was not closed
        else:
            self._read = self._plain  # no call is content
        return True

    def _head(self) -> bool:
        head = read_head(self._buffer)
        if head.state == "yes" and self._buffer[head.end :].strip():
            self._begin(head.name, head.end)
        elif head.state == "no":
            self._json = JsonFollower()
            self._read = self._whole
        else:
            return False
        return True

    def _whole(self) -> bool:
        """A call whose name does not come first."""
        text, num_read, ended = self._json.feed(self._buffer)
        self._held, self._buffer = self._held + text, self._buffer[num_read:]
        if not ended:
            return False
        call = whole_call(self._held)
        if call is None:
            self._emit(Content(self._held))
        else:
            self._open_call(call[0])
            self._add_arguments(call[1])
            self.calls[-1].complete = True
        self._held = ""
        self._after_call()
        return True

    def _begin(self, name: str, end: int) -> None:
        self._open_call(name)
        self._buffer = self._buffer[end:].lstrip()
        self._streams = self._buffer[0] == "{"
        self._json = JsonFollower()
        self._read = self._arguments

    def _arguments(self) -> bool:
        text, num_read, ended = self._json.feed(self._buffer)
        self._buffer = self._buffer[num_read:]
        if self._streams:
            self._add_arguments(text)
        else:
            self._held += text
        if not ended:
            return False
        if not self._streams:
            self._add_arguments(plain_arguments(self._held))
            self._held = ""
        self.calls[-1].complete = True
        self._json = JsonFollower(depth=1)
        self._read = self._tail
        return True

    def _tail(self) -> bool:
        """After the arguments, up to the end of the call's object, or of the tags around it."""
        text = self._buffer.lstrip()
        if self._wrapper is None and not self._json.in_string and self._closer.startswith(text[: len(self._closer)]):
            if len(text) < len(self._closer):
                return False
            self._after_call()
            return True
        next_tag = self._buffer.find("<", 1)  # read no further than where one may be
        _, num_read, ended = self._json.feed(self._buffer if next_tag < 0 else self._buffer[:next_tag])
        self._buffer = self._buffer[num_read:]
        if ended:
            self._after_call()
        return ended or bool(self._buffer)

    def _after_call(self) -> None:
        if not self.parallel and self.calls:
            self.done = True
        self._read = self._between if self._wrapper is None else self._unwrap

    def _unwrap(self) -> bool:
        """After a call without tags: another, or what closes the text around it, or content."""
        text, wrapper = self._buffer.lstrip(" \t\r\n,"), self._wrapper
        if not self._last and (not text or (wrapper.startswith(text) and text != wrapper)):
            return False
        if text.startswith("{"):
            self._buffer, self._held = text, ""
            self._read = self._untagged_head
            return True
        self._buffer = text.removeprefix(wrapper)
        self._wrapper = None
        self._to_content(strip=True)
        return True

    def _function(self) -> bool:
        match = _FUNCTION.match(self._buffer)
        if match is None:
            if "\n" in self._buffer or ">" in self._buffer or self._buffer.count("<") > 1:
                self._emit(Content(self._buffer[: len("<function=")]))
                self._buffer = self._buffer[len("<function=") :]
                self._read = self._plain
                return True
            return False
        self._open_call(match[1].strip())
        self._add_arguments("{")
        self._buffer = self._buffer[match.end() :]
        self._read = self._parameters
        return True

    def _parameters(self) -> bool:
        call = self.calls[-1]
        match = _PARAMETER.match(self._buffer)
        if match is not None:
            key = match[1].strip()
            value = parameter_value(match[2], self._schemas.get(call.name, {}), key)
            comma = ", " if call.arguments != "{" else ""
            self._add_arguments(f"{comma}{parameter_value(key, {}, '')}: {value}")
            self._buffer = self._buffer[match.end() :]
            return True
        text = self._buffer.lstrip()
        for end in ("</function>", self._closer):
            if text.startswith(end):
                self._buffer = text[len(end) :] if end == "</function>" else text
                self._add_arguments("}")
                call.complete = True
                self._after_call()
                return True
        return False

    def _open_call(self, name: str) -> None:
        call = Call(len(self.calls), self.new_id(), name)
        self.calls.append(call)
        self._events.append(ToolStart(call.index, call.id, name))

    def _add_arguments(self, text: str) -> None:
        if text:
            self.calls[-1].arguments += text
            self._emit(ToolArguments(self.calls[-1].index, text))

    def _give_until(self, marks: tuple[str, ...], kind: type, *, trim: bool) -> str | None:
        """Gives out text up to the first of `marks`, which it takes and returns; when there is
        none, all but what may begin one. trim: white space next to marks is part of them."""
        text = self._buffer
        if self._strip:
            text = text.lstrip()
            self._strip = not text
        found = [(at, mark) for mark in marks if (at := text.find(mark)) >= 0]
        if found:
            at, mark = min(found)
            self._emit(kind(text[:at].rstrip() if trim else text[:at]))
            self._buffer = text[at + len(mark) :]
            return mark
        end = len(text)
        opened = text.rfind("<") if marks else -1
        is_begun = opened >= 0 and any(mark.startswith(text[opened:]) for mark in marks)
        if is_begun and (not self._last or (self._cut and len(text) - opened > 1)):
            end = opened  # held back, and not given out either when the answer was cut inside a tag
        if trim and (not self._last or kind is Reasoning or self.calls):
            end = len(text[:end].rstrip())
        self._emit(kind(text[:end]))
        self._buffer = "" if self._last else text[end:]
        return None

    def _emit(self, event: ChatEvent) -> None:
        """Adds an event, to the last one where that is of the same kind."""
        if not event.text:
            return
        if not isinstance(event, ToolArguments):
            self._parts[type(event)].append(event.text)
        last = self._events[-1] if self._events else None
        if type(last) is type(event) and last[:-1] == event[:-1]:
            self._events[-1] = event._replace(text=last.text + event.text)
        else:
            self._events.append(event)
