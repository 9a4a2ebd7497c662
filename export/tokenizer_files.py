"""Mistral's own tokenizer files → `tokenizer.json`, `tokenizer_config.json` and a chat template.

The runtime reads `tokenizer.json` alone, so SentencePiece files (`tokenizer.model`, `*.model.v3`) and
`tekken.json` are turned into one that gives mistral-common's ids. The text of a special token ("[INST]" or
"</s>" typed by a user) is such a token to the package `tokenizers`; the runtime sees to it that it is spelled
out, as by mistral-common.

Chat templates are made for v1, v2 and v3. The later formats (v7 on: system prompts, tools and thoughts as
tokens of their own) differ from model to model: they come from the folder's chat_template.jinja, or the
artifact takes prompts only and says so.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing

from mistral_trt.errors import CheckpointError
from mistral_trt.export.chat_templates import CHAT_TEMPLATES
from mistral_trt.export.mistral_tokenizer import SPECIAL_NAMES, VERSIONED, from_sentencepiece, from_tekken
from mistral_trt.export.text_parsing import parse_object, read_bytes, refusing, token_text

Files: TypeAlias = dict[str, bytes]
Added: TypeAlias = list[tuple[int, AddedToken]]

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SPECIAL_MAP = "special_tokens_map.json"

_PROBE = "A probe: 1 2  3\n\té漢😀"


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
    special = _special_tokens(owner / CONFIG, parse_object(owner / CONFIG, files.get(CONFIG, b"{}")))
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
    files = {name: read_bytes(folder / name) for name in (CONFIG, TEMPLATE) if (folder / name).is_file()}
    settings = parse_object(folder / CONFIG, files.get(CONFIG, b"{}"))
    _template_in(folder / CONFIG, settings)
    _special_tokens(folder / CONFIG, settings)
    with refusing(folder / TEMPLATE, "text in UTF-8"):
        files.get(TEMPLATE, b"").decode()
    source = _tokenizer_file(folder)
    if source is None:
        return files
    named = _special_tokens(folder / SPECIAL_MAP, _optional(folder / SPECIAL_MAP) | settings)
    if source.name == TOKENIZER:
        files[TOKENIZER] = read_bytes(source)
        _load(source, files[TOKENIZER])
    else:
        named = _make_tokenizer(folder, source, settings, named, files, remarks)
    if named.keys() - settings.keys():
        files[CONFIG] = (json.dumps({**named, **settings}, indent=2) + "\n").encode()
    return files


def _make_tokenizer(
    folder: Path,
    source: Path,
    settings: Mapping[str, Any],
    named: Mapping[str, str],
    files: Files,
    remarks: list[str],
) -> dict[str, str]:
    """Put a tokenizer made from `source`, and its chat template, into `files`; its special tokens."""
    unset = {name for name, value in settings.items() if value is None}
    with refusing(source, "a tokenizer of Mistral's"):
        if source.suffix == ".json":
            made = from_tekken(source, read_bytes(source))
        else:
            made = from_sentencepiece(source, read_bytes(source), first_only=settings.get("legacy") is False)
        _add(made.fast, folder, _added_tokens(folder))
        special = {name: token for name, token in {**made.special, **named}.items() if name not in unset}
        _add_ends(made.fast, source, special, settings)
        files[TOKENIZER] = made.fast.to_str().encode()
    remarks.append(f"{TOKENIZER} is made from {source} (Mistral's v{made.version})")
    if CONFIG not in files and TEMPLATE not in files:
        # A folder with a tokenizer_config.json is Hugging Face's, and says itself whether it can chat.
        if made.version in CHAT_TEMPLATES:
            files[TEMPLATE] = CHAT_TEMPLATES[made.version].encode()
        else:
            remarks.append(
                f"the chat format of v{made.version} is not known here, no {TEMPLATE} is made and the "
                f"artifact takes prompts, not messages; to chat, put the model's {TEMPLATE} into {folder}"
            )
    return special


def _tokenizer_file(folder: Path) -> Path | None:
    """The file that a folder's tokenizer comes from. Raises CheckpointError if it cannot be told."""
    for name in (TOKENIZER, "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    versioned = sorted(path for path in folder.glob("*.model.v*") if VERSIONED.search(path.name))
    if len({read_bytes(path) for path in versioned}) > 1:
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
        kept = _template_in(path, parse_object(path, files.get(CONFIG, b"{}")))
        if _template_in(path, parse_object(path, own[CONFIG])) is not None:
            merged.pop(TEMPLATE, None)
        elif kept is not None:
            merged.setdefault(TEMPLATE, kept.encode())
    return merged | own


def _added_tokens(folder: Path) -> Added:
    """Tokens that tokenizer_config.json or added_tokens.json adds, by id."""
    settings, also = _optional(folder / CONFIG), _optional(folder / "added_tokens.json")
    found: dict[str, tuple[int, AddedToken]] = {}
    with refusing(folder / CONFIG, "added_tokens_decoder to map ids to tokens"):
        for number, entry in (settings.get("added_tokens_decoder") or {}).items():
            flags = {name: bool(entry.get(name)) for name in ("special", "lstrip", "rstrip", "single_word")}
            found[token_text(entry)] = int(number), AddedToken(token_text(entry), normalized=False, **flags)
    with refusing(folder / "added_tokens.json", "tokens mapped to ids"):
        special: set[str] = set()
        for names in (_optional(folder / SPECIAL_MAP), settings):
            special |= {*_special_tokens(folder / SPECIAL_MAP, names).values()}
            special |= {token_text(token) for token in names.get("additional_special_tokens") or ()}
        for token, number in also.items():
            added = AddedToken(token_text(token), normalized=False, special=token in special)
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


def _load(path: Path, data: bytes) -> FastTokenizer:
    with refusing(path, "a tokenizer that the package `tokenizers` reads"):
        fast = FastTokenizer.from_str(data.decode())
        fast.no_padding()  # what a training left there is of no use, and may be long
        fast.no_truncation()
        fast.decode(fast.encode(_PROBE).ids)
        return fast


def _optional(path: Path) -> dict[str, Any]:
    return parse_object(path, read_bytes(path)) if path.is_file() else {}


def _special_tokens(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like as text; they are stored plain or as an object."""
    with refusing(path, "special tokens as text"):
        named = {name: settings[name] for name in SPECIAL_NAMES if settings.get(name) is not None}
        return {name: token_text(token) for name, token in named.items()}


def _template_in(path: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template that tokenizer_config.json holds, if it does."""
    with refusing(path, "chat_template as text, or a list of named ones"):
        template = settings.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return None if template is None else token_text(template)
