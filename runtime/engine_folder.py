"""Engine folder + this machine → fit to be deserialized, or a refusal that says what to do.

What can be known from files comes first: what the manifest says, the plan's hash, the weight files, the
installed TensorRT. Only then is a GPU looked for. A plan is executable code: nothing loads it before all
of this has passed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_trt.devices import VISIBLE, Device
from mistral_trt.errors import EngineMismatchError, ManifestError
from mistral_trt.manifest import PLAN_NAME, Manifest, repair_command
from mistral_trt.packages import installed_version, release
from mistral_trt.tensorrt_names import FLAVORS
from mistral_trt.weight_index import EMBEDDED, EXTERNAL, INDEX_NAME, files_of, read_weight_index

_PREDICTED = ("device_bytes", "ring_bytes_per_row", "max_batch_size")


@dataclass(frozen=True)
class EngineDetails:
    """What the loader needs of an engine manifest's `details`.

    compute_capabilities, gpus: one entry for each GPU the plan was built for.  version: of the TensorRT that
    built it.  device_bytes: predicted GPU memory for every row of the rings.
    """

    compute_capabilities: tuple[str, ...]
    gpus: tuple[str, ...]
    gpu_name: str
    flavor: str
    version: str
    weights: str
    device_bytes: int


def read_engine_details(manifest: Manifest) -> EngineDetails:
    """Read and check them. Raises ManifestError naming the field that is missing or wrong."""
    details = manifest.details
    capabilities = _names(details, "compute_capabilities")
    if not all(re.fullmatch(r"\d+\.\d", capability) for capability in capabilities):
        raise ManifestError(f'compute capabilities must look like "8.6", found {list(capabilities)}')
    predicted = details.get("predicted")
    if not isinstance(predicted, Mapping) or not all(_is_count(predicted.get(key)) for key in _PREDICTED):
        raise ManifestError(f"details.predicted must hold the numbers {', '.join(_PREDICTED)}")
    # The rings are counted by the contract, which the engine runs by.
    contract = manifest.contract
    rest = predicted["device_bytes"] - predicted["ring_bytes_per_row"] * predicted["max_batch_size"]
    return EngineDetails(
        compute_capabilities=capabilities,
        gpus=_names(details, "gpus"),
        gpu_name=_text(details, "gpu_name"),
        flavor=_one_of(details, "flavor", FLAVORS),
        version=_text(details, "tensorrt"),
        weights=_one_of(details, "weights", (EMBEDDED, EXTERNAL)),
        device_bytes=rest + contract.ring_bytes_per_row * contract.max_batch_size,
    )


def check_engine_folder(folder: Path, manifest: Manifest) -> None:
    """Raise ManifestError unless this is an engine, by all that its files say without being hashed.

    manifest: as `read_manifest` gave it, so names and sizes hold.
    """
    try:
        details = read_engine_details(manifest)
        _check_files(manifest, details)
    except ManifestError as error:
        repair = repair_command(folder, "engine", manifest.details)
        raise ManifestError(
            f"{folder} is not an engine that can be loaded: {error}; make it again with: {repair}"
        ) from error
    if details.weights == EXTERNAL:
        _check_weights(folder, manifest)


def check_machine(folder: Path, manifest: Manifest, find_device: Callable[[], Device | None]) -> None:
    """Raise EngineMismatchError unless this machine may deserialize the plan of that engine folder.

    find_device: the GPU here, None without one; called last.
    """
    details = read_engine_details(manifest)
    _check_tensorrt(folder, details)
    _check_device(folder, manifest, details, find_device())


def _check_files(manifest: Manifest, details: EngineDetails) -> None:
    needed = [PLAN_NAME, *([INDEX_NAME] if details.weights == EXTERNAL else [])]
    if missing := [name for name in needed if name not in manifest.files]:
        raise ManifestError(f"{missing[0]} is not among its files")
    if manifest.files[PLAN_NAME].bytes == 0:
        raise ManifestError(f"{PLAN_NAME} is empty")


def _check_weights(folder: Path, manifest: Manifest) -> None:
    """Every weight lies inside a file whose size and hash the manifest vouches for."""
    foreign = sorted(set(files_of(read_weight_index(folder))) - set(manifest.files))
    if foreign:
        repair = repair_command(folder, "engine", manifest.details)
        raise ManifestError(
            f"{folder / INDEX_NAME} names {foreign[0]!r}, which is not among the manifest's files; make the "
            f"folder again with: {repair}"
        )


def _check_tensorrt(folder: Path, details: EngineDetails) -> None:
    """The plan's own TensorRT, and no other version: plans do not carry over."""
    found = installed_version(details.flavor)
    if found is not None and release(found) == release(details.version):
        return
    others = [f"{name} {version}" for name in FLAVORS if (version := installed_version(name)) is not None]
    again = _rebuild(folder, details, ",".join(details.gpus))
    raise EngineMismatchError(
        f"{folder} was built with {details.flavor} {details.version}, a plan runs in that version only, "
        f"and this machine has {' and '.join(others) or 'no TensorRT'}; "
        f"run: pip install {details.flavor}=={details.version}"
        + (f", or build the engine again with: {again}" if found else "")
    )


