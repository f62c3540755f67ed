"""The jinja2 sandbox that chat templates run in: no code, and a bound on cost.

jinja2's immutable sandbox stops a template from reaching Python; it does not stop
one from taking minutes or gigabytes. Here every loop turn, call, join, product and
output is charged to the budget of its rendering, before the memory is spent.
Filters and globals that no chat template needs, and whose cost is hard to bound,
are left out: a template that uses one does not compile. Torch-free.
"""

import datetime
import json
import re
import time

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDERED_CHARS = 16 << 20
MAX_WORK = 64 << 20  # in characters made; a loop turn counts as _TURN of them, a call as two turns
MAX_CPU_S = 10.0
_TURN = 128
_NODE = 64
_MAX_NUMBER = 1_000_000  # argument of a built-in method: widths, counts
_MAX_BITS = 4096
_WIDE = re.compile(r"\d{7}|\*")
_BUDGET = "crane_budget"  # its name in the context of a rendering
_REMOVED_FILTERS = (
    "batch center filesizeformat forceescape pprint random slice striptags urlize wordwrap xmlattr".split()
)


class TemplateCost(jinja2.TemplateRuntimeError):
    """A rendering that costs more than it may."""


class Budget:
    """What one rendering may still spend."""

    def __init__(self):
        self._left = MAX_WORK
        self._deadline = time.thread_time() + MAX_CPU_S

    def charge(self, amount: int) -> None:
        self._left -= amount
        if self._left < 0:
            raise TemplateCost(f"the chat template makes more than {MAX_WORK} characters of text")

    def turn(self, amount: int = 0) -> None:
        self.charge(_TURN + amount)
        if time.thread_time() > self._deadline:
            raise TemplateCost(f"the chat template runs for more than {MAX_CPU_S:g} s")

    def measure(self, value: object) -> None:
        """Charges for the text of a value, whatever strings are nested in it, however often."""
        pending = [value]
        while pending:
            value = pending.pop()
            if isinstance(value, str):
                self.charge(len(value) + 2)
                continue
            self.charge(_NODE)
            if isinstance(value, dict):
                pending.extend(value.keys())
                pending.extend(value.values())
            elif isinstance(value, (list, tuple, set, frozenset)):
                pending.extend(value)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """jinja2 as chat templates expect it, sandboxed and metered. Use through `render`."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=False,
            extensions=[loopcontrols, GenerationTag],
            finalize=_finalize,
        )
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        plain = {"join": _join, "replace": _replace, "format": _format, "round": _round, "indent": _indent}
        self.filters.update(plain, sum=_sum, tojson=_tojson, string=_string)
        self.filters.update(crane_metered=_metered, crane_concat=_concat)
        self.globals = {
            "range": range,
            "dict": dict,
            "namespace": self.globals["namespace"],
            "cycler": self.globals["cycler"],
            "joiner": self.globals["joiner"],
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def render(self, template: jinja2.Template, values: dict) -> str:
        """The template's output. Raises what the template raises, TemplateCost included."""
        context = template.new_context({**self.globals, **values, _BUDGET: Budget()}, shared=True)
        parts, num_chars = [], 0
        for part in template.root_render_func(context):
            num_chars += len(part)
            if num_chars > MAX_RENDERED_CHARS:
                raise TemplateCost(f"the chat template renders more than {MAX_RENDERED_CHARS} characters")
            parts.append(part)
        return "".join(parts)

    def _parse(self, source, name, filename):
        return _Metering().visit(super()._parse(source, name, filename))

    def call_binop(self, context, operator, left, right):
        budget = context.parent[_BUDGET]
        if operator == "+" and type(left) is type(right) is str:  # what templates do most
            budget.charge(len(left) + len(right))
            return left + right
        if operator == "*":
            _check_product(budget, left, right)
        elif operator == "**":
            if not all(isinstance(side, (int, float)) for side in (left, right)) or abs(right) > _MAX_BITS:
                raise TemplateCost("the chat template raises to too high a power")
            if isinstance(left, int) and left.bit_length() * abs(right) > _MAX_BITS:
                raise TemplateCost("the chat template raises to too high a power")
        elif operator == "%" and isinstance(left, (str, bytes)):
            _check_format(budget, left, right)
        elif operator == "+" and not isinstance(left, (int, float)):
            budget.charge(_length(left) + _length(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context, obj, /, *args, **kwargs):
        budget = context.parent[_BUDGET]
        budget.turn(_TURN)
        if isinstance(obj, LoopContext):
            args = (_metered(context, args[0]), *args[1:])  # a recursive loop
        elif obj is range:
            budget.charge(len(range(*args)))
        elif not isinstance(obj, Macro):
            method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
            if getattr(method, "__name__", "") == "join" and len(args) == 1:
                args = ([*args[0]],)  # measured as a list, then joined
            _check_call(budget, method, (*args, *kwargs.values()))
        return super().call(context, obj, *args, **kwargs)


class GenerationTag(Extension):
    """{% generation %} marks the assistant's part for training; here only its body counts."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metering(jinja2.visitor.NodeTransformer):
    """Puts a meter on what the sandbox gives no hook for: loops and the `~` operator."""

    def visit_For(self, node):
        node = self.generic_visit(node)
        size = sum(len(data.data) for part in node.body for data in part.find_all(nodes.TemplateData))
        size += sum(len(data.data) for data in node.body if isinstance(data, nodes.TemplateData))
        node.iter = _filtered(node.iter, "crane_metered", nodes.Const(size))
        return node

    def visit_Concat(self, node):
        node = self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "crane_concat")


def _filtered(node, name, *args):
    filtered = nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)
    return filtered.set_environment(node.environment)


@jinja2.pass_context
def _metered(context, items, size=0):
    budget = context.parent[_BUDGET]
    for item in items:
        budget.turn(size)
        yield item


@jinja2.pass_context
def _concat(context, items):
    context.parent[_BUDGET].measure(items)
    return "".join(map(str, items))


@jinja2.pass_context
def _finalize(context, value):
    context.parent[_BUDGET].measure(value)
    return value


@jinja2.pass_context
def _string(context, value):
    context.parent[_BUDGET].measure(value)
    return str(value)


@jinja2.pass_context
def _join(context, value, d="", attribute=None):
    items = list(value)
    if attribute is not None:
        items = [context.environment.getitem(item, attribute) for item in items]
    budget = context.parent[_BUDGET]
    budget.measure(items)
    budget.charge(len(str(d)) * len(items))
    return str(d).join(map(str, items))


@jinja2.pass_context
def _sum(context, iterable, attribute=None, start=0):
    budget = context.parent[_BUDGET]
    total = start
    for item in iterable:
        budget.charge(1 + _length(total))  # a sum of lists copies them
        total = total + (item if attribute is None else context.environment.getitem(item, attribute))
    return total


@jinja2.pass_context
def _replace(context, s, old, new, count=-1):
    text, old, new = str(s), str(old), str(new)
    _check_replace(context.parent[_BUDGET], text, old, new)
    return text.replace(old, new, -1 if count is None else count)


@jinja2.pass_context
def _format(context, value, *args, **kwargs):
    _check_format(context.parent[_BUDGET], str(value), kwargs or args)
    return str(value) % (kwargs or args)


@jinja2.pass_context
def _round(context, value, precision=0, method="common"):
    if not isinstance(precision, int) or abs(precision) > 30:
        raise TemplateCost("round: expected a precision of at most 30 digits")
    return jinja2.filters.do_round(value, precision, method)


@jinja2.pass_context
def _indent(context, s, width=4, first=False, blank=False):
    text = str(s)
    size = width if isinstance(width, int) else len(width)
    context.parent[_BUDGET].charge(len(text) + max(size, 0) * (text.count("\n") + 1))
    return jinja2.filters.do_indent(text, width, first, blank)


@jinja2.pass_context
def _tojson(context, value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON for a model to read: nothing is escaped for HTML."""
    if indent is not None and not (isinstance(indent, int) and indent <= 16 or isinstance(indent, str)):
        raise TemplateCost("tojson: expected an indent of at most 16")
    budget = context.parent[_BUDGET]
    budget.measure(value)
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    budget.charge(len(text))
    return text


def _raise_exception(message):
    raise jinja2.TemplateError(str(message))


def _strftime_now(format):
    return datetime.datetime.now().strftime(format)


def _length(value: object) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _check_product(budget: Budget, left, right) -> None:
    for sequence, times in ((left, right), (right, left)):
        if hasattr(sequence, "__len__") and isinstance(times, int):
            budget.charge(len(sequence) * max(times, 0))
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > _MAX_BITS:
            raise TemplateCost("the chat template multiplies too large numbers")


def _check_format(budget: Budget, text, args) -> None:
    if _WIDE.search(text if isinstance(text, str) else text.decode("latin-1")):
        raise TemplateCost("the chat template formats to too great a width")
    budget.measure(args if not isinstance(args, dict) else list(args.values()))
    budget.charge(len(text))
    for width in re.findall(r"\d+", text if isinstance(text, str) else ""):
        budget.charge(int(width))


def _check_replace(budget: Budget, text: str, old: str, new: str) -> None:
    budget.charge(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _check_call(budget: Budget, function, args: tuple) -> None:
    """Bounds what a method of a built-in type makes from its arguments."""
    for arg in args:
        if isinstance(arg, int) and abs(arg) > _MAX_NUMBER:
            raise TemplateCost(f"the chat template calls a method with a number over {_MAX_NUMBER}")
        if isinstance(arg, int) and not isinstance(arg, bool):
            budget.charge(abs(arg))
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if not isinstance(owner, (str, bytes)):
        return
    budget.charge(len(owner))
    if name == "replace" and len(args) >= 2 and all(isinstance(arg, str) for arg in args[:2]):
        _check_replace(budget, owner, args[0], args[1])
    elif name in ("format", "format_map"):
        _check_format(budget, owner, args)
    elif name == "join" and args:
        budget.measure(args[0])
        budget.charge(len(owner) * len(args[0]))
    elif name == "expandtabs":
        budget.charge(owner.count("\t") * (args[0] if args and isinstance(args[0], int) else 8))
    elif name == "translate":
        raise TemplateCost("the chat template calls translate, which is not offered")
