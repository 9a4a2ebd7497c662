"""A Hugging Face checkpoint folder → its config, and every weight the decoder needs, found and checked.

Nothing is loaded and no code from the folder runs: `config.json` is read, the safetensors headers are
read, and names and shapes are compared with what the config promises.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_trt.artifact import cache_folder, write_file
from mistral_trt.config import ModelConfig, unrecognised_keys
from mistral_trt.errors import CheckpointError
from mistral_trt.export.tensor_files import DTYPES, StoredTensor, read_header
from mistral_trt.manifest import is_plain_name, sha256_file
from mistral_trt.progress import note

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Files that travel with every artifact, where the checkpoint has them."""

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DERIVED = re.compile(r"^model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")
_HUB_ID = re.compile(r"^\w[\w.-]*/\w[\w.-]*$")
_REMEMBER_BYTES = 1 << 26


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `tensors` holds exactly the decoder's weights, under Hugging Face's names."""

    folder: Path
    config: ModelConfig
    raw_config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read config and headers.

        Raises ConfigError for a model that is not supported, CheckpointError for missing, surplus,
        damaged or misshapen tensors.
        """
        require_folder(folder)
        raw = read_json(folder / "config.json")
        config = ModelConfig.from_huggingface(raw)
        for key in unrecognised_keys(raw):
            note(f"config.json: {key} = {raw[key]!r} is not known here and has no effect on the graph")
        found = find_tensors(folder)
        if config.num_hidden_layers > len(found):
            raise CheckpointError(
                f"config.json calls for {config.num_hidden_layers} layers, "
                f"the checkpoint holds {len(found)} tensors"
            )
        tensors = select_weights(found, expected_shapes(config), config)
        return cls(folder, config, raw, tensors)

    @property
    def name(self) -> str:
        """Name for output folders; a hub cache's snapshot is named after its repository."""
        folder = self.folder.resolve()
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            stem = folder.parent.parent.name.split("--")[-1]
        else:
            stem = folder.name
        return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "model"

    def sha256(self) -> str:
        """Identity: the hash over name and SHA-256 of every file that can change an export."""
        weights = {tensor.path for tensor in self.tensors.values()}
        texts = [self.folder / n for n in ("config.json", "generation_config.json", _INDEX, *TEXT_FILES)]
        digest = hashlib.sha256()
        for path in sorted({*weights, *(path for path in texts if path.is_file())}, key=lambda p: p.name):
            digest.update(f"{path.name} {remembered_sha256(path)}\n".encode())
        return digest.hexdigest()

    def text_files(self) -> list[Path]:
        """Tokenizer and chat template files to copy. Raises CheckpointError for a tokenizer we can't use."""
        found = [self.folder / name for name in TEXT_FILES if (self.folder / name).is_file()]
        if not (self.folder / "tokenizer.json").is_file():
            if (self.folder / "tokenizer.model").is_file():
                raise CheckpointError(
                    f"{self.folder} has tokenizer.model but no tokenizer.json; make it with: python -c "
                    '"from transformers import AutoTokenizer as T; '
                    f"T.from_pretrained('{self.folder}').save_pretrained('{self.folder}')\""
                )
            note(f"{self.folder} has no tokenizer.json: the artifact will take token ids, not text")
        return found


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(data).__name__}")
    return data


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files: the single one if it is there, as in transformers."""
    if (folder / _SINGLE).is_file():
        return read_header(folder / _SINGLE)
    if (folder / _INDEX).is_file():
        return _read_shards(folder)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise CheckpointError(
            f"{folder} holds pickled weights, which can run code; convert them with: python -c "
            '"from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise CheckpointError(f"{folder} has neither {_SINGLE} nor {_INDEX}")


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / _INDEX} has no weight_map")
    headers: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted({str(shard) for shard in weight_map.values()}):
        if not is_plain_name(shard):
            raise CheckpointError(f"{folder / _INDEX}: {shard!r} is not a plain file name")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard} is missing; {_INDEX} names it")
        headers[shard] = read_header(folder / shard)
    tensors = {}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(f"{folder / shard} does not hold {name!r}, though {_INDEX} says so")
        tensors[name] = headers[shard][name]
    for shard, header in headers.items():
        unlisted = sorted(set(header) - set(tensors))
        if unlisted:
            raise CheckpointError(f"{folder / shard} holds {unlisted[0]!r}, which {_INDEX} does not list")
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
    found: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], config: ModelConfig
) -> dict[str, StoredTensor]:
    """The expected tensors, in order. Raises CheckpointError on a missing, surplus or misshapen one."""
    surplus = {name for name in found if name not in expected and not _DERIVED.match(name)}
    if config.tie_word_embeddings and LM_HEAD in surplus:
        _require_same_bytes(found[LM_HEAD], found.get(EMBEDDING))
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
        tensor = found[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{name}: config.json calls for shape {list(shape)}, found {list(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{name}: expected {', '.join(DTYPES.values())}, found {tensor.dtype} (quantized checkpoints "
                "are not supported; use the original weights)"
            )
    return {name: found[name] for name in expected}


def remembered_sha256(path: Path) -> str:
    """SHA-256 of a file; for large files it is kept, keyed by path, size, inode and time of change."""
    real = path.resolve()
    stat = real.stat()
    if stat.st_size < _REMEMBER_BYTES:
        return sha256_file(real)
    store = cache_folder() / "sha256.json"
    key = f"{real} {stat.st_size} {stat.st_ino} {stat.st_mtime_ns}"
    try:
        known = json.loads(store.read_text())
    except (OSError, ValueError):
        known = {}
    if not isinstance(known.get(key), str):
        known[key] = sha256_file(real)
        store.parent.mkdir(parents=True, exist_ok=True)
        write_file(store, json.dumps(known, indent=1).encode())
    return str(known[key])


def _require_same_bytes(head: StoredTensor, embedding: StoredTensor | None) -> None:
    if embedding is not None and (head.shape, head.dtype) == (embedding.shape, embedding.dtype):
        if _read(head) == _read(embedding):
            return
    raise CheckpointError(
        f"tie_word_embeddings is true, but {LM_HEAD} differs from {EMBEDDING}; to use both, set it to false "
        "in config.json"
    )


def _read(tensor: StoredTensor) -> bytes:
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.bytes)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
