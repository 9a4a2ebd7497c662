"""Sampling against plain statements of each rule."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_trt.errors import GenerationError
from mistral_trt.runtime.sampling import SamplingParams, candidates, sample, uniform

LOGITS = np.random.default_rng(3).normal(size=50).astype(np.float32) * 1.5


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x.astype(np.float64) - x.max())
    return np.asarray(weights / weights.sum())


def test_temperature_zero_takes_the_most_likely_and_the_lowest_id_of_a_tie() -> None:
    logits = np.array([1.0, 5.0, 5.0, 2.0], np.float32)
    assert sample(logits, SamplingParams(), seed=1, position=0) == 1


@given(temperature=st.floats(0.1, 5), top_k=st.integers(0, 60), top_p=st.floats(0.01, 0.999) | st.just(1.0))
def test_candidates_follow_the_rules(temperature: float, top_k: int, top_p: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens, probabilities = candidates(LOGITS, params)
    ranked = sorted(range(50), key=lambda t: (-LOGITS[t], t))[: top_k or 50]
    expected = softmax(LOGITS[ranked] / np.float64(temperature))
    kept = len(ranked)
    if top_p < 1:
        kept = next((n for n in range(1, kept) if expected[:n].sum() >= top_p), kept)
    # The sums are not taken in the same order, so the last token may fall on either side.
    assert list(tokens) in (ranked[:kept], ranked[: kept + 1], ranked[: kept - 1] or ranked[:1])
    np.testing.assert_allclose(probabilities, expected[: len(tokens)], rtol=1e-9)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    for top_p, count in [(0.4, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.95, 4), (1.0, 4)]:
        tokens, _ = candidates(logits, SamplingParams(temperature=1, top_p=top_p))
        assert list(tokens) == [0, 1, 2, 3][:count]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.8),
    ],
)
def test_draws_have_the_stated_distribution(params: SamplingParams) -> None:
    """Chi-squared over 20,000 draws with fixed seeds; the bound is passed by chance once in 10^6."""
    tokens, probabilities = candidates(LOGITS, params)
    expected = probabilities / probabilities.sum()
    draws = 20_000
    found = np.bincount([sample(LOGITS, params, 11, p) for p in range(draws)], minlength=50)[tokens]
    assert found.sum() == draws
    common = expected * draws >= 5
    statistic = ((found - expected * draws)[common] ** 2 / (expected * draws)[common]).sum()
    freedom = int(common.sum()) - 1
    # Wilson-Hilferty: the cube root of chi-squared over its freedom is nearly normal.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 4.75


def test_the_distribution_check_can_fail() -> None:
    params = SamplingParams(temperature=1.0)
    other = SamplingParams(temperature=1.2)
    _, right = candidates(LOGITS, params)
    _, wrong = candidates(LOGITS, other)
    assert np.abs(right - wrong).max() > 0.02


def test_the_smallest_temperature_takes_the_most_likely() -> None:
    assert sample(LOGITS, SamplingParams(temperature=1e-320), 3, 4) == int(np.argmax(LOGITS))


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    assert uniform(5, 9) == uniform(5, 9)
    assert len({uniform(5, p) for p in range(1000)}) == 1000
    assert uniform(5, 9) != uniform(6, 9)
    assert 0 <= uniform(2**64 - 1, 2**24) < 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(GenerationError, match=f"sampling: expected .*{field}.*found"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]
