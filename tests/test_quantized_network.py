"""Quantized linears in the parsed network, each form by hand, and proof that every check of them can fail."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mistral_trt.contract import Ring
from mistral_trt.engines import build as build_module
from mistral_trt.engines.build import build_engine
from mistral_trt.engines.build_log import BuilderLog
from mistral_trt.engines.builder.callbacks import make_logger
from mistral_trt.engines.builder.plan import Plan, build_plan, warn_of_waste
from mistral_trt.engines.network.parse import parse_network, profile_ranges
from mistral_trt.engines.network.quantized import Quantization, audit_quantized, carried, read_quantization
from mistral_trt.engines.planning import settle as settle_module
from mistral_trt.errors import BuildError, GpuError, ManifestError
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.inspect import describe
from mistral_trt.manifest import Manifest, describe_files, read_manifest
from tests.models import write_checkpoint

trt = pytest.importorskip("tensorrt_rtx")

pytestmark = pytest.mark.usefixtures("one_trace")

INSIDE, OUT, BLOCK = 128, 96, 32
WEIGHTS = {"int8": "int8", "int8-weight-only": "int8", "int4": "int4", "fp8": "float8_e4m3fn"}
ACTIVATIONS = {"int8": "int8", "int8-weight-only": None, "int4": None, "fp8": "float8_e4m3fn"}
ONNX_CODES = {"int8": TensorProto.INT8, "int4": TensorProto.INT4, "float8_e4m3fn": TensorProto.FLOAT8E4M3FN}
PRECISIONS = tuple(WEIGHTS)

Graph = tuple[list[NodeProto], list[TensorProto]]
Mutation = Callable[[onnx.ModelProto], None]


# --- graphs by hand -------------------------------------------------------------------------------------


def codes(precision: str, name: str, inside: int, out: int) -> TensorProto:
    """Random codes, [in, out], others for each name: TensorRT stores equal weights once."""
    random = np.random.default_rng(list(name.encode()))
    kind = WEIGHTS[precision]
    if kind == "int8":
        raw = random.integers(-127, 128, (inside, out), dtype=np.int8).tobytes()
    elif kind == "int4":
        raw = random.integers(0, 256, inside * out // 2, dtype=np.uint8).tobytes()
    else:
        raw = random.standard_normal((inside, out)).astype(ml_dtypes.float8_e4m3fn).tobytes()
    return helper.make_tensor(name, ONNX_CODES[kind], [inside, out], raw, raw=True)


def linear(precision: str, name: str, source: str, result: str, inside: int, out: int) -> Graph:
    """Nodes and initializers of one quantized linear, named after its weight."""
    island = precision == "int8"
    dtype = np.float32 if island else np.float16
    shape = {"int4": (inside // BLOCK, out), "fp8": ()}.get(precision, (out,))
    scale = np.random.default_rng(1).uniform(1e-3, 2e-3, shape)
    weights = [
        codes(precision, name, inside, out),
        numpy_helper.from_array(np.asarray(scale, dtype), f"{name}_scale"),
    ]
    operands: list[str] = [name, f"{name}_scale"]
    attributes: dict[str, Any] = {"axis": 1}
    if precision == "int4":
        attributes = {"axis": 0, "block_size": BLOCK}
    elif precision == "int8":
        weights.append(numpy_helper.from_array(np.zeros(out, np.int8), f"{name}_zero"))
        operands.append(f"{name}_zero")
    nodes, reads = quantized_input(precision, name, source, weights)
    made = f"{name}.product" if island else result
    nodes += [
        helper.make_node("DequantizeLinear", operands, [f"{name}.numbers"], f"{name}/dq", **attributes),
        helper.make_node("MatMul", [reads, f"{name}.numbers"], [made], f"{name}/MatMul"),
    ]
    if island:
        nodes.append(helper.make_node("Cast", [made], [result], f"{name}/back", to=TensorProto.FLOAT16))
    return nodes, weights


def quantized_input(
    precision: str, name: str, source: str, weights: list[TensorProto]
) -> tuple[list[NodeProto], str]:
    """Q/DQ of a linear's input where its precision has one, and the name of what the product reads."""
    nodes: list[NodeProto] = []
    reads = source
    if ACTIVATIONS[precision] is None:
        return nodes, reads
    dtype = np.float32 if precision == "int8" else np.float16
    kind = ONNX_CODES[ACTIVATIONS[precision] or ""]
    weights.append(numpy_helper.from_array(np.asarray(0.02, dtype), f"{name}.input_scale"))
    weights.append(helper.make_tensor(f"{name}.input_zero", kind, [], b"\0", raw=True))
    if precision == "int8":
        reads = f"{name}.float"
        nodes.append(helper.make_node("Cast", [source], [reads], f"{name}/float", to=TensorProto.FLOAT))
    for operator, end in (("QuantizeLinear", "q"), ("DequantizeLinear", "dq")):
        operands = [reads, f"{name}.input_scale", f"{name}.input_zero"]
        reads = f"{name}.{end}"
        nodes.append(helper.make_node(operator, operands, [reads], f"{name}/input_{end}"))
    return nodes, reads


