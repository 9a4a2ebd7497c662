"""Artifact folder → its checked manifest, and a backend that runs it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from mistral_trt.errors import EngineMismatchError, ManifestError, require
from mistral_trt.manifest import GRAPH_NAME, Manifest, read_manifest, repair_command, sha256_file
from mistral_trt.runtime import device
from mistral_trt.runtime.backend import Backend
from mistral_trt.runtime.engine_folder import check_engine_folder
from mistral_trt.weight_index import INDEX_NAME, files_of, read_weight_index

Progress = Callable[[str, float], None]
"""What is being done, and which share of it is: 0…1."""


def open_artifact(
    folder: Path,
    *,
    threads: int | None = None,
    provider: str = "auto",
    exact: bool = False,
    trust_weights: bool = False,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Manifest, Backend]:
    """Check an artifact and load it into the backend for its kind.

    threads, provider, exact: of ONNX Runtime, see `OnnxRuntimeBackend`.  cache_dir, progress: of TensorRT.
    trust_weights: compare sizes only, not hashes; that of an engine's plan always is.
    Raises ManifestError for an altered folder, EngineMismatchError for one that cannot run here.
    """
    manifest = read_manifest(folder, check_files=None)
    if manifest.stage != "engine":
        manifest = read_manifest(folder, check_files=not trust_weights)
        module: Any = require("mistral_trt.runtime.onnxruntime_backend", "onnxruntime")
        backend = module.OnnxRuntimeBackend(
            folder / GRAPH_NAME, manifest.contract, threads=threads, exact=exact, provider=provider
        )
        return manifest, cast(Backend, backend)
    manifest = read_manifest(folder, check_files=False)
    if not trust_weights:
        _check_hashes(folder, manifest)
    check_engine_folder(folder, manifest, device.local_device, plan_hashed=not trust_weights)
    module = require("mistral_trt.runtime.tensorrt.backend", "gpu")
    backend = module.open_tensorrt_backend(
        folder, manifest, trust_weights=trust_weights, cache_dir=cache_dir, progress=progress
    )
    return manifest, cast(Backend, backend)


def require_used(folder: Path, *, threads: int | None, provider: str) -> None:
    """Raise EngineMismatchError for options of ONNX Runtime that an engine folder would not use."""
    if read_manifest(folder, check_files=None).stage == "engine" and (provider != "auto" or threads):
        raise EngineMismatchError(
            f"{folder} is an engine, which TensorRT runs on its GPU; threads and provider are for ONNX "
            f"folders, found threads={threads!r} and provider={provider!r}: leave them out, or load the ONNX "
            "folder"
        )


def _check_hashes(folder: Path, manifest: Manifest) -> None:
    """Of every file but external weights, which are hashed while they go into the engine."""
    streamed: set[str] = set()
    if INDEX_NAME in manifest.files:
        _check_hash(folder, manifest, INDEX_NAME)
        streamed = set(files_of(read_weight_index(folder)))
    for name in manifest.files:
        if name not in streamed:
            _check_hash(folder, manifest, name)


def _check_hash(folder: Path, manifest: Manifest, name: str) -> None:
    if sha256_file(folder / name) != manifest.files[name].sha256:
        repair = repair_command(folder, manifest.stage, manifest.details)
        raise ManifestError(
            f"{folder / name} was altered after it was made (its SHA-256 differs from the manifest's); "
            f"make the folder again with: {repair}"
        )
