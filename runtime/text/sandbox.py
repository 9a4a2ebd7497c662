"""An untrusted jinja2 template and its variables → text, within limits of time, memory and output.

jinja2's immutable sandbox keeps a template away from the interpreter; it does not keep it from running for
ever or from filling the memory. Here every operation that could do either reports to a `Meter` first: loops,
macros, operators, comparisons, filters, tests, calls, slices, joins and output. One operation is bounded by
the weight of its operands, so none takes long by itself, and between operations the thread's processor time
is looked at. That needs no signal, no second thread and no second process.

    {% for i in range(100000) %}…    counted at each turn
    'a' * 1000000000                 refused before it is computed
    [x, x] sixty levels deep         refused where it would be compared, printed or hashed: 2**60 items
"""

import json
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import cache, wraps
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace, pass_context

from mistral_trt.runtime.text.template_instrumentation import MADE, OPERAND, PRINTED, TURN, Instrumentation
from mistral_trt.runtime.text.template_meter import (
    FILTER_COSTS,
    LAZY_FILTERS,
    PASSING_FILTERS,
    TEST_COSTS,
    Cost,
    LimitError,
    Meter,
    binop_cost,
    dict_cost,
    format_cost,
    json_cost,
    method_cost,
    square,
)

MAX_SOURCE_CHARACTERS = 1 << 16
"""Of a template; the longest in use have half of that."""

MAX_NODES = 10_000
"""Statements and operations of a template: compiling takes time by their number."""

MAX_OUTPUT_CHARACTERS = 1 << 20
"""Of a rendering, and 4 for each character that it is given."""

_METER: ContextVar[Meter] = ContextVar("meter")


class Sandbox:
    """A compiled template. Any thread may render it."""

    def __init__(self, source: str) -> None:
        """Raises LimitError, jinja2.TemplateError or what else a compiler raises for a bad source."""
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise LimitError(f"it has {len(source)} characters, over {MAX_SOURCE_CHARACTERS}")
        environment = _environment()
        tree = environment.parse(source)
        if sum(1 for _ in tree.find_all(nodes.Node)) > MAX_NODES:
            raise LimitError(f"it has over {MAX_NODES} statements and operations")
        self._template = environment.from_string(Instrumentation().visit(tree))

    def render(self, variables: Mapping[str, Any], *, characters: int, now: datetime) -> str:
        """The text. Raises LimitError, and whatever else a program may raise.

        characters: how many the variables hold; the limits grow with them.  now: what strftime_now tells.
        """
        token = _METER.set(Meter(characters, now))
        try:
            context = self._template.new_context(dict(variables))
            limit = length = MAX_OUTPUT_CHARACTERS + 4 * characters
            parts = []
            for part in self._template.root_render_func(context):
                length -= len(part)
                if length < 0:
                    raise LimitError(f"it wrote over {limit} characters")
                parts.append(part)
            return "".join(parts)
        finally:
            _METER.reset(token)


# Where the operations report


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, metered."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=_finalize,
            optimized=False,  # constants would be folded while compiling, unmetered
        )
        self.concat = _concat  # type: ignore[method-assign]
        given = {**self.filters, "tojson": _tojson}
        reports = {
            TURN: lambda count: _METER.get().allot(count),
            OPERAND: lambda value: _METER.get().operand(value),
            PRINTED: lambda value: _METER.get().printed(value),
            MADE: lambda value: _METER.get().made(value),
        }
        self.filters = {**{name: _filter(name, function) for name, function in given.items()}, **reports}
        tests: dict[str, Any] = self.tests
        tests |= {name: _metered(tests[name], cost) for name, cost in TEST_COSTS.items()}
        self.globals = {
            "range": self.globals["range"],
            "namespace": _Namespace,
            "dict": _dict,
            "cycler": Cycler,
            "joiner": Joiner,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        binop_cost(_METER.get(), operator, left, right)
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, _METER.get().operand(argument))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatter = super().wrap_str_format(value)
        return None if formatter is None else _Format(value.__self__, formatter)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template may call: its own macros, the globals, and methods of plain values."""
        meter = _METER.get()
        meter.work()
        owner = getattr(obj, "__self__", None) if isinstance(obj, BuiltinMethodType | MethodType) else None
        if isinstance(owner, str | bytes | int | float | list | tuple | dict):
            args = tuple(meter.listed(arg) for arg in args)
            named = [
                value for name, value in kwargs.items() if not name.startswith("_")
            ]  # the rest is jinja's
            method_cost(meter, owner, obj.__name__, *args, *named)
            result = super().call(context, obj, *args, **kwargs)
            return result if obj.__name__ == "get" else meter.made(result)
        if isinstance(owner, Cycler | LoopContext | _Generation):
            meter.operand(args)
        elif not self._is_callable(obj):
            raise SecurityError(f"a template must not call {type(obj).__name__!r} objects")
        return super().call(context, obj, *args, **kwargs)

    def _is_callable(self, obj: Any) -> bool:
        known = Macro | LoopContext | BlockReference | Joiner | _Format | jinja2.Undefined
        return isinstance(obj, known) or any(obj is function for function in self.globals.values())


class _Format:
    """`text.format`, as the sandbox has made it safe."""

    def __init__(self, text: str, formatter: Callable[..., str]) -> None:
        self._text, self._formatter = text, formatter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        format_cost(meter, self._text, *args, *kwargs.values())
        return meter.made(self._formatter(*args, **kwargs))


def _metered(function: Callable[..., Any], cost: Cost, *, lazy: bool = False) -> Callable[..., Any]:
    """A filter or test that reports before it runs. lazy: it takes items as they come."""
    given = 1 if hasattr(function, "jinja_pass_arg") else 0  # jinja's own first argument

    @wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        meter.work()
        if not lazy:
            args = tuple(meter.listed(arg) for arg in args)
        cost(meter, *args[given:], *kwargs.values())
        return function(*args, **kwargs)

    return metered


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    metered = _metered(function, FILTER_COSTS.get(name, square), lazy=name in LAZY_FILTERS)
    if name in PASSING_FILTERS:
        return metered

    @wraps(metered)
    def counted(*args: Any, **kwargs: Any) -> Any:
        return _METER.get().made(metered(*args, **kwargs))

    return counted


def _concat(parts: Iterable[str]) -> str:
    """What a macro or a block has written, as one text."""
    parts = list(parts)
    _METER.get().allot(4 * sum(map(len, parts)))
    return "".join(parts)


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    return _METER.get().printed(value)


# What transformers gives to templates


class _Generation(Extension):
    """{% generation %}…{% endgeneration %}, which marks answers for training: just its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

    def content(self, caller: Macro) -> str:
        return caller()


class _Namespace(Namespace):
    """jinja2's, without names that start with an underscore, which Python may take for its own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        dict_cost(_METER.get(), *rest)
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace must not have an attribute {name!r}")


def _dict(*args: Any, **kwargs: Any) -> Any:
    meter = _METER.get()
    values = [meter.listed(arg) for arg in args]
    dict_cost(meter, *values)
    return meter.made(dict(*values, **kwargs))


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(_METER.get().printed(message)))


def _strftime_now(form: str) -> str:
    meter = _METER.get()
    square(meter, form)
    return meter.now.strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja2's own filter escapes HTML."""
    json_cost(_METER.get(), value, indent, separators)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@cache
def _environment() -> _Environment:
    return _Environment()
