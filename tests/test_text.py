"""Streamed text is what decoding all tokens gives, valid at each step, cut before the first stop string."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import mistral_common
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders
from tokenizers.decoders import DecodeStream
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from mistral_trt.errors import GenerationError, ManifestError
from mistral_trt.export.tokenizer_files import read_text_files
from mistral_trt.runtime.text import text_stream as text_module
from mistral_trt.runtime.text.text_stream import StreamDecoder, TextStream, TokenBytes
from mistral_trt.runtime.text.tokenizer import Tokenizer
from tests.models import write_tokenizer

SENTENCEPIECE = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
KINDS = ["byte tokens", "byte level"]
TEXT = (Path(__file__).parent.parent / "validate" / "scenarios" / "text.txt").read_text("utf-8")
PIECES = ["a", " the", "漢", "🙂", "é", "\n", "▁", "\ufffd", "👩‍👩‍👧", "  ", "xyz"]

Opened: TypeAlias = Callable[[str], Tokenizer]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Mistral's v1 (SentencePiece with byte tokens), and a byte-level vocabulary of one token a byte."""
    root = tmp_path_factory.mktemp("text")
    for name in KINDS:
        (root / name).mkdir()
    (root / "tokenizer.model").write_bytes(SENTENCEPIECE.read_bytes())
    for name, data in read_text_files([root], vocab_size=1 << 20).files.items():
        (root / "byte tokens" / name).write_bytes(data)
    write_tokenizer(root / "byte level")
    return {name: root / name for name in KINDS}


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> Opened:
    known = {name: Tokenizer.from_folder(folder) for name, folder in folders.items()}
    return known.__getitem__


@pytest.fixture(scope="module")
def fast(folders: dict[str, Path]) -> dict[str, FastTokenizer]:
    return {name: FastTokenizer.from_file(str(folder / "tokenizer.json")) for name, folder in folders.items()}


ALPHABET = {byte: character for character, byte in text_module._byte_level_alphabet().items()}
PLACES = {character: place for place, character in enumerate(sorted(ALPHABET.values()))}


def byte_token(name: str, byte: int) -> int:
    """The token of one byte; `write_tokenizer`'s vocabulary is sorted by the characters for them."""
    return 3 + (byte if name == "byte tokens" else PLACES[ALPHABET[byte]])


def tokens_of(name: str) -> st.SearchStrategy[list[int]]:
    """Random tokens, many of them single bytes, and characters spelled out in bytes, whole and broken."""
    size = 32000 if name == "byte tokens" else 259
    byte = st.integers(0, 255).map(lambda value: [byte_token(name, value)])
    character = st.sampled_from(PIECES).map(lambda text: [byte_token(name, value) for value in text.encode()])
    broken = st.tuples(character, st.integers(0, 3)).map(lambda pair: pair[0][: pair[1]])
    parts = st.lists(
        st.integers(0, size + 2).map(lambda token: [token]) | byte | character | broken, max_size=8
    )
    return parts.map(lambda parts: [token for part in parts for token in part])


def streamed(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    stream = tokenizer.decoder(prompt)
    pieces = [stream.push(token) for token in tokens]
    for piece in pieces:
        piece.encode("utf-8")
    return "".join(pieces) + stream.finish()


# ---------------------------------------------------------------- laws: the text


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=300)
@given(data=st.data())
def test_pieces_join_to_the_decoding_of_all_tokens(opened: Opened, name: str, data: st.DataObject) -> None:
    tokens = data.draw(tokens_of(name))
    assert streamed(opened(name), [], tokens) == opened(name).decode(tokens)


@settings(max_examples=300)
@given(tokens=tokens_of("byte level"))
def test_byte_level_decoding_is_tokenizers(
    opened: Opened, fast: dict[str, FastTokenizer], tokens: list[int]
) -> None:
    assert opened("byte level").decode(tokens) == fast["byte level"].decode(tokens)


@settings(max_examples=300)
@given(tokens=tokens_of("byte tokens"))
@example([243, 162, 156, 133, 198, 172, 233])  # two whole characters, and half of one
def test_byte_token_decoding_is_sentencepieces(
    opened: Opened, fast: dict[str, FastTokenizer], processor: Any, tokens: list[int]
) -> None:
    """And tokenizers' own wherever the bytes are UTF-8; that alone strips a first blank that is a byte."""
    ours, theirs = opened("byte tokens").decode(tokens), fast["byte tokens"].decode(tokens)
    known = [token for token in tokens if 2 < token < 32000]
    if "\ufffd" not in theirs or not any(token < 259 for token in tokens):
        assert ours == theirs
    if known[:1] != [3 + 0x20]:
        assert opened("byte tokens").decode(known) == processor.decode(known)


