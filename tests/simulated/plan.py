"""An ONNX folder → the plan that would be built from it, as a text that says so, and what it computes."""

import ctypes
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort

from mistral_trt.contract import GraphContract, TensorSpec
from mistral_trt.engines.network.parse import profile_ranges
from mistral_trt.engines.network.placeholders import refit_weights
from mistral_trt.manifest import GRAPH_NAME, read_manifest
from mistral_trt.validate.twin import float32_twin

DTYPES = {"bfloat16": "BF16", "float16": "HALF", "float32": "FLOAT", "int64": "INT64", "int8": "INT8"}
_MAGIC = "a simulated plan"


@dataclass
class Tensor:
    """An input or output of an engine. Dimension letters are -1."""

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]
    location: str = "DEVICE"


@dataclass
class SimulatedPlan:
    """What an engine knows of itself; tests alter it before it is loaded.

    profiles: for each, input → (min, opt, max).  aliases: present → past.  weights: name → (dtype, count) of
    what has to be filled in.  activation_bytes: of a context.
    """

    onnx: Path
    contract: GraphContract
    tensors: list[Tensor]
    profiles: list[dict[str, tuple[tuple[int, ...], ...]]]
    aliases: dict[str, str]
    weights: dict[str, tuple[str, int]] = field(default_factory=dict)
    activation_bytes: int = 4096


def plan_bytes(onnx: Path, *, external: bool = False) -> bytes:
    """What stands in `model.plan`."""
    return json.dumps({"format": _MAGIC, "onnx": str(onnx), "external": external}).encode()


def parse_plan(data: bytes) -> SimulatedPlan | None:
    """None for what is no plan of ours."""
    try:
        content = json.loads(data)
        onnx, external = Path(content["onnx"]), content["external"]
    except (ValueError, KeyError, TypeError):
        return None
    contract = read_manifest(onnx, check_files=False).contract
    inputs, outputs = contract.inputs(), contract.outputs()
    weights = refit_weights(onnx / GRAPH_NAME) if external else []
    return SimulatedPlan(
        onnx=onnx,
        contract=contract,
        tensors=[_tensor(spec, spec in inputs) for spec in (*inputs, *outputs)],
        profiles=[
            {spec.name: tuple(_shape(spec, sizes) for sizes in ranges) for spec in inputs}
            for ranges in profile_ranges(contract).values()
        ],
        aliases={b.name: a.name for a, b in zip(contract.past(), contract.present(), strict=True)},
        weights={weight.name: (DTYPES[weight.dtype], weight.count) for weight in weights},
    )


def compute(
    plan: SimulatedPlan,
    weights: Mapping[str, bytes],
    shapes: Mapping[str, tuple[int, ...]],
    addresses: Mapping[str, int],
) -> None:
    """Run the graph on memory at these addresses, past and present of a ring being one."""
    contract = plan.contract
    if contract.cache_dtype == "bfloat16":
        _compute_wide(plan, shapes, addresses)
        return
    session = _session(plan.onnx) if not weights else _refitted(plan.onnx, tuple(sorted(weights.items())))
    binding = session.io_binding()
    for spec in contract.inputs():
        dtype = np.dtype(spec.dtype)
        binding.bind_input(spec.name, "cpu", 0, dtype, shapes[spec.name], addresses[spec.name])
    for spec in contract.outputs():
        dtype = np.dtype(spec.dtype)
        binding.bind_output(spec.name, "cpu", 0, dtype, shapes[spec.name], addresses[spec.name])
    session.run_with_iobinding(binding)


def _compute_wide(
    plan: SimulatedPlan, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]
) -> None:
    """The same in float32 for a bf16 graph, which ONNX Runtime cannot run; only the rings are rounded."""
    contract = plan.contract
    numbers = {"bfloat16": ml_dtypes.bfloat16}
    memory = {
        spec.name: read_array(addresses[spec.name], shapes[spec.name], numbers.get(spec.dtype, spec.dtype))
        for spec in (*contract.inputs(), *contract.outputs())
    }
    wide = {
        spec.name: memory[spec.name].astype(np.float32 if spec.dtype in numbers else spec.dtype)
        for spec in contract.inputs()
    }
    names = [spec.name for spec in contract.outputs()]
    for name, found in zip(names, _twin(plan.onnx).run(names, wide), strict=True):
        memory[name][...] = found.astype(memory[name].dtype)


def read_array(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """The array at an address, not a copy."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = (ctypes.c_ubyte * size).from_address(address)
    found: np.ndarray[Any, Any] = np.ctypeslib.as_array(raw).view(dtype).reshape(shape)
    return found


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return options


@cache
def _session(onnx: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(onnx / GRAPH_NAME), _options(), providers=["CPUExecutionProvider"])


@cache
def _twin(onnx: Path) -> ort.InferenceSession:
    contract = read_manifest(onnx, check_files=False).contract
    with float32_twin(onnx / GRAPH_NAME, contract) as (path, _):
        return ort.InferenceSession(str(path), _options(), providers=["CPUExecutionProvider"])


@cache
def _refitted(onnx: Path, weights: tuple[tuple[str, bytes], ...]) -> ort.InferenceSession:
    """A session whose weights are these bytes, whatever the files hold."""
    options, given = _options(), dict(weights)
    values = {}
    for weight in refit_weights(onnx / GRAPH_NAME):
        array = np.frombuffer(given[weight.name], weight.dtype).reshape(weight.shape)
        values[weight.name] = ort.OrtValue.ortvalue_from_numpy(array.copy())
    options.add_external_initializers(list(values), list(values.values()))
    return ort.InferenceSession(str(onnx / GRAPH_NAME), options, providers=["CPUExecutionProvider"])


def _tensor(spec: TensorSpec, is_input: bool) -> Tensor:
    shape = tuple(-1 if isinstance(dim, str) else dim for dim in spec.shape)
    return Tensor(spec.name, is_input, DTYPES[spec.dtype], shape)


def _shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)
