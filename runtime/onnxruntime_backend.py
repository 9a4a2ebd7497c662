"""ONNX folder + rings in memory → logits, through ONNX Runtime on the CPU or on CUDA.

Past and present of each layer are bound to one address, so `TensorScatter` writes in place: a step
copies no ring and allocates nothing of a ring's size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mistral_trt.contract import GraphContract
from mistral_trt.errors import BackendError, EngineMismatchError, GraphError
from mistral_trt.runtime.backend import Logits, Progress, RingArray, Step

PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
"""Where the graph may run → ONNX Runtime's providers, the preferred first."""


class OnnxRuntimeBackend:
    """One session and the rings of max_batch_size rows.

    threads: ONNX Runtime's intra-op threads, None for its own choice.  exact: compute what the graph says,
    with weights dequantized once into float32, instead of ONNX Runtime's quantized kernels: those round the
    inputs of int4 and int8-weight-only linears to INT8 as well.  fp8, for which it has none, is always so.
    provider: "cpu", "cuda", or "auto" for CUDA where this ONNX Runtime has it.
    Raises GraphError for a graph that does not load or is not the contract's, EngineMismatchError for one
    that cannot run here.
    """

    def __init__(
        self,
        model_path: Path,
        contract: GraphContract,
        *,
        threads: int | None = None,
        exact: bool = False,
        provider: str = "cpu",
    ) -> None:
        provider = choose_provider(provider)
        if contract.precision == "bf16" and provider == "cpu":
            raise EngineMismatchError(
                "ONNX Runtime has no bfloat16 kernels for the CPU, so a bf16 ONNX folder cannot run here; "
                "build an engine from it, or export with --precision fp16 or fp32 to run on a CPU"
            )
        self.contract = contract
        dequantize = exact or contract.precision == "fp8"
        self._session: Any = open_session(model_path, threads, dequantize=dequantize, provider=provider)
        self._check_names()
        self._rings: HostRings | DeviceRings
        self._rings = HostRings(contract) if provider == "cpu" else DeviceRings(contract, provider)
        self._bindings: dict[tuple[int, int], Any] = {}
        self._decoding: dict[tuple[int, int], DecodeCall] = {}

    @property
    def ready(self) -> bool:
        return self._session is not None

    def warm_up(self, progress: Progress | None = None) -> None:
        """Nothing: ONNX Runtime prepares its kernels when it loads the graph."""

    def run(self, step: Step) -> Logits:
        if self._session is None:
            raise BackendError("the backend was closed; load the engine again", fatal=True)
        try:
            if step.input_ids.shape[1] == 1:
                return self._decode(step)
            return self._prefill(step)
        except Exception as error:  # ONNX Runtime raises a class of its own for each status
            raise BackendError(
                f"ONNX Runtime failed in a step: {error}", fatal="CUDA failure" in str(error)
            ) from error

    def read_row(self, row: int) -> tuple[RingArray, ...]:
        return self._rings.read_row(row)

    def write_row(self, row: int, rings: Sequence[RingArray] | None) -> None:
        self._rings.write_row(row, rings)

    def copy_row(self, source: int, target: int) -> None:
        self._rings.copy_row(source, target)

    def close(self) -> None:
        self._decoding.clear()
        self._bindings.clear()
        self._rings.arrays.clear()
        self._session = None

    def _decode(self, step: Step) -> Logits:
        """One token a row, in buffers that are bound once."""
        key = (step.first_row, len(step.input_ids))
        call = self._decoding.get(key)
        if call is None:
            call = self._decoding[key] = self._bind_decode(*key)
        call.input_ids[:] = step.input_ids
        call.position_ids[:] = step.position_ids
        self._session.run_with_iobinding(call.binding)
        return call.logits

    def _prefill(self, step: Step) -> Logits:
        """Several tokens a row: the rings stay bound, what changes its shape is bound anew."""
        batch, count = step.logits_index.shape
        binding = self._bound_rings(step.first_row, batch)
        logits = np.empty((batch, count, self.contract.config.vocab_size), np.float32)
        self._bind(binding, (step.input_ids, step.position_ids, step.logits_index), logits)
        self._session.run_with_iobinding(binding)
        return logits

    def _bind_decode(self, first_row: int, batch: int) -> "DecodeCall":
        ids, positions, index = (np.zeros((batch, 1), np.int64) for _ in range(3))
        logits = np.empty((batch, 1, self.contract.config.vocab_size), np.float32)
        binding = self._session.io_binding()
        self._rings.bind(binding, first_row, batch)
        self._bind(binding, (ids, positions, index), logits)
        return DecodeCall(binding, ids, positions, index, logits)

    def _bind(self, binding: Any, inputs: tuple[RingArray, ...], logits: Logits) -> None:
        for spec, array in zip(self.contract.step_inputs(), inputs, strict=True):
            binding.bind_input(spec.name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        name = self.contract.logits().name
        binding.bind_output(name, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)

    def _bound_rings(self, first_row: int, batch: int) -> Any:
        """The binding of prefill for these rows, its rings bound once and kept."""
        key = (first_row, batch)
        if key not in self._bindings:
            binding = self._session.io_binding()
            self._rings.bind(binding, first_row, batch)
            self._bindings[key] = binding
        return self._bindings[key]

    def _check_names(self) -> None:
        found = [[value.name for value in values] for values in _signature(self._session)]
        expected = [[s.name for s in specs] for specs in (self.contract.inputs(), self.contract.outputs())]
        if found != expected:
            raise GraphError(
                "the graph's inputs and outputs are not the contract's; export the checkpoint again"
            )


@dataclass(frozen=True)
class DecodeCall:
    """The buffers of a decode step over B rows, and the binding that knows them.

    input_ids, position_ids, logits_index: int64 [B, 1], the last all zero.  logits: float32 [B, 1, V].
    """

    binding: Any
    input_ids: RingArray
    position_ids: RingArray
    logits_index: RingArray
    logits: Logits


class HostRings:
    """The rings [max_batch_size, K, R, D] in host memory."""

    def __init__(self, contract: GraphContract) -> None:
        self._contract = contract
        dtype = np.dtype(contract.cache_dtype)
        self.arrays: list[RingArray] = [np.zeros(shape, dtype) for shape in _ring_shapes(contract)]

    def bind(self, binding: Any, first_row: int, batch: int) -> None:
        """Bind past and present of every layer to one address."""
        for past, present, ring in zip(
            self._contract.past(), self._contract.present(), self.arrays, strict=True
        ):
            rows = ring[first_row : first_row + batch]
            binding.bind_input(past.name, "cpu", 0, ring.dtype, rows.shape, rows.ctypes.data)
            binding.bind_output(present.name, "cpu", 0, ring.dtype, rows.shape, rows.ctypes.data)

    def read_row(self, row: int) -> tuple[RingArray, ...]:
        return tuple(ring[row].copy() for ring in self.arrays)

    def write_row(self, row: int, rings: Sequence[RingArray] | None) -> None:
        for i, ring in enumerate(self.arrays):
            ring[row] = 0 if rings is None else rings[i]

    def copy_row(self, source: int, target: int) -> None:
        for ring in self.arrays:
            ring[target] = ring[source]


class DeviceRings:
    """The rings in ONNX Runtime's own memory on a device.

    Its Python API copies whole values only, so reading or writing a row takes all rows of a ring through
    host memory; steps do not.
    """

    def __init__(self, contract: GraphContract, device: str) -> None:
        self._contract, self._device = contract, device
        dtype = np.dtype(contract.cache_dtype)
        self.arrays: list[Any] = [
            ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), device, 0)
            for shape in _ring_shapes(contract)
        ]

    def bind(self, binding: Any, first_row: int, batch: int) -> None:
        """Bind past and present of every layer to one address."""
        dtype = np.dtype(self._contract.cache_dtype)
        for past, present, ring in zip(
            self._contract.past(), self._contract.present(), self.arrays, strict=True
        ):
            rest = ring.shape()[1:]
            row_bytes = int(np.prod(rest)) * dtype.itemsize
            shape, address = (batch, *rest), ring.data_ptr() + first_row * row_bytes
            binding.bind_input(past.name, self._device, 0, dtype, shape, address)
            binding.bind_output(present.name, self._device, 0, dtype, shape, address)

    def read_row(self, row: int) -> tuple[RingArray, ...]:
        return tuple(ring.numpy()[row].copy() for ring in self.arrays)

    def write_row(self, row: int, rings: Sequence[RingArray] | None) -> None:
        for i, ring in enumerate(self.arrays):
            values = ring.numpy().copy()
            values[row] = 0 if rings is None else rings[i]
            ring.update_inplace(values)

    def copy_row(self, source: int, target: int) -> None:
        self.write_row(target, self.read_row(source))