def small_graph(precision: str) -> onnx.ModelProto:
    """x → quantized `a` → kept float16 `b`, stored [out, in] → y."""
    nodes, weights = linear(precision, "a", "x", "between", INSIDE, OUT)
    kept = np.random.default_rng(2).standard_normal((INSIDE, OUT)).astype(np.float16)
    weights.append(numpy_helper.from_array(kept, "b"))
    nodes += [
        helper.make_node("Transpose", ["b"], ["b.turned"], "b/Transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["between", "b.turned"], ["y"], "b/MatMul"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["B", "S", INSIDE]) for name in "xy"]
    graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def scheme_of(precision: str) -> Quantization:
    block = BLOCK if precision == "int4" else None
    return Quantization(WEIGHTS[precision], ACTIVATIONS[precision], block, ("a",), ("b",), 12288)


def audited(model: onnx.ModelProto, quantization: Quantization) -> None:
    """Parse with TensorRT and audit."""
    log = BuilderLog()
    builder = trt.Builder(make_logger(trt, log))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    assert parser.parse(model.SerializeToString()), log.problems
    audit_quantized(network, quantization)


def node(model: onnx.ModelProto, name: str) -> NodeProto:
    found: NodeProto = next(other for other in model.graph.node if other.name == name)
    return found


def initializer(model: onnx.ModelProto, name: str) -> TensorProto:
    found: TensorProto = next(other for other in model.graph.initializer if other.name == name)
    return found


def take_out(model: onnx.ModelProto, name: str) -> str:
    """Remove a node; whoever read its result reads its input."""
    removed = node(model, name)
    for other in model.graph.node:
        other.input[:] = [removed.input[0] if i == removed.output[0] else i for i in other.input]
    model.graph.node.remove(removed)
    return str(removed.input[0])


# --- what the audit must see ----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_form_passes(precision: str) -> None:
    audited(small_graph(precision), scheme_of(precision))


def fold_weight(model: onnx.ModelProto) -> None:
    """The weight is stored as the numbers its codes stand for."""
    take_out(model, "a/dq")
    dtype = np.float32 if "a/back" in {found.name for found in model.graph.node} else np.float16
    numbers = np.random.default_rng(0).standard_normal((INSIDE, OUT)).astype(dtype)
    initializer(model, "a").CopyFrom(numpy_helper.from_array(numbers, "a"))


def fold_weight_away(model: onnx.ModelProto) -> None:
    """As `fold_weight`, under the name that constant folding gives."""
    fold_weight(model)
    initializer(model, "a").name = "a.numbers"
    node(model, "a/MatMul").input[1] = "a.numbers"


def use_weight_twice(model: onnx.ModelProto) -> None:
    """The dequantized weight also feeds a second product."""
    numbers = node(model, "a/dq").output[0]
    product = node(model, "a/MatMul")
    twice = helper.make_node("MatMul", [product.input[0], numbers], ["again"], "again")
    added = helper.make_node("Add", [product.output[0], "again"], ["sum"], "sum")
    for other in model.graph.node:
        other.input[:] = ["sum" if i == product.output[0] else i for i in other.input]
    at = list(model.graph.node).index(product) + 1
    model.graph.node.insert(at, added)
    model.graph.node.insert(at, twice)


def dequantize_twice(model: onnx.ModelProto) -> None:
    """Two DequantizeLinear read the same codes, each for a product of its own."""
    use_weight_twice(model)
    second = NodeProto()
    second.CopyFrom(node(model, "a/dq"))
    second.name, second.output[0] = "a/dq2", "a.numbers2"
    model.graph.node.insert(0, second)
    node(model, "again").input[1] = "a.numbers2"


def add_to_weight(model: onnx.ModelProto) -> None:
    """Something is added to the dequantized weight first."""
    product = node(model, "a/MatMul")
    numbers, dtype = (
        product.input[1],
        np.float32 if "a_zero" in str(node(model, "a/dq").input) else np.float16,
    )
    model.graph.initializer.append(numpy_helper.from_array(np.ones(OUT, dtype), "ones"))
    at = list(model.graph.node).index(product)
    model.graph.node.insert(at, helper.make_node("Add", ["ones", numbers], ["more"], "more"))
    product.input[1] = "more"


def multiply_from_the_left(model: onnx.ModelProto) -> None:
    """(W x^T)^T: the weight is the first operand."""
    product = node(model, "a/MatMul")
    at = list(model.graph.node).index(product)
    reads, numbers, result = product.input[0], product.input[1], product.output[0]
    turned = [
        helper.make_node("Transpose", [reads], ["x.turned"], "x.turned", perm=[0, 2, 1]),
        helper.make_node("Transpose", [numbers], ["w.turned"], "w.turned", perm=[1, 0]),
        helper.make_node("MatMul", ["w.turned", "x.turned"], ["left"], "left"),
        helper.make_node("Transpose", ["left"], [result], "back", perm=[0, 2, 1]),
    ]
    model.graph.node.remove(product)
    for extra in reversed(turned):
        model.graph.node.insert(at, extra)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        (fold_weight, r"a: expected (INT8|INT4|FP8) codes in the network, found (HALF|FLOAT)"),
        (fold_weight_away, "a: expected its quantized weight in the network, found none"),
        (use_weight_twice, r"a: expected one use of 'a/dq', found [23]"),
        (dequantize_twice, "a: expected one use of 'a', found 2"),
        (add_to_weight, "a: expected it to be multiplied with, found ELEMENTWISE"),
        (multiply_from_the_left, "a: expected it to be multiplied with, found MATRIX_MULTIPLY"),
    ],
)
def test_a_weight_that_is_not_quantized_as_said_is_found(
    precision: str, mutation: Mutation, message: str
) -> None:
    model = small_graph(precision)
    mutation(model)
    with pytest.raises(BuildError, match=message):
        audited(model, scheme_of(precision))


