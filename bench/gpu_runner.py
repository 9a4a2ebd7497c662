"""A TensorRT plan + a GPU → logits: the smallest backend that keeps its rings on the device.

Past and present of a ring are one address, as KVCacheUpdate demands. `trt` is tensorrt or tensorrt_rtx and
`cudart` is cuda.bindings.runtime; both come as arguments, so that the tests can put a simulation in their
place. It stands in for `OnnxRuntimeBackend` behind a `RollingCache`.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mistral_trt.contract import GraphContract, TensorSpec
from mistral_trt.engines.versions import install_command
from mistral_trt.errors import EngineMismatchError, MissingDependencyError
from mistral_trt.runtime.cache import Logits, RingArray, Step
from mistral_trt.tensorrt_names import MODULES, TRT_DTYPES
from mistral_trt.weight_index import RefitWeight, read_weight_index

DECODE, PREFILL = 0, 1  # the optimization profiles, in the order of `contract.profiles()`

_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
_ALIGNMENT = 256


def load_gpu(module: str) -> tuple[Any, Any]:
    """The modules `trt` and `cudart`.  module: tensorrt or tensorrt_rtx. Raises MissingDependencyError."""
    (flavor,) = (name for name, its_module in MODULES.items() if its_module == module)
    commands = {module: install_command(flavor), "cuda.bindings.runtime": "pip install cuda-bindings"}
    found = []
    for name, command in commands.items():
        try:
            found.append(import_module(name))
        except ModuleNotFoundError as error:
            raise MissingDependencyError(f"{name} is not installed; run: {command}") from error
    return found[0], found[1]


class Cuda:
    """The CUDA runtime, with its error codes turned into exceptions, and one stream."""

    def __init__(self, cudart: Any) -> None:
        self.api = cudart
        self.stream = self("cudaStreamCreateWithFlags", cudart.cudaStreamNonBlocking)

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Call a function and return what it gives beside its status. Raises EngineMismatchError."""
        status, *values = getattr(self.api, name)(*arguments)
        if status != self.api.cudaError_t.cudaSuccess:
            raise EngineMismatchError(f"CUDA: {name} gave {getattr(status, 'name', status)}")
        return values[0] if values else None

    @property
    def handle(self) -> int:
        return int(self.stream)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy to the device, in the order of the stream. `array` must live until the next `wait`."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the device and wait for it."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)
        self.wait()

    def clear(self, address: int, size: int) -> None:
        self("cudaMemsetAsync", address, 0, size, self.stream)

    def wait(self) -> None:
        self("cudaStreamSynchronize", self.stream)


@dataclass(frozen=True)
class Captured:
    """A decode step as a CUDA graph.  batch: its rows."""

    batch: int
    graph: Any


