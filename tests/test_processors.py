"""A caller's processors see what they are told they see, and what they give back is held to its law."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mistral_trt.errors import GenerationError
from mistral_trt.runtime.sampling.processors import run_processors

LOGITS = np.array([1, 2, -np.inf, 0], np.float32)


def plus_one(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
    logits += 1
    return logits


def as_double(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
    return logits.astype(np.float64) * 2


def test_they_run_one_after_another() -> None:
    assert list(run_processors([plus_one, as_double], [], LOGITS.copy())) == [4, 6, -np.inf, 2]
    assert list(run_processors([as_double, plus_one], [], LOGITS.copy())) == [3, 5, -np.inf, 1]
    assert run_processors([as_double], [], LOGITS.copy()).dtype == np.float32


def test_they_see_the_tokens_and_cannot_change_them() -> None:
    tokens = [5, 6, 7]

    def look(seen: Any, logits: np.ndarray) -> np.ndarray:
        assert isinstance(seen, Sequence) and list(seen) == [5, 6, 7] and list(reversed(seen)) == [7, 6, 5]
        assert (len(seen), seen[-1], list(seen[1:]), 6 in seen, 8 in seen) == (3, 7, [6, 7], True, False)
        copied: Any = seen[:]
        copied.append(9)
        unchecked: list[Any] = [seen]
        with pytest.raises(TypeError):
            unchecked[0][0] = 1
        with pytest.raises(AttributeError):
            unchecked[0].append(1)
        return logits

    run_processors([look], tokens, LOGITS.copy())
    assert tokens == [5, 6, 7]


class Wrong:
    """Gives back what it was made with."""

    def __init__(self, found: object) -> None:
        self.found = found

    def __call__(self, tokens: Sequence[int], logits: np.ndarray) -> Any:
        return self.found


UNFIT = "logits without NaN and +inf, at least one of them finite; the largest is "


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "a floating-point array [4], found NoneType"),
        ([1.0, 2.0, 3.0, 4.0], "a floating-point array [4], found list"),
        (np.zeros(4, np.int64), "a floating-point array [4], found int64 [4]"),
        (np.zeros(3, np.float32), "a floating-point array [4], found float32 [3]"),
        (np.zeros((1, 4), np.float32), "a floating-point array [4], found float32 [1, 4]"),
        (np.array([0, np.nan, 1, 2]), f"{UNFIT}nan"),
        (np.array([0, np.inf, 1, 2]), f"{UNFIT}inf"),
        (np.full(4, 1e300), f"{UNFIT}inf"),
        (np.full(4, -np.inf), f"{UNFIT}-inf"),
    ],
)
def test_what_is_not_logits_is_refused_and_the_processor_named(found: object, said: str) -> None:
    with pytest.raises(GenerationError) as raised:
        run_processors([plus_one, Wrong(found), plus_one], [], LOGITS.copy())
    assert str(raised.value) == f"logits_processors[1] (Wrong): expected {said}"


def test_a_function_is_named_by_its_name() -> None:
    def halves(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
        return logits[:2]

    with pytest.raises(GenerationError, match=r"logits_processors\[0\] \(.*halves\): expected a floating"):
        run_processors([halves], [], LOGITS.copy())


def test_what_it_raises_itself_is_passed_on() -> None:
    def fails(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        run_processors([plus_one, fails], [], LOGITS.copy())
