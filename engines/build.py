"""ONNX folder + GPU → engine folder: `model.plan`, its weights, the tokenizer and a manifest."""

import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from mistral_trt.artifact import free_disk_bytes, new_artifact, require_apart
from mistral_trt.contract import GraphContract
from mistral_trt.engines.audit import AuditReport
from mistral_trt.engines.blame import blame
from mistral_trt.engines.budget import (
    Budget,
    check_host,
    check_plan,
    predict,
)
from mistral_trt.engines.build_memory import EMBEDDED, EXTERNAL
from mistral_trt.engines.callbacks import (
    BuilderLog,
    PhaseTree,
    PlanSink,
    make_monitor,
    make_writer,
    only_build,
)
from mistral_trt.engines.compiled import compiled_summary
from mistral_trt.engines.external import (
    bring_weights,
    check_external_plan,
    refit_weights,
    replace_by_placeholders,
    set_external,
)
from mistral_trt.engines.flavor import AUTO, RTX, Flavor, check_weight_only, choose_flavor
from mistral_trt.engines.gpu import GpuTarget, check_precision, find_gpu
from mistral_trt.engines.host import available_memory_bytes, can_link
from mistral_trt.engines.network import add_profiles, one_line, parse_network
from mistral_trt.engines.quantized import Quantization, carried, read_quantization
from mistral_trt.engines.remedy import check_device
from mistral_trt.engines.roofline import ceilings
from mistral_trt.engines.versions import check_version, features_of
from mistral_trt.errors import BuildError, ManifestError
from mistral_trt.manifest import (
    GRAPH_NAME,
    FileEntry,
    Manifest,
    describe_files,
    manifest_sha256,
    read_manifest,
    tool_versions,
)
from mistral_trt.progress import note, track
from mistral_trt.weight_index import RefitWeight, files_of, write_weight_index

PLAN_NAME = "model.plan"

WEIGHTS = (AUTO, EMBEDDED, EXTERNAL)
"""Where the weights may be: in the plan, or beside it."""

_CARRIED = ("name", "graph_sha256", "text_files", "generation")
_WASTE = {"ring_copies": "copies whole rings", "weights_dequantized": "dequantizes whole weights"}
_T = TypeVar("_T")
_LOG = logging.getLogger("mistral_trt")


@dataclass(frozen=True)
class Plan:
    """What a build says about the file it wrote.

    layers: layer type → count in the parsed network.  compiled: see `compiled.compiled_summary`.
    audit: what was looked at before the build.
    """

    sha256: str
    bytes: int
    layers: dict[str, int]
    compiled: dict[str, Any]
    audit: AuditReport = field(default_factory=AuditReport)


def build_engine(
    onnx_dir: Path,
    gpu: str,
    out: Path,
    *,
    flavor: str = AUTO,
    weights: str = AUTO,
    max_batch_size: int | None = None,
) -> Manifest:
    """Build the ONNX folder for one GPU and write the engine folder `out`, all or nothing.

    gpu: key, name or alias from the catalogue.  flavor: see `flavor.choose_flavor`.
    weights: see `choose_weights`.  max_batch_size: instead of the ONNX folder's; its graph takes any.
    Raises GpuError, BuildError, ManifestError, ArtifactError or MissingDependencyError.
    """
    require_apart(out, onnx_dir)
    source = with_rows(read_manifest(onnx_dir, "onnx", check_files=False), max_batch_size)
    target, chosen = check_target(gpu, source.contract.precision, flavor)
    trt, quantization = chosen.load(), read_quantization(source)
    budget = settle_weights(weights, check_budget(source, target, quantization), onnx_dir, out)
    kind = budget.weights
    check_version(
        chosen.name, trt.__version__, features_of(source.contract, chosen.name, external=kind == EXTERNAL)
    )
    external = refit_weights(onnx_dir / GRAPH_NAME) if kind == EXTERNAL else None
    repeated = carried_details(source)
    read_manifest(onnx_dir, "onnx")  # every byte, once nothing cheaper can refuse
    note(f"{target.name} ({target.sm}), {chosen.name} {trt.__version__}: {describe(budget, kind)}")
    with new_artifact(out) as folder:
        with (folder / PLAN_NAME).open("wb") as file:
            build = partial(build_plan, trt, onnx_dir / GRAPH_NAME, source.contract, target, chosen)
            plan = build(file, quantization=quantization, external=external)
        check_size(plan, budget, source.contract, external)
        warn_of_waste(plan)
        made = engine_details(target, chosen.name, trt.__version__, budget, plan)
        manifest = Manifest(
            stage="engine",
            files=place_files(onnx_dir, source, folder, external or (), plan.sha256),
            sources={"onnx": manifest_sha256(onnx_dir), **source.sources},
            contract=source.contract,
            versions=tool_versions(chosen.name, "onnx"),
            details={**repeated, **made, "weights": kind},
        )
        manifest.write(folder)
    return manifest


