"""The folder that was named → the graph to validate, and the engine made of it, if any, and where it runs."""

from dataclasses import dataclass
from pathlib import Path

from mistral_trt.contract import GraphContract
from mistral_trt.devices import Device
from mistral_trt.errors import ValidationError
from mistral_trt.manifest import Manifest, manifest_sha256, read_manifest
from mistral_trt.runtime import device
from mistral_trt.runtime.engine_folder import check_engine_folder, check_machine


@dataclass(frozen=True)
class Engine:
    """An engine folder.  device: the GPU that will run it, None where this machine has none."""

    folder: Path
    manifest: Manifest
    device: Device | None


@dataclass(frozen=True)
class Subject:
    """An ONNX folder, all of whose files are what its manifest says, and the engine made of it."""

    folder: Path
    manifest: Manifest
    engine: Engine | None

    @property
    def contract(self) -> GraphContract:
        return self.manifest.contract

    @property
    def executed(self) -> Path:
        """The folder whose scenarios are played: the engine's where its GPU is here."""
        if self.engine is not None and self.engine.device is not None:
            return self.engine.folder
        return self.folder

    @property
    def executed_manifest(self) -> Manifest:
        if self.engine is not None and self.engine.device is not None:
            return self.engine.manifest
        return self.manifest

    @property
    def runs_engine(self) -> bool:
        return self.executed is not self.folder


def open_subject(folder: Path, onnx: Path | None) -> Subject:
    """Read what is to be validated.  onnx: the ONNX folder that an engine was built from.

    Raises ValidationError if the two do not belong together, ManifestError for altered files,
    EngineMismatchError for an engine whose GPU or TensorRT is not this machine's.
    """
    manifest = read_manifest(folder)
    if manifest.stage == "onnx":
        if onnx is not None:
            raise ValidationError(f"{folder} is an ONNX folder itself; leave --onnx out")
        return Subject(folder, manifest, None)
    made_from = str(manifest.sources.get("onnx", "unknown"))
    if onnx is None:
        raise ValidationError(
            f"{folder} holds a TensorRT engine; name the ONNX folder it was built from (manifest "
            f"{made_from[:12]}…) as --onnx DIR: its graph is followed layer by layer, and stands in for the "
            "engine where its GPU is not here"
        )
    source = read_manifest(onnx)
    found = manifest_sha256(onnx)
    if source.stage != "onnx" or found != made_from:
        raise ValidationError(
            f"{folder} was not built from {onnx}: its manifest names {made_from[:12]}…, this one is "
            f"{found[:12]}…; pass the ONNX folder it was built from as --onnx, or build it again"
        )
    check_engine_folder(folder, manifest)
    found_device = device.local_device()
    if found_device is not None:
        check_machine(folder, manifest, lambda: found_device)
    return Subject(onnx, source, Engine(folder, manifest, found_device))
