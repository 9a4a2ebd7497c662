"""The ONNX graph: what it holds, what it must not hold, and a hash that follows every constant in it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.numpy_helper import from_array, to_array

from mistral_trt.contract import GraphContract, plan_contract
from mistral_trt.errors import ExportError
from mistral_trt.export.checkpoint import EMBEDDING, LM_HEAD, expected_shapes
from mistral_trt.export.graph import build_graph, check_graph, graph_sha256, simplify, trace
from mistral_trt.manifest import read_manifest
from tests.conftest import BuiltGraph, Folder
from tests.models import TINY

CONFIG = replace(TINY, num_hidden_layers=1)
CONTRACT = plan_contract(CONFIG, precision="fp16", prefill_chunk=4)
HUGE_WINDOW = plan_contract(replace(CONFIG, sliding_window=100_000), precision="fp16", prefill_chunk=4)

# Operators of the graph: once, and as many again for each layer. Casts depend on the precision.
ONCE = Counter(
    Gather=2, Unsqueeze=4, Mul=1, Cos=1, Sin=1, Slice=1, Sub=3, Mod=2, GreaterOrEqual=1, LessOrEqual=1, And=2,
    Greater=1, RMSNormalization=1, Expand=1, GatherElements=1, Transpose=1, MatMul=1,
)  # fmt: skip
PER_LAYER = Counter(
    RMSNormalization=2, Transpose=11, MatMul=7, Reshape=4, RotaryEmbedding=2, TensorScatter=2, Attention=1,
    Mul=3, Sigmoid=1, Add=2,
)  # fmt: skip
CASTS = {"fp32": 1, "fp16": 4, "bf16": 4}


@pytest.fixture
def model(built_graph: BuiltGraph) -> ir.Model:
    return built_graph(CONTRACT)


@pytest.fixture(scope="module")
def proto(built_graph: BuiltGraph) -> onnx.ModelProto:
    return ir.to_proto(built_graph(CONTRACT))


def without_weights(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Initializers that are constants of the graph."""
    weights = expected_shapes(CONFIG)
    return [constant for constant in proto.graph.initializer if constant.name not in weights]


def nodes(proto: onnx.ModelProto, operator: str) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.op_type == operator]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def constant(proto: onnx.ModelProto, name: str) -> Any:
    return next(to_array(c) for c in proto.graph.initializer if c.name == name)


# ---------------------------------------------------------------- what it holds


def operators(layers: int, precision: str) -> Counter[str]:
    total = ONCE + Counter(Cast=CASTS[precision])
    for _ in range(layers):
        total += PER_LAYER
    return total


def test_operators_are_counted_one_by_one(onnx_folder: Folder, proto: onnx.ModelProto) -> None:
    exported = onnx.load(onnx_folder() / "model.onnx", load_external_data=False)
    assert Counter(node.op_type for node in exported.graph.node) == operators(2, "fp32")
    assert Counter(node.op_type for node in proto.graph.node) == operators(1, "fp16")


def test_only_standard_operators(proto: onnx.ModelProto) -> None:
    assert {node.domain for node in proto.graph.node} == {""}
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 24)]
    assert not proto.functions


def test_the_exported_file_passes_the_checker_of_onnx(onnx_folder: Folder) -> None:
    onnx.checker.check_model(onnx_folder() / "model.onnx", full_check=True)


def test_inputs_and_outputs_are_the_contract_with_named_dimensions(proto: onnx.ModelProto) -> None:
    def listed(values: Any) -> list[tuple[str, tuple[str | int, ...]]]:
        return [
            (v.name, tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim)) for v in values
        ]

    assert listed(proto.graph.input) == [(spec.name, spec.shape) for spec in CONTRACT.inputs()]
    assert listed(proto.graph.output) == [(spec.name, spec.shape) for spec in CONTRACT.outputs()]


