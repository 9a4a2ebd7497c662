"""GPU memory, streams and graphs in host memory: what both doubles act on."""

import ctypes
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import cuda.bindings.runtime as real

from tests.simulated.rules import RuleBroken

Error = real.cudaError_t

STICKY = (Error.cudaErrorIllegalAddress, Error.cudaErrorLaunchFailure, Error.cudaErrorECCUncorrectable)


class Fault(Exception):
    """What a step of a stream met on the GPU."""

    def __init__(self, status: Any) -> None:
        super().__init__(status.name)
        self.status = status


@dataclass
class Block:
    """An allocation.  kind: device or pinned."""

    start: int
    size: int
    kind: str
    raw: Any


@dataclass
class Work:
    """One thing in a stream.  ranges: address and bytes of what it touches.  context: whose step it is."""

    run: Callable[[], None]
    ranges: tuple[tuple[int, int], ...] = ()
    context: Any = None


@dataclass
class Capture:
    """What a stream records instead of doing it.  broken: the status of the first rule that was broken."""

    thread: int
    work: list[Work] = field(default_factory=list)
    broken: Any = None


@dataclass
class Stream:
    work: list[Work] = field(default_factory=list)
    capture: Capture | None = None


@dataclass
class Graph:
    """Captured work.  versions: of each context in it at its capture, and of its engine's weights."""

    work: list[Work]
    versions: list[tuple[Any, int, int]]


