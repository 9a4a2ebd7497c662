"""A segment + the folder its weights lie in → an ONNX Runtime session that computes it.

ONNX Runtime maps the weights from the artifact's own files. What is widened has no file: it is held in
memory and lent to the session.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from mistral_trt.errors import GraphError
from mistral_trt.validate.layerwise.segments import Segment
from mistral_trt.validate.layerwise.steps import Array


class LoadedSegment:
    """One session.  threads: of ONNX Runtime, None for its own choice.

    Weights that are quantized are dequantized once, as the runtime does with `exact=True`: what is computed
    is what the graph says. Raises GraphError if ONNX Runtime cannot load the graph.
    """

    def __init__(self, segment: Segment, folder: Path, *, threads: int | None) -> None:
        self.segment = segment
        self._lent = _lend(segment.model)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder.resolve())
        )
        options.add_external_initializers(list(self._lent), list(self._lent.values()))
        if threads is not None:
            options.intra_op_num_threads = threads
        graph = ir.to_proto(segment.model).SerializeToString()
        try:
            self._session: Any = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a class of its own for each status
            raise GraphError(
                f"ONNX Runtime {ort.__version__} cannot load a part of {folder}: {error}; "
                "export the checkpoint again"
            ) from error

    def run(
        self, inputs: Sequence[Array], outputs: Sequence[Array], watched: Sequence[str] = ()
    ) -> Mapping[str, Array]:
        """Compute into `outputs`, which may share memory with inputs as a ring does; both in the order of
        the segment's, contiguous.  Returns the values of `watched`, by name."""
        binding = self._session.io_binding()
        for name, array in zip(self.segment.inputs, inputs, strict=True):
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in zip(self.segment.outputs, outputs, strict=True):
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name in watched:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        found = binding.get_outputs()[len(outputs) :]
        return {name: value.numpy() for name, value in zip(watched, found, strict=True)}


def _lend(model: ir.Model) -> dict[str, ort.OrtValue]:
    """Initializers that lie in no file, in memory; the graph names a file that is never opened."""
    lent = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.LazyTensor):
            lent[name] = ort.OrtValue.ortvalue_from_numpy(np.asarray(tensor.numpy(), order="C"))
            value.const_value = ir.ExternalTensor(
                "memory",
                0,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
                base_dir="",
            )
    return lent
