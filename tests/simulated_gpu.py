"""A GPU that is none: `trt` and `cudart` whose engines run the ONNX graph in ONNX Runtime.

Stricter than the real thing where that is cheap: work waits in the stream until it is synchronized, fresh
memory is full of NaN, and a call with a shape outside its profile, an address outside an allocation or a
present away from its past is refused.
"""

import ctypes
from collections.abc import Callable
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from mistral_trt.contract import GraphContract, TensorSpec
from mistral_trt.engines.network.parse import profile_ranges
from mistral_trt.runtime.onnxruntime_backend import open_session

Work = Callable[[], object]


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorStreamCaptureUnsupported = 900


OK, INVALID, CAPTURING = cudaError_t


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class Stream:
    """Work in order.  capture: where it is recorded instead, while a capture is on."""

    def __init__(self) -> None:
        self.work: list[Work] = []
        self.capture: list[Work] | None = None

    def __int__(self) -> int:
        return id(self)

    def add(self, work: Work) -> None:
        (self.work if self.capture is None else self.capture).append(work)


class SimulatedCuda:
    """cuda.bindings.runtime: each function returns its status and then its values."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking = 1

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.streams: dict[int, Stream] = {}
        self.graphs: list[list[Work]] = []
        self.launched = 0

    def holds(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + len(b) for start, b in self.memory.items())

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        stream = Stream()
        self.streams[int(stream)] = stream
        return OK, stream

    def cudaStreamDestroy(self, stream: Stream) -> tuple[Any, ...]:
        del self.streams[int(stream)]
        return (OK,)

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[Any, ...]:
        if stream.capture is not None:
            return (CAPTURING,)
        while stream.work:
            stream.work.pop(0)()
        return (OK,)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        raw = (ctypes.c_ubyte * (size + 256))()
        ctypes.memset(raw, 0xFF, size + 256)
        start = -(-ctypes.addressof(raw) // 256) * 256
        self.memory[start] = _Block(raw, size)
        return OK, start

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        return (OK if self.memory.pop(address, None) is not None else INVALID,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: Stream) -> tuple[Any, ...]:
        if not self.holds(address, size):
            return (INVALID,)
        stream.add(lambda: ctypes.memset(address, value, size))
        return (OK,)

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, kind: int, stream: Stream
    ) -> tuple[Any, ...]:
        device = target if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else source
        if not self.holds(device, size):
            return (INVALID,)
        stream.add(lambda: ctypes.memmove(target, source, size))
        return (OK,)

    def cudaStreamBeginCapture(self, stream: Stream, mode: int) -> tuple[Any, ...]:
        stream.capture = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: Stream) -> tuple[Any, ...]:
        recorded, stream.capture = stream.capture, None
        return (OK, recorded) if recorded else (INVALID, None)  # as CUDA gives none of a capture that failed

    def cudaGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[Any, ...]:
        self.graphs.append(graph)
        return OK, list(graph)

    def cudaGraphDestroy(self, graph: list[Work]) -> tuple[Any, ...]:
        self.graphs.remove(graph)
        return (OK,)

    def cudaGraphLaunch(self, graph: list[Work], stream: Stream) -> tuple[Any, ...]:
        self.launched += 1
        for work in graph:
            stream.add(work)
        return (OK,)

    def cudaGraphExecDestroy(self, graph: list[Work]) -> tuple[Any, ...]:
        return (OK,)


class _Block:
    def __init__(self, raw: Any, size: int) -> None:
        self._raw, self._size = raw, size

    def __len__(self) -> int:
        return self._size


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class SimulatedTensorRT:
    """tensorrt or tensorrt_rtx, whose every plan is the ONNX graph of one folder.

    fault: called with the logits of each execution, to spoil them.
    """

    __version__ = "1.7.1.116"
    TensorIOMode = TensorIOMode
    Logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, severity: None})

    def __init__(self, cudart: SimulatedCuda, onnx: Path, contract: GraphContract) -> None:
        self.cudart, self.contract = cudart, contract
        self.session = open_session(onnx / "model.onnx", 2)
        self.aliases = {b.name: a.name for a, b in zip(contract.past(), contract.present(), strict=True)}
        self.fault: Callable[[np.ndarray], None] = lambda logits: None
        self.loads = True

    def Runtime(self, logger: Any) -> Any:
        load = lambda plan: SimulatedEngine(self) if plan and self.loads else None  # noqa: E731
        return SimpleNamespace(deserialize_cuda_engine=load)


class SimulatedEngine:
    num_optimization_profiles = 2

    def __init__(self, trt: SimulatedTensorRT) -> None:
        self.trt = trt
        self._specs = [*trt.contract.inputs(), *trt.contract.outputs()]
        self.num_io_tensors = len(self._specs)

    def get_tensor_name(self, index: int) -> str:
        return self._specs[index].name

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        inputs = {spec.name for spec in self.trt.contract.inputs()}
        return TensorIOMode.INPUT if name in inputs else TensorIOMode.OUTPUT

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.trt.aliases.get(name)

    def create_execution_context(self) -> "SimulatedContext":
        return SimulatedContext(self.trt)


class SimulatedContext:
    def __init__(self, trt: SimulatedTensorRT) -> None:
        self._trt = trt
        self._ranges: dict[str, tuple[int, int]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream_handle: int) -> bool:
        lowest, _, most = list(profile_ranges(self._trt.contract).values())[index]
        self._ranges = {dim: (lowest[dim], most[dim]) for dim in lowest}
        return stream_handle in self._trt.cudart.streams

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        (spec,) = (spec for spec in self._trt.contract.inputs() if spec.name == name)
        self._shapes[name] = shape
        limits = [self._ranges[dim] if isinstance(dim, str) else (dim, dim) for dim in spec.shape]
        return all(low <= size <= high for size, (low, high) in zip(shape, limits, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return address % 256 == 0 and self._trt.cudart.holds(address, 1)

    def infer_shapes(self) -> list[str]:
        return [spec.name for spec in self._trt.contract.inputs() if spec.name not in self._shapes]

    def is_stream_capturable(self, stream: int) -> bool:
        return stream in self._trt.cudart.streams

    def execute_async_v3(self, stream_handle: int) -> bool:
        contract, shapes, addresses = self._trt.contract, dict(self._shapes), dict(self._addresses)
        batch, count = shapes["logits_index"]
        shapes["logits"] = (batch, count, contract.config.vocab_size)
        for past, present in zip(contract.past(), contract.present(), strict=True):
            shapes[present.name] = shapes[past.name]
            if addresses[past.name] != addresses[present.name]:
                return False
        specs = [*contract.inputs(), *contract.outputs()]
        sizes = {spec.name: int(np.prod(shapes[spec.name])) * _numpy(spec).itemsize for spec in specs}
        if not all(self._trt.cudart.holds(addresses[name], size) for name, size in sizes.items()):
            return False
        self._trt.cudart.streams[stream_handle].add(lambda: self._compute(shapes, addresses))
        return True

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        binding = self._trt.session.io_binding()
        contract = self._trt.contract
        for bind, specs in (
            (binding.bind_input, contract.inputs()),
            (binding.bind_output, contract.outputs()),
        ):
            for spec in specs:
                bind(spec.name, "cpu", 0, _numpy(spec), shapes[spec.name], addresses[spec.name])
        self._trt.session.run_with_iobinding(binding)
        shape = shapes["logits"]
        memory = (ctypes.c_float * int(np.prod(shape))).from_address(addresses["logits"])
        self._trt.fault(np.ctypeslib.as_array(memory).reshape(shape))


def _numpy(spec: TensorSpec) -> Any:
    return np.dtype(spec.dtype)


def available() -> bool:
    """Whether ONNX Runtime can bind by address, which all of this rests on."""
    return hasattr(ort.InferenceSession, "io_binding")