def test_codes_that_are_cast_and_not_dequantized_are_found() -> None:
    model = small_graph("int8-weight-only")
    at = list(model.graph.node).index(node(model, "a/dq"))
    numbers = node(model, "a/dq").output[0]
    model.graph.node.remove(node(model, "a/dq"))
    cast = helper.make_node("Cast", ["a"], [numbers], "cast", to=TensorProto.FLOAT16)
    model.graph.node.insert(at, cast)
    with pytest.raises(BuildError, match="a: expected its codes to be dequantized, found CAST"):
        audited(model, scheme_of("int8-weight-only"))


def test_input_codes_that_no_quantize_makes_are_found() -> None:
    model = small_graph("int8")
    quantize = node(model, "a/input_q")
    at, reads, result = list(model.graph.node).index(quantize), quantize.input[0], quantize.output[0]
    model.graph.node.remove(quantize)
    model.graph.node.insert(at, helper.make_node("Cast", [reads], [result], "cast", to=TensorProto.INT8))
    with pytest.raises(BuildError, match="a: expected its input as INT8, found codes that no QUANTIZE makes"):
        audited(model, scheme_of("int8"))


def leave_input_float(model: onnx.ModelProto) -> None:
    take_out(model, "a/input_dq")
    take_out(model, "a/input_q")


