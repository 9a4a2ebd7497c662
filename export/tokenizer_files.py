"""Mistral's own tokenizer files → `tokenizer.json`, `tokenizer_config.json` and a chat template.

The runtime reads `tokenizer.json` alone, so SentencePiece files (`tokenizer.model`, `*.model.v3`) and
`tekken.json` are turned into one that gives mistral-common's ids. One difference is known: the text of a
special token ("[INST]" or "</s>" typed by a user) becomes that token, where mistral-common spells it out.
"""

import base64
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from mistral_trt.errors import CheckpointError, MistralTrtError, require

Files: TypeAlias = dict[str, bytes]
Added: TypeAlias = list[tuple[int, AddedToken]]

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SPECIAL_MAP = "special_tokens_map.json"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")

_LIMIT_BYTES = 64 << 20
_LONGEST_PIECE = 256
_PROBE = "A probe: 1 2  3\n\té漢😀"
_VERSIONED = re.compile(r"\.model\.v(\d+)(m\d+)?$")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""Special tokens of a tekken.json that lists none, as mistral-common has them up to v7."""

# Refused is what mistral-common would join or move: two turns of one role, a system message further on.
_TURNS = """\
{%- if tools -%}{{- raise_exception('tools are not supported') -}}{%- endif -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}{%- set turns = messages -%}
{%- endif -%}
{%- if system is not string -%}{{- raise_exception('the system prompt must be text') -}}{%- endif -%}
{%- if turns | length % 2 == 0 -%}
  {{- raise_exception('expected user and assistant in turn, the user first and last') -}}
{%- endif -%}
<s>
{%- for turn in turns -%}
  {%- if turn['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('expected user and assistant in turn, found ' ~ turn['role']) -}}
  {%- elif turn['content'] is not string or turn['tool_calls'] -%}
    {{- raise_exception('expected text as content, and no tool calls') -}}
  {%- elif turn['role'] == 'user' -%}
    USER
  {%- elif turn['content'] == '' -%}
    {{- raise_exception('an answer must not be empty') -}}
  {%- else -%}
    ASSISTANT
  {%- endif -%}
{%- endfor -%}
"""


def _template(user: str, assistant: str) -> str:
    return _TURNS.replace("USER", user).replace("ASSISTANT", assistant)


# v1 has no token between [/INST] and the answer: the blank is the one that starts every SentencePiece text.
_TEMPLATE_V1 = _template(
    "{{- '[INST] ' ~ (system ~ '\\n\\n' if system and loop.first else '') ~ turn['content'] ~ ' [/INST]' -}}",
    "{{- ' ' ~ turn['content'] ~ '</s>' -}}",
)
_TEMPLATE_V2 = _template(
    "{{- '[INST]' ~ (system ~ '\\n\\n' if system and loop.last else '') ~ turn['content'] ~ '[/INST]' -}}",
    "{{- turn['content'].rstrip(' ') ~ '</s>' -}}",
)
CHAT_TEMPLATES = {1: _TEMPLATE_V1, 2: _TEMPLATE_V2, 3: _TEMPLATE_V2}
"""By version of mistral-common's tokenizers; v2 and v3 differ in tools only. Later ones are not made."""


@dataclass(frozen=True)
class TextFiles:
    """What travels with an artifact: file name → content.

    files: none, or tokenizer.json with tokenizer_config.json and chat_template.jinja where there are such.
    remarks: lines to say aloud.  bos_token_id, eos_token_ids: what the tokenizer's own files say.
    """

    files: Mapping[str, bytes]
    remarks: tuple[str, ...]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class _Made:
    """A tokenizer made from a file of Mistral's. special: its names under tokenizer_config.json's keys."""

    fast: FastTokenizer
    special: dict[str, str]
    version: int


def read_text_files(folders: Sequence[Path], *, vocab_size: int) -> TextFiles:
    """Tokenizer, its settings and chat template of a checkpoint, or of the adapters that go on top of it.

    folders: the checkpoint's, then each adapter's in order; what an adapter brings wins.
    Raises CheckpointError for files that are damaged or not supported, and for adapters that disagree.
    """
    base, *adapters = folders
    remarks: list[str] = []
    files, owner = _read_folder(base, remarks), base
    for adapter in adapters:
        own = _read_folder(adapter, remarks)
        if TOKENIZER not in own or _same_tokenizer(files, own):
            owner = adapter if TOKENIZER in own else owner
            files = _with_settings(files, own, adapter, remarks)
        elif owner != base:
            raise CheckpointError(f"{adapter}: expected the tokenizer of {owner}, found another one")
        else:
            files, owner = own, adapter
            remarks.append(f"{_tokenizer_file(adapter)} replaces the checkpoint's")
    if TOKENIZER not in files:
        remarks.append(f"{base} has no tokenizer: the artifact will take token ids, not text")
        return TextFiles({}, tuple(remarks), None, ())
    fast = _load(owner / TOKENIZER, files[TOKENIZER])
    for adapter in (folder for folder in adapters if _tokenizer_file(folder) is None):
        if _add(fast, adapter, _added_tokens(adapter)):
            files[TOKENIZER] = fast.to_str().encode()
    remarks += _beyond(fast, vocab_size)
    special = _special_tokens(owner / CONFIG, _object(owner / CONFIG, files.get(CONFIG, b"{}")))
    bos, eos = (fast.token_to_id(special.get(name, "")) for name in ("bos_token", "eos_token"))
    return TextFiles(files, tuple(remarks), bos, () if eos is None else (eos,))


def _beyond(fast: FastTokenizer, vocab_size: int) -> list[str]:
    beyond = sorted((i, token) for token, i in fast.get_vocab().items() if i >= vocab_size)
    if not beyond:
        return []
    (first, token), count = beyond[0], len(beyond)
    return [
        f"{count} token{'s' * (count > 1)} of the tokenizer (first: {token!r} = {first}) "
        f"lie{'s' * (count == 1)} beyond the model's vocabulary of {vocab_size} and cannot be fed"
    ]


# One folder


def _read_folder(folder: Path, remarks: list[str]) -> Files:
    """The folder's own text files, with tokenizer.json made where it has another kind of tokenizer."""
    files = {name: _read(folder / name) for name in (CONFIG, TEMPLATE) if (folder / name).is_file()}
    settings = _object(folder / CONFIG, files.get(CONFIG, b"{}"))
    _template_in(folder / CONFIG, settings)
    _special_tokens(folder / CONFIG, settings)
    with _refusing(folder / TEMPLATE, "text in UTF-8"):
        files.get(TEMPLATE, b"").decode()
    source = _tokenizer_file(folder)
    if source is None:
        return files
    if source.name == TOKENIZER:
        files[TOKENIZER] = _read(source)
        _load(source, files[TOKENIZER])
        return files
    unset = {name for name, value in settings.items() if value is None}
    with _refusing(source, "a tokenizer of Mistral's"):
        if source.suffix == ".json":
            made = _from_tekken(source, _read(source))
        else:
            made = _from_sentencepiece(source, _read(source), first_only=settings.get("legacy") is False)
        _add(made.fast, folder, _added_tokens(folder))
        named = _special_tokens(folder / SPECIAL_MAP, _optional(folder / SPECIAL_MAP) | settings)
        special = {name: token for name, token in (made.special | named).items() if name not in unset}
        _add_ends(made.fast, source, special, settings)
        files[TOKENIZER] = made.fast.to_str().encode()
    remarks.append(f"{TOKENIZER} is made from {source} (Mistral's v{made.version})")
    if CONFIG not in files and TEMPLATE not in files:
        # A folder with a tokenizer_config.json is Hugging Face's, and says itself whether it can chat.
        if made.version in CHAT_TEMPLATES:
            files[TEMPLATE] = CHAT_TEMPLATES[made.version].encode()
        else:
            remarks.append(f"the chat format of v{made.version} is not known here: no {TEMPLATE} is made")
    if special.keys() - settings.keys():
        files[CONFIG] = (json.dumps({**special, **settings}, indent=2) + "\n").encode()
    return files


def _tokenizer_file(folder: Path) -> Path | None:
    """The file that a folder's tokenizer comes from. Raises CheckpointError if it cannot be told."""
    for name in (TOKENIZER, "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    versioned = sorted(path for path in folder.glob("*.model.v*") if _VERSIONED.search(path.name))
    if len({_read(path) for path in versioned}) > 1:
        names = ", ".join(path.name for path in versioned)
        raise CheckpointError(f"{folder}: expected one SentencePiece file, found {names}; remove all but one")
    if versioned:
        return versioned[0]
    return folder / "tekken.json" if (folder / "tekken.json").is_file() else None


def _add_ends(
    fast: FastTokenizer, source: Path, special: Mapping[str, str], settings: Mapping[str, Any]
) -> None:
    """Put bos and eos around a text as tokenizer_config.json asks, by default bos."""
    bos = [special["bos_token"]] if settings.get("add_bos_token", True) and "bos_token" in special else []
    eos = [special["eos_token"]] if settings.get("add_eos_token", False) and "eos_token" in special else []
    for token in bos + eos:
        if fast.token_to_id(token) is None:
            raise CheckpointError(f"{source}: expected the token {token!r} that its folder names, found none")
    if bos or eos:
        fast.post_processor = TemplateProcessing(
            single=[*(f"{token}:0" for token in bos), "$A:0", *(f"{token}:0" for token in eos)],
            special_tokens=[(token, fast.token_to_id(token)) for token in dict.fromkeys(bos + eos)],
        )


# Adapters


def _same_tokenizer(files: Files, own: Files) -> bool:
    """Whether two tokenizer.json hold the same, but for how a training cut and padded its texts."""
    trees = [json.loads(data[TOKENIZER]) for data in (files, own) if TOKENIZER in data]
    return len(trees) == 2 and all(
        trees[0].get(key) == trees[1].get(key) for key in {*trees[0], *trees[1]} - {"padding", "truncation"}
    )


def _with_settings(files: Files, own: Files, adapter: Path, remarks: list[str]) -> Files:
    """An adapter's settings and template over the checkpoint's; a template that it lacks is kept."""
    own = {name: data for name, data in own.items() if name != TOKENIZER and data != files.get(name)}
    remarks += [f"{adapter / name} replaces the checkpoint's" for name in own]
    merged = dict(files)
    if CONFIG in own:
        path = adapter / CONFIG
        kept = _template_in(path, _object(path, files.get(CONFIG, b"{}")))
        if _template_in(path, _object(path, own[CONFIG])) is not None:
            merged.pop(TEMPLATE, None)
        elif kept is not None:
            merged.setdefault(TEMPLATE, kept.encode())
    return merged | own


def _added_tokens(folder: Path) -> Added:
    """Tokens that tokenizer_config.json or added_tokens.json adds, by id."""
    settings, also = _optional(folder / CONFIG), _optional(folder / "added_tokens.json")
    found: dict[str, tuple[int, AddedToken]] = {}
    with _refusing(folder / CONFIG, "added_tokens_decoder to map ids to tokens"):
        for number, entry in (settings.get("added_tokens_decoder") or {}).items():
            flags = {name: bool(entry.get(name)) for name in ("special", "lstrip", "rstrip", "single_word")}
            found[_text(entry)] = int(number), AddedToken(_text(entry), normalized=False, **flags)
    with _refusing(folder / "added_tokens.json", "tokens mapped to ids"):
        special: set[str] = set()
        for names in (_optional(folder / SPECIAL_MAP), settings):
            special |= {*_special_tokens(folder / SPECIAL_MAP, names).values()}
            special |= {_text(token) for token in names.get("additional_special_tokens") or ()}
        for token, number in also.items():
            added = AddedToken(_text(token), normalized=False, special=token in special)
            found.setdefault(token, (int(number), added))
    return sorted(found.values(), key=lambda pair: pair[0])


def _add(fast: FastTokenizer, folder: Path, added: Added) -> bool:
    """Add tokens; whether one was new. Raises CheckpointError unless each is there or gets the next id."""
    size = fast.get_vocab_size()
    for number, token in added:
        fast.add_tokens([token])
        if fast.token_to_id(token.content) != number:
            raise CheckpointError(
                f"{folder}: {CONFIG} or added_tokens.json: expected the token {token.content!r} at id "
                f"{fast.token_to_id(token.content)}, found it at {number}"
            )
    return fast.get_vocab_size() > size


# SentencePiece


def _from_sentencepiece(path: Path, data: bytes, *, first_only: bool) -> _Made:
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
    _compare(path, fast, data, kinds)
    fast.add_special_tokens([AddedToken(piece, normalized=False) for piece in kinds[_CONTROL]])
    names = zip(("bos", "eos", "pad"), (trainer.bos_piece, trainer.eos_piece, trainer.pad_piece), strict=True)
    special = {f"{name}_token": piece for name, piece in names if piece in kinds[_CONTROL]}
    return _Made(fast, special | {"unk_token": unknown}, _sentencepiece_version(path, kinds[_CONTROL]))


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
    with _refusing(path, "a SentencePiece model"):
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


def _compare(path: Path, fast: FastTokenizer, data: bytes, kinds: Mapping[int, list[str]]) -> None:
    """Raise CheckpointError unless SentencePiece itself gives the same ids."""
    pieces = sorted(piece.replace("▁", " ") for piece in kinds[_NORMAL] + kinds[_USER_DEFINED])
    random.Random(0).shuffle(pieces)
    texts = ["x".join(["", *(" " * n for n in range(40)), "".join(pieces)])]
    texts += [whole + piece for whole in kinds[_USER_DEFINED][:1] for piece in pieces]
    processor = require("sentencepiece", "export").SentencePieceProcessor(model_proto=data)
    if any(processor.encode(text) != fast.encode(text).ids for text in texts):
        raise CheckpointError(
            f"{path}: expected merges that give SentencePiece's own ids, found none (do pieces share a "
            f"score?); use a folder with {TOKENIZER}"
        )


def _sentencepiece_version(path: Path, control: Sequence[str]) -> int:
    """Mistral's version by the file's name, or by the control pieces where the name is plain."""
    named = _VERSIONED.search(path.name)
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


def _from_tekken(path: Path, data: bytes) -> _Made:
    """A tekken.json: byte-level BPE, its special tokens first; a token's rank is that of its merge."""
    content = _object(path, data)
    with _refusing(path, "config with pattern, version, default_vocab_size and default_num_special_tokens"):
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
    return _Made(fast, {name: token for name, token in special if token in names}, version)


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
        with _refusing(path, f"token {rank} with its rank and its bytes in base64"):
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
        with _refusing(path, "special_tokens with consecutive ranks"):
            if [entry["rank"] for entry in listed] != list(range(len(listed))):
                raise ValueError(f"{[entry['rank'] for entry in listed][:8]} …")
            names = [_text(entry["token_str"]) for entry in listed]
    if not len(names) <= count <= 1 << 16:
        raise CheckpointError(f"{path}: expected {len(names)} to 65536 special tokens, found {count}")
    return names + [f"<SPECIAL_{i}>" for i in range(len(names), count)]


# Files


@contextmanager
def _refusing(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever a parser raises into a CheckpointError that names the file."""
    try:
        yield
    except (MistralTrtError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's
            raise
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise CheckpointError(f"{path}: expected {expected}, found {found}") from error


def _read(path: Path) -> bytes:
    with _refusing(path, "a file that can be read"):
        size = path.stat().st_size
        if size > _LIMIT_BYTES:
            raise CheckpointError(f"{path}: expected at most {_LIMIT_BYTES} bytes, found {size}")
        return path.read_bytes()


def _load(path: Path, data: bytes) -> FastTokenizer:
    with _refusing(path, "a tokenizer that the package `tokenizers` reads"):
        fast = FastTokenizer.from_str(data.decode())
        fast.no_padding()  # what a training left there is of no use, and may be long
        fast.no_truncation()
        fast.decode(fast.encode(_PROBE).ids)
        return fast


def _optional(path: Path) -> dict[str, Any]:
    return _object(path, _read(path)) if path.is_file() else {}


def _object(path: Path, data: bytes) -> dict[str, Any]:
    with _refusing(path, "a JSON object"):
        content = json.loads(data.decode())
        if not isinstance(content, dict):
            raise TypeError(f"{type(content).__name__}")
        return content


def _special_tokens(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like as text; they are stored plain or as an object."""
    with _refusing(path, "special tokens as text"):
        named = {name: settings[name] for name in SPECIAL_NAMES if settings.get(name) is not None}
        return {name: _text(token) for name, token in named.items()}


def _text(token: Any) -> str:
    """Text, plain or in a token's object. Raises TypeError or ValueError if it cannot be written."""
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TypeError(f"{text!r:.40} is no text")
    return text.encode().decode()


def _template_in(path: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template that tokenizer_config.json holds, if it does."""
    with _refusing(path, "chat_template as text, or a list of named ones"):
        template = settings.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return None if template is None else _text(template)
