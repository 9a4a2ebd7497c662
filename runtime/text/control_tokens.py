"""Text in which some special tokens are meant and others only mentioned → ids.

`tokenizers` turns the text of a special token into the token, whoever wrote it. Here a twin of the tokenizer
knows each special token under a random name. The tokens that are meant are written with these names, all else
is ordinary text to the twin, and both go through it in one call: so every other rule of the tokenizer (the
blank that starts a text, or each segment between special tokens) works as it always does. The twin's
vocabulary does not hold the usual names at all: no merge of ordinary text ends in the id of a special token.
"""

import json
import secrets
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeAlias

from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from mistral_trt.errors import GenerationError
from mistral_trt.runtime.text.chat import Rendering

Twin: TypeAlias = tuple[FastTokenizer, Mapping[int, str]]


@dataclass(frozen=True)
class Encoded:
    """Ids of a rendering. shifts: from which position of its text on the encoded text is how much longer."""

    ids: list[int]
    encoding: Encoding
    shifts: Sequence[tuple[int, int]] = ()

    def index_at(self, position: int) -> int | None:
        """The token before which `position` of the text lies; None if one lies, or may lie, across it.

        A tokenizer may leave blanks out of its offsets: then it is not known which token a blank is part of.
        """
        position += next((shift for start, shift in reversed(self.shifts) if start <= position), 0)
        offsets = self.encoding.offsets
        index = bisect_left(offsets, position, key=lambda offset: offset[0])
        return index if position == (offsets[index - 1][1] if index else 0) else None


class ControlTokens:
    """A tokenizer and its twin, which is made when it is first needed. Any thread may encode."""

    def __init__(self, fast: FastTokenizer, named: Iterable[str] = ()) -> None:
        """named: tokens that are special because tokenizer_config.json names them."""
        added, special = fast.get_added_tokens_decoder(), set(named)
        self._fast = fast
        self._texts = {
            token: entry.content
            for token, entry in added.items()
            if entry.special or entry.content in special
        }
        unknown = getattr(fast.model, "unk_token", None)
        self._unknown = unknown if unknown in self._texts.values() else None
        # Text that the vocabulary does not cover gives this token, so it does not tell who wrote it.
        self._telling = frozenset(token for token, text in self._texts.items() if text != self._unknown)
        self._ends = self._found(fast.encode(""))
        self._twin: Twin | None = None
        self._lock = Lock()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the tokens that always stand around one and no other special tokens."""
        encoding = encode(self._fast, text, add_special_tokens=True)
        if self._found(encoding) != self._ends or self._mentions_unknown([text]):
            encoding = encode(self._twinned()[0], text, add_special_tokens=True)
        return list(encoding.ids)

    def encode_rendering(self, rendering: Rendering) -> Encoded:
        """Ids of a conversation, in which the template's own special tokens are the only ones.

        Raises GenerationError where messages hold the text of one and cannot be told apart from the template.
        """
        encoding = encode(self._fast, rendering.text)
        outline = encode(self._fast, rendering.outline)
        if named := self._found(encode(self._fast, "\n".join(set(rendering.others)))):
            raise GenerationError(
                f"a message holds the text of the special token {self._texts[named[0]]!r} outside its "
                "content, where it cannot be told apart from what the chat template writes; remove it"
            )
        mentioned = self._found(encoding) != self._found(outline)
        if mentioned or self._mentions_unknown(rendering.contents):
            return self._encode_apart(rendering, outline)
        return Encoded(list(encoding.ids), encoding)

    def _found(self, encoding: Encoding) -> list[int]:
        return [token for token in encoding.ids if token in self._telling]

    def _mentions_unknown(self, texts: Iterable[str]) -> bool:
        return self._unknown is not None and any(self._unknown in text for text in texts)

    def _encode_apart(self, rendering: Rendering, outline: Encoding) -> Encoded:
        """Write the special tokens of the outline by their names in the twin, then fill the contents in."""
        if not rendering.told_apart:
            raise _indistinguishable()
        twin, names = self._twinned()
        marked, shifts, last, position, shift = "", [], 0, 0, 0
        for token, (start, stop) in zip(outline.ids, outline.offsets, strict=True):
            if token not in self._telling:
                continue
            text = self._texts[token]
            start = rendering.outline.find(text, start, stop)  # a token may have taken blanks around it
            if start < 0:
                raise _indistinguishable()
            between = rendering.outline[last:start]
            marked += between + names[token]
            last = start + len(text)
            position += len(rendering.fill(between)) + len(text)
            shift += len(names[token]) - len(text)
            shifts.append((position, shift))
        marked += rendering.outline[last:]
        encoding = encode(twin, rendering.fill(marked))
        # On the same conversation without its contents both must agree; with them, on the special tokens.
        agreed = encode(twin, marked).ids == outline.ids and self._found(encoding) == self._found(outline)
        if not agreed:
            raise _indistinguishable()
        return Encoded(list(encoding.ids), encoding, shifts)

    def _twinned(self) -> Twin:
        with self._lock:
            if self._twin is None:
                self._twin = _make_twin(self._fast, self._texts)
            return self._twin


def _indistinguishable() -> GenerationError:
    return GenerationError(
        "a message holds the text of a special token, and it cannot be told apart from what the chat "
        "template writes, because the template changes contents; remove it from the message"
    )


def encode(fast: FastTokenizer, text: str, *, add_special_tokens: bool = False) -> Encoding:
    """tokenizers' encoding. Raises GenerationError for what is no text."""
    try:
        return fast.encode(text, add_special_tokens=add_special_tokens)
    except TypeError as error:  # half a surrogate pair: what Python makes of bytes that are not UTF-8
        raise GenerationError("the prompt is not valid text (UTF-8)") from error


def _make_twin(fast: FastTokenizer, texts: Mapping[int, str]) -> Twin:
    """The same tokenizer with other names for `texts`, and these names by id."""
    nonce = secrets.token_hex(8)
    names = {token: f"<{nonce}-{token}>" for token in texts}
    renamed = {text: names[token] for token, text in texts.items()}
    tree: dict[str, Any] = json.loads(fast.to_str())
    model = tree["model"]
    for entry in tree["added_tokens"]:
        entry["content"] = renamed.get(entry["content"], entry["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed.get(piece, piece): token for piece, token in model["vocab"].items()}
    else:
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        merges = ((left, right) for left, right in model["merges"])
        model["merges"] = [pair for pair in merges if renamed.keys().isdisjoint([*pair, "".join(pair)])]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    try:
        twin = FastTokenizer.from_str(json.dumps(tree))
        if any(twin.token_to_id(name) != token for token, name in names.items()):
            raise ValueError("its special tokens get other ids under other names")
    except Exception as error:  # tokenizers raises plain Exception
        raise GenerationError(
            "with this tokenizer the text of special tokens cannot be kept apart from the tokens; remove it "
            f"from the prompt, or pass token ids: {error}"
        ) from error
    return twin, names
