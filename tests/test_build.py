"""Engine builds: the strict log, the checks before a build with proof that each can fail, real plans."""

import hashlib
import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import onnx
import pytest
from onnx import TensorProto, helper

from mistral_trt import __version__
from mistral_trt.contract import GraphContract, Ring
from mistral_trt.engines import build as build_module
from mistral_trt.engines import build_key as key_module
from mistral_trt.engines import targets as targets_module
from mistral_trt.engines.__main__ import build as build_command
from mistral_trt.engines.build import build_engine
from mistral_trt.engines.build_key import BUILD_VERSION
from mistral_trt.engines.build_log import ALLOWED_WARNINGS, AllowedWarning, BuilderLog
from mistral_trt.engines.builder import plan as plan_module
from mistral_trt.engines.builder.callbacks import PhaseTree, PlanSink, make_logger, only_build
from mistral_trt.engines.builder.compiled import compiled_summary
from mistral_trt.engines.builder.plan import (
    Plan,
    build_plan,
    builder_config,
    interruptible,
    require_clean,
)
from mistral_trt.engines.engine_cache import EngineCache
from mistral_trt.engines.flavor import RTX, Flavor
from mistral_trt.engines.gpu import find_gpu
from mistral_trt.engines.network import audit as audit_module
from mistral_trt.engines.network import parse as parse_module
from mistral_trt.engines.network.audit import AuditReport, attentions, audit
from mistral_trt.engines.network.parse import (
    ParsedNetwork,
    add_profiles,
    attend_ring_itself,
    check_operators,
    one_line,
    parse_network,
)
from mistral_trt.engines.planning import settle as settle_module
from mistral_trt.engines.planning.build_memory import BUILD_MEMORY, BuildMemory
from mistral_trt.engines.planning.dry_run import dry_run
from mistral_trt.engines.planning.settle import predict_budget
from mistral_trt.engines.targets import TargetSet
from mistral_trt.errors import ArtifactError, BuildError, ManifestError
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.inspect import describe
from mistral_trt.manifest import Manifest, manifest_sha256, read_manifest, sha256_file
from mistral_trt.weight_index import EMBEDDED
from tests.conftest import Folder
from tests.models import write_checkpoint, write_tokenizer

trt = pytest.importorskip("tensorrt_rtx")

pytestmark = pytest.mark.usefixtures("one_trace")

Mutation = Callable[[onnx.ModelProto], None]
A10G, L4 = (TargetSet((find_gpu(key),)) for key in ("a10g", "l4"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """precision → ONNX folder of a tiny model with the demo model's heads (9 of 64, 3 of them kept)."""
    root = tmp_path_factory.mktemp("build")
    checkpoint = write_checkpoint(
        root / "checkpoint", hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64
    )
    write_tokenizer(checkpoint)

    def folder(precision: str) -> Path:
        path = root / precision
        if not path.exists():
            export_checkpoint(checkpoint, path, precision=precision, prefill_chunk=4, max_batch_size=2)
        return path

    return folder


@pytest.fixture(scope="module")
def fp16(folders: Callable[[str], Path]) -> Path:
    return folders("fp16")


@pytest.fixture(scope="module")
def contract(fp16: Path) -> GraphContract:
    return read_manifest(fp16).contract


@pytest.fixture
def mutated(fp16: Path, tmp_path: Path) -> Callable[[Mutation], Path]:
    """Change the graph of the ONNX folder and give the path of the changed file."""

    def mutate(mutation: Mutation) -> Path:
        model = onnx.load(fp16 / "model.onnx")  # weights and all, so that it can stand alone
        mutation(model)
        onnx.save(model, tmp_path / "mutated.onnx")
        return tmp_path / "mutated.onnx"

    return mutate


def parse(path: Path, contract: GraphContract) -> ParsedNetwork:
    log = BuilderLog()
    return parse_network(trt, path, contract, make_logger(trt, log), log)


def nodes(model: onnx.ModelProto, operator: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == operator]


# --- what the graph must be -----------------------------------------------------------------------------


def test_the_exported_graph_passes_and_its_layers_are_counted(fp16: Path, contract: GraphContract) -> None:
    parsed = parse(fp16 / "model.onnx", contract)
    assert parsed.layers["KV_CACHE_UPDATE"] == 4
    assert parsed.layers["ATTENTION_INPUT"] == 2
    assert parsed.layers["ROTARY_EMBEDDING"] == 4


def test_attention_reads_the_ring_and_not_a_product_of_it(fp16: Path, contract: GraphContract) -> None:
    parsed = parse(fp16 / "model.onnx", contract)
    keys = [attention.get_input(1).name for attention in attentions(trt, parsed.network)]
    assert keys == ["present.0.key", "present.1.key"]


def add_ignored_lengths(model: onnx.ModelProto) -> None:
    """`nonpad_kv_seqlen`, from an initializer: TensorRT drops it without a single line of log."""
    model.graph.initializer.append(helper.make_tensor("lengths", TensorProto.INT64, [1], [3]))
    nodes(model, "Attention")[1].input.extend(["", "", "lengths"])


def drop_mask(model: onnx.ModelProto) -> None:
    del nodes(model, "Attention")[0].input[3]


def add_causality(model: onnx.ModelProto) -> None:
    nodes(model, "Attention")[0].attribute.append(helper.make_attribute("is_causal", 1))


def halve_scale(model: onnx.ModelProto) -> None:
    next(a for a in nodes(model, "Attention")[0].attribute if a.name == "scale").f = 0.5


def make_circular(model: onnx.ModelProto) -> None:
    next(a for a in nodes(model, "TensorScatter")[1].attribute if a.name == "mode").s = b"circular"


@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        (
            add_ignored_lengths,
            r"layer 1, self_attn \(node 'model.layers.1.self_attn/Attention'\): Attention must have its "
            r"first 4 inputs and no other, found inputs \[0, 1, 2, 3, 6\]; TensorRT would ignore the rest",
        ),
        (drop_mask, r"layers.0.self_attn/Attention'\): .* found inputs \[0, 1, 2\]"),
        (add_causality, r"layers.0.self_attn/Attention'\): Attention with is_causal = 1 is not what"),
        (halve_scale, r"layers.0.self_attn/Attention'\): Attention with scale = 0.5 is not what"),
        (
            make_circular,
            r"layers.0.self_attn/TensorScatter_1'\): TensorScatter with mode = b'circular' is not what",
        ),
    ],
)
def test_an_operator_in_another_form_is_refused(
    mutated: Callable[[Mutation], Path], contract: GraphContract, mutation: Mutation, message: str
) -> None:
    with pytest.raises(BuildError, match=message):
        parse(mutated(mutation), contract)


