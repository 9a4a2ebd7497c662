"""Calls of the CUDA runtime → values, or exceptions in plain words; device and pinned memory, one stream.

Nothing here waits for the GPU but `wait`: every copy is put into the stream and done in its order.
"""

import logging
from dataclasses import dataclass
from typing import Any

from mistral_trt.errors import BackendError, EngineMismatchError

_LOG = logging.getLogger("mistral_trt.runtime")

STICKY = frozenset(
    {
        "cudaErrorAssert",
        "cudaErrorContained",
        "cudaErrorECCUncorrectable",
        "cudaErrorExternalDevice",
        "cudaErrorHardwareStackError",
        "cudaErrorIllegalAddress",
        "cudaErrorIllegalInstruction",
        "cudaErrorInvalidAddressSpace",
        "cudaErrorInvalidPc",
        "cudaErrorLaunchFailure",
        "cudaErrorLaunchTimeout",
        "cudaErrorMisalignedAddress",
        "cudaErrorMpsClientTerminated",
        "cudaErrorNvlinkUncorrectable",
        "cudaErrorTensorMemoryLeak",
    }
)
"""Errors after which every call of this process fails, until it is started again."""

_DOING = {
    "cudaGetDeviceCount": "looking for a GPU",
    "cudaGraphInstantiate": "making a CUDA graph of a decode step",
    "cudaGraphLaunch": "replaying a captured decode step",
    "cudaHostAlloc": "allocating page-locked host memory",
    "cudaMalloc": "allocating GPU memory",
    "cudaMemcpyAsync": "copying to or from the GPU",
    "cudaStreamBeginCapture": "capturing a decode step",
    "cudaStreamEndCapture": "capturing a decode step",
    "cudaStreamSynchronize": "waiting for the GPU",
}


@dataclass(frozen=True)
class Gpu:
    """The GPU that CUDA uses here.  driver: the CUDA version that its driver serves, as 13.0."""

    name: str
    compute_capability: str
    driver: str


class Cuda:
    """The CUDA runtime and, once opened, one stream that does not wait for the default one.

    cudart: cuda.bindings.runtime, whose functions return (status, value, …).
    """

    def __init__(self, cudart: Any) -> None:
        self.api = cudart
        self.stream: Any = None
        self._device = 0

    def call(self, name: str, *arguments: Any) -> Any:
        """What a function gives beside its status: nothing, one value, or a tuple. Raises BackendError."""
        status, *values = getattr(self.api, name)(*arguments)
        if status != self.api.cudaError_t.cudaSuccess:
            raise self._failure(name, status)
        return tuple(values) if len(values) > 1 else values[0] if values else None

    def release(self, name: str, handle: Any) -> None:
        """Give something back with the function `name`; a failure is logged: the rest must go too."""
        status, *_ = getattr(self.api, name)(handle)
        if status != self.api.cudaError_t.cudaSuccess:
            failure = self._failure(name, status)
            _LOG.log(logging.DEBUG if failure.fatal else logging.WARNING, "%s", failure)

    def gpu(self) -> Gpu:
        """The GPU in use. Raises EngineMismatchError without one, or without a driver that is new enough."""
        errors = self.api.cudaError_t
        status, count = self.api.cudaGetDeviceCount()
        if status == errors.cudaErrorInsufficientDriver:
            raise EngineMismatchError(self._driver_problem())
        if status == errors.cudaErrorNoDevice or (status == errors.cudaSuccess and not count):
            raise EngineMismatchError(
                "an engine needs an NVIDIA GPU, and CUDA finds none here (is CUDA_VISIBLE_DEVICES set, or "
                "was the container started without --gpus?); run the ONNX folder it was built from instead"
            )
        if status != errors.cudaSuccess:
            raise self._failure("cudaGetDeviceCount", status)
        self._device = int(self.call("cudaGetDevice"))
        found = self.call("cudaGetDeviceProperties", self._device)
        name = found.name.decode("utf-8", "replace")
        return Gpu(name, f"{found.major}.{found.minor}", _version(self.call("cudaDriverGetVersion")))

    def use(self) -> None:
        """Make the GPU of `gpu` the calling thread's: another thread has another, or none yet."""
        self.call("cudaSetDevice", self._device)

    def open_stream(self) -> None:
        self.stream = self.call("cudaStreamCreateWithFlags", self.api.cudaStreamNonBlocking)

    def close_stream(self) -> None:
        self.release("cudaStreamDestroy", self.stream)
        self.stream = None

    @property
    def handle(self) -> int:
        """The stream, as TensorRT takes it."""
        return int(self.stream)

    def free_bytes(self) -> int:
        free, _ = self.call("cudaMemGetInfo")
        return int(free)

    def allocate(self, size: int, what: str) -> int:
        """Address of `size` bytes of GPU memory, a multiple of 256; what is in them is undefined."""
        status, address = self.api.cudaMalloc(size)
        if status == self.api.cudaError_t.cudaErrorMemoryAllocation:
            raise BackendError(
                f"the GPU has no room for {what}: {size} bytes wanted ({size / 1e9:.3f} GB), "
                f"{self.free_bytes()} free; end what else uses this GPU, or build with a smaller "
                "--max-batch-size"
            )
        if status != self.api.cudaError_t.cudaSuccess:
            raise self._failure("cudaMalloc", status)
        return int(address)

    def allocate_pinned(self, size: int) -> int:
        """Address of `size` bytes of host memory that the GPU copies to and from by itself."""
        return int(self.call("cudaHostAlloc", size, self.api.cudaHostAllocDefault))

    def upload(self, device: int, host: int, size: int) -> None:
        """host: must stay as it is until `wait`."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", device, host, size, kind, self.stream)

    def download(self, host: int, device: int, size: int) -> None:
        """host: holds the bytes after `wait`."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", host, device, size, kind, self.stream)

    def copy(self, target: int, source: int, size: int) -> None:
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpyAsync", target, source, size, kind, self.stream)

    def clear(self, address: int, size: int) -> None:
        self.call("cudaMemsetAsync", address, 0, size, self.stream)

    def wait(self) -> None:
        """Until all that was put into the stream is done. Raises BackendError for what went wrong in it."""
        self.call("cudaStreamSynchronize", self.stream)

    def settle(self) -> None:
        """Wait before things are given back; what went wrong is logged."""
        if self.stream is not None:
            self.release("cudaSetDevice", self._device)
            self.release("cudaStreamSynchronize", self.stream)

    def _failure(self, name: str, status: Any) -> BackendError:
        _, text = self.api.cudaGetErrorString(status)
        sticky = status.name in STICKY
        remedy = "; this process cannot use the GPU any more, so start it again" if sticky else ""
        doing = _DOING.get(name, name)
        return BackendError(f"CUDA failed {doing}: {text.decode()} ({status.name}){remedy}", fatal=sticky)

    def _driver_problem(self) -> str:
        needed = _version(self.call("cudaRuntimeGetVersion"))
        served = self.call("cudaDriverGetVersion")
        if not served:
            return (
                "an engine needs an NVIDIA GPU and its driver, and this machine has no driver; run the ONNX "
                "folder it was built from instead, which needs neither: "
                "mistral-trt generate ONNX_DIR --prompt TEXT"
            )
        return (
            f"cuda-bindings needs a driver for CUDA {needed}, and the NVIDIA driver here serves CUDA "
            f"{_version(served)}; install a newer driver, or a cuda-bindings of that version"
        )


def _version(number: int) -> str:
    """13050 → 13.5"""
    return f"{number // 1000}.{number % 1000 // 10}"
