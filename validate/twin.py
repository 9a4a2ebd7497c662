"""bf16 ONNX folder → the same graph over the same weight bytes, widened to float32, in a temporary folder.

ONNX Runtime has no bfloat16 kernels on a CPU. Widening is exact, so the twin shows the artifact's graph and
its rounded weights at work; what it cannot show is the rounding of bfloat16 activations.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mistral_trt.contract import GraphContract
from mistral_trt.errors import GraphError, ValidationError
from mistral_trt.manifest import GRAPH_NAME
from mistral_trt.validate.linked_weights import mapped

NARROW, WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT


@contextmanager
def float32_twin(model_path: Path, contract: GraphContract) -> Iterator[tuple[Path, GraphContract]]:
    """Yield the twin's model file and its contract; the folder is gone afterwards.

    Raises ValidationError if the disk is full, GraphError for a graph that cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="mistral-trt-twin-") as folder:
        path = Path(folder) / GRAPH_NAME
        widened = widen(load_model(model_path))
        try:
            ir.save(widened, path, external_data=f"{GRAPH_NAME}.data")
        except OSError as error:
            raise ValidationError(
                f"the float32 twin of this bf16 artifact cannot be written to {folder}: "
                f"{error.strerror or error}; set TMPDIR to a disk with room for twice the weights"
            ) from error
        yield path, replace(contract, precision="fp32")


def load_model(path: Path) -> ir.Model:
    """A graph, its weights left in their files. Raises GraphError for one that cannot be read whole."""
    try:
        model = ir.load(path)
    except Exception as error:  # of protobuf, onnx and onnx_ir, each its own
        raise GraphError(f"{path} cannot be read as ONNX ({error}); export the checkpoint again") from error
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            _require_stored(tensor)
    return model


def _require_stored(tensor: ir.ExternalTensor) -> None:
    path, end = Path(tensor.path), (tensor.offset or 0) + tensor.nbytes
    found = path.stat().st_size if path.is_file() else 0
    if found < end:
        raise GraphError(
            f"{tensor.name}: expected {end} bytes in {path}, found {found}; export the checkpoint again"
        )


def widen(model: ir.Model) -> ir.Model:
    """Replace bfloat16 by float32 in every type, cast and constant of the graph, in place."""
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.dtype == NARROW:
            value.const_value = _widened(value.const_value)
    for node in model.graph:
        for name, attribute in list(node.attributes.items()):
            node.attributes[name] = _widened_attribute(attribute)
    for value in _values(model):
        if value.dtype == NARROW:
            value.type = ir.TensorType(WIDE)
    return model


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from (*model.graph.inputs, *model.graph.initializers.values())
    for node in model.graph:
        yield from node.outputs


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """The same numbers as float32, read when they are written out, so that one tensor is held at a time."""

    def read() -> ir.TensorProtocol:
        narrow = mapped(tensor) if isinstance(tensor, ir.ExternalTensor) else tensor
        return ir.tensor(narrow.numpy().astype(np.float32), name=tensor.name)

    return ir.LazyTensor(read, WIDE, ir.Shape(tensor.shape.numpy()), name=tensor.name)


def _widened_attribute(attribute: ir.Attr) -> ir.Attr:
    if attribute.name in ("to", "dtype") and attribute.value == NARROW:
        return ir.AttrInt64(attribute.name, WIDE)
    if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == NARROW:
        return ir.AttrTensor(attribute.name, _widened(attribute.value))
    return attribute
