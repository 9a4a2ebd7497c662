"""A caller's own logits processors, run one after another and held to what they may give back."""

import math
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from mistral_trt.errors import GenerationError
from mistral_trt.runtime.sampling.params import LogitsProcessor

Logits = npt.NDArray[np.float32]


class TokensSoFar(Sequence[int]):
    """A sequence's tokens, to be read only; it grows with the text."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...
    def __getitem__(self, place: int | slice) -> int | Sequence[int]:
        return self._tokens[place]

    def __iter__(self) -> Iterator[int]:
        return iter(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)


def run_processors(processors: Sequence[LogitsProcessor], tokens: list[int], logits: Logits) -> Logits:
    """logits: float32 [V], which the processors may write to.  Returns float32 [V].

    Raises GenerationError, naming the processor, if one gives back anything but floating-point logits [V]
    without NaN and +inf, at least one of them finite. What a processor raises itself is passed on.
    """
    so_far = TokensSoFar(tokens)
    for place, processor in enumerate(processors):
        found = processor(so_far, logits)
        name = getattr(processor, "__qualname__", type(processor).__qualname__)
        logits = _checked(found, f"logits_processors[{place}] ({name}): expected", logits.size)
    return logits


def _checked(found: object, expected: str, vocab_size: int) -> Logits:
    if not isinstance(found, np.ndarray):
        raise GenerationError(
            f"{expected} a floating-point array [{vocab_size}], found {type(found).__name__}"
        )
    if found.dtype.kind != "f" or found.shape != (vocab_size,):
        raise GenerationError(
            f"{expected} a floating-point array [{vocab_size}], found {found.dtype} {list(found.shape)}"
        )
    with np.errstate(over="ignore"):
        logits = found.astype(np.float32)
    best = float(logits.max())  # NaN if there is one
    if not math.isfinite(best):
        raise GenerationError(
            f"{expected} logits without NaN and +inf, at least one of them finite; the largest is {best}"
        )
    return logits
