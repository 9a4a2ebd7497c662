"""The table of limits, and what is held against it."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mistral_trt.contract import CACHE_DTYPES, QUANTIZED
from mistral_trt.errors import ValidationError
from mistral_trt.validate.metrics import LogitErrors, concatenate, logit_errors
from mistral_trt.validate.scenarios.poke import Poke, PokeResult, Question
from mistral_trt.validate.scenarios.scenario import Scenario
from mistral_trt.validate.verdict.gates import TITLES, Gate, Measured, judge, measure, read_gates, undecided
from mistral_trt.validate.verdict.scenario_results import ScenarioResult


def errors(size: int, **columns: float) -> LogitErrors:
    """Errors of `size` positions of text, zero but for the given values at the last one."""
    names = ("max_abs", "mean_abs", "relative", "cosine", "kl", "nll_reference", "nll")
    arrays = {name: np.zeros(size) for name in names}
    for name, value in columns.items():
        arrays[name][-1] = value
    position = np.arange(size)
    yes, rank = np.ones(size, bool), np.zeros(size, np.int64)
    return LogitErrors(position, **arrays, agree=yes, rank=rank, scored=yes)


def scenario(name: str, found: LogitErrors, failure: str | None = None) -> ScenarioResult:
    return ScenarioResult(Scenario(name, "", ()), found, failure)


def poke(visible: bool, changed: int) -> PokeResult:
    return PokeResult(Question(9, 10), Poke("q-W", (1,), visible), changed, 97)


def scenario_gates(precision: str) -> list[Gate]:
    """The gates of what scenarios and pokes measure."""
    return [gate for gate in read_gates(precision) if gate.metric in measure([scenario("a", errors(1))], [])]


@pytest.mark.parametrize("precision", CACHE_DTYPES)
def test_every_precision_has_exact_gates_and_rounding_gates(precision: str) -> None:
    gates = read_gates(precision)
    names = [gate.metric for gate in gates]
    exact = ["calls_failed", "weights_wrong", "hidden_slots_seen", "visible_slots_unseen"]
    assert names[:4] == exact
    quantized = {"perplexity_ratio", "kl_mean", "top1_agreement"}
    rounded = {"logit_error_max", "kl_max", "top1_agreement"}
    assert (quantized if precision in QUANTIZED else rounded) <= set(names)
    assert names == sorted(names, key=list(TITLES).index)
    assert all(gate.limit == 0 and gate.bound == "at_most" for gate in gates[:4])
    assert {"layer_update_error_max", "cache_error_max"} <= set(names)
    assert ("activation_max" in names) == (CACHE_DTYPES[precision] == "float16"), (
        "the dtype that ends at 65,504"
    )
    assert ("own_kl_mean" in names) == (precision != "fp32"), "float32 is the reference's own precision"


@pytest.mark.parametrize("precision", CACHE_DTYPES)
def test_every_limit_says_in_one_line_what_it_was_taken_from(precision: str) -> None:
    """A rounding limit names what healthy artifacts gave; the others have no rounding to measure."""
    for gate in read_gates(precision):
        assert 20 < len(gate.reason) <= 130 and "\n" not in gate.reason, gate.reason
        assert "to be measured" not in gate.reason and "provisional" not in gate.reason
        exact = gate.limit == 0 or gate.metric == "activation_max"
        assert exact or re.search(r"healthy \d", gate.reason), gate


def test_the_limits_that_were_promised() -> None:
    fp32 = {gate.metric: gate for gate in read_gates("fp32")}
    fp16 = {gate.metric: gate for gate in read_gates("fp16")}
    assert fp32["logit_error_max"].limit == 1e-3
    assert fp32["kl_max"].limit == 1e-7
    assert fp32["top1_agreement"].limit == 0.999
    assert fp16["top1_agreement"].limit == 0.99


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[fp32.kl_max]\nat_most = 1", "reason"),
        ("[fp32.kl_max]\nat_most = 1\nat_least = 0\nreason = 'x'", "either at_most or at_least"),
        ("[fp32.kl_max]\nat_most = 1\nreason = 'x'\nunless = 2", "either at_most or at_least"),
        ("[fp32.nonsense]\nat_most = 1\nreason = 'x'", "unknown metric 'nonsense'"),
        ("[fp16.kl_max]\nat_most = 1\nreason = 'x'", "no gates for precision 'fp32'"),
        ("[fp32.kl_max]\nat_most = nan\nreason = 'x'", "finite number"),
        ("[fp32.kl_max]\nat_most = '1'\nreason = 'x'", "finite number"),
        ("[fp32.kl_max]\nat_most = 1\nmin_positions = 1.5\nreason = 'x'", "a whole one"),
        ("[fp32.kl_max]\nat_most = 1\nof_text = 1\nreason = 'x'", "true or false, found 1"),
        ("[fp32.kl_max]\nat_least = 1\nreason = 'x'", "kl_max takes at_most, found at_least"),
        ("[fp32]\nkl_max = 1", "either at_most or at_least"),
        ("fp32 = 1", "unknown precision 'fp32'"),
        ("[fp23.kl_max]\nat_most = 1\nreason = 'x'", "unknown precision 'fp23'"),
        ("[fp32", "cannot be read as a table of gates"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    table = tmp_path / "gates.toml"
    table.write_text(text)
    with pytest.raises(ValidationError, match=message):
        read_gates("fp32", table)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="cannot be read"):
        read_gates("fp32", tmp_path / "none.toml")


def test_a_limit_is_inclusive_and_nan_never_passes() -> None:
    most, least = Gate("kl_max", "at_most", 1.0, ""), Gate("top1_agreement", "at_least", 0.99, "")
    assert most.holds(1.0)
    assert not most.holds(np.nextafter(1.0, 2.0))
    assert least.holds(0.99)
    assert not least.holds(0.9899)
    assert not most.holds(float("nan"))
    assert not least.holds(float("nan"))


def test_the_worst_scenario_is_measured_with_its_place() -> None:
    found = measure([scenario("a", errors(5, max_abs=1, kl=3)), scenario("b", errors(9, max_abs=2))], [])
    assert found["logit_error_max"] == Measured(2.0, "b at 8", 5)
    assert found["kl_max"] == Measured(3.0, "a at 4", 5)
    assert found["kl_mean"] == Measured(0.6, "a", 5)
    assert found["calls_failed"].value == 0


def test_agreement_is_the_lowest_of_the_scenarios() -> None:
    good, bad = errors(4), errors(4)
    bad.agree[1] = False
    found = measure([scenario("good", good), scenario("bad", bad)], [])
    assert found["top1_agreement"] == Measured(0.75, "bad", 4)


def test_perplexity_is_the_worst_scenarios() -> None:
    """Two positions whose mean is log 2 worse: ratio 2."""
    worse = errors(2, nll=2 * np.log(2))
    found = measure([scenario("good", errors(5)), scenario("worse", worse)], [])
    assert found["perplexity_ratio"].value == pytest.approx(2)
    assert found["perplexity_ratio"].where == "worse"
    assert found["perplexity_ratio"].positions == 2
    better = measure([scenario("a", errors(5)), scenario("b", errors(2, nll_reference=9))], [])
    assert better["perplexity_ratio"].value == 1


def test_of_random_tokens_perplexity_is_not_decided() -> None:
    gates = scenario_gates("int8")
    random = replace(errors(2000, nll=np.nan), scored=np.zeros(2000, bool))
    found = measure([scenario("a", errors(2000)), scenario("b", random)], [])
    assert found["perplexity_ratio"].positions == 0
    (left,) = undecided(gates, found)
    assert (left.gate.metric, left.why) == ("perplexity_ratio", "takes 1,000 positions of text, found 0")
    assert "perplexity_ratio" not in {result.name for result in judge(gates, found)}


@pytest.mark.parametrize("precision", QUANTIZED)
def test_logits_of_the_token_before_fail_the_gate_of_perplexity(precision: str) -> None:
    """A model that predicts its text well, and the same logits one position late."""
    text = np.random.default_rng(0).integers(0, 97, 1200)
    targets = np.append(text[1:], -1)
    logits = np.random.default_rng(1).normal(size=(1200, 97)) + 5 * np.eye(97)[targets]
    late = np.roll(logits, 1, axis=0)
    for artifact, passed in ((logits, True), (late, False)):
        found = measure(
            [
                scenario(
                    "prefill",
                    logit_errors(logits, artifact, positions=np.arange(len(targets)), targets=targets),
                )
            ],
            [],
        )
        gates = {result.name: result for result in judge(scenario_gates(precision), found)}
        assert gates["perplexity_ratio"].measured.positions == 1199
        assert gates["perplexity_ratio"].passed is passed


def test_nan_hides_behind_no_larger_number() -> None:
    found = measure([scenario("a", errors(3, kl=float("nan"))), scenario("b", errors(3, kl=9))], [])
    assert np.isnan(found["kl_max"].value)
    assert np.isnan(found["kl_mean"].value)


def test_failed_calls_and_wrong_pokes_are_counted() -> None:
    results = [scenario("a", errors(3), "RuntimeError: no"), scenario("b", errors(5))]
    pokes = [poke(False, 0), poke(False, 4), poke(True, 0), poke(True, 97)]
    found = measure(results, pokes, failures=["poke"])
    assert found["calls_failed"] == Measured(2, "a at 3; poke", 3)
    assert found["hidden_slots_seen"] == Measured(1, "decode at 9: q-W", 2)
    assert found["visible_slots_unseen"] == Measured(1, "decode at 9: q-W", 2)


def test_a_scenario_without_a_position_fails_every_rounding_gate() -> None:
    found = measure([scenario("a", concatenate([]), "it broke")], [])
    failed = {result.name for result in judge(scenario_gates("fp16"), found) if not result.passed}
    assert failed >= {"calls_failed", "logit_error_max", "kl_max", "kl_mean"}


def test_a_gate_that_needs_more_positions_is_left_out_by_name() -> None:
    gates = [Gate("top1_agreement", "at_least", 0.99, "", 1000), Gate("kl_max", "at_most", 1.0, "")]
    found = measure([scenario("a", errors(999))], [])
    assert [result.name for result in judge(gates, found)] == ["kl_max"]
    assert [left.gate.metric for left in undecided(gates, found)] == ["top1_agreement"]
    enough = measure([scenario("a", errors(1000))], [])
    assert len(judge(gates, enough)) == 2
    assert undecided(gates, enough) == ()


def test_a_gate_of_text_is_left_out_over_random_tokens() -> None:
    """Calibration met text: what an int8 input clips of other tokens says nothing about its use."""
    for precision, of_text in (("int8", True), ("fp8", True), ("int4", False), ("fp16", False)):
        gates = [gate for gate in read_gates(precision) if gate.metric == "top1_agreement"]
        found = measure([scenario("a", errors(1000))], [])
        assert len(judge(gates, found)) == 1
        assert len(judge(gates, found, is_text=False)) == (0 if of_text else 1)
        left = [each.why for each in undecided(gates, found, is_text=False)]
        assert left == (["takes text, found random tokens"] if of_text else [])


def test_a_gate_about_something_unmeasured_is_refused() -> None:
    with pytest.raises(ValidationError, match="kl_max was not measured"):
        judge([Gate("kl_max", "at_most", 1.0, "")], {})


def test_a_part_that_was_not_run_passes_nothing() -> None:
    gates = [Gate("weights_wrong", "at_most", 0, ""), Gate("kl_max", "at_most", 1.0, "")]
    found = {**measure([scenario("a", errors(5))], []), "weights_wrong": None}
    assert [result.name for result in judge(gates, found)] == ["kl_max"]
    (left,) = undecided(gates, found)
    assert (left.gate.metric, left.why) == ("weights_wrong", "not run")


def table(folder: Path, text: str) -> Path:
    path = folder / "own.toml"
    path.write_text(text)
    return path


def test_an_override_tightens_and_adds(tmp_path: Path) -> None:
    own = table(
        tmp_path,
        "[fp16.kl_max]\nat_most = 1e-3\nreason = 'ours'\n"
        "[every.perplexity_ratio]\nat_most = 1.01\nreason = 'x'\n"
        "[fp16.top1_agreement]\nat_least = 0.995\nreason = 'y'\n[fp32.kl_max]\nat_most = 0\nreason = 'z'",
    )
    usual = {gate.metric: gate for gate in read_gates("fp16")}
    found = {gate.metric: gate for gate in read_gates("fp16", override=own)}
    changed = {name: gate for name, gate in found.items() if gate != usual.get(name)}
    assert changed == {
        "kl_max": Gate("kl_max", "at_most", 1e-3, "ours"),
        "perplexity_ratio": Gate("perplexity_ratio", "at_most", 1.01, "x"),
        "top1_agreement": Gate("top1_agreement", "at_least", 0.995, "y", 1000),
    }
    assert list(found) == sorted(found, key=list(TITLES).index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[fp16.kl_max]\nat_most = 0.02\nreason = 'x'", "at_most 0.02 is looser than at_most 0.01"),
        ("[every.kl_max]\nat_most = 0.02\nreason = 'x'", "at_most 0.02 is looser than at_most 0.01"),
        ("[fp16.top1_agreement]\nat_least = 0.9\nreason = 'x'", "at_least 0.9 is looser than at_least 0.99"),
        (
            "[fp16.top1_agreement]\nat_least = 1\nmin_positions = 5000\nreason = 'x'",
            "5000 positions are asked for before it decides, 1000 are enough",
        ),
        (
            "[fp16.kl_max]\nat_most = 0\nof_text = true\nreason = 'x'",
            "of_text would not decide over random tokens",
        ),
        ("[fp16.wisdom]\nat_least = 1\nreason = 'x'", "unknown metric 'wisdom'"),
        ("[bf16.wisdom]\nat_least = 1\nreason = 'x'", "unknown metric 'wisdom'"),
        ("[fp17.kl_max]\nat_most = 0\nreason = 'x'", "unknown precision 'fp17'; known are every, fp32"),
        ("[fp16.kl_max]\nat_most = 0", "a reason"),
    ],
)
def test_an_override_that_loosens_or_is_damaged_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as error:
        read_gates("fp16", override=table(tmp_path, text))
    assert "own.toml" in str(error.value) or "wisdom" in message


def test_the_same_limit_is_no_loosening(tmp_path: Path) -> None:
    own = table(tmp_path, "[fp16.kl_max]\nat_most = 0.01\nreason = 'x'")
    assert {gate.metric: gate.limit for gate in read_gates("fp16", override=own)}["kl_max"] == 0.01