@pytest.mark.parametrize(("precision", "kind"), [("int8", "INT8"), ("fp8", "FP8")])
def test_an_input_that_is_not_quantized_is_found(precision: str, kind: str) -> None:
    model = small_graph(precision)
    leave_input_float(model)
    with pytest.raises(BuildError, match=f"a: expected its input as {kind}, found float"):
        audited(model, scheme_of(precision))


def test_an_input_that_is_quantized_beyond_what_is_said_is_found() -> None:
    said = replace(scheme_of("fp8"), activations=None)
    with pytest.raises(BuildError, match="a: expected its input as float, found FP8"):
        audited(small_graph("fp8"), said)


def test_an_input_quantized_to_another_type_is_found() -> None:
    said = replace(scheme_of("int8"), activations="float8_e4m3fn")
    with pytest.raises(BuildError, match="a: expected its input as FP8, found INT8"):
        audited(small_graph("int8"), said)


def test_weights_of_another_type_are_found() -> None:
    said = replace(scheme_of("int8-weight-only"), weights="int4")
    with pytest.raises(BuildError, match="a: expected INT4 codes in the network, found INT8"):
        audited(small_graph("int8-weight-only"), said)


@pytest.mark.parametrize(
    ("precision", "change", "expected", "found"),
    [
        ("int4", {"block_size": 64}, 192, 384),
        ("int4", {"block_size": None}, 96, 384),
        ("int8", {"block_size": 64}, 192, 96),
        ("fp8", {"block_size": 64}, 192, 1),
    ],
)
def test_another_number_of_scales_is_found(
    precision: str, change: dict[str, Any], expected: int, found: int
) -> None:
    message = rf"a: expected {expected} scales for \[128, 96\] codes, found {found}"
    with pytest.raises(BuildError, match=message):
        audited(small_graph(precision), replace(scheme_of(precision), **change))


def test_a_float_weight_that_is_not_said_to_be_kept_is_found() -> None:
    with pytest.raises(BuildError, match="b/MatMul: b is multiplied with as HALF, and it is not among"):
        audited(small_graph("int4"), replace(scheme_of("int4"), kept=()))


def test_a_float_weight_behind_a_cast_is_found_by_its_name() -> None:
    model = small_graph("int4")
    kept = numpy_helper.to_array(initializer(model, "b")).astype(np.float32)
    initializer(model, "b").CopyFrom(numpy_helper.from_array(kept, "b"))
    cast = helper.make_node("Cast", ["b"], ["b.half"], "b/Cast", to=TensorProto.FLOAT16)
    node(model, "b/Transpose").input[0] = "b.half"
    model.graph.node.insert(0, cast)
    audited(model, scheme_of("int4"))
    with pytest.raises(BuildError, match="b/MatMul: b is multiplied with as FLOAT, and it is not among"):
        audited(model, replace(scheme_of("int4"), kept=()))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_the_head_need_not_be_said_to_be_kept(name: str) -> None:
    model = small_graph("int4")
    initializer(model, "b").name = node(model, "b/Transpose").input[0] = name
    audited(model, replace(scheme_of("int4"), kept=()))


def test_a_quantized_weight_that_is_not_listed_is_found() -> None:
    """Listed or not, a product must have a weight: here the dequantized codes of one that is not."""
    said = replace(scheme_of("int4"), quantized=(), kept=("a", "b"))
    with pytest.raises(BuildError, match="a/MatMul: expected a product with a weight, found .* DEQUANTIZE"):
        audited(small_graph("int4"), said)


def test_a_product_of_two_activations_is_found() -> None:
    model = small_graph("int4")
    node(model, "b/Transpose").input[0] = "x"
    node(model, "b/Transpose").attribute[0].CopyFrom(helper.make_attribute("perm", [0, 2, 1]))
    node(model, "b/MatMul").input[0] = "x"
    node(model, "b/MatMul").output[0] = "square"
    tail = helper.make_node("MatMul", ["square", "x"], ["y"], "tail")
    model.graph.node.append(tail)
    with pytest.raises(BuildError, match="b/MatMul: expected a product with a weight, found one with an inp"):
        audited(model, scheme_of("int4"))


