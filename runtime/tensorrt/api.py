"""Flavour → TensorRT and the CUDA runtime, and every name of theirs that this package uses, as data.

A newer TensorRT or cuda-bindings must still have all of it. Tests hold the lists to the source, both ways,
and to the installed packages. `trt` is always one of the two TensorRTs, `cudart` is cuda.bindings.runtime.
"""

from importlib import import_module
from typing import Any

from mistral_trt.errors import MissingDependencyError
from mistral_trt.tensorrt_names import MODULES

_CUDART = "cuda.bindings.runtime"

TENSORRT: dict[str, tuple[str, ...]] = {
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "create_execution_context",
        "create_runtime_config",
        "device_memory_size_v2",
        "get_aliased_input_tensor",
        "get_tensor_dtype",
        "get_tensor_location",
        "get_tensor_mode",
        "get_tensor_name",
        "get_tensor_profile_shape",
        "get_tensor_shape",
        "num_io_tensors",
        "num_optimization_profiles",
        "refittable",
    ),
    "IExecutionContext": (
        "execute_async_v3",
        "infer_shapes",
        "set_device_memory",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_tensor_address",
    ),
    "IRuntimeConfig": (
        "create_runtime_cache",
        "cuda_graph_strategy",
        "dynamic_shapes_kernel_specialization_strategy",
        "set_execution_context_allocation_strategy",
        "set_runtime_cache",
    ),
    "IRuntimeCache": ("deserialize", "serialize"),
    "Refitter": ("get_missing_weights", "refit_cuda_engine", "set_named_weights"),
    "ILogger": ("log",),
    "Weights": (),
}
"""Class → members: called, read, set, or overridden by a class of ours."""

TENSORRT_ENUMS: dict[str, tuple[str, ...]] = {
    "CudaGraphStrategy": ("DISABLED", "WHOLE_GRAPH_CAPTURE"),
    "DataType": ("BF16", "FLOAT", "FP8", "HALF", "INT4", "INT64", "INT8"),
    "DynamicShapesKernelSpecializationStrategy": ("EAGER", "LAZY"),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    "TensorIOMode": ("INPUT", "OUTPUT"),
    "TensorLocation": ("DEVICE",),
}

RTX_ONLY = frozenset(
    {
        "CudaGraphStrategy",
        "DynamicShapesKernelSpecializationStrategy",
        "IRuntimeCache",
        "IRuntimeConfig.create_runtime_cache",
        "IRuntimeConfig.cuda_graph_strategy",
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
        "IRuntimeConfig.set_runtime_cache",
    }
)
"""What full TensorRT lacks: kernels that are compiled at load and their cache, CUDA graphs of its own."""

SIGNATURES = {
    "Runtime.deserialize_cuda_engine": "(serialized_engine) -> ICudaEngine",
    "ICudaEngine.create_execution_context": "(runtime_config) -> IExecutionContext",
    "ICudaEngine.get_aliased_input_tensor": "(name) -> str",
    "ICudaEngine.get_tensor_profile_shape": "(name, profile_index) -> list[Dims]",
    "IExecutionContext.execute_async_v3": "(stream_handle) -> bool",
    "IExecutionContext.infer_shapes": "() -> list[str]",
    "IExecutionContext.set_device_memory": "(memory, size) -> None",
    "IExecutionContext.set_input_shape": "(name, shape) -> bool",
    "IExecutionContext.set_optimization_profile_async": "(profile_index, stream_handle) -> bool",
    "IExecutionContext.set_tensor_address": "(name, memory) -> bool",
    "IRuntimeCache.deserialize": "(blob) -> bool",
    "IRuntimeCache.serialize": "() -> IHostMemory",
    "IRuntimeConfig.set_runtime_cache": "(cache) -> bool",
    "Refitter.get_missing_weights": "() -> list[str]",
    "Refitter.refit_cuda_engine": "() -> bool",
    "Refitter.set_named_weights": "(name, weights) -> bool",
    "Weights.__init__": "(type, ptr, count) -> None",
}
"""Parameters and result of what is called with care: a refusal is a False or a None, and no exception."""

CUDART = (
    "cudaDriverGetVersion",
    "cudaFree",
    "cudaFreeHost",
    "cudaGetDevice",
    "cudaGetDeviceCount",
    "cudaGetDeviceProperties",
    "cudaGetErrorString",
    "cudaGraphDestroy",
    "cudaGraphExecDestroy",
    "cudaGraphInstantiate",
    "cudaGraphLaunch",
    "cudaHostAlloc",
    "cudaHostAllocDefault",
    "cudaMalloc",
    "cudaMemGetInfo",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
    "cudaRuntimeGetVersion",
    "cudaSetDevice",
    "cudaStreamBeginCapture",
    "cudaStreamCreateWithFlags",
    "cudaStreamDestroy",
    "cudaStreamEndCapture",
    "cudaStreamNonBlocking",
    "cudaStreamSynchronize",
)
"""Functions, each of which returns its status and then its values, and constants."""

CUDART_ENUMS: dict[str, tuple[str, ...]] = {
    "cudaError_t": (
        "cudaErrorAssert",
        "cudaErrorContained",
        "cudaErrorECCUncorrectable",
        "cudaErrorExternalDevice",
        "cudaErrorHardwareStackError",
        "cudaErrorIllegalAddress",
        "cudaErrorIllegalInstruction",
        "cudaErrorInsufficientDriver",
        "cudaErrorInvalidAddressSpace",
        "cudaErrorInvalidPc",
        "cudaErrorLaunchFailure",
        "cudaErrorLaunchTimeout",
        "cudaErrorMemoryAllocation",
        "cudaErrorMisalignedAddress",
        "cudaErrorMpsClientTerminated",
        "cudaErrorNoDevice",
        "cudaErrorNvlinkUncorrectable",
        "cudaErrorTensorMemoryLeak",
        "cudaSuccess",
    ),
    "cudaMemcpyKind": ("cudaMemcpyDeviceToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyHostToDevice"),
    "cudaStreamCaptureMode": ("cudaStreamCaptureModeThreadLocal",),
}


def load_modules(flavor: str, trt: Any = None, cudart: Any = None) -> tuple[Any, Any]:
    """TensorRT of that flavour and the CUDA runtime; one that is given is not imported.

    Raises MissingDependencyError with the line that installs what is missing.
    """
    if trt is None:
        trt = _load(MODULES[flavor], flavor)
    if cudart is None:
        cudart = _load(_CUDART, "cuda-bindings")
    return trt, cudart


def _load(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        raise MissingDependencyError(
            f"an engine needs {module}, which cannot be imported ({error}); run: pip install {package}"
        ) from error