class EngineBackend:
    """An engine, a context for each profile, and the rings of max_batch_size rows."""

    def __init__(self, trt: Any, cudart: Any, folder: Path, contract: GraphContract) -> None:
        """Raises EngineMismatchError for a plan that does not load or is not the contract's."""
        self.contract, self._trt, self._cuda = contract, trt, Cuda(cudart)
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        self.engine = self._runtime.deserialize_cuda_engine((folder / "model.plan").read_bytes())
        if self.engine is None:
            raise EngineMismatchError(f"TensorRT {trt.__version__} cannot load {folder / 'model.plan'}")
        check_engine(trt, self.engine, contract)
        if (folder / "weights.json").is_file():
            refit(trt, self.engine, self._logger, folder)
        self._allocated: list[int] = []
        self._allocate()
        self._contexts = [self._context(profile) for profile in (DECODE, PREFILL)]
        self._shapes: list[tuple[int, ...] | None] = [None, None]

    def run(self, step: Step) -> Logits:
        context = self._prepare(step)
        self._execute(context)
        return self._logits(*step.logits_index.shape)

    def capture(self, step: Step) -> Captured:
        """Record the decode step `step` as a CUDA graph; it must have run before, so that all is in place.

        The graph reads the same addresses, so `replay` can be given other tokens and positions.
        """
        cuda, context = self._cuda, self._prepare(step)
        cuda.wait()
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(cuda.handle):
            raise EngineMismatchError("TensorRT says that this decode step cannot be captured")
        mode = cuda.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        cuda("cudaStreamBeginCapture", cuda.stream, mode)
        try:
            self._execute(context)
        except BaseException:
            with suppress(EngineMismatchError):  # what broke the capture is the error, not that it is broken
                cuda("cudaGraphDestroy", cuda("cudaStreamEndCapture", cuda.stream))
            raise
        graph = cuda("cudaStreamEndCapture", cuda.stream)
        instance = cuda("cudaGraphInstantiate", graph, 0)
        cuda("cudaGraphDestroy", graph)
        return Captured(step.input_ids.shape[0], instance)

    def replay(self, captured: Captured, step: Step) -> Logits:
        """Run the graph with this step's tokens. Its rows must be those of the capture."""
        if step.input_ids.shape != (captured.batch, 1) or step.first_row != 0:
            raise ValueError(f"expected a decode step of {captured.batch} rows")
        self._upload(step)
        self._cuda("cudaGraphLaunch", captured.graph, self._cuda.stream)
        return self._logits(captured.batch, 1)

    def discard(self, captured: Captured) -> None:
        self._cuda("cudaGraphExecDestroy", captured.graph)

    def read_row(self, row: int) -> tuple[RingArray, ...]:
        rings = []
        for spec, address in zip(self.contract.past(), self._rings, strict=True):
            ring = np.empty([int(dim) for dim in spec.shape[1:]], _dtype(spec))
            self._cuda.download(ring, address + row * ring.nbytes)
            rings.append(ring)
        return tuple(rings)

    def write_row(self, row: int, rings: Sequence[RingArray] | None) -> None:
        for i, (spec, address) in enumerate(zip(self.contract.past(), self._rings, strict=True)):
            size = _row_bytes(spec)
            if rings is None:
                self._cuda.clear(address + row * size, size)
            else:
                self._cuda.upload(address + row * size, np.ascontiguousarray(rings[i], _dtype(spec)))
            self._cuda.wait()

    def close(self) -> None:
        """Give the device's memory back."""
        self._cuda.wait()
        self._contexts, self.engine = [], None
        while self._allocated:
            self._cuda("cudaFree", self._allocated.pop())
        self._cuda("cudaStreamDestroy", self._cuda.stream)

    def _allocate(self) -> None:
        """Inputs and logits for the largest call, and the rings, zeroed."""
        contract, rows = self.contract, self.contract.max_batch_size
        tokens = max(rows, contract.ring.prefill_chunk)
        self._inputs = [self._malloc(8 * tokens) for _ in contract.step_inputs()]
        self._output = self._malloc(4 * tokens * contract.config.vocab_size)
        self._rings = [self._malloc(rows * _row_bytes(spec)) for spec in contract.past()]
        for spec, address in zip(contract.past(), self._rings, strict=True):
            if _row_bytes(spec) % _ALIGNMENT and rows > 1:
                raise EngineMismatchError(f"{spec.name}: a row must be a multiple of {_ALIGNMENT} bytes")
            self._cuda.clear(address, rows * _row_bytes(spec))
        self._cuda.wait()

    def _malloc(self, size: int) -> int:
        address = int(self._cuda("cudaMalloc", size))
        self._allocated.append(address)
        return address

    def _context(self, profile: int) -> Any:
        context = self.engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile, self._cuda.handle):
            raise EngineMismatchError(f"TensorRT makes no execution context for profile {profile}")
        self._cuda.wait()
        return context

    def _prepare(self, step: Step) -> Any:
        """Upload the inputs, and set shapes and addresses where they changed.  Returns the context."""
        batch, count = step.logits_index.shape
        new = step.input_ids.shape[1]
        profile = DECODE if new == 1 and step.first_row == 0 else PREFILL
        context, key = self._contexts[profile], (step.first_row, batch, new, count)
        if self._shapes[profile] != key:
            self._bind(context, step.first_row, {"B": batch, "S": new, "N": count})
            self._shapes[profile] = key
        self._upload(step)
        return context

    def _bind(self, context: Any, first_row: int, sizes: dict[str, int]) -> None:
        contract = self.contract
        starts = zip(contract.past(), self._rings, strict=True)
        rings = [address + first_row * _row_bytes(spec) for spec, address in starts]
        for spec, address in zip(contract.inputs(), [*self._inputs, *rings], strict=True):
            shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)
            if not context.set_input_shape(spec.name, shape):
                raise EngineMismatchError(f"TensorRT does not take {spec.name} as {list(shape)}")
            _set_address(context, spec.name, address)
        for spec, address in zip(contract.outputs(), [self._output, *rings], strict=True):
            _set_address(context, spec.name, address)
        if missing := context.infer_shapes():
            raise EngineMismatchError(f"TensorRT has no shape for {missing[0]}")

    def _upload(self, step: Step) -> None:
        arrays = (step.input_ids, step.position_ids, step.logits_index)
        self._held = [np.ascontiguousarray(array) for array in arrays]  # until the copies are done
        for address, array in zip(self._inputs, self._held, strict=True):
            self._cuda.upload(address, array)

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self._cuda.handle):
            raise EngineMismatchError("TensorRT did not execute the step; its log says why")

    def _logits(self, batch: int, count: int) -> Logits:
        logits = np.empty((batch, count, self.contract.config.vocab_size), np.float32)
        self._cuda.download(logits, self._output)
        return logits


