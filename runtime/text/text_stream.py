"""Token ids, one by one → text that is always valid UTF-8 and ends before the first stop string.

A token is bytes, not text: a character may be split over several. `TokenBytes` knows the bytes of each token,
`StreamDecoder` makes characters of them as they become whole, and `TextStream` holds back what may still turn
out to be a stop string.

Bytes that are no UTF-8 become U+FFFD, as in the tokenizer's own decoding: with a byte-level vocabulary one
for each broken character, with byte tokens (<0xE6>) one for each byte. There is one difference to
`tokenizers`: it gives up a whole run of byte tokens if any of them is wrong, characters included that a
stream has already given out. Here, as in SentencePiece itself, only the wrong bytes are replaced.
"""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from tokenizers import Tokenizer as FastTokenizer

from mistral_trt.errors import GenerationError

_PROBE = "A probe: of words,  1 2  3\n\té漢😀"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_KNOWN_TOKENS = 1 << 13


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("mistral_trt.each_byte", _replace_each_byte)


class TokenBytes:
    """The bytes of each token in the middle of a text. Raises ValueError for a decoder that has none.

    errors: how codecs are to treat bytes that are no UTF-8.  strips_blank: whether the blank that starts the
    first token is no part of the text.
    """

    def __init__(self, fast: FastTokenizer) -> None:
        decoder = json.loads(fast.decoder.__getstate__()) if fast.decoder is not None else {}
        kinds = {decoder.get("type"), *(inner["type"] for inner in decoder.get("decoders", ()))}
        self._fast = fast
        self._alphabet = _byte_level_alphabet() if "ByteLevel" in kinds else None
        self._byte_tokens = "ByteFallback" in kinds
        self.errors = "mistral_trt.each_byte" if self._byte_tokens else "replace"
        added = fast.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        self.of = lru_cache(maxsize=_KNOWN_TOKENS)(self._read)
        """of(token) -> its bytes; none for special tokens and for ids that are no token."""
        self._check()

    def _check(self) -> None:
        """Find what comes first in a text, and that joined bytes are what the tokenizer itself decodes."""
        ids = self._fast.encode(_PROBE, add_special_tokens=False).ids
        plain = [token for token in ids if self._fast.decode([token]).isalpha()]
        self._anchor, self._anchor_text = plain[:1], self._fast.decode(plain[:1])
        spaced = [token for token in ids if re.fullmatch(rb" \w+", self.of(token))]
        self.strips_blank = bool(spaced) and not self._fast.decode(spaced[:1]).startswith(" ")
        expected = self._fast.decode(ids)
        if self.decode(ids) != expected:
            raise ValueError(
                "expected a decoder that gives each token a text of its own, found one that gives "
                f"{expected!r} for tokens that are {self.decode(ids)!r} one by one"
            )

    def _read(self, token: int) -> bytes:
        text = self._fast.id_to_token(token)
        if text is None or token in self._special:
            return b""
        if self._alphabet is not None:
            known = [self._alphabet.get(character) for character in text]
            whole = [byte for byte in known if byte is not None]
            return bytes(whole) if len(whole) == len(known) else text.encode()
        if self._byte_tokens and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        return self._fast.decode([*self._anchor, token]).removeprefix(self._anchor_text).encode()

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, special ones left out."""
        data = b"".join(map(self.of, tokens))
        return self.without_first_blank(data).decode("utf-8", self.errors)

    def without_first_blank(self, data: bytes) -> bytes:
        return data[1:] if self.strips_blank and data[:1] == b" " else data


def _byte_level_alphabet() -> dict[str, int]:
    """Character → the byte that it stands for in byte-level vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class StreamDecoder:
    """Tokens that follow a prompt → pieces of text that join to their whole text."""

    def __init__(self, token_bytes: TokenBytes, prompt: Sequence[int]) -> None:
        self._of = token_bytes.of
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(token_bytes.errors)
        self._started = any(self._of(token) for token in prompt)
        # A prompt of ids may end inside a character; its last four tokens hold all of that.
        self._utf8.decode(b"".join(self._of(token) for token in prompt[-4:]))

    def push(self, token: int) -> str:
        """The characters that this token makes whole."""
        data = self._of(token)
        if not self._started and data:
            self._started = True
            data = self._token_bytes.without_first_blank(data)
        return self._utf8.decode(data)

    def finish(self) -> str:
        """U+FFFD for a character that is not whole at the end, as decoding all tokens at once gives."""
        return self._utf8.decode(b"", True)


class TextStream:
    """Tokens that follow a prompt → pieces of text, up to the first stop string.

    stop: the first is the one that is complete first; of several complete at the same character, the longest:
    so where the text is cut does not depend on how it is split into tokens. Text is held back only while a
    stop string may still come of it.
    stopped: the stop string that came up, after which there is no more text.
    """

    def __init__(self, decoder: StreamDecoder, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise GenerationError(f"stop: expected texts of at least one character, found {stop!r}")
        self.stopped: str | None = None
        self._decoder = decoder
        self._searches = [_Search(text) for text in sorted(set(stop), key=len, reverse=True)]
        self._held = ""

    def push(self, token: int) -> str:
        """The text that this token adds; nothing while it is held back, and after a stop string."""
        text = self._decoder.push(token)
        return self._pass(text) if self._searches else text

    def finish(self) -> str:
        """What was still held back, at the end of the tokens."""
        text = self._decoder.finish()
        if not self._searches:
            return text
        text = self._pass(text) + self._held
        self._held = ""
        return text

    def _pass(self, text: str) -> str:
        """Take in new text and give out what no stop string can begin with any more."""
        if self.stopped is not None:
            return ""
        held = len(self._held)
        for index, character in enumerate(text, 1):
            for search in self._searches:  # the longest first
                if search.step(character):
                    self.stopped = search.text
                    whole, self._held = self._held + text, ""
                    return whole[: held + index - len(search.text)]
        whole = self._held + text
        out = len(whole) - max(search.matched for search in self._searches)
        self._held = whole[out:]
        return whole[:out]


class _Search:
    """Knuth, Morris and Pratt's search for one text. matched: how much of it the text so far ends with."""

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        self._shorter = [0, 0]  # matched → the next shorter part of `text` that the text so far ends with
        for character in text[1:]:
            length = self._shorter[-1]
            while length and text[length] != character:
                length = self._shorter[length]
            self._shorter.append(length + (text[length] == character))

    def step(self, character: str) -> bool:
        """Take the next character; whether the text is complete."""
        matched, text = self.matched, self.text
        while matched and text[matched] != character:
            matched = self._shorter[matched]
        self.matched = matched + (text[matched] == character)
        return self.matched == len(text)