def test_weights_have_names_and_shapes_and_no_values(model: ir.Model) -> None:
    weights = {name: v for name, v in model.graph.initializers.items() if v.const_value is None}
    assert {name: tuple(v.shape or ()) for name, v in weights.items()} == expected_shapes(CONFIG)
    assert {v.dtype for v in weights.values()} == {ir.DataType.FLOAT16}


def test_the_constants_are_small(proto: onnx.ModelProto, built_graph: BuiltGraph) -> None:
    assert sum(c.ByteSize() for c in without_weights(proto)) < 2_000
    huge = ir.to_proto(built_graph(HUGE_WINDOW))
    assert HUGE_WINDOW.ring.capacity == 100_004
    assert sum(c.ByteSize() for c in without_weights(huge)) < 2_000, "a range over the ring was folded in"


def test_attention_gets_the_mask_and_nothing_else(proto: onnx.ModelProto) -> None:
    (attention,) = nodes(proto, "Attention")
    assert attributes(attention) == {"scale": 1.0}
    assert len(attention.input) == 4 and attention.input[1:3] == ["present.0.key", "present.0.value"]
    assert len([name for name in attention.output if name]) == 1


def test_each_ring_is_written_from_its_past_to_its_present(proto: onnx.ModelProto) -> None:
    pairs = zip(CONTRACT.past(), CONTRACT.present(), nodes(proto, "TensorScatter"), strict=True)
    for past, present, scatter in pairs:
        assert (scatter.input[0], scatter.output[0]) == (past.name, present.name)
        assert attributes(scatter) == {"axis": 2, "mode": b"linear"}
    firsts = {scatter.input[2] for scatter in nodes(proto, "TensorScatter")}
    assert len(firsts) == 1, "key and value of a layer go to the same slot"


def test_the_query_is_scaled_before_attention(proto: onnx.ModelProto) -> None:
    scaled = next(n for n in proto.graph.node if n.name == "model.layers.0.self_attn/Mul")
    assert constant(proto, scaled.input[1]) == np.float16(16**-0.5)
    assert nodes(proto, "Attention")[0].input[0] == scaled.output[0]


def test_reshapes_keep_batch_and_tokens_without_arithmetic(proto: onnx.ModelProto) -> None:
    for reshape in nodes(proto, "Reshape"):
        assert attributes(reshape) == {"allowzero": 0}
        assert constant(proto, reshape.input[1])[:2].tolist() == [0, 0]
    assert not nodes(proto, "Shape") and not nodes(proto, "Concat")


def test_norms_accumulate_in_float32(proto: onnx.ModelProto) -> None:
    for norm in nodes(proto, "RMSNormalization"):
        assert attributes(norm) == {"axis": -1, "epsilon": pytest.approx(1e-5), "stash_type": 1}


def test_rotary_frequencies_are_those_of_transformers_bit_for_bit(proto: onnx.ModelProto) -> None:
    (angles,) = [n for n in nodes(proto, "Mul") if n.name == "model.rotary/Mul"]
    pairs = torch.arange(0, 16, 2, dtype=torch.int64).to(torch.float32)
    expected = 1.0 / (10000.0 ** (pairs / 16))
    found = constant(proto, angles.input[1])
    assert found.dtype == np.float32
    assert found.tobytes() == expected.numpy().tobytes()


def test_nodes_are_named_after_their_modules_and_no_name_is_used_twice(proto: onnx.ModelProto) -> None:
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names)
    for weight in expected_shapes(CONFIG):
        module = weight.removesuffix(".weight")
        assert any(name.startswith(f"{module}/") for name in names), module
    assert "model.layers.0.self_attn.q_proj/MatMul" in names


