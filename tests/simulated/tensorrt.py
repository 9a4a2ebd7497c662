"""TensorRT and TensorRT-RTX as doubles: engines of simulated plans on a simulated device.

What a class here offers under a public name is what the installed class has; what begins with an underscore
is the simulation's own.
"""

import ctypes
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.simulated.device import Device, Fault, Stream, Work
from tests.simulated.device import Error as CudaError
from tests.simulated.plan import SimulatedPlan, Tensor, compute, parse_plan, read_array
from tests.simulated.rules import RuleBroken
from tests.simulated.spec import Double, checked, inside

_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "BF16": np.uint16, "INT64": np.int64}
_BITS = {"FLOAT": 32, "HALF": 16, "BF16": 16, "INT8": 8, "FP8": 8, "INT4": 4}


class SimulatedTensorRT:
    """The module: classes are doubles, all else is the installed module's.

    real: tensorrt_rtx, or tensorrt_lean_bindings for full TensorRT, whose runtime half it is.
    alter: changes a plan before it is loaded.  spoil: changes the logits of each step.
    compiled: profile and shapes for which kernels were compiled.  recaptured: how often TensorRT-RTX had to
    capture a context for other shapes or addresses than before.
    """

    def __init__(self, real: Any, device: Device) -> None:
        self._real, self._device = real, device
        self._alter: Callable[[SimulatedPlan], None] = lambda plan: None
        self._spoil: Callable[[np.ndarray[Any, Any]], None] = lambda logits: None
        self._compiled: list[str] = []
        self._recaptured = 0

    def __getattr__(self, name: str) -> Any:
        real = object.__getattribute__(self, "_real")
        if not hasattr(real, name):
            raise AttributeError(f"{real.__name__} has no attribute {name!r}")
        made = {"Runtime": _Runtime, "Refitter": _Refitter, "Weights": _Weights}.get(name)
        of_real = getattr(real, name)
        if made is None:
            return of_real  # enums, the version, the base class of loggers
        make = lambda *arguments: Double(of_real, made(self, *arguments))  # noqa: E731
        return _constructor(of_real, make)

    def _double(self, name: str, value: Any) -> Double:
        return Double(getattr(self._real, name), value)

    @property
    def _is_rtx(self) -> bool:
        return hasattr(self._real, "IRuntimeCache")


