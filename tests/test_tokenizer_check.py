"""The artifact's tokenizer against its checkpoint's."""

from pathlib import Path

import pytest

from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.validate.weights.tokenizer import compare_tokenizers
from tests.models import write_checkpoint, write_tokenizer

TEXT = "To be, or not to be: that is the question.\n" * 3


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(write_tokenizer(write_checkpoint(tmp_path / "ck", vocab_size=259)))


def test_its_own_tokenizer_does_not_differ(source: Checkpoint) -> None:
    found = compare_tokenizers(source.folder, source, TEXT)
    assert found is not None
    assert (found.differ, found.where) == (0, "")
    assert found.tokens > 50


def test_another_tokenizer_differs(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = write_tokenizer(tmp_path / "other")
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(swapped(tokenizer.read_text()))
    found = compare_tokenizers(other, source, TEXT)
    assert found is not None
    assert found.differ > 0
    assert found.where.startswith("at token ")


def swapped(text: str) -> str:
    """Two single characters of the vocabulary exchanged."""
    return text.replace('"b":', '"\0":').replace('"o":', '"b":').replace('"\0":', '"o":')


def test_without_a_tokenizer_there_is_nothing_to_compare(source: Checkpoint, tmp_path: Path) -> None:
    assert compare_tokenizers(tmp_path, source, TEXT) is None
