"""PEFT LoRA adapter folders → updates and replacements of decoder weights.

The reference is peft 0.21.2: the weights are those of its `merge_and_unload`. Where that does not give the
model that was trained (LoRA on tied embeddings), the adapter is refused. No code from the folder runs.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch

from mistral_trt.errors import CheckpointError, ConfigError
from mistral_trt.export.conversion import LowRankUpdate, Weight, pieces
from mistral_trt.export.identity import clean_name, files_sha256
from mistral_trt.export.lora_config import LINEAR, LoraSettings
from mistral_trt.export.tensor_files import DTYPES, StoredTensor, read_header
from mistral_trt.progress import note

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "added_tokens.json",
    "tokenizer.model",
    "special_tokens_map.json",
)
"""Files beside an adapter that can change what text becomes."""

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_NORM = re.compile(r"model\.(?:norm|layers\.(?:0|[1-9][0-9]*)\.(?:input|post_attention)_layernorm)")
_MODULE = re.compile(rf"{LINEAR}|{_NORM.pattern}|model\.embed_tokens|lm_head")
_PREFIX = "base_model.model."
_DEFAULT = re.compile(r"^(\.lora_[AB]|\.lora_embedding_[AB]|\.modules_to_save)\.default(?=\.|$)")
_LINEAR_PAIR = (".lora_B.weight", ".lora_A.weight")
_EMBEDDING_PAIR = (".lora_embedding_A", ".lora_embedding_B")
_COPIES = (".original_module.weight", ".modules_to_save.weight")
"""What peft writes beside `.weight` of a module to save when the embedding was resized, and does not read."""
_PARTS = frozenset({".weight", ".base_layer.weight", *_LINEAR_PAIR, *_EMBEDDING_PAIR, *_COPIES})


def parse_lora(text: str) -> tuple[Path, float]:
    """DIR → scale 1; DIR:0.5 → 0.5, unless a folder of that whole name exists.

    Raises ConfigError for a scale that is not finite.
    """
    head, _, tail = text.rpartition(":")
    if not head or Path(text).is_dir() or not Path(head).is_dir():
        return Path(text), 1.0
    try:
        scale = float(tail)
    except ValueError:
        return Path(text), 1.0
    _require_finite(scale, text)
    return Path(head), scale


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: changes by the weight's Hugging Face name, `scale` multiplied into the updates.

    replacements: whole new tensors, from `modules_to_save` or saved with embeddings.
    """

    folder: Path
    scale: float
    updates: Mapping[str, LowRankUpdate]
    replacements: Mapping[str, StoredTensor]
    settings: LoraSettings

    @classmethod
    def open(cls, folder: Path, scale: float = 1.0) -> "Adapter":
        """Read `adapter_config.json` and the header of `adapter_model.safetensors`.

        Raises ConfigError for an adapter that is not supported, CheckpointError for missing, surplus, damaged
        or misshapen tensors.
        """
        _require_finite(scale, str(folder))
        _require_files(folder)
        settings, path = LoraSettings.read(folder / CONFIG_NAME), folder / WEIGHTS_NAME
        updates, replacements = {}, {}
        for module, parts in _by_module(path).items():
            update = _update(path, settings, module, parts, scale)
            replacement = _replacement(path, settings, module, parts, updated=update is not None)
            if update is not None:
                updates[f"{module}.weight"] = update
            if replacement is not None:
                replacements[f"{module}.weight"] = replacement
        if not updates and not replacements:
            raise CheckpointError(
                f"{path} holds no tensors; expected lora_A and lora_B of every target module"
            )
        unclear = [name for name in updates if len(settings.alphas(name.removesuffix(".weight"))) > 1]
        if unclear:
            note(
                f"{folder / CONFIG_NAME}: more than one alpha_pattern matches {unclear[0]}; the first "
                "counts, as in peft, but peft sorts them when it saves: training may have used another"
            )
        return cls(folder, scale, updates, replacements, settings)

    @property
    def name(self) -> str:
        """Name for output folders; a hub cache's snapshot is named after its repository."""
        folder = self.folder.resolve()
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return clean_name(folder.parent.parent.name.split("--")[-1])
        return clean_name(folder.name)

    def sha256(self) -> str:
        """Identity: the hash over name and SHA-256 of every file that can change an export."""
        paths = [self.folder / name for name in (CONFIG_NAME, WEIGHTS_NAME, *TEXT_FILES)]
        return files_sha256(path for path in paths if path.is_file())


