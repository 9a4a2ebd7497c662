"""Errors over the text and a greedy continuation → how well the artifact writes, in a few figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mistral_trt.validate.metrics import LogitErrors, Perplexity, concatenate, mean, perplexity
from mistral_trt.validate.scenarios.greedy import GreedyAgreement
from mistral_trt.validate.scenarios.tokens import Tokens
from mistral_trt.validate.verdict.scenario_results import OwnPrecision, ScenarioResult

READING = "prefill"
"""The scenario that is read for quality: every position once, in whole chunks."""


@dataclass(frozen=True)
class Quality:
    """What rounding and quantization cost over a text.

    positions: of the scenario, as far as it came.  perplexity: all NaN over random tokens.
    greedy: None where nothing was generated.
    """

    positions: int
    perplexity: Perplexity
    kl_mean: float
    top1_agreement: float
    greedy: GreedyAgreement | None


def measure_quality(results: Sequence[ScenarioResult], greedy: GreedyAgreement | None) -> Quality:
    """The figures of the scenario that reads whole chunks; NaN where it gave none."""
    read = reading(results)
    return Quality(len(read), perplexity(read), mean(read, "kl"), mean(read, "agree"), greedy)


@dataclass(frozen=True)
class Pair:
    """One side held against another, over the same positions.

    perplexity: `reference` is that of `against`, `artifact` that of `side`; all NaN over random tokens.
    """

    side: str
    against: str
    positions: int
    perplexity: Perplexity
    kl_mean: float
    top1_agreement: float
    relative_error_mean: float


def three_way(results: Sequence[ScenarioResult], own: OwnPrecision) -> tuple[Pair, ...]:
    """Reference, the reference in the artifact's own precision, and the artifact: each against each."""
    return (
        _pair("own precision", "reference", own.reference),
        _pair("artifact", "own precision", reading(own.scenarios)),
        _pair("artifact", "reference", reading(results)),
    )


def _pair(side: str, against: str, errors: LogitErrors) -> Pair:
    return Pair(
        side,
        against,
        len(errors),
        perplexity(errors),
        mean(errors, "kl"),
        mean(errors, "agree"),
        mean(errors, "relative"),
    )


def reading(results: Sequence[ScenarioResult]) -> LogitErrors:
    """Errors of the scenario that reads whole chunks; of no position where there is none."""
    return next((r.errors for r in results if r.scenario.name == READING), concatenate([]))


def calibration_remark(quantization: Mapping[str, Any] | None, tokens: Tokens) -> str | None:
    """Whether the scales were calibrated on this text, as far as names tell; None without scales or text."""
    if quantization is None or not tokens.is_text:
        return None
    found = quantization["calibration"]
    if found is None:
        return "The checkpoint was quantized elsewhere: what it was calibrated on is not recorded."
    same = tokens.source == found["source"] or tokens.source.startswith(f"{found['source']}, ")
    on = f"{found['source']}, {found['samples']:,} samples of {found['tokens']:,} tokens"
    if same:
        return (
            f"The scales were calibrated on a text of the same name ({on}): if it is this one, they flatter."
        )
    return f"This is not the text that the scales were calibrated on ({on})."
