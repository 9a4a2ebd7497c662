"""Penalties against a plain statement, token by token."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_trt.errors import GenerationError
from mistral_trt.runtime.sampling.params import SamplingParams
from mistral_trt.runtime.sampling.penalties import Penalties

SIZE = 12


def stated(
    logits: np.ndarray, params: SamplingParams, prompt: Sequence[int], text: Sequence[int]
) -> np.ndarray:
    """What the docstring says, one token after another, in float64."""
    expected = logits.astype(np.float64)
    for token in {t for t in prompt if t < len(logits)} | set(text):
        factor = params.repetition_penalty
        expected[token] = expected[token] / factor if expected[token] > 0 else expected[token] * factor
    for token, count in Counter(text).items():
        expected[token] -= params.presence_penalty + params.frequency_penalty * count
    return expected.astype(np.float32)


def got(logits: np.ndarray, params: SamplingParams, prompt: Sequence[int], text: Sequence[int]) -> np.ndarray:
    penalties = Penalties(params, prompt, len(logits))
    for token in text:
        penalties.add(token)
    changed = logits.copy()
    penalties.apply(changed)
    return changed


parameters = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1, 1.0]) | st.floats(0.5, 3),
    presence_penalty=st.sampled_from([0]) | st.floats(-2, 2),
    frequency_penalty=st.sampled_from([0]) | st.floats(-2, 2),
)
ids = st.lists(st.integers(0, SIZE - 1), max_size=30)


@settings(deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=SIZE, max_size=SIZE),
    parameters,
    st.lists(st.integers(0, SIZE + 3), max_size=30),
    ids,
)
def test_penalties_are_as_stated(
    logits: list[float], params: SamplingParams, prompt: list[int], text: list[int]
) -> None:
    given = np.array(logits, np.float32)
    np.testing.assert_allclose(
        got(given, params, prompt, text), stated(given, params, prompt, text), rtol=3e-7, atol=1e-30
    )


def test_examples() -> None:
    logits = np.array([4, -4, 0, 4, -4], np.float32)
    twice = SamplingParams(repetition_penalty=2)
    assert list(got(logits, twice, [0, 1, 2], [3, 3])) == [2, -8, 0, 2, -4]
    counted = SamplingParams(presence_penalty=1, frequency_penalty=0.5)
    assert list(got(logits, counted, [0, 1, 2], [3, 3, 4])) == [4, -4, 0, 2, -5.5]
    both = SamplingParams(repetition_penalty=2, presence_penalty=1)
    assert list(got(logits, both, [0], [0])) == [1, -4, 0, 4, -4], "divided first, then subtracted"


def test_a_banned_token_stays_banned() -> None:
    logits = np.full(3, -np.inf, np.float32)
    params = SamplingParams(repetition_penalty=0.5, presence_penalty=-2)
    assert list(got(logits, params, [0], [0, 1])) == [-np.inf] * 3


def test_the_statement_can_fail() -> None:
    """The plain statement tells the rules apart that are easily mistaken for one another."""
    logits, prompt, text = np.array([4, -4, 1], np.float32), [0, 1], [2, 2]
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25)
    right = got(logits, params, prompt, text)
    assert np.array_equal(right, stated(logits, params, prompt, text))
    for wrong in [
        got(logits, params, [], text),  # the prompt is left out of repetition
        got(logits, params, [], prompt + text),  # the prompt is counted for presence
        got(logits, params, prompt, text[:1]),  # presence instead of frequency
        got(logits, SamplingParams(repetition_penalty=1.5), prompt, text),
    ]:
        assert not np.allclose(wrong, right)


def test_many_tokens_and_a_long_prompt() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=5000).astype(np.float32)
    prompt, text = rng.integers(0, 5000, 4000).tolist(), rng.integers(0, 5000, 3000).tolist()
    params = SamplingParams(repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.1)
    np.testing.assert_allclose(
        got(logits, params, prompt, text), stated(logits, params, prompt, text), rtol=1e-6, atol=1e-7
    )


def test_without_penalties_nothing_is_done() -> None:
    assert not Penalties(SamplingParams(), [1], 5).active
    for name, value in [("repetition_penalty", 0.9), ("presence_penalty", 1), ("frequency_penalty", -1)]:
        assert Penalties(SamplingParams(**{name: value}), [1], 5).active  # type: ignore[arg-type]


def test_a_prompt_with_a_negative_id_is_refused() -> None:
    with pytest.raises(GenerationError, match="expected token ids >= 0 in the prompt, found -3"):
        Penalties(SamplingParams(repetition_penalty=2), [5, -3, -1], 10)