def adapters_sha256(adapters: Iterable[Adapter]) -> str:
    """Identity of what is merged: the adapters' hashes and scales, in their order."""
    digest = hashlib.sha256()
    for adapter in adapters:
        digest.update(f"{adapter.sha256()} {float(adapter.scale)!r}\n".encode())
    return digest.hexdigest()


def apply_adapters(
    weights: Mapping[str, Weight], adapters: Sequence[Adapter], *, tied: bool
) -> dict[str, Weight]:
    """The weights with the adapters' replacements, then their updates in the order of the adapters.

    tied: there is no lm_head.weight, the embedding serves as both. New embeddings may have more rows than
    the old ones; the caller holds them against vocab_size.
    Raises CheckpointError or ConfigError for an adapter that does not fit these weights or another adapter.
    """
    changes = [_replaced(adapter, weights, tied=tied) for adapter in adapters]
    _refuse_conflicts(adapters, changes)
    result = dict(weights)
    for adapter, new in zip(adapters, changes, strict=True):
        _require_complete(adapter, [*weights, f"{_HEAD}.weight"] if tied else weights)
        result |= {name: Weight(name, tensor) for name, tensor in new.items()}
    for adapter in adapters:
        for name, update in adapter.updates.items():
            weight = result.get(name)
            _require_fit(adapter, name, update, weight.shape if weight else None)
            result[name] = replace(result[name], updates=(*result[name].updates, update))
    return result


def _require_finite(scale: float, text: str) -> None:
    if not math.isfinite(scale):
        raise ConfigError(f"{text}: the scale of an adapter must be a finite number, found {scale}")


def _require_files(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; expected {CONFIG_NAME} and {WEIGHTS_NAME} in one (from the hub: "
            "download it with: hf download ORGANISATION/NAME --local-dir DIR)"
        )
    if not (folder / CONFIG_NAME).is_file():
        inner = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
        if inner:
            raise CheckpointError(f"{folder} has no {CONFIG_NAME}, but {inner[0]} has; pass that")
        if (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} is a whole model, not an adapter; pass it as the checkpoint")
        raise CheckpointError(f"{folder} has no {CONFIG_NAME}; expected a folder written by peft")
    if (folder / WEIGHTS_NAME).is_file():
        return
    if any(folder.glob("adapter_model*.safetensors*")):
        raise CheckpointError(f"{folder} holds its weights in several files; expected one, {WEIGHTS_NAME}")
    if any(folder.glob("adapter_model*.bin")):
        raise CheckpointError(
            f"{folder} holds pickled weights, which can run code; convert them with: python -c "
            '"import torch; from safetensors.torch import save_file; '
            f"w = torch.load('{folder}/adapter_model.bin', map_location='cpu', weights_only=True); "
            f"save_file({{k: v.clone().contiguous() for k, v in w.items()}}, '{folder / WEIGHTS_NAME}')\""
        )
    raise CheckpointError(f"{folder} has no {WEIGHTS_NAME}; download or save the adapter again")


def _by_module(path: Path) -> dict[str, dict[str, StoredTensor]]:
    """The file's tensors by module, then by what follows the module's name."""
    found: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in read_header(path).items():
        rest = name.removeprefix(_PREFIX)
        module = _MODULE.match(rest)
        part = _DEFAULT.sub(r"\1", rest[module.end() :]) if module else ""
        if module is None or rest == name or part not in _PARTS:
            raise CheckpointError(
                f"{path} holds {name!r}; expected {_PREFIX}MODULE.lora_A.weight and the like, for a "
                "Mistral decoder's modules: pass an adapter that was trained on one"
            )
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{path}: {name!r} is {tensor.dtype}; expected {', '.join(DTYPES.values())}: save it so"
            )
        if part in found.setdefault(module[0], {}):
            raise CheckpointError(
                f"{path} holds {name!r} and {found[module[0]][part].name!r}, which are the same"
            )
        found[module[0]][part] = tensor
    return found