def choose_provider(provider: str) -> str:
    """ "auto", "cpu" or "cuda" → where the graph runs. Raises EngineMismatchError where it cannot."""
    has_cuda = PROVIDERS["cuda"][0] in ort.get_available_providers()
    if provider == "auto":
        return "cuda" if has_cuda else "cpu"
    if provider not in PROVIDERS:
        raise EngineMismatchError(f'provider must be "auto", "cpu" or "cuda", found {provider!r}')
    if provider == "cuda" and not has_cuda:
        raise EngineMismatchError(
            f"this ONNX Runtime {ort.__version__} has no CUDAExecutionProvider (it has "
            f"{', '.join(ort.get_available_providers())}); run: pip install onnxruntime-gpu, or pass "
            'provider="cpu"'
        )
    return provider


def open_session(
    model_path: Path, threads: int | None, *, dequantize: bool = False, provider: str = "cpu"
) -> ort.InferenceSession:
    """An ONNX Runtime session.

    dequantize: turn quantized weights into float32 when the graph is loaded.
    Raises GraphError if the graph cannot be loaded, EngineMismatchError if the provider cannot start.
    """
    if threads is not None and threads < 1:
        raise EngineMismatchError(f"threads must be at least 1, found {threads}")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if dequantize:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = ort.InferenceSession(str(model_path), options, providers=PROVIDERS[provider])
    except Exception as error:  # ONNX Runtime raises a class of its own for each status
        raise GraphError(
            f"ONNX Runtime {ort.__version__} cannot load {model_path} "
            f"(1.26 and newer are known to run this graph): {error}"
        ) from error
    if session.get_providers()[0] != PROVIDERS[provider][0]:  # it goes on without CUDA and only logs so
        raise EngineMismatchError(
            f"ONNX Runtime has {PROVIDERS[provider][0]} and cannot start it here (its log says why); install "
            'the CUDA libraries it names, or pass provider="cpu"'
        )
    return session


def _signature(session: ort.InferenceSession) -> tuple[list[ort.NodeArg], list[ort.NodeArg]]:
    return session.get_inputs(), session.get_outputs()


def _ring_shapes(contract: GraphContract) -> list[tuple[int, ...]]:
    """[max_batch_size, K, R, D] of each ring."""
    return [(contract.max_batch_size, *(int(size) for size in s.shape[1:])) for s in contract.past()]
