"""An ONNX folder's graph → its embedding, each decoder layer and its head as graphs of their own.

A segment is cut out of the artifact's graph: it holds the artifact's nodes and refers to the artifact's
weights. Rotary angles, mask and slots, which the whole graph computes once, each layer computes for itself,
by the same nodes.

What crosses a segment's edge is float32. ONNX Runtime has few float16 kernels for a CPU: sums and products
of a float16 graph are computed in float32 and handed on in float32, rounded only where a float16 kernel
reads them. To be handed over as it would be within the whole graph, a value goes through a Sum of it alone,
for which there is no float16 kernel either. The segments together then give the whole graph's logits to the
last bit, watched or not; and an activation past float16's range shows as the number it would have been.

B rows   S tokens of a step   N of them with logits   K key/value heads   R slots   D head_dim
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as passes

from mistral_trt.contract import GraphContract
from mistral_trt.errors import GraphError
from mistral_trt.manifest import GRAPH_NAME
from mistral_trt.validate.twin import load_model, widen

_NORM = "RMSNormalization"
_FINAL_NORM = f"model.norm/{_NORM}"
_LINEAR = ()
_ACTIVATIONS = {
    "input_layernorm": (f".input_layernorm/{_NORM}",),
    "self_attn.q_proj": _LINEAR,
    "self_attn.k_proj": _LINEAR,
    "self_attn.v_proj": _LINEAR,
    "self_attn": (".self_attn/Attention",),
    "self_attn.o_proj": _LINEAR,
    "post_attention_layernorm": (f".post_attention_layernorm/{_NORM}",),
    "mlp.gate_proj": _LINEAR,
    "mlp.up_proj": _LINEAR,
    "mlp.product": (".mlp/Mul_1",),
    "mlp.down_proj": _LINEAR,
    "residual": ("/Add", "/Add_1"),
}
"""Activation of a layer → how the names of the nodes that make it end."""


@dataclass(frozen=True)
class Segment:
    """A part of an artifact's graph.  Values keep the names that they have there; floats are float32 but for
    the rings.

    inputs, outputs: in the order of the function that made it.  watched: activation → the outputs that are
    of its kind, which the graph has beside `outputs` where they are not among them.
    """

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    watched: Mapping[str, tuple[str, ...]]


def read_graph(folder: Path, contract: GraphContract) -> ir.Model:
    """The graph of an ONNX folder, its weights left in their files.

    bfloat16, which ONNX Runtime cannot compute on a CPU, is widened to float32, each weight when it is read.
    Raises GraphError for a file that is no ONNX model.
    """
    model = load_model(folder / GRAPH_NAME)
    return widen(model) if contract.precision == "bf16" else model


def cut_embedding(model: ir.Model) -> Segment:
    """input_ids int64 [B, S] → what enters layer 0, [B, S, hidden_size]."""
    return _cut(model, ["input_ids"], [_entering(model, 0)], {})


def cut_layer(model: ir.Model, index: int, *, watch: bool = False) -> Segment:
    """hidden [B, S, hidden_size], position_ids int64 [B, S], key and value ring [B, K, R, D]
    → hidden, key and value ring.  watch: whether its activations are outputs too."""
    rings = [f"{index}.key", f"{index}.value"]
    inputs = [_entering(model, index), "position_ids", *(f"past_key_values.{ring}" for ring in rings)]
    outputs = [_leaving(model, index), *(f"present.{ring}" for ring in rings)]
    return _cut(model, inputs, outputs, _layer_activations(model, index) if watch else {})


def cut_head(model: ir.Model) -> Segment:
    """hidden [B, S, hidden_size], logits_index int64 [B, N] → logits [B, N, V]."""
    return _cut(model, [_read_by(model, _FINAL_NORM), "logits_index"], ["logits"], {})


def cut_out_layer(model: ir.Model, index: int) -> ir.Model:
    """The graph with this decoder layer alone between embedding and head, in place; it is layer 0 then."""
    graph = model.graph
    values = ir.convenience.create_value_mapping(graph)
    _replace_uses(values[_entering(model, index)], values[_entering(model, 0)], f"model.layers.{index}")
    _replace_uses(values[_read_by(model, _FINAL_NORM)], values[_leaving(model, index)], "model.norm")
    kept = ("input_ids", "position_ids", "logits_index", "logits")
    own = {f"{end}.{index}.{kind}" for end in ("past_key_values", "present") for kind in ("key", "value")}
    for ends in (graph.inputs, graph.outputs):
        ends[:] = [value for value in ends if value.name in own or value.name in kept]
        for value in ends:
            if value.name in own:
                value.name = str(value.name).replace(f".{index}.", ".0.")
    return passes.RemoveUnusedNodesPass()(model).model


def _cut(
    model: ir.Model, inputs: Sequence[str], outputs: Sequence[str], watched: Mapping[str, tuple[str, ...]]
) -> Segment:
    more = {name for names in watched.values() for name in names} - set(outputs)
    try:
        graph = ir.convenience.extract(model.graph, inputs, [*outputs, *sorted(more)])
    except ValueError as error:
        raise _unlike(str(error)) from error
    rings = [name for name in (*inputs, *outputs) if name.startswith(("past_key_values.", "present."))]
    embedded = _entering(model, 0)  # by a Gather, which has a float16 kernel
    for i, value in enumerate(graph.inputs):
        if value.dtype == ir.DataType.FLOAT16 and value.name not in rings:
            graph.inputs[i] = _widened_input(graph, value, summed=value.name != embedded)
    for i, value in enumerate(graph.outputs):
        if value.dtype == ir.DataType.FLOAT16 and value.name not in rings:
            graph.outputs[i] = _widened_output(graph, value)
    cut = ir.Model(graph, ir_version=model.ir_version)
    return Segment(cut, tuple(inputs), tuple(outputs), dict(watched))


def _widened_input(graph: ir.Graph, value: ir.Value, *, summed: bool) -> ir.Value:
    """A float32 input in the place of a float16 one."""
    wide = ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
    value.name = f"{wide.name}.float16"
    nodes = [_node_after(wide, "Cast", f"{wide.name}.narrow", ir.DataType.FLOAT16)]
    if summed:
        nodes.append(_node_after(nodes[0].outputs[0], "Sum", f"{wide.name}.sum", ir.DataType.FLOAT16))
    for node, place in list(value.uses()):
        node.replace_input_with(place, nodes[-1].outputs[0])
    graph.insert_before(graph[0], nodes)
    return wide


def _widened_output(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """A float32 output in the place of a float16 one."""
    name = str(value.name)
    value.name = f"{name}.float16"
    alone = _node_after(value, "Sum", f"{name}.sum", ir.DataType.FLOAT16)
    wide = _node_after(alone.outputs[0], "Cast", name, ir.DataType.FLOAT)
    graph.extend([alone, wide])
    return wide.outputs[0]


def _node_after(value: ir.Value, operator: str, name: str, dtype: ir.DataType) -> ir.Node:
    """A node that makes `name`, of this dtype, of a value."""
    attributes = {"to": int(dtype)} if operator == "Cast" else {}
    node = ir.node(operator, [value], attributes, name=f"{name}/{operator}")
    made = node.outputs[0]
    made.name, made.shape, made.type = name, value.shape, ir.TensorType(dtype)
    return node


def _layer_activations(model: ir.Model, index: int) -> dict[str, tuple[str, ...]]:
    layer = f"model.layers.{index}"
    return {
        name: tuple(_made_by_node(model, layer + end) for end in ends)
        if ends
        else (_made_by(model, f"{layer}.{name}"),)
        for name, ends in _ACTIVATIONS.items()
    }


def _entering(model: ir.Model, index: int) -> str:
    return _read_by(model, f"model.layers.{index}.input_layernorm/{_NORM}")


def _leaving(model: ir.Model, index: int) -> str:
    following = f"model.layers.{index + 1}.input_layernorm/{_NORM}"
    last = all(node.name != following for node in model.graph)
    return _read_by(model, _FINAL_NORM if last else following)


def _made_by(model: ir.Model, linear: str) -> str:
    """What leaves a linear: in a float32 island that is the float16 it is cast to."""
    cast = f"{linear}.output/Cast"
    quantized = any(node.name == cast for node in model.graph)
    return _made_by_node(model, cast if quantized else f"{linear}/MatMul")


def _made_by_node(model: ir.Model, name: str) -> str:
    return str(_node(model, name).outputs[0].name)


def _read_by(model: ir.Model, name: str) -> str:
    value = _node(model, name).inputs[0]
    assert value is not None
    return str(value.name)


def _node(model: ir.Model, name: str) -> ir.Node:
    for node in model.graph:
        if node.name == name:
            return node
    raise _unlike(f"it has no node {name}")


def _unlike(found: str) -> GraphError:
    return GraphError(
        f"the graph cannot be cut into its layers: {found}; export the checkpoint again with this version"
    )


def _replace_uses(old: ir.Value, new: ir.Value, module: str) -> None:
    """Let the nodes of a module, and of those below it, read another value."""
    for node, place in list(old.uses()):
        if str(node.name).startswith((f"{module}.", f"{module}/")):
            node.replace_input_with(place, new)