def _update(
    path: Path, settings: LoraSettings, module: str, parts: Mapping[str, StoredTensor], scale: float
) -> LowRankUpdate | None:
    embedding = module == _EMBEDDING
    pair = _EMBEDDING_PAIR if embedding else _LINEAR_PAIR
    given = [part for part in (*_LINEAR_PAIR, *_EMBEDDING_PAIR) if part in parts]
    if not given:
        return None
    if _NORM.fullmatch(module) or not set(given) <= set(pair):
        raise CheckpointError(f"{path} holds {parts[given[0]].name!r}; expected none: there is no such LoRA")
    if len(given) == 1:
        absent = next(part for part in pair if part not in given)
        raise CheckpointError(f"{path} holds {parts[given[0]].name!r}; expected {module}{absent} with it")
    if not settings.targets(module):
        if module == _HEAD and settings.ensure_weight_tying:
            raise ConfigError(
                f"{path} holds a LoRA of tied embeddings (ensure_weight_tying), which peft's merge adds "
                "twice; expected one of a base model with tie_word_embeddings false: train it on that"
            )
        raise CheckpointError(
            f"{path} holds {parts[given[0]].name!r}, but {CONFIG_NAME} does not target {module}; expected "
            "both files from one training: save the adapter again"
        )
    left, right = (parts[part] for part in pair)
    rank, factor = settings.rank(module), scale * settings.factor(module)
    for tensor, axis in ((left, 0 if embedding else 1), (right, 1 if embedding else 0)):
        if len(tensor.shape) != 2 or tensor.shape[axis] != rank:
            expected = f"[{rank}, ...]" if axis == 0 else f"[..., {rank}]"
            raise CheckpointError(
                f"{path}: {tensor.name!r} has shape {list(tensor.shape)}; expected {expected}, the rank that "
                f"{CONFIG_NAME} gives {module}"
            )
    if not math.isfinite(factor):
        raise ConfigError(
            f"{path.parent}: lora_alpha, r and scale give {module} a factor of {factor}; expected it finite"
        )
    return LowRankUpdate(left, right, factor, transposed=embedding)


def _replacement(
    path: Path, settings: LoraSettings, module: str, parts: Mapping[str, StoredTensor], *, updated: bool
) -> StoredTensor | None:
    """The whole new tensor: `.weight`; `.base_layer.weight` below an update of the embedding or the head."""
    saved, outer = settings.saves(module), module in (_EMBEDDING, _HEAD)
    allowed = set(_COPIES) if saved and ".weight" in parts else set()
    if updated:
        allowed |= {*_LINEAR_PAIR, *_EMBEDDING_PAIR} | ({".base_layer.weight"} if outer else set())
    elif saved or outer:
        allowed.add(".weight")
    surplus = sorted(set(parts) - allowed)
    if surplus:
        raise CheckpointError(
            f"{path} holds {parts[surplus[0]].name!r}; expected none: {CONFIG_NAME} does not name it"
        )
    return parts.get(".base_layer.weight" if updated else ".weight")


def _replaced(adapter: Adapter, weights: Mapping[str, Weight], *, tied: bool) -> dict[str, StoredTensor]:
    """The replacements that differ from the base model's tensors, checked against those.

    Peft saves the embedding along with its LoRA, usually as it was: that counts as no replacement.
    """
    embedding, head = f"{_EMBEDDING}.weight", f"{_HEAD}.weight"
    new = {}
    for name, tensor in adapter.replacements.items():
        base = weights.get(embedding if tied and name == head else name)
        if base is None:
            _refuse_base(adapter, f"{tensor.name!r} is for {name}, which the base model does not have")
        rows, base_rows = tensor.shape[:1], base.shape[:1]
        grown = name in (embedding, head) and rows > base_rows
        if tensor.shape[1:] != base.shape[1:] or (rows != base_rows and not grown):
            _refuse_base(
                adapter, f"{tensor.name!r} is {list(tensor.shape)}, the base's is {list(base.shape)}"
            )
        if base.untouched and _same_values(tensor, base.stored):
            continue
        if adapter.scale != 1 and not tensor.name.endswith(".base_layer.weight"):
            raise ConfigError(
                f"{adapter.folder}: {tensor.name!r} replaces {name} and cannot be scaled by "
                f"{adapter.scale:g}: use scale 1"
            )
        new[name] = tensor
    return _tie(adapter, new, weights) if tied else new


