"""Calibration text + tokenizer → token ids, [samples, tokens].

A text file is one document, so is a line of a `.jsonl` file; a folder is its files by order of their paths.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from mistral_trt.errors import CalibrationError, CheckpointError
from mistral_trt.export.text_parsing import refusing
from mistral_trt.progress import note

SPEECHES = Path(__file__).with_name("speeches.txt")
"""Thirteen State of the Union speeches or their beginnings, in the public domain (SPEECHES-SOURCE.md)."""
DEFAULT_SAMPLES = 16
DEFAULT_TOKENS = 512
_SUFFIXES = (".txt", ".md", ".jsonl")
_KINDS = f"a text file or a folder with {', '.join(f'*{suffix}' for suffix in _SUFFIXES)}"
_REACH = 64
_LIMIT_BYTES = 256 << 20
_PIECE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """ids: int64 [samples, tokens].  source: in words, no path.  sha256: of ids, little-endian int64."""

    ids: np.ndarray
    source: str
    sha256: str

    def to_json(self) -> dict[str, Any]:
        samples, tokens = self.ids.shape
        return {"source": self.source, "sha256": self.sha256, "samples": samples, "tokens": tokens}


def read_corpus(
    tokenizer_json: bytes,
    path: Path | None,
    *,
    samples: int,
    tokens: int,
    vocab_size: int,
    bos_token_id: int | None,
) -> Corpus:
    """Samples spread evenly over a text, each begun by BOS where the model has one.

    path: a text file, a `.jsonl` file (each line text, or an object with "text" or "messages"), a folder
    with such files, or None for SPEECHES.  Reading ends once 64 · samples · tokens tokens are gathered, and
    256 MB into a file; what comes after is not looked at.  Texts above 1 MB are tokenized in pieces of whole
    lines.  A text too short for all samples gives as many as do not overlap, and that is said.
    Raises CalibrationError for settings, files, text or a tokenizer that cannot be used.
    """
    length = _text_length(samples, tokens, has_bos=bos_token_id is not None)
    fast = _load(tokenizer_json)
    place = SPEECHES if path is None else path
    files = _files(place)
    text, files_read = _gather(fast, files, limit=_REACH * samples * tokens)
    if len(text) < length:
        raise CalibrationError(
            f"{place}: expected at least {length} tokens of text, found {len(text)}; give more, or ask less"
        )
    if (highest := max(text.max(), bos_token_id or 0)) >= vocab_size:
        raise CalibrationError(
            f"the tokenizer gives token {highest}, the model knows {vocab_size} only: it is another model's"
        )
    ids = _spread(text, samples, length=length)
    if bos_token_id is not None:
        ids = np.insert(ids, 0, bos_token_id, axis=1)
    sha256 = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    return Corpus(ids, _source(place, len(files), files_read=files_read), sha256)


def _text_length(samples: int, tokens: int, *, has_bos: bool) -> int:
    """Tokens of text in a sample. Raises CalibrationError for settings that leave none."""
    least = 2 if has_bos else 1  # a sample that is BOS alone says nothing
    if samples < 1 or tokens < least:
        raise CalibrationError(f"expected samples >= 1 and tokens >= {least}, found {samples} and {tokens}")
    return tokens - has_bos


def _load(tokenizer_json: bytes) -> FastTokenizer:
    with _refusing(Path("tokenizer.json"), "a tokenizer that the package `tokenizers` reads"):
        fast = FastTokenizer.from_str(tokenizer_json.decode())
        fast.no_truncation()  # a tokenizer saved while training carries its cut and its padding
        fast.no_padding()
        return fast


def _gather(fast: FastTokenizer, files: Sequence[Path], *, limit: int) -> tuple[np.ndarray, int]:
    """The first `limit` tokens of all documents, int64 [at most limit], and how many files were read."""
    parts = [np.empty(0, np.int64)]
    total = 0
    for number, path in enumerate(files, 1):
        for text in _texts(path):
            with _refusing(path, "text that the tokenizer takes"):
                parts.append(np.array(fast.encode(text, add_special_tokens=False).ids, np.int64))
            total += len(parts[-1])
            if total >= limit:
                return np.concatenate(parts)[:limit], number
    return np.concatenate(parts), len(files)


def _spread(text: np.ndarray, samples: int, *, length: int) -> np.ndarray:
    """Stretches of a text, from its beginning to its end.

    text: int64 [n], n at least `length`.  Returns int64 [samples or the most that do not overlap, length].
    n=10, 3 samples of 2: 0 1, 4 5, 8 9.
    """
    fitting = min(samples, len(text) // length)
    if fitting < samples:
        note(f"calibration text holds {len(text)} tokens: {fitting} samples instead of {samples}")
    starts = [round(i * (len(text) - length) / max(1, fitting - 1)) for i in range(fitting)]
    return np.stack([text[start : start + length] for start in starts])


def _source(place: Path, files: int, *, files_read: int) -> str:
    if place == SPEECHES:
        return "State of the Union speeches, 1790 to 1949"
    name = place.absolute().name
    if not place.is_dir():
        return f"text: {name}"
    count = f"{files} file{'s' * (files > 1)}"
    return f"texts: {name}, " + (count if files_read == files else f"the first {files_read} of {count}")


def _files(place: Path) -> list[Path]:
    """The file itself, or all texts below a folder. Raises CalibrationError if there is none."""
    with _refusing(place, _KINDS):
        place.stat()
        found = sorted(_below(place)) if place.is_dir() else [place] * place.is_file()
    if not found:
        raise CalibrationError(f"{place}: expected {_KINDS}, found none")
    return found


def _below(folder: Path) -> Iterator[Path]:
    """Texts in a folder and its subfolders. Raises CalibrationError for a link that leads out of it."""

    def give_up(error: OSError) -> None:
        raise error

    for here, subfolders, names in os.walk(folder, onerror=give_up):
        for path in (Path(here, name) for name in [*subfolders, *names]):
            is_text = path.suffix.lower() in _SUFFIXES
            if (is_text or path.is_dir()) and not path.resolve().is_relative_to(folder.resolve()):
                raise CalibrationError(f"{path}: expected links that stay in {folder}, found one out of it")
            if is_text and (path.is_file() or not path.exists()):  # a link to nothing fails when it is read
                yield path


def _texts(path: Path) -> Iterator[str]:
    """The documents of a file; a long text comes in pieces of whole lines."""
    if path.suffix.lower() != ".jsonl":
        yield from _pieces(path, lambda file: file.read(_PIECE_CHARACTERS) + file.readline(_PIECE_CHARACTERS))
        return
    for number, line in enumerate(_pieces(path, lambda file: file.readline(_LIMIT_BYTES)), 1):
        if line.strip():
            yield _document(line, Path(f"{path}:{number}"))


def _pieces(path: Path, take: Callable[[TextIO], str]) -> Iterator[str]:
    """What `take` takes from a file, time and again, until its end or 256 MB."""
    taken_bytes = 0
    with _refusing(path, "text in UTF-8"), path.open(encoding="utf-8-sig") as file:
        while taken_bytes < _LIMIT_BYTES and (text := take(file)):
            taken_bytes += len(text.encode())
            yield text
        if taken_bytes >= _LIMIT_BYTES and file.read(1):
            note(f"{path.name} is long: only its first {_LIMIT_BYTES >> 20} MB are used for calibration")


def _document(line: str, where: Path) -> str:
    """Text of a line of JSON.  where: the file and the number of the line."""
    with _refusing(where, 'JSON: a text, or an object with "text" or "messages"'):
        found = json.loads(line)
        if isinstance(found, dict):
            found = found["text"] if "text" in found else "\n".join(m["content"] for m in found["messages"])
        if not isinstance(found, str):
            raise TypeError(f"{found!r:.40} is no text")
        return found.encode().decode()


@contextmanager
def _refusing(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever a parser raises into a CalibrationError that names the file."""
    try:
        with refusing(path, expected):
            yield
    except CheckpointError as error:
        raise CalibrationError(str(error)) from error.__cause__