def _constructor(real: Any, make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, called only as the constructor of `real` may be."""
    check = checked(real, "__init__", lambda *arguments: None)

    def construct(*arguments: Any) -> Any:
        check(*arguments)
        return make(*arguments)

    return construct


class _Runtime:
    def __init__(self, trt: SimulatedTensorRT, logger: Any) -> None:
        self._trt, self._logger = trt, logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        plan = parse_plan(bytes(serialized_engine))
        if plan is None:
            severity = self._trt._real.ILogger.Severity
            self._logger.log(severity.INFO, "Loaded engine size: 0 MiB")
            self._logger.log(severity.VERBOSE, "a line that nobody wants to read")
            self._logger.log(severity.ERROR, "Serialization assertion header.magicTag failed")
            return None
        self._trt._alter(plan)
        return self._trt._double("ICudaEngine", _Engine(self._trt, plan, self._logger))


class _Engine:
    def __init__(self, trt: SimulatedTensorRT, plan: SimulatedPlan, logger: Any) -> None:
        self._trt, self._plan, self._logger = trt, plan, logger
        self._weights: dict[str, bytes] = {}
        self._epoch = 0  # rises with every refit
        self._index = trt._device.current_index
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}

    num_io_tensors = property(lambda self: len(self._plan.tensors))
    num_optimization_profiles = property(lambda self: len(self._plan.profiles))
    device_memory_size_v2 = property(lambda self: self._plan.activation_bytes)
    refittable = property(lambda self: bool(self._plan.weights))

    def get_tensor_name(self, index: int) -> str:
        return self._plan.tensors[index].name

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._trt.TensorIOMode
        tensor = self._tensors.get(name)
        return modes.NONE if tensor is None else modes.INPUT if tensor.is_input else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self._trt.DataType, self._tensors[name].dtype)

    def get_tensor_shape(self, name: str) -> Any:
        return self._trt.Dims(self._tensors[name].shape)

    def get_tensor_location(self, name: str) -> Any:
        return getattr(self._trt.TensorLocation, self._tensors[name].location)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        return [self._trt.Dims(shape) for shape in self._plan.profiles[profile_index][name]]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._plan.aliases.get(name)

    def create_runtime_config(self) -> Any:
        return self._trt._double("IRuntimeConfig", _RuntimeConfig(self._trt))

    def create_execution_context(self, runtime_config: Any = None) -> Any:
        settings = _RuntimeConfig(self._trt) if runtime_config is None else inside(runtime_config)
        return self._trt._double("IExecutionContext", _Context(self, settings))

    def _error(self, message: str) -> bool:
        self._logger.log(self._trt._real.ILogger.Severity.ERROR, message)
        return False


class _RuntimeConfig:
    """Settings; a context takes a copy when it is made, so that later changes go unnoticed."""

    def __init__(self, trt: SimulatedTensorRT) -> None:
        self._trt = trt
        self._user_managed = False
        self._cache: Any = None
        if trt._is_rtx:
            self.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
            self.dynamic_shapes_kernel_specialization_strategy = (
                trt.DynamicShapesKernelSpecializationStrategy.LAZY
            )

    cuda_graph_strategy: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._user_managed = strategy.name == "USER_MANAGED"

    def create_runtime_cache(self) -> Any:
        return self._trt._double("IRuntimeCache", _RuntimeCache(self._trt))

    def set_runtime_cache(self, cache: Any = None) -> bool:
        self._cache = inside(cache)
        return True


class _RuntimeCache:
    """Kernels that were compiled, by what they were compiled for."""

    def __init__(self, trt: SimulatedTensorRT) -> None:
        self._trt = trt
        self._kernels: set[str] = set()

    def _machine(self) -> list[Any]:
        device = self._trt._device
        return [device.name, *device.compute_capability, device.driver // 1000, self._trt.__version__]

    def serialize(self) -> Any:
        data = json.dumps({"machine": self._machine(), "kernels": sorted(self._kernels)}).encode()
        return _HostMemory(data)

    def deserialize(self, blob: Any) -> bool:
        try:
            content = json.loads(bytes(blob))
        except ValueError:
            return False
        if content["machine"] != self._machine():
            return False
        self._kernels = set(content["kernels"])
        return True


class _HostMemory(bytes):
    """Stands for IHostMemory: like it, nothing but a buffer."""


_HostMemory.__name__ = "IHostMemory"


class _Context:
    """An execution context. `_version` rises with whatever changes it."""

    def __init__(self, engine: _Engine, settings: _RuntimeConfig) -> None:
        self._engine, self._settings = engine, _copy(settings)
        self._profile, self._version = 0, 0
        self._profile_stream: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._flushed = False  # whether a step has run with these shapes
        self._captured: tuple[Any, ...] | None = None  # by TensorRT-RTX itself

    @property
    def _device(self) -> Device:
        return self._engine._trt._device

    def set_device_memory(self, memory: int, size: int) -> None:
        self._version += 1
        self._memory = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < len(self._engine._plan.profiles):
            return self._engine._error(f"profile {profile_index} is out of range")
        self._version += 1
        self._profile, self._profile_stream = profile_index, stream_handle
        stream = self._device.streams[stream_handle]
        self._device.put(stream, Work(lambda: setattr(self, "_profile_stream", None)))
        self._shapes, self._flushed = {}, False
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        lowest, _, most = self._engine._plan.profiles[self._profile].get(name, ((), (), ()))
        inside_it = len(shape) == len(lowest) and all(
            a <= dim <= b for a, dim, b in zip(lowest, shape, most, strict=True)
        )
        if not inside_it:
            return self._engine._error(f"{name} {shape} is not in profile {self._profile}")
        if self._shapes.get(name) != tuple(shape):
            self._version += 1
            self._flushed = False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors:
            return self._engine._error(f"no tensor {name}")
        if memory % 256:
            return self._engine._error(f"{name}: {memory} is not a multiple of 256")
        if self._addresses.get(name) != memory:
            self._version += 1
        self._addresses[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        return [t.name for t in self._engine._plan.tensors if t.is_input and t.name not in self._shapes]

    def execute_async_v3(self, stream_handle: int) -> bool:
        if not stream_handle:
            raise RuleBroken("stream-not-default", "its handle is 0")
        stream = self._device.streams[stream_handle]
        missing = [name for name in self._engine._tensors if not self._addresses.get(name)]
        if missing:
            return self._engine._error(f"{missing[0]} has no address")
        if unknown := self.infer_shapes():
            return self._engine._error(f"{unknown[0]} has no shape")
        if not self._has_memory():
            return self._engine._error("the context has no device memory of that size")
        self._require_rules(stream, stream_handle)
        general = self._compile()
        self._flushed = True
        self._device.put(stream, self._work(general))
        return True

    def _has_memory(self) -> bool:
        if not self._settings._user_managed:
            return True
        wanted = self._engine._plan.activation_bytes
        return self._memory is not None and self._memory[0] % 256 == 0 and self._memory[1] >= wanted

    def _require_rules(self, stream: Stream, handle: int) -> None:
        """What is not noticed by the real one and goes wrong later."""
        plan = self._engine._plan
        if self._device.current_index != self._engine._index:
            raise RuleBroken("device-of-the-thread", f"it uses GPU {self._device.current_index}")
        for present, past in plan.aliases.items():
            if self._addresses[present] != self._addresses[past]:
                raise RuleBroken("alias-one-memory", f"{present} is not on the memory of {past}")
        if self._profile_stream not in (None, handle):
            raise RuleBroken("profile-synchronized", f"stream {self._profile_stream} was not waited for")
        if set(plan.weights) != set(self._engine._weights):
            raise RuleBroken("weights-filled", f"{len(plan.weights)} weights were never set")
        if stream.capture is not None and not self._flushed:
            raise RuleBroken("capture-after-a-step", "these shapes have never run")
        for work in self._device.pending(but=stream):
            if work.context is not None and work.context._memory == self._memory is not None:
                raise RuleBroken("activations-in-turn", "another context's step is not done")

    def _compile(self) -> bool:
        """TensorRT-RTX: kernels for shapes it has not met, and its own capture of the whole step.

        Returns whether this step has to run in a general kernel.
        """
        trt, settings = self._engine._trt, self._settings
        if not trt._is_rtx:
            return False
        key = f"{self._profile}:{sorted(self._shapes.items())}"
        known = settings._cache._kernels if settings._cache is not None else set()
        new, eager = key not in known, settings.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
        if eager and new:
            trt._compiled.append(key)  # others are compiled beside the work, and nobody waits for them
        known.add(key)
        if settings.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE":
            now = (sorted(self._shapes.items()), sorted(self._addresses.items()))
            trt._recaptured += self._captured is not None and self._captured != now
            self._captured = now
        return new and not eager

    def _work(self, general: bool) -> Work:
        """The step as it is bound now.  general: in a kernel whose logits differ in their last bits."""
        plan, trt = self._engine._plan, self._engine._trt
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        batch, count = shapes["logits_index"]
        shapes["logits"] = (batch, count, plan.contract.config.vocab_size)
        shapes |= {present: shapes[past] for present, past in plan.aliases.items()}
        ranges = [(addresses[name], _bytes(tensor, shapes)) for name, tensor in self._engine._tensors.items()]
        if self._memory is not None:
            ranges.append(self._memory)

        def run() -> None:
            _require_inside(plan, shapes, addresses)
            compute(plan, self._engine._weights, shapes, addresses)
            logits = read_array(addresses["logits"], shapes["logits"], np.float32)
            if general:
                logits *= np.float32(1 + 2**-20)
            trt._spoil(logits)

        return Work(run, tuple(ranges), self)


class _Weights:
    def __init__(self, trt: SimulatedTensorRT, dtype: Any, address: int, count: int) -> None:
        self.dtype, self.size = dtype, count
        self._address = address
        self.nbytes = -(-count * _BITS[dtype.name] // 8)


class _Refitter:
    def __init__(self, trt: SimulatedTensorRT, engine: Any, logger: Any) -> None:
        self._engine: _Engine = inside(engine)
        self._device = trt._device
        self._given: dict[str, _Weights] = {}

    def set_named_weights(self, name: str, weights: Any) -> bool:
        given: _Weights = inside(weights)
        expected = self._engine._plan.weights.get(name)
        if expected != (given.dtype.name, given.size):
            return self._engine._error(f"{name}: expected {expected}, found {given.dtype.name} {given.size}")
        self._given[name] = given
        return True

    def get_missing_weights(self) -> list[str]:
        return [name for name in self._engine._plan.weights if name not in self._given]

    def refit_cuda_engine(self) -> bool:
        if any(work.context is not None for work in self._device.pending()):
            raise RuleBroken("refit-at-rest", "a step is enqueued")
        if self.get_missing_weights():
            return self._engine._error("weights are missing")
        self._engine._weights = {
            name: ctypes.string_at(weights._address, weights.nbytes) for name, weights in self._given.items()
        }
        self._engine._epoch += 1
        return True


def _copy(settings: _RuntimeConfig) -> _RuntimeConfig:
    made = object.__new__(_RuntimeConfig)
    made.__dict__.update(settings.__dict__)
    return made


def _bytes(tensor: Tensor, shapes: dict[str, tuple[int, ...]]) -> int:
    return int(np.prod(shapes[tensor.name])) * np.dtype(_NUMPY[tensor.dtype]).itemsize


def _require_inside(
    plan: SimulatedPlan, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]
) -> None:
    """The write of a step ends before the ring does, and its tokens are tokens."""
    positions = read_array(addresses["position_ids"], shapes["position_ids"], np.int64)
    tokens = read_array(addresses["input_ids"], shapes["input_ids"], np.int64)
    capacity = plan.contract.ring.capacity
    if (positions[:, 0] % capacity + positions.shape[1] > capacity).any():
        raise RuleBroken("update-inside-cache", f"positions {positions[:, 0].tolist()}")
    if (tokens < 0).any() or (tokens >= plan.contract.config.vocab_size).any():
        raise Fault(CudaError.cudaErrorIllegalAddress)