def with_rows(source: Manifest, max_batch_size: int | None) -> Manifest:
    """The ONNX manifest for engines of so many rows; None keeps what it says. Raises ConfigError."""
    if max_batch_size is None:
        return source
    return replace(source, contract=replace(source.contract, max_batch_size=max_batch_size))


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


def check_size(
    plan: Plan, budget: Budget, contract: GraphContract, external: Sequence[RefitWeight] | None
) -> None:
    """Hold the plan to the size it must have with or without weights. Raises BuildError."""
    if external is not None:
        check_external_plan(plan.bytes, contract.config.num_hidden_layers)
        return
    check_plan(budget, plan.bytes)


def check_target(gpu: str, precision: str, flavor: str = AUTO) -> tuple[GpuTarget, Flavor]:
    """The GPU and the TensorRT that can build for it here. Raises GpuError saying why there is none."""
    target = find_gpu(gpu)
    check_precision(target, precision)
    check_weight_only(target, precision, flavor)
    chosen = choose_flavor(target, flavor)
    check_weight_only(target, precision, chosen.name)
    return target, chosen


def carried_details(source: Manifest) -> dict[str, Any]:
    """What the engine's manifest repeats of the ONNX folder's. Raises ManifestError if it is not there."""
    repeated = {key: _detail(source, key) for key in _CARRIED}
    if "quantization" in source.details:
        repeated["quantization"] = carried(source.details["quantization"])
    foreign = sorted(set(repeated["text_files"]) - set(source.files))
    if foreign:
        raise ManifestError(
            f"text_files of the ONNX manifest are not among its files: {foreign}; export again"
        )
    return repeated


def engine_details(gpu: GpuTarget, flavor: str, version: str, budget: Budget, plan: Plan) -> dict[str, Any]:
    """What only an engine's manifest says. Under `predicted` nothing is measured."""
    return {
        "gpu": gpu.key,
        "gpu_name": gpu.name,
        "compute_capability": gpu.compute_capability,
        "flavor": flavor,
        "tensorrt": version,
        "predicted": {**budget.to_json(), "ceilings": ceilings(budget, gpu).to_json()},
        "plan_bytes": plan.bytes,
        "network_layers": plan.layers,
        "audit": plan.audit.to_json(),
        "compiled": plan.compiled,
    }


def check_budget(source: Manifest, gpu: GpuTarget, quantization: Quantization | None = None) -> Budget:
    """Predict what the build and the engine need. Raises BuildError if the GPU is too small for it."""
    budget = predict_budget(source, quantization)
    check_device(budget, gpu)
    return budget


def predict_budget(source: Manifest, quantization: Quantization | None = None) -> Budget:
    """What the ONNX folder's engine needs, weights embedded."""
    quantized_bytes = quantization.quantized_bytes if quantization else 0
    return predict(source.contract, _detail(source, "weights_bytes"), quantized_bytes=quantized_bytes)