@dataclass
class Device:
    """One simulated GPU.

    memory_bytes: what can be allocated on it.  driver: the CUDA version it serves.  present: what asking for
    devices returns.  failures: name of a CUDA function → how many calls still succeed, and the status of the
    one that does not.  current: thread → the GPU it uses, 0 if it has not said.
    """

    memory_bytes: int = 1 << 32
    name: str = "NVIDIA A10G"
    compute_capability: tuple[int, int] = (8, 6)
    driver: int = 13050
    present: Any = Error.cudaSuccess
    blocks: dict[int, Block] = field(default_factory=dict)
    streams: dict[int, Stream] = field(default_factory=dict)
    graphs: dict[int, Graph] = field(default_factory=dict)
    instances: dict[int, Graph] = field(default_factory=dict)
    failures: dict[str, tuple[int, Any]] = field(default_factory=dict)
    sticky: Any = None
    called: list[str] = field(default_factory=list)
    current: dict[int, int] = field(default_factory=dict)
    _handles: int = 0

    def handle(self) -> int:
        self._handles += 1
        return self._handles * 64

    @property
    def used_bytes(self) -> int:
        return sum(block.size for block in self.blocks.values() if block.kind == "device")

    def leaks(self) -> dict[str, int]:
        """What was not given back."""
        kept = {
            "memory": len(self.blocks),
            "streams": len(self.streams),
            "graphs": len(self.graphs),
            "instances": len(self.instances),
        }
        return {name: count for name, count in kept.items() if count}

    def allocate(self, size: int, kind: str) -> int:
        """Address of fresh memory, a multiple of 256, full of NaN."""
        raw = (ctypes.c_ubyte * (size + 512))()
        ctypes.memset(raw, 0xFF, size + 512)
        start = -(-ctypes.addressof(raw) // 256) * 256
        self.blocks[start] = Block(start, size, kind, raw)
        return start

    @property
    def current_index(self) -> int:
        """Of the GPU that this thread uses."""
        return self.current.get(threading.get_ident(), 0)

    def kind_of(self, address: int, size: int) -> str | None:
        """Of the allocation that holds all of these bytes."""
        for block in self.blocks.values():
            if block.start <= address and address + size <= block.start + block.size:
                return block.kind
        return None

    def put(self, stream: Stream, work: Work) -> None:
        (stream.work if stream.capture is None else stream.capture.work).append(work)

    def drain(self, stream: Stream) -> Any:
        """Do what waits in a stream; the status."""
        while stream.work:
            work = stream.work.pop(0)
            try:
                self.touch(work.ranges)
                work.run()
            except Fault as fault:
                stream.work.clear()
                if fault.status in STICKY:
                    self.sticky = fault.status
                return fault.status
        return Error.cudaSuccess

    def touch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Fault unless all of it is allocated now."""
        for address, size in ranges:
            if self.kind_of(address, size) is None:
                raise Fault(Error.cudaErrorIllegalAddress)

    def capturing(self) -> Capture | None:
        """The capture that this thread has begun, if any."""
        mine = threading.get_ident()
        found = (stream.capture for stream in self.streams.values())
        return next((c for c in found if c is not None and c.thread == mine), None)

    def pending(self, but: Stream | None = None) -> list[Work]:
        """What waits in the streams, one of them left out."""
        return [work for stream in self.streams.values() if stream is not but for work in stream.work]


class Cudart:
    """The functions of the CUDA runtime on a device; `spec.CudaDouble` holds them to the installed module."""

    _UNCHECKED = frozenset({"cudaGetErrorString", "cudaDriverGetVersion", "cudaRuntimeGetVersion"})
    _UNSAFE = frozenset({"cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaFreeHost"})
    """Calls that a thread must not make while it captures."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def call(self, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        device = self.device
        device.called.append(name)
        if name in self._UNCHECKED:
            return function(*arguments)
        if device.present != Error.cudaSuccess:
            return device.present
        if device.sticky is not None:
            return device.sticky
        if name in device.failures:
            left, status = device.failures[name]
            device.failures[name] = (left - 1, status)
            if left == 0:
                if status in STICKY:
                    device.sticky = status
                if name == "cudaStreamEndCapture":  # gives no graph, but ends all the same
                    device.streams[int(arguments[0])].capture = None
                return status
        if name in self._UNSAFE and (capture := device.capturing()) is not None:
            capture.broken = capture.broken or Error.cudaErrorStreamCaptureUnsupported
            return Error.cudaErrorStreamCaptureUnsupported
        return function(*arguments)

    # --- the device ---------------------------------------------------------------------------------------

    def cudaGetDeviceCount(self) -> Any:
        return Error.cudaSuccess, 1

    def cudaGetDevice(self) -> Any:
        return Error.cudaSuccess, self.device.current_index

    def cudaSetDevice(self, index: int) -> Any:
        self.device.current[threading.get_ident()] = index
        return Error.cudaSuccess

    def cudaGetDeviceProperties(self, index: int) -> Any:
        found = real.cudaDeviceProp()
        found.name = self.device.name.encode().ljust(256, b"\0")
        found.major, found.minor = self.device.compute_capability
        return Error.cudaSuccess, found

    def cudaDriverGetVersion(self) -> Any:
        return Error.cudaSuccess, self.device.driver

    def cudaRuntimeGetVersion(self) -> Any:
        return real.cudaRuntimeGetVersion()

    def cudaGetErrorString(self, status: Any) -> Any:
        return real.cudaGetErrorString(status)

    def cudaMemGetInfo(self) -> Any:
        device = self.device
        return Error.cudaSuccess, device.memory_bytes - device.used_bytes, device.memory_bytes

    # --- memory -------------------------------------------------------------------------------------------

    def cudaMalloc(self, size: int) -> Any:
        if size > self.device.memory_bytes - self.device.used_bytes:
            return Error.cudaErrorMemoryAllocation
        return Error.cudaSuccess, self.device.allocate(size, "device")

    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        return Error.cudaSuccess, self.device.allocate(size, "pinned")

    def cudaFree(self, address: int) -> Any:
        return self._free(address, "device")

    def cudaFreeHost(self, address: int) -> Any:
        return self._free(address, "pinned")

    def _free(self, address: int, kind: str) -> Any:
        block = self.device.blocks.get(int(address))
        if block is None or block.kind != kind:
            return Error.cudaErrorInvalidValue
        del self.device.blocks[int(address)]
        return Error.cudaSuccess

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: Any) -> Any:
        found = self._stream(stream)
        if found is None:
            return Error.cudaErrorInvalidResourceHandle
        if self.device.kind_of(address, size) is None:
            return Error.cudaErrorInvalidValue
        self.device.put(found, Work(lambda: _set(address, value, size), ((address, size),)))
        return Error.cudaSuccess

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: Any) -> Any:
        found = self._stream(stream)
        if found is None:
            return Error.cudaErrorInvalidResourceHandle
        kinds = real.cudaMemcpyKind
        ends = (self.device.kind_of(target, size), self.device.kind_of(source, size))
        on_gpu = {
            kinds.cudaMemcpyHostToDevice: (True, False),
            kinds.cudaMemcpyDeviceToHost: (False, True),
            kinds.cudaMemcpyDeviceToDevice: (True, True),
        }[kind]
        for end, wanted in zip(ends, on_gpu, strict=True):
            if wanted and end is None:
                return Error.cudaErrorInvalidValue
            if (end == "device") != wanted:
                raise RuleBroken("copy-direction", f"{kind.name} between {ends[1]} and {ends[0]} memory")
        if kind != kinds.cudaMemcpyDeviceToDevice and "pinned" not in ends:
            return self._copy_pageable(target, source, size, kind, found)
        self.device.put(found, Work(lambda: _move(target, source, size), ((target, size), (source, size))))
        return Error.cudaSuccess

    def _copy_pageable(self, target: int, source: int, size: int, kind: Any, stream: Stream) -> Any:
        """To the GPU by way of a staging buffer, at once; from it only when the stream has come that far."""
        if stream.capture is not None:
            stream.capture.broken = stream.capture.broken or Error.cudaErrorStreamCaptureUnsupported
            return Error.cudaErrorStreamCaptureUnsupported
        if kind == real.cudaMemcpyKind.cudaMemcpyHostToDevice:
            staged = ctypes.create_string_buffer(ctypes.string_at(source, size), size)
            move = lambda: _move(target, ctypes.addressof(staged), size)  # noqa: E731
            self.device.put(stream, Work(move, ((target, size),)))
            return Error.cudaSuccess
        self.device.put(stream, Work(lambda: _move(target, source, size), ((source, size),)))
        return self.device.drain(stream)

    # --- streams and graphs -------------------------------------------------------------------------------

    def _stream(self, handle: Any) -> Stream | None:
        return self.device.streams.get(int(handle))

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        handle = self.device.handle()
        self.device.streams[handle] = Stream()
        return Error.cudaSuccess, real.cudaStream_t(handle)

    def cudaStreamDestroy(self, stream: Any) -> Any:
        found = self.device.streams.pop(int(stream), None)
        return Error.cudaErrorInvalidResourceHandle if found is None else Error.cudaSuccess

    def cudaStreamSynchronize(self, stream: Any) -> Any:
        found = self._stream(stream)
        if found is None:
            return Error.cudaErrorInvalidResourceHandle
        if found.capture is not None:
            found.capture.broken = found.capture.broken or Error.cudaErrorStreamCaptureUnsupported
            return Error.cudaErrorStreamCaptureUnsupported
        return self.device.drain(found)

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> Any:
        found = self._stream(stream)
        if int(stream) == 0:
            return Error.cudaErrorStreamCaptureUnsupported
        if found is None:
            return Error.cudaErrorInvalidResourceHandle
        if found.capture is not None:
            return Error.cudaErrorInvalidValue
        found.capture = Capture(threading.get_ident())
        return Error.cudaSuccess

    def cudaStreamEndCapture(self, stream: Any) -> Any:
        found = self._stream(stream)
        if found is None or found.capture is None:
            return Error.cudaErrorInvalidValue
        if found.capture.thread != threading.get_ident():
            return Error.cudaErrorStreamCaptureWrongThread
        capture, found.capture = found.capture, None
        if capture.broken is not None:
            return Error.cudaErrorStreamCaptureInvalidated
        contexts = [work.context for work in capture.work if work.context is not None]
        versions = [(context, context._version, context._engine._epoch) for context in contexts]
        handle = self.device.handle()
        self.device.graphs[handle] = Graph(capture.work, versions)
        return Error.cudaSuccess, real.cudaGraph_t(handle)

    def cudaGraphDestroy(self, graph: Any) -> Any:
        found = self.device.graphs.pop(int(graph), None)
        return Error.cudaErrorInvalidValue if found is None else Error.cudaSuccess

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        if int(graph) not in self.device.graphs:
            return Error.cudaErrorInvalidValue
        handle = self.device.handle()
        self.device.instances[handle] = self.device.graphs[int(graph)]
        return Error.cudaSuccess, real.cudaGraphExec_t(handle)

    def cudaGraphExecDestroy(self, instance: Any) -> Any:
        found = self.device.instances.pop(int(instance), None)
        return Error.cudaErrorInvalidValue if found is None else Error.cudaSuccess

    def cudaGraphLaunch(self, instance: Any, stream: Any) -> Any:
        graph, found = self.device.instances.get(int(instance)), self._stream(stream)
        if graph is None:
            return Error.cudaErrorInvalidValue
        if found is None:
            return Error.cudaErrorInvalidResourceHandle
        for context, version, epoch in graph.versions:
            if context._version != version:
                raise RuleBroken("captured-context-untouched", "it was bound anew since")
            if context._engine._epoch != epoch:
                raise RuleBroken("captured-before-refit", "its engine was refitted since")
        for work in graph.work:
            self.device.put(found, work)
        return Error.cudaSuccess


def _move(target: int, source: int, size: int) -> None:
    ctypes.memmove(target, source, size)


def _set(address: int, value: int, size: int) -> None:
    ctypes.memset(address, value, size)
