"""An ONNX folder → its layers as graphs of their own, to be fed what another model's layers were fed.

A layer's graph is the one that validation follows (validate/layerwise/segments.py). Its twin computes in
float32 with the same codes, and with the numbers of which the artifact holds the float16 roundings: without
that, roundings of 2**-11 flip the codes of activations, which is most of what there would be to see.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from quantization_reading import EXACT
from torch import Tensor

from mistral_trt.manifest import GRAPH_NAME, read_manifest
from mistral_trt.validate.layerwise.segments import cut_layer, read_graph
from mistral_trt.validate.linked_weights import map_weights

NARROW, WIDE = ir.DataType.FLOAT16, ir.DataType.FLOAT

Candidates = Mapping[str, Sequence[np.ndarray]]
"""Initializer → the float32 values it may be the rounding of."""


@dataclass(frozen=True)
class LayerGraph:
    """One layer.  inputs: hidden, position_ids, key ring, value ring."""

    model: ir.Model
    index: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the rings: what the graph computes in."""
        dtype = self.model.graph.inputs[2].dtype
        assert dtype is not None
        return dtype.numpy()

    @property
    def ring_shape(self) -> tuple[int, ...]:
        """K, R, D."""
        shape = self.model.graph.inputs[2].shape
        assert shape is not None
        return tuple(int(size) for size in shape[1:])  # type: ignore[arg-type]

    def update(self, hidden: np.ndarray) -> np.ndarray:
        """Output minus input of the layer over one chunk from position 0, the rings zeroed.

        hidden: float32 [1, S, hidden_size].  What enters and what leaves are rounded to the dtype of the
        rings, as between two layers.  Returns float32 of the same shape.
        """
        entered = hidden.astype(self.dtype).astype(np.float32)
        update: np.ndarray = self.run(entered)[0].astype(self.dtype).astype(np.float32) - entered
        return update

    def run(self, hidden: np.ndarray, more: Sequence[np.ndarray] = ()) -> list[np.ndarray]:
        """Every output of the graph for the same.  more: for the inputs after the rings."""
        ring = np.zeros((1, *self.ring_shape), self.dtype)
        arrays = (hidden, np.arange(hidden.shape[1])[None], ring, ring, *more)
        names = [str(value.name) for value in self.model.graph.inputs]
        outputs: list[np.ndarray] = self._session().run(None, dict(zip(names, arrays, strict=True)))
        return outputs

    def _session(self) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(*EXACT)
        data = ir.to_proto(self.model).SerializeToString()
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def read_layer(artifact: Path, index: int) -> LayerGraph:
    """Layer `index` of an ONNX folder, as validation cuts it out; of its outputs the hidden state alone."""
    contract = read_manifest(artifact, "onnx", check_files=False).contract
    model = map_weights(cut_layer(read_graph(artifact, contract), index).model)
    del model.graph.outputs[1:]
    return LayerGraph(model, index)


def float32_twin(
    layer: LayerGraph, constants: Candidates, *, scaled: Mapping[str, float] | None = None
) -> LayerGraph:
    """The same layer with every float16 tensor widened to float32; codes stay codes.

    constants: where an initializer is the rounding of one of these, that takes its place.  scaled:
    initializers that are multiplied by a factor, for a mutation.
    """
    model = layer.model.clone()
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        factor = (scaled or {}).get(name, 1.0)
        if value.dtype == NARROW or factor != 1.0:
            stored = value.const_value.numpy()
            exact = unrounded(stored, constants.get(name, ()))
            numbers = (stored if exact is None else exact).astype(np.float32) * np.float32(factor)
            value.const_value = ir.tensor(numbers, name=name)
    for node in model.graph:
        for attribute in list(node.attributes.values()):
            if attribute.name in ("to", "dtype") and attribute.value == NARROW:
                node.attributes[attribute.name] = ir.AttrInt64(attribute.name, WIDE)
        for value in node.outputs:
            _widen(value)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        _widen(value)
    return LayerGraph(model, layer.index)


def unrounded(stored: np.ndarray, candidates: Sequence[np.ndarray]) -> np.ndarray | None:
    """The first candidate that `stored` is a rounding of, within a unit of the last place; None if none is.

    float16 1.0 is the rounding of 1.0004, not of 1.01.
    """
    limits = np.finfo(stored.dtype)
    for candidate in candidates:
        exact = candidate.astype(np.float32).reshape(stored.shape)
        ulp = np.maximum(np.abs(exact) * float(limits.eps), float(limits.smallest_subnormal))
        if (np.abs(stored.astype(np.float64) - exact) <= ulp).all():
            return exact
    return None


def constants_off(layer: LayerGraph, constants: Candidates) -> list[str]:
    """Norms and scales of a layer that are the rounding of no candidate, by name."""
    stored = {
        name: value.const_value.numpy()
        for name, value in layer.model.graph.initializers.items()
        if name in constants and value.const_value is not None
    }
    return [name for name, array in stored.items() if unrounded(array, constants[name]) is None]


def _widen(value: ir.Value) -> None:
    if value.dtype == NARROW:
        value.type = ir.TensorType(WIDE)


def artifact_codes(artifact: Path, linears: list[str]) -> dict[str, np.ndarray]:
    """Codes of the quantized linears: int8 [out, in], E4M3 as its bits."""
    initializers = ir.load(artifact / GRAPH_NAME).graph.initializers
    found = {}
    for name in linears:
        codes = initializers[f"{name}.weight"].const_value.numpy().T  # type: ignore[union-attr]
        eight_bits = codes.dtype.itemsize == 1 and codes.dtype.name.startswith("float8")
        found[name] = np.ascontiguousarray(codes).view(np.int8) if eight_bits else codes.astype(np.int8)
    return found


def relative_rms(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference over that of the expected.  [1.1, 0], [1, 0] -> 0.1"""
    difference = found.astype(np.float64) - expected
    return float(np.sqrt(np.mean(difference**2) / np.mean(expected.astype(np.float64) ** 2)))


def update_error(layer: LayerGraph, entered: Tensor, left: Tensor) -> float:
    """Relative RMS error of a layer's update against that of a torch layer.  [1, S, hidden_size] each."""
    return relative_rms(layer.update(entered.numpy()), (left - entered).numpy())
