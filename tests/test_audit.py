"""What an audit reports, and a mutation for each of its checks that it must catch.

Rings, attentions and tensors are in test_build, quantized linears in test_quantized_network.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mistral_trt.engines.build import build_engine, engine_details
from mistral_trt.engines.build_log import BuilderLog
from mistral_trt.engines.builder.callbacks import make_logger
from mistral_trt.engines.builder.plan import Plan
from mistral_trt.engines.gpu import find_gpu
from mistral_trt.engines.network import audit as audit_module
from mistral_trt.engines.network.audit import AuditReport, audit, audit_float32
from mistral_trt.engines.network.parse import ParsedNetwork, parse_network
from mistral_trt.engines.planning.budget import predict
from mistral_trt.engines.targets import TargetSet
from mistral_trt.errors import BuildError
from mistral_trt.inspect import describe, inspect
from mistral_trt.manifest import FileEntry, read_manifest
from tests.conftest import Folder
from tests.test_quantized_network import INSIDE, OUT, linear, node, scheme_of, small_graph, take_out

trt = pytest.importorskip("tensorrt_rtx")

Mutation = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def fp16(onnx_folder: Folder) -> Path:
    return onnx_folder(
        precision="fp16", hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64
    )


def parse(path: Path, folder: Path) -> ParsedNetwork:
    log = BuilderLog()
    return parse_network(trt, path, read_manifest(folder).contract, make_logger(trt, log), log)


def mutated(fp16: Path, tmp_path: Path, mutation: Mutation) -> Path:
    model = onnx.load(fp16 / "model.onnx")
    mutation(model)
    onnx.save(model, tmp_path / "mutated.onnx")
    return tmp_path / "mutated.onnx"


# --- the report -----------------------------------------------------------------------------------------


def test_the_report_says_what_was_looked_at(fp16: Path) -> None:
    report = parse(fp16 / "model.onnx", fp16).audit
    assert report.checks == (
        ("inputs", "7, as in the contract"),
        ("outputs", "5, as in the contract"),
        ("ring writes", "4, each from its past to its present"),
        ("attentions", "2, each over its own ring, none decomposable"),
        ("float32 products", "none"),
    )
    assert report.to_json()[0] == {"check": "inputs", "found": "7, as in the contract"}


def parsed_small(model: onnx.ModelProto) -> Any:
    """(builder, parser, network) of a graph by hand; the network lives as long as the others."""
    log = BuilderLog()
    builder = trt.Builder(make_logger(trt, log))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    assert parser.parse(model.SerializeToString()), log.problems
    return builder, parser, network


def test_the_report_counts_quantized_linears(fp16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for check in ("_audit_tensors", "_audit_rings", "_audit_attentions"):
        monkeypatch.setattr(audit_module, check, lambda *whatever: "not looked at")
    owner = parsed_small(small_graph("int8"))
    report = audit(trt, owner[2], read_manifest(fp16).contract, scheme_of("int8"))
    assert dict(report.checks)["quantized"] == "1 linears in int8, inputs int8; 1 not"
    assert dict(report.checks)["float32 products"] == "1, each a quantized linear between Casts"


def test_the_manifest_and_inspect_repeat_it(
    fp16: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = AuditReport((("ring writes", "4, each from its past to its present"),))
    manifest = read_manifest(fp16)
    budget = predict(manifest.contract, manifest.details["weights_bytes"])
    targets, plan = TargetSet((find_gpu("l4"),)), Plan("", 1, {"audit": report.to_json()})
    details = engine_details(targets, "tensorrt-rtx", "1.7.1", budget, plan)
    assert details["audit"] == [{"check": "ring writes", "found": "4, each from its past to its present"}]
    shown = replace(manifest, details={**manifest.details, **details})
    assert dict(describe(shown))["audit: ring writes"] == "4, each from its past to its present"
    files = {"model.plan": FileEntry("0f" * 32, 3_500_000)}
    engine = dict(describe(replace(shown, stage="engine", files=files)))
    assert engine["plan sha256"] == "0f" * 32
    assert engine["plan"].startswith("3.5 MB, ") and engine["plan"].endswith(" of weights in it")
    assert not [label for label, _ in describe(manifest) if label.startswith("audit")]
    (tmp_path / "files").mkdir()
    for path in fp16.iterdir():
        (tmp_path / "files" / path.name).write_bytes(path.read_bytes())
    shown.write(tmp_path / "files")
    assert inspect([str(tmp_path / "files")]) == 0
    assert "\naudit: ring writes      4, each from" in capsys.readouterr().out
    inspect([str(tmp_path / "files"), "--json"])
    assert json.loads(capsys.readouterr().out)["details"]["audit"] == details["audit"]


@pytest.mark.slow
def test_a_real_engine_has_it_in_its_manifest(fp16: Path, tmp_path: Path) -> None:
    found = build_engine(fp16, "l4", tmp_path / "engine").details["audit"]
    assert found == parse(fp16 / "model.onnx", fp16).audit.to_json()


# --- matrix products in float32 -------------------------------------------------------------------------


def widen(model: onnx.ModelProto, name: str) -> None:
    """One product of a float16 graph in float32: both operands and the result are cast."""
    product = node(model, name)
    at, result = list(model.graph.node).index(product), product.output[0]
    casts = []
    for i, operand in enumerate(product.input):
        wide = f"{name}.wide{i}"
        casts.append(helper.make_node("Cast", [operand], [wide], f"{name}/wide{i}", to=TensorProto.FLOAT))
        product.input[i] = wide
    product.output[0] = f"{name}.wide"
    narrow = helper.make_node("Cast", [f"{name}.wide"], [result], f"{name}/narrow", to=TensorProto.FLOAT16)
    model.graph.node.insert(at + 1, narrow)
    for cast in casts:
        model.graph.node.insert(at, cast)


@pytest.mark.parametrize(
    ("name", "module"),
    [("model.layers.1.mlp.up_proj/MatMul", "layer 1, mlp.up_proj"), ("lm_head/MatMul", "lm_head")],
)
def test_a_product_in_float32_is_found_and_named(fp16: Path, tmp_path: Path, name: str, module: str) -> None:
    path = mutated(fp16, tmp_path, lambda model: widen(model, name))
    message = (
        rf"^{module} \(node '{name}'\): MATRIX_MULTIPLY in FLOAT where the network is in HALF, and "
        r"'.*' is not dequantized codes; export the checkpoint again$"
    )
    with pytest.raises(BuildError, match=message):
        parse(path, fp16)


def add_einsum(model: onnx.ModelProto) -> None:
    """The same mistake by another operator."""
    widen(model, "model.layers.0.self_attn.o_proj/MatMul")
    product = node(model, "model.layers.0.self_attn.o_proj/MatMul")
    product.op_type = "Einsum"
    product.attribute.append(helper.make_attribute("equation", "bsi,io->bso"))


def test_einsum_is_a_product_too(fp16: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"^layer 0, self_attn.o_proj .*: EINSUM in FLOAT where the network"):
        parse(mutated(fp16, tmp_path, add_einsum), fp16)


def check_small(model: onnx.ModelProto, fp16: Path) -> str:
    owner = parsed_small(model)
    return audit_float32(owner[2], read_manifest(fp16).contract)


@pytest.mark.parametrize("precision", ["int8", "int8-weight-only", "int4", "fp8"])
def test_islands_of_quantized_linears_are_meant(fp16: Path, precision: str) -> None:
    islands = "1, each a quantized linear between Casts" if precision == "int8" else "none"
    assert check_small(small_graph(precision), fp16) == islands


def leave_the_input_float(model: onnx.ModelProto) -> None:
    take_out(model, "a/input_dq")
    take_out(model, "a/input_q")


def fold_the_weight(model: onnx.ModelProto) -> None:
    take_out(model, "a/dq")
    numbers = np.random.default_rng(0).standard_normal((INSIDE, OUT)).astype(np.float32)
    weight = next(w for w in model.graph.initializer if w.name == "a")
    weight.CopyFrom(numpy_helper.from_array(numbers, "a"))


@pytest.mark.parametrize("mutation", [leave_the_input_float, fold_the_weight])
def test_an_island_without_codes_is_found(fp16: Path, mutation: Mutation) -> None:
    model = small_graph("int8")
    mutation(model)
    with pytest.raises(BuildError, match="a/MatMul: MATRIX_MULTIPLY in FLOAT .* is not dequantized codes"):
        check_small(model, fp16)


def test_an_island_that_is_left_in_float32_is_found(fp16: Path) -> None:
    """The result is used as float32 before it is cast back."""
    model = small_graph("int8")
    back = node(model, "a/back")
    at = list(model.graph.node).index(back)
    twice = helper.make_node("Add", [back.input[0], back.input[0]], ["a.twice"], "a/twice")
    back.input[0] = "a.twice"
    model.graph.node.insert(at, twice)
    with pytest.raises(BuildError, match="a/MatMul: .*, and its result is not cast back to HALF"):
        check_small(model, fp16)


def test_a_float32_network_is_meant_to_be_in_float32(fp16: Path) -> None:
    """TensorRT refuses it later, and says why in words of its own."""
    owner = parsed_small(small_graph("int8"))
    contract = replace(read_manifest(fp16).contract, precision="fp32")
    assert audit_float32(owner[2], contract) == "every one, as the network is in float32"


def test_an_island_in_a_graph_of_another_cache_dtype_is_found(fp16: Path) -> None:
    owner = parsed_small(small_graph("int8"))
    contract = replace(read_manifest(fp16).contract, precision="bf16")
    with pytest.raises(
        BuildError, match="where the network is in BF16, and its result is not cast back to B"
    ):
        audit_float32(owner[2], contract)


def test_linear_by_hand_is_what_the_audit_sees() -> None:
    nodes, _ = linear("int8", "a", "x", "y", INSIDE, OUT)
    assert [n.op_type for n in nodes][-2:] == ["MatMul", "Cast"]