@pytest.fixture(scope="module")
def processor() -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE))


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=200)
@given(data=st.data())
def test_a_stream_continues_its_prompt(opened: Opened, name: str, data: st.DataObject) -> None:
    """Also a prompt that ends inside a character, as one of token ids may."""
    ours = opened(name)
    prompt, tokens = data.draw(tokens_of(name)), data.draw(tokens_of(name))
    whole = StreamDecoder(ours._bytes, [])
    for token in prompt:
        whole.push(token)
    assert streamed(ours, prompt, tokens) == "".join(map(whole.push, tokens)) + whole.finish()


@pytest.mark.parametrize("name", KINDS)
def test_a_blank_after_text_is_kept_and_the_first_is_not(opened: Opened, name: str) -> None:
    ours = opened(name)
    start, after = ours.encode(""), ours.encode("a")
    hello = ours.encode("hello")[1:]
    assert streamed(ours, start, hello) == "hello"
    assert streamed(ours, after, hello) == (" hello" if name == "byte tokens" else "hello")
    assert streamed(ours, after, [2, *hello]).strip() == "hello", "special tokens have no text"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "text", ["🙂👩‍👩‍👧🇫🇷", "漢字かな交じり文", "a\u0308\U00010348é", "\ufffd", TEXT[:2000]]
)
def test_characters_come_whole_and_as_soon_as_they_are(opened: Opened, name: str, text: str) -> None:
    ours = opened(name)
    stream, out = ours.decoder(ours.encode("")), ""
    for token in ours.encode(text)[1:]:
        out += stream.push(token)
        assert text.startswith(out)
    assert (out, stream.finish()) == (text, "")


def test_tokenizers_own_stream_would_not_do(fast: dict[str, FastTokenizer]) -> None:
    """It raises on bytes that are wrong in the middle, or keeps what follows a character that never ends."""
    tokens = [3 + byte for byte in "漢".encode()] + [3 + 0xFF, 28708]
    stream = DecodeStream(skip_special_tokens=True)
    with pytest.raises(Exception, match="Invalid prefix"):
        for token in tokens:
            stream.step(fast["byte tokens"], token)


def test_a_run_of_bytes_keeps_the_characters_before_a_wrong_one(
    opened: Opened, fast: dict[str, FastTokenizer]
) -> None:
    """The one difference to tokenizers, which takes back what a stream has given out."""
    tokens = [3 + byte for byte in "漢".encode()] + [3 + 0xFF]
    assert opened("byte tokens").decode(tokens) == "漢\ufffd"
    assert fast["byte tokens"].decode(tokens) == "\ufffd" * 4


# ---------------------------------------------------------------- laws: stop strings


