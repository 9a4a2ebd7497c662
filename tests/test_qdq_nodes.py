"""Q/DQ nodes around linears: the form of each precision, what stays as it was, that ONNX Runtime fuses it."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import NodeProto, TensorProto, numpy_helper

from mistral_trt.contract import QUANTIZED, GraphContract, plan_contract
from mistral_trt.errors import ExportError
from mistral_trt.export.checkpoint import EMBEDDING, expected_shapes
from mistral_trt.export.graph import check_graph
from mistral_trt.export.quantization.nodes import quantize_graph
from mistral_trt.export.quantization.placement import Placement, place_stored
from mistral_trt.export.quantization.scheme import KINDS, LM_HEAD_MODULE, linear_names, scheme_for
from tests.conftest import BuiltGraph
from tests.graphs import fill_weights
from tests.models import TINY

ONE_LAYER = replace(TINY, num_hidden_layers=1, vocab_size=259)  # as in test_quantized_export: one trace
TIED = replace(ONE_LAYER, tie_word_embeddings=True)
NAMES = linear_names(ONE_LAYER)
Q, K, V, OUT, GATE, UP, DOWN = NAMES
BLOCK = 32
INT8, INT4, E4M3 = TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


@dataclass(frozen=True)
class Form:
    """What a linear [out, in] of a precision must look like.

    scale_shape: in terms of out and in.
    """

    codes: int
    floats: int
    inputs: int | None
    attributes: dict[str, int]
    scale_shape: tuple[str, ...]


FORMS = {
    "int8": Form(INT8, FLOAT, INT8, {"axis": 1}, ("out",)),
    "int8-weight-only": Form(INT8, HALF, None, {"axis": 1}, ("out",)),
    "int4": Form(INT4, HALF, None, {"axis": 0, "block_size": BLOCK}, ("in / block", "out")),
    "fp8": Form(E4M3, FLOAT, E4M3, {}, ()),
}


class Graph:
    """A graph by names: nodes, what makes a value, initializers."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.nodes = {node.name: node for node in proto.graph.node}
        self.producers = {output: node for node in proto.graph.node for output in node.output}
        self.initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
        assert len(self.nodes) == len(proto.graph.node), "names are unique"

    def count(self) -> Counter[str]:
        return Counter(node.op_type for node in self.nodes.values())

    def input_of(self, node: NodeProto, place: int = 0) -> NodeProto:
        found: NodeProto = self.producers[node.input[place]]
        return found


def attributes(node: NodeProto) -> dict[str, int]:
    return {a.name: a.i for a in node.attribute}


def contract_of(precision: str = "fp16", *, tied: bool = False) -> GraphContract:
    return plan_contract(TIED if tied else ONE_LAYER, precision=precision, prefill_chunk=4)


@pytest.fixture
def float16(built_graph: BuiltGraph) -> ir.Model:
    return built_graph(contract_of())


def quantized(
    model: ir.Model,
    precision: str,
    *,
    kept: Collection[str] = (),
    multiplied: Collection[str] = (),
    lm_head: bool = False,
) -> ir.Model:
    """The graph with Q/DQ nodes, in place."""
    names = linear_names(ONE_LAYER, lm_head=lm_head)
    placement = replace(place_stored(names, kept, layers=1), multiplied=frozenset(multiplied))
    quantize_graph(model, scheme_for(precision, ONE_LAYER), placement)
    return model


def proto_of(model: ir.Model) -> onnx.ModelProto:
    """With random weights, small scales."""
    fill_weights(model)
    return ir.to_proto(model)


# ---------------------------------------------------------------- the forms


