"""Error metrics: known values, invariances, and each one moved by a planted error."""

import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_trt.validate import metrics
from mistral_trt.validate.metrics import (
    LogitErrors,
    concatenate,
    logit_errors,
    mean,
    percentile,
    perplexity,
    top5_agreement,
    worst,
)

LOGITS = np.random.default_rng(0).normal(0, 3, (7, 50)).astype(np.float32)
NEXT = np.array([3, 0, 49, 7, 7, 21, -1])
"""The text's next token at each of the seven positions: the last has none."""


def compare(reference: np.ndarray, artifact: np.ndarray, targets: np.ndarray = NEXT) -> LogitErrors:
    count = len(reference)
    return logit_errors(reference, artifact, positions=np.arange(count), targets=targets[:count])


def nll(logits: np.ndarray, token: int) -> float:
    """By the definition, -log(exp(x_t) / sum exp(x)), in Python's own floats."""
    return -math.log(math.exp(logits[token]) / math.fsum(math.exp(x) for x in logits.tolist()))


def test_equal_logits_have_no_error() -> None:
    errors = compare(LOGITS, LOGITS.copy())
    assert errors.agree.all()
    for name in ("max_abs", "mean_abs", "relative", "kl"):
        assert worst(errors, name).value == pytest.approx(0, abs=1e-14)
    assert worst(errors, "cosine").value == pytest.approx(0, abs=1e-14)


