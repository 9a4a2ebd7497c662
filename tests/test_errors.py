"""The tree of errors, and the message for a package that is not installed."""

import ast
import re
from collections.abc import Iterator

import pytest

from mistral_trt import errors
from mistral_trt.errors import MissingDependencyError, MistralTrtError, NonFiniteLogitsError, require


def descendants(error: type[Exception], depth: int = 0) -> Iterator[tuple[int, str]]:
    """Every error below `error`, with its depth, in the order of definition."""
    yield depth, error.__name__
    for child in error.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from descendants(child, depth + 1)


def test_the_tree_drawn_is_the_tree_that_is() -> None:
    assert errors.__doc__ is not None
    drawn = [
        (len(match[1]) // 4, match[2])
        for line in errors.__doc__.splitlines()
        if (match := re.match(r"([│├└─ ]*)(\w+Error)\b", line))
    ]
    assert drawn == list(descendants(MistralTrtError))


def test_a_request_that_fails_names_its_rows_and_a_way_out() -> None:
    error = NonFiniteLogitsError([0, 3], {1: "logits"})
    assert (error.rows, error.healthy) == ([0, 3], {1: "logits"})
    assert "NaN or infinity in row(s) 0, 3; the request is ended" in str(error)
    assert "try --precision bf16" in str(error)


def test_a_package_that_is_installed_is_imported() -> None:
    assert require("ast", "export") is ast


def test_a_package_that_is_not_installed_is_named_with_its_extra() -> None:
    with pytest.raises(MissingDependencyError) as caught:
        require("no_such_package.inner", "validate")
    assert str(caught.value) == (
        "this needs the package 'no_such_package', which is not installed; "
        "run: pip install 'mistral-trt[validate]'"
    )
