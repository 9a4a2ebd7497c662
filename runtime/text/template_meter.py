"""An operation of a chat template and its operands → counted, or refused before it is done.

Two things are counted: bytes of what is made, and effort, after some of which the processor time of this
thread is looked at. The weight of a value is its size with all that it holds, shared parts counted each time
they occur, as comparing, printing or hashing the value would meet them.
"""

import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from datetime import datetime
from time import thread_time
from types import GeneratorType
from typing import Any

from jinja2.utils import Namespace

PROCESSOR_S = 0.5
"""Of one rendering; by the clock it may be longer where threads compete."""

MADE_BYTES = 1 << 26
"""All that one rendering may make, kept or not; and 64 for each character that it is given."""

MAX_WEIGHT = 1 << 18
"""Of one operand; and 4 for each character given."""

MAX_PRODUCT = 1 << 24
"""Of the weights of all operands, where the work may grow with it."""

MAX_INTEGER_BITS = 4096

_EFFORT_BETWEEN_LOOKS = 500

Cost = Callable[..., None]
"""cost(meter, *operands): raises LimitError if the operation is too much."""


class LimitError(Exception):
    """A template asked for more than a rendering may cost."""


class Meter:
    """What one rendering has spent. now: the time that all of it sees."""

    def __init__(self, characters: int, now: datetime) -> None:
        """characters: how many the rendering is given; the limits grow with them."""
        self.now = now
        self._bytes_left = MADE_BYTES + 64 * characters
        self._max_weight = MAX_WEIGHT + 4 * characters
        self._deadline = thread_time() + PROCESSOR_S
        self._effort = 0

    def work(self, effort: int = 1) -> None:
        self._effort += effort
        if self._effort > _EFFORT_BETWEEN_LOOKS:
            self._effort = 0
            if thread_time() > self._deadline:
                raise LimitError(f"it took over {PROCESSOR_S:g} s of processor time")

    def require(self, count: int) -> None:
        """Refuse what would make `count` bytes that are not left."""
        if count > self._bytes_left:
            raise LimitError(f"it made over {MADE_BYTES >> 20} MB of text and lists")

    def allot(self, count: int) -> None:
        """Count `count` bytes."""
        self.require(count)
        self._bytes_left -= count
        self.work(1 + (count >> 10))

    def made(self, value: Any) -> Any:
        """Count a new value and give it back; what comes item by item is counted as it comes."""
        if isinstance(value, str | bytes | dict):
            self.allot(value.__sizeof__())
        elif isinstance(value, list | tuple):
            self.allot(80 * len(value))  # the items may be new as well: single characters
        elif isinstance(value, Iterator):
            return self.each(value)
        return value

    def each(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.work()
            yield value

    def listed(self, value: Any) -> Any:
        """Items that are still to come, as a list; other values as they are."""
        return list(self.each(value)) if isinstance(value, GeneratorType) else value

    def operand(self, value: Any) -> Any:
        """A value about to be compared or hashed."""
        if type(value) is str:
            self.work(len(value) >> 6)
        elif value is not None and type(value) not in (int, float, bool):
            self.weigh(value)
        return value

    def printed(self, value: Any) -> Any:
        """A value about to become text."""
        self.allot(value.__sizeof__() if type(value) is str else 10 * self.weigh(value))
        return value

    def weigh(self, value: Any) -> int:
        """Characters and items of a value, through all depths. Raises LimitError past the limit."""
        total, steps, stack = 0, 0, [value]
        while stack:
            part = stack.pop()
            inner: Any = ()
            if isinstance(part, str | bytes | range):
                total += len(part)
            elif isinstance(part, list | tuple | KeysView | ValuesView | ItemsView):
                inner = part
            elif isinstance(part, Mapping):
                inner = part.items()
            elif isinstance(part, Namespace):
                inner = (object.__getattribute__(part, "_Namespace__attrs"),)
            total += 1 + len(inner)
            steps += 1
            if total > self._max_weight:
                raise LimitError(f"a value grew past {self._max_weight} characters and items")
            stack.extend(inner)
        self.work(steps + (total >> 10))
        return total


def free(meter: Meter, *operands: Any) -> None:
    """The work does not depend on the operands."""


def linear(meter: Meter, *operands: Any) -> None:
    for operand in operands:
        meter.weigh(operand)


def compared(meter: Meter, *operands: Any) -> None:
    for operand in operands:
        meter.operand(operand)


def square(meter: Meter, first: Any = None, *rest: Any) -> None:
    """For all that is not known better: the square of the first operand, times each of the others."""
    product = max(meter.weigh(first), 1) ** 2
    for operand in rest:
        product *= max(_factor(meter, operand), 1)
    if product > MAX_PRODUCT:
        raise LimitError("an operation was asked for more than a chat needs")
    meter.work(product >> 4)


def _factor(meter: Meter, operand: Any) -> int:
    """By what an operand may multiply the work: a width, by its number."""
    if isinstance(operand, int):
        return abs(operand)
    return int(min(abs(operand), 1e18)) if isinstance(operand, float) else meter.weigh(operand)


def _joined(meter: Meter, items: Any = (), *separators: Any) -> None:
    gaps = len(items) * sum(meter.weigh(separator) for separator in separators)
    meter.require(4 * (meter.weigh(items) + gaps))


def _joined_by(meter: Meter, separator: str, items: Any = (), *rest: Any) -> None:
    _joined(meter, items, separator)


def _replaced(meter: Meter, text: Any, old: Any = "", new: Any = "", *rest: Any) -> None:
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        meter.work(len(text) >> 6)
        meter.require(4 * (len(text) + text.count(old) * len(new)))
    else:
        square(meter, text, old, new)


def _indented(meter: Meter, text: Any, *rest: Any) -> None:
    lines = text.count("\n") + 1 if isinstance(text, str) else meter.weigh(text)
    meter.require(4 * (meter.weigh(text) + lines * sum(_factor(meter, operand) for operand in rest)))


def _summed(meter: Meter, items: Any, *rest: Any) -> None:
    """Numbers, or lists that are copied once for each."""
    (square if any(isinstance(start, list | tuple) for start in rest) else linear)(meter, items)


def dict_cost(meter: Meter, *values: Any) -> None:
    """New dicts: numbers can be chosen so that each key of a dict meets all others."""
    for value in values:
        meter.weigh(value)
        if not isinstance(value, dict) and len(value) ** 2 > MAX_PRODUCT:
            raise LimitError("a dict was asked for with more keys than a chat needs")


def json_cost(meter: Meter, value: Any, indent: Any, separators: Any) -> None:
    width = indent if isinstance(indent, int) else len(indent or "")
    gaps = sum(map(len, separators)) if separators else 2
    weight = meter.weigh(value)
    meter.require(weight * (10 + gaps + max(width, 0) * min(weight, 1000)))  # 1000: no value is deeper


def format_cost(meter: Meter, text: Any, *operands: Any) -> None:
    """`text % operands` and `text.format(*operands)`: the widths stand in the text."""
    text = text if isinstance(text, str) else str(meter.printed(text))
    if "*" in text or re.search(r":[^{}]*\{", text):
        raise LimitError("it formats with a width that is itself a variable")
    widest = max((int(number[:9]) for number in re.findall(r"[0-9]+", text)), default=0)
    fields = text.count("%") + text.count("{")
    meter.require(4 * (len(text) + fields * (widest + 10 * sum(map(meter.weigh, operands)))))


def _divided(meter: Meter, value: Any, *rest: Any) -> None:
    binop_cost(meter, "%", value, rest[0] if rest else 2)


def binop_cost(meter: Meter, operator: str, left: Any, right: Any) -> None:
    """`left operator right`, of numbers, texts and lists."""
    meter.work()
    if operator == "%" and isinstance(left, str | bytes):
        format_cost(meter, left, right)
    elif operator == "*" and isinstance(left, int) and not isinstance(right, int | float):
        binop_cost(meter, operator, right, left)
    elif isinstance(left, str | bytes | list | tuple):
        grown = len(left) * right if operator == "*" and isinstance(right, int) else len(left)
        grown += len(right) if isinstance(right, str | bytes | list | tuple) else 0
        meter.allot(80 + (4 if isinstance(left, str | bytes) else 8) * grown)
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        bits = bits * max(right, 1) if operator == "**" else bits + right.bit_length()
        if bits > MAX_INTEGER_BITS:
            raise LimitError(f"a number grew past {MAX_INTEGER_BITS} bits")
    elif not isinstance(left, int | float):
        linear(meter, left, right)


def _by_name(*groups: tuple[str, Cost]) -> dict[str, Cost]:
    return {name: cost for names, cost in groups for name in names.split()}


FILTER_COSTS = _by_name(
    ("attr count d default first items last length list map random reverse", free),
    ("reject rejectattr select selectattr tojson", free),
    ("abs capitalize dictsort e escape filesizeformat float forceescape groupby int lower max min", linear),
    ("safe sort string title trim truncate unique upper urlencode wordcount", linear),
    ("format", format_cost),
    ("indent", _indented),
    ("join", _joined),
    ("replace", _replaced),
    ("sum", _summed),
)
"""By filter; the others are `square`. tojson counts itself."""

LAZY_FILTERS = frozenset("default d first items list map reject rejectattr select selectattr".split())
"""Those that take items one by one, as they are asked for."""

PASSING_FILTERS = frozenset("attr d default first last random".split())
"""Those that make nothing: what they give was there before."""

TEST_COSTS = _by_name(
    ("== != < > <= >= eq equalto ne gt greaterthan ge lt lessthan le in lower upper", compared),
    ("divisibleby even odd", _divided),
)
"""By test; the others are free."""

_METHOD_COSTS = _by_name(
    ("strip lstrip rstrip split rsplit splitlines partition rpartition startswith endswith", linear),
    ("removeprefix removesuffix find rfind index rindex count encode copy", linear),
    ("upper lower title capitalize casefold swapcase isalnum isalpha isascii isdecimal isdigit", linear),
    ("isidentifier islower isnumeric isprintable isspace istitle isupper", linear),
    ("items keys values", free),
    ("join", _joined_by),
    ("replace", _replaced),
)


def method_cost(meter: Meter, owner: Any, name: str, *operands: Any) -> None:
    """`owner.name(*operands)` of a text, number, list or dict."""
    if name == "get":
        compared(meter, *operands[:1])
    else:
        cost: Cost = _METHOD_COSTS.get(name, square)
        cost(meter, owner, *operands)