@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        (
            add_causality,
            r"cannot read .*: layer 0, self_attn \(node 'model.layers.0.self_attn/Attention'\): Attention: .*"
            "Option mask cannot be used",
        ),
        (
            make_circular,
            r"layer 0, self_attn \(node 'model.layers.0.self_attn/TensorScatter_1'\): .*Only linear mode is",
        ),
    ],
)
def test_a_graph_tensorrt_refuses_names_the_node(
    mutated: Callable[[Mutation], Path],
    contract: GraphContract,
    monkeypatch: pytest.MonkeyPatch,
    mutation: Mutation,
    message: str,
) -> None:
    monkeypatch.setattr(parse_module, "check_operators", lambda path: None)
    with pytest.raises(BuildError, match=message) as error:
        parse(mutated(mutation), contract)
    assert "\n" not in str(error.value)
    assert "cudaError" not in str(error.value)


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path, contract: GraphContract) -> None:
    onnx.save(helper.make_model(helper.make_graph([], "empty", [], [])), tmp_path / "empty.onnx")
    with pytest.raises(BuildError, match=r"network input: expected|must have 7 inputs, found 0|cannot read"):
        parse(tmp_path / "empty.onnx", contract)


def cross_rings(model: onnx.ModelProto) -> None:
    """Layer 0 writes layer 1's ring and the other way round; TensorRT builds it without complaint."""
    first, second = nodes(model, "TensorScatter")[0::2]
    first.input[0], second.input[0] = second.input[0], first.input[0]


def write_a_copy(model: onnx.ModelProto) -> None:
    """The first ring is written after a copy, so the write is not in place."""
    scatter = nodes(model, "TensorScatter")[0]
    copy = helper.make_node("Identity", [scatter.input[0]], ["copy"], name="copy")
    scatter.input[0] = "copy"
    model.graph.node.insert(0, copy)


def present_is_not_the_write(model: onnx.ModelProto) -> None:
    """`present.0.key` is computed from the written ring instead of being it."""
    scatter = nodes(model, "TensorScatter")[0]
    scatter.output[0] = "written"
    model.graph.node.append(helper.make_node("Add", ["written", "written"], ["present.0.key"], name="twice"))
    for node in nodes(model, "Attention"):
        node.input[1] = node.input[1].replace("present.0.key", "written")


def attend_the_other_layer(model: onnx.ModelProto) -> None:
    first, second = nodes(model, "Attention")
    first.input[1] = "present.0.value"
    assert second.input[1] == "present.1.key"


def attend_the_keys_as_values(model: onnx.ModelProto) -> None:
    nodes(model, "Attention")[1].input[2] = "present.1.key"


def add_unused_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("extra", TensorProto.FLOAT, [1]))


def rename_logits(model: onnx.ModelProto) -> None:
    model.graph.node[-1].output[0] = model.graph.output[0].name = "scores"


def remove_an_attention(model: onnx.ModelProto) -> None:
    attention = nodes(model, "Attention")[1]
    index = list(model.graph.node).index(attention)
    copy = helper.make_node("Identity", [attention.input[0]], [attention.output[0]], name="gone")
    del model.graph.node[index]
    model.graph.node.insert(index, copy)


def remove_a_write(model: onnx.ModelProto) -> None:
    """The last ring goes through untouched."""
    scatter = nodes(model, "TensorScatter")[3]
    index = list(model.graph.node).index(scatter)
    copy = helper.make_node("Identity", [scatter.input[0]], [scatter.output[0]], name="gone")
    del model.graph.node[index]
    model.graph.node.insert(index, copy)


@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        (
            cross_rings,
            r"layer 0, key ring \(tensor 'past_key_values.0.key'\): ring write: expected "
            "past_key_values.0.key -> present.0.key, found .*0.key -> present.1",
        ),
        (
            write_a_copy,
            "ring write: expected past_key_values.0.key -> present.0.key, found copy -> present.0.key",
        ),
        (
            present_is_not_the_write,
            r"layers.0.self_attn/Attention'\): expected the keys to be 'present.0.key'",
        ),
        (
            attend_the_other_layer,
            r"layers.0.self_attn/Attention'\): expected the keys to be 'present.0.key', found",
        ),
        (
            attend_the_keys_as_values,
            r"layers.1.self_attn/Attention'\): expected to attend present.1.value, found",
        ),
        (add_unused_input, r"must have 7 inputs, found 8; not in the contract: \['extra'\]"),
        (rename_logits, r"network output: expected \('logits', 'FLOAT', .*, found \('scores'"),
        (remove_an_attention, "the network must hold 2 attentions, found 1"),
        (remove_a_write, "the network must write 4 rings, found 3 writes"),
    ],
)
def test_a_network_that_is_not_the_contracts_is_refused(
    mutated: Callable[[Mutation], Path], contract: GraphContract, mutation: Mutation, message: str
) -> None:
    with pytest.raises(BuildError, match=message):
        parse(mutated(mutation), contract)


def test_a_graph_of_another_contract_is_refused(fp16: Path, contract: GraphContract) -> None:
    other = replace(contract, ring=Ring(contract.ring.sliding_window, 2))
    with pytest.raises(
        BuildError, match=r"network input: expected \('past_key_values.0.key', 'HALF', .*10, 64"
    ):
        parse(fp16 / "model.onnx", other)
    with pytest.raises(BuildError, match=r"expected \('past_key_values.0.key', 'BF16', .*found .*'HALF'"):
        parse(fp16 / "model.onnx", replace(contract, precision="bf16"))


