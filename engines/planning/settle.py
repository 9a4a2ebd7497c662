"""ONNX folder + GPUs + what is asked → a build that is settled: for what, by what, and that it fits.

Everything that can refuse a build without a long look at files or a run of TensorRT is here.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mistral_trt.artifact import free_disk_bytes, require_apart
from mistral_trt.contract import GraphContract
from mistral_trt.engines.engine_cache import EngineCache
from mistral_trt.engines.flavor import AUTO, RTX, Flavor, choose_flavor
from mistral_trt.engines.network.quantized import Quantization, read_quantization
from mistral_trt.engines.planning.budget import Budget, gigabytes, predict
from mistral_trt.engines.planning.host import Host, available_memory_bytes, can_link
from mistral_trt.engines.planning.remedy import remedy
from mistral_trt.engines.planning.wish import Wish, obstacle, place_weights, shortage
from mistral_trt.engines.targets import TargetSet, group_targets, parse_gpus
from mistral_trt.engines.versions import check_version, features_of
from mistral_trt.errors import BuildError, ManifestError
from mistral_trt.manifest import Manifest, read_manifest
from mistral_trt.progress import note
from mistral_trt.weight_index import EMBEDDED, EXTERNAL


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
    cache: EngineCache | None = None,
    polygraphy: bool = False,
) -> Job:
    """Settle a build; arguments and errors as of `build.build_engine`.

    polygraphy: its commands are to load the plan, which then has to hold its weights.
    """
    require_apart(out, onnx_dir)
    source = with_rows(read_manifest(onnx_dir, "onnx", check_files=False), max_batch_size)
    targets, chosen = check_target(gpus, source.contract.precision, flavor)
    trt, quantization = chosen.load(), read_quantization(source)
    wish = Wish(targets, flavor, chosen, weights, predict_budget(source, quantization), polygraphy)
    budget = settle_weights(wish, look_at_host(onnx_dir, out, cache), out)
    require_version(chosen, source.contract, budget)
    return Job(onnx_dir, source, targets, chosen, trt, budget, quantization)


def check_target(gpus: str | Iterable[str], precision: str, flavor: str = AUTO) -> tuple[TargetSet, Flavor]:
    """The GPUs and the TensorRT that can build for them here. Raises GpuError saying why there is none."""
    targets = group_targets(parse_gpus(gpus), precision, flavor)
    return targets, RTX if len(targets.targets) > 1 else choose_flavor(targets.smallest, flavor)


def require_version(flavor: Flavor, contract: GraphContract, budget: Budget) -> None:
    """Raise BuildError if the installed TensorRT is older than what the graph needs, or is not there."""
    features = features_of(contract, flavor.name, external=budget.weights == EXTERNAL)
    check_version(flavor.name, flavor.load().__version__, features)


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


def look_at_host(onnx_dir: Path, out: Path, cache: EngineCache | None = None) -> Host:
    """This machine, for a build into `out`.  cache: where its plan will be kept, or None."""
    host = Host(available_memory_bytes(), free_disk_bytes(out), can_link(onnx_dir, out))
    if cache is None or can_link(out, cache.folder):
        return host
    return replace(host, copy_bytes=free_disk_bytes(cache.folder), copy_limit_bytes=cache.limit_bytes)


def settle_weights(wish: Wish, host: Host, out: Path) -> Budget:
    """The budget with its weights where they will be. Raises BuildError with a remedy if it cannot be."""
    if refused := obstacle(wish, host):
        raise BuildError(f"{refused.words}; {remedy(wish, host, out)}")
    budget = place_weights(wish, host)
    for remark in _remarks(wish, budget, host):
        note(remark)
    return budget


def _remarks(wish: Wish, budget: Budget, host: Host) -> Iterator[str]:
    """What is not as one may have expected it, though the build may begin."""
    inside = shortage(replace(budget, weights=EMBEDDED), host)
    if wish.weights == AUTO and inside is not None:
        yield f"the weights stay outside the plan: {inside.words}"
    copy = host.kept_copy_bytes(budget.plan_bytes)
    if host.copy_bytes is not None and copy > host.copy_bytes:
        yield (
            f"predicted: to keep the plan for the next build takes {gigabytes(copy)} of the cache's disk, "
            f"and {gigabytes(host.copy_bytes)} is free there, so it will not be kept; free some, or set "
            "XDG_CACHE_HOME to a folder on another disk"
        )
