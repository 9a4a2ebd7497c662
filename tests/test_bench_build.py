"""The build bench's arithmetic: fits, judgements, the table; and its INT4 checkpoints, exported for real."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_trt.engines.planning.build_memory import BuildMemory, build_memory
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.manifest import read_manifest
from mistral_trt.weight_index import EMBEDDED, EXTERNAL
from tests.conftest import Folder
from tests.models import TINY

pytestmark = pytest.mark.usefixtures("one_trace")

BENCH = Path(__file__).parent.parent / "bench"
RESULTS = BENCH / "results" / "build.json"
NAMES = ("build", "build_fit", "build_models")
GB = 1_000_000_000
OUTSIDE = BuildMemory(900_000_000, 7_000_000)
INSIDE = {
    "fp16": BuildMemory(-100_000_000, 0, 0.0, 1.7, OUTSIDE),
    "int8": BuildMemory(150_000_000, 0, 1.7, 1.0, OUTSIDE),
    "int4": BuildMemory(-50_000_000, 0, 2.5, 1.0, OUTSIDE),
}
CODE_BYTES = {"fp16": 0, "int8": 218_000_000, "int4": 112_000_000}
EMBEDDING_BYTES = 524_000_000


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """bench.fit is bench/build_fit.py, bench.models bench/build_models.py, bench.build bench/build.py."""
    sys.path.insert(0, str(BENCH))
    known = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    try:
        build, fit, models = (importlib.import_module(name) for name in NAMES)
        yield SimpleNamespace(build=build, fit=fit, models=models)
    finally:
        sys.path.remove(str(BENCH))
        for name in NAMES:
            sys.modules.pop(name, None)
        sys.modules.update(known)


def point(bench: Any, precision: str, weights: str, layers: int, *, noise: float = 1.0) -> Any:
    """A build as the constants above have it."""
    codes = CODE_BYTES[precision] * layers
    floats = EMBEDDING_BYTES + (0 if codes else 436_000_000 * layers)
    found = bench.fit.Point(precision, weights, layers, codes + floats, codes, 10.0, 1, plan_bytes=GB)
    constants = OUTSIDE if weights == EXTERNAL else INSIDE[precision]
    return replace(found, peak_bytes=int(noise * bench.fit.predicted(constants, found)))


def points(bench: Any, *layers: int, **options: float) -> list[Any]:
    return [
        point(bench, precision, weights, count, **options)
        for count in layers
        for precision in INSIDE
        for weights in (EXTERNAL, EMBEDDED)
    ]


def test_two_depths_give_back_the_constants_that_made_them(bench: Any) -> None:
    found = bench.fit.fit(points(bench, 4, 8))
    assert set(found) == {(precision, weights) for precision in INSIDE for weights in (EXTERNAL, EMBEDDED)}
    for (precision, weights), constants in found.items():
        expected = OUTSIDE if weights == EXTERNAL else INSIDE[precision]
        found_numbers, numbers = (bench.build.to_json(line) for line in (constants, expected))
        assert found_numbers == pytest.approx(numbers, rel=1e-3, abs=1e-3)


@given(st.floats(0.9, 1.1), st.floats(0.9, 1.1))
def test_more_layers_or_weights_are_never_foretold_to_take_less(
    bench: Any, shallow: float, deep: float
) -> None:
    measured = [*points(bench, 4, noise=shallow), *points(bench, 8, noise=deep)]
    for line in bench.fit.fit(measured).values():
        assert min(line.layer_bytes, line.quantized_factor, line.factor) >= 0


def test_weights_inside_never_take_less_than_weights_outside(bench: Any) -> None:
    found = bench.fit.fit(points(bench, 4, 8))
    for precision in INSIDE:
        assert found[precision, EMBEDDED].base_bytes < found[precision, EXTERNAL].base_bytes
        for layers in (1, 4):
            peaks = [
                found[precision, weights].peak_bytes(layers, quantized_bytes=0, other_bytes=9)
                for weights in (EMBEDDED, EXTERNAL)
            ]
            assert peaks[0] == peaks[1]


def test_a_line_is_the_nearest_one_and_does_not_fall(bench: Any) -> None:
    assert bench.fit.fit_line([4, 8], [10, 18]) == pytest.approx((2, 2))
    assert bench.fit.fit_line([4, 8, 12], [10, 18, 29]) == pytest.approx((2.375, 0))
    assert bench.fit.fit_line([4, 8], [18, 10]) == pytest.approx((0, 14))
    assert bench.fit.fit_line([4, 4], [10, 14]) == pytest.approx((3, 0))


def test_refused_builds_and_series_without_their_external_line_are_left_out(bench: Any) -> None:
    inside = [point(bench, "fp16", EMBEDDED, layers) for layers in (4, 8)]
    assert bench.fit.fit(inside) == {}
    refused = replace(point(bench, "fp16", EXTERNAL, 4), peak_bytes=None)
    assert bench.fit.fit([refused]) == {}


def shipped(precision: str, weights: str) -> BuildMemory:
    """As if the constants that make these builds were those in use."""
    return OUTSIDE if weights == EXTERNAL else INSIDE[precision]


def judged(bench: Any, measured: list[Any], in_use: Any = shipped) -> dict[str, Any]:
    results: dict[str, Any] = bench.build.judge(measured, [4, 8], in_use)
    return results


def test_deep_builds_are_judged_and_shallow_ones_are_not(bench: Any) -> None:
    results = judged(bench, [*points(bench, 4, 8), *points(bench, 16, noise=1.1)])
    assert [found["judged"] for found in results["builds"]] == [False] * 12 + [True] * 6
    assert results["failures"] == []
    assert results["builds"][-1]["error"] == pytest.approx(1 / 1.1 - 1, abs=0.002)


def test_what_breaks_a_bound_is_named(bench: Any) -> None:
    slow = replace(point(bench, "fp16", EXTERNAL, 16), seconds=61.5)
    large = replace(point(bench, "fp16", EXTERNAL, 16), peak_bytes=2_100_000_000)
    heavy = replace(point(bench, "int8", EMBEDDED, 16), peak_bytes=21 * GB)
    refused = replace(point(bench, "int4", EMBEDDED, 16), peak_bytes=None)
    failures = judged(bench, [*points(bench, 4, 8), slow, large, heavy, refused])["failures"]
    assert failures == [
        "fp16 external, 16 layers: 61.5 s, at most 60",
        "fp16 external, 16 layers: predicted 1.01 GB, took 2.10",
        "fp16 external, 16 layers: 2.10 GB, at most 2.00",
        "int8 embedded, 16 layers: predicted 6.60 GB, took 21.00",
        "int8 embedded, 16 layers: 21.00 GB, at most 20.00",
        "int4 embedded, 16 layers: it has to fit, and was refused: is the machine quiet?",
    ]


@pytest.mark.parametrize(
    ("shift", "fails"), [(1.0, False), (1.019, False), (1.021, True), (0.981, False), (0.979, True)]
)
def test_constants_in_use_that_foretell_otherwise_fail(bench: Any, shift: float, fails: bool) -> None:
    def in_use(precision: str, weights: str) -> BuildMemory:
        line = shipped(precision, weights)
        numbers = [shift * value for value in bench.build.to_json(line).values()]
        return BuildMemory(round(numbers[0]), round(numbers[1]), numbers[2], numbers[3], line.least)

    failures = judged(bench, points(bench, 4, 8, 16), in_use)["failures"]
    assert len(failures) == (6 if fails else 0)
    for why in failures:
        assert re.search(r", 16 layers: build_memory.py foretells [\d.]+ GB and the fitted constants ", why)


def test_a_constant_that_moves_no_judged_build_may_differ(bench: Any) -> None:
    """It is what is foretold that counts: other constants, the same sum."""

    def in_use(precision: str, weights: str) -> BuildMemory:
        line = shipped(precision, weights)
        return replace(
            line, base_bytes=line.base_bytes + 16_000_000, layer_bytes=line.layer_bytes - 1_000_000
        )

    assert judged(bench, points(bench, 4, 8, 16), in_use)["failures"] == []


@pytest.mark.parametrize("layers", [(16,), (4, 16)])
def test_a_deep_build_whose_series_was_not_fitted_is_a_failure(bench: Any, layers: tuple[int, ...]) -> None:
    measured = [found for found in points(bench, *layers) if found.layers == 16 or found.precision == "int4"]
    failures = judged(bench, measured)["failures"]
    unfitted = {"fp16", "int8"} if 4 in layers else {"fp16", "int8", "int4"}
    found = {why.split()[0] for why in failures if "its series was not fitted, so nothing judges it" in why}
    assert found == unfitted
    refused = [replace(point(bench, "fp16", EMBEDDED, 16), peak_bytes=None)]
    assert "was not fitted" in judged(bench, refused)["failures"][0]


# ---------------------------------------------------------------- a run, with builds that take no time


@pytest.fixture
def quick(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measurements that are made up, and constants that agree with them."""

    def measure(args: Any, precision: str, layers: int) -> list[Any]:
        return [point(bench, precision, weights, layers) for weights in args.weights]

    monkeypatch.setattr(bench.build, "measure", measure)
    monkeypatch.setattr(bench.build, "build_memory", shipped)
    return bench.build