# --- what the manifest says -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX folder of a tiny model with heads of 64 and room for one row."""
    root = tmp_path_factory.mktemp("quantized")
    checkpoint = write_checkpoint(
        root / "checkpoint", hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64
    )
    export_checkpoint(checkpoint, root / "fp16", precision="fp16", prefill_chunk=4, max_batch_size=1)
    return root / "fp16"


def quantize_model(model: onnx.ModelProto, precision: str, keep: str) -> list[str]:
    """Give every linear but those with `keep` in the name random codes. Returns their weights' names."""
    shapes = {weight.name: list(weight.dims) for weight in model.graph.initializer}
    found = []
    for product in [n for n in model.graph.node if n.op_type == "MatMul" and ".layers." in n.name]:
        name = product.name.replace("/MatMul", ".weight")
        if keep in name:
            continue
        out, inside = shapes[name]
        model.graph.initializer.remove(initializer(model, name))
        nodes, weights = linear(precision, name, product.input[0], product.output[0], inside, out)
        at = list(model.graph.node).index(product)
        model.graph.node.remove(product)
        for extra in reversed(nodes):
            model.graph.node.insert(at, extra)
        model.graph.node.remove(node(model, product.name.replace("/MatMul", "/Transpose")))
        model.graph.initializer.extend(weights)
        found.append(name)
    return found


def size_of(weights: list[TensorProto]) -> int:
    return sum(len(weight.raw_data) for weight in weights)


@pytest.fixture(scope="module")
def quantized(fp16: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """quantized(precision) → an ONNX folder for one row in which o_proj is kept, as export writes it."""
    root = tmp_path_factory.mktemp("folders")

    def folder(precision: str) -> Path:
        out = root / precision
        if out.exists():
            return out
        source, model = read_manifest(fp16), onnx.load(fp16 / "model.onnx")
        names = quantize_model(model, precision, keep="o_proj")
        weights = list(model.graph.initializer)
        own = [weight for weight in weights if any(weight.name.startswith(name) for name in names)]
        kept = [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)]
        block = BLOCK if precision == "int4" else None
        details = {
            **source.details,
            "weights_bytes": size_of(weights),
            "quantization": {
                "scheme": {
                    "precision": precision,
                    "weights": WEIGHTS[precision],
                    "activations": ACTIVATIONS[precision],
                    "block_size": block,
                },
                "quantized": names,
                "kept": kept,
                "quantized_bytes": size_of(own),
                "quantized_share": 0.9,
                "sensitivity": [{"name": names[0], "error": 0.1, "kept": False}],
                "frontier": [],
                "calibration": {"algorithm": "A", "source": "speeches", "samples": 16, "tokens": 512},
            },
        }
        out.mkdir()
        onnx.save(model, out / "model.onnx")
        contract = replace(source.contract, precision=precision)
        replace(source, contract=contract, files=describe_files(out, {}), details=details).write(out)
        return out

    return folder


def altered(manifest: Manifest, **changes: Any) -> Manifest:
    """The manifest with changes in its `quantization`; None removes a field."""
    fields = {**manifest.details["quantization"], **changes}
    fields = {name: value for name, value in fields.items() if value is not None}
    return replace(manifest, details={**manifest.details, "quantization": fields})


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_manifest_is_read(quantized: Callable[..., Path], precision: str) -> None:
    found = read_quantization(read_manifest(quantized(precision)))
    assert found is not None
    assert (found.weights, found.activations) == (WEIGHTS[precision], ACTIVATIONS[precision])
    assert found.block_size == (BLOCK if precision == "int4" else None)
    assert (len(found.quantized), len(found.kept)) == (12, 2)


def test_a_precision_without_quantization_has_none(fp16: Path) -> None:
    assert read_quantization(read_manifest(fp16)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kept": None},
            r"of the ONNX manifest cannot be read \(KeyError: 'kept'\); export the checkpoint again",
        ),
        ({"scheme": None}, r"cannot be read \(KeyError: 'scheme'\)"),
        ({"scheme": 3}, r"cannot be read \(TypeError: 'int' object is not subscr"),
        ({"scheme": {"precision": "int8"}}, r"cannot be read \(KeyError: 'weights'\)"),
        ({"quantized": []}, "must be of int4 with quantized linears, found .* with 0; export"),
    ],
)
def test_a_manifest_that_does_not_say_it_all_is_refused(
    quantized: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ManifestError, match=message):
        read_quantization(altered(read_manifest(quantized("int4")), **changes))


