"""`model.onnx` → which numbers each linear and norm of the decoder computes with, read where they lie.

Modules are found by the names that the export gives its nodes (`model.layers.0.mlp.up_proj/MatMul`), tensors
by following what such a node reads. Weights are mapped, not loaded: a linear is in memory only while it is
looked at.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import NodeProto, TensorProto, numpy_helper

from mistral_trt.engines.network.graph_file import load_graph
from mistral_trt.errors import ValidationError
from mistral_trt.manifest import GRAPH_NAME

DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.INT8: "int8",
    TensorProto.INT4: "int4",
    TensorProto.FLOAT8E4M3FN: "float8_e4m3fn",
}
FLOATS = ("float32", "float16", "bfloat16")
CODES = ("int8", "int4", "float8_e4m3fn")


@dataclass(frozen=True)
class GraphLinear:
    """The initializers that one linear computes with, by name.

    scale: what its codes are multiplied by, None where the weight is float; then weight is [out, in], else
    [in, out].  input_scale, pre_quant_scale: of what it reads, None where there is none.
    reads: the node that makes what it reads, before any of these.
    """

    weight: str
    scale: str | None
    input_scale: str | None
    pre_quant_scale: str | None
    reads: str

    @property
    def initializers(self) -> list[str]:
        found = (self.weight, self.scale, self.input_scale, self.pre_quant_scale)
        return [name for name in found if name is not None]


class WeightGraph:
    """The nodes and initializers of an ONNX folder's graph."""

    def __init__(self, folder: Path) -> None:
        """Raises ManifestError for a file that is no ONNX model."""
        self.folder = folder
        self.graph = load_graph(folder / GRAPH_NAME)
        self.initializers: dict[str, TensorProto] = {tensor.name: tensor for tensor in self.graph.initializer}

    @cached_property
    def nodes(self) -> Mapping[str, NodeProto]:
        return {node.name: node for node in self.graph.node}

    @cached_property
    def makers(self) -> Mapping[str, NodeProto]:
        """Value → the node that makes it."""
        return {value: node for node in self.graph.node for value in node.output}

    def node(self, name: str) -> NodeProto:
        """Raises ValidationError if there is none of that name."""
        if name not in self.nodes:
            raise ValidationError(f"the graph has no node {name}")
        return self.nodes[name]

    def tensor(self, name: str) -> TensorProto:
        """An initializer, without its bytes. Raises ValidationError if there is none of that name."""
        if name not in self.initializers:
            raise ValidationError(f"the graph has no initializer {name}")
        return self.initializers[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensor(name).dims)

    def dtype(self, name: str) -> str:
        """ONNX's dtype in torch's words; one that no weight has as ONNX calls it."""
        kind = int(self.tensor(name).data_type)
        return DTYPES[kind] if kind in DTYPES else str(TensorProto.DataType.Name(kind)).lower()

    def reads(self, node: NodeProto, place: int) -> str:
        """The value that a node has as an input. Raises ValidationError if it has none there."""
        if place >= len(node.input) or not node.input[place]:
            raise ValidationError(f"{node.name} has no input {place}")
        return str(node.input[place])

    def external(self, name: str) -> bool:
        return bool(self.tensor(name).data_location == TensorProto.EXTERNAL)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of an initializer, in order. Raises ValidationError if its file does not hold them."""
        tensor = self.tensor(name)
        if not self.external(name):
            return np.frombuffer(numpy_helper.to_array(tensor).tobytes(), np.uint8)
        place = {entry.key: entry.value for entry in tensor.external_data}
        expected = -(-prod(tensor.dims) * _bits(self.dtype(name)) // 8)
        path, offset = self.folder / place.get("location", ""), int(place.get("offset", 0))
        length, present = int(place.get("length", expected)), path.stat().st_size if path.is_file() else 0
        if length != expected or present < offset + length:
            raise ValidationError(
                f"{name}: expected {expected} bytes in {path.name}, found {length} from byte {offset} of "
                f"{present}; export the checkpoint again"
            )
        return np.memmap(path, np.uint8, "r", offset, (length,))

    def numbers(self, name: str) -> torch.Tensor:
        """A whole initializer in memory, in its own dtype and shape; INT4 as int8.

        Of constants inside the model file, what is neither float nor int64 comes as float32.
        Raises ValidationError for a dtype that no weight has, and as `raw` does.
        """
        dtype, shape = self.dtype(name), self.shape(name)
        if not self.external(name) and dtype not in FLOATS:
            array = numpy_helper.to_array(self.tensor(name))
            return torch.from_numpy(array.astype(np.int64 if dtype == "int64" else np.float32))
        if dtype not in (*FLOATS, *CODES, "int64"):
            raise ValidationError(f"{name} is {dtype}, which no weight and no scale is")
        data = np.array(self.raw(name))
        if dtype == "int4":
            return torch.from_numpy(nibbles(data, prod(shape))).view(shape)
        return torch.from_numpy(data).view(getattr(torch, dtype)).view(shape)

    def linear(self, module: str) -> GraphLinear:
        """What the MatMul of a module computes with. Raises ValidationError for a form that is not known."""
        node = self.node(f"{module}/MatMul")
        maker = self.makers.get(self.reads(node, 1))
        input_scale, pre_quant_scale, reads = self._input(self.reads(node, 0))
        if maker is not None and maker.op_type == "Transpose" and attribute(maker, "perm") == [1, 0]:
            return GraphLinear(maker.input[0], None, input_scale, pre_quant_scale, reads)
        if maker is not None and maker.op_type == "DequantizeLinear":
            self._require_zero_point(maker)
            self._require_axis(maker)
            return GraphLinear(
                self.reads(maker, 0), self.reads(maker, 1), input_scale, pre_quant_scale, reads
            )
        found = "nothing" if maker is None else f"{maker.op_type} ({maker.name})"
        raise ValidationError(f"multiplies with {found}; expected a transposed or a dequantized weight")

    def _input(self, value: str) -> tuple[str | None, str | None, str]:
        """input_scale, pre_quant_scale and the node before both."""
        input_scale = pre_quant_scale = None
        while (maker := self.makers.get(value)) is not None:
            if maker.op_type in ("DequantizeLinear", "QuantizeLinear"):
                self._require_zero_point(maker)
                scale = self.reads(maker, 1)
                if input_scale not in (None, scale):
                    raise ValidationError(f"its input is quantized with {scale}, then {input_scale}")
                input_scale = scale
            elif maker.op_type == "Mul" and self.reads(maker, 1) in self.initializers:
                pre_quant_scale = maker.input[1]
            elif maker.op_type != "Cast":
                break
            value = self.reads(maker, 0)
        return input_scale, pre_quant_scale, "" if maker is None else maker.name

    def _require_zero_point(self, node: NodeProto) -> None:
        zero = node.input[2] if len(node.input) > 2 else ""
        if zero and bool(self.numbers(zero).float().any()):
            raise ValidationError(f"{node.name} has a zero point that is not 0")

    def _require_axis(self, node: NodeProto) -> None:
        """Channels are the last axis of [in, out], blocks lie along the first."""
        codes, scale = self.shape(self.reads(node, 0)), self.shape(self.reads(node, 1))
        if len(codes) != 2 or len(scale) > 2 or 0 in (*codes, *scale):
            raise ValidationError(
                f"{node.name} dequantizes {list(codes)} by {list(scale)}; expected a matrix"
            )
        expected = {0: None, 1: 1, 2: 0}[len(scale)]
        found, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
        blocks = codes[0] // scale[0] if len(scale) == 2 else 0
        if (expected is not None and found != expected) or block != blocks:
            raise ValidationError(
                f"{node.name} dequantizes along axis {found} in blocks of {block}; a scale of {list(scale)} "
                f"means axis {expected} in blocks of {blocks}"
            )


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value."""
    for found in node.attribute:
        if found.name == name:
            return onnx.helper.get_attribute_value(found)
    return default


def nibbles(data: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.int8]:
    """ONNX's INT4, two to a byte, the first one low → int8.  0xE1 -> 1 -2"""
    fields = np.stack([data << 4, data & 0xF0], axis=-1).view(np.int8)
    return (fields >> 4).reshape(-1)[:count]


def _bits(dtype: str) -> int:
    return {"float32": 32, "int64": 64, "float16": 16, "bfloat16": 16, "int4": 4}.get(dtype, 8)
