"""Checkpoint folder → ONNX folder: the stage's one public function, in the order of the work."""

import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mistral_trt.artifact import free_disk_bytes, new_artifact, require_apart
from mistral_trt.contract import GraphContract, plan_contract
from mistral_trt.errors import ArtifactError, ConfigError
from mistral_trt.export.checkpoint import Checkpoint, read_json
from mistral_trt.export.graph import build_graph, graph_sha256
from mistral_trt.export.weights import DATA_NAME, bind_weights, data_bytes, place_tensors, write_weights
from mistral_trt.manifest import GRAPH_NAME, Manifest, describe_files, tool_versions
from mistral_trt.progress import note

_SPARE_BYTES = 64 << 20
_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript")


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    precision: str = "fp16",
    sliding_window: int | None = None,
    prefill_chunk: int = 256,
    max_batch_size: int = 4,
    max_context: int | None = None,
) -> Manifest:
    """Write `model.onnx`, its weights, the tokenizer and `manifest.json` to `out`, all or nothing.

    sliding_window: overrides the checkpoint's W.  max_context: see `contract.plan_contract`.
    Raises ConfigError, CheckpointError, ExportError or ArtifactError.
    """
    require_apart(out, checkpoint)
    source = Checkpoint.open(checkpoint)
    contract = plan_contract(
        source.config,
        precision=precision,
        sliding_window=sliding_window,
        prefill_chunk=prefill_chunk,
        max_batch_size=max_batch_size,
        max_context=max_context,
    )
    note(describe(contract))
    texts, generation = source.text_files(), generation_ids(source)
    placed = place_tensors(source.tensors, contract.cache_dtype)
    require_space(out, data_bytes(placed) + _SPARE_BYTES)
    with new_artifact(out) as folder:
        note("tracing the graph")
        model = build_graph(contract)
        bind_weights(model, placed)
        proto = ir.to_proto(model)
        (folder / GRAPH_NAME).write_bytes(proto.SerializeToString(deterministic=True))
        data_sha256 = write_weights(source.tensors, placed, folder / DATA_NAME)
        for path in texts:
            shutil.copyfile(path, folder / path.name)
        manifest = Manifest(
            stage="onnx",
            files=describe_files(folder, {DATA_NAME: data_sha256}),
            sources={"checkpoint": source.sha256()},
            contract=contract,
            versions=tool_versions(*_TOOLS),
            details={
                "name": source.name,
                "graph_sha256": graph_sha256(proto),
                "weights": [target.name for target in placed],
                "weights_bytes": sum(target.bytes for target in placed),
                "text_files": [path.name for path in texts],
                "generation": generation,
            },
        )
        manifest.write(folder)
    return manifest


def describe(contract: GraphContract) -> str:
    """What the ring will be, in one line a person can check."""
    ring, config = contract.ring, contract.config
    row_mb = contract.ring_bytes_per_row / 1e6
    token_kb = contract.ring_bytes_per_row / ring.capacity / 1e3
    sizes = f"{row_mb:.1f} MB a row, {token_kb:.1f} kB a token"
    size = f"{contract.precision}: ring of {ring.capacity} slots, {sizes}"
    if contract.wraps:
        origin = "" if ring.sliding_window == config.sliding_window else " (overridden)"
        return f"window of {ring.sliding_window} tokens{origin}, chunks of {ring.prefill_chunk}; {size}"
    why = "no sliding window" if config.sliding_window is None else "max_context within the window"
    return f"{why}: sequences end at {contract.max_context} tokens, the ring never wraps; {size}"


def generation_ids(source: Checkpoint) -> dict[str, Any]:
    """Token ids that start and end a text: the union of what config and generation_config name.

    Raises ConfigError for one that is not a token id.
    """
    path = source.folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    ends: set[int] = set()
    for value in (source.raw_config.get("eos_token_id"), generation.get("eos_token_id")):
        ends |= set(_token_ids("eos_token_id", value))
    bos = generation.get("bos_token_id", source.raw_config.get("bos_token_id"))
    return {"bos_token_id": next(iter(_token_ids("bos_token_id", bos)), None), "eos_token_ids": sorted(ends)}


def _token_ids(name: str, value: Any) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ConfigError(f"{name} must be a token id or a list of them, found {value!r}")
    return ids


def require_space(out: Path, needed_bytes: int) -> None:
    """Raise ArtifactError if the disk under `out` has less than `needed_bytes` free."""
    free = free_disk_bytes(out)
    if free < needed_bytes:
        raise ArtifactError(
            f"{out} needs {needed_bytes / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; "
            "free some or choose another --out"
        )
