"""Checkpoint folders changed, split, linked and forged for the tests."""

import hashlib
import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def altered(
    source: Path,
    out: Path,
    *,
    config: Mapping[str, object] | None = None,
    without: tuple[str, ...] = (),
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """A copy of a checkpoint with keys of its config and tensors set, or taken out by name."""
    shutil.copytree(source, out)
    raw = {**json.loads((out / "config.json").read_text()), **(config or {})}
    (out / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in without}))
    if tensors or any(name.endswith(".weight") for name in without):
        stored = {**load_file(out / SINGLE), **(tensors or {})}
        kept = {k: v.clone() for k, v in stored.items() if k not in without}
        save_file(kept, out / SINGLE, {"format": "pt"})
    return out


def sharded(source: Path, out: Path, shards: int = 2) -> Path:
    """The same checkpoint in several files with an index."""
    shutil.copytree(source, out)
    tensors = load_file(out / SINGLE)
    (out / SINGLE).unlink()
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        names = sorted(tensors)[i::shards]
        save_file({name: tensors[name] for name in names}, out / file)
        weight_map |= dict.fromkeys(names, file)
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out


MISTRAL_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def mistral_format(source: Path, out: Path, **params: object) -> Path:
    """The same checkpoint in Mistral's own layout. params: keys of params.json, left out where None."""
    out.mkdir(parents=True)
    raw = json.loads((source / "config.json").read_text())
    theta = raw["rope_parameters"]["rope_theta"]
    found = {
        "dim": raw["hidden_size"],
        "n_layers": raw["num_hidden_layers"],
        "head_dim": raw["head_dim"],
        "hidden_dim": raw["intermediate_size"],
        "n_heads": raw["num_attention_heads"],
        "n_kv_heads": raw["num_key_value_heads"],
        "norm_eps": raw["rms_norm_eps"],
        "vocab_size": raw["vocab_size"],
        "rope_theta": theta,
        "sliding_window": raw["sliding_window"],
        "max_position_embeddings": raw["max_position_embeddings"],
        **params,
    }
    (out / "params.json").write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
    tensors = {}
    for name, tensor in load_file(source / SINGLE).items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = tensor.view(-1, 2, raw["head_dim"] // 2, tensor.shape[1])  # [heads, 2, pairs, columns]
            tensor = halves.transpose(1, 2).reshape(tensor.shape).contiguous()
        for theirs, own in MISTRAL_NAMES.items():
            name = name.replace(theirs, own)
        tensors[name.removeprefix("model.")] = tensor
    save_file(tensors, out / "consolidated.safetensors")
    return out


def hub_cache(source: Path, root: Path, repository: str = "some-org/Some-Model-7B") -> Path:
    """The same checkpoint as huggingface_hub keeps it: snapshots of links into `blobs`."""
    home = root / ("models--" + repository.replace("/", "--"))
    snapshot = home / "snapshots" / ("c" * 40)
    (home / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, home / "blobs" / blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob)
    return snapshot


def forged(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file with any header (JSON, or raw bytes) and any claim of its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def stored(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    """One entry of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
