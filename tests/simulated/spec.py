"""Installed module → a double that has none but its names, arguments and results.

TensorRT's bindings carry their signatures in their documentation, overload by overload, and so do those of
CUDA with the number of their results. What the documentation does not say is not allowed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Signature:
    """One overload.  parameters: name, type and whether it may be left out, without self."""

    parameters: tuple[tuple[str, str, bool], ...]
    result: str


@cache
def signatures(owner: Any, name: str) -> tuple[Signature, ...]:
    """The overloads of a method of a TensorRT class, as its documentation has them."""
    text = getattr(owner, name).__doc__ or ""
    lines = re.findall(rf"^(?:\d+\. )?{name}\((self.*)\) -> (.+)$", text, re.MULTILINE)
    return tuple(Signature(_parameters(inside), result.strip()) for inside, result in lines)


def _parameters(text: str) -> tuple[tuple[str, str, bool], ...]:
    pieces, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "[<(") - (letter in "]>)")
        if letter == "," and depth == 0:
            pieces.append(text[start:i])
            start = i + 1
    pieces.append(text[start:])
    found = []
    for piece in pieces[1:]:  # not self
        name, _, rest = piece.strip().partition(": ")
        kind, default, _ = rest.partition(" = ")
        found.append((name, kind, bool(default)))
    return tuple(found)


class Double:
    """An object that stands for one of a TensorRT class: `inside` behind the names of `real`.

    An attribute that the real class lacks does not exist; one that the simulation lacks says so.
    """

    def __init__(self, real: Any, inside: Any) -> None:
        object.__setattr__(self, "_real", real)
        object.__setattr__(self, "_inside", inside)

    def __getattr__(self, name: str) -> Any:
        real = object.__getattribute__(self, "_real")
        inside = object.__getattribute__(self, "_inside")
        if name.startswith("__") or not hasattr(real, name):
            raise AttributeError(f"{real.__module__}.{real.__name__} has no attribute {name!r}")
        if not hasattr(type(inside), name):
            raise NotImplementedError(f"the simulation has no {real.__name__}.{name}")
        found = getattr(inside, name)
        return checked(real, name, found) if callable(found) else found

    def __setattr__(self, name: str, value: Any) -> None:
        real, inside = self._real, self._inside
        of_real = getattr(real, name, None)
        if not isinstance(of_real, property) or of_real.fset is None:
            raise AttributeError(f"{real.__module__}.{real.__name__}.{name} cannot be set")
        setattr(inside, name, value)


def inside(double: Any) -> Any:
    """The simulation behind a double, for the simulation itself and for tests."""
    return object.__getattribute__(double, "_inside")


def checked(real: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, called only as `real.name` may be called, and giving only what that may give."""
    known = signatures(real, name)
    if not known:
        raise AttributeError(f"{real.__name__}.{name} is documented with no signature")

    def call(*arguments: Any, **named: Any) -> Any:
        fitting = [s for s in known if _fits(s, arguments, named)]
        if not fitting:
            raise TypeError(f"{real.__name__}.{name} takes {known}, found {arguments} {named}")
        found = function(*arguments, **named)
        if not any(_is_a(found, s.result, result=True) for s in fitting):
            raise TypeError(f"{real.__name__}.{name} gives {fitting[0].result}, the double {found!r}")
        return found

    return call


def _fits(signature: Signature, arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    parameters = signature.parameters
    if len(arguments) > len(parameters):
        return False
    given = dict(zip((name for name, _, _ in parameters), arguments, strict=False))
    if set(given) & set(named) or set(named) - {name for name, _, _ in parameters}:
        return False
    given |= named
    needed = {name for name, _, optional in parameters if not optional}
    kinds = {name: kind for name, kind, _ in parameters}
    return needed <= set(given) and all(_is_a(value, kinds[name]) for name, value in given.items())


def _is_a(value: Any, kind: str, *, result: bool = False) -> bool:
    """Whether a value is of the documented type; a result that is an object or a text may be None."""
    if kind.startswith("list["):
        return isinstance(value, list) and all(_is_a(item, kind[5:-1]) for item in value)
    plain = {"bool": bool, "int": int, "str": str, "tuple": tuple, "list": list, "None": type(None)}
    if kind in plain:
        return isinstance(value, plain[kind]) or (result and kind == "str" and value is None)
    if kind == "typing.SupportsInt":
        return hasattr(value, "__int__")
    if kind == "typing_extensions.Buffer":
        return isinstance(value, bytes | bytearray | memoryview)
    name = re.split(r"\.|::", kind)[-1]
    if isinstance(value, Double):
        return bool(value._real.__name__ == name)
    names = {base.__name__ for base in type(value).__mro__}
    return name in names or (result and value is None)


# --- the CUDA runtime -----------------------------------------------------------------------------------


@cache
def cuda_signature(function: Any) -> tuple[tuple[str, ...], int]:
    """Types of the arguments, "" where the documentation names none; how many results, with the status."""
    text = function.__doc__
    first = text.splitlines()[0]
    inside_brackets = first[first.index("(") + 1 : first.rindex(")")]
    arguments = [a.strip() for a in inside_brackets.split(",")] if inside_brackets.strip() else []
    kinds = tuple(a.partition(": ")[2] for a in arguments)
    section = text.split("\nReturns\n-------\n")[1].split("\n\n")[0]
    results = [line for line in section.splitlines() if line and not line[0].isspace()]
    return kinds, len(results)


class CudaDouble:
    """The CUDA runtime: enums and constants are the installed module's, functions are `inside`'s.

    A function of `inside` returns its status, or a tuple of its status and values; what a failed call gives
    beside its status is None, as in the installed module.
    """

    def __init__(self, real: Any, inside: Any) -> None:
        self._real, self._inside = real, inside

    def __getattr__(self, name: str) -> Any:
        if not hasattr(self._real, name):
            raise AttributeError(f"cuda.bindings.runtime has no attribute {name!r}")
        function = getattr(self._inside, name, None)
        of_real = getattr(self._real, name)
        if function is None:
            if isinstance(of_real, type | int):
                return of_real
            raise NotImplementedError(f"the simulation has no {name}")
        return self._checked(name, of_real, function)

    def _checked(self, name: str, real: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        kinds, count = cuda_signature(real)

        def call(*arguments: Any) -> tuple[Any, ...]:
            if len(arguments) != len(kinds):
                raise TypeError(f"{name} takes {len(kinds)} arguments, found {len(arguments)}")
            for kind, value in zip(kinds, arguments, strict=True):
                if kind and type(value).__name__ != kind:
                    raise TypeError(f"{name} takes a {kind}, found {value!r}")
                if not kind and not hasattr(value, "__int__"):
                    raise TypeError(f"{name} takes a number or a handle, found {value!r}")
            found = self._inside.call(name, function, arguments)
            status, *values = found if isinstance(found, tuple) else (found,)
            if status == self._real.cudaError_t.cudaSuccess and len(values) != count - 1:
                raise TypeError(f"{name} gives {count} results, the double {1 + len(values)}")
            return (status, *(values or [None] * (count - 1)))

        return call
