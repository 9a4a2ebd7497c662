"""SentencePiece model or tekken.json → a tokenizer of the package `tokenizers` with mistral-common's ids."""

import base64
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from mistral_trt.errors import CheckpointError, require
from mistral_trt.export.text_parsing import parse_object, refusing, token_text

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")

VERSIONED = re.compile(r"\.model\.v(\d+)(m\d+)?$")
"""How the names of SentencePiece files end that say Mistral's version of the tokenizer."""

_LONGEST_PIECE = 256
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""Special tokens of a tekken.json that lists none, as mistral-common has them up to v7."""


@dataclass(frozen=True)
class MadeTokenizer:
    """A tokenizer made from a file of Mistral's. special: its names under tokenizer_config.json's keys."""

    fast: FastTokenizer
    special: dict[str, str]
    version: int


# SentencePiece


def from_sentencepiece(path: Path, data: bytes, *, first_only: bool) -> MadeTokenizer:
    """A SentencePiece BPE model, checked against SentencePiece itself on a text of all its pieces."""
    proto, kinds = _read_sentencepiece(path, data)
    trainer, ids = proto.trainer_spec, {piece.piece: i for i, piece in enumerate(proto.pieces)}
    (unknown,) = kinds[_UNKNOWN]
    merges = _merges({piece.piece: -piece.score for piece in proto.pieces if piece.type == _NORMAL})
    fast = FastTokenizer(
        BPE(
            vocab=ids,
            merges=[pair for pair in merges if pair[0] in ids and pair[1] in ids],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
            ignore_merges=bool(kinds[_USER_DEFINED]),  # a split that is a piece as a whole is that piece
        )
    )
    blank = decoders.Replace("▁", " ")
    unknown_text = decoders.Replace(unknown, trainer.unk_surface)
    fast.decoder = decoders.Sequence(
        [unknown_text, blank, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _set_segments(fast, kinds[_USER_DEFINED], first_only=first_only)
    _compare(path, fast, data, proto, kinds)
    fast.add_special_tokens([AddedToken(piece, normalized=False) for piece in kinds[_CONTROL]])
    names = zip(("bos", "eos", "pad"), (trainer.bos_piece, trainer.eos_piece, trainer.pad_piece), strict=True)
    special = {f"{name}_token": piece for name, piece in names if piece in kinds[_CONTROL]}
    return MadeTokenizer(
        fast, special | {"unk_token": unknown}, _sentencepiece_version(path, kinds[_CONTROL])
    )


def _set_segments(fast: FastTokenizer, whole: Sequence[str], *, first_only: bool) -> None:
    """Start each segment between special tokens with a blank, as encoding them one by one does.

    whole: pieces that are never split nor merged.
    first_only: the start of the text alone, which is Hugging Face's `legacy: false`.
    """
    splits: list[pre_tokenizers.PreTokenizer] = []
    if first_only:
        splits.append(pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False))
    else:
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if whole:
        pattern = "|".join(re.escape(piece) for piece in sorted(whole, key=len, reverse=True))
        splits.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    if splits:
        fast.pre_tokenizer = pre_tokenizers.Sequence(splits)


def _read_sentencepiece(path: Path, data: bytes) -> tuple[Any, dict[int, list[str]]]:
    """The model, and its pieces by type. Raises CheckpointError for what has no exact counterpart."""
    module = require("sentencepiece.sentencepiece_model_pb2", "export")
    with refusing(path, "a SentencePiece model"):
        proto = module.ModelProto.FromString(data)
        kinds: dict[int, list[str]] = {kind: [] for kind in range(_NORMAL, _BYTE + 1)}
        for piece in proto.pieces:
            kinds[piece.type].append(piece.piece)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if not (proto.pieces and proto.HasField("trainer_spec") and proto.HasField("normalizer_spec")):
        raise CheckpointError(f"{path}: expected a SentencePiece model, found one that is cut short or empty")
    texts = [piece.piece for piece in proto.pieces]
    whole = kinds[_USER_DEFINED]
    for what, expected, found in (
        ("model type", "BPE", _MODEL_TYPES[trainer.model_type]),
        ("normalization", "identity", "another" if normalizer.precompiled_charsmap else "identity"),
        ("add_dummy_prefix", True, normalizer.add_dummy_prefix),
        ("remove_extra_whitespaces", False, normalizer.remove_extra_whitespaces),
        ("escape_whitespaces", True, normalizer.escape_whitespaces),
        ("treat_whitespace_as_suffix", False, trainer.treat_whitespace_as_suffix),
        ("unknown pieces", 1, len(kinds[_UNKNOWN])),
        ("unused pieces", 0, len(kinds[_UNUSED])),
        ("byte pieces", 256 if trainer.byte_fallback else 0, len(_BYTES & {*kinds[_BYTE]})),
        ("pieces given twice", 0, len(texts) - len(set(texts))),
        ("empty pieces", 0, texts.count("")),
        ("scores that are not finite", 0, sum(not math.isfinite(piece.score) for piece in proto.pieces)),
        ("pieces of over 256 characters", 0, sum(len(text) > _LONGEST_PIECE for text in texts)),
        ("user-defined pieces with blanks", 0, sum(bool(re.search(r"[\s▁]", piece)) for piece in whole)),
    ):
        if expected != found:
            raise CheckpointError(f"{path}: {what}: expected {expected}, found {found}; use a tokenizer.json")
    return proto, kinds


def _compare(
    path: Path, fast: FastTokenizer, data: bytes, proto: Any, kinds: Mapping[int, list[str]]
) -> None:
    """Raise CheckpointError unless SentencePiece itself gives the same ids.

    No text shows that of all texts: of pieces that share a score SentencePiece merges the leftmost first, BPE
    the one that comes first in its list. So only runs of blanks, which share theirs in all of Mistral's, may.
    """
    merged = [piece for piece in proto.pieces if piece.type == _NORMAL and len(piece.piece) > 1]
    scores = [piece.score for piece in merged if piece.piece.strip("▁")]
    pieces = sorted(piece.replace("▁", " ") for piece in kinds[_NORMAL] + kinds[_USER_DEFINED])
    random.Random(0).shuffle(pieces)
    texts = ["x".join(["", *(" " * n for n in range(40)), "".join(pieces)])]
    texts += [whole + piece for whole in kinds[_USER_DEFINED][:1] for piece in pieces]
    processor = require("sentencepiece", "export").SentencePieceProcessor(model_proto=data)
    shared = len(set(scores)) < len(scores)
    if shared or any(processor.encode(text) != fast.encode(text).ids for text in texts):
        raise CheckpointError(
            f"{path}: expected merges that give SentencePiece's own ids, found none (do pieces share a "
            "score?); use a folder with tokenizer.json"
        )


def _sentencepiece_version(path: Path, control: Sequence[str]) -> int:
    """Mistral's version by the file's name, or by the control pieces where the name is plain."""
    named = VERSIONED.search(path.name)
    found = 1 if "[INST]" not in control else 2 if "[PREFIX]" not in control else 3
    found = 7 if "[SYSTEM_PROMPT]" in control else found
    if named and (int(named[1]) == 1) != (found == 1):
        raise CheckpointError(f"{path}: expected the control pieces of v{named[1]}, found those of v{found}")
    return int(named[1]) if named else found


# BPE


def _merges(order: Mapping[str, float]) -> list[tuple[str, str]]:
    """The pair that each piece is made of, in order of preference.

    order: piece → rank or cost; the pair whose result is lowest merges first, the leftmost among equals.
    A piece comes about in one way only, whatever stands around it: nothing merged across its ends, or it
    would not be there, so what happened inside is what happens to the piece alone. Of equals (the runs of
    blanks) the longest goes first, which is SentencePiece's way of finishing the leftmost run.
    """
    pairs = ((cost, _last_pair(piece, order)) for piece, cost in order.items() if len(piece) > 1)
    found = [(cost, pair) for cost, pair in pairs if pair]
    return [pair for _, pair in sorted(found, key=lambda item: (item[0], -len(item[1][0])))]


def _last_pair(piece: str, order: Mapping[str, float]) -> tuple[str, str] | None:
    """What BPE has made of a piece just before it is whole; None if it never is."""
    parts = list(piece)
    while len(parts) > 2:
        costs = [order.get(a + b, math.inf) for a, b in pairwise(parts)]
        lowest = min(costs)
        if lowest == math.inf:
            return None
        i = costs.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


# tekken


def from_tekken(path: Path, data: bytes) -> MadeTokenizer:
    """A tekken.json: byte-level BPE, its special tokens first; a token's rank is that of its merge."""
    content = parse_object(path, data)
    with refusing(path, "config with pattern, version, default_vocab_size and default_num_special_tokens"):
        config, vocab = content["config"], content.get("vocab")
        version, pattern = int(config["version"].removeprefix("v")), Regex(config["pattern"])
        size, reserved = index(config["default_vocab_size"]), index(config["default_num_special_tokens"])
    words = _tekken_words(path, vocab, size - reserved)
    names = _tekken_special(path, content.get("special_tokens"), version, reserved)
    ids = {name: i for i, name in enumerate(names)} | {word: reserved + i for i, word in enumerate(words)}
    if len(ids) != len(names) + len(words):
        raise CheckpointError(f"{path}: expected {len(names) + len(words)} distinct tokens, found {len(ids)}")
    merges = _merges({word: rank for rank, word in enumerate(words)})
    fast = FastTokenizer(BPE(vocab=ids, merges=merges, ignore_merges=True))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    special = zip(SPECIAL_NAMES, ("<s>", "</s>", "<unk>", "<pad>"), strict=True)
    return MadeTokenizer(fast, {name: token for name, token in special if token in names}, version)