def check_engine(trt: Any, engine: Any, contract: GraphContract) -> None:
    """Raise EngineMismatchError unless names, profiles and aliases are the contract's."""
    modes = trt.TensorIOMode
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    for mode, specs in ((modes.INPUT, contract.inputs()), (modes.OUTPUT, contract.outputs())):
        found = sorted(name for name in names if engine.get_tensor_mode(name) == mode)
        if found != sorted(spec.name for spec in specs):
            raise EngineMismatchError(f"the plan's tensors are not the contract's: {found}")
    if engine.num_optimization_profiles != 2:
        raise EngineMismatchError(f"expected 2 profiles, found {engine.num_optimization_profiles}")
    for past, present in zip(contract.past(), contract.present(), strict=True):
        alias = engine.get_aliased_input_tensor(present.name)
        if alias != past.name:
            raise EngineMismatchError(
                f"expected {present.name} on the memory of {past.name}, found {alias!r}"
            )


def refit(trt: Any, engine: Any, logger: Any, folder: Path) -> None:
    """Put the weights of weights.json into a plan that was built without. Raises EngineMismatchError."""
    refitter = trt.Refitter(engine, logger)
    weights = read_weight_index(folder)
    files = {name: np.memmap(folder / name, np.uint8, "r") for name in {w.file for w in weights}}
    for weight in weights:
        if not refitter.set_named_weights(weight.name, _as_weights(trt, weight, files[weight.file])):
            raise EngineMismatchError(f"TensorRT does not take {weight.name} as {weight.dtype}")
    missing = refitter.get_missing_weights()
    if missing or not refitter.refit_cuda_engine():
        raise EngineMismatchError(f"TensorRT did not refit the plan; missing: {list(missing)[:3]}")


def _as_weights(trt: Any, weight: RefitWeight, file: np.ndarray) -> Any:
    dtype = getattr(trt.DataType, TRT_DTYPES[weight.dtype])
    return trt.Weights(dtype, file.ctypes.data + weight.offset, weight.count)


def _set_address(context: Any, name: str, address: int) -> None:
    if not context.set_tensor_address(name, address):
        raise EngineMismatchError(f"TensorRT does not take an address for {name}")


def _dtype(spec: TensorSpec) -> np.dtype[Any]:
    return _DTYPES.get(spec.dtype) or np.dtype(spec.dtype)


def _row_bytes(spec: TensorSpec) -> int:
    return int(np.prod([int(dim) for dim in spec.shape[1:]])) * _dtype(spec).itemsize