def test_an_attention_that_may_be_decomposed_is_refused(fp16: Path, contract: GraphContract) -> None:
    parsed = parse(fp16 / "model.onnx", contract)
    attentions(trt, parsed.network)[1].decomposable = True
    with pytest.raises(BuildError, match=r"layers.1.self_attn/Attention'\): may be decomposed"):
        audit(trt, parsed.network, contract)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, "has no mask"),
        ({"causal_kind": trt.CausalMaskKind.UPPER_LEFT}, "has a causal mask"),
        ({"norm_op": trt.AttentionNormalizationOp.NONE}, "does not normalise with a softmax"),
        ({"key_value_lengths": object()}, "has key_value_lengths"),
        ({"query_lengths": object()}, "has query_lengths"),
    ],
)
def test_each_fault_of_an_attention_is_found(change: dict[str, Any], message: str) -> None:
    sound = {
        "decomposable": False,
        "mask": object(),
        "causal_kind": trt.CausalMaskKind.NONE,
        "norm_op": trt.AttentionNormalizationOp.SOFTMAX,
        "key_value_lengths": None,
        "query_lengths": None,
    }
    faults = audit_module.attention_faults(trt, SimpleNamespace(**{**sound, **change}))
    assert [what for wrong, what in faults if wrong] == [
        what for _, what in faults if what.startswith(message)
    ]
    assert not any(wrong for wrong, _ in audit_module.attention_faults(trt, SimpleNamespace(**sound)))


def test_a_ring_tensorrt_does_not_take_as_keys(
    contract: GraphContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = SimpleNamespace(name="present.0.key")
    product = SimpleNamespace(get_input=lambda index: ring)
    attention = SimpleNamespace(
        name="a",
        get_input=lambda index: SimpleNamespace(name="product"),
        set_input=lambda index, tensor: False,
    )
    monkeypatch.setattr(parse_module, "attentions", lambda trt, network: [attention])
    monkeypatch.setattr(parse_module, "_producers", lambda network: {"product": product})
    monkeypatch.setattr(parse_module, "_is_product", lambda trt, layer: True)
    with pytest.raises(BuildError, match=r"a: TensorRT does not take 'present.0.key' as keys"):
        attend_ring_itself(trt, None, contract)


def test_profiles_are_the_contracts_in_its_order(fp16: Path, contract: GraphContract) -> None:
    parsed = parse(fp16 / "model.onnx", contract)
    config = builder_config(trt, parsed.builder, contract, L4, RTX)
    assert config.num_optimization_profiles == 2
    assert config.get_compute_capability(0) == trt.ComputeCapability.SM89


def test_a_refused_profile_is_named(contract: GraphContract) -> None:
    builder = SimpleNamespace(
        create_optimization_profile=lambda: SimpleNamespace(set_shape=lambda *shapes: None)
    )
    config = SimpleNamespace(add_optimization_profile=lambda profile: -1)
    with pytest.raises(BuildError, match="TensorRT refuses the optimization profile 'decode'"):
        add_profiles(builder, config, contract)


def test_a_target_the_builder_does_not_know(contract: GraphContract, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "add_profiles", lambda builder, config, contract: None)
    config = SimpleNamespace(set_compute_capability=lambda capability, index: False)
    builder = SimpleNamespace(create_builder_config=lambda: config)
    with pytest.raises(BuildError, match=r"tensorrt-rtx .* does not take SM86 as a target"):
        builder_config(trt, builder, contract, A10G, RTX)


# --- what TensorRT says while it builds -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("severity", "message", "problem"),
    [
        ("ERROR", "anything", True),
        ("INTERNAL_ERROR", "anything", True),
        ("WARNING", "Unused Input: lengths", True),
        ("VERBOSE", "Unused Input: lengths", True),
        ("WARNING", "anything", True),
        ("WARNING", "ModelImporter.cpp:1071: Make sure input input_ids has Int64 binding.", False),
        ("INFO", "anything", False),
        ("VERBOSE", "Disabling unused tactic source: JIT_CONVOLUTIONS", False),
    ],
)
def test_which_lines_fail_a_build(severity: str, message: str, problem: bool) -> None:
    log = BuilderLog()
    log.add(severity, message)
    assert bool(log.problems) == problem
    if problem:
        with pytest.raises(BuildError, match=f"did not build cleanly: {message}"):
            require_clean(True, log, PlanSink(io.BytesIO(), threading.Event()))


