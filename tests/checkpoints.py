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
