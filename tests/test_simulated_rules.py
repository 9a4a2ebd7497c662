"""The doubles of TensorRT and CUDA: held to the installed modules, and every rule breaks what breaks it."""

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda.bindings.runtime as cudart
import numpy as np
import pytest
import tensorrt_rtx

from mistral_trt.contract import GraphContract
from mistral_trt.manifest import read_manifest
from tests.simulated import tensorrt as doubles
from tests.simulated.device import Cudart, Device, Error
from tests.simulated.folder import FLAVORS, Machine, machine
from tests.simulated.plan import plan_bytes, read_array
from tests.simulated.rules import RULES, RuleBroken
from tests.simulated.spec import CudaDouble, Double, cuda_signature, inside, signatures

Folder = Callable[..., Path]

H2D = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
D2H = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
THREAD_LOCAL = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal


class Logger(tensorrt_rtx.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        tensorrt_rtx.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        self.lines.append(f"{severity.name}: {message}")


class Bench:
    """A loaded engine of the tiny graph and a decode context that is bound to memory of its own."""

    def __init__(self, onnx: Path, flavor: str = "tensorrt-rtx", *, external: bool = False) -> None:
        self.machine: Machine = machine(flavor, memory_bytes=1 << 24)
        self.device, self.cuda, self.trt = self.machine.device, self.machine.cudart, self.machine.trt
        self.contract: GraphContract = read_manifest(onnx, check_files=False).contract
        self.logger = Logger()
        self.runtime = self.trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(plan_bytes(onnx, external=external))
        self.stream = self.ok(self.cuda.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        self.addresses = {
            name: self.ok(self.cuda.cudaMalloc(size)) for name, size in self.sizes().items() if size
        }
        for past, present in zip(self.contract.past(), self.contract.present(), strict=True):
            self.addresses[present.name] = self.addresses[past.name]
        for name, address in self.addresses.items():
            self.ok(self.cuda.cudaMemsetAsync(address, 0, self.sizes().get(name, 256), self.stream))
        self.wait()
        self.context = self.make()

    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor for a step of one row; the presents have none of their own."""
        contract = self.contract
        rings = {spec.name: contract.ring_bytes_per_row for spec in contract.past()}
        logits = 4 * contract.config.vocab_size * contract.ring.prefill_chunk
        tokens = {spec.name: 8 * contract.ring.prefill_chunk for spec in contract.step_inputs()}
        return {**tokens, **rings, contract.logits().name: logits}

    def ok(self, found: tuple[Any, ...]) -> Any:
        assert found[0] == Error.cudaSuccess, found
        return found[1] if len(found) > 1 else None

    def wait(self) -> Any:
        return self.cuda.cudaStreamSynchronize(self.stream)[0]

    def make(self, profile: int = 0, *, bound: bool = True) -> Any:
        context = self.engine.create_execution_context()
        assert context.set_optimization_profile_async(profile, int(self.stream))
        self.wait()
        if bound:
            self.shape(context)
            for name, address in self.addresses.items():
                assert context.set_tensor_address(name, address)
        return context

    def shape(self, context: Any, *, batch: int = 1, new: int = 1) -> None:
        sizes = {"B": batch, "S": new, "N": 1}
        for spec in self.contract.inputs():
            shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)
            assert context.set_input_shape(spec.name, shape)

    def step(self, context: Any | None = None, stream: Any | None = None) -> bool:
        found: bool = (context or self.context).execute_async_v3(int(stream or self.stream))
        return found

    def another_stream(self) -> Any:
        return self.ok(self.cuda.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))

    def capture(self, context: Any | None = None) -> Any:
        self.ok(self.cuda.cudaStreamBeginCapture(self.stream, THREAD_LOCAL))
        assert self.step(context)
        graph = self.ok(self.cuda.cudaStreamEndCapture(self.stream))
        return self.ok(self.cuda.cudaGraphInstantiate(graph, 0))

    def fill(self, name: str, value: int) -> None:
        read_array(self.addresses[name], (1,), np.int64)[0] = value

    def weights(self) -> list[tuple[str, Any]]:
        """Zeros for each weight that the plan leaves out, kept alive."""
        self.numbers = {}
        found = []
        for name, (dtype, count) in inside(self.engine)._plan.weights.items():
            self.numbers[name] = np.zeros(count, np.float32)
            address = self.numbers[name].ctypes.data
            found.append((name, self.trt.Weights(getattr(self.trt.DataType, dtype), address, count)))
        return found

    def refitter(self, *, without: str = "") -> Any:
        refitter = self.trt.Refitter(self.engine, self.logger)
        for name, weights in self.weights():
            assert name == without or refitter.set_named_weights(name, weights)
        return refitter


@pytest.fixture
def onnx(onnx_folder: Folder) -> Path:
    return onnx_folder()


@pytest.fixture
def bench(onnx: Path) -> Bench:
    return Bench(onnx)


# --- each rule and what breaks it -----------------------------------------------------------------------

BREAKS: dict[str, Callable[[Bench], Any]] = {}
"""Rule → a use that breaks it; what it returns is what `EXPECTED` says, RuleBroken where it says nothing."""

EXPECTED: dict[str, Any] = {}


def breaks(rule: str, expected: Any = None) -> Callable[[Callable[[Bench], Any]], Callable[[Bench], Any]]:
    def note(function: Callable[[Bench], Any]) -> Callable[[Bench], Any]:
        BREAKS[rule], EXPECTED[rule] = function, expected
        return function

    return note


@breaks("memory-not-cleared", True)
def _(bench: Bench) -> bool:
    address = bench.ok(bench.cuda.cudaMalloc(64))
    return bool(np.isnan(read_array(address, (16,), np.float32)).all())


@breaks("memory-runs-out", (Error.cudaErrorMemoryAllocation, None))
def _(bench: Bench) -> Any:
    return bench.cuda.cudaMalloc(1 << 30)


@breaks("freed-once", (Error.cudaErrorInvalidValue,))
def _(bench: Bench) -> Any:
    address = bench.ok(bench.cuda.cudaMalloc(64))
    bench.ok(bench.cuda.cudaFree(address))
    return bench.cuda.cudaFree(address)


@breaks("freed-by-its-kind", ((Error.cudaErrorInvalidValue,), (Error.cudaErrorInvalidValue,)))
def _(bench: Bench) -> Any:
    pinned, device = bench.ok(bench.cuda.cudaHostAlloc(64, 0)), bench.ok(bench.cuda.cudaMalloc(64))
    return bench.cuda.cudaFree(pinned), bench.cuda.cudaFreeHost(device)


@breaks("range-allocated", [(Error.cudaErrorInvalidValue,)] * 2)
def _(bench: Bench) -> Any:
    address, host = bench.ok(bench.cuda.cudaMalloc(64)), np.zeros(65, np.uint8)
    copy = bench.cuda.cudaMemcpyAsync(address, host.ctypes.data, 65, H2D, bench.stream)
    return [copy, bench.cuda.cudaMemsetAsync(address, 0, 65, bench.stream)]


@breaks("copy-direction")
def _(bench: Bench) -> None:
    address, host = bench.ok(bench.cuda.cudaMalloc(64)), bench.ok(bench.cuda.cudaHostAlloc(64, 0))
    bench.cuda.cudaMemcpyAsync(host, address, 64, H2D, bench.stream)


@breaks("copy-later", [255, 7])
def _(bench: Bench) -> list[int]:
    host = bench.ok(bench.cuda.cudaHostAlloc(64, 0))
    device = bench.ok(bench.cuda.cudaMalloc(64))
    bench.ok(bench.cuda.cudaMemsetAsync(device, 7, 64, bench.stream))
    bench.ok(bench.cuda.cudaMemcpyAsync(host, device, 64, D2H, bench.stream))
    seen = [int(read_array(host, (1,), np.uint8)[0])]
    bench.wait()
    return [*seen, int(read_array(host, (1,), np.uint8)[0])]


@breaks("memory-in-use", Error.cudaErrorIllegalAddress)
def _(bench: Bench) -> Any:
    assert bench.step()
    bench.ok(bench.cuda.cudaFree(bench.addresses["input_ids"]))
    return bench.wait()


@breaks("stream-alive", [(Error.cudaErrorInvalidResourceHandle,)] * 5)
def _(bench: Bench) -> Any:
    bench.step()
    bench.wait()
    instance, host = bench.capture(), np.zeros(8, np.int64)
    bench.ok(bench.cuda.cudaStreamDestroy(bench.stream))
    address = bench.addresses["input_ids"]
    return [
        bench.cuda.cudaStreamSynchronize(bench.stream),
        bench.cuda.cudaMemcpyAsync(address, host.ctypes.data, 8, H2D, bench.stream),
        bench.cuda.cudaMemsetAsync(address, 0, 8, bench.stream),
        bench.cuda.cudaGraphLaunch(instance, bench.stream),
        bench.cuda.cudaStreamBeginCapture(bench.stream, THREAD_LOCAL),
    ]


@breaks("error-sticks", [(Error.cudaErrorIllegalAddress, None), (Error.cudaErrorIllegalAddress,)])
def _(bench: Bench) -> Any:
    bench.fill("input_ids", 10**6)  # a token that the embedding does not have
    assert bench.step()
    assert bench.wait() == Error.cudaErrorIllegalAddress
    return [bench.cuda.cudaMalloc(1), bench.cuda.cudaFree(bench.addresses["input_ids"])]


@breaks("capture-not-run", [True, 1])
def _(bench: Bench) -> Any:
    bench.step()
    bench.wait()
    logits = read_array(bench.addresses["logits"], (1,), np.float32)
    logits[:] = np.nan
    instance = bench.capture()
    unchanged = bool(np.isnan(logits[0]))
    bench.ok(bench.cuda.cudaGraphLaunch(instance, bench.stream))
    bench.wait()
    return [unchanged, int(np.isfinite(logits[0]))]


@breaks("capture-once", (Error.cudaErrorInvalidValue,))
def _(bench: Bench) -> Any:
    bench.ok(bench.cuda.cudaStreamBeginCapture(bench.stream, THREAD_LOCAL))
    return bench.cuda.cudaStreamBeginCapture(bench.stream, THREAD_LOCAL)


@breaks("capture-own-stream", (Error.cudaErrorStreamCaptureUnsupported,))
def _(bench: Bench) -> Any:
    return bench.cuda.cudaStreamBeginCapture(cudart.cudaStream_t(0), THREAD_LOCAL)


@breaks("capture-ended-where-begun", (Error.cudaErrorInvalidValue, None))
def _(bench: Bench) -> Any:
    bench.ok(bench.cuda.cudaStreamBeginCapture(bench.stream, THREAD_LOCAL))
    return bench.cuda.cudaStreamEndCapture(bench.another_stream())


@breaks("capture-one-thread", (Error.cudaErrorStreamCaptureWrongThread, None))
def _(bench: Bench) -> Any:
    bench.ok(bench.cuda.cudaStreamBeginCapture(bench.stream, THREAD_LOCAL))
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(bench.cuda.cudaStreamEndCapture, bench.stream).result()


@breaks("capture-no-wait", Error.cudaErrorStreamCaptureUnsupported)
def _(bench: Bench) -> Any:
    bench.ok(bench.cuda.cudaStreamBeginCapture(bench.stream, THREAD_LOCAL))
    return bench.wait()


@breaks("capture-no-allocation", (Error.cudaErrorStreamCaptureUnsupported, None))
def _(bench: Bench) -> Any:
    bench.ok(bench.cuda.cudaStreamBeginCapture(bench.stream, THREAD_LOCAL))
    with ThreadPoolExecutor(1) as pool:  # another thread may
        bench.ok(pool.submit(bench.cuda.cudaMalloc, 64).result())
    return bench.cuda.cudaMalloc(64)


@breaks("capture-invalidated", (Error.cudaErrorStreamCaptureInvalidated, None))
def _(bench: Bench) -> Any:
    bench.ok(bench.cuda.cudaStreamBeginCapture(bench.stream, THREAD_LOCAL))
    bench.wait()
    return bench.cuda.cudaStreamEndCapture(bench.stream)


@breaks("capture-pinned", (Error.cudaErrorStreamCaptureUnsupported,))
def _(bench: Bench) -> Any:
    host = np.zeros(1, np.int64)
    bench.ok(bench.cuda.cudaStreamBeginCapture(bench.stream, THREAD_LOCAL))
    address = bench.addresses["input_ids"]
    return bench.cuda.cudaMemcpyAsync(address, host.ctypes.data, 8, H2D, bench.stream)


@breaks("graph-alive", (Error.cudaErrorInvalidValue,))
def _(bench: Bench) -> Any:
    bench.step()
    bench.wait()
    instance = bench.capture()
    bench.ok(bench.cuda.cudaGraphExecDestroy(instance))
    assert bench.cuda.cudaGraphExecDestroy(instance) == (Error.cudaErrorInvalidValue,)
    return bench.cuda.cudaGraphLaunch(instance, bench.stream)


@breaks("address-aligned", False)
def _(bench: Bench) -> Any:
    return bench.context.set_tensor_address("input_ids", bench.addresses["input_ids"] + 8)


@breaks("address-set", False)
def _(bench: Bench) -> Any:
    context = bench.make(bound=False)
    bench.shape(context)
    return bench.step(context)


@breaks("buffer-large-enough", Error.cudaErrorIllegalAddress)
def _(bench: Bench) -> Any:
    bench.context.set_tensor_address("logits", bench.ok(bench.cuda.cudaMalloc(256)))
    assert bench.step()
    return bench.wait()


@breaks("alias-one-memory")
def _(bench: Bench) -> None:
    size = bench.contract.ring_bytes_per_row
    bench.context.set_tensor_address("present.0.key", bench.ok(bench.cuda.cudaMalloc(size)))
    bench.step()


@breaks("update-inside-cache")
def _(bench: Bench) -> None:
    prefill = bench.make(1)
    bench.shape(prefill, new=2)
    read_array(bench.addresses["position_ids"], (2,), np.int64)[:] = (11, 12)  # R = 12
    assert bench.step(prefill)
    bench.wait()


@breaks("shape-in-profile", False)
def _(bench: Bench) -> Any:
    return bench.context.set_input_shape("input_ids", (1, 2))  # decode has S = 1


@breaks("shapes-given", (["input_ids"], False))
def _(bench: Bench) -> Any:
    context = bench.make(bound=False)
    for name, address in bench.addresses.items():
        context.set_tensor_address(name, address)
    return context.infer_shapes()[:1], bench.step(context)


@breaks("profile-before-shapes", (0, 7))
def _(bench: Bench) -> Any:
    before = len(bench.context.infer_shapes())
    bench.context.set_optimization_profile_async(1, int(bench.stream))
    return before, len(bench.context.infer_shapes())


@breaks("profile-synchronized")
def _(bench: Bench) -> None:
    bench.context.set_optimization_profile_async(1, int(bench.stream))
    bench.shape(bench.context)
    bench.step(stream=bench.another_stream())


@breaks("stream-not-default")
def _(bench: Bench) -> None:
    bench.context.execute_async_v3(0)


def user_managed(bench: Bench, memory: int = 0, size: int = 0) -> Any:
    settings = bench.engine.create_runtime_config()
    strategies = bench.trt.ExecutionContextAllocationStrategy
    settings.set_execution_context_allocation_strategy(strategies.USER_MANAGED)
    context = bench.engine.create_execution_context(settings)
    if memory:
        context.set_device_memory(memory, size)
    bench.shape(context)
    for name, address in bench.addresses.items():
        context.set_tensor_address(name, address)
    return context


@breaks("activations-given", [False, False, False])
def _(bench: Bench) -> Any:
    size = bench.engine.device_memory_size_v2
    memory = bench.ok(bench.cuda.cudaMalloc(size + 256))
    assert bench.step(user_managed(bench, memory, size))
    givens = ((0, 0), (memory, size - 1), (memory + 8, size))
    return [bench.step(user_managed(bench, *given)) for given in givens]


@breaks("activations-in-turn")
def _(bench: Bench) -> None:
    size = bench.engine.device_memory_size_v2
    memory = bench.ok(bench.cuda.cudaMalloc(size))
    bench.step(user_managed(bench, memory, size))
    bench.step(user_managed(bench, memory, size), bench.another_stream())


@breaks("device-of-the-thread")
def _(bench: Bench) -> None:
    bench.ok(bench.cuda.cudaSetDevice(1))
    bench.step()


@breaks("settings-before-context", [0, 1])
def _(bench: Bench) -> Any:
    settings = bench.engine.create_runtime_config()
    late = bench.engine.create_execution_context(settings)
    settings.dynamic_shapes_kernel_specialization_strategy = (
        bench.trt.DynamicShapesKernelSpecializationStrategy.EAGER
    )
    compiled = []
    for context in (late, bench.engine.create_execution_context(settings)):
        bench.shape(context)
        for name, address in bench.addresses.items():
            context.set_tensor_address(name, address)
        bench.step(context)
        compiled.append(len(bench.trt._compiled))
    return compiled


@breaks("capture-after-a-step")
def _(bench: Bench) -> None:
    bench.capture()


@breaks("captured-context-untouched")
def _(bench: Bench) -> None:
    bench.step()
    bench.wait()
    instance = bench.capture()
    bench.context.set_input_shape("input_ids", (2, 1))
    bench.cuda.cudaGraphLaunch(instance, bench.stream)


@breaks("captured-before-refit")
def _(bench: Bench) -> None:
    bench = external(bench)
    bench.refitter().refit_cuda_engine()
    bench.step()
    bench.wait()
    instance = bench.capture()
    bench.refitter().refit_cuda_engine()
    bench.cuda.cudaGraphLaunch(instance, bench.stream)


def external(bench: Bench) -> Bench:
    """A bench whose plan leaves its weights out."""
    return Bench(inside(bench.engine)._plan.onnx, external=True)


@breaks("plan-loads-or-none", (None, True))
def _(bench: Bench) -> Any:
    engine = bench.runtime.deserialize_cuda_engine(b"no plan")
    return engine, any(line.startswith("ERROR") for line in bench.logger.lines)


@breaks("weights-as-built", [False, False, False])
def _(bench: Bench) -> Any:
    bench = external(bench)
    (name, _), *_rest = bench.weights()
    kind, array = bench.trt.DataType, bench.numbers[name]
    tries = ((name, kind.HALF, array.size), (name, kind.FLOAT, array.size - 1), ("?", kind.FLOAT, array.size))
    refitter = bench.trt.Refitter(bench.engine, bench.logger)
    return [
        refitter.set_named_weights(n, bench.trt.Weights(dtype, array.ctypes.data, count))
        for n, dtype, count in tries
    ]


@breaks("weights-complete", (["lm_head.weight"], False))
def _(bench: Bench) -> Any:
    refitter = external(bench).refitter(without="lm_head.weight")
    return refitter.get_missing_weights(), refitter.refit_cuda_engine()


@breaks("weights-filled")
def _(bench: Bench) -> None:
    external(bench).step()


@breaks("refit-at-rest")
def _(bench: Bench) -> None:
    bench = external(bench)
    bench.refitter().refit_cuda_engine()
    bench.step()
    bench.refitter().refit_cuda_engine()


@breaks("weights-kept-until-refit", 1.0)
def _(bench: Bench) -> Any:
    bench = external(bench)
    refitter = bench.refitter()
    bench.numbers["lm_head.weight"][:] = 1.0  # set as zeros
    refitter.refit_cuda_engine()
    return float(np.frombuffer(inside(bench.engine)._weights["lm_head.weight"], np.float32)[0])


@breaks("kernels-of-this-machine", [True, False, False])
def _(bench: Bench) -> Any:
    settings = bench.engine.create_runtime_config()
    data = bytes(settings.create_runtime_cache().serialize())
    found = [settings.create_runtime_cache().deserialize(data)]
    found.append(settings.create_runtime_cache().deserialize(b"{"))
    bench.device.name = "NVIDIA L4"
    return [*found, settings.create_runtime_cache().deserialize(data)]


@breaks("kernels-in-the-background", {"LAZY": [False, True], "EAGER": [True, True]})
def _(bench: Bench) -> Any:
    """Whether each of two steps that are alike has the logits of the kernel for its shape."""
    vocab = bench.contract.config.vocab_size
    bench.fill("input_ids", 3)
    found = {}
    for name in ("LAZY", "EAGER"):
        settings = bench.engine.create_runtime_config()
        strategy = getattr(bench.trt.DynamicShapesKernelSpecializationStrategy, name)
        settings.dynamic_shapes_kernel_specialization_strategy = strategy
        assert settings.set_runtime_cache(settings.create_runtime_cache())
        context = bench.engine.create_execution_context(settings)
        bench.shape(context)
        for tensor, address in bench.addresses.items():
            context.set_tensor_address(tensor, address)
        logits = []
        for _ in range(3):
            assert bench.step(context) and bench.wait() == Error.cudaSuccess
            logits.append(read_array(bench.addresses["logits"], (vocab,), np.float32).copy())
        found[name] = [bool((one == logits[2]).all()) for one in logits[:2]]
        np.testing.assert_allclose(logits[0], logits[2], rtol=2e-6)
    return found


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_enforced(bench: Bench, rule: str) -> None:
    if EXPECTED[rule] is None:
        with pytest.raises(RuleBroken) as broken:
            BREAKS[rule](bench)
        assert broken.value.rule == rule and RULES[rule].source in str(broken.value)
    else:
        assert BREAKS[rule](bench) == EXPECTED[rule]


def test_a_use_that_breaks_no_rule_is_let_through(bench: Bench) -> None:
    assert bench.step() and bench.wait() == Error.cudaSuccess
    bench.ok(bench.cuda.cudaGraphLaunch(bench.capture(), bench.stream))
    assert bench.wait() == Error.cudaSuccess
    assert np.isfinite(read_array(bench.addresses["logits"], (1, 97), np.float32)).all()
    assert bench.logger.lines == []


def test_every_rule_has_a_use_that_breaks_it() -> None:
    assert set(BREAKS) == set(RULES) and len(RULES) >= 40


# --- where the rules come from --------------------------------------------------------------------------

MODULES: dict[str, Any] = {"cudart": cudart, "trt": tensorrt_rtx, "rtx": tensorrt_rtx}
INSTALLED = [name for name, rule in RULES.items() if rule.source.partition(":")[0] in MODULES]


def documentation(source: str) -> str:
    """Documentation of `module:attribute`, in one line."""
    module, _, path = source.partition(":")
    found = MODULES[module]
    for name in path.split("."):
        found = getattr(found, name)
    return " ".join((found.__doc__ or "").split())


@pytest.mark.parametrize("name", INSTALLED)
def test_the_words_of_a_rule_stand_in_the_installed_documentation(name: str) -> None:
    assert RULES[name].words in documentation(RULES[name].source)


def test_most_rules_can_be_looked_up_in_what_is_installed() -> None:
    assert len(INSTALLED) >= 25
    for rule in (rule for name, rule in RULES.items() if name not in INSTALLED):
        assert re.match(r"NvInfer\w*\.h:\d+ \(\w+\)|docs\.nvidia\.com/\S+", rule.source), rule


# --- the doubles are held to the installed modules ------------------------------------------------------

CLASSES = {
    "Runtime": doubles._Runtime,
    "ICudaEngine": doubles._Engine,
    "IExecutionContext": doubles._Context,
    "IRuntimeConfig": doubles._RuntimeConfig,
    "IRuntimeCache": doubles._RuntimeCache,
    "Refitter": doubles._Refitter,
    "Weights": doubles._Weights,
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_double_has_no_name_that_tensorrt_lacks(name: str) -> None:
    mine = {member for member in vars(CLASSES[name]) if not member.startswith("_")}
    assert mine <= set(dir(getattr(tensorrt_rtx, name)))


def test_the_cuda_double_has_no_name_that_cuda_lacks() -> None:
    mine = [name for name in vars(Cudart) if name.startswith("cuda")]
    assert len(mine) > 20 and all(callable(getattr(cudart, name)) for name in mine)


def test_an_attribute_that_tensorrt_lacks_does_not_exist(bench: Bench) -> None:
    for owner, name in ((bench.engine, "num_layerz"), (bench.context, "enqueue"), (bench.trt, "IEngine")):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(owner, name)
    with pytest.raises(AttributeError, match="no attribute 'cudaMallocc'"):
        bench.cuda.cudaMallocc(1)


def test_an_enum_member_that_tensorrt_lacks_does_not_exist(bench: Bench) -> None:
    for owner, name in (
        (bench.trt.CudaGraphStrategy, "CAPTURE"),
        (bench.trt.DataType, "FP16"),
        (bench.cuda.cudaError_t, "cudaErrorOops"),
        (bench.cuda.cudaMemcpyKind, "HostToDevice"),
    ):
        with pytest.raises(AttributeError):
            getattr(owner, name)


def test_what_the_simulation_lacks_is_told_apart(bench: Bench) -> None:
    for owner, name in ((bench.engine, "num_layers"), (bench.cuda, "cudaDeviceReset")):
        with pytest.raises(NotImplementedError, match=f"the simulation has no .*{name}"):
            getattr(owner, name)


@pytest.mark.parametrize(
    "use",
    [
        lambda b: b.context.set_input_shape("input_ids"),
        lambda b: b.context.set_input_shape(0, (1, 1)),
        lambda b: b.context.set_tensor_address("input_ids", None),
        lambda b: b.context.execute_async_v3(stream=1),
        lambda b: b.context.set_tensor_address("input_ids", memory=256, name="logits"),
        lambda b: b.engine.create_execution_context(b.context),
        lambda b: b.trt.Runtime(),
        lambda b: b.trt.Weights("HALF", 0, 1),
        lambda b: b.runtime.deserialize_cuda_engine("a path"),
        lambda b: b.cuda.cudaMalloc(),
        lambda b: b.cuda.cudaMalloc(None),
        lambda b: b.cuda.cudaStreamBeginCapture(b.stream, 1),
        lambda b: b.cuda.cudaMemcpyAsync(0, 0, 1, THREAD_LOCAL, b.stream),
    ],
)
def test_a_call_that_the_signature_does_not_allow_is_refused(bench: Bench, use: Any) -> None:
    with pytest.raises(TypeError):
        use(bench)


def test_an_attribute_that_cannot_be_set_is_not_set(bench: Bench) -> None:
    settings = bench.engine.create_runtime_config()
    settings.cuda_graph_strategy = bench.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    with pytest.raises(AttributeError, match="refittable cannot be set"):
        bench.engine.refittable = True
    with pytest.raises(AttributeError, match="cuda_graph cannot be set"):
        settings.cuda_graph = 1


def test_a_result_of_another_shape_is_refused(bench: Bench) -> None:
    wrong = Double(tensorrt_rtx.Refitter, SimpleNamespace())
    object.__setattr__(wrong, "_inside", type("R", (), {"get_missing_weights": lambda self: (2, [])})())
    with pytest.raises(TypeError, match="gives list"):
        wrong.get_missing_weights()
    short = type("C", (Cudart,), {"cudaMalloc": lambda self, size: (Error.cudaSuccess,)})(Device())
    with pytest.raises(TypeError, match="cudaMalloc gives 2 results, the double 1"):
        CudaDouble(cudart, short).cudaMalloc(1)


def test_full_tensorrt_lacks_what_only_rtx_has(onnx: Path) -> None:
    bench = Bench(onnx, "tensorrt")
    settings = bench.engine.create_runtime_config()
    for name in ("cuda_graph_strategy", "create_runtime_cache", "set_runtime_cache"):
        with pytest.raises(AttributeError, match=f"tensorrt_lean.*no attribute '{name}'"):
            getattr(settings, name)
    with pytest.raises(AttributeError, match="no attribute 'CudaGraphStrategy'"):
        bench.trt.CudaGraphStrategy.DISABLED  # noqa: B018
    assert bench.step() and bench.wait() == Error.cudaSuccess


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        ("IExecutionContext", "set_device_memory", ["memory", "size"]),
        ("IExecutionContext", "infer_shapes", []),
        ("ICudaEngine", "get_tensor_profile_shape", ["name", "profile_index"]),
        ("IRuntimeConfig", "set_execution_context_allocation_strategy", ["strategy"]),
    ],
)
def test_signatures_are_read_from_the_documentation(owner: str, name: str, parameters: list[str]) -> None:
    for module in FLAVORS.values():
        found = signatures(getattr(module, owner), name)
        assert [[p for p, _, _ in s.parameters] for s in found] == [parameters]


NO_ARGUMENTS = {
    "cudaMemcpyKind": H2D,
    "cudaStreamCaptureMode": THREAD_LOCAL,
    "cudaError_t": Error.cudaSuccess,
}
HARMLESS = ("cudaDriverGetVersion", "cudaRuntimeGetVersion", "cudaGetErrorString")


def without_driver() -> bool:
    return bool(cudart.cudaDriverGetVersion()[1] == 0)


@pytest.mark.parametrize("name", [name for name in vars(Cudart) if name.startswith("cuda")])
def test_results_have_the_shape_that_the_installed_cuda_gives(name: str) -> None:
    """Really called where that can do no harm: where there is no driver, and what needs none."""
    real = getattr(cudart, name)
    kinds, count = cuda_signature(real)
    device = Device(present=Error.cudaErrorInsufficientDriver)
    arguments = [NO_ARGUMENTS.get(kind, 0) for kind in kinds]
    ours = getattr(CudaDouble(cudart, Cudart(device)), name)(*arguments)
    assert len(ours) == count
    if name in HARMLESS or without_driver():
        theirs = real(*arguments)
        assert [type(value) for value in ours] == [type(value) for value in theirs]
        assert name in HARMLESS or ours == theirs


def test_a_capture_belongs_to_its_thread(bench: Bench) -> None:
    """The double tells threads apart, or `capture-no-allocation` would prove nothing."""
    bench.ok(bench.cuda.cudaStreamBeginCapture(bench.stream, THREAD_LOCAL))
    assert bench.device.capturing() is not None
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(bench.device.capturing()))
    thread.start()
    thread.join()
    assert seen == [None]
