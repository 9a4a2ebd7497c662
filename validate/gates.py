"""Measured numbers + the table of limits → gates passed and gates failed."""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_trt.errors import ValidationError
from mistral_trt.validate.metrics import LogitErrors, mean, perplexity, worst
from mistral_trt.validate.poke import PokeResult
from mistral_trt.validate.scenarios import Scenario

TABLE = Path(__file__).with_name("gates.toml")

TITLES = {
    "calls_failed": "Calls that failed",
    "hidden_slots_seen": "Hidden slots that showed",
    "visible_slots_unseen": "Visible slots that did not show",
    "logit_error_max": "Logit error, largest",
    "relative_error_mean": "Relative logit error, mean",
    "kl_max": "KL divergence, largest",
    "kl_mean": "KL divergence, mean",
    "cosine_distance_max": "Cosine distance, largest",
    "perplexity_ratio": "Perplexity, over the reference's",
    "top1_agreement": "Top-1 agreement",
}
"""Every quantity that can be gated, in the order of the report."""


@dataclass(frozen=True)
class ScenarioResult:
    """What a scenario gave: errors of the positions it reached, and why it stopped short if it did."""

    scenario: Scenario
    errors: LogitErrors
    failure: str | None


@dataclass(frozen=True)
class Measured:
    """A number, where it was found, and over how many positions."""

    value: float
    where: str
    positions: int


@dataclass(frozen=True)
class Gate:
    """One row of the table.  bound: "at_most" or "at_least".  min_positions: fewer decide nothing."""

    metric: str
    bound: str
    limit: float
    reason: str
    min_positions: int = 0

    def __post_init__(self) -> None:
        if self.metric not in TITLES:
            raise ValidationError(f"gates: unknown metric {self.metric!r}; known are {', '.join(TITLES)}")

    def holds(self, value: float) -> bool:
        """Whether `value` passes; NaN never does."""
        return value <= self.limit if self.bound == "at_most" else value >= self.limit


@dataclass(frozen=True)
class GateResult:
    """A gate and the number that was held against it."""

    gate: Gate
    measured: Measured

    @property
    def name(self) -> str:
        return self.gate.metric

    @property
    def title(self) -> str:
        return TITLES[self.gate.metric]

    @property
    def passed(self) -> bool:
        return self.gate.holds(self.measured.value)


def read_gates(precision: str, table: Path = TABLE) -> list[Gate]:
    """The gates of a precision, in the order of the report. Raises ValidationError for a damaged table."""
    try:
        data = tomllib.loads(table.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValidationError(f"{table} cannot be read as a table of gates: {error}") from error
    if precision not in data:
        raise ValidationError(f"{table} has no gates for precision {precision!r}")
    rows = {**data.get("every", {}), **data[precision]}
    gates = [_gate(metric, row, table) for metric, row in rows.items()]
    return sorted(gates, key=lambda gate: list(TITLES).index(gate.metric))


def _gate(metric: str, row: Mapping[str, Any], table: Path) -> Gate:
    bounds = sorted({"at_most", "at_least"} & set(row))
    extra = sorted(set(row) - {"at_most", "at_least", "reason", "min_positions"})
    if len(bounds) != 1 or extra or "reason" not in row:
        raise ValidationError(
            f"{table}: {metric} must have either at_most or at_least, a reason, and at most min_positions "
            f"beside them, found {sorted(row)}"
        )
    limit = float(row[bounds[0]])
    return Gate(metric, bounds[0], limit, row["reason"], row.get("min_positions", 0))


def judge(gates: Sequence[Gate], measured: Mapping[str, Measured]) -> tuple[GateResult, ...]:
    """Hold each gate against its number; gates that need more positions than there are, are left out.

    Raises ValidationError for a gate whose number was not measured.
    """
    for gate in gates:
        if gate.metric not in measured:
            raise ValidationError(f"gates: {gate.metric} was not measured in this run")
    pairs = [(gate, measured[gate.metric]) for gate in gates]
    return tuple(GateResult(gate, found) for gate, found in pairs if found.positions >= gate.min_positions)


def undecided(gates: Sequence[Gate], measured: Mapping[str, Measured]) -> list[Gate]:
    """The gates that `judge` leaves out."""
    return [gate for gate in gates if measured[gate.metric].positions < gate.min_positions]


def measure(
    results: Sequence[ScenarioResult], pokes: Sequence[PokeResult], *, failures: Sequence[str] = ()
) -> dict[str, Measured]:
    """Every number that can be gated, over all scenarios: the worst one's, with its place.

    Perplexity and top-1 agreement are of the scenarios that compare every position.

    failures: places outside the scenarios where a call failed.
    """
    whole = [result for result in results if result.scenario.whole]
    failed = [f"{r.scenario.name} at {len(r.errors)}" for r in results if r.failure] + list(failures)
    return {
        "calls_failed": Measured(len(failed), "; ".join(failed), _positions(results)),
        "hidden_slots_seen": _pokes(pokes, visible=False),
        "visible_slots_unseen": _pokes(pokes, visible=True),
        "logit_error_max": _largest(results, "max_abs"),
        "relative_error_mean": _largest_mean(results, "relative"),
        "kl_max": _largest(results, "kl"),
        "kl_mean": _largest_mean(results, "kl"),
        "cosine_distance_max": _largest(results, "cosine"),
        "perplexity_ratio": _largest_ratio(whole),
        "top1_agreement": _smallest_agreement(whole),
    }


def _positions(results: Sequence[ScenarioResult]) -> int:
    return min((len(result.errors) for result in results if result.scenario.whole), default=0)


def _pokes(pokes: Sequence[PokeResult], *, visible: bool) -> Measured:
    wrong = [result for result in pokes if result.poke.visible is visible and not result.passed]
    where = f"{wrong[0].question.name}: {wrong[0].poke.name}" if wrong else ""
    return Measured(len(wrong), where, sum(result.poke.visible is visible for result in pokes))


def _largest(results: Sequence[ScenarioResult], metric: str) -> Measured:
    found = [(worst(result.errors, metric), result) for result in results]
    extreme, result = max(found, key=lambda pair: _order(pair[0].value))
    name = result.scenario.name
    where = name if extreme.position is None else f"{name} at {extreme.position}"
    return Measured(extreme.value, where, _positions(results))


def _largest_mean(results: Sequence[ScenarioResult], metric: str) -> Measured:
    found = [(mean(result.errors, metric), result.scenario.name) for result in results]
    value, where = max(found, key=lambda pair: _order(pair[0]))
    return Measured(value, where, _positions(results))


def _largest_ratio(results: Sequence[ScenarioResult]) -> Measured:
    """Only positions that have a next token count: of random tokens none."""
    found = [(perplexity(result.errors), result.scenario.name) for result in results]
    extreme, where = max(found, key=lambda pair: _order(pair[0].ratio))
    return Measured(extreme.ratio, where, min(scored.positions for scored, _ in found))


def _smallest_agreement(results: Sequence[ScenarioResult]) -> Measured:
    found = [(mean(result.errors, "agree"), result.scenario.name) for result in results]
    value, where = max(found, key=lambda pair: _order(-pair[0]))
    return Measured(value, where, _positions(results))


def _order(value: float) -> float:
    """NaN sorts as the worst."""
    return math.inf if math.isnan(value) else value
