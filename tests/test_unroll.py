"""Repeating the second layer gives the graph that tracing every layer gives, byte for byte."""

from dataclasses import replace

import onnx_ir as ir
import pytest

from mistral_trt.contract import GraphContract, plan_contract
from mistral_trt.errors import ExportError
from mistral_trt.export.graph import build_graph, sort_initializers, trace_layers
from mistral_trt.export.unroll import unroll
from tests.conftest import BuiltGraph
from tests.models import TINY


def contract(layers: int, **config: object) -> GraphContract:
    model = replace(TINY, num_hidden_layers=layers, **config)  # type: ignore[arg-type]
    return plan_contract(model, precision="fp16", prefill_chunk=4)


def text(model: ir.Model) -> bytes:
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


@pytest.fixture
def traced(built_graph: BuiltGraph) -> ir.Model:
    """Two layers, not repeated yet."""
    return built_graph(contract(2))


@pytest.mark.parametrize(
    "config",
    [{}, pytest.param({"tie_word_embeddings": True, "head_dim": 32}, marks=pytest.mark.slow)],
    ids=str,
)
def test_it_is_the_graph_with_every_layer_traced(config: dict[str, object]) -> None:
    wanted = contract(3, **config)
    whole = trace_layers(wanted)
    sort_initializers(whole, wanted)
    assert text(build_graph(wanted)) == text(whole)


def test_another_number_of_layers_is_another_graph(traced: ir.Model) -> None:
    three, four = traced.clone(), traced.clone()
    unroll(three, 3)
    unroll(four, 4)
    assert text(three) != text(four)
    assert len(four.graph) - len(three.graph) == len(three.graph) - len(traced.graph) > 30


def test_every_name_is_used_once(traced: ir.Model) -> None:
    model = traced.clone()
    unroll(model, 5)
    names = [node.name for node in model.graph]
    values = [value.name for node in model.graph for value in node.outputs]
    assert len(set(names)) == len(names) and len(set(values)) == len(values)
    inputs = [value.name for value in model.graph.inputs]
    assert inputs == [spec.name for spec in contract(5).inputs()]
    assert [value.name for value in model.graph.outputs] == [spec.name for spec in contract(5).outputs()]


def test_each_layer_reads_the_one_before(traced: ir.Model) -> None:
    model = traced.clone()
    unroll(model, 4)
    norms = {node.name: node for node in model.graph if node.op_type == "RMSNormalization"}
    for layer in range(1, 4):
        first = norms[f"model.layers.{layer}.input_layernorm/RMSNormalization"].inputs[0]
        assert first is not None and first.name == f"model.layers.{layer - 1}/Add_1"
    last = norms["model.norm/RMSNormalization"].inputs[0]
    assert last is not None and last.name == "model.layers.3/Add_1"


def test_a_second_way_between_layers_is_refused(traced: ir.Model) -> None:
    model = traced.clone()
    nodes = {node.name: node for node in model.graph}
    leak = nodes["model.layers.0.mlp.down_proj/MatMul"].outputs[0]
    nodes["model.layers.1/Add"].replace_input_with(1, leak)
    with pytest.raises(ExportError, match="one value must pass from layer to layer, found"):
        unroll(model, 3)