def test_nothing_of_the_machine_that_traced_it_is_left(onnx_folder: Folder) -> None:
    data = (onnx_folder() / "model.onnx").read_bytes()
    for trace_of in (b"/work", b"site-packages", b".py", str(Path.home()).encode(), b"pkg.torch", b"lambda"):
        assert trace_of not in data
    proto = onnx.load_from_string(data)
    assert (proto.producer_name, proto.producer_version, proto.doc_string) == ("mistral-trt", "", "")
    assert not proto.metadata_props and not proto.graph.metadata_props and not proto.graph.doc_string
    for node in proto.graph.node:
        assert not node.metadata_props and not node.doc_string


def test_tied_embeddings_are_one_initializer_with_two_uses(onnx_folder: Folder) -> None:
    folder = onnx_folder(precision="bf16", num_hidden_layers=1, tie_word_embeddings=True, head_dim=32)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    names = [initializer.name for initializer in graph.initializer]
    assert EMBEDDING in names and LM_HEAD not in names
    users = [node.op_type for node in graph.node if EMBEDDING in node.input]
    assert sorted(users) == ["Gather", "Transpose"]
    assert read_manifest(folder).details["weights"].count(EMBEDDING) == 1


# ---------------------------------------------------------------- its hash


def bound(model: ir.Model, location: str = "model.onnx.data", start: int = 0) -> onnx.ModelProto:
    """The graph with each weight at some place of a data file."""
    for i, name in enumerate(expected_shapes(CONFIG)):
        value = model.graph.initializers[name]
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(
            location, start + 4096 * i, 8, ir.DataType.FLOAT16, shape=value.shape, name=name
        )
    return ir.to_proto(model)


def test_the_hash_does_not_see_where_or_what_the_weights_are(model: ir.Model) -> None:
    assert graph_sha256(bound(model)) == graph_sha256(bound(model, "elsewhere.bin", 8192))


def test_the_hash_leaves_the_graph_as_it_was(model: ir.Model) -> None:
    proto = bound(model)
    before = proto.SerializeToString(deterministic=True)
    graph_sha256(proto)
    assert proto.SerializeToString(deterministic=True) == before


def test_the_hash_follows_every_constant_and_every_weight_shape(model: ir.Model) -> None:
    proto = bound(model)
    original, seen = graph_sha256(proto), set()
    for i, initializer in enumerate(proto.graph.initializer):
        changed = onnx.ModelProto()
        changed.CopyFrom(proto)
        target = changed.graph.initializer[i]
        if initializer.external_data:
            target.dims[0] += 1
        else:
            value = to_array(initializer).copy()
            value.reshape(-1)[-1] -= 1
            target.CopyFrom(from_array(value, initializer.name))
        seen.add(graph_sha256(changed))
    assert original not in seen and len(seen) == len(proto.graph.initializer)


def test_the_hash_follows_every_attribute_and_every_connection(model: ir.Model) -> None:
    proto = bound(model)
    original, seen, tried = graph_sha256(proto), set(), 0
    for i, node in enumerate(proto.graph.node):
        for j in range(len(node.attribute)):
            changed = onnx.ModelProto()
            changed.CopyFrom(proto)
            attribute = changed.graph.node[i].attribute[j]
            attribute.i, attribute.f, attribute.s = attribute.i + 1, attribute.f * 1.5 + 1, attribute.s + b"x"
            seen.add(graph_sha256(changed))
            tried += 1
        changed = onnx.ModelProto()
        changed.CopyFrom(proto)
        changed.graph.node[i].input[0] = "input_ids_"
        seen.add(graph_sha256(changed))
        tried += 1
    assert original not in seen and len(seen) == tried > 80


@pytest.mark.parametrize(
    "other",
    [
        plan_contract(replace(CONFIG, rope_theta=10001.0), precision="fp16", prefill_chunk=4),
        HUGE_WINDOW,
        *(
            pytest.param(contract, marks=pytest.mark.slow)
            for contract in (
                plan_contract(replace(CONFIG, rms_norm_eps=1.1e-5), precision="fp16", prefill_chunk=4),
                plan_contract(CONFIG, precision="fp16", prefill_chunk=1),
            )
        ),
    ],
    ids=["rope_theta", "W", "rms_norm_eps", "C"],
)
def test_another_constant_of_the_model_is_another_hash(built_graph: BuiltGraph, other: GraphContract) -> None:
    assert graph_sha256(bound(built_graph(other))) != graph_sha256(bound(built_graph(CONTRACT)))