def describe(budget: Budget, weights: str = EMBEDDED) -> str:
    """The prediction, in one line."""
    build = f"predicted {budget.build_memory_bytes / 1e9:.2f} GB of memory for the build"
    return (
        f"{budget.weights_bytes / 1e9:.2f} GB of weights, "
        f"{build if weights == EMBEDDED else 'outside the plan'}; "
        f"predicted {budget.device_bytes / 1e9:.2f} GB on the GPU"
    )


def build_plan(
    trt: Any,
    onnx: Path,
    contract: GraphContract,
    gpu: GpuTarget,
    flavor: Flavor,
    file: BinaryIO,
    *,
    quantization: Quantization | None = None,
    external: Sequence[RefitWeight] | None = None,
) -> Plan:
    """Parse, audit and build; the plan goes to `file` as it is made.

    external: the weights to leave out of the plan; None leaves all in.
    Ctrl-C ends the build at its next step. Raises BuildError with TensorRT's own line.
    """
    log, cancel = BuilderLog(), threading.Event()
    sink = PlanSink(file, cancel)
    with only_build(trt, log) as logger, track(f"building for {gpu.key}", 100, unit="%") as advance:
        phases = PhaseTree(advance)

        def work() -> tuple[dict[str, int], AuditReport]:
            parsed = parse_network(trt, onnx, contract, logger, log, quantization=quantization)
            config = builder_config(trt, parsed.builder, contract, gpu, flavor)
            if external is not None:  # after the audit, which knows the parser's own constants
                replace_by_placeholders(trt, parsed.network, external)
                set_external(trt, config)
            # Named, because TensorRT does not keep its callbacks alive.
            monitor, writer = make_monitor(trt, phases, cancel), make_writer(trt, sink)
            config.progress_monitor = monitor
            built = parsed.builder.build_serialized_network_to_stream(parsed.network, config, writer)
            require_clean(built, log, sink)
            return dict(parsed.layers), parsed.audit

        layers, audit = interruptible(work, cancel)
        phases.finish()
    return Plan(sink.digest.hexdigest(), sink.bytes, layers, compiled_summary(log.verbose, contract), audit)


def builder_config(trt: Any, builder: Any, contract: GraphContract, gpu: GpuTarget, flavor: Flavor) -> Any:
    """Profiles and target. Full TensorRT has no target to set: it builds for the GPU it runs on."""
    config = builder.create_builder_config()
    add_profiles(builder, config, contract)
    # The report of the compiled layers is the only look into a plan that needs no GPU.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if flavor == RTX:
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(trt.ComputeCapability, gpu.sm), 0):
            raise BuildError(f"{flavor.name} {trt.__version__} does not take {gpu.sm} as a target")
    return config


def require_clean(built: bool, log: BuilderLog, sink: PlanSink) -> None:
    """Raise unless TensorRT built a plan, wrote all of it and had nothing to say against it."""
    if sink.error is not None:
        raise sink.error
    if log.problems:
        raise BuildError(f"TensorRT did not build cleanly: {blame(one_line(log.problems[0]))}")
    if not built:
        raise BuildError("TensorRT built no plan and gave no reason")


def warn_of_waste(plan: Plan) -> None:
    """Say so if the compiled plan moves whole rings or weights: it is right, but every step pays for it."""
    for fact, what in _WASTE.items():
        found = {name: count for name, count in plan.compiled.get(fact, {}).items() if count}
        if found:
            _LOG.warning("the plan %s in every step (%s), which costs time", what, found)


def interruptible(work: Callable[[], _T], cancel: threading.Event) -> _T:
    """Run `work` in a thread, so that Ctrl-C reaches us and not a callback of TensorRT's.

    On Ctrl-C sets `cancel`, waits for `work` to end and raises KeyboardInterrupt.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work)
        try:
            return future.result()
        except KeyboardInterrupt:
            cancel.set()
            note("stopping the build at its next step")
            raise


def _detail(source: Manifest, key: str) -> Any:
    if key not in source.details:
        raise ManifestError(f"the ONNX manifest has no {key!r} in its details; export the checkpoint again")
    return source.details[key]