def _check_device(folder: Path, manifest: Manifest, details: EngineDetails, device: Device | None) -> None:
    """The same compute capability, under whatever name, with enough memory."""
    if device is None:
        raise EngineMismatchError(
            f"{folder} was built for {details.gpu_name}, and this machine has no NVIDIA GPU (or no driver, "
            f"or {VISIBLE} hides it); "
            "run the ONNX folder it was built from, which needs none: "
            "mistral-trt generate ONNX_DIR --prompt TEXT"
        )
    if device.compute_capability not in details.compute_capabilities:
        raise EngineMismatchError(
            f"{folder} was built for {details.gpu_name} (compute capability "
            f"{' or '.join(details.compute_capabilities)}), and this machine has {device.name} "
            f"({device.compute_capability}); build for it (`mistral-trt gpus` has the names): "
            f"{_rebuild(folder, details, device.name)}"
        )
    if device.memory_bytes is not None and details.device_bytes > device.memory_bytes:
        _refuse_memory(folder, manifest, details, device.name, device.memory_bytes)


def _refuse_memory(
    folder: Path, manifest: Manifest, details: EngineDetails, name: str, memory_bytes: int
) -> None:
    """Say how many rows would fit. Never returns."""
    contract = manifest.contract
    rest = details.device_bytes - contract.max_batch_size * contract.ring_bytes_per_row
    rows = (memory_bytes - rest) // contract.ring_bytes_per_row
    fewer = f" --max-batch-size {rows}" if rows >= 1 else ""
    remedy = "build with fewer rows: " if rows >= 1 else "not one row would fit, so build for a larger GPU: "
    again = _rebuild(folder, details, ",".join(details.gpus) if rows >= 1 else "GPU")
    raise EngineMismatchError(
        f"{folder} needs {details.device_bytes / 1e9:.2f} GB of GPU memory by prediction "
        f"({contract.max_batch_size} rows of {contract.ring_bytes_per_row / 1e9:.3f} GB among it), "
        f"and {name} has {memory_bytes / 1e9:.2f} GB; {remedy}"
        f"{again}{fewer}"
    )


def _rebuild(folder: Path, details: EngineDetails, gpus: str) -> str:
    return repair_command(folder, "engine", {"gpus": [gpus], "weights": details.weights})


def _names(details: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = details.get(key)
    if (
        not isinstance(found, list)
        or not found
        or not all(isinstance(name, str) and name.strip() for name in found)
    ):
        raise ManifestError(f"details.{key} must be a list of names, found {found!r}")
    return tuple(" ".join(name.split()) for name in found)


def _text(details: Mapping[str, Any], key: str) -> str:
    found = details.get(key)
    if not isinstance(found, str) or not found.strip():
        raise ManifestError(f"details.{key} must be a text, found {found!r}")
    return " ".join(found.split())


def _one_of(details: Mapping[str, Any], key: str, known: tuple[str, ...]) -> str:
    if details.get(key) not in known:
        raise ManifestError(f"details.{key} must be {' or '.join(known)}, found {details.get(key)!r}")
    return str(details[key])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