@pytest.mark.slow
def test_limits_and_quantization_are_no_part_of_the_graph(built_graph: BuiltGraph) -> None:
    """So one trace serves them all, in `built_graph`, which keeps it in a file."""
    same = replace(CONTRACT, precision="int8", max_batch_size=1, max_context=50)
    assert bound(build_graph(same)) == bound(built_graph(CONTRACT))


# ---------------------------------------------------------------- what is refused


def rename_input(model: ir.Model) -> None:
    model.graph.inputs[0].name = "tokens"


def retype_input(model: ir.Model) -> None:
    model.graph.inputs[1].type = ir.TensorType(ir.DataType.INT32)


def reshape_ring(model: ir.Model) -> None:
    model.graph.inputs[3].shape = ir.Shape(["B", 2, 13, 16])


def swap_outputs(model: ir.Model) -> None:
    outputs = model.graph.outputs
    outputs[1], outputs[2] = outputs[2], outputs[1]


def drop_output(model: ir.Model) -> None:
    model.graph.outputs.pop()


def add_input(model: ir.Model) -> None:
    model.graph.inputs.append(ir.Value(name="extra"))


def leave_the_standard(model: ir.Model) -> None:
    next(node for node in model.graph if node.op_type == "RotaryEmbedding").domain = "com.microsoft"


def retype_node(before: str, after: str) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        next(node for node in model.graph if node.op_type == before).op_type = after

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename_input, r"graph input: expected \('input_ids', 'int64', .* found \('tokens'"),
        (retype_input, r"graph input: expected \('position_ids', 'int64', .* 'int32'"),
        (reshape_ring, r"expected .*past_key_values.0.key.*12, 16\)\), found .*13, 16\)\)"),
        (swap_outputs, r"graph output: expected \('present.0.key', .* found \('present.0.value'"),
        (drop_output, "graph must have 3 outputs, found 2"),
        (add_input, "graph must have 5 inputs, found 6"),
        (leave_the_standard, r"standard ONNX operators only, found domains \['com.microsoft'\]"),
        (retype_node("TensorScatter", "ScatterElements"), "graph must hold 2 TensorScatter nodes, found 1"),
        (retype_node("Attention", "MatMul"), "graph must hold 1 Attention nodes, found 0"),
        (retype_node("RotaryEmbedding", "Mul"), "graph must hold 2 RotaryEmbedding nodes, found 1"),
    ],
)
def test_a_graph_that_does_not_keep_the_contract_is_refused(
    model: ir.Model, change: Callable[[ir.Model], None], words: str
) -> None:
    check_graph(model, CONTRACT)
    change(model)
    with pytest.raises(ExportError, match=words):
        check_graph(model, CONTRACT)


def test_an_exporter_that_returns_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)
    with pytest.raises(ExportError, match="torch.onnx.export returned no program"):
        trace(CONTRACT)


def test_a_reshape_that_does_not_keep_batch_and_tokens_is_refused() -> None:
    x = ir.Value(name="x", shape=ir.Shape(["B", "S", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    sizes = [
        ir.Value(name=f"d{i}", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64)) for i in range(3)
    ]
    concat = ir.node("Concat", sizes, {"axis": 0})
    reshape = ir.node("Reshape", [x, concat.outputs[0]], name="here")
    graph = ir.Graph([x, *sizes], reshape.outputs, nodes=[concat, reshape], opset_imports={"": 24}, name="g")
    with pytest.raises(ExportError, match="here: expected a reshape that keeps batch and tokens"):
        simplify(ir.Model(graph, ir_version=10))
