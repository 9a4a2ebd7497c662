"""Checkpoint folder → ONNX folder: the stage's one public function, in the order of the work."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from mistral_trt.artifact import link_file, new_artifact, require_apart, require_space
from mistral_trt.contract import QUANTIZED, GraphContract, plan_contract
from mistral_trt.errors import ConfigError, require
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.conversion import Census
from mistral_trt.export.data_file import DataFile
from mistral_trt.export.graph import build_graph, graph_sha256
from mistral_trt.export.identity import remembered_sha256
from mistral_trt.export.lora import Adapter
from mistral_trt.export.quantization.settings import QuantizationSettings
from mistral_trt.export.text_parsing import read_json
from mistral_trt.export.tokenizer_files import TextFiles, read_text_files
from mistral_trt.export.weights import (
    DATA_NAME,
    WeightPlan,
    bind_weights,
    inspect_linked,
    plan_weights,
    write_weights,
)
from mistral_trt.manifest import GRAPH_NAME, Manifest, describe_files, tool_versions
from mistral_trt.progress import note, track

if TYPE_CHECKING:
    from mistral_trt.export.quantization.recipe import Quantization

_DEFAULTS = QuantizationSettings()
_SPARE_BYTES = 64 << 20
_COPIED_AT_ONCE = 1 << 24
_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "tokenizers")
_QUANTIZERS = ("nvidia-modelopt", "transformers")
_LOG = logging.getLogger("mistral_trt")


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    precision: str = "fp16",
    sliding_window: int | None = None,
    prefill_chunk: int = 256,
    max_batch_size: int = 4,
    max_context: int | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    link: bool | None = None,
    quantization: QuantizationSettings = _DEFAULTS,
) -> Manifest:
    """Write `model.onnx`, its weights, the tokenizer and `manifest.json` to `out`, all or nothing.

    sliding_window: overrides the checkpoint's W.  max_context: see `contract.plan_contract`.
    loras: adapter folders and their scales, merged in this order.  link: whether a checkpoint's file that
    serves as it is becomes a hard link in `out`, instead of being written anew; None for yes with 16-bit
    weights and no in fp32, the yardstick, which every ONNX tool should open (onnx's own loader and checker
    refuse a file that has two names).  quantization: how to calibrate, and what stays
    float16, in int8, int8-weight-only, int4 and fp8.
    Raises ConfigError, CheckpointError, CalibrationError, ExportError or ArtifactError.
    """
    require_apart(out, checkpoint)
    source = Checkpoint.open(checkpoint, [Adapter.open(folder, scale) for folder, scale in loras])
    contract = plan_contract(
        source.config,
        precision=precision,
        sliding_window=sliding_window,
        prefill_chunk=prefill_chunk,
        max_batch_size=max_batch_size,
        max_context=max_context,
    )
    note(describe(contract))
    folders = [checkpoint, *(adapter.folder for adapter in source.adapters)]
    texts = read_text_files(folders, vocab_size=source.config.vocab_size)
    for remark in texts.remarks:
        note(remark)
    generation = generation_ids(source, texts)
    census = Census(contract.cache_dtype)
    quantized = quantize(source, contract, quantization, texts, out, bos=generation["bos_token_id"])
    made = quantized.tensors(source.weights, census) if quantized else []
    sharing = contract.cache_dtype != "float32" if link is None else link
    plan = plan_weights(source.weights, contract.cache_dtype, link=sharing, made=made)
    require_space(out, plan.data_bytes + copied_bytes(plan, out) + _SPARE_BYTES)
    with new_artifact(out) as folder:
        place_linked(plan, folder)
        model, hashes, sources = trace_and_write(source, contract, plan, folder, census, quantized)
        bind_weights(model, plan.placed)
        proto = ir.to_proto(model)
        (folder / GRAPH_NAME).write_bytes(proto.SerializeToString(deterministic=True))
        for name, content in texts.files.items():
            (folder / name).write_bytes(content)
        note_hazards(census)
        manifest = Manifest(
            stage="onnx",
            files=describe_files(folder, hashes),
            sources=sources,
            contract=contract,
            versions=tool_versions(*_TOOLS, *(_QUANTIZERS if quantized and quantized.scales else ())),
            details={
                "name": source.name,
                "format": source.format,
                "graph_sha256": graph_sha256(proto),
                **describe_weights(plan, census),
                **({"quantization": describe_quantization(plan, quantized)} if quantized else {}),
                "lora": [{"name": a.name, "scale": a.scale, "sha256": a.sha256()} for a in source.adapters],
                "text_files": sorted(texts.files),
                "generation": generation,
            },
        )
        manifest.write(folder)
    return manifest


def quantize(
    source: Checkpoint,
    contract: GraphContract,
    settings: QuantizationSettings,
    texts: TextFiles,
    out: Path,
    *,
    bos: int | None,
) -> "Quantization | None":
    """Calibrate where the precision asks for it.

    Raises ConfigError for settings that would have no effect, MissingDependencyError without ModelOpt.
    """
    calibrated = contract.precision in QUANTIZED and source.stored_quantization is None
    if settings != _DEFAULTS and not calibrated:
        kind = "a checkpoint that is stored quantized" if source.stored_quantization else contract.precision
        raise ConfigError(
            f"calibration, --keep, --quality and --quantize-lm-head have no effect on {kind}; they are for a "
            f"float checkpoint with --precision {', '.join(QUANTIZED)}"
        )
    if source.stored_quantization is None and not calibrated:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ModelOpt's, of versions that it has not tried
        for package in (*(["modelopt"] if calibrated else []), "transformers", "safetensors"):
            require(package, "quantize")
    from mistral_trt.export.quantization.recipe import import_quantized, quantize_checkpoint

    if source.stored_quantization is not None:
        return import_quantized(source, contract)
    require_space(out, sum(weight.elements for weight in source.weights.values()) // 2 + _SPARE_BYTES)
    tokenizer = texts.files.get("tokenizer.json")
    return quantize_checkpoint(source, contract, settings, tokenizer=tokenizer, bos_token_id=bos)


def describe_weights(plan: WeightPlan, census: Census) -> dict[str, Any]:
    """What the manifest says of the weights."""
    return {
        "weights": [target.name for target in plan.placed],
        "weights_bytes": sum(target.bytes for target in plan.placed),
        "linked": sorted(plan.linked),
        "hazards": census.to_json(),
    }


def describe_quantization(plan: WeightPlan, quantized: "Quantization") -> dict[str, Any]:
    """The manifest's `quantization`: what was decided, and the bytes of codes and scales."""
    return {**quantized.details, "quantized_bytes": sum(tensor.bytes for tensor in plan.made.values())}