@pytest.mark.parametrize("precision", QUANTIZED)
def test_a_weight_is_dequantized_in_the_precisions_form(float16: ir.Model, precision: str) -> None:
    form, graph = FORMS[precision], Graph(proto_of(quantized(float16, precision)))
    for name in NAMES:
        rows, columns = expected_shapes(ONE_LAYER)[f"{name}.weight"]
        matmul = graph.nodes[f"{name}/MatMul"]
        dequantize = graph.input_of(matmul, 1)
        assert (dequantize.op_type, dequantize.name) == ("DequantizeLinear", f"{name}/DequantizeLinear")
        assert attributes(dequantize) == form.attributes
        weight, scale, *zero = (graph.initializers[value] for value in dequantize.input)
        assert (weight.name, weight.data_type, list(weight.dims)) == (
            f"{name}.weight",
            form.codes,
            [columns, rows],
        )
        sizes = {"out": rows, "in / block": columns // BLOCK}
        shape = [sizes[size] for size in form.scale_shape]
        assert (scale.name, scale.data_type, list(scale.dims)) == (
            f"{name}.weight_scale",
            form.floats,
            shape,
        )
        assert len(zero) == (form.inputs is not None)
        check_zero(zero, form.codes, shape)


def check_zero(tensors: list[TensorProto], dtype: int, shape: list[int]) -> None:
    """Zero points are of the codes' dtype and the scale's shape, and 0."""
    for tensor in tensors:
        assert (tensor.data_type, list(tensor.dims)) == (dtype, shape)
        assert not numpy_helper.to_array(tensor).astype(np.float32).any()


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_an_input_goes_through_codes_of_its_own(float16: ir.Model, precision: str) -> None:
    """Each linear has its Q/DQ pair, and within a group the pairs differ, or ONNX Runtime merges them."""
    form, graph = FORMS[precision], Graph(proto_of(quantized(float16, precision)))
    places = {}
    for name in NAMES:
        dequantize = graph.input_of(graph.nodes[f"{name}/MatMul"])
        quantize = graph.input_of(dequantize)
        assert (quantize.op_type, dequantize.op_type) == ("QuantizeLinear", "DequantizeLinear")
        assert quantize.input[1:] == dequantize.input[1:] and attributes(quantize) == attributes(dequantize)
        scale, zero = (graph.initializers[value] for value in quantize.input[1:])
        assert (scale.name, scale.data_type, list(scale.dims)) == (f"{name}.input_scale", form.floats, [])
        check_zero([zero], form.codes, [])
        places[name] = (quantize.input[0], tuple(attributes(quantize).items()))
    assert len(set(places.values())) == len(NAMES)
    assert len({source for source, _ in places.values()}) == 4, "what a group reads is shared"


@pytest.mark.parametrize("precision", ["int8-weight-only", "int4"])
def test_an_input_that_is_not_quantized_stays_what_it_was(float16: ir.Model, precision: str) -> None:
    before = Graph(proto_of(float16.clone()))
    graph = Graph(proto_of(quantized(float16, precision)))
    for name in NAMES:
        matmul = f"{name}/MatMul"
        assert graph.nodes[matmul].input[0] == before.nodes[matmul].input[0]
    assert graph.count()["QuantizeLinear"] == graph.count()["Cast"] - before.count()["Cast"] == 0


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_linear_with_codes_of_its_input_is_an_island_of_float32(float16: ir.Model, precision: str) -> None:
    before = Graph(proto_of(float16.clone()))
    graph = Graph(proto_of(quantized(float16, precision)))
    assert graph.count()["Cast"] == before.count()["Cast"] + 4 + 7, "one in for a group, one out for a linear"
    for name in NAMES:
        matmul = graph.nodes[f"{name}/MatMul"]
        cast = graph.input_of(graph.input_of(graph.input_of(matmul)))
        assert (cast.op_type, attributes(cast)) == ("Cast", {"to": FLOAT})
        assert cast.input[0] == before.nodes[matmul.name].input[0]
        readers = [node for node in graph.nodes.values() if matmul.output[0] in node.input]
        assert [(node.op_type, attributes(node)) for node in readers] == [("Cast", {"to": HALF})]


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("group", [(OUT,), (Q, K, V), (GATE, UP)])
def test_a_scale_that_is_not_folded_is_one_mul_for_the_group(
    float16: ir.Model, precision: str, group: tuple[str, ...]
) -> None:
    before = Graph(proto_of(float16.clone()))
    graph = Graph(proto_of(quantized(float16, precision, multiplied={group[0]})))
    assert graph.count()["Mul"] == before.count()["Mul"] + 1
    mul = graph.nodes[f"{group[0]}.input/Mul"]
    scale = graph.initializers[mul.input[1]]
    columns = expected_shapes(ONE_LAYER)[f"{group[0]}.weight"][1]
    assert (scale.name, list(scale.dims)) == (f"{group[0]}.pre_quant_scale", [columns])
    assert scale.data_type == FORMS[precision].floats
    for name in NAMES:
        source = graph.producers[graph.nodes[f"{name}/MatMul"].input[0]]
        if precision == "int8":
            source = graph.input_of(graph.input_of(source))
        assert (source.name == mul.name) == (name in group)


# ---------------------------------------------------------------- what stays


def rest(model: onnx.ModelProto, touched: Collection[str]) -> Iterator[bytes]:
    """Nodes that belong to none of these linears; the casts behind them are looked through."""
    renamed = {f"{name}.output/Cast": f"{name}/MatMul" for name in touched}
    for node in model.graph.node:
        if not node.name.replace("/", ".").startswith(tuple(f"{name}." for name in touched)):
            node.input[:] = [renamed.get(value, value) for value in node.input]
            yield node.SerializeToString(deterministic=True)


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize("kept", [(), (OUT,), (K, DOWN), (Q, K, V), (*NAMES[1:],), (*NAMES,)], ids=len)
def test_everything_else_is_as_it_was(float16: ir.Model, precision: str, kept: tuple[str, ...]) -> None:
    before = proto_of(float16.clone())
    after = proto_of(quantized(float16, precision, kept=kept))
    touched = [name for name in NAMES if name not in kept]
    assert list(rest(after, touched)) == list(rest(before, touched))
    assert all(f"{name}/Transpose" in Graph(after).nodes for name in kept)
    found, expected = Graph(after).initializers, Graph(before).initializers
    same = set(expected) - {f"{name}.weight" for name in touched}
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    new = set(found) - set(expected)
    assert all(name.startswith(("zero_point", *(f"{linear}." for linear in touched))) for name in new)
    if not touched:
        assert after == before


@pytest.mark.parametrize("precision", QUANTIZED)
def test_the_graph_keeps_its_contract(float16: ir.Model, precision: str) -> None:
    contract = contract_of(precision)
    check_graph(quantized(float16, precision, multiplied={OUT}), contract)


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_head_is_quantized_on_request(built_graph: BuiltGraph, precision: str, tied: bool) -> None:
    model = built_graph(contract_of(tied=tied))
    graph = Graph(proto_of(quantized(model, precision, lm_head=True, kept=NAMES)))
    weight = graph.initializers["lm_head.weight"]
    assert (weight.data_type, list(weight.dims)) == (FORMS[precision].codes, [64, 259])
    embedding = graph.initializers[EMBEDDING]
    assert (embedding.data_type, list(embedding.dims)) == (HALF, [259, 64])
    readers = [node.op_type for node in graph.nodes.values() if EMBEDDING in node.input]
    assert readers == ["Gather"], "tied or not, the codes are the head's own"
    assert f"{LM_HEAD_MODULE}/Transpose" not in graph.nodes


# ---------------------------------------------------------------- errors


def refused(model: ir.Model, *groups: tuple[str, ...], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        quantize_graph(model, scheme_for("int4", ONE_LAYER), Placement(groups, frozenset()))


def test_a_linear_that_is_not_there_is_refused(float16: ir.Model) -> None:
    name = Q.replace(".0.", ".1.")
    refused(float16, (name,), words=f"^{name}: expected a MatMul with a transposed weight$")


def test_linears_that_do_not_read_one_tensor_are_refused(float16: ir.Model) -> None:
    refused(float16, (Q, OUT), words=f"^{Q}, {OUT}: expected linears that read one tensor$")


def test_a_weight_of_another_name_is_refused(float16: ir.Model) -> None:
    weight = float16.graph.initializers.pop(f"{Q}.weight")
    weight.name = "another"
    float16.graph.initializers["another"] = weight
    refused(float16, (Q,), words=f"^{Q}: expected {Q}.weight, found another$")


def test_the_embedding_stands_in_for_the_head_alone(float16: ir.Model) -> None:
    (transpose,) = [node for node in float16.graph if node.name == f"{Q}/Transpose"]
    transpose.replace_input_with(0, float16.graph.initializers[EMBEDDING])
    refused(float16, (Q,), words=f"^{Q}: expected {Q}.weight, found {EMBEDDING}$")


# ---------------------------------------------------------------- ONNX's and ONNX Runtime's judgement


@pytest.mark.parametrize("precision", QUANTIZED)
def test_onnx_checks_the_graph_in_full(float16: ir.Model, precision: str) -> None:
    proto = proto_of(quantized(float16, precision, multiplied={OUT}))
    onnx.checker.check_model(proto, full_check=True)
    dequantize = Graph(proto).nodes[f"{Q}/DequantizeLinear"]
    dequantize.attribute.append(onnx.helper.make_attribute("nonsense", 1))
    with pytest.raises(onnx.checker.ValidationError, match="nonsense"):
        onnx.checker.check_model(proto, full_check=True)


def optimized(proto: onnx.ModelProto, path: Path) -> Graph:
    """The graph as ONNX Runtime will run it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Graph(onnx.load(path))


@pytest.mark.parametrize(
    ("precision", "operator"),
    [("int8", "MatMulIntegerToFloat"), ("int8-weight-only", "MatMulNBits"), ("int4", "MatMulNBits")],
)
@pytest.mark.parametrize("kept", [(), (K, DOWN)], ids=["all", "some kept"])
def test_onnx_runtime_fuses_every_quantized_linear(
    float16: ir.Model, tmp_path: Path, precision: str, operator: str, kept: tuple[str, ...]
) -> None:
    model = quantized(float16, precision, kept=kept, multiplied={OUT})
    count = optimized(proto_of(model), tmp_path / "optimized.onnx").count()
    assert count[operator] == len(NAMES) - len(kept)
    assert count["DequantizeLinear"] == 0
    assert sum(count[name] for name in ("MatMul", "FusedMatMul", "Gemm")) == 1 + len(kept), "the head, kept"


def test_onnx_runtime_fuses_a_quantized_head_as_well(float16: ir.Model, tmp_path: Path) -> None:
    model = quantized(float16, "int4", lm_head=True)
    count = optimized(proto_of(model), tmp_path / "optimized.onnx").count()
    assert (count["MatMulNBits"], count["MatMul"]) == (len(KINDS) + 1, 0)
