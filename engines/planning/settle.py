"""ONNX folder + GPUs + what is asked → a build that is settled: for what, by what, and that it fits.

Everything that can refuse a build without a long look at files or a run of TensorRT is here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mistral_trt.artifact import free_disk_bytes
from mistral_trt.contract import GraphContract
from mistral_trt.engines.builder.versions import check_version, features_of
from mistral_trt.engines.flavor import AUTO, RTX, Flavor, check_weight_only, choose_flavor
from mistral_trt.engines.network.quantized import Quantization, read_quantization
from mistral_trt.engines.planning.budget import Budget, check_host, predict, shortage
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
    budget = settle_weights(weights_of(targets, weights), budget, onnx_dir, out)
    require_version(chosen, source.contract, budget)
    return Job(onnx_dir, source, targets, chosen, trt, budget, quantization)


def check_target(gpus: str | Iterable[str], precision: str, flavor: str = AUTO) -> tuple[TargetSet, Flavor]:
    """The GPUs and the TensorRT that can build for them here. Raises GpuError saying why there is none."""
    targets = group_targets(parse_gpus(gpus), precision, flavor)
    for target in targets.targets:
        check_weight_only(target, precision, flavor)
    chosen = RTX if len(targets.targets) > 1 else choose_flavor(targets.smallest, flavor)
    for target in targets.targets:
        check_weight_only(target, precision, chosen.name)
    return targets, chosen


def require_version(flavor: Flavor, contract: GraphContract, budget: Budget) -> None:
    """Raise BuildError if the installed TensorRT is older than what the graph needs, or is not there."""
    features = features_of(contract, flavor.name, external=budget.weights == EXTERNAL)
    check_version(flavor.name, flavor.load().__version__, features)


def weights_of(targets: TargetSet, wanted: str) -> str:
    """Where the weights of a plan for these GPUs may be: a plan for several architectures holds them.

    TensorRT-RTX 1.7.1 fails inside on a single refittable weight there ("CHECK(sm_vers_.size() == 1)"), and
    so does every later build of the process. Raises BuildError naming the builds that work.
    """
    if len(targets.sms) == 1:
        return wanted
    if wanted == EXTERNAL:
        groups = [[gpu.key for gpu in targets.targets if gpu.sm == sm] for sm in targets.sms]
        commands = [
            f"mistral-trt build ONNX_DIR --gpu {','.join(keys)} --weights external --out DIR"
            for keys in groups
        ]
        raise BuildError(
            f"a plan for several compute capabilities ({', '.join(targets.compute_capabilities)}) cannot "
            "leave its weights out: TensorRT-RTX does not build it; use --weights embedded, or build one "
            f"engine for each: {'; '.join(commands)}"
        )
    return EMBEDDED if wanted == AUTO else wanted


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
    """The budget with its weights where they will be: "embedded" in the plan, or "external" to it.

    wanted: one of those, or "auto": embedded where this machine has the memory and the disk for it.
    Raises BuildError if it does not fit this machine as it is wanted.
    """
    if wanted not in WEIGHTS:
        raise BuildError(f"weights must be one of {', '.join(WEIGHTS)}, found {wanted!r}")
    memory, disk, linked = available_memory_bytes(), free_disk_bytes(out), can_link(onnx_dir, out)
    inside, outside = (replace(budget, weights=weights) for weights in (EMBEDDED, EXTERNAL))
    settled = outside if wanted == EXTERNAL else inside
    if wanted == AUTO and (short := shortage(inside, memory_bytes=memory, disk_bytes=disk, linked=linked)):
        note(f"the weights stay outside the plan: {short}")
        settled = outside
    check_host(settled, out, memory_bytes=memory, disk_bytes=disk, linked=linked)
    return settled
