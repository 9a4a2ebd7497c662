"""A checkpoint folder, and LoRA adapters → config, and every weight the decoder needs, found and checked.

Nothing is loaded and no code from a folder runs: the config is read, the safetensors headers are read,
and names and shapes are compared with what the config promises.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mistral_trt.config import ModelConfig, unrecognised_keys
from mistral_trt.errors import CheckpointError
from mistral_trt.export import mistral_format
from mistral_trt.export.conversion import Weight, same_numbers
from mistral_trt.export.identity import clean_name, files_sha256
from mistral_trt.export.lora import Adapter, adapters_sha256, apply_adapters
from mistral_trt.export.stored_codes import StoredQuantization, read_stored_quantization
from mistral_trt.export.tensor_files import DTYPES, StoredTensor, read_header
from mistral_trt.export.text_parsing import read_json
from mistral_trt.manifest import is_plain_name
from mistral_trt.progress import note

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TEXT_FILES = (
    "config.json",
    "params.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "tokenizer*.model*",
    "*.model.v*",
)
_DERIVED = re.compile(r"^model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_HUB_ID = re.compile(r"^\w[\w.-]*/\w[\w.-]*$")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, its adapters merged in name.

    format: "huggingface" or "mistral".  config: the model with its adapters.
    raw_config: `config.json`, or what `params.json` says in its words.
    weights: exactly the decoder's, by Hugging Face's names.  files: all of the folder that can matter.
    stored_quantization: of a checkpoint whose linears are stored quantized.
    """

    folder: Path
    format: str
    config: ModelConfig
    raw_config: Mapping[str, Any]
    weights: Mapping[str, Weight]
    files: frozenset[Path]
    adapters: tuple[Adapter, ...] = ()
    stored_quantization: StoredQuantization | None = None

    @classmethod
    def open(cls, folder: Path, adapters: Sequence[Adapter] = ()) -> "Checkpoint":
        """Read config and headers.

        Raises ConfigError for a model that is not supported, CheckpointError for missing, surplus,
        damaged or misshapen tensors.
        """
        require_folder(folder)
        form = "mistral" if _is_mistral_format(folder) else "huggingface"
        raw, tensors = _read_mistral(folder) if form == "mistral" else _read_hugging_face(folder)
        quantized, found = _split_quantized(raw, tensors)
        config = ModelConfig.from_huggingface({key: raw[key] for key in raw if key not in _QUANTIZATION_KEYS})
        if config.num_hidden_layers > len(found):
            raise CheckpointError(
                f"config.json calls for {config.num_hidden_layers} layers, "
                f"the checkpoint holds {len(found)} tensors"
            )
        if quantized and adapters:
            raise CheckpointError(
                f"{folder} is quantized ({quantized.method}), so an adapter cannot be merged into it; merge "
                "it into the float checkpoint and quantize that: --lora with --precision int4 or int8"
            )
        files = {weight.stored.path for weight in tensors.values()}
        merged = apply_adapters(found, adapters, tied=config.tie_word_embeddings)
        if any(EMBEDDING in adapter.replacements for adapter in adapters):
            config = replace(config, vocab_size=merged[EMBEDDING].shape[0])
        weights = select_weights(merged, expected_shapes(config), config)
        for pattern in (_INDEX, mistral_format.INDEX, *_TEXT_FILES):
            files.update(path for path in folder.glob(pattern) if path.is_file())
        return cls(folder, form, config, raw, weights, frozenset(files), tuple(adapters), quantized)

    @property
    def name(self) -> str:
        """Name for output folders; a hub cache's snapshot is named after its repository."""
        folder = self.folder.resolve()
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            stem = folder.parent.parent.name.split("--")[-1]
        else:
            stem = folder.name
        return "+".join([clean_name(stem), *(adapter.name for adapter in self.adapters)])

    def sources(self) -> dict[str, str]:
        """Identity: hashes of the checkpoint's own files and, where there are any, of its adapters."""
        found = {"checkpoint": files_sha256(self.files)}
        return {**found, "lora": adapters_sha256(self.adapters)} if self.adapters else found


def require_folder(folder: Path) -> None:
    """Raise CheckpointError unless `folder` exists; a hub ID gets the command that downloads it."""
    if (folder / "snapshots").is_dir() and not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} is a hub cache; pass one of the folders in {folder / 'snapshots'}")
    if folder.is_dir():
        return
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; expected a checkpoint folder with config.json")
    if _HUB_ID.match(str(folder)):
        local = Path("models") / folder.name
        raise CheckpointError(
            f"{folder} is not a folder here; if it is a hub ID, download it with: "
            f"hf download {folder} --local-dir {local} --exclude '*.bin' 'consolidated*'   and pass {local}"
        )
    raise CheckpointError(f"{folder} does not exist; expected a checkpoint folder with config.json")