def _tie(
    adapter: Adapter, new: dict[str, StoredTensor], weights: Mapping[str, Weight]
) -> dict[str, StoredTensor]:
    """Embedding and head replaced by the same numbers, as one; else refused."""
    embedding, head = f"{_EMBEDDING}.weight", f"{_HEAD}.weight"
    both = [new[name] for name in (embedding, head) if name in new]
    apart = len(both) == 1 or (len(both) == 2 and not _same_values(*both))
    if apart or {embedding, head} & set(adapter.updates):
        base = weights[embedding].stored.path.parent if embedding in weights else Path("BASE")
        raise ConfigError(
            f"{adapter.folder} changes {_EMBEDDING} and {_HEAD} apart, but the base model ties them into "
            "one tensor (merged by peft, a LoRA on either would change both); untie them with: python -c "
            '"from transformers import AutoModelForCausalLM as M; '
            f"m = M.from_pretrained('{base}', tie_word_embeddings=False); "
            "m.lm_head.weight.data = m.model.embed_tokens.weight.data.clone(); "
            f"m.save_pretrained('{base}-untied')\"   and export {base}-untied, with the tokenizer's files"
        )
    return {name: tensor for name, tensor in new.items() if name != head}


def _refuse_conflicts(adapters: Sequence[Adapter], changes: Sequence[Mapping[str, StoredTensor]]) -> None:
    """Raise ConfigError if one adapter replaces what another changes."""
    for i, new in enumerate(changes):
        for j, other in enumerate(adapters):
            common = sorted(set(new) & {*other.updates, *changes[j]}) if i != j else []
            if common:
                raise ConfigError(
                    f"{adapters[i].folder} replaces {common[0]}, which {other.folder} changes too; "
                    "expected at most one of the two: leave the other out"
                )


def _require_complete(adapter: Adapter, names: Iterable[str]) -> None:
    """Raise CheckpointError unless every module of the model that the config names has its tensors."""
    settings = adapter.settings
    for module in (name.removesuffix(".weight") for name in names):
        weight = f"{module}.weight"
        if not _MODULE.fullmatch(module):
            continue
        for named, held, key in (
            (settings.targets(module), adapter.updates, "target_modules"),
            (settings.saves(module), adapter.replacements, "modules_to_save"),
        ):
            if named and weight not in held:
                raise CheckpointError(
                    f"{adapter.folder / WEIGHTS_NAME} has no tensors for {module}; expected them, {key} of "
                    f"{CONFIG_NAME} names it: download or save the adapter again"
                )


def _require_fit(adapter: Adapter, name: str, update: LowRankUpdate, shape: tuple[int, ...] | None) -> None:
    tensor = update.left.name
    if shape is None:
        _refuse_base(adapter, f"{tensor!r} is for {name}, which the base model does not have")
    left, right = update.left.shape, update.right.shape
    fits = (left[1], right[0]) if update.transposed else (left[0], right[1])
    if shape != fits:
        _refuse_base(adapter, f"{tensor!r} and its pair are for {list(fits)}, the base's is {list(shape)}")


def _refuse_base(adapter: Adapter, found: str) -> NoReturn:
    raise CheckpointError(
        f"{adapter.folder / WEIGHTS_NAME}: {found}; expected the base model it was trained on, {CONFIG_NAME} "
        f"names {adapter.settings.base_model[:200]!r}"
    )


def _same_values(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors hold the same numbers, be it in two dtypes."""
    if a.shape != b.shape or not {a.dtype, b.dtype} <= set(DTYPES.values()):
        return False
    pairs = zip(pieces(Weight(a.name, a)), pieces(Weight(b.name, b)), strict=True)
    return all(torch.equal(x.float(), y.float()) for x, y in pairs)
