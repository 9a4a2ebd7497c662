"""Answers of both sides → how often they are the same, and how well each side does.

Agreement is the question; the scores stand beside it. Shares have Wilson's interval at 95 %, and the items
that only one side got right have the exact two-sided test of McNemar: the probability of so uneven a split,
or a more uneven one, if both sides were equally good.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mistral_trt.validate.tasks.answers import Answer, ChoiceAnswer, CompletionAnswer, Question
from mistral_trt.validate.tasks.items import Completion

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Share:
    """count of total, and Wilson's interval at 95 %."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """8 of 10 -> 0.490, 0.943; 40 of 40 -> 0.912, 1."""
        n, z2 = self.total, _Z95**2
        centre = (self.count + z2 / 2) / (n + z2)
        half = _Z95 / (n + z2) * math.sqrt(self.count * (n - self.count) / n + z2 / 4)
        low, high = max(0.0, centre - half), min(1.0, centre + half)
        return min(low, self.value), max(high, self.value)  # rounding leaves 29 of 29 just below 1


@dataclass(frozen=True)
class Outcome:
    """One question and both answers."""

    question: Question
    reference: Answer
    artifact: Answer

    @property
    def same(self) -> bool:
        """Whether both chose alike, or completed with the same tokens."""
        pair = (self.reference, self.artifact)
        if isinstance(pair[0], ChoiceAnswer) and isinstance(pair[1], ChoiceAnswer):
            return pair[0].choice == pair[1].choice
        if isinstance(pair[0], CompletionAnswer) and isinstance(pair[1], CompletionAnswer):
            return pair[0].tokens == pair[1].tokens
        return False

    @property
    def same_per_byte(self) -> bool:
        """Whether both chose alike by log-likelihood per byte."""
        pair = self.choices
        return pair is not None and pair[0].choice_per_byte == pair[1].choice_per_byte

    @property
    def choices(self) -> tuple[ChoiceAnswer, ChoiceAnswer] | None:
        if isinstance(self.reference, ChoiceAnswer) and isinstance(self.artifact, ChoiceAnswer):
            return self.reference, self.artifact
        return None

    @property
    def diverged(self) -> int | None:
        """Index of the first token that differs in two completions; None where there is none."""
        if not (isinstance(self.reference, CompletionAnswer) and isinstance(self.artifact, CompletionAnswer)):
            return None
        pair = self.reference.tokens, self.artifact.tokens
        if pair[0] == pair[1]:
            return None
        alike = [a == b for a, b in zip(*pair, strict=False)]
        return alike.index(False) if False in alike else len(alike)

    @property
    def loglikelihood_difference(self) -> float | None:
        """The largest over the choices, in nats."""
        if self.choices is None:
            return None
        first, second = self.choices
        pairs = zip(first.loglikelihoods, second.loglikelihoods, strict=True)
        return max(abs(a - b) for a, b in pairs)

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's, of the choices' log-likelihoods; None where a side ranks all alike."""
        if self.choices is None:
            return None
        return spearman(self.choices[0].loglikelihoods, self.choices[1].loglikelihoods)


@dataclass(frozen=True)
class Agreement:
    """The figures of a task, or of all together. Those of choices or completions are None without such items.

    same: as `Outcome.same`.  reference, artifact: right answers.  only_reference, only_artifact: items that
    one side alone got right.  p_value: McNemar's.  same_per_byte, reference_per_byte, artifact_per_byte: of
    choices by log-likelihood per byte.  loglikelihood_difference: mean and largest, in nats.
    rank_correlation: Spearman's, mean and smallest.  completions: that are the same.  failures: items that
    the artifact could not answer.
    """

    same: Share
    reference: Share
    artifact: Share
    only_reference: int
    only_artifact: int
    p_value: float
    same_per_byte: Share | None
    reference_per_byte: Share | None
    artifact_per_byte: Share | None
    loglikelihood_difference: tuple[float, float] | None
    rank_correlation: tuple[float, float] | None
    completions: Share | None
    failures: int


def agreement(outcomes: Sequence[Outcome]) -> Agreement:
    """Sum outcomes up; there must be one at least."""
    right = [
        (is_right(one.question, one.reference), is_right(one.question, one.artifact)) for one in outcomes
    ]
    choices = [one for one in outcomes if not isinstance(one.question.item, Completion)]
    completions = [one for one in outcomes if isinstance(one.question.item, Completion)]
    differences = [d for one in choices if (d := one.loglikelihood_difference) is not None]
    correlations = [c for one in choices if (c := one.rank_correlation) is not None]
    only = right.count((True, False)), right.count((False, True))
    return Agreement(
        same=share([one.same for one in outcomes]),
        reference=share([one for one, _ in right]),
        artifact=share([one for _, one in right]),
        only_reference=only[0],
        only_artifact=only[1],
        p_value=mcnemar(*only),
        same_per_byte=share([one.same_per_byte for one in choices]) if choices else None,
        reference_per_byte=_right_per_byte(choices, "reference"),
        artifact_per_byte=_right_per_byte(choices, "artifact"),
        loglikelihood_difference=(float(np.mean(differences)), max(differences)) if differences else None,
        rank_correlation=(float(np.mean(correlations)), min(correlations)) if correlations else None,
        completions=share([one.same for one in completions]) if completions else None,
        failures=sum(not isinstance(one.artifact, ChoiceAnswer | CompletionAnswer) for one in outcomes),
    )


def is_right(question: Question, answer: Answer) -> bool:
    """Whether the right choice was made, or the completion begins with the answer, blanks aside."""
    if isinstance(question.item, Completion):
        expected = question.item.answer.strip()
        return isinstance(answer, CompletionAnswer) and answer.text.lstrip().startswith(expected)
    return isinstance(answer, ChoiceAnswer) and answer.choice == question.item.answer


def share(holds: Sequence[bool]) -> Share:
    return Share(sum(holds), len(holds))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value. 0, 5 -> 0.0625; 3, 3 -> 1."""
    n, k = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / (1 << n))


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Correlation of the ranks, ties sharing theirs; None where all of one side tie."""
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else None


def ranks(values: Sequence[float]) -> np.ndarray:
    """Mean rank of each value, from 0. 5 7 5 -> 0.5 2 0.5"""
    array = np.asarray(values, dtype=np.float64)
    below = (array[None, :] < array[:, None]).sum(axis=1)
    alike = (array[None, :] == array[:, None]).sum(axis=1)
    mean_ranks: np.ndarray = below + (alike - 1) / 2
    return mean_ranks


def _right_per_byte(choices: Sequence[Outcome], side: str) -> Share | None:
    found = [(one.question.item.answer, getattr(one, side)) for one in choices]
    right = [isinstance(given, ChoiceAnswer) and given.choice_per_byte == answer for answer, given in found]
    return share(right) if choices else None