def _read_hugging_face(folder: Path) -> tuple[dict[str, Any], dict[str, Weight]]:
    """config.json, and the single safetensors file if it is there, else the shards, as in transformers."""
    raw = read_json(folder / "config.json")
    for key in unrecognised_keys(raw):
        note(f"config.json: {key} = {raw[key]!r} is not known here and has no effect on the graph")
    if (folder / _SINGLE).is_file():
        found = read_header(folder / _SINGLE)
    elif (folder / _INDEX).is_file():
        found = _read_shards(folder, _INDEX)
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise CheckpointError(
            f"{folder} holds pickled weights, which can run code; convert them with: python -c "
            '"from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    else:
        raise CheckpointError(f"{folder} has neither {_SINGLE} nor {_INDEX}")
    return raw, {name: Weight(name, stored) for name, stored in found.items()}


def _split_quantized(
    raw: Mapping[str, Any], tensors: dict[str, Weight]
) -> tuple[StoredQuantization | None, dict[str, Weight]]:
    """A quantized checkpoint's codes under their weights' names, beside its float tensors."""
    stated = [raw[key] for key in _QUANTIZATION_KEYS if raw.get(key) is not None]
    if not stated:
        return None, tensors
    if not isinstance(stated[0], dict):
        raise CheckpointError(f"config.json: quantization_config must be an object, found {stated[0]!r}")
    stored = {name: weight.stored for name, weight in tensors.items()}
    quantized, floats = read_stored_quantization(stated[0], stored)
    note(f"the checkpoint is quantized ({quantized.method}, {len(quantized.linears)} linears)")
    codes = {name: Weight(name, c.packed, codes=c) for name, c in quantized.linears.items()}
    return quantized, {name: Weight(name, tensor) for name, tensor in floats.items()} | codes


def _is_mistral_format(folder: Path) -> bool:
    """Whether only Mistral's own files are whole: many hub repositories hold both forms of one model."""
    if (folder / "config.json").is_file() and ((folder / _SINGLE).is_file() or (folder / _INDEX).is_file()):
        return False
    return (folder / mistral_format.PARAMS).is_file()


def _read_mistral(folder: Path) -> tuple[dict[str, Any], dict[str, Weight]]:
    note(f"{folder} is in Mistral's own format")
    raw = mistral_format.config_from_params(read_json(folder / mistral_format.PARAMS))
    if (folder / mistral_format.INDEX).is_file():
        found = _read_shards(folder, mistral_format.INDEX)
    else:
        found = {}
        for path in mistral_format.parts(folder):
            header = read_header(path)
            twice = sorted(set(found) & set(header))
            if twice:
                raise CheckpointError(f"{path} and {found[twice[0]].path.name} both hold {twice[0]!r}")
            found |= header
    if not found and any(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder} holds pickled weights, which can run code; convert them with: python -c "
            '"import torch; from safetensors.torch import save_file as s; '
            f"s(torch.load('{folder}/consolidated.00.pth', weights_only=True), "
            f"'{folder}/{mistral_format.SINGLE}')\""
        )
    if not found:
        raise CheckpointError(f"{folder} has {mistral_format.PARAMS} but no {mistral_format.SINGLE}")
    return raw, mistral_format.weights_by_hugging_face_name(found, raw)


def _read_shards(folder: Path, index: str) -> dict[str, StoredTensor]:
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / index} has no weight_map")
    headers: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted({str(shard) for shard in weight_map.values()}):
        if not is_plain_name(shard) or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{folder / index}: {shard!r} is not a plain name of a safetensors file")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard} is missing; {index} names it")
        headers[shard] = read_header(folder / shard)
    tensors = {}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(f"{folder / shard} does not hold {name!r}, though {index} says so")
        tensors[name] = headers[shard][name]
    for shard, header in headers.items():
        unlisted = sorted(set(header) - set(tensors))
        if unlisted:
            raise CheckpointError(f"{folder / shard} holds {unlisted[0]!r}, which {index} does not list")
    return tensors


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of this configuration (linears are [out_features, in_features])."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}self_attn.q_proj.weight": (queries, hidden),
            f"{layer}self_attn.k_proj.weight": (keys, hidden),
            f"{layer}self_attn.v_proj.weight": (keys, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, queries),
            f"{layer}post_attention_layernorm.weight": (hidden,),
            f"{layer}mlp.gate_proj.weight": (inner, hidden),
            f"{layer}mlp.up_proj.weight": (inner, hidden),
            f"{layer}mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


def select_weights(
    found: Mapping[str, Weight], expected: Mapping[str, tuple[int, ...]], config: ModelConfig
) -> dict[str, Weight]:
    """The expected tensors, in order. Raises CheckpointError on a missing, surplus or misshapen one."""
    surplus = {name for name in found if name not in expected and not _DERIVED.match(name)}
    if config.tie_word_embeddings and LM_HEAD in surplus:
        _require_same_head(found[LM_HEAD], found.get(EMBEDDING))
        surplus.discard(LM_HEAD)
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {_some(missing)}, which its config.json calls for")
    if surplus:
        raise CheckpointError(
            f"the checkpoint holds {_some(sorted(surplus))}, which a Mistral decoder with this config.json "
            "has no place for"
        )
    for name, shape in expected.items():
        weight = found[name]
        if weight.shape != shape:
            raise CheckpointError(
                f"{name}: config.json calls for shape {list(shape)}, found {list(weight.shape)}"
            )
        if weight.codes is None and weight.stored.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{name}: expected {', '.join(DTYPES.values())}, found {weight.stored.dtype} (a quantized "
                "checkpoint says how in the quantization_config of its config.json; this one does not)"
            )
    return {name: found[name] for name in expected}


def _require_same_head(head: Weight, embedding: Weight | None) -> None:
    if embedding is None or not same_numbers(head.stored, embedding.stored):
        raise CheckpointError(
            f"tie_word_embeddings is true, but {LM_HEAD} differs from {EMBEDDING}; to use both, set it to "
            "false in config.json"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
