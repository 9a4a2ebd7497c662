"""Graph contract → ONNX decode graph without weights.

The decoder is traced on the meta device, so a full-size graph costs megabytes, and in two layers, the second
of which is then repeated. What the exporter leaves behind (stack traces, machine paths, shape arithmetic) is
cleaned away, nodes and what they make are named after their module, and the result is checked against the
contract before anyone binds weights to it.
"""

import ast
import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import optimizer

from mistral_trt.contract import GraphContract, TensorSpec
from mistral_trt.errors import ExportError
from mistral_trt.export.checkpoint import EMBEDDING, LM_HEAD, expected_shapes
from mistral_trt.export.decoder import ONNX_OPSET, Decoder
from mistral_trt.export.unroll import TRACED_LAYERS, unroll

_FOLD_LIMIT_ELEMENTS = 1 << 16
_SCOPES = "pkg.torch.onnx.name_scopes"


def build_graph(contract: GraphContract) -> ir.Model:
    """The decode graph; its weight initializers carry name, dtype and shape, and no values.

    Raises ExportError if inputs, outputs or operators differ from the contract.
    """
    layers = contract.config.num_hidden_layers
    traced = replace(contract.config, num_hidden_layers=min(layers, TRACED_LAYERS))
    model = trace_layers(replace(contract, config=traced))
    if layers > TRACED_LAYERS:
        unroll(model, layers)
    sort_initializers(model, contract)
    check_graph(model, contract)
    return model


def trace_layers(contract: GraphContract) -> ir.Model:
    """The decode graph with every layer of the contract traced."""
    model = trace(contract)
    weights = detach_weights(model, contract)
    simplify(model)
    name_nodes(model)
    clean(model)
    model.graph.initializers.update(weights)
    name_values(model, weights)
    return model


def trace(contract: GraphContract) -> ir.Model:
    """Run torch's exporter over the decoder on the meta device."""
    batch, tokens, logits = (torch.export.Dim(letter, min=1, max=2**20) for letter in "BSN")
    sizes = {"B": 2, "S": 3, "N": 2}
    with torch.device("meta"):
        decoder = Decoder(contract).eval()
        example = [
            torch.empty(_static(spec, sizes), dtype=getattr(torch, spec.dtype)) for spec in contract.inputs()
        ]
    rings = tuple({0: batch} for _ in contract.past())
    with warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")  # the exporter's own deprecations; the graph is checked below
        program = torch.onnx.export(
            decoder,
            tuple(example),
            dynamo=True,
            opset_version=ONNX_OPSET,
            optimize=False,
            verbose=False,
            dynamic_shapes=(
                {0: batch, 1: tokens},
                {0: batch, 1: tokens},
                {0: batch, 1: logits},
                rings,
            ),
            input_names=[spec.name for spec in contract.inputs()],
            output_names=[spec.name for spec in contract.outputs()],
        )
    if program is None:
        raise ExportError("torch.onnx.export returned no program")
    return program.model


def detach_weights(model: ir.Model, contract: GraphContract) -> dict[str, ir.Value]:
    """Take the weights' values out, so that no pass looks for numbers on the meta device.

    Tied embeddings become one initializer under the embedding's name; the exporter picks the head's.
    """
    graph = model.graph
    if contract.config.tie_word_embeddings and LM_HEAD in graph.initializers:
        tied = graph.initializers.pop(LM_HEAD)
        tied.name = EMBEDDING
        graph.initializers[EMBEDDING] = tied
    weights = {}
    for name, value in list(graph.initializers.items()):
        value.const_value = None
        weights[name] = value
    return weights


def name_nodes(model: ir.Model) -> None:
    """Name each node after its module: `model.layers.3.self_attn.q_proj/MatMul`, `…/MatMul_1`."""
    seen: Counter[str] = Counter()
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "['']"))
        module = scopes[-2] if len(scopes) > 1 else ""
        stem = f"{module}/{node.op_type}" if module else node.op_type
        node.name = stem if not seen[stem] else f"{stem}_{seen[stem]}"
        seen[stem] += 1


def name_values(model: ir.Model, weights: Iterable[str]) -> None:
    """Name what a node makes after the node, and constants in the order of their use: names that do not
    depend on how many layers were traced."""
    graph = model.graph
    for node in graph:
        for i, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"{node.name}.{i}" if i else node.name
    used = [value for node in graph for value in node.inputs if value is not None and value.is_initializer()]
    constants = [value for value in dict.fromkeys(used) if value.name not in set(weights)]
    for value in constants:
        del graph.initializers[str(value.name)]
    for i, value in enumerate(constants):
        value.name = f"constant.{i}"
        graph.initializers[value.name] = value