def test_a_run_ends_with_the_status_of_its_judgement(
    quick: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--out", str(tmp_path / "out.json"), "--scratch", str(tmp_path / "scratch")]
    assert quick.main(words) == 0
    assert "FAILED" not in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text())["builds"]) == 4 * 6
    monkeypatch.setattr(quick, "build_memory", lambda *_: BuildMemory(GB, 0, 9.0, 9.0))
    assert quick.main(words) == 1
    assert "FAILED fp16 embedded, 16 layers: build_memory.py foretells" in capsys.readouterr().out


def test_a_run_that_is_killed_leaves_what_it_measured(
    quick: Any, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, out = quick.measure, tmp_path / "new" / "out.json"

    def until(args: Any, precision: str, layers: int) -> list[Any]:
        if (precision, layers) == ("int4", 8):
            raise KeyboardInterrupt
        return list(measure(args, precision, layers))

    monkeypatch.setattr(quick, "measure", until)
    with pytest.raises(KeyboardInterrupt):
        quick.main(["--out", str(out), "--scratch", str(tmp_path / "scratch")])
    _, left = quick.stored(out)
    expected = [found for found in points(bench, 4, 8) if (found.precision, found.layers) != ("int4", 8)]
    assert left == expected


def test_what_is_stored_is_judged_anew_without_a_build(
    quick: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    assert quick.main(["--out", str(out), "--scratch", str(tmp_path / "scratch")]) == 0
    before = json.loads(out.read_text())
    monkeypatch.setattr(quick, "measure", lambda *_: pytest.fail("it built"))
    monkeypatch.setattr(quick, "machine", lambda: pytest.fail("another machine's name"))
    assert quick.main(["--judge", "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == before
    assert quick.main(["--judge", "--out", str(out), "--fit", "16", "32"]) == 0
    assert json.loads(out.read_text())["builds"][0]["judged"] is True
    assert quick.main(["--judge", "--out", str(out), "--fit", "64"]) == 1
    assert "FAILED fp16 external, 4 layers: its series was not fitted" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "{", "{}", '{"builds": [{"precision": "fp16"}]}'])
def test_nothing_stored_is_told_with_the_command_that_measures(
    quick: Any, tmp_path: Path, text: str | None
) -> None:
    out = tmp_path / "out.json"
    if text is not None:
        out.write_text(text)
    with pytest.raises(
        SystemExit, match=r"--judge: expected the results of a run .*; run: python bench/build"
    ):
        quick.main(["--judge", "--out", str(out)])


def test_the_kept_results_can_be_judged(bench: Any) -> None:
    about, kept = bench.build.stored(RESULTS)
    assert about["config"] == "mistral-7b-v0.1" and kept


def test_the_table_shows_fitted_judged_and_refused(bench: Any) -> None:
    refused = replace(point(bench, "fp16", EMBEDDED, 32), peak_bytes=None, seconds=2.0)
    lines = bench.build.table(judged(bench, [*points(bench, 4, 8), refused])).splitlines()
    assert lines[2] == "| fp16 external | 4 | 10.0 | 0.93 | 0.93 | +0.0% (fitted) | 1000 |"
    assert "| fp16 embedded | 32 | 2.0 | refused before it starts | 24.51 |  |  |" in lines
    assert "int4 embedded: BuildMemory(-50_000_000, 0, 2.500, 1.000)" in lines
    assert not any(line.startswith("FAILED") for line in lines)


def measurement(status: int, output: str = "") -> Any:
    return SimpleNamespace(
        seconds=1.26, peak_anonymous_bytes=950_000_000, written_bytes=0, status=status, output=output
    )


def test_a_build_is_a_process_of_its_own(bench: Any, onnx_folder: Folder, tmp_path: Path) -> None:
    onnx = onnx_folder(precision="fp16")
    source = read_manifest(onnx)

    def build(words: list[str], *, env: dict[str, str]) -> Any:
        out = Path(words[words.index("--out") + 1])
        assert words[words.index("--weights") + 1] == EXTERNAL and words[-2:] == ["--max-batch-size", "8"]
        assert Path(env["XDG_CACHE_HOME"]).parent == out.parent
        out.mkdir()
        compiled = {"activation_bytes": {"decode": 5, "prefill": 7}}
        details = {"plan_bytes": 3, "compiled": compiled, "predicted": {"activation_bytes": 11}}
        replace(source, stage="engine", files={}, details=details).write(out)
        return measurement(0)

    found = bench.build.build_point(onnx, EXTERNAL, tmp_path, build)
    assert found.series == ("fp16", EXTERNAL)
    assert (found.layers, found.seconds, found.peak_bytes, found.plan_bytes) == (2, 1.3, 950_000_000, 3)
    assert (found.activation_bytes, found.predicted_activation_bytes) == (12, 11)
    assert (found.weights_bytes, found.quantized_bytes) == (source.details["weights_bytes"], 0)
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_refuses_itself_is_a_row_and_a_broken_one_ends_the_bench(
    bench: Any, onnx_folder: Folder, tmp_path: Path
) -> None:
    onnx, line = (
        onnx_folder(precision="fp16"),
        "mistral-trt build: predicted: the build needs 28.7 GB of memory",
    )
    found = bench.build.build_point(
        onnx, EMBEDDED, tmp_path, lambda *_, **__: measurement(2, f"note\n{line}\n")
    )
    assert (found.peak_bytes, found.note) == (None, line)
    for status, output in ((2, "no such GPU"), (1, line)):
        with pytest.raises(SystemExit, match="ended with status"):
            bench.build.build_point(
                onnx, EMBEDDED, tmp_path, lambda *_, s=status, o=output, **__: measurement(s, o)
            )


@pytest.mark.slow
def test_a_stored_int4_checkpoint_is_taken_over_code_for_code(bench: Any, tmp_path: Path) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    raw = {**TINY.to_json(), **shape, "hidden_act": "silu", "model_type": "mistral"}
    bench.models.write_stored_int4(raw, 2, tmp_path / "checkpoint")
    files = sorted(path.name for path in (tmp_path / "checkpoint").glob("*.safetensors"))
    assert files == ["model-0.safetensors", "model-1.safetensors", "model-rest.safetensors"]
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "onnx", precision="int4", prefill_chunk=4)
    quantization = read_manifest(tmp_path / "onnx").details["quantization"]
    assert quantization["scheme"]["block_size"] == 128
    assert len(quantization["quantized"]) == 2 * 7


def test_stored_tensors_are_codes_of_linears_and_floats_of_the_rest(bench: Any) -> None:
    rng = np.random.default_rng(0)
    linear = bench.models.stored_tensors("model.layers.0.mlp.up_proj.weight", (16, 256), rng)
    assert {name.rpartition(".")[2]: array.shape for name, array in linear.items()} == {
        "weight_packed": (16, 32),
        "weight_scale": (16, 2),
        "weight_shape": (2,),
    }
    for name, shape in (("model.layers.0.input_layernorm.weight", (8,)), ("lm_head.weight", (8, 4))):
        (array,) = bench.models.stored_tensors(name, shape, rng).values()
        assert (array.shape, array.dtype) == (shape, np.float16)


def test_the_constants_in_use_agree_with_every_measured_build() -> None:
    measured = [found for found in json.loads(RESULTS.read_text())["builds"] if found["peak_bytes"]]
    assert measured
    for found in measured:
        other = found["weights_bytes"] - found["quantized_bytes"]
        line = build_memory(found["precision"], found["weights"])
        expected = line.peak_bytes(
            found["layers"], quantized_bytes=found["quantized_bytes"], other_bytes=other
        )
        assert expected == pytest.approx(found["peak_bytes"], rel=0.15), found
