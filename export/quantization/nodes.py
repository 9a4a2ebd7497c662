"""Decode graph with float16 linears → the same graph with Q/DQ nodes around the quantized ones.

Each form is one that TensorRT keeps small and that ONNX Runtime fuses into its kernels, where it has
one. All of them hold the weight as [in, out], symmetric, with constant scales and zero points of 0:

    int8, fp8         QuantizeLinear → DequantizeLinear → MatMul(DequantizeLinear(W)) between Casts to float32
    int8-weight-only  MatMul(DequantizeLinear(W)), a scale for each output channel
    int4              MatMul(DequantizeLinear(W)), a scale for each block of input features

int8 is fused with float32 scales only; in fp8, a scale rounded to float16 would shift every code's grid.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mistral_trt.errors import ExportError
from mistral_trt.export.checkpoint import EMBEDDING
from mistral_trt.export.quantization.placement import Placement
from mistral_trt.export.quantization.scheme import LM_HEAD_MODULE, Scheme
from mistral_trt.export.weights import onnx_dtype


def scale_dtype(scheme: Scheme) -> str:
    """Dtype of the graph's scales, and with it of the MatMul."""
    return "float32" if scheme.activations is not None else "float16"


def scale_shape(scheme: Scheme, shape: tuple[int, int]) -> tuple[int, ...]:
    """Shape of a weight's scale.  shape: [out, in] of the linear."""
    if scheme.block_size is not None:
        return (shape[1] // scheme.block_size, shape[0])
    return () if scheme.weights == "float8_e4m3fn" else (shape[0],)


def quantize_graph(model: ir.Model, scheme: Scheme, placement: Placement) -> None:
    """Replace the linears of the placement in place; new initializers have dtype and shape, and no values.

    Raises ExportError if a linear is not the MatMul of its transposed weight.
    """
    matmuls = {node.name: node for node in model.graph if node.op_type == "MatMul"}
    writer = _Writer(model.graph, scheme)
    for group in placement.groups:
        nodes = [_matmul(matmuls, name) for name in group]
        if len({node.inputs[0] for node in nodes}) > 1:
            raise ExportError(f"{', '.join(group)}: expected linears that read one tensor")
        multiplied = group[0] in placement.multiplied
        shared = writer.shared_input(group[0], nodes[0], multiplied)
        for name, node in zip(group, nodes, strict=True):
            writer.replace(name, node, shared, group.index(name))


def _matmul(matmuls: dict[str | None, ir.Node], name: str) -> ir.Node:
    node = matmuls.get(f"{name}/MatMul")
    transpose = node.inputs[1].producer() if node and node.inputs[1] else None
    if node is None or transpose is None or transpose.op_type != "Transpose" or transpose.inputs[0] is None:
        raise ExportError(f"{name}: expected a MatMul with a transposed weight")
    expected = {f"{name}.weight"} | ({EMBEDDING} if name == LM_HEAD_MODULE else set())
    if transpose.inputs[0].name not in expected:
        raise ExportError(f"{name}: expected {name}.weight, found {transpose.inputs[0].name}")
    return node


class _Writer:
    """Puts nodes into a graph, each before the MatMul it serves."""

    def __init__(self, graph: ir.Graph, scheme: Scheme) -> None:
        self.graph, self.scheme = graph, scheme
        self.dtype = onnx_dtype(scale_dtype(scheme))
        self.codes = onnx_dtype(scheme.weights)

    def shared_input(self, first: str, matmul: ir.Node, multiplied: bool) -> ir.Value:
        """What a group's linears read, multiplied by the pre_quant_scale where that is not folded."""
        value = matmul.inputs[0]
        assert value is not None
        if self.dtype == ir.DataType.FLOAT:
            value = self._node(matmul, "Cast", f"{first}.input/Cast", [value], self.dtype, to=int(self.dtype))
        if multiplied:
            scale = self._initializer(f"{first}.pre_quant_scale", self.dtype, [_weight_shape(matmul)[1]])
            value = self._node(matmul, "Mul", f"{first}.input/Mul", [value, scale], self.dtype)
        return value

    def replace(self, name: str, matmul: ir.Node, shared: ir.Value, place: int) -> None:
        """A linear's MatMul with its dequantized weight and input.  place: of the linear in its group."""
        value = shared if self.scheme.activations is None else self._rounded(name, matmul, shared, place)
        weight = self._dequantized_weight(name, matmul)
        transpose = matmul.inputs[1].producer()  # type: ignore[union-attr]
        matmul.replace_input_with(0, value)
        matmul.replace_input_with(1, weight)
        assert transpose is not None
        self.graph.remove(transpose, safe=True)
        if self.dtype == ir.DataType.FLOAT:
            self._cast_back(name, matmul)

    def _rounded(self, name: str, matmul: ir.Node, value: ir.Value, place: int) -> ir.Value:
        """An input through QuantizeLinear and DequantizeLinear.

        The axis means nothing with one scale. It makes the nodes of a group differ: equal ones ONNX Runtime
        merges, and what several linears read it does not fuse into their integer MatMuls.
        """
        constants = [self._initializer(f"{name}.input_scale", self.dtype, []), self._zero([])]
        for operator, dtype in (("QuantizeLinear", self.codes), ("DequantizeLinear", self.dtype)):
            value = self._node(
                matmul, operator, f"{name}.input/{operator}", [value, *constants], dtype, axis=place
            )
        return value

    def _dequantized_weight(self, name: str, matmul: ir.Node) -> ir.Value:
        out, inside = _weight_shape(matmul)
        weight = self._initializer(f"{name}.weight", self.codes, [inside, out])
        shape = scale_shape(self.scheme, (out, inside))
        scale = self._initializer(f"{name}.weight_scale", self.dtype, list(shape))
        inputs, attributes = [weight, scale], {}
        if self.scheme.activations is not None:
            inputs.append(self._zero(list(shape)))
        if shape:
            attributes["axis"] = 1 if self.scheme.block_size is None else 0
        if self.scheme.block_size is not None:
            attributes["block_size"] = self.scheme.block_size
        return self._node(
            matmul, "DequantizeLinear", f"{name}/DequantizeLinear", inputs, self.dtype, **attributes
        )

    def _cast_back(self, name: str, matmul: ir.Node) -> None:
        """The MatMul's result in float16 again, for everyone who used it."""
        made = matmul.outputs[0]
        uses = list(made.uses())
        cast = ir.node("Cast", [made], {"to": int(ir.DataType.FLOAT16)}, name=f"{name}.output/Cast")
        out = cast.outputs[0]
        out.name, out.shape, out.type = cast.name, made.shape, ir.TensorType(ir.DataType.FLOAT16)
        made.type = ir.TensorType(ir.DataType.FLOAT)
        for node, index in uses:
            node.replace_input_with(index, out)
        self.graph.insert_after(matmul, cast)

    def _node(
        self,
        before: ir.Node,
        operator: str,
        name: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType,
        **attributes: int,
    ) -> ir.Value:
        node = ir.node(operator, inputs, attributes, name=name)
        out = node.outputs[0]
        out.name, out.type = name, ir.TensorType(dtype)
        if operator != "DequantizeLinear" or not inputs[0].is_initializer():  # type: ignore[union-attr]
            out.shape = inputs[0].shape  # type: ignore[union-attr]
        self.graph.insert_before(before, node)
        return out

    def _initializer(self, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.graph.initializers[name] = value
        return value

    def _zero(self, shape: list[int]) -> ir.Value:
        """A zero point of 0; ONNX Runtime fuses only where it is written down."""
        name = "zero_point" + "".join(f".{size}" for size in shape)
        if name not in self.graph.initializers:
            dtype = self.codes.numpy()
            value = self._initializer(name, self.codes, shape)
            value.const_value = ir.tensor(np.zeros(shape, dtype), dtype=self.codes, name=name)
        return self.graph.initializers[name]


def _weight_shape(matmul: ir.Node) -> tuple[int, int]:
    """[out, in] of the float weight behind a MatMul."""
    transpose = matmul.inputs[1].producer() if matmul.inputs[1] else None
    weight = transpose.inputs[0] if transpose else None
    if weight is None or weight.shape is None:
        raise ExportError(f"{matmul.name}: the weight has no shape")
    out, inside = (int(size) for size in weight.shape.numpy())
    return out, inside