def _tekken_words(path: Path, vocab: Any, count: int) -> list[str]:
    """The first `count` tokens by rank, each byte spelled as a character the way byte-level BPE does."""
    if not isinstance(vocab, list) or not 256 <= count <= len(vocab):
        found = f"{len(vocab)} tokens" if isinstance(vocab, list) else type(vocab).__name__
        raise CheckpointError(f"{path}: vocab: expected at least {max(count, 256)} tokens, found {found}")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(256 + i) for i, byte in enumerate(others)}
    words = []
    for rank, entry in enumerate(vocab[:count]):
        with refusing(path, f"token {rank} with its rank and its bytes in base64"):
            word = base64.b64decode(entry["token_bytes"], validate=True)
            fits = 0 < len(word) <= _LONGEST_PIECE and (rank > 255 or word == bytes([rank]))
            if entry["rank"] != rank or not fits:
                raise ValueError(f"rank {entry['rank']!r}, bytes {word[:16]!r}")
            words.append(word.decode("latin-1").translate(spelling))
    return words


def _tekken_special(path: Path, listed: Any, version: int, count: int) -> list[str]:
    """The special tokens, filled up to `count` with <SPECIAL_i>."""
    if listed is None and version <= 7:
        names = list(_TEKKEN_SPECIAL)
    else:
        with refusing(path, "special_tokens with consecutive ranks"):
            if [entry["rank"] for entry in listed] != list(range(len(listed))):
                raise ValueError(f"{[entry['rank'] for entry in listed][:8]} …")
            names = [token_text(entry["token_str"]) for entry in listed]
    if not len(names) <= count <= 1 << 16:
        raise CheckpointError(f"{path}: expected {len(names)} to 65536 special tokens, found {count}")
    return names + [f"<SPECIAL_{i}>" for i in range(len(names), count)]