@pytest.mark.parametrize("wrong", [{"precision": "int8"}, {"weights": "int3"}, {"activations": "x"}])
def test_a_manifest_of_another_scheme_is_refused(
    quantized: Callable[..., Path], wrong: dict[str, str]
) -> None:
    manifest = read_manifest(quantized("int4"))
    scheme = {**manifest.details["quantization"]["scheme"], **wrong}
    with pytest.raises(ManifestError, match=r"must be of int4 with quantized linears, found \{'precision': "):
        read_quantization(altered(manifest, scheme=scheme))


def test_a_quantized_precision_whose_manifest_says_nothing_is_refused(fp16: Path) -> None:
    manifest = read_manifest(fp16)
    with pytest.raises(
        ManifestError, match="no 'quantization' in its details, and its precision is fp8; exp"
    ):
        read_quantization(replace(manifest, contract=replace(manifest.contract, precision="fp8")))


def test_what_the_engine_repeats_is_all_but_the_long_lists(quantized: Callable[..., Path]) -> None:
    found = read_manifest(quantized("int8")).details["quantization"]
    assert set(found) - set(carried(found)) == {"sensitivity", "frontier"}
    assert carried(found)["calibration"] == found["calibration"]


# --- whole networks -------------------------------------------------------------------------------------


def parse(folder: Path) -> dict[str, int]:
    log, manifest = BuilderLog(), read_manifest(folder)
    quantization = read_quantization(manifest)
    path, logger = folder / "model.onnx", make_logger(trt, log)
    return dict(parse_network(trt, path, manifest.contract, logger, log, quantization=quantization).layers)


@pytest.mark.parametrize(("precision", "inputs"), [("int8", 12), ("int8-weight-only", 0), ("fp8", 12)])
def test_a_whole_network_passes(quantized: Callable[..., Path], precision: str, inputs: int) -> None:
    layers = parse(quantized(precision))
    assert layers["MATRIX_MULTIPLY"] == 15
    assert (layers["DEQUANTIZE"], layers.get("QUANTIZE", 0)) == (12 + inputs, inputs)


def test_a_fault_in_a_whole_network_names_the_linear(
    quantized: Callable[..., Path], fp16: Path, tmp_path: Path
) -> None:
    """What a plain float16 graph under an int4 manifest is told."""
    model = onnx.load(fp16 / "model.onnx")
    onnx.save(model, tmp_path / "model.onnx")
    source = read_manifest(quantized("int4"))
    replace(source, files=describe_files(tmp_path, {})).write(tmp_path)
    with pytest.raises(
        BuildError, match=r"layer 0, self_attn.q_proj \(tensor '.*'\): expected INT4 codes .* HALF"
    ):
        build_engine(tmp_path, "a10g", tmp_path.with_name("engine"))


@pytest.mark.parametrize("precision", ["fp16", *PRECISIONS])
def test_profiles_have_room_for_a_second_row_where_codes_would_be_stored_twice(
    fp16: Path, precision: str
) -> None:
    contract = replace(read_manifest(fp16).contract, precision=precision)
    assert contract.max_batch_size == 1
    for one in (contract, replace(contract, max_batch_size=4)):
        most = {name: ranges[2]["B"] for name, ranges in profile_ranges(one).items()}
        decode = 2 if precision != "fp16" and one.max_batch_size == 1 else one.max_batch_size
        assert most == {"decode": decode, "prefill": 2 if precision != "fp16" else 1}
        asked = {name: ranges[:2] for name, ranges in one.profiles().items()}
        assert {name: ranges[:2] for name, ranges in profile_ranges(one).items()} == asked