def cut(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """A plain statement of the rule: the stop string complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        for candidate in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(candidate):
                return text[: end - len(candidate)], candidate
    return text, None


stops = st.lists(st.text("ab\ufffd漢", min_size=1, max_size=4), max_size=3)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=200)
@given(data=st.data(), stop=stops | st.lists(st.sampled_from(PIECES), max_size=2))
def test_the_text_ends_before_the_first_stop_string(
    opened: Opened, name: str, data: st.DataObject, stop: list[str]
) -> None:
    ours = opened(name)
    spelled = st.text("aab漢\ufffd", max_size=12).map(lambda text: ours.encode(text)[1:])
    tokens = data.draw(tokens_of(name) | spelled)
    stream = ours.text_stream([], stop)
    out = "".join(stream.push(token) for token in tokens) + stream.finish()
    assert (out, stream.stopped) == cut(ours.decode(tokens), stop)


@settings(max_examples=200)
@given(text=st.text("aab", max_size=20), stop=stops.filter(bool))
@example("aaab", ["aab"])
@example("abab", ["abab", "b"])
def test_text_is_held_back_only_while_a_stop_string_may_come_of_it(
    opened: Opened, text: str, stop: list[str]
) -> None:
    ours = opened("byte level")
    stream, out = ours.text_stream([], stop), ""
    for index, token in enumerate(ours.encode(text)[1:], 1):
        out += stream.push(token)
        if stream.stopped is not None:
            return
        held = text[:index].removeprefix(out)
        assert out + held == text[:index]
        assert not held or any(candidate.startswith(held) for candidate in stop)
    assert out + stream.finish() == text


def test_nothing_comes_after_a_stop_string(opened: Opened) -> None:
    ours = opened("byte level")
    stream = ours.text_stream([], ["END"])
    assert "".join(map(stream.push, ours.encode("so it ENDS here END")[1:])) == "so it "
    assert (stream.stopped, stream.push(70), stream.finish()) == ("END", "", "")


def test_what_is_held_back_comes_at_the_end(opened: Opened) -> None:
    ours = opened("byte level")
    stream = ours.text_stream([], ["\n\nUser:", "</answer>"])
    assert [stream.push(token) for token in ours.encode("a\n\nb</an")[1:]][:4] == ["a", "", "", "\n\nb"]
    assert (stream.finish(), stream.finish(), stream.stopped) == ("</an", "", None)


def test_a_character_that_never_became_whole_is_one_mark_at_the_end(opened: Opened) -> None:
    ours = opened("byte level")
    stream = ours.text_stream([], ["x"])
    assert "".join(map(stream.push, ours.encode("a🙂")[1:-1])) == "a"
    assert stream.finish() == "\ufffd"


def test_a_search_that_forgets_is_caught(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "aab" in "aaab": what matched before the wrong character may begin the stop string again."""
    ours = opened("byte level")

    def forgetful(search: Any, character: str) -> bool:
        same = search.text[search.matched] == character
        search.matched = search.matched + 1 if same else 0
        return bool(search.matched == len(search.text))

    monkeypatch.setattr(text_module._Search, "step", forgetful)
    stream = ours.text_stream([], ["aab"])
    out = "".join(stream.push(token) for token in ours.encode("aaab")[1:])
    assert (out, stream.stopped) != cut("aaab", ["aab"])


@pytest.mark.parametrize("stop", ["abc", [""], ["a", 3], ("a", "")])
def test_stop_strings_that_are_none_are_refused(opened: Opened, stop: Any) -> None:
    with pytest.raises(GenerationError, match="stop: expected texts of at least one character, found"):
        opened("byte level").text_stream([], stop)


# ---------------------------------------------------------------- any decoder


def words(decoder: Any = None) -> FastTokenizer:
    """A vocabulary of whole words, and a decoder."""
    made = FastTokenizer(WordLevel({"A": 0, "probe": 1, "##s": 2, "of": 3, "[x]": 4}, unk_token="[x]"))
    made.pre_tokenizer = WhitespaceSplit()
    made.decoder = decoder
    return made


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.Metaspace()])
@given(tokens=st.lists(st.integers(0, 3), max_size=6).filter(lambda tokens: tokens[:1] != [2]))
def test_decoders_without_bytes_stream_too(decoder: Any, tokens: list[int]) -> None:
    """But for a text that begins in the middle of a word (##s), which none does."""
    made = words(decoder)
    stream = StreamDecoder(TokenBytes(made), [])
    assert "".join(map(stream.push, tokens)) + stream.finish() == made.decode(tokens)


def test_a_decoder_whose_text_depends_on_the_neighbours_is_refused(tmp_path: Path) -> None:
    vocabulary = {character: i for i, character in enumerate("A probe:ofwrds,123\n\té漢😀")}
    made = FastTokenizer(BPE(vocabulary, []))
    made.decoder = decoders.CTC()  # drops what repeats
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ManifestError, match="expected a decoder that gives each token a text of its own"):
        Tokenizer.from_folder(tmp_path)


def test_added_tokens_and_unknown_ids(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    made = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_tokens(["<call me>", "漢"])
    made.save(str(folder / "tokenizer.json"))
    ours = Tokenizer.from_folder(folder)
    assert ours.size == 261
    assert ours.decode([259, 260, 1, 999, -1 % 1000]) == made.decode([259, 260]) == "<call me>漢"


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("stop", [(), ("\n\nUser:", "</answer>")])
def test_a_token_takes_a_few_microseconds(opened: Opened, name: str, stop: tuple[str, ...]) -> None:
    ours = opened(name)
    tokens = ours.encode(TEXT[:4000])[1:]
    times = []
    for _ in range(5):
        stream, start = ours.text_stream([1], stop), time.thread_time()
        for token in tokens:
            stream.push(token)
        times.append((time.thread_time() - start) / len(tokens))
    assert min(times) < 15e-6


def test_what_is_kept_of_tokens_is_bounded(opened: Opened) -> None:
    ours = opened("byte tokens")
    ours.decode(range(ours.size))
    assert ours._bytes.of.cache_info().currsize == text_module._KNOWN_TOKENS


def test_the_size_covers_added_tokens_and_holes(tmp_path: Path) -> None:
    tree = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 7}, "unk_token": "a"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    ours = Tokenizer.from_folder(tmp_path)
    assert (ours.size, len(json.loads(ours.json)["model"]["vocab"])) == (8, 2)


def test_a_stream_of_no_tokens_is_empty(opened: Opened) -> None:
    assert TextStream(opened("byte level").decoder([])).finish() == ""