def trace_and_write(
    source: Checkpoint,
    contract: GraphContract,
    plan: WeightPlan,
    folder: Path,
    census: Census,
    quantized: "Quantization | None",
) -> tuple[ir.Model, dict[str, str], dict[str, str]]:
    """Trace the graph, then write the weights, while a thread hashes the checkpoint.

    One after the other, because tracing leaves other threads little of the interpreter. Returns the graph,
    the hashes of the large files by name, and the manifest's sources.
    """
    note(f"tracing {source.config.num_hidden_layers} layers")
    with ThreadPoolExecutor(1) as pool, single_threaded_torch():
        sources = pool.submit(source.sources)
        model = build_graph(contract)
        if quantized:
            quantized.write_nodes(model)
        hashes = {}
        if plan.written:
            hashes[DATA_NAME] = write_weights(source.weights, plan, folder / DATA_NAME, census=census)
        inspect_linked(source.weights, plan, census=census)
        found = sources.result()
    return model, hashes | {name: remembered_sha256(path) for name, path in plan.linked.items()}, found


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """torch's own threads wait by spinning, and while weights stream there is work for every core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def copied_bytes(plan: WeightPlan, out: Path) -> int:
    """Bytes of the files that cannot be linked because they lie on another disk than `out`."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    stats = [path.stat() for path in plan.linked.values()]
    return sum(stat.st_size for stat in stats if stat.st_dev != place.stat().st_dev)


def place_linked(plan: WeightPlan, folder: Path) -> None:
    """Bring the checkpoint's files into the folder: as hard links, or as copies and then said aloud."""
    for name, path in plan.linked.items():
        if link_file(path, folder / name):
            note(f"{name}: hard-linked to the checkpoint's, used as it lies")
            continue
        size = path.stat().st_size
        _LOG.warning(f"{path} cannot be hard-linked into {folder.parent}: copying its {size / 1e9:.2f} GB")
        require_space(folder, size + _SPARE_BYTES)
        with (
            path.open("rb") as old,
            track(name, size, unit="bytes") as advance,
            DataFile(folder / name, advance) as new,
        ):
            while piece := old.read(_COPIED_AT_ONCE):
                new.write(piece)


def note_hazards(census: Census) -> None:
    """Say so if weights lost precision at the small end of the dtype."""
    found = census.to_json()
    if found["subnormal"] or found["flushed_to_zero"]:
        note(
            f"in {census.dtype}, {found['subnormal']:,} weights are subnormal and "
            f"{found['flushed_to_zero']:,} became zero, most of them in {found['worst']}"
        )


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


def generation_ids(source: Checkpoint, texts: TextFiles) -> dict[str, Any]:
    """Token ids that start and end a text: the union of what generation_config, config and tokenizer name.

    bos_token_id: the first of these that names one. Raises ConfigError for one that is not a token id.
    """
    path = source.folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    tokenizer = {"bos_token_id": texts.bos_token_id, "eos_token_id": list(texts.eos_token_ids)}
    found: dict[str, list[int]] = {
        name: [
            i for settings in (generation, source.raw_config, tokenizer) for i in _token_ids(name, settings)
        ]
        for name in ("bos_token_id", "eos_token_id")
    }
    return {
        "bos_token_id": next(iter(found["bos_token_id"]), None),
        "bos_token_ids": sorted(set(found["bos_token_id"])),
        "eos_token_ids": sorted(set(found["eos_token_id"])),
    }


def _token_ids(name: str, settings: Mapping[str, Any]) -> list[int]:
    value = settings.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ConfigError(f"{name} must be a token id or a list of them, found {value!r}")
    return ids
