"""ONNX folder + GPUs + what is asked → a build that is settled: for what, by what, and that it fits.

Everything that can refuse a build without a long look at files or a run of TensorRT is here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mistral_trt.artifact import free_disk_bytes
from mistral_trt.engines.builder.versions import check_version, features_of
from mistral_trt.engines.flavor import AUTO, RTX, Flavor, check_weight_only, choose_flavor
from mistral_trt.engines.network.quantized import Quantization, read_quantization
from mistral_trt.engines.planning.budget import Budget, check_host, predict
from mistral_trt.engines.planning.build_memory import EMBEDDED, EXTERNAL
from mistral_trt.engines.planning.host import available_memory_bytes, can_link
from mistral_trt.engines.planning.remedy import check_device
from mistral_trt.engines.targets import TargetSet, group_targets, parse_gpus
from mistral_trt.errors import BuildError, ManifestError
from mistral_trt.manifest import Manifest, read_manifest
from mistral_trt.progress import note

WEIGHTS = (AUTO, EMBEDDED, EXTERNAL)
"""Where the weights may be: in the plan, or beside it."""


@dataclass(frozen=True)
class Job:
    """A build that may begin.

    source: the ONNX folder's manifest, with the rows that the engine is to have.  trt: the module.
    """

    onnx_dir: Path
    source: Manifest
    targets: TargetSet
    flavor: Flavor
    trt: Any
    budget: Budget
    quantization: Quantization | None

    @property
    def external(self) -> bool:
        """Whether the weights stay outside the plan."""
        return self.budget.weights == EXTERNAL


def settle(
    onnx_dir: Path,
    gpus: str | Iterable[str],
    out: Path,
    *,
    flavor: str = AUTO,
    weights: str = AUTO,
    max_batch_size: int | None = None,
) -> Job:
    """Settle a build; arguments and errors as of `build.build_engine`."""
    source = with_rows(read_manifest(onnx_dir, "onnx", check_files=False), max_batch_size)
    targets, chosen = check_target(gpus, source.contract.precision, flavor)
    trt, quantization = chosen.load(), read_quantization(source)
    budget = predict_budget(source, quantization)
    check_device(budget, targets.smallest)
    budget = settle_weights(weights, budget, onnx_dir, out)
    job = Job(onnx_dir, source, targets, chosen, trt, budget, quantization)
    features = features_of(source.contract, chosen.name, external=job.external)
    check_version(chosen.name, trt.__version__, features)
    return job


def check_target(gpus: str | Iterable[str], precision: str, flavor: str = AUTO) -> tuple[TargetSet, Flavor]:
    """The GPUs and the TensorRT that can build for them here. Raises GpuError saying why there is none."""
    targets = group_targets(parse_gpus(gpus), precision, flavor)
    for target in targets.targets:
        check_weight_only(target, precision, flavor)
    chosen = RTX if len(targets.targets) > 1 else choose_flavor(targets.smallest, flavor)
    for target in targets.targets:
        check_weight_only(target, precision, chosen.name)
    return targets, chosen


def with_rows(source: Manifest, max_batch_size: int | None) -> Manifest:
    """The ONNX manifest for engines of so many rows; None keeps what it says. Raises ConfigError."""
    if max_batch_size is None:
        return source
    return replace(source, contract=replace(source.contract, max_batch_size=max_batch_size))


def predict_budget(source: Manifest, quantization: Quantization | None = None) -> Budget:
    """What the ONNX folder's engine needs, weights embedded. Raises ManifestError."""
    if "weights_bytes" not in source.details:
        raise ManifestError(
            "the ONNX manifest has no 'weights_bytes' in its details; export the checkpoint again"
        )
    quantized_bytes = quantization.quantized_bytes if quantization else 0
    return predict(source.contract, source.details["weights_bytes"], quantized_bytes=quantized_bytes)


def settle_weights(wanted: str, budget: Budget, onnx_dir: Path, out: Path) -> Budget:
    """The budget with its weights where `choose_weights` puts them. Raises BuildError if it does not fit."""
    budget = replace(budget, weights=choose_weights(wanted, budget, out))
    memory, disk = available_memory_bytes(), free_disk_bytes(out)
    check_host(budget, out, memory_bytes=memory, disk_bytes=disk, linked=can_link(onnx_dir, out))
    return budget


def choose_weights(wanted: str, budget: Budget, out: Path) -> str:
    """Where the weights will be: "embedded" in the plan, or "external" to it.

    wanted: one of those, or "auto": embedded where this machine has the memory and the disk for it.
    Raises BuildError if they must be embedded and do not fit.
    """
    if wanted not in WEIGHTS:
        raise BuildError(f"weights must be one of {', '.join(WEIGHTS)}, found {wanted!r}")
    if wanted == EXTERNAL:
        return EXTERNAL
    try:
        memory, disk = available_memory_bytes(), free_disk_bytes(out)
        check_host(budget, out, memory_bytes=memory, disk_bytes=disk)
    except BuildError as error:
        if wanted == EMBEDDED:
            raise
        note(f"the weights stay outside the plan: {error}")
        return EXTERNAL
    return EMBEDDED
