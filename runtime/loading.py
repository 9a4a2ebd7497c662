"""Artifact folder → its checked manifest, and a backend that runs it."""

from pathlib import Path
from typing import Any, cast

from mistral_trt.errors import EngineMismatchError, require
from mistral_trt.manifest import GRAPH_NAME, PLAN_NAME, Manifest, read_manifest
from mistral_trt.runtime import device
from mistral_trt.runtime.backend import Backend, Progress
from mistral_trt.runtime.engine_folder import check_engine_folder, check_machine, read_engine_details
from mistral_trt.runtime.mapped_file import hashed_file
from mistral_trt.tensorrt_names import RTX
from mistral_trt.weight_index import INDEX_NAME, files_of, read_weight_index


def open_artifact(
    folder: Path,
    *,
    threads: int | None = None,
    provider: str = "auto",
    exact: bool = False,
    trust_weights: bool = False,
    fixed_batch: bool = False,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Manifest, Backend]:
    """Check an artifact and load it into the backend for its kind.

    threads, provider: of ONNX Runtime, see `OnnxRuntimeBackend`.  cache_dir: of TensorRT-RTX.
    exact: the same call gives the same bits; see the backends.
    fixed_batch: every decode step will be over all rows.
    trust_weights: compare sizes only, not hashes; that of an engine's plan always is.
    Raises ManifestError for an altered folder, EngineMismatchError for one that cannot run here.
    """
    stage = read_manifest(folder, check_files=None).stage
    if progress is not None:
        progress("checking the files", 0.0)
    if stage == "engine":
        return _open_engine(
            folder,
            trust_weights=trust_weights,
            fixed_batch=fixed_batch,
            exact=exact,
            cache_dir=cache_dir,
            progress=progress,
        )
    manifest = read_manifest(folder, check_files=not trust_weights)
    module: Any = require("mistral_trt.runtime.onnxruntime_backend", "onnxruntime")
    if progress is not None:
        progress("loading the graph", 0.0)
    backend = module.OnnxRuntimeBackend(
        folder / GRAPH_NAME, manifest.contract, threads=threads, exact=exact, provider=provider
    )
    return manifest, cast(Backend, backend)


def require_used(folder: Path, *, threads: int | None, provider: str, cache_dir: Path | None) -> None:
    """Raise EngineMismatchError for options that what runs this artifact would not use."""
    manifest = read_manifest(folder, check_files=None)
    is_engine = manifest.stage == "engine"
    if is_engine and (provider != "auto" or threads):
        raise EngineMismatchError(
            f"{folder} is an engine, which TensorRT runs on its GPU; threads and provider are for ONNX "
            f"folders, found threads={threads!r} and provider={provider!r}: leave them out, or load the ONNX "
            "folder"
        )
    if cache_dir is not None and not (is_engine and read_engine_details(manifest).flavor == RTX):
        raise EngineMismatchError(
            f"cache_dir is where {RTX} keeps the kernels it compiles, and {folder} is not an engine of it: "
            "leave it out"
        )


def _open_engine(
    folder: Path,
    *,
    trust_weights: bool,
    fixed_batch: bool,
    exact: bool,
    cache_dir: Path | None,
    progress: Progress | None,
) -> tuple[Manifest, Backend]:
    """Files first, then TensorRT's version, then the GPU; every large file is hashed once."""
    manifest = read_manifest(folder, check_files=False)
    if not trust_weights:
        _check_hashes(folder, manifest)
    check_engine_folder(folder, manifest)
    with hashed_file(folder, PLAN_NAME, manifest) as plan:
        check_machine(folder, manifest, device.local_device)
        module: Any = require("mistral_trt.runtime.tensorrt.backend", "gpu")
        backend = module.open_tensorrt_backend(
            folder,
            manifest,
            plan=plan,
            fixed_batch=fixed_batch,
            exact=exact,
            trust_weights=trust_weights,
            cache_dir=cache_dir,
            progress=progress,
        )
    return manifest, cast(Backend, backend)


def _check_hashes(folder: Path, manifest: Manifest) -> None:
    """Of every file but the plan, and external weights, which are hashed while they go into the engine."""
    later = {PLAN_NAME}
    if INDEX_NAME in manifest.files:
        with hashed_file(folder, INDEX_NAME, manifest):
            later |= {INDEX_NAME, *files_of(read_weight_index(folder))}
    for name in set(manifest.files) - later:
        with hashed_file(folder, name, manifest):
            pass
