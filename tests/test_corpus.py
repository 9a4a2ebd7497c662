"""Calibration text: samples are BOS and stretches of the text, spread over all of it; the rest is refused."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel

from mistral_trt.errors import CalibrationError
from mistral_trt.export.quantization import corpus
from mistral_trt.export.quantization.corpus import (
    DEFAULT_SAMPLES,
    DEFAULT_TOKENS,
    SPEECHES,
    Corpus,
    read_corpus,
)
from tests.models import write_tokenizer

SOURCE = SPEECHES.with_name("SPEECHES-SOURCE.md")
BOS = 0

Read: TypeAlias = Callable[..., Corpus]
Texts: TypeAlias = Callable[[Corpus], list[str]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """One token a byte, so that the ids of a text say where they come from."""
    return (write_tokenizer(tmp_path_factory.mktemp("tokenizer")) / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def read(tokenizer: bytes) -> Read:
    """read(path, samples=…, …): read_corpus with settings of the tests."""

    def read(path: Path | None, **settings: Any) -> Corpus:
        defaults = {"samples": 3, "tokens": 5, "vocab_size": 259, "bos_token_id": BOS}
        return read_corpus(settings.pop("tokenizer", tokenizer), path, **(defaults | settings))

    return read


@pytest.fixture(scope="module")
def texts(tokenizer: bytes) -> Texts:
    """texts(corpus): its samples as text, without special tokens."""
    fast = FastTokenizer.from_str(tokenizer.decode())
    return lambda found: [fast.decode(row.tolist()) for row in found.ids]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(path: Path, *contents: object) -> Path:
    return write(path, "".join(json.dumps(content) + "\n" for content in contents))


# ---------------------------------------------------------------- laws


@given(
    total=st.integers(1, 400),
    samples=st.integers(1, 12),
    length=st.integers(1, 40),
)
def test_stretches_keep_apart_and_see_the_beginning_and_the_end(
    total: int, samples: int, length: int
) -> None:
    if total < length:
        return
    found = corpus._spread(np.arange(total), samples, length=length)
    starts = found[:, 0]
    assert found.shape == (min(samples, total // length), length)
    assert (found == starts[:, None] + np.arange(length)).all()
    assert (np.diff(starts) >= length).all()
    assert starts[0] == 0
    if len(found) > 1:
        assert found[-1, -1] == total - 1
        assert np.ptp(np.diff(starts)) <= 1, "evenly"


def test_a_sample_is_bos_and_a_stretch_of_the_text(tmp_path: Path, read: Read, texts: Texts) -> None:
    path = write(tmp_path / "a.txt", "abcdefghijklmnop")
    found = read(path, samples=3, tokens=5)
    assert found.ids.dtype == np.int64
    assert found.ids.shape == (3, 5)
    assert (found.ids[:, 0] == BOS).all()
    assert texts(found) == ["abcd", "ghij", "mnop"]
    without = read(path, samples=3, tokens=4, bos_token_id=None)
    assert (without.ids == found.ids[:, 1:]).all()


def test_the_same_gives_the_same_and_anything_else_another(tmp_path: Path, read: Read) -> None:
    text = "".join(f"{i} " for i in range(100))
    one, other = write(tmp_path / "a.txt", text), write(tmp_path / "b.txt", text.replace("5", "6"))
    found = [
        read(one),
        read(other, samples=4, tokens=64),
        read(one, samples=4, tokens=64),
        read(one, samples=4),
        read(one, tokens=6),
        read(one, bos_token_id=1),
        read(one, bos_token_id=None),
    ]
    assert len({each.sha256 for each in found}) == len(found)
    again = read(write(tmp_path / "elsewhere" / "copy.txt", text))
    assert again.sha256 == found[0].sha256
    assert (again.ids == found[0].ids).all()


def test_the_hash_is_that_of_the_ids(tmp_path: Path, read: Read) -> None:
    found = read(write(tmp_path / "a.txt", "some text to read"))
    assert found.sha256 == hashlib.sha256(found.ids.astype("<i8").tobytes()).hexdigest()
    assert found.to_json() == {"source": "text: a.txt", "sha256": found.sha256, "samples": 3, "tokens": 5}
    json.dumps(found.to_json())


def test_what_a_training_left_in_the_tokenizer_changes_nothing(
    tmp_path: Path, read: Read, tokenizer: bytes
) -> None:
    fast = FastTokenizer.from_str(tokenizer.decode())
    path = write(tmp_path / "a.txt", "more than seven tokens")
    fast.enable_padding(length=99)
    assert read(path, tokenizer=fast.to_str().encode()).sha256 == read(path).sha256
    fast.enable_truncation(7)
    assert read(path, tokenizer=fast.to_str().encode()).sha256 == read(path).sha256


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_pieces_of_a_long_text_join_to_it(
    tmp_path: Path, read: Read, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.txt", "a line\n\nand anöther, 漢字\n" * 9)
    whole = read(path, samples=5, tokens=30)
    monkeypatch.setattr(corpus, "_PIECE_CHARACTERS", piece)
    assert read(path, samples=5, tokens=30).sha256 == whole.sha256


# ---------------------------------------------------------------- what is read


def test_a_line_of_json_is_text_or_holds_it(tmp_path: Path, read: Read, texts: Texts) -> None:
    chat = [{"role": "user", "content": "ef"}, {"role": "assistant", "content": "gh"}]
    path = lines(tmp_path / "a.jsonl", {"text": "ab", "id": 1}, "cd", {"messages": chat}, {"text": "é"})
    write(path, path.read_text() + '\n  \n"z"')
    assert texts(read(path, samples=1, tokens=13)) == ["abcdef\nghéz"[:11]]


def test_text_wins_over_messages(tmp_path: Path, read: Read, texts: Texts) -> None:
    path = lines(tmp_path / "a.jsonl", {"messages": [{"content": "no"}], "text": "yes"})
    assert texts(read(path, samples=1, tokens=4)) == ["yes"]


def test_a_folder_is_its_texts_in_the_order_of_their_paths(tmp_path: Path, read: Read, texts: Texts) -> None:
    write(tmp_path / "b.txt", "cd")
    lines(tmp_path / "a" / "z.jsonl", "ab")
    write(tmp_path / "c" / "d" / "e.MD", "ef")
    write(tmp_path / "c" / "ignored.bin", b"\xff")
    found = read(tmp_path, samples=1, tokens=7)
    assert texts(found) == ["abcdef"]
    assert found.source == f"texts: {tmp_path.name}, 3 files"


def test_any_other_file_is_text(tmp_path: Path, read: Read, texts: Texts) -> None:
    found = read(write(tmp_path / "README", b"\xef\xbb\xbfab\r\ncd"), samples=1, tokens=6)
    assert texts(found) == ["ab\ncd"], "without the byte order mark, with one kind of line end"
    assert found.source == "text: README"


def test_links_that_stay_in_the_folder_are_read(tmp_path: Path, read: Read, texts: Texts) -> None:
    write(tmp_path / "blobs" / "123", "ab")
    (tmp_path / "a.txt").symlink_to(Path("blobs") / "123")
    (tmp_path / "again").symlink_to("blobs")
    assert texts(read(tmp_path, samples=1, tokens=3)) == ["ab"]


def test_a_folder_may_be_a_link_itself(tmp_path: Path, read: Read) -> None:
    write(tmp_path / "real" / "a.txt", "abcd")
    (tmp_path / "named").symlink_to("real")
    assert read(tmp_path / "named", samples=1).source == "texts: named, 1 file"


@pytest.mark.parametrize("here", [".", "a.txt"])
def test_the_source_names_no_path_of_the_machine(
    tmp_path: Path, read: Read, here: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "law" / "a.txt", "abcd")
    monkeypatch.chdir(tmp_path / "law")
    expected = {".": "texts: law, 1 file", "a.txt": "text: a.txt"}[here]
    assert read(Path(here), samples=1).source == read(Path(here).absolute(), samples=1).source == expected


def test_reading_ends_when_there_is_more_than_enough(tmp_path: Path, read: Read) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.txt", name * 200)
    found = read(tmp_path, samples=2, tokens=2)  # 64 · 2 · 2 = 256 tokens
    assert found.source == f"texts: {tmp_path.name}, the first 2 of 3 files"
    write(tmp_path / "b.txt", "b" * 56 + "other")
    write(tmp_path / "c.txt", b"\xff is not even opened")
    assert read(tmp_path, samples=2, tokens=2).sha256 == found.sha256


# ---------------------------------------------------------------- said aloud


def test_too_little_text_gives_fewer_samples(
    tmp_path: Path, read: Read, texts: Texts, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        found = read(write(tmp_path / "a.txt", "abcdefghijk"), samples=16)
    assert texts(found) == ["abcd", "hijk"]
    assert found.to_json()["samples"] == 2
    assert caplog.messages == ["calibration text holds 11 tokens: 2 samples instead of 16"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_is_too_long_is_read_in_part(
    tmp_path: Path, read: Read, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_LIMIT_BYTES", 64)
    monkeypatch.setattr(corpus, "_PIECE_CHARACTERS", 16)
    path = write(tmp_path / name, '"123456"\n' * 40)
    caplog.set_level(logging.INFO)
    found = read(path, samples=1, tokens=4)
    assert caplog.messages == [f"{name} is long: only its first 0 MB are used for calibration"]
    caplog.clear()
    write(path, path.read_bytes()[:72])  # a piece ends with its line, so 72 bytes are read here
    assert read(path, samples=1, tokens=4).sha256 == found.sha256
    assert caplog.messages == []


# ---------------------------------------------------------------- refused


def refusal(read: Read, path: Path | None, **settings: Any) -> str:
    with pytest.raises(CalibrationError) as caught:
        read(path, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "least", "found"),
    [
        ({"samples": 0}, 2, "0 and 5"),
        ({"samples": -1, "bos_token_id": None}, 1, "-1 and 5"),
        ({"tokens": 1}, 2, "3 and 1"),
        ({"tokens": 0, "bos_token_id": None}, 1, "3 and 0"),
    ],
)
def test_settings_that_leave_no_text(read: Read, settings: dict[str, Any], least: int, found: str) -> None:
    assert refusal(read, None, **settings) == (f"expected samples >= 1 and tokens >= {least}, found {found}")


@pytest.mark.parametrize("content", ["", "abc"])
def test_text_for_less_than_a_sample(tmp_path: Path, read: Read, content: str) -> None:
    path = write(tmp_path / "a.txt", content)
    assert refusal(read, path) == (
        f"{path}: expected at least 4 tokens of text, found {len(content)}; give more, or ask less"
    )
    assert read(write(path, "abcd"), samples=1).ids.shape == (1, 5)


def test_a_path_that_is_not_there(tmp_path: Path, read: Read) -> None:
    found = refusal(read, tmp_path / "no.txt")
    assert found.startswith(
        f"{tmp_path / 'no.txt'}: expected a text file or a folder with *.txt, *.md, *.jsonl, found "
        "FileNotFoundError: "
    )


def test_a_folder_without_text_and_what_is_neither(tmp_path: Path, read: Read) -> None:
    write(tmp_path / "folder" / "a.bin", b"")
    os.mkfifo(tmp_path / "pipe.txt")
    for place in (tmp_path / "folder", tmp_path / "pipe.txt"):
        assert refusal(read, place) == (
            f"{place}: expected a text file or a folder with *.txt, *.md, *.jsonl, found none"
        )


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_that_is_not_utf8(tmp_path: Path, read: Read, name: str) -> None:
    path = write(tmp_path / name, "ärger".encode("latin-1"))
    found = refusal(read, path)
    assert found.startswith(f"{path}: expected text in UTF-8, found UnicodeDecodeError: 'utf-8' codec can't")


def test_a_file_that_cannot_be_opened(tmp_path: Path, read: Read) -> None:
    (tmp_path / "a.txt").symlink_to("nothing")
    assert refusal(read, tmp_path).startswith(
        f"{tmp_path / 'a.txt'}: expected text in UTF-8, found FileNotFoundError"
    )


def test_a_subfolder_that_cannot_be_read(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "abcd")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def closed(path: str) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert "found PermissionError: [Errno 13] Permission denied" in refusal(read, tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "sub"])
def test_a_link_that_leads_out_of_the_folder(tmp_path: Path, read: Read, name: str) -> None:
    outside = write(tmp_path / "outside" / "a.txt", "abcd")
    folder = write(tmp_path / "folder" / "b.txt", "abcd").parent
    (folder / name).symlink_to(outside if name == "a.txt" else outside.parent)
    assert refusal(read, folder) == (
        f"{folder / name}: expected links that stay in {folder}, found one out of it"
    )


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"text": ', "JSONDecodeError: Expecting value"),
        ('{"txt": "a"}', "KeyError: 'messages'"),
        ('{"text": 5}', "TypeError: 5 is no text"),
        ('{"text": null}', "TypeError: None is no text"),
        ("[1, 2]", "TypeError: [1, 2] is no text"),
        ('{"messages": [{"role": "user"}]}', "KeyError: 'content'"),
        ('{"messages": [{"content": null}]}', "TypeError: sequence item 0: expected str"),
        ('{"messages": "hello"}', "TypeError: "),
        (r'"\ud800"', "UnicodeEncodeError: "),
        ("[" * 100_000, "RecursionError: "),
    ],
)
def test_a_line_without_text_is_named(tmp_path: Path, read: Read, line: str, found: str) -> None:
    path = write(tmp_path / "a.jsonl", f'"abcdef"\n\n{line}\n')
    assert refusal(read, path).startswith(
        f'{path}:3: expected JSON: a text, or an object with "text" or "messages", found {found}'
    )


@pytest.mark.parametrize(("text", "bos_token_id"), [("abcd\xad", BOS), ("abcd", 258)])
def test_another_models_tokenizer(tmp_path: Path, read: Read, text: str, bos_token_id: int) -> None:
    """The soft hyphen ends in byte 0xAD, the last of the tokens."""
    path = write(tmp_path / "a.txt", text)
    assert refusal(read, path, bos_token_id=bos_token_id, vocab_size=258) == (
        "the tokenizer gives token 258, the model knows 258 only: it is another model's"
    )
    read(path, bos_token_id=bos_token_id, vocab_size=259, samples=1)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b"null"])
def test_a_tokenizer_that_does_not_parse(read: Read, data: bytes) -> None:
    assert refusal(read, None, tokenizer=data).startswith(
        "tokenizer.json: expected a tokenizer that the package `tokenizers` reads, found "
    )


def test_text_that_the_tokenizer_refuses(tmp_path: Path, read: Read) -> None:
    fast = FastTokenizer(WordLevel({"a": 0}, unk_token="?"))
    path = write(tmp_path / "a.txt", "b")
    assert refusal(read, path, tokenizer=fast.to_str().encode()).startswith(
        f"{path}: expected text that the tokenizer takes, found Exception: "
    )


# ---------------------------------------------------------------- the text that is shipped


def listed() -> list[tuple[int, str, int]]:
    """Year, part and bytes of each speech, as SPEECHES-SOURCE.md has them."""
    rows = re.findall(r"^\| `(\d{4})_\w+\.txt` *\|[^|]+\| (\w+) +\| +([\d,]+) \|$", SOURCE.read_text(), re.M)
    return [(int(year), part, int(size.replace(",", ""))) for year, part, size in rows]


def test_every_speech_is_listed_and_older_than_1950() -> None:
    years = [year for year, _, _ in listed()]
    assert years == sorted(years)
    assert years == [int(year) for year in re.findall(r"\b(\d+)_\w+\.txt", SOURCE.read_text())]
    assert years[0] == 1790
    assert years[-1] == 1949


def test_the_text_is_the_one_described() -> None:
    data = SPEECHES.read_bytes()
    assert hashlib.sha256(data).hexdigest() in SOURCE.read_text()
    assert [len(speech) for speech in data.strip().split(b"\n\n")] == [size for _, _, size in listed()]


def test_the_defaults_have_text_enough_in_any_vocabulary(
    read: Read, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        found = read(None, samples=DEFAULT_SAMPLES, tokens=DEFAULT_TOKENS)
    assert found.ids.shape == (16, 512)
    assert found.source == "State of the Union speeches, 1790 to 1949"
    assert caplog.messages == []
    words = SPEECHES.read_text().split()
    assert len(words) > 2 * DEFAULT_SAMPLES * DEFAULT_TOKENS, "a word is a token at the very least"