TARGETS = [("a10g", "int8"), ("a10g", "int8-weight-only"), ("a10g", "int4"), ("l4", "fp8")]


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "precision"), [*TARGETS, ("a100-80", "int8"), ("t4", "int8-weight-only")])
def test_a_real_plan(quantized: Callable[..., Path], tmp_path: Path, gpu: str, precision: str) -> None:
    manifest = build_engine(quantized(precision), gpu, tmp_path / "engine")
    details, source = manifest.details, read_manifest(quantized(precision)).details
    assert details["quantization"] == carried(source["quantization"])
    assert details["plan_bytes"] == manifest.files["model.plan"].bytes
    assert details["predicted"]["weights_bytes"] == source["weights_bytes"]
    assert details["compiled"]["attention_kernels"] == {"decode": 2, "prefill": 2}


def large_linears(precision: str, names: str) -> onnx.ModelProto:
    """Linears of a 7B (4096 → 4096) that read one tensor, large enough that their size shows in a plan."""
    made = [linear(precision, name, "x", f"{name}.out", 4096, 4096) for name in names]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["B", "S", 4096])
        for name in ("x", *(f"{name}.out" for name in names))
    ]
    weights = {tensor.name: tensor for _, tensors in made for tensor in tensors}
    nodes = [node for found, _ in made for node in found]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], list(weights.values()))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def plan_bytes(model: onnx.ModelProto, sm: str, ranges: dict[str, Any]) -> int:
    """Size of the plan of `large_linears` with the profiles' B and S."""
    log = BuilderLog()
    builder = trt.Builder(make_logger(trt, log))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    assert parser.parse(model.SerializeToString()), log.problems
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, sm), 0)
    for sizes in ranges.values():
        profile = builder.create_optimization_profile()
        profile.set_shape("x", *((size["B"], size["S"], 4096) for size in sizes))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, log.problems
    return int(plan.nbytes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "sm", "bits"),
    [("int8", "SM86", 8), ("int8-weight-only", "SM86", 8), ("int4", "SM86", 4), ("fp8", "SM89", 8)],
)
def test_the_plan_of_one_row_holds_each_weight_once(fp16: Path, precision: str, sm: str, bits: int) -> None:
    contract = replace(read_manifest(fp16).contract, precision=precision)
    once, model = 4096 * 4096 * bits // 8, large_linears(precision, "a")
    assert plan_bytes(model, sm, profile_ranges(contract)) < 1.2 * once
    if precision in ("int8", "fp8"):
        assert plan_bytes(model, sm, contract.profiles()) > 1.9 * once  # why `profile_ranges` is there


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "sm", "bits"),
    [("int8", "SM86", 8), ("int8-weight-only", "SM86", 8), ("int4", "SM86", 4), ("fp8", "SM89", 8)],
)
def test_linears_that_read_one_tensor_are_stored_once(fp16: Path, precision: str, sm: str, bits: int) -> None:
    contract = replace(read_manifest(fp16).contract, precision=precision)
    contract = replace(contract, ring=Ring(256, 256), max_batch_size=4)
    once, model = 2 * 4096 * 4096 * bits // 8, large_linears(precision, "ab")
    assert plan_bytes(model, sm, profile_ranges(contract)) < 1.2 * once
    if precision == "fp8":
        assert plan_bytes(model, sm, contract.profiles()) > 1.9 * once  # why `profile_ranges` is there


@pytest.mark.slow
def test_an_int8_linear_does_not_compile_for_a_t4() -> None:
    with pytest.raises(AssertionError, match="FP32 GEMM is not supported"):
        ranges = ({"B": 1, "S": 1}, {"B": 4, "S": 1}, {"B": 4, "S": 1})
        plan_bytes(large_linears("int8", "a"), "SM75", {"decode": ranges})