def sort_initializers(model: ir.Model, contract: GraphContract) -> None:
    """Weights first, in the checkpoint's order; then constants."""
    found = model.graph.initializers
    weights = [found.pop(name) for name in expected_shapes(contract.config) if name in found]
    constants = [found.pop(name) for name in list(found)]
    for value in (*weights, *constants):
        found[str(value.name)] = value


def simplify(model: ir.Model) -> None:
    """Fold what does not depend on the inputs; make reshapes keep batch and tokens without arithmetic."""
    with _quiet("onnx_ir"):  # it remarks on every weight that has no value yet
        optimizer.optimize(
            model,
            onnx_shape_inference=False,
            input_size_limit=_FOLD_LIMIT_ELEMENTS,
            output_size_limit=_FOLD_LIMIT_ELEMENTS,
        )
    for node in model.graph:
        if node.op_type == "Reshape":
            _keep_leading_dims(model, node)
    passes.RemoveUnusedNodesPass()(model)


def clean(model: ir.Model) -> None:
    """Drop everything that describes the tracing machine rather than the graph."""
    passes.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    model.graph.name = "mistral_decoder"
    model.producer_name, model.producer_version, model.doc_string = "mistral-trt", None, None


def check_graph(model: ir.Model, contract: GraphContract) -> None:
    """Raise ExportError unless inputs, outputs and operators are exactly the contract's."""
    _check_values("input", model.graph.inputs, contract.inputs())
    _check_values("output", model.graph.outputs, contract.outputs())
    foreign = sorted({node.domain for node in model.graph if node.domain not in ("", "ai.onnx")})
    if foreign:
        raise ExportError(f"graph must hold standard ONNX operators only, found domains {foreign}")
    count = Counter(node.op_type for node in model.graph)
    layers = contract.config.num_hidden_layers
    expected = {"TensorScatter": 2 * layers, "Attention": layers, "RotaryEmbedding": 2 * layers}
    for operator, number in expected.items():
        if count[operator] != number:
            raise ExportError(f"graph must hold {number} {operator} nodes, found {count[operator]}")


def graph_sha256(proto: onnx.ModelProto) -> str:
    """Hash of the graph with external weights reduced to name, dtype and shape.

    Two fine-tunes of one architecture have equal hashes; another rope_theta, epsilon or W differs.
    """
    reduced = onnx.ModelProto()
    reduced.CopyFrom(proto)
    for initializer in reduced.graph.initializer:
        if initializer.data_location == onnx.TensorProto.EXTERNAL:
            del initializer.external_data[:]
    return hashlib.sha256(reduced.SerializeToString(deterministic=True)).hexdigest()


def _static(spec: TensorSpec, sizes: dict[str, int]) -> list[int]:
    return [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]


def _keep_leading_dims(model: ir.Model, node: ir.Node) -> None:
    """Reshape(x, Concat(batch, tokens, constants…)) -> Reshape(x, [0, 0, constants…]) with allowzero=0."""
    shape = node.inputs[1]
    source = shape.producer() if shape is not None else None
    if source is None or source.op_type != "Concat":
        return
    trailing = [value.const_value for value in source.inputs[2:] if value is not None]
    if any(constant is None for constant in trailing):
        raise ExportError(f"{node.name}: expected a reshape that keeps batch and tokens")
    dims = [
        0,
        0,
        *(int(d) for constant in trailing if constant is not None for d in constant.numpy()),
    ]
    name = "shape." + ".".join(map(str, dims))
    if name not in model.graph.initializers:
        constant = ir.Value(name=name, const_value=ir.tensor(dims, dtype=ir.DataType.INT64, name=name))
        constant.type, constant.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(dims)])
        model.graph.initializers[name] = constant
    node.replace_input_with(1, model.graph.initializers[name])
    node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def _check_values(kind: str, values: Sequence[ir.Value], specs: list[TensorSpec]) -> None:
    found = [(v.name, str(v.dtype).lower(), tuple(_dim(d) for d in v.shape or ())) for v in values]
    expected = [(s.name, {"float32": "float"}.get(s.dtype, s.dtype), s.shape) for s in specs]
    for have, want in zip(found, expected, strict=False):
        if have != want:
            raise ExportError(f"graph {kind}: expected {want}, found {have}")
    if len(found) != len(expected):
        raise ExportError(f"graph must have {len(expected)} {kind}s, found {len(found)}")


def _dim(dim: "int | ir.SymbolicDim") -> str | int:
    return dim if isinstance(dim, int) else str(dim.value)


class _quiet:
    """Raise one logger's threshold to ERROR for a while."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)
