"""ONNX folder + GPU → engine folder: `model.plan`, the tokenizer and a manifest."""

import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from mistral_trt.artifact import free_disk_bytes, new_artifact, require_apart
from mistral_trt.contract import GraphContract
from mistral_trt.engines.budget import (
    Budget,
    available_memory_bytes,
    check_device,
    check_host,
    check_plan,
    predict,
)
from mistral_trt.engines.callbacks import (
    BuilderLog,
    PhaseTree,
    PlanSink,
    make_logger,
    make_monitor,
    make_writer,
)
from mistral_trt.engines.compiled import compiled_summary
from mistral_trt.engines.flavor import AUTO, RTX, Flavor, check_weight_only, choose_flavor
from mistral_trt.engines.gpu import GpuTarget, check_precision, find_gpu
from mistral_trt.engines.network import add_profiles, one_line, parse_network
from mistral_trt.engines.quantized import Quantization, carried, read_quantization
from mistral_trt.errors import BuildError, ManifestError
from mistral_trt.manifest import (
    GRAPH_NAME,
    Manifest,
    describe_files,
    manifest_sha256,
    read_manifest,
    tool_versions,
)
from mistral_trt.progress import note, track

PLAN_NAME = "model.plan"

_CARRIED = ("name", "graph_sha256", "text_files", "generation")
_WASTE = {"ring_copies": "copies whole rings", "weights_dequantized": "dequantizes whole weights"}
_T = TypeVar("_T")
_LOG = logging.getLogger("mistral_trt")


@dataclass(frozen=True)
class Plan:
    """What a build says about the file it wrote.

    layers: layer type → count in the parsed network.  compiled: see `compiled.compiled_summary`.
    """

    sha256: str
    bytes: int
    layers: dict[str, int]
    compiled: dict[str, Any]


def build_engine(onnx_dir: Path, gpu: str, out: Path, *, flavor: str = AUTO) -> Manifest:
    """Build the ONNX folder for one GPU and write the engine folder `out`, all or nothing.

    gpu: key, name or alias from the catalogue.  flavor: see `flavor.choose_flavor`.
    Raises GpuError, BuildError, ManifestError, ArtifactError or MissingDependencyError.
    """
    require_apart(out, onnx_dir)
    source = read_manifest(onnx_dir, "onnx", check_files=False)
    target, chosen = check_target(gpu, source.contract.precision, flavor)
    trt, quantization = chosen.load(), read_quantization(source)
    budget = check_budget(source, target, out, quantization)
    repeated = carried_details(source)
    read_manifest(onnx_dir, "onnx")  # every byte, once nothing cheaper can refuse
    note(f"{target.name} ({target.sm}), {chosen.name} {trt.__version__}: {describe(budget)}")
    with new_artifact(out) as folder:
        with (folder / PLAN_NAME).open("wb") as file:
            plan = build_plan(
                trt, onnx_dir / GRAPH_NAME, source.contract, target, chosen, file, quantization=quantization
            )
        check_plan(budget, plan.bytes)
        warn_of_waste(plan)
        for name in repeated["text_files"]:
            shutil.copyfile(onnx_dir / name, folder / name)
        manifest = Manifest(
            stage="engine",
            files=describe_files(folder, {PLAN_NAME: plan.sha256}),
            sources={"onnx": manifest_sha256(onnx_dir), **source.sources},
            contract=source.contract,
            versions=tool_versions(chosen.name, "onnx"),
            details={**repeated, **engine_details(target, chosen.name, trt.__version__, budget, plan)},
        )
        manifest.write(folder)
    return manifest


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
        "weights": "embedded",
        "predicted": budget.to_json(),
        "plan_bytes": plan.bytes,
        "network_layers": plan.layers,
        "compiled": plan.compiled,
    }


def check_budget(
    source: Manifest, gpu: GpuTarget, out: Path, quantization: Quantization | None = None
) -> Budget:
    """Predict what the build and the engine need. Raises BuildError if that does not fit."""
    quantized_bytes = quantization.quantized_bytes if quantization else 0
    budget = predict(source.contract, _detail(source, "weights_bytes"), quantized_bytes=quantized_bytes)
    check_device(budget, gpu)
    memory, disk = available_memory_bytes(), free_disk_bytes(out)
    check_host(budget, out, memory_bytes=memory, disk_bytes=disk)
    return budget


def describe(budget: Budget) -> str:
    """The prediction, in one line."""
    return (
        f"{budget.weights_bytes / 1e9:.2f} GB of weights; predicted {budget.build_memory_bytes / 1e9:.2f} GB "
        f"of memory for the build, {budget.device_bytes / 1e9:.2f} GB on the GPU"
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
) -> Plan:
    """Parse, audit and build; the plan goes to `file` as it is made.

    Ctrl-C ends the build at its next step. Raises BuildError with TensorRT's own line.
    """
    log, cancel = BuilderLog(), threading.Event()
    sink = PlanSink(file, cancel)
    with track(f"building for {gpu.key}", 100, unit="%") as advance:
        phases = PhaseTree(advance)

        def work() -> dict[str, int]:
            logger = make_logger(trt, log)
            parsed = parse_network(trt, onnx, contract, logger, log, quantization=quantization)
            config = builder_config(trt, parsed.builder, contract, gpu, flavor)
            # Named, because TensorRT does not keep its callbacks alive.
            monitor, writer = make_monitor(trt, phases, cancel), make_writer(trt, sink)
            config.progress_monitor = monitor
            built = parsed.builder.build_serialized_network_to_stream(parsed.network, config, writer)
            require_clean(built, log, sink)
            return dict(parsed.layers)

        layers = interruptible(work, cancel)
        phases.finish()
    return Plan(sink.digest.hexdigest(), sink.bytes, layers, compiled_summary(log.verbose, contract))


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
        raise BuildError(f"TensorRT did not build cleanly: {one_line(log.problems[0])}")
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
