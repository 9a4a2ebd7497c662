"""Decode graph of two layers → decode graph of all layers.

Layers differ in their names alone, and tracing costs about half a second for each: so two are traced and the
second is repeated. The tests hold the result against a graph in which every layer was traced.
"""

import re

import onnx_ir as ir

from mistral_trt.errors import ExportError

TRACED_LAYERS = 2

_LAYER = re.compile(r"model\.layers\.(\d+)[./]")
_OF_SECOND = re.compile(r"(?<=^model\.layers\.)1|(?<=^past_key_values\.)1|(?<=^present\.)1")


def unroll(model: ir.Model, layers: int) -> None:
    """Repeat the second layer until the graph has `layers`, in place.

    Every node must be named after its module. Raises ExportError if anything but the hidden state passes
    from the first layer to the second, or from the second to what follows.
    """
    graph = model.graph
    prototype = [node for node in graph if _layer(node) == 1]
    entering = _only({value for node in prototype for value in node.inputs if value and _made_in(value, 0)})
    leaving = _only({value for node in prototype for value in node.outputs if _used_outside(value, 1)})
    following = [node for node in leaving.consumers() if _layer(node) != 1]
    hidden, last = leaving, prototype[-1]
    for layer in range(TRACED_LAYERS, layers):
        values = {entering: hidden}
        nodes = [_repeat(graph, node, layer, values) for node in prototype]
        graph.insert_after(last, nodes)
        hidden, last = values[leaving], nodes[-1]
    for node in following:
        for i, value in enumerate(node.inputs):
            if value is leaving:
                node.replace_input_with(i, hidden)


def _repeat(graph: ir.Graph, node: ir.Node, layer: int, values: dict[ir.Value, ir.Value]) -> ir.Node:
    """A node of the second layer for another.  values: the second layer's values → this one's, so far."""
    inputs = [value and _stand_in(graph, value, layer, values) for value in node.inputs]
    outputs = [_copy(value, layer) for value in node.outputs]
    for old, new in zip(node.outputs, outputs, strict=True):
        values[old] = new
        if old.is_graph_output():
            graph.outputs.append(new)
    attributes = node.attributes.values()
    name = _renamed(node.name, layer)
    return ir.Node(
        node.domain, node.op_type, inputs, attributes, outputs=outputs, version=node.version, name=name
    )


def _stand_in(graph: ir.Graph, value: ir.Value, layer: int, values: dict[ir.Value, ir.Value]) -> ir.Value:
    """What takes a value's place in another layer: itself, where all layers share it."""
    if value in values:
        return values[value]
    if not _OF_SECOND.search(value.name or ""):
        return value
    values[value] = copy = _copy(value, layer)
    if value.is_graph_input():
        graph.inputs.append(copy)
    else:
        graph.initializers[str(copy.name)] = copy
    return copy


def _copy(value: ir.Value, layer: int) -> ir.Value:
    return ir.Value(name=_renamed(value.name, layer), shape=value.shape, type=value.type)


def _renamed(name: str | None, layer: int) -> str:
    return _OF_SECOND.sub(str(layer), name or "")


def _layer(node: ir.Node) -> int | None:
    match = _LAYER.match(node.name or "")
    return int(match[1]) if match else None


def _made_in(value: ir.Value, layer: int) -> bool:
    producer = value.producer()
    return producer is not None and _layer(producer) == layer


def _used_outside(value: ir.Value, layer: int) -> bool:
    return any(_layer(node) != layer for node in value.consumers())


def _only(values: set[ir.Value]) -> ir.Value:
    if len(values) != 1:
        names = sorted(str(value.name) for value in values)
        raise ExportError(f"one value must pass from layer to layer, found {names}")
    return next(iter(values))
