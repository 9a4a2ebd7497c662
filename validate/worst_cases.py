"""Logits of both sides → the positions where they are furthest apart, in words a person can read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mistral_trt.errors import ManifestError
from mistral_trt.runtime.text.tokenizer import Tokenizer
from mistral_trt.validate.findings import Choice, WorstCase
from mistral_trt.validate.metrics import LogitErrors
from mistral_trt.validate.trial import Trial

KEPT = 10
_CONTEXT_TOKENS = 12


@dataclass(frozen=True)
class FarPosition:
    """A position and what each side puts first there, with the probability that it gives it."""

    position: int
    kl: float
    expected: tuple[int, float]
    found: tuple[int, float]


def far_positions(errors: LogitErrors, expected: np.ndarray, artifact: np.ndarray) -> list[FarPosition]:
    """The worst of some positions by KL divergence, NaN first.  expected, artifact: float32 [n, V]."""
    order = np.argsort(-np.nan_to_num(errors.kl, nan=np.inf), kind="stable")[:KEPT]
    return [
        FarPosition(int(errors.position[i]), float(errors.kl[i]), _first(expected[i]), _first(artifact[i]))
        for i in order
    ]


def furthest(found: Sequence[FarPosition]) -> list[FarPosition]:
    """The worst of all, one for each position."""
    ranked = sorted(found, key=lambda far: np.inf if np.isnan(far.kl) else far.kl, reverse=True)
    distinct = {far.position: far for far in reversed(ranked)}
    return [far for far in ranked if distinct[far.position] is far][:KEPT]


def worst_cases(found: Mapping[str, Sequence[FarPosition]], trial: Trial) -> tuple[WorstCase, ...]:
    """Of all scenarios the worst positions.  found: by scenario."""
    tokens, has_text = trial.tokens.ids, "tokenizer.json" in trial.subject.manifest.files
    try:
        tokenizer = Tokenizer.from_folder(trial.folder) if has_text else None
    except ManifestError:  # a finding of the weights'
        tokenizer = None
    worst = furthest([far for fars in found.values() for far in fars])
    cases = []
    for far in worst:
        name = next(name for name, fars in found.items() if far in fars)
        context = tokens[max(0, far.position + 1 - _CONTEXT_TOKENS) : far.position + 1]
        choices = (_choice(tokenizer, *choice) for choice in (far.expected, far.found))
        cases.append(WorstCase(name, far.position, far.kl, _text(tokenizer, context), *choices))
    return tuple(cases)


def _choice(tokenizer: Tokenizer | None, token: int, probability: float) -> Choice:
    return Choice(token, _text(tokenizer, [token]), probability)


def _text(tokenizer: Tokenizer | None, tokens: Sequence[int]) -> str:
    return "" if tokenizer is None else tokenizer.decode(list(tokens))


def _first(logits: np.ndarray) -> tuple[int, float]:
    """[V] -> the token put first, its probability"""
    token = int(logits.argmax())
    wide = logits.astype(np.float64)
    return token, float(1 / np.exp(wide - wide[token]).sum())
