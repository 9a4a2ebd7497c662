"""ONNX folder → an engine folder with a simulated plan, and a backend on a simulated GPU that runs it."""

import shutil
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import cuda.bindings.runtime
import pytest

from mistral_trt.devices import Device as LocalDevice
from mistral_trt.engines.network.placeholders import refit_weights
from mistral_trt.manifest import (
    GRAPH_NAME,
    PLAN_NAME,
    Manifest,
    describe_files,
    manifest_sha256,
    read_manifest,
)
from mistral_trt.runtime import device, engine_folder
from mistral_trt.runtime.tensorrt import api
from mistral_trt.runtime.tensorrt.backend import TensorRtBackend, open_tensorrt_backend
from mistral_trt.weight_index import files_of, write_weight_index
from tests.simulated.device import Cudart, Device
from tests.simulated.plan import plan_bytes
from tests.simulated.spec import CudaDouble
from tests.simulated.tensorrt import SimulatedTensorRT

FLAVORS: dict[str, Any] = {
    "tensorrt-rtx": import_module("tensorrt_rtx"),
    "tensorrt": import_module("tensorrt_lean_bindings"),
}
"""Flavour → the installed module that its double is held to; of full TensorRT it is the runtime half."""


@dataclass
class Machine:
    """A simulated GPU with TensorRT and the CUDA runtime on it."""

    trt: Any
    cudart: Any
    device: Device

    def open(self, folder: Path, **options: Any) -> TensorRtBackend:
        """Open an engine folder; its kernels are kept beside it unless `cache_dir` says otherwise."""
        options.setdefault("cache_dir", folder.parent / "cache")
        manifest = read_manifest(folder, "engine", check_files=False)
        return open_tensorrt_backend(folder, manifest, trt=self.trt, cudart=self.cudart, **options)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Let `Engine.load` find this GPU, and both modules when it imports them."""
        found = LocalDevice(self.device.name, self.device.memory_bytes, "580.65.06", "8.6")
        patch.setattr(device, "local_device", lambda: found)
        patch.setattr(engine_folder, "installed_version", lambda name: FLAVORS[name].__version__)
        modules = {"cuda.bindings.runtime": self.cudart, "tensorrt": self.trt, "tensorrt_rtx": self.trt}
        patch.setattr(api, "import_module", modules.__getitem__)


def machine(flavor: str = "tensorrt-rtx", **facts: Any) -> Machine:
    """A GPU with nothing on it.  facts: of `Device`."""
    gpu = Device(**facts)
    cudart = CudaDouble(cuda.bindings.runtime, Cudart(gpu))
    return Machine(SimulatedTensorRT(FLAVORS[flavor], gpu), cudart, gpu)


def write_engine_folder(
    onnx: Path, out: Path, *, flavor: str = "tensorrt-rtx", weights: str = "embedded"
) -> Path:
    """Write what `mistral-trt build` would, with a plan that only the doubles can load."""
    out.mkdir(parents=True)
    source = read_manifest(onnx, check_files=False)
    (out / PLAN_NAME).write_bytes(plan_bytes(onnx, external=weights == "external"))
    if weights == "external":
        placed = refit_weights(onnx / GRAPH_NAME)
        for name in files_of(placed):
            shutil.copy(onnx / name, out / name)
        write_weight_index(out, placed)
    for name in source.details.get("text_files", ()):
        shutil.copy(onnx / name, out / name)
    made = engine_manifest(source, out, flavor, weights)
    replace(made, sources={"onnx": manifest_sha256(onnx), **source.sources}).write(out)
    return out


def engine_manifest(source: Manifest, out: Path, flavor: str, weights: str) -> Manifest:
    """The manifest of what lies in `out`."""
    contract = source.contract
    details = {
        "gpus": ["a10g"],
        "gpu_name": "NVIDIA A10G",
        "compute_capabilities": ["8.6"],
        "flavor": flavor,
        "tensorrt": FLAVORS[flavor].__version__,
        "weights": weights,
        "predicted": {
            "weights_bytes": source.details["weights_bytes"],
            "ring_bytes_per_row": contract.ring_bytes_per_row,
            "max_batch_size": contract.max_batch_size,
            "device_bytes": 10**9,
        },
        "graph_sha256": source.details.get("graph_sha256"),
        "generation": source.details.get("generation", {}),
        "text_files": source.details.get("text_files", []),
    }
    return Manifest("engine", describe_files(out), source.sources, contract, source.versions, details)