@pytest.mark.slow
def test_weights_that_are_dequantized_whole_are_counted(
    quantized: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = build_engine(quantized("int8-weight-only"), "t4", tmp_path / "engine")
    assert manifest.details["compiled"]["weights_dequantized"]["decode"] > 0
    assert "the plan dequantizes whole weights in every step ({'decode': " in caplog.text


def test_waste_is_said_only_where_there_is_some(caplog: pytest.LogCaptureFixture) -> None:
    facts = {"ring_copies": {"decode": 0}, "weights_dequantized": {"decode": 0, "prefill": 3}}
    warn_of_waste(Plan("", 1, {"compiled": facts}))
    warn_of_waste(Plan("", 1, {}))
    assert [record.getMessage() for record in caplog.records] == [
        "the plan dequantizes whole weights in every step ({'prefill': 3}), which costs time"
    ]


@pytest.mark.slow
def test_a_plan_larger_than_its_weights_leaves_nothing(
    quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def larger(*arguments: Any, **options: Any) -> Plan:
        return replace(build_plan(*arguments, **options), bytes=50_000_000)

    monkeypatch.setattr(build_module, "build_plan", larger)
    with pytest.raises(
        BuildError, match="the size of its weights, found 0.05 GB: TensorRT stored weights more"
    ):
        build_engine(quantized("int4"), "a10g", tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


# --- refused before a build -----------------------------------------------------------------------------


@pytest.mark.parametrize(("gpu", "precision"), [("a10g", "fp8"), ("t4", "int4"), ("t4", "int8")])
def test_a_gpu_that_cannot_run_it_is_refused_before_a_build(
    quantized: Callable[..., Path], tmp_path: Path, gpu: str, precision: str
) -> None:
    with pytest.raises(GpuError, match=f"cannot run {precision}, which needs compute capability 8"):
        build_engine(quantized(precision), gpu, tmp_path / "engine")


def test_the_prediction_counts_what_is_quantized(
    quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settle_module, "available_memory_bytes", lambda: 500_000_000)
    with pytest.raises(
        BuildError, match=r"\([\d.]+ x .* GB quantized \+ [\d.]+ x .* GB other weights [+-] .* GB\)"
    ):
        build_engine(quantized("int4"), "a10g", tmp_path / "engine", weights="embedded")


def test_a_manifest_without_its_quantization_is_refused_before_a_build(
    fp16: Path, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    source = read_manifest(quantized("int4"))
    details = {name: value for name, value in source.details.items() if name != "quantization"}
    folder = tmp_path / "onnx"
    folder.mkdir()
    (folder / "model.onnx").write_bytes((quantized("int4") / "model.onnx").read_bytes())
    replace(source, details=details).write(folder)
    with pytest.raises(ManifestError, match="no 'quantization' in its details, and its precision is int4"):
        build_engine(folder, "a10g", tmp_path / "engine")


# --- inspect --------------------------------------------------------------------------------------------


def test_inspect_says_how_a_model_was_quantized(quantized: Callable[..., Path]) -> None:
    rows = dict(describe(read_manifest(quantized("int4"))))
    assert rows["quantization"] == (
        "int4 in blocks of 32, inputs float16; 90.0 % of the linears' weights, 2 linears kept in float16"
    )
    assert rows["calibration"] == "A, 16 x 512 tokens of speeches"
    rows = dict(describe(altered(read_manifest(quantized("fp8")), calibration=None)))
    assert rows["quantization"].startswith("float8_e4m3fn, inputs float8_e4m3fn; 90.0 %")
    assert "calibration" not in rows


def test_inspect_says_what_became_of_the_weights(fp16: Path) -> None:
    manifest = read_manifest(fp16)
    plain = {**manifest.details, "linked": [], "lora": []}
    rows = dict(describe(replace(manifest, details=plain)))
    assert rows["hazards"].startswith("in float16: ")
    assert not {"quantization", "calibration", "linked", "lora"} & set(rows)
    details = {
        "linked": ["a.safetensors", "b.safetensors"],
        "hazards": {"dtype": "float16", "subnormal": 1200, "flushed_to_zero": 3, "worst": "w"},
        "lora": [{"name": "law", "scale": 1.0}, {"name": "tone", "scale": 0.5}],
    }
    rows = dict(describe(replace(manifest, details=details)))
    assert rows["linked"] == "a.safetensors, b.safetensors of the checkpoint"
    assert rows["hazards"] == "in float16: 1,200 subnormal, 3 flushed to zero, most in w"
    assert rows["lora"] == "law x 1, tone x 0.5"
    clean = {"hazards": {"dtype": "float16", "subnormal": 0, "flushed_to_zero": 0, "worst": None}}
    rows = dict(describe(replace(manifest, details=clean)))
    assert rows["hazards"] == "in float16: 0 subnormal, 0 flushed to zero"
