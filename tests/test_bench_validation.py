"""The bench of the gates' limits: varied healthy models, results that outlive a stop, false alarms."""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.numpy import load_file

from mistral_trt.contract import CACHE_DTYPES
from mistral_trt.validate.verdict.gates import Gate, read_gates

ROOT = Path(__file__).parent.parent
MODULES = ("validation", "validation_models", "validation_runs")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """bench.validation_runs is bench/validation_runs.py, and so on; they are no part of the package."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(ROOT / "bench"))


def test_the_shapes_differ_in_all_that_the_graph_depends_on(bench: Any) -> None:
    shapes = bench.validation_models.SHAPES
    assert {shape.layers for shape in shapes} == {1, 2, 3}
    assert {shape.heads[0] // shape.heads[1] for shape in shapes} == {1, 2, 4}
    assert {shape.rows for shape in shapes} == {1, 2, 3, 4}
    assert {shape.tied for shape in shapes} == {True, False}
    windows, chunks = [shape.window for shape in shapes], [shape.chunk for shape in shapes]
    assert (min(windows), max(windows), min(chunks), max(chunks)) == (5, 24, 1, 8)


def test_a_seed_is_its_own_model_and_always_the_same(bench: Any, tmp_path: Path) -> None:
    write = bench.validation_models.write_checkpoint
    one, again, other = (
        load_file(write(tmp_path / name, seed) / "model.safetensors")
        for name, seed in (("a", 1), ("b", 1), ("c", 1 + len(bench.validation_models.SHAPES)))
    )
    assert all((one[name] == again[name]).all() for name in one)
    assert all((one[name] != other[name]).any() for name in one)
    assert one["model.norm.weight"].std() > 0.1


@pytest.fixture
def brief(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validations of 64 positions."""
    monkeypatch.setattr(bench.validation_runs, "Job", partial(bench.validation_runs.Job, length=64))


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_one_seed_goes_through_and_is_not_run_again(bench: Any, tmp_path: Path) -> None:
    runs = bench.validation_runs.Runs(tmp_path, ["fp16"])
    (tmp_path / "results").mkdir()
    assert runs.missing(1) == ["fp16"]
    bench.validation_runs.run_seed(runs, 1)
    assert runs.missing(1) == []
    assert {path.name for path in tmp_path.iterdir()} == {"results"}, "what was made of it is gone"
    decided = {gate.metric for gate in read_gates("fp16") if gate.min_positions <= 64}
    assert set(json.loads(runs.result(1, "fp16").read_text())["gates"]) == decided
    summary = bench.validation.summary(runs, "fp16")
    assert (summary["seeds"], summary["false_alarms"]) == (1, 0)
    assert set(summary["gates"]) == decided
    write_result(runs, 0, {})
    written = runs.result(1, "fp16").stat().st_mtime_ns
    bench.validation_runs.run_seeds(runs, 2, processes=1)
    assert runs.result(1, "fp16").stat().st_mtime_ns == written


def write_result(runs: Any, seed: int, values: dict[str, float]) -> None:
    gates = {name: {"value": value, "where": "", "positions": 9} for name, value in values.items()}
    runs.result(seed, "fp16").write_text(json.dumps({"seed": seed, "cpu_seconds": 1.0, "gates": gates}))


def test_a_false_alarm_is_counted_and_the_worst_is_named(bench: Any, tmp_path: Path) -> None:
    """Of agreement the smallest is the worst; NaN is worse than any number."""
    runs = bench.validation_runs.Runs(tmp_path, ["fp16"])
    (tmp_path / "results").mkdir()
    for seed, (kl, agreement) in enumerate([(0.0, 1.0), (math.nan, 0.999), (9.0, 0.5)]):
        write_result(runs, seed, {"kl_mean": kl, "own_top1_agreement": agreement})
    write_result(runs, 3, {"kl_mean": 0.0})
    found = bench.validation.summary(runs, "fp16")
    assert (found["seeds"], found["false_alarms"]) == (4, 3)
    kl, agreement = found["gates"]["kl_mean"], found["gates"]["own_top1_agreement"]
    assert math.isnan(kl["worst"])
    assert (kl["worst_seed"], kl["failed_seeds"]) == (1, [1, 2])
    assert (agreement["worst"], agreement["worst_seed"], agreement["seeds"]) == (0.5, 2, 3)
    assert agreement["failed_seeds"] == [2]
    assert "| | own_top1_agreement |" in bench.validation.table({"fp16": found})


RESULTS = json.loads((ROOT / "bench/results/validation.json").read_text())["precisions"]


def gates_with_results() -> Iterator[tuple[Gate, dict[str, Any]]]:
    for precision in CACHE_DTYPES:
        found = RESULTS[precision]["gates"]
        yield from ((gate, found[gate.metric]) for gate in read_gates(precision))


def test_no_healthy_artifact_failed_and_the_results_are_of_these_limits() -> None:
    assert set(RESULTS) == set(CACHE_DTYPES)
    for gate, found in gates_with_results():
        assert found[gate.bound] == gate.limit, f"{gate.metric}: make bench-validation"
        assert found["failed_seeds"] == []


def test_every_limit_leaves_healthy_artifacts_a_margin() -> None:
    """Twice the worst, of a perplexity twice its distance from 1; shares of positions have no such scale."""
    for gate, found in gates_with_results():
        best = 1.0 if gate.metric == "perplexity_ratio" else 0.0
        if gate.bound == "at_most" and gate.limit > 0:
            assert gate.limit - best >= 2 * (found["worst"] - best), (gate, found["worst"])
        if gate.metric == "input_range_used_min":
            assert 2 * gate.limit <= found["worst"], (gate, found["worst"])
