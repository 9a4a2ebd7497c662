"""Answers of two sides → figures: each against its definition, and by the examples of the docstrings."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_trt.validate.tasks.agreement import (
    Outcome,
    Share,
    agreement,
    is_right,
    mcnemar,
    ranks,
    share,
    spearman,
)
from mistral_trt.validate.tasks.answers import Answer, ChoiceAnswer, CompletionAnswer, NoAnswer, Question
from mistral_trt.validate.tasks.items import Completion, MultipleChoice

CHOICE = MultipleChoice("2 + 2 =", (" 4", " 55", " 6"), 0)
COMPLETION = Completion("one two", "three", 4)


def chose(*loglikelihoods: float) -> ChoiceAnswer:
    sizes = [len(choice) for choice in CHOICE.choices]
    return ChoiceAnswer(loglikelihoods, tuple(a / b for a, b in zip(loglikelihoods, sizes, strict=True)))


def wrote(*tokens: int, text: str = "") -> CompletionAnswer:
    return CompletionAnswer(text, tokens, (0.5,) * len(tokens))


def outcome(item: MultipleChoice | Completion, reference: Answer, artifact: Answer) -> Outcome:
    return Outcome(Question("sums", 1, item, (1, 2), ((3,),)), reference, artifact)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (40, 40, 0.9124, 1.0), (0, 40, 0.0, 0.0876), (1, 2, 0.0945, 0.9055)],
)
def test_wilson(count: int, total: int, low: float, high: float) -> None:
    assert Share(count, total).interval == pytest.approx((low, high), abs=1e-4)


@given(st.integers(0, 60), st.integers(1, 60))
def test_wilson_bounds_solve_its_equation(count: int, total: int) -> None:
    """At a bound p, the share lies 1.96 standard errors away, the error being that of p."""
    found = Share(min(count, total), total)
    for p in found.interval:
        error = math.sqrt(p * (1 - p) / total)
        assert abs(found.value - p) == pytest.approx(1.959964 * error, abs=1e-6)
    assert found.interval[0] <= found.value <= found.interval[1]


@pytest.mark.parametrize(
    ("only", "p"), [((0, 0), 1.0), ((0, 5), 0.0625), ((5, 0), 0.0625), ((3, 3), 1.0), ((1, 9), 22 / 1024)]
)
def test_mcnemar(only: tuple[int, int], p: float) -> None:
    assert mcnemar(*only) == pytest.approx(p)


def test_ranks_share_ties() -> None:
    assert ranks([5, 7, 5]).tolist() == [0.5, 2, 0.5]
    assert ranks([-1.5, -3, 0]).tolist() == [1, 0, 2]


@given(st.lists(st.integers(-50, 0), min_size=2, max_size=6, unique=True))
def test_spearman_is_one_for_one_order_and_minus_one_for_its_reverse(values: list[int]) -> None:
    found = spearman(values, [math.exp(value) * 3 + value for value in values])
    assert found == pytest.approx(1)
    assert spearman(values, [-value for value in values]) == pytest.approx(-1)
    assert spearman(values, [1.0] * len(values)) is None


def test_spearman_is_the_correlation_of_the_ranks() -> None:
    a, b = [0.1, 0.4, 0.2, 0.9, 0.4], [3.0, 1.0, 2.0, 2.0, 5.0]
    assert spearman(a, b) == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])


def test_choices_are_the_same_or_not() -> None:
    same = outcome(CHOICE, chose(-1, -2, -3), chose(-1.5, -2, -3))
    assert same.same and same.loglikelihood_difference == 0.5 and same.rank_correlation == 1
    other = outcome(CHOICE, chose(-1, -2, -3), chose(-3, -2, -1))
    assert not other.same and other.rank_correlation == -1


def test_a_choice_per_byte_is_one_of_its_own() -> None:
    """ " 55" is the least likely as a whole of the two and the likelier a byte."""
    found = outcome(CHOICE, chose(-4, -4.5, -9), chose(-4, -9, -9))
    assert found.same and not found.same_per_byte
    assert agreement([found]).reference_per_byte == Share(0, 1)
    assert agreement([found]).artifact_per_byte == Share(1, 1)


@pytest.mark.parametrize(
    ("reference", "artifact", "diverged"),
    [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1, 2), (4, 2), 0), ((1, 2), (1, 2, 5), 2)],
)
def test_completions_diverge_at_the_first_token_that_differs(
    reference: tuple[int, ...], artifact: tuple[int, ...], diverged: int | None
) -> None:
    found = outcome(COMPLETION, wrote(*reference), wrote(*artifact))
    assert found.diverged == diverged
    assert found.same == (diverged is None)


def test_a_completion_is_right_if_it_begins_with_the_answer() -> None:
    question = outcome(COMPLETION, wrote(1), wrote(1)).question
    assert is_right(question, wrote(1, text=" three, four"))
    assert not is_right(question, wrote(1, text=" four three"))
    assert not is_right(question, NoAnswer("NaN"))


def test_figures_of_several_items() -> None:
    right, wrong, failed = chose(-1, -2, -3), chose(-2, -1, -3), NoAnswer("NaN")
    found = agreement([
        outcome(CHOICE, right, right),
        outcome(CHOICE, right, wrong),
        outcome(CHOICE, wrong, wrong),
        outcome(CHOICE, right, failed),
        outcome(COMPLETION, wrote(1, text="three"), wrote(2, text="four")),
    ])  # fmt: skip
    assert found.same == Share(2, 5)
    assert (found.reference, found.artifact) == (Share(4, 5), Share(1, 5))
    assert (found.only_reference, found.only_artifact, found.p_value) == (3, 0, 0.25)
    assert found.loglikelihood_difference == pytest.approx((1 / 3, 1))
    assert found.rank_correlation == pytest.approx((2.5 / 3, 0.5))
    assert (found.completions, found.failures) == (Share(0, 1), 1)


def test_figures_without_choices_are_none() -> None:
    found = agreement([outcome(COMPLETION, wrote(1), wrote(1))])
    assert found.same == share([True])
    assert found.same_per_byte is None and found.reference_per_byte is None
    assert found.loglikelihood_difference is None and found.rank_correlation is None
