"""Error metrics: known values, invariances, and each one moved by a planted error."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_trt.validate import metrics
from mistral_trt.validate.metrics import LogitErrors, concatenate, logit_errors, mean, worst

LOGITS = np.random.default_rng(0).normal(0, 3, (7, 50)).astype(np.float32)


def test_equal_logits_have_no_error() -> None:
    errors = logit_errors(LOGITS, LOGITS.copy())
    assert errors.agree.all()
    for name in ("max_abs", "mean_abs", "relative", "kl"):
        assert worst(errors, name).value == pytest.approx(0, abs=1e-14)
    assert worst(errors, "cosine").value == pytest.approx(0, abs=1e-14)


def test_two_tokens_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/4, 3/4): KL = 1/2 log 3."""
    three = np.log(3.0)
    errors = logit_errors(np.array([[three, 0.0]]), np.array([[0.0, three]]))
    assert errors.kl[0] == pytest.approx(0.5 * three)
    assert errors.max_abs[0] == pytest.approx(three)
    assert errors.mean_abs[0] == pytest.approx(three)
    assert errors.relative[0] == pytest.approx(2.0)
    assert errors.cosine[0] == pytest.approx(1.0)
    assert not errors.agree[0]


def test_the_arithmetic_is_float64() -> None:
    """Differences of 1e-6 on logits around 1e3 survive; float32 would lose their KL."""
    reference = np.array([[1000.0, 999.0]])
    errors = logit_errors(reference, np.add(reference, [[1e-6, -1e-6]]))
    p = 1 / (1 + np.exp(-1.0))
    assert errors.kl[0] == pytest.approx(0.5 * p * (1 - p) * (2e-6) ** 2, rel=0.05)


@pytest.mark.parametrize("name", [field.name for field in fields(LogitErrors)])
def test_every_metric_sees_a_planted_error(name: str) -> None:
    broken = LOGITS.copy()
    broken[4, int(broken[4].argmin())] += 40
    errors = logit_errors(LOGITS, broken)
    if name == "agree":
        np.testing.assert_array_equal(errors.agree, [True] * 4 + [False] + [True] * 2)
    else:
        found = worst(errors, name)
        assert found.position == 4
        assert found.value > 0.1


@given(shift=st.floats(-1e3, 1e3), scale=st.floats(1e-3, 1.0))
def test_kl_is_positive_and_blind_to_a_common_shift(shift: float, scale: float) -> None:
    noise = scale * np.random.default_rng(1).normal(size=LOGITS.shape)
    plain = logit_errors(LOGITS, LOGITS + noise)
    shifted = logit_errors(LOGITS, LOGITS + noise + shift)
    assert (plain.kl > 0).all()
    np.testing.assert_allclose(shifted.kl, plain.kl, rtol=1e-4, atol=1e-12)


def test_pieces_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    other = LOGITS + np.float32(0.01)
    whole = logit_errors(LOGITS, other)
    monkeypatch.setattr(metrics, "_PIECE_ELEMENTS", 100)
    for field in fields(LogitErrors):
        expected = getattr(whole, field.name)
        np.testing.assert_array_equal(getattr(logit_errors(LOGITS, other), field.name), expected)


def test_nan_is_the_worst_value_there_is() -> None:
    broken = LOGITS.copy()
    broken[2, 3] = np.nan
    errors = logit_errors(LOGITS, broken)
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
    joined = concatenate([logit_errors(LOGITS[:3], broken[:3]), logit_errors(LOGITS[3:], broken[3:])])
    np.testing.assert_allclose(joined.max_abs, np.arange(7), atol=1e-6)
    assert mean(joined, "max_abs") == pytest.approx(3)


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"equal shape, found \(7, 50\) and \(6, 50\)"):
        logit_errors(LOGITS, LOGITS[:6])