@pytest.mark.parametrize("known", ALLOWED_WARNINGS)
def test_a_warning_that_is_let_through_has_a_reason(known: AllowedWarning) -> None:
    assert len(known.reason) > 20
    for message in ("", "something odd", "Detected subnormal FP16 values"):
        assert not re.search(known.pattern, message)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("ModelImporter.cpp:1071: Make sure input input_ids has Int64 binding.", False),
        (
            "UNSUPPORTED_STATE: Skipping tactic 33 due to insufficient memory on requested size of 629145600 "
            "detected for tactic 0xa5a46bfbd719d757.",
            True,
        ),
        ("Tactic Device request: 600MB Available: 302MB. Device memory is insufficient to use tactic.", True),
        ("CUDA lazy loading is not enabled. Enabling it can significantly reduce device memory usage.", True),
    ],
)
def test_warnings_that_depend_on_the_machine_are_said_and_fail_no_build(
    message: str, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    log = BuilderLog()
    log.add("WARNING", message)
    assert log.problems == []
    assert [record.getMessage() for record in caplog.records] == ([f"TensorRT: {message}"] if said else [])


def test_any_other_warning_fails_a_build_and_says_which() -> None:
    log = BuilderLog()
    log.add("WARNING", "model.layers.3.self_attn/Attention: something odd")
    message = (
        r"did not build cleanly: layer 3, self_attn \(node 'model.layers.3.self_attn/Attention'\): something "
        r"odd \(a warning that is not known to be harmless\)"
    )
    with pytest.raises(BuildError, match=message):
        require_clean(True, log, PlanSink(io.BytesIO(), threading.Event()))


def test_no_plan_and_no_reason() -> None:
    with pytest.raises(BuildError, match="TensorRT built no plan and gave no reason"):
        require_clean(False, BuilderLog(), PlanSink(io.BytesIO(), threading.Event()))


def test_a_message_becomes_one_line() -> None:
    driver = "[checkMacros.cpp::catchCudaError::250] (cudaError 35: driver)"
    assert one_line(f"first\n  second\n\n{driver}") == "first; second"
    assert one_line(driver) == driver


def test_progress_follows_the_phases_and_never_falls() -> None:
    steps: list[int] = []
    phases = PhaseTree(steps.append)
    phases.start("build", None, 2)
    phases.start("inner", "build", 2)
    phases.step("inner")
    assert sum(steps) == 25
    phases.step("inner")
    phases.end("inner")
    phases.step("build")
    assert sum(steps) == 50
    phases.start("inner", "build", 4)
    phases.step("inner")
    assert sum(steps) == 62
    phases.step("never started")
    phases.end("inner")
    phases.step("build")
    assert sum(steps) == 99  # the plan is still to be written
    phases.finish()
    assert sum(steps) == 100
    assert min(steps) > 0


def test_the_sink_hashes_what_it_writes(tmp_path: Path) -> None:
    with (tmp_path / "plan").open("wb") as file:
        sink = PlanSink(file, threading.Event())
        assert [sink.write(b"abc"), sink.write(b"defg")] == [3, 4]
    assert (sink.digest.hexdigest(), sink.bytes) == (sha256_file(tmp_path / "plan"), 7)


def test_the_sink_stops_when_cancelled_or_full(tmp_path: Path) -> None:
    cancel = threading.Event()
    with (tmp_path / "plan").open("wb") as file:
        sink = PlanSink(file, cancel)
        cancel.set()
        assert sink.write(b"abc") == 0
    with Path("/dev/full").open("wb", buffering=0) as file:
        sink = PlanSink(file, threading.Event())
        assert [sink.write(b"abc"), sink.write(b"abc")] == [0, 0]
    with pytest.raises(OSError, match="No space left"):
        require_clean(False, BuilderLog(), sink)


def kernel(name: str, inputs: list[str], outputs: list[str]) -> str:
    def tensors(names: list[str]) -> str:
        return ", ".join(f"{{ Name: {n}, Dimensions: [-1,3], Strides: [3,1] }}" for n in names)

    return (
        f"Name: {name}, LayerType: kgen, Inputs: [ {tensors(inputs)}], Constants: [], "
        f"Outputs: [ {tensors(outputs)}], TacticName: t, StreamId: 0, Metadata: "
    )


def test_the_report_of_a_compiled_plan(contract: GraphContract) -> None:
    lines = [
        kernel("_gemv_mha_v1_myl0_5", ["present.0.key", "q"], ["o"]),
        kernel("__myl_Move_myl0_3", ["past_key_values.0.key"], ["present.0.key"]),
        kernel("__myl_Move_myl1_3", ["past_key_values.1.value [profile 1]"], ["present.1.value [profile 1]"]),
        kernel(
            "__myl_Scat_myl1_4", ["past_key_values.0.key [profile 1]", "k"], ["present.0.key [profile 1]"]
        ),
        kernel("__myl_Move_myl1_5", ["past_key_values.0.key [profile 1]"], ["present.0.value [profile 1]"]),
        kernel("a kernel of no profile", [], []),
    ]
    verbose = [
        "Layers:\n" + "\n".join(lines) + "\n\nBindings: ",
        "Total Activation Memory: 100 bytes",
        "Total Activation Memory: 200 bytes",
    ]
    assert compiled_summary(verbose, contract) == {
        "kernels": {"decode": 2, "prefill": 3},
        "attention_kernels": {"decode": 1, "prefill": 0},
        "ring_copies": {"decode": 1, "prefill": 1},
        "activation_bytes": {"decode": 100, "prefill": 200},
    }
    assert compiled_summary(["something else"], contract) == {}


def test_the_report_of_a_quantized_plan_counts_weights_dequantized_whole(contract: GraphContract) -> None:
    codes = "Constants: [ { Name: c, Dimensions: [3,4], Datatype: Int8, Format: x }], "
    lines = [
        kernel("__myl_CastMul_myl0_0", [], ["numbers"]).replace("Constants: [], ", codes),
        kernel("node_myl0_1", ["x"], ["y"]).replace("Constants: [], ", codes),
        kernel("__myl_CastMul_myl1_0", [], ["numbers"]),
    ]
    verbose = ["Layers:\n" + "\n".join(lines)]
    summary = compiled_summary(verbose, replace(contract, precision="int8-weight-only"))
    assert summary["weights_dequantized"] == {"decode": 1, "prefill": 0}
    assert "weights_dequantized" not in compiled_summary(verbose, contract)


# --- real builds ----------------------------------------------------------------------------------------


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def check_engine(folder: Path, onnx_dir: Path) -> Manifest:
    """Read an engine folder back and check it against the ONNX folder it was made from."""
    manifest, source = read_manifest(folder, "engine"), read_manifest(onnx_dir, "onnx")
    assert set(manifest.files) == {
        "model.plan",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert manifest.sources == {"onnx": manifest_sha256(onnx_dir), **source.sources}
    assert manifest.contract == source.contract
    assert manifest.files["tokenizer.json"] == source.files["tokenizer.json"]
    assert manifest.details["generation"] == source.details["generation"]
    assert manifest.details["graph_sha256"] == source.details["graph_sha256"]
    assert manifest.details["network_layers"]["KV_CACHE_UPDATE"] == 4
    assert manifest.files["model.plan"].bytes > manifest.details["predicted"]["weights_bytes"]
    assert manifest.files["model.plan"].bytes == manifest.details["plan_bytes"]
    assert "quantization" not in manifest.details
    return manifest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "precision"), [("a10g", "fp16"), ("a10g", "bf16"), ("l4", "bf16"), ("t4", "fp16")]
)
def test_a_real_plan(folders: Callable[[str], Path], tmp_path: Path, gpu: str, precision: str) -> None:
    onnx_dir, out = folders(precision), tmp_path / "engine"
    assert build_engine(onnx_dir, gpu, out) == check_engine(out, onnx_dir)
    assert leftovers(tmp_path) == ["engine"]


@pytest.mark.slow
def test_what_the_manifest_of_a_real_plan_says(fp16: Path, tmp_path: Path) -> None:
    details = build_engine(fp16, "NVIDIA A10G", tmp_path / "engine", flavor="tensorrt-rtx").details
    assert (details["gpus"], details["gpu_name"]) == (["a10g"], "NVIDIA A10G")
    assert (details["compute_capabilities"], details["flavor"]) == (["8.6"], "tensorrt-rtx")
    assert (details["tensorrt"], details["weights"]) == (trt.__version__, "embedded")
    compiled = details["compiled"]
    assert compiled["attention_kernels"] == {"decode": 2, "prefill": 2}
    assert compiled["ring_copies"] == {"decode": 0, "prefill": 0}


