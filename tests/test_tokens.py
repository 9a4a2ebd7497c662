"""Tokens both sides are fed: from a text, or from a seed."""

from pathlib import Path

import numpy as np
import pytest

from mistral_trt.errors import ManifestError, ValidationError
from mistral_trt.runtime.text.tokenizer import Tokenizer
from mistral_trt.validate.scenarios.tokens import TEXT, random_tokens, read_beginning, text_tokens
from tests.models import write_tokenizer


def test_random_tokens_follow_their_seed() -> None:
    first, again = (random_tokens(length=50, vocab_size=97, seed=5) for _ in range(2))
    assert first == again
    assert first.ids != random_tokens(length=50, vocab_size=97, seed=6).ids
    assert max(first.ids) < 97
    assert "seed 5" in first.source


def test_text_is_repeated_to_the_length(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path))
    text = tmp_path / "short.txt"
    text.write_text("abc")
    tokens = text_tokens(tokenizer, text, length=10, vocab_size=259)
    once = tokenizer.encode("abc")
    assert tokens.ids == tuple((once * 3)[:10])
    assert tokens.source == "text: short.txt, 3 times over"
    own = text_tokens(tokenizer, TEXT, length=16_000, vocab_size=259)
    assert own.source == "text: Moby-Dick, chapters 1 and 2"
    assert len(set(own.ids)) > 50
    assert tokens.is_text


def test_what_should_be_predicted_is_the_next_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path))
    text = tmp_path / "short.txt"
    text.write_text("abc")
    read = text_tokens(tokenizer, text, length=6, vocab_size=259)
    assert read.targets.tolist() == [*read.ids[1:], -1]
    random = random_tokens(length=6, vocab_size=97, seed=0)
    assert random.targets.tolist() == [-1] * 6, "no model can predict random tokens"


def test_text_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path))
    missing, binary, text = tmp_path / "none.txt", tmp_path / "binary", tmp_path / "a.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    text.write_text("abc")
    for path in (missing, binary):
        with pytest.raises(ValidationError, match="cannot be read as UTF-8 text"):
            text_tokens(tokenizer, path, length=4, vocab_size=259)
    with pytest.raises(ManifestError, match="another model's"):
        text_tokens(tokenizer, text, length=4, vocab_size=50)


def test_a_text_of_blanks_is_refused_though_every_text_starts_with_a_token(
    tmp_path: Path,
) -> None:
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path))
    assert tokenizer.encode("") == [0]
    for blank in ("", " \n\n"):
        text = tmp_path / "blank.txt"
        text.write_text(blank)
        with pytest.raises(ValidationError, match="holds no text"):
            text_tokens(tokenizer, text, length=4, vocab_size=259)


def test_of_a_long_text_only_the_beginning_is_read(tmp_path: Path) -> None:
    tokenizer, text = Tokenizer.from_folder(write_tokenizer(tmp_path)), tmp_path / "long.txt"
    text.write_text("a whale\n" * 300_000)
    assert len(read_beginning(text, length=10)) == 1 << 20
    assert len(read_beginning(text, length=200_000)) == 1_600_000
    assert text_tokens(tokenizer, text, length=10, vocab_size=259).source == "text: long.txt"


def test_the_token_hash_is_of_the_ids() -> None:
    tokens = random_tokens(length=9, vocab_size=97, seed=0)
    changed = random_tokens(length=9, vocab_size=97, seed=1)
    assert np.asarray(tokens.ids, "<i8").nbytes == 72
    assert tokens.sha256 != changed.sha256