def test_two_tokens_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/4, 3/4): KL = 1/2 log 3."""
    three = np.log(3.0)
    errors = compare(np.array([[three, 0.0]]), np.array([[0.0, three]]), np.array([0]))
    assert errors.kl[0] == pytest.approx(0.5 * three)
    assert errors.max_abs[0] == pytest.approx(three)
    assert errors.mean_abs[0] == pytest.approx(three)
    assert errors.relative[0] == pytest.approx(2.0)
    assert errors.cosine[0] == pytest.approx(1.0)
    assert not errors.agree[0]
    assert errors.nll_reference[0] == pytest.approx(np.log(4 / 3))
    assert errors.nll[0] == pytest.approx(np.log(4))


def test_the_arithmetic_is_float64() -> None:
    """Differences of 1e-6 on logits around 1e3 survive; float32 would lose their KL."""
    reference = np.array([[1000.0, 999.0]])
    errors = compare(reference, np.add(reference, [[1e-6, -1e-6]]), np.array([0]))
    p = 1 / (1 + np.exp(-1.0))
    assert errors.kl[0] == pytest.approx(0.5 * p * (1 - p) * (2e-6) ** 2, rel=0.05)


METRICS = [field.name for field in fields(LogitErrors) if field.name != "position"]


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_sees_a_planted_error(name: str) -> None:
    broken = LOGITS.copy()
    broken[4, int(broken[4].argmin())] += 40
    errors = compare(LOGITS, broken)
    if name == "agree":
        np.testing.assert_array_equal(errors.agree, [True] * 4 + [False] + [True] * 2)
    elif name == "rank":
        np.testing.assert_array_equal(errors.rank, [0] * 4 + [1] + [0] * 2)
    elif name == "scored":
        np.testing.assert_array_equal(errors.scored, [True] * 6 + [False])
    elif name.startswith("nll"):
        moved = np.flatnonzero(np.abs(getattr(errors, name) - compare(LOGITS, LOGITS).nll) > 1)
        np.testing.assert_array_equal(moved, [4] if name == "nll" else [])
    else:
        found = worst(errors, name)
        assert found.position == 4
        assert found.value > 0.1


def test_the_rank_counts_what_is_put_before_the_references_choice() -> None:
    reference = np.array([[0.0, 5, 1, 2, 3, 4, 0]] * 3)
    artifact = np.array([[0.0, 5, 1, 2, 3, 4, 0], [9.0, 5, 9, 9, 9, 9, 9], [np.nan, 5, 1, 2, 3, 4, 0]])
    errors = compare(reference, artifact, np.array([0, 0, 0]))
    assert errors.rank.tolist() == [0, 6, 7]
    assert top5_agreement(errors) == pytest.approx(1 / 3)


def test_percentiles_are_values_that_were_measured() -> None:
    errors = compare(LOGITS, LOGITS + np.arange(7, dtype=np.float32)[:, None])
    assert percentile(errors, "max_abs", 50) == pytest.approx(3)
    assert percentile(errors, "max_abs", 99) == pytest.approx(6)


@given(shift=st.floats(-1e3, 1e3), scale=st.floats(1e-3, 1.0))
def test_kl_is_positive_and_blind_to_a_common_shift(shift: float, scale: float) -> None:
    noise = scale * np.random.default_rng(1).normal(size=LOGITS.shape)
    plain = compare(LOGITS, LOGITS + noise)
    shifted = compare(LOGITS, LOGITS + noise + shift)
    assert (plain.kl > 0).all()
    np.testing.assert_allclose(shifted.kl, plain.kl, rtol=1e-4, atol=1e-12)


def test_pieces_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    other = LOGITS + np.float32(0.01)
    whole = compare(LOGITS, other)
    monkeypatch.setattr(metrics, "_PIECE_ELEMENTS", 100)
    for field in fields(LogitErrors):
        expected = getattr(whole, field.name)
        np.testing.assert_array_equal(getattr(compare(LOGITS, other), field.name), expected)


def test_nan_is_the_worst_value_there_is() -> None:
    broken = LOGITS.copy()
    broken[2, 3] = np.nan
    errors = compare(LOGITS, broken)
    assert np.isnan(worst(errors, "max_abs").value)
    assert worst(errors, "max_abs").position == 2
    assert np.isnan(mean(errors, "kl"))


def test_no_positions_give_nan_and_no_place() -> None:
    errors = concatenate([])
    assert len(errors) == 0
    assert np.isnan(worst(errors, "kl").value)
    assert worst(errors, "kl").position is None
    assert np.isnan(mean(errors, "agree"))


def test_steps_are_joined_in_order() -> None:
    broken = LOGITS + np.arange(7, dtype=np.float32)[:, None]
    joined = concatenate([compare(LOGITS[:3], broken[:3]), compare(LOGITS[3:], broken[3:])])
    np.testing.assert_allclose(joined.max_abs, np.arange(7), atol=1e-6)
    assert mean(joined, "max_abs") == pytest.approx(3)


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"equal shape, found \(7, 50\) and \(6, 50\)"):
        compare(LOGITS, LOGITS[:6])


def test_a_target_for_each_position_is_required() -> None:
    with pytest.raises(ValueError, match=r"a target for each of 7 positions, found \(6,\)"):
        logit_errors(LOGITS, LOGITS, positions=np.arange(7), targets=NEXT[:6])


def test_the_log_likelihood_is_the_definitions() -> None:
    other = LOGITS[:, ::-1].copy()
    errors = compare(LOGITS, other)
    for position, token in enumerate(NEXT[:-1].tolist()):
        assert errors.nll_reference[position] == pytest.approx(nll(LOGITS[position], token), rel=1e-12)
        assert errors.nll[position] == pytest.approx(nll(other[position], token), rel=1e-12)
    assert np.isnan(errors.nll_reference[-1])
    assert np.isnan(errors.nll[-1])


def test_the_log_likelihood_survives_logits_that_overflow_exp() -> None:
    errors = compare(np.array([[2e4, 0.0]]), np.array([[0.0, 2e4]]), np.array([0]))
    assert errors.nll_reference[0] == 0
    assert errors.nll[0] == 2e4
    assert perplexity(errors).ratio == np.inf


def test_equal_logits_have_equal_perplexity() -> None:
    found = perplexity(compare(LOGITS, LOGITS.copy()))
    assert found.ratio == 1
    assert found.artifact == found.reference
    assert found.positions == 6


def test_perplexity_is_the_definitions() -> None:
    other = LOGITS + np.random.default_rng(2).normal(size=LOGITS.shape).astype(np.float32)
    found = perplexity(compare(LOGITS, other))
    sides = [
        math.exp(math.fsum(nll(row, t) for row, t in zip(logits[:-1], NEXT[:-1].tolist(), strict=True)) / 6)
        for logits in (LOGITS, other)
    ]
    assert [found.reference, found.artifact] == pytest.approx(sides, rel=1e-12)
    assert found.ratio == pytest.approx(sides[1] / sides[0], rel=1e-12)


def test_uniform_logits_have_the_vocabulary_for_perplexity() -> None:
    found = perplexity(compare(np.zeros((7, 50)), np.zeros((7, 50))))
    assert found.reference == pytest.approx(50)


def test_logits_of_the_token_before_are_more_perplexed() -> None:
    """A model that knows its text, read one position late."""
    text = np.random.default_rng(5).permutation(50)
    targets = np.append(text[1:], -1)
    knowing = np.eye(50)[targets] * 9
    found = perplexity(compare(knowing, np.roll(knowing, 1, axis=0), targets))
    assert found.reference < 1.01
    assert found.ratio > 1000


def test_nan_makes_the_perplexity_nan_wherever_it_is_scored() -> None:
    broken = LOGITS.copy()
    broken[2, 3] = np.nan
    assert np.isnan(perplexity(compare(LOGITS, broken)).ratio)
    unscored = LOGITS.copy()
    unscored[6, 3] = np.nan
    assert perplexity(compare(LOGITS, unscored)).ratio == 1


def test_without_a_next_token_there_is_no_perplexity() -> None:
    for errors in (compare(LOGITS, LOGITS, np.full(7, -1)), concatenate([])):
        found = perplexity(errors)
        assert found.positions == 0
        assert np.isnan([found.reference, found.artifact, found.ratio]).all()