@pytest.mark.slow
def test_one_plan_for_two_gpus(fp16: Path, tmp_path: Path) -> None:
    made = build_engine(fp16, "l4,a10g", tmp_path / "engine")
    assert made == check_engine(tmp_path / "engine", fp16)
    details = made.details
    assert (details["gpus"], details["compute_capabilities"]) == (["a10g", "l4"], ["8.6", "8.9"])
    assert details["gpu_name"] == "NVIDIA A10G, NVIDIA L4"
    assert set(details["predicted"]["ceilings"]) == {"a10g", "l4"}
    assert details["compiled"]["attention_kernels"] == {"decode": 2, "prefill": 2}
    assert details["compiled"]["ring_copies"] == {"decode": 0, "prefill": 0}
    rows = dict(describe(made))
    assert (rows["gpu name"], rows["compute capabilities"]) == ("NVIDIA A10G, NVIDIA L4", "8.6, 8.9")


@pytest.mark.slow
def test_two_builds_differ_in_nothing_but_the_plans_hash(fp16: Path, tmp_path: Path) -> None:
    """TensorRT orders some lists of its plan by memory address: hashes differ, sizes do not."""
    first, second = (build_engine(fp16, "l4", tmp_path / name) for name in "ab")
    assert first.details == second.details
    assert first.files["model.plan"].bytes == second.files["model.plan"].bytes


