"""ONNX folder + rings in host memory → logits, through ONNX Runtime on the CPU.

Past and present of each layer are bound to one address, so `TensorScatter` writes in place: a step
copies no ring and allocates nothing of a ring's size.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from mistral_trt.contract import GraphContract
from mistral_trt.errors import EngineMismatchError
from mistral_trt.runtime.cache import Logits, RingArray, Step


class OnnxRuntimeBackend:
    """One session and the rings of max_batch_size rows.

    threads: ONNX Runtime's intra-op threads, None for its own choice.  exact: compute what the graph says,
    with weights dequantized once into float32, instead of ONNX Runtime's quantized kernels: those round the
    inputs of int4 and int8-weight-only linears to INT8 as well.  fp8, for which it has none, is always so.
    Raises EngineMismatchError for a graph that ONNX Runtime cannot run here.
    """

    def __init__(
        self, model_path: Path, contract: GraphContract, *, threads: int | None = None, exact: bool = False
    ) -> None:
        if contract.precision == "bf16":
            raise EngineMismatchError(
                "ONNX Runtime has no bfloat16 kernels for the CPU, so a bf16 ONNX folder cannot run here; "
                "build an engine from it, or export with --precision fp16 or fp32 to run on a CPU"
            )
        self.contract = contract
        self._session = open_session(model_path, threads, dequantize=exact or contract.precision == "fp8")
        self._check_names()
        rows, dtype = contract.max_batch_size, np.dtype(contract.cache_dtype)
        self._rings = [np.zeros((rows, *_sizes(spec.shape[1:])), dtype) for spec in contract.past()]
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}

    def run(self, step: Step) -> Logits:
        batch, count = step.logits_index.shape
        binding = self._binding(step.first_row, batch)
        for spec, array in zip(
            self.contract.step_inputs(),
            (step.input_ids, step.position_ids, step.logits_index),
            strict=True,
        ):
            binding.bind_input(spec.name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        logits = np.empty((batch, count, self.contract.config.vocab_size), np.float32)
        name = self.contract.logits().name
        binding.bind_output(name, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)
        return logits

    def read_row(self, row: int) -> tuple[RingArray, ...]:
        return tuple(ring[row].copy() for ring in self._rings)

    def write_row(self, row: int, rings: Sequence[RingArray] | None) -> None:
        for i, ring in enumerate(self._rings):
            ring[row] = 0 if rings is None else rings[i]

    def _binding(self, first_row: int, batch: int) -> ort.IOBinding:
        """The binding for these rows, its rings bound once and kept."""
        key = (first_row, batch)
        if key not in self._bindings:
            binding = self._session.io_binding()
            pairs = zip(self.contract.past(), self.contract.present(), self._rings, strict=True)
            for past, present, ring in pairs:
                rows = ring[first_row : first_row + batch]
                binding.bind_input(past.name, "cpu", 0, ring.dtype, rows.shape, rows.ctypes.data)
                binding.bind_output(present.name, "cpu", 0, ring.dtype, rows.shape, rows.ctypes.data)
            self._bindings[key] = binding
        return self._bindings[key]

    def _check_names(self) -> None:
        found = [[value.name for value in values] for values in _signature(self._session)]
        expected = [[s.name for s in specs] for specs in (self.contract.inputs(), self.contract.outputs())]
        if found != expected:
            raise EngineMismatchError(
                "the graph's inputs and outputs are not the contract's; export the checkpoint again"
            )


def open_session(model_path: Path, threads: int | None, *, dequantize: bool = False) -> ort.InferenceSession:
    """An ONNX Runtime CPU session.

    dequantize: turn quantized weights into float32 when the graph is loaded.
    Raises EngineMismatchError if the graph cannot be loaded.
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
        return ort.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a class of its own for each status
        raise EngineMismatchError(
            f"ONNX Runtime {ort.__version__} cannot load {model_path} "
            f"(1.26 and newer are known to run this graph): {error}"
        ) from error


def _signature(session: ort.InferenceSession) -> tuple[list[ort.NodeArg], list[ort.NodeArg]]:
    return session.get_inputs(), session.get_outputs()


def _sizes(shape: tuple[str | int, ...]) -> tuple[int, ...]:
    return tuple(int(dim) for dim in shape)
