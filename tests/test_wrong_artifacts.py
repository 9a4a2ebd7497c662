"""Artifacts whose files are what their manifest says, and wrong: the report names what is wrong with them.

Exit status 2 is for what could not run. That an artifact cannot be loaded, run or read is a finding.
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest

from mistral_trt.cli import run
from mistral_trt.contract import QUANTIZED
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.export.quantization.settings import QuantizationSettings
from mistral_trt.validate.report import page
from tests import planted_files as files
from tests.alteration import edit_graph, reseal
from tests.conftest import Folder
from tests.planted_files import LAYER, Alteration, Q, V

STEP = f"{LAYER}self_attn.q_proj.input_scale"
DOWN = f"{LAYER}mlp.down_proj"
WEIGHTS, CALLS, OWN = "weights_wrong", "calls_failed", "own_kl_mean"


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "plots", lambda _: {})


Healthy = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def healthy(one_trace: None, tiny_checkpoint: Folder, tmp_path_factory: pytest.TempPathFactory) -> Healthy:
    """healthy(precision) -> an ONNX folder of one layer with a tokenizer, and its checkpoint; made once."""
    made: dict[str, Path] = {}
    checkpoint = tiny_checkpoint(tokenizer=True, vocab_size=259, num_hidden_layers=1)

    def pair(precision: str) -> tuple[Path, Path]:
        if precision not in made:
            root = tmp_path_factory.mktemp(precision)
            options: dict[str, Any] = {"prefill_chunk": 4, "max_batch_size": 4}
            if precision in QUANTIZED:
                options["quantization"] = QuantizationSettings(samples=4, tokens=32)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
                export_checkpoint(checkpoint, root / "onnx", precision=precision, **options)
            made[precision] = root / "onnx"
        return made[precision], checkpoint

    return pair


def validated(
    pair: tuple[Path, Path], alter: Alteration, out: Path, *options: str
) -> tuple[set[str], dict[str, Any]]:
    """Alter a copy and validate it; the gates that failed, and the record."""
    folder = Path(shutil.copytree(pair[0], out / "onnx"))
    alter(folder)
    reseal(folder)
    words = [str(folder), "--reference", str(pair[1]), "--out", str(out / "report"), "--threads", "1"]
    assert run("validate", [*words, "--length", "60", *options]) == 1
    record: dict[str, Any] = json.loads((out / "report" / "report.json").read_text())
    return {gate["name"] for gate in record["gates"] if not gate["passed"]}, record


def graph(edit: Callable[[onnx.GraphProto], None]) -> Alteration:
    return lambda folder: edit_graph(folder, edit)


# ---------------------------------------------------------------- codes and scales

ZERO, NONE = "has a zero point that is not 0", "is not positive and finite"
CODES: dict[str, tuple[str, Alteration, str, str]] = {
    "zero points of 1": ("int8", files.zero_points_of_one, Q, ZERO),
    "a scale of 0": ("int8", files.scale_of(f"{Q}_scale", 0.0), Q, NONE),
    "a negative scale": ("int4", files.scale_of(f"{Q}_scale", -1.0), Q, NONE),
    "a scale of NaN": ("fp8", files.scale_times(float("nan"), f"{Q}_scale"), Q, NONE),
    "a step of infinity": ("int8", files.scale_of(STEP, float("inf")), Q, NONE),
    "a step of 0": ("fp8", files.scale_of(STEP, 0.0), Q, NONE),
    "a scale of another dtype": (
        "int8",
        files.scale_typed(f"{Q}_scale", onnx.TensorProto.FLOAT16),
        Q,
        "expected 128 bytes",
    ),
    "a scale of doubles": ("int8", files.scale_typed(f"{Q}_scale", onnx.TensorProto.DOUBLE), Q, "is double"),
    "blocks twice as large": (
        "int4",
        files.attribute_of(f"{LAYER}self_attn.q_proj/DequantizeLinear", "block_size", 64),
        Q,
        "in blocks of 64",
    ),
    "codes that are not dequantized": (
        "int8",
        files.nodes_left_out(f"{LAYER}self_attn.q_proj/DequantizeLinear"),
        Q,
        "expected a transposed or a dequantized weight",
    ),
    "an input that is not quantized": (
        "int8",
        files.nodes_left_out(f"{DOWN}.input/QuantizeLinear", f"{DOWN}.input/DequantizeLinear"),
        f"{DOWN}.weight",
        "has no input_scale",
    ),
}


@pytest.mark.parametrize("name", CODES)
def test_damaged_codes_are_wrong_weights(healthy: Healthy, tmp_path: Path, name: str) -> None:
    precision, alter, tensor, words = CODES[name]
    failed, record = validated(healthy(precision), alter, tmp_path)
    assert WEIGHTS in failed
    assert words in record["weights"]["wrong"][tensor]


def test_without_scales_there_is_no_third_leg(healthy: Healthy, tmp_path: Path) -> None:
    """Its gates fail: nothing was held against them."""
    failed, record = validated(healthy("int8"), files.zero_points_of_one, tmp_path)
    assert failed == {WEIGHTS, OWN, "own_relative_error_mean", "input_range_used_max"}
    assert record["own_precision"]["words"].startswith("not computed: ")
    assert any("artifact's own precision was not computed: " in remark for remark in record["notes"])


def test_scales_past_every_number_are_seen_without_the_weights(healthy: Healthy, tmp_path: Path) -> None:
    """A step of 3e38 is positive and finite; 127 of them are not."""
    failed, record = validated(healthy("int8"), files.scale_of(f"{DOWN}.input_scale", 3e38), tmp_path)
    assert OWN in failed
    assert "NaN or infinity" in record["own_precision"]["words"]


# ---------------------------------------------------------------- graphs

GRAPHS: dict[str, tuple[Alteration, str]] = {
    "no ONNX": (files.no_onnx, "cannot load"),
    "an unknown operator": (graph(files.unknown_operator), "cannot load"),
    "an input misnamed": (graph(files.input_renamed), "not the contract's"),
    "an output missing": (graph(files.output_left_out), "not the contract's"),
    "a call that fails": (graph(files.impossible_shape), "failed in a step"),
    "weights that are not there": (graph(files.weights_elsewhere), "cannot load"),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_does_not_run_is_a_call_that_failed(
    healthy: Healthy, tmp_path: Path, name: str, streaming: bool
) -> None:
    alter, words = GRAPHS[name]
    failed, record = validated(healthy("fp16"), alter, tmp_path, *["--streaming"] * streaming)
    assert CALLS in failed
    if not streaming:
        assert all(scenario["failure"] for scenario in record["scenarios"])
        assert all(words in scenario["failure"] for scenario in record["scenarios"])


@pytest.mark.slow
def test_a_twin_of_what_is_no_graph_fails_too(healthy: Healthy, tmp_path: Path) -> None:
    failed, record = validated(healthy("bf16"), files.no_onnx, tmp_path)
    assert {CALLS, WEIGHTS} <= failed
    assert list(record["weights"]["wrong"]) == ["model.onnx"]


def test_modules_without_names_are_wrong_weights(healthy: Healthy, tmp_path: Path) -> None:
    failed, record = validated(healthy("fp16"), graph(files.nameless), tmp_path)
    assert {CALLS, WEIGHTS} <= failed
    assert record["weights"]["wrong"][V] == f"the graph has no node {V.removesuffix('.weight')}/MatMul"


def test_a_norm_of_another_shape_is_a_wrong_weight(healthy: Healthy, tmp_path: Path) -> None:
    name = f"{LAYER}input_layernorm.weight"

    def fold(graph: onnx.GraphProto) -> None:
        tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
        tensor.dims[:] = [8, 8]

    failed, record = validated(healthy("int8"), partial(edit_graph, edit=fold), tmp_path)
    assert {CALLS, WEIGHTS} <= failed
    assert record["weights"]["wrong"][name] == "has shape [8, 8]; the checkpoint calls for [64]"


def test_a_tokenizer_that_cannot_be_read_is_wrong(healthy: Healthy, tmp_path: Path) -> None:
    """What is read then are random tokens."""
    failed, record = validated(healthy("fp16"), files.unreadable_tokenizer, tmp_path)
    assert failed == {WEIGHTS}
    assert "the tokenizer cannot be read" in record["weights"]["wrong"]["tokenizer.json"]
    assert record["tokens"]["source"] == "random tokens, seed 0"
