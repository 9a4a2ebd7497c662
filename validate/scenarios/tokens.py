"""A text, or a seed → the sequence of tokens that both sides of a comparison are fed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mistral_trt.errors import ManifestError, ValidationError
from mistral_trt.runtime.text.tokenizer import Tokenizer

TEXT = Path(__file__).with_name("text.txt")
"""Two chapters' beginning of a novel in the public domain (TEXT-SOURCE.md)."""

_CHARACTERS_READ = 1 << 20
_CHARACTERS_OF_A_TOKEN = 8
"""More than a token of prose has, so that a text is not repeated while there is more of it."""


@dataclass(frozen=True)
class Tokens:
    """The sequence that both sides are fed.

    ids: T token ids.  sha256: of the ids as little-endian int64.  is_text: whether it can be predicted;
    random tokens cannot.
    """

    ids: tuple[int, ...]
    source: str
    sha256: str
    is_text: bool

    @property
    def targets(self) -> np.ndarray:
        """The token that a model should predict at each position, int64 [T]; -1 where there is none.

        Text 5 9 7 -> 9 7 -1; random tokens -> -1 -1 -1.
        """
        if not self.is_text:
            return np.full(len(self.ids), -1)
        return np.array([*self.ids[1:], -1])


def read_beginning(path: Path, *, length: int) -> str:
    """A text as far as it is needed for `length` tokens: a megabyte, or more where that takes more.

    Raises ValidationError for a file that is not text, or holds nothing but blanks.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(max(_CHARACTERS_READ, _CHARACTERS_OF_A_TOKEN * length))
    except (OSError, UnicodeDecodeError) as error:
        raise ValidationError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise ValidationError(f"{path} holds no text; expected a file with some, or --random-tokens")
    return text


def text_tokens(tokenizer: Tokenizer, path: Path, *, length: int, vocab_size: int) -> Tokens:
    """The first `length` tokens of a text, repeated from its start where it is shorter.

    Raises ValidationError for a file that is not text, ManifestError for another model's tokenizer.
    """
    ids = tokenizer.encode(read_beginning(path, length=length))
    if not ids:
        raise ValidationError(f"the artifact's tokenizer gives no token for {path}; try --random-tokens")
    if max(ids) >= vocab_size:
        raise ManifestError(
            f"the artifact's tokenizer gives token {max(ids)}, but its model knows {vocab_size} tokens only: "
            "it is another model's"
        )
    repeats = -(-length // len(ids))
    name = "Moby-Dick, chapters 1 and 2" if path == TEXT else path.name
    again = f", {repeats} times over" if repeats > 1 else ""
    return _tokens((ids * repeats)[:length], f"text: {name}{again}", is_text=True)


def random_tokens(*, length: int, vocab_size: int, seed: int) -> Tokens:
    """Uniform random tokens, the same for the same seed."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, length)
    return _tokens(ids.tolist(), f"random tokens, seed {seed}", is_text=False)


def _tokens(ids: Sequence[int], source: str, *, is_text: bool) -> Tokens:
    sha256 = hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()
    return Tokens(tuple(ids), source, sha256, is_text)
