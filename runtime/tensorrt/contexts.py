"""Engine → an execution context: one profile, its tensors bound to addresses, a step put into the stream.

A captured graph holds the state of the context it came from, and changing that context afterwards is
undefined. So there is one context for prefill, bound anew as its calls change, and one for each decode batch,
bound once. They take turns on one stream and share one piece of activation memory, as NVIDIA advises for
several graphs (docs.nvidia.com/deeplearning/tensorrt-rtx/latest/performance/best-practices.html).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mistral_trt.contract import GraphContract
from mistral_trt.errors import BackendError
from mistral_trt.runtime.tensorrt.cuda import Cuda
from mistral_trt.runtime.tensorrt.log import TensorRtLog
from mistral_trt.runtime.tensorrt.plan import PROFILES, shape_of
from mistral_trt.tensorrt_names import RTX


@dataclass(frozen=True)
class ContextMaker:
    """What the contexts of one engine have in common.

    activations: address and bytes of the memory they share.  cuda_graphs: whether TensorRT-RTX is to capture
    decode steps.  eager_prefill: whether it is to wait for prefill's kernels too.  cache: its runtime cache,
    None without one.
    """

    trt: Any
    engine: Any
    cuda: Cuda
    log: TensorRtLog
    contract: GraphContract
    flavor: str
    activations: tuple[int, int]
    cuda_graphs: bool
    eager_prefill: bool
    cache: Any

    def make(self, profile: str) -> "BoundContext":
        """A new context of that profile. Raises BackendError."""
        context = self.engine.create_execution_context(self._runtime_config(profile))
        if context is None:
            raise BackendError(f"TensorRT makes no execution context{self.log.because()}")
        context.set_device_memory(*self.activations)
        if not context.set_optimization_profile_async(PROFILES.index(profile), self.cuda.handle):
            raise BackendError(f"TensorRT does not take the profile {profile}{self.log.because()}")
        self.cuda.wait()
        return BoundContext(context, self.cuda, self.log, self.contract)

    def _runtime_config(self, profile: str) -> Any:
        """Settings of a context. TensorRT-RTX compiles its kernels for the shapes it meets.

        Decode meets few shapes, and what was captured must not change: they are compiled at the first call.
        Prefill meets many: a general kernel serves until one for the shape has been compiled in the
        background, and then the last bits change. Where those count, prefill waits as well.
        """
        trt, runtime_config = self.trt, self.engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self.flavor == RTX:
            decode = profile == "decode"
            waits = decode or self.eager_prefill
            kernels, graphs = trt.DynamicShapesKernelSpecializationStrategy, trt.CudaGraphStrategy
            wanted = graphs.WHOLE_GRAPH_CAPTURE if decode and self.cuda_graphs else graphs.DISABLED
            runtime_config.dynamic_shapes_kernel_specialization_strategy = (
                kernels.EAGER if waits else kernels.LAZY
            )
            runtime_config.cuda_graph_strategy = wanted
            if runtime_config.cuda_graph_strategy != wanted:
                raise BackendError(f"TensorRT-RTX does not take {wanted.name} for its CUDA graphs")
            if self.cache is not None and not runtime_config.set_runtime_cache(self.cache):
                raise BackendError(f"TensorRT-RTX does not take its runtime cache{self.log.because()}")
        return runtime_config


class BoundContext:
    """An execution context and what it is bound to."""

    def __init__(self, context: Any, cuda: Cuda, log: TensorRtLog, contract: GraphContract) -> None:
        self._context, self._cuda, self._log, self._contract = context, cuda, log, contract
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._inferred = False

    def bind(self, sizes: dict[str, int], inputs: Sequence[int], rings: Sequence[int], logits: int) -> None:
        """Set shapes and addresses, those that changed.

        sizes: of the letters B, S, N.  inputs, rings, logits: addresses, the rings' at the call's first row.
        A present is bound to the memory of its past. Raises BackendError for what is outside the profile.
        """
        contract = self._contract
        shapes = {spec.name: shape_of(spec, sizes) for spec in contract.inputs()}
        addresses = dict(zip((spec.name for spec in contract.inputs()), (*inputs, *rings), strict=True))
        addresses |= dict(zip((spec.name for spec in contract.outputs()), (logits, *rings), strict=True))
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._set_shape(name, shape)
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                self._set_address(name, address)
        if not self._inferred:
            self._infer_shapes()

    def enqueue(self) -> None:
        """Put the step into the stream. Raises BackendError."""
        if not self._context.execute_async_v3(self._cuda.handle):
            raise BackendError(f"TensorRT does not execute the step{self._log.because()}")

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._inferred = False
        self._shapes.pop(name, None)  # unknown, should it fail
        if not self._context.set_input_shape(name, shape):
            raise BackendError(f"TensorRT does not take {name} as {list(shape)}{self._log.because()}")
        self._shapes[name] = shape

    def _set_address(self, name: str, address: int) -> None:
        self._addresses.pop(name, None)
        if not self._context.set_tensor_address(name, address):
            raise BackendError(f"TensorRT does not take an address for {name}{self._log.because()}")
        self._addresses[name] = address

    def _infer_shapes(self) -> None:
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise BackendError(f"TensorRT cannot infer the shapes of a step: {error}") from error
        if missing:
            raise BackendError(f"TensorRT has no shape for {missing[0]}")
        self._inferred = True