@pytest.mark.slow
def test_without_the_rewiring_every_layer_copies_its_key_ring(
    fp16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(parse_module, "attend_ring_itself", lambda trt, network, contract: None)
    monkeypatch.setattr(parse_module, "audit", lambda *network: AuditReport())
    manifest = build_engine(fp16, "a10g", tmp_path / "engine")
    assert manifest.details["compiled"]["ring_copies"] == {"decode": 2, "prefill": 2}
    assert "the plan copies whole rings in every step" in caplog.text


@pytest.mark.slow
def test_heads_of_128_build_too(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", hidden_size=256, head_dim=128, num_attention_heads=4
    )
    export_checkpoint(checkpoint, tmp_path / "onnx", precision="fp16", prefill_chunk=4)
    build_engine(tmp_path / "onnx", "l4", tmp_path / "engine")
    read_manifest(tmp_path / "engine", "engine")


@pytest.mark.slow
def test_an_input_that_tensorrt_ignores_fails_the_build(
    mutated: Callable[[Mutation], Path],
    contract: GraphContract,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(parse_module, "audit", lambda *network: AuditReport())
    with (
        (tmp_path / "plan").open("wb") as file,
        pytest.raises(BuildError, match="cleanly: Unused Input: extra"),
    ):
        build_plan(trt, mutated(add_unused_input), contract, A10G, RTX, file)


@pytest.mark.slow
def test_a_failed_build_leaves_nothing(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets_module, "check_precision", lambda *_: None)
    with pytest.raises(BuildError, match=r"did not build cleanly: .*sm75, because the model contains .*b16"):
        build_engine(folders("bf16"), "t4", tmp_path / "engine")
    with pytest.raises(BuildError, match="Attention operation was not supported by a dedicated kernel"):
        build_engine(folders("fp32"), "a10g", tmp_path / "engine")
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_a_full_disk_is_reported_as_such(fp16: Path, contract: GraphContract) -> None:
    with Path("/dev/full").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        build_plan(trt, fp16 / "model.onnx", contract, A10G, RTX, file)


@pytest.mark.slow
def test_two_builds_in_one_process_take_turns(
    folders: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mistral_trt")
    with ThreadPoolExecutor(2) as pool:
        made = [
            pool.submit(build_engine, folders(precision), "l4", tmp_path / precision)
            for precision in ("fp16", "bf16")
        ]
    for precision, build in zip(("fp16", "bf16"), made, strict=True):
        assert build.result() == check_engine(tmp_path / precision, folders(precision))
        assert build.result().details["compiled"]["attention_kernels"] == {"decode": 2, "prefill": 2}
    assert "waiting until another build in this process has ended" in caplog.text


@pytest.mark.slow
def test_two_builds_in_two_processes_do_not_meet(fp16: Path, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from mistral_trt.engines.build import build_engine; "
    code += "build_engine(Path(sys.argv[1]), 'a10g', Path(sys.argv[2]))"
    commands = [[sys.executable, "-c", code, str(fp16), str(tmp_path / name)] for name in "ab"]
    for process in [subprocess.Popen(command) for command in commands]:
        assert process.wait(120) == 0
    for name in "ab":
        check_engine(tmp_path / name, fp16)


@pytest.mark.slow
def test_a_build_after_one_that_failed_has_tensorrts_logger(
    folders: Callable[[str], Path], fp16: Path, contract: GraphContract, tmp_path: Path
) -> None:
    """A caught error keeps the failed build's builder alive, and with it TensorRT's idea of the logger."""
    wrong = read_manifest(folders("fp32")).contract
    with pytest.raises(BuildError) as error:
        build_plan(trt, folders("fp32") / "model.onnx", wrong, A10G, RTX, io.BytesIO())
    plan = build_plan(trt, fp16 / "model.onnx", contract, A10G, RTX, io.BytesIO())
    assert plan.details["network_layers"]["ATTENTION_INPUT"] == 2
    assert error.traceback  # still held


def test_every_build_has_the_same_logger_and_its_own_log() -> None:
    first, second = BuilderLog(), BuilderLog()
    with only_build(trt, first) as logger:
        logger.log(trt.ILogger.ERROR, "of the first")
    with only_build(trt, second) as other:
        other.log(trt.ILogger.ERROR, "of the second")
    assert other is logger
    assert (first.problems, second.problems) == (["of the first"], ["of the second"])


def test_what_tensorrt_says_outside_of_a_build_is_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    with only_build(trt, BuilderLog()) as logger:
        pass
    logger.log(trt.ILogger.ERROR, "too late")
    logger.log(trt.ILogger.INFO, "never mind")
    assert [record.getMessage() for record in caplog.records] == ["TensorRT, outside of a build: too late"]


def test_another_logger_would_be_noticed() -> None:
    """Why there is one logger: TensorRT warns of a second, and that warning fails the build."""
    log = BuilderLog()

    class Other(trt.ILogger):  # type: ignore[misc,name-defined]  # known at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.add(severity.name, message)

    other = Other()
    with only_build(trt, BuilderLog()) as logger:
        builders = [trt.Builder(logger), trt.Builder(other)]
    assert len(builders) == 2
    assert "logger passed into createInferBuilder differs" in log.problems[0]


@pytest.fixture
def interrupts() -> Iterator[Callable[[int], None]]:
    """press(times): Ctrl-C as often, each taken by the main thread before the next."""
    # A shell starts what it puts into the background with SIGINT ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def press(times: int) -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    yield press
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("times", [1, 2, 4])
def test_a_build_is_waited_for_however_often_ctrl_c_is_pressed(
    interrupts: Callable[[int], None], caplog: pytest.LogCaptureFixture, times: int
) -> None:
    """Its file must not be closed, and its folder not removed, while TensorRT still writes."""
    caplog.set_level(logging.INFO, "mistral_trt")
    cancel, ended = threading.Event(), threading.Event()

    def work() -> str:
        for count in range(1, times + 1):
            os.kill(os.getpid(), signal.SIGINT)
            patience = time.monotonic() + 60
            while len(caplog.records) < count and time.monotonic() < patience:
                time.sleep(0.01)
        assert cancel.is_set()
        ended.set()
        return "a plan that came too late"

    with pytest.raises(KeyboardInterrupt):
        interruptible(work, cancel)
    assert ended.is_set() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "stopping the build at its next step" and len(said) == times
    assert all("ends only between its steps" in line for line in said[1:])


def test_an_interrupted_build_that_fails_is_an_interrupted_build(
    interrupts: Callable[[int], None],
) -> None:
    def work() -> None:
        interrupts(2)
        raise BuildError("TensorRT built no plan and gave no reason")

    with pytest.raises(KeyboardInterrupt):
        interruptible(work, threading.Event())


def test_ctrl_c_held_down_is_taken_once(interrupts: Callable[[int], None]) -> None:
    def work() -> None:
        for _ in range(300):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        interruptible(work, threading.Event())


def test_a_programs_own_meaning_of_ctrl_c_is_left_to_it(interrupts: Callable[[int], None]) -> None:
    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    cancel = threading.Event()

    def work() -> None:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        assert cancel.wait(20)

    signal.signal(signal.SIGINT, stop)
    try:
        with pytest.raises(Stop):
            interruptible(work, cancel)
        assert signal.getsignal(signal.SIGINT) is stop
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_build_that_nobody_interrupts_gives_its_result_or_its_error() -> None:
    assert interruptible(lambda: 3, threading.Event()) == 3

    def fail() -> None:
        raise BuildError("why")

    with pytest.raises(BuildError, match="why"):
        interruptible(fail, threading.Event())


def test_a_sink_whose_file_is_closed_stops_and_raises_nothing_into_tensorrt(tmp_path: Path) -> None:
    with (tmp_path / "plan").open("wb") as file:
        sink = PlanSink(file, threading.Event())
    assert [sink.write(b"abc"), sink.write(b"abc"), sink.bytes] == [0, 0, 0]
    with pytest.raises(ValueError, match="closed file"):
        require_clean(False, BuilderLog(), sink)


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 3])
def test_ctrl_c_ends_a_build_cleanly(
    fp16: Path,
    tmp_path: Path,
    interrupts: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    times: int,
) -> None:
    """Pressed at the first step of TensorRT's build, from inside its callback."""
    caplog.set_level(logging.INFO, "mistral_trt")
    pressed, step = threading.Event(), PhaseTree.step

    def press(phases: PhaseTree, name: str) -> None:
        if not pressed.is_set():
            pressed.set()
            interrupts(times)
        step(phases, name)

    monkeypatch.setattr(PhaseTree, "step", press)
    with pytest.raises(KeyboardInterrupt):
        build_engine(fp16, "a10g", tmp_path / "engine")
    assert pressed.is_set()
    assert "stopping the build" in caplog.text
    assert leftovers(tmp_path) == []


INTERRUPTED_TWICE = """
import os, signal, sys, time
from mistral_trt.cli import main
from mistral_trt.engines.builder.callbacks import PhaseTree, PlanSink
signal.signal(signal.SIGINT, signal.default_int_handler)
write = PlanSink.write

def press(sink, data):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
    return write(sink, data)

PlanSink.write = press
sys.exit(main(["build", sys.argv[1], "--gpu", "a10g", "--out", sys.argv[2], "--no-cache"]))
"""


@pytest.mark.slow
def test_a_command_that_is_interrupted_twice_while_the_plan_is_written_shows_no_traceback(
    fp16: Path, tmp_path: Path
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_TWICE, str(fp16), str(tmp_path / "engine")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr and "ValueError" not in ended.stderr
    assert ended.stderr.endswith("mistral-trt build: interrupted; nothing was left half-written\n")
    assert leftovers(tmp_path) == []


# --- the cache ------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tiny_checkpoint: Folder, untraced: None, tmp_path: Path) -> Path:
    """An ONNX folder whose graph has weights and no node: enough for builds that are stood in for."""
    folder = tmp_path / "onnx"
    export_checkpoint(tiny_checkpoint(), folder, precision="fp16", prefill_chunk=4, max_batch_size=2)
    return folder


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The targets of each build that TensorRT is asked for; its plan is made up, another every time."""
    made: list[str] = []

    def stand_in(
        trt: Any,
        onnx: Path,
        contract: GraphContract,
        targets: TargetSet,
        flavor: Flavor,
        file: BinaryIO,
        **settings: Any,
    ) -> Plan:
        made.append(targets.name)
        plan = f"plan {len(made)}".encode()
        file.write(plan)
        details = {"network_layers": {"build": len(made)}, "audit": [], "compiled": {}}
        return Plan(hashlib.sha256(plan).hexdigest(), len(plan), details)

    monkeypatch.setattr(build_module, "build_plan", stand_in)
    return made


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache")


def plan_of(engine: Path) -> str:
    read_manifest(engine, "engine")  # every byte of it
    return (engine / "model.plan").read_text()


def test_an_equal_build_takes_the_kept_plan(
    bare: Path,
    cache: EngineCache,
    builds: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = build_engine(bare, "a10g", tmp_path / "a", cache=cache)
    monkeypatch.setattr(build_module, "build_plan", lambda *_, **__: pytest.fail("it began to build"))
    caplog.set_level(logging.INFO, "mistral_trt")
    assert build_engine(bare, "NVIDIA A10G", tmp_path / "b", cache=cache) == first
    assert (tmp_path / "a" / "model.plan").samefile(tmp_path / "b" / "model.plan")
    assert "the plan of an equal build is used again" in caplog.text and "--no-cache" in caplog.text
    assert [plan_of(tmp_path / name) for name in "ab"] == ["plan 1", "plan 1"]


@pytest.mark.parametrize(
    ("gpus", "settings"),
    [("a10g", {"max_batch_size": 3}), ("l4", {}), ("a10g,l4", {}), ("l4,t4", {"max_batch_size": 2})],
)
def test_another_build_does_not(
    bare: Path, cache: EngineCache, builds: list[str], tmp_path: Path, gpus: str, settings: dict[str, Any]
) -> None:
    build_engine(bare, "a10g", tmp_path / "a", cache=cache)
    build_engine(bare, gpus, tmp_path / "b", cache=cache, **settings)
    assert len(builds) == 2
    assert [plan_of(tmp_path / name) for name in "ab"] == ["plan 1", "plan 2"]


@pytest.mark.parametrize(
    ("first", "second"), [("a10g,l4", "l4,a10g"), ("a10g", "a10"), ("a10g", "a10,rtx3090"), ("l4", "l40s")]
)
def test_gpus_of_the_same_compute_capabilities_share_a_plan(
    bare: Path, cache: EngineCache, builds: list[str], tmp_path: Path, first: str, second: str
) -> None:
    build_engine(bare, first, tmp_path / "a", cache=cache)
    details = build_engine(bare, second, tmp_path / "b", cache=cache).details
    assert len(builds) == 1 and plan_of(tmp_path / "b") == "plan 1"
    assert sorted(details["gpus"]) == sorted(second.split(",")) == sorted(details["predicted"]["ceilings"])


def test_a_build_without_a_cache_builds_and_keeps_nothing(
    bare: Path, cache: EngineCache, builds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    build_engine(bare, "a10g", tmp_path / "a", cache=cache)
    build_engine(bare, "a10g", tmp_path / "b", cache=None)
    build_engine(bare, "a10g", tmp_path / "c")
    assert [plan_of(tmp_path / name) for name in "abc"] == ["plan 1", "plan 2", "plan 3"]
    assert not (tmp_path / "home").exists()
    build_engine(bare, "a10g", tmp_path / "d", cache=cache)
    assert plan_of(tmp_path / "d") == "plan 1"


@pytest.mark.parametrize("text", ["plan 9", "longer than it was", ""])
def test_an_altered_plan_is_built_again(
    bare: Path,
    cache: EngineCache,
    builds: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    text: str,
) -> None:
    build_engine(bare, "a10g", tmp_path / "a", cache=cache)
    (tmp_path / "a" / "model.plan").write_text(text)  # the cache's own file by another name
    build_engine(bare, "a10g", tmp_path / "b", cache=cache)
    assert "was altered after it was kept; it is removed and built again" in caplog.text
    build_engine(bare, "a10g", tmp_path / "c", cache=cache)
    assert [plan_of(tmp_path / name) for name in "bc"] == ["plan 2", "plan 2"]
    with pytest.raises(ManifestError):
        read_manifest(tmp_path / "a", "engine")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("BUILD_VERSION", 99, f"build version {BUILD_VERSION} → 99"),
        ("__version__", "9.9", f"mistral-trt {__version__} → 9.9"),
    ],
)
def test_another_version_builds_again_and_says_which(
    bare: Path,
    cache: EngineCache,
    builds: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    value: Any,
    said: str,
) -> None:
    caplog.set_level(logging.INFO, "mistral_trt")
    build_engine(bare, "a10g", tmp_path / "a", cache=cache)
    assert "an equal plan was built before" not in caplog.text
    monkeypatch.setattr(key_module, name, value)
    build_engine(bare, "a10g", tmp_path / "b", cache=cache)
    assert f"an equal plan was built before, by other versions, and is built again: {said}" in caplog.text
    assert plan_of(tmp_path / "b") == "plan 2"


def test_a_plan_that_is_refused_is_not_kept(
    bare: Path, cache: EngineCache, builds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = vars(build_module)["build_plan"]  # the stand-in
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "build_plan", lambda *a, **k: replace(build(*a, **k), bytes=10**9))
        with pytest.raises(BuildError, match="TensorRT stored weights more than once"):
            build_engine(bare, "a10g", tmp_path / "a", cache=cache)
    build_engine(bare, "a10g", tmp_path / "a", cache=cache)
    assert plan_of(tmp_path / "a") == "plan 2"


def test_a_cache_that_cannot_be_used_costs_nothing_but_time(
    bare: Path, builds: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mistral_trt")
    (tmp_path / "file").write_text("no folder")
    for name, cache in (("a", EngineCache(tmp_path / "file" / "cache")), ("b", EngineCache(tmp_path, 5))):
        build_engine(bare, "a10g", tmp_path / name, cache=cache)
        assert "the plan is not kept for the next build" in caplog.text
        caplog.clear()
    assert [plan_of(tmp_path / name) for name in "ab"] == ["plan 1", "plan 2"]


# --- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command's own cache is; it does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "mistral-trt" / "engines"


def test_the_command_uses_the_cache_unless_told_not_to(
    bare: Path, home: Path, builds: list[str], tmp_path: Path
) -> None:
    def made(name: str, *options: str) -> str:
        assert build_command([str(bare), "--gpu", "a10g", "--out", str(tmp_path / name), *options]) == 0
        return plan_of(tmp_path / name)

    assert made("a", "--no-cache") == "plan 1" and not home.exists()
    assert made("b", "--cache-gb", "0") == "plan 2" and not home.exists()
    assert made("c") == "plan 3" and len(list(home.glob("*/model.plan"))) == 1
    assert made("d") == "plan 3"
    assert made("e", "--no-cache") == "plan 4"
    assert made("f", "--cache-gb", "0.5") == "plan 3"


@pytest.mark.parametrize("size", ["-1", "nan", "inf", "1e308"])
def test_a_size_of_the_cache_that_is_none_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], size: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_command(["onnx", "--gpu", "a10g", "--out", "out", f"--cache-gb={size}"])
    assert "--cache-gb must be a size, 0 or more" in capsys.readouterr().err


def test_the_command_writes_polygraphys_commands_beside_the_engine(
    bare: Path,
    home: Path,
    builds: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "mistral_trt")
    out = tmp_path / "engine"
    assert build_command([str(bare), "--gpu", "a10g", "--out", str(out), "--polygraphy"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    folder = tmp_path / "engine-polygraphy"
    assert f"{folder}: commands that compare the engine with its ONNX folder" in caplog.text
    assert sorted(leftovers(folder)) == ["README.txt", "inputs.py", "run.sh"]
    assert "USE_TENSORRT_RTX=1" in (folder / "run.sh").read_text()
    assert plan_of(out) == "plan 1"


@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        (
            "fp16",
            ["--weights", "external"],
            "does not refit one; use --weights embedded, or leave out --poly",
        ),
        ("bf16", [], "cannot run bf16 on a CPU"),
    ],
)
def test_what_polygraphy_cannot_compare_is_refused_before_the_build(
    bare: Path,
    home: Path,
    builds: list[str],
    tmp_path: Path,
    precision: str,
    options: list[str],
    message: str,
) -> None:
    manifest = read_manifest(bare)
    replace(manifest, contract=replace(manifest.contract, precision=precision)).write(bare)
    words = [str(bare), "--gpu", "a10g", "--out", str(tmp_path / "engine"), "--polygraphy", *options]
    with pytest.raises(BuildError, match=message):
        build_command(words)
    assert builds == [] and leftovers(tmp_path) == ["onnx"]


def test_a_build_for_polygraphy_that_would_leave_its_weights_out_is_refused_before_it_begins(
    bare: Path, home: Path, builds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--weights auto goes outside here; with --polygraphy that is no way out."""
    monkeypatch.setitem(BUILD_MEMORY, ("fp16", EMBEDDED), BuildMemory(2_000_000_000))
    budget = predict_budget(read_manifest(bare))
    outside = replace(budget, weights="external").build_memory_bytes
    assert outside < budget.build_memory_bytes
    monkeypatch.setattr(settle_module, "available_memory_bytes", lambda: outside)
    words = [str(bare), "--gpu", "a10g", "--out", str(tmp_path / "engine")]
    for command in (words, [*words, "--dry-run"]):
        with pytest.raises(BuildError, match="; leave out --polygraphy, which needs the weights in the plan"):
            build_command([*command, "--polygraphy"])
    assert builds == [] and leftovers(tmp_path) == ["onnx"]
    monkeypatch.setattr(build_module, "check_external_plan", lambda *_: None)
    assert build_command(words) == 0
    assert read_manifest(tmp_path / "engine").details["weights"] == "external"


# --- what is refused before a build ---------------------------------------------------------------------


def test_fp32_is_refused_before_a_build(fp16: Path, tmp_path: Path) -> None:
    folder = copy_folder(fp16, tmp_path / "onnx")
    manifest = read_manifest(folder)
    replace(manifest, contract=replace(manifest.contract, precision="fp32")).write(folder)
    with pytest.raises(BuildError, match="an engine cannot be built in fp32"):
        build_engine(folder, "a10g", tmp_path / "engine")


def test_a_plan_for_several_architectures_keeps_its_weights(
    bare: Path, builds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX fails on a refittable weight there, and so does every later build of the process."""
    message = (
        r"several compute capabilities \(8.6, 8.9\) cannot leave its weights out: .*; use --weights "
        "embedded, or build one engine for each compute capability: "
        "mistral-trt build ONNX_DIR --gpu a10,a10g --flavor tensorrt-rtx --weights external "
        "--max-batch-size 2 --out DIR; mistral-trt build ONNX_DIR --gpu l4 --flavor tensorrt-rtx "
        "--weights external --max-batch-size 2 --out DIR$"
    )
    for start in (build_engine, dry_run):
        with pytest.raises(BuildError, match=message):
            start(bare, "a10g,l4,a10", tmp_path / "engine", weights="external")
    monkeypatch.setattr(settle_module, "available_memory_bytes", lambda: 500_000_000)
    with pytest.raises(BuildError, match=r"predicted: the build needs .* and 0.50 GB is available"):
        build_engine(bare, "a10g,l4", tmp_path / "engine", weights="auto")
    assert builds == [] and leftovers(tmp_path) == ["onnx"]


def test_too_little_memory_is_refused_before_a_build(
    fp16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settle_module, "available_memory_bytes", lambda: 500_000_000)
    with pytest.raises(BuildError, match=r"predicted: the build needs .* and 0.50 GB is available"):
        build_engine(fp16, "a10g", tmp_path / "engine")


def copy_folder(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_altered_weights_are_refused(fp16: Path, tmp_path: Path) -> None:
    folder = copy_folder(fp16, tmp_path / "onnx")
    weights = folder / "model.onnx.data"
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ManifestError, match=r"model.onnx.data was altered after it was made"):
        build_engine(folder, "a10g", tmp_path / "engine")


def test_an_onnx_manifest_without_what_the_engine_needs(fp16: Path, tmp_path: Path) -> None:
    folder = copy_folder(fp16, tmp_path / "onnx")
    manifest = read_manifest(folder)
    details = {key: value for key, value in manifest.details.items() if key != "weights_bytes"}
    replace(manifest, details=details).write(folder)
    with pytest.raises(ManifestError, match="no 'weights_bytes' in its details; export the checkpoint again"):
        build_engine(folder, "a10g", tmp_path / "engine")


def test_text_files_that_are_not_of_the_folder_are_refused(fp16: Path, tmp_path: Path) -> None:
    folder = copy_folder(fp16, tmp_path / "onnx")
    manifest = read_manifest(folder)
    replace(manifest, details={**manifest.details, "text_files": ["../secret"]}).write(folder)
    with pytest.raises(ManifestError, match=r"text_files of the ONNX manifest .* files: \['../secret'\]"):
        build_engine(folder, "a10g", tmp_path / "engine")


def test_a_folder_in_the_way_is_not_replaced(fp16: Path, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "mine.txt").write_text("keep")
    with pytest.raises(ArtifactError, match="is not empty and holds no"):
        build_engine(fp16, "a10g", tmp_path / "engine")
    assert (tmp_path / "engine" / "mine.txt").read_text() == "keep"


@pytest.mark.slow
def test_the_command_prints_the_folder_and_nothing_else(
    fp16: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "engine"
    assert build_command([str(fp16), "--gpu", "a10g", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    check_engine(out, fp16)


def test_a_flavor_the_command_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_command(["onnx", "--gpu", "a10g", "--out", "out", "--flavor", "trt"])
    assert "invalid choice: 'trt'" in capsys.readouterr().err


def test_check_operators_leaves_a_sound_graph_alone(fp16: Path) -> None:
    check_operators(fp16 / "model.onnx")
