"""ONNX folder + GPUs → engine folder: `model.plan`, its weights, the tokenizer and a manifest."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mistral_trt.artifact import new_artifact
from mistral_trt.engines.build_key import BuildKey, build_key
from mistral_trt.engines.builder.plan import Plan, build_plan, warn_of_waste
from mistral_trt.engines.engine_cache import EngineCache
from mistral_trt.engines.flavor import AUTO, RTX
from mistral_trt.engines.network.placeholders import bring_weights, check_external_plan, refit_weights
from mistral_trt.engines.network.quantized import carried
from mistral_trt.engines.planning.budget import Budget, check_plan
from mistral_trt.engines.planning.roofline import ceilings
from mistral_trt.engines.planning.settle import Job, settle
from mistral_trt.engines.targets import TargetSet
from mistral_trt.errors import ManifestError
from mistral_trt.manifest import (
    GRAPH_NAME,
    PLAN_NAME,
    FileEntry,
    Manifest,
    describe_files,
    manifest_sha256,
    read_manifest,
    tool_versions,
)
from mistral_trt.progress import note
from mistral_trt.weight_index import RefitWeight, files_of, write_weight_index

_CARRIED = ("name", "graph_sha256", "text_files", "generation")


def build_engine(
    onnx_dir: Path,
    gpus: str | Iterable[str],
    out: Path,
    *,
    flavor: str = AUTO,
    weights: str = AUTO,
    max_batch_size: int | None = None,
    cache: EngineCache | None = None,
) -> Manifest:
    """Build the ONNX folder and write the engine folder `out`, all or nothing.

    gpus: keys, names or aliases from the catalogue; several share one plan.  flavor: see
    `flavor.choose_flavor`.  weights: see `wish.place_weights`.  max_batch_size: instead of the ONNX
    folder's; its graph takes any.  cache: where an equal build's plan may be found and is left, or None.
    Raises GpuError, BuildError, ManifestError, ArtifactError or MissingDependencyError.
    """
    job = settle(
        onnx_dir, gpus, out, flavor=flavor, weights=weights, max_batch_size=max_batch_size, cache=cache
    )
    return build_job(job, out, cache)


def build_job(job: Job, out: Path, cache: EngineCache | None = None) -> Manifest:
    """Do a build that is settled; the rest as of `build_engine`."""
    onnx_dir = job.onnx_dir
    external = refit_weights(onnx_dir / GRAPH_NAME) if job.external else None
    repeated = carried_details(job.source)
    read_manifest(onnx_dir, "onnx")  # every byte, once nothing cheaper can refuse
    note(describe(job))
    with new_artifact(out) as folder:
        plan = make_plan(job, folder / PLAN_NAME, external, cache)
        warn_of_waste(plan)
        manifest = Manifest(
            stage="engine",
            files=place_files(onnx_dir, job.source, folder, external or (), plan.sha256),
            sources={"onnx": manifest_sha256(onnx_dir), **job.source.sources},
            contract=job.source.contract,
            versions=tool_versions(job.flavor.name, "onnx"),
            details={
                **repeated,
                **engine_details(job.targets, job.flavor.name, job.trt.__version__, job.budget, plan),
            },
        )
        manifest.write(folder)
    return manifest


def make_plan(
    job: Job, path: Path, external: Sequence[RefitWeight] | None, cache: EngineCache | None
) -> Plan:
    """The plan of a job at `path`, a new file: an equal build's from the cache, or built now and left there.

    Raises BuildError.
    """
    key = key_of(job)
    if cache and (found := cache.find(key, path)):
        note(f"the plan of an equal build is used again ({key.digest}); --no-cache builds it anew")
        return Plan(found.sha256, found.bytes, found.details)
    if cache and (changes := cache.explain_miss(key)):
        note(f"an equal plan was built before, by other versions, and is built again: {changes}")
    with path.open("wb") as file:
        plan = build_plan(
            job.trt,
            job.onnx_dir / GRAPH_NAME,
            job.source.contract,
            job.targets,
            job.flavor,
            file,
            quantization=job.quantization,
            external=external,
        )
    if external is None:
        check_plan(job.budget, plan.bytes)
    else:
        check_external_plan(plan.bytes, job.source.config.num_hidden_layers)
    if cache:
        cache.store(key, path, plan.sha256, plan.details)
    return plan


def key_of(job: Job) -> BuildKey:
    """What the plan of a job depends on."""
    return build_key(
        job.source,
        compute_capabilities=job.targets.compute_capabilities,
        flavor=job.flavor.name,
        tensorrt=job.trt.__version__,
        weights=job.budget.weights,
        device=None if job.flavor == RTX else job.targets.smallest.name,
    )


def place_files(
    onnx_dir: Path, source: Manifest, folder: Path, weights: Sequence[RefitWeight], plan_sha256: str
) -> dict[str, FileEntry]:
    """Bring what an engine folder takes from its ONNX folder; the manifest's `files`, by known hashes."""
    for name in source.details["text_files"]:
        shutil.copyfile(onnx_dir / name, folder / name)
    known = {PLAN_NAME: plan_sha256}
    if weights:
        foreign = sorted(set(files_of(weights)) - set(source.files))
        if foreign:
            raise ManifestError(f"{onnx_dir}: {foreign[0]} holds weights and its manifest does not list it")
        bring_weights(weights, onnx_dir, folder)
        write_weight_index(folder, weights)
        known |= {name: source.files[name].sha256 for name in files_of(weights)}
    return describe_files(folder, known)


def carried_details(source: Manifest) -> dict[str, Any]:
    """What the engine's manifest repeats of the ONNX folder's. Raises ManifestError if it is not there."""
    missing = [key for key in _CARRIED if key not in source.details]
    if missing:
        raise ManifestError(
            f"the ONNX manifest has no {missing[0]!r} in its details; export the checkpoint again"
        )
    repeated = {key: source.details[key] for key in _CARRIED}
    if "quantization" in source.details:
        repeated["quantization"] = carried(source.details["quantization"])
    foreign = sorted(set(repeated["text_files"]) - set(source.files))
    if foreign:
        raise ManifestError(
            f"text_files of the ONNX manifest are not among its files: {foreign}; export again"
        )
    return repeated


def engine_details(
    targets: TargetSet, flavor: str, version: str, budget: Budget, plan: Plan
) -> dict[str, Any]:
    """What only an engine's manifest says. Under `predicted` nothing is measured."""
    roofs = {target.key: ceilings(budget, target).to_json() for target in targets.targets}
    return {
        "gpus": [target.key for target in targets.targets],
        "gpu_name": ", ".join(target.name for target in targets.targets),
        "compute_capabilities": list(targets.compute_capabilities),
        "flavor": flavor,
        "tensorrt": version,
        "weights": budget.weights,
        "predicted": {**budget.to_json(), "ceilings": roofs},
        "plan_bytes": plan.bytes,
        **plan.details,
    }


def describe(job: Job) -> str:
    """What begins now, in one line."""
    budget = job.budget
    where = "outside the plan" if job.external else "in the plan"
    names = ", ".join(f"{target.name} ({target.sm})" for target in job.targets.targets)
    return (
        f"{names}, {job.flavor.name} {job.trt.__version__}: {budget.weights_bytes / 1e9:.2f} GB of weights "
        f"{where}; predicted {budget.build_memory_bytes / 1e9:.2f} GB of memory for the build, "
        f"{budget.device_bytes / 1e9:.2f} GB on the GPU"
    )
