"""`model.plan` → an engine that is known to be the one that was built, and to be the contract's.

A plan is executable code: the bytes that are deserialized are the bytes that were hashed.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_trt.contract import GraphContract, TensorSpec
from mistral_trt.errors import EngineMismatchError
from mistral_trt.manifest import PLAN_NAME, Manifest, repair_command
from mistral_trt.runtime.mapped_file import hashed_file
from mistral_trt.runtime.tensorrt.log import TensorRtLog
from mistral_trt.tensorrt_names import TRT_DTYPES

PROFILES = ("decode", "prefill")
"""The optimization profiles in the order of the plan."""


@dataclass(frozen=True)
class Plan:
    """A deserialized plan.  runtime: TensorRT's, which must outlive the engine."""

    runtime: Any
    engine: Any


def load_plan(
    trt: Any, log: TensorRtLog, folder: Path, manifest: Manifest, *, plan: memoryview | None = None
) -> Plan:
    """Hash, deserialize and check the plan.

    plan: its bytes, where they were hashed already.
    Raises ManifestError if it is not the manifest's, EngineMismatchError if TensorRT does not take it or it
    is not the contract's.
    """
    log.take_errors()  # what was said of another engine
    runtime = trt.Runtime(log.logger)
    with hashed_file(folder, PLAN_NAME, manifest) if plan is None else nullcontext(plan) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EngineMismatchError(
            f"TensorRT {trt.__version__} does not load {folder / PLAN_NAME}{log.because()}; "
            f"make it again with: {repair_command(folder, 'engine', manifest.details)}"
        )
    try:
        check_engine(trt, engine, manifest.contract)
    except EngineMismatchError as error:
        repair = repair_command(folder, "engine", manifest.details)
        raise EngineMismatchError(
            f"{folder / PLAN_NAME} is not a plan of the graph that its manifest describes: {error}; "
            f"make it again with: {repair}"
        ) from error
    return Plan(runtime, engine)


def check_engine(trt: Any, engine: Any, contract: GraphContract) -> None:
    """Raise EngineMismatchError unless names, dtypes, shapes, profiles and aliases are the contract's."""
    _check_names(trt, engine, contract)
    for spec in (*contract.inputs(), *contract.outputs()):
        _check_tensor(trt, engine, spec)
    _check_profiles(engine, contract)
    for past, present in zip(contract.past(), contract.present(), strict=True):
        alias = engine.get_aliased_input_tensor(present.name)
        if alias != past.name:
            raise EngineMismatchError(
                f"expected {present.name} on the memory of {past.name}, found it on that of {alias!r}"
            )


def _check_names(trt: Any, engine: Any, contract: GraphContract) -> None:
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    modes = ((trt.TensorIOMode.INPUT, contract.inputs()), (trt.TensorIOMode.OUTPUT, contract.outputs()))
    for mode, specs in modes:
        found = {name for name in names if engine.get_tensor_mode(name) == mode}
        if odd := sorted(found ^ {spec.name for spec in specs}):
            is_here = "found" if odd[0] in found else "expected"
            raise EngineMismatchError(f"{len(odd)} tensors are not those of the contract: {is_here} {odd[0]}")


def _check_tensor(trt: Any, engine: Any, spec: TensorSpec) -> None:
    expected = (getattr(trt.DataType, TRT_DTYPES[spec.dtype]), _wild(spec), trt.TensorLocation.DEVICE)
    found = (
        engine.get_tensor_dtype(spec.name),
        tuple(engine.get_tensor_shape(spec.name)),
        engine.get_tensor_location(spec.name),
    )
    if found != expected:
        raise EngineMismatchError(f"{spec.name}: expected {_words(expected)}, found {_words(found)}")


def _check_profiles(engine: Any, contract: GraphContract) -> None:
    """Each profile takes at least what the contract's has."""
    if engine.num_optimization_profiles != len(PROFILES):
        raise EngineMismatchError(
            f"expected {len(PROFILES)} optimization profiles, found {engine.num_optimization_profiles}"
        )
    for index, name in enumerate(PROFILES):
        lowest, _, most = contract.profiles()[name]
        for spec in contract.inputs():
            least, _, largest = (tuple(d) for d in engine.get_tensor_profile_shape(spec.name, index))
            wanted = shape_of(spec, lowest), shape_of(spec, most)
            inside = all(a <= b for a, b in zip(least, wanted[0], strict=True)) and all(
                a >= b for a, b in zip(largest, wanted[1], strict=True)
            )
            if not inside:
                raise EngineMismatchError(
                    f"{spec.name} in profile {name}: expected room for {list(wanted[0])} to "
                    f"{list(wanted[1])}, found {list(least)} to {list(largest)}"
                )


def shape_of(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A tensor's shape where the dimension letters have these sizes."""
    return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)


def _wild(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(-1 if isinstance(dim, str) else dim for dim in spec.shape)


def _words(found: tuple[Any, tuple[int, ...], Any]) -> str:
    dtype, shape, location = found
    return f"{dtype.name} {list(shape)} on {location.name}"
