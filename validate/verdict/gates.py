"""Measured numbers + the table of limits → gates passed, failed and not decided."""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_trt.contract import CACHE_DTYPES
from mistral_trt.errors import ValidationError
from mistral_trt.validate.metrics import mean, perplexity, worst
from mistral_trt.validate.scenarios.poke import PokeResult
from mistral_trt.validate.verdict.scenario_results import ScenarioResult

TABLE = Path(__file__).with_name("gates.toml")

TITLES = {
    "calls_failed": "Calls that failed",
    "weights_wrong": "Weights or tokenizer that are not the checkpoint's",
    "hidden_slots_seen": "Hidden slots that showed",
    "visible_slots_unseen": "Visible slots that did not show",
    "logit_error_max": "Logit error, largest",
    "relative_error_mean": "Relative logit error, mean",
    "kl_max": "KL divergence, largest",
    "kl_mean": "KL divergence, mean",
    "cosine_distance_max": "Cosine distance, largest",
    "perplexity_ratio": "Perplexity, over the reference's",
    "top1_agreement": "Top-1 agreement",
    "layer_update_error_max": "Layer update error, worst layer",
    "cache_error_max": "Cache error, worst layer",
    "activation_max": "Activation, largest",
    "own_relative_error_mean": "Relative logit error in its own precision, mean",
    "own_kl_mean": "KL divergence in its own precision, mean",
    "own_top1_agreement": "Top-1 agreement in its own precision",
}
"""Every quantity that can be gated, in the order of the report."""

_MORE_IS_BETTER = ("top1_agreement", "own_top1_agreement")
_KEYS = {"at_most", "at_least", "reason", "min_positions", "of_text"}


@dataclass(frozen=True)
class Measured:
    """A number, where it was found, and over how many positions."""

    value: float
    where: str
    positions: int


@dataclass(frozen=True)
class Gate:
    """One row of the table.  bound: "at_most" or "at_least".  min_positions: fewer decide nothing.

    of_text: whether random tokens decide nothing.
    """

    metric: str
    bound: str
    limit: float
    reason: str
    min_positions: int = 0
    of_text: bool = False

    def __post_init__(self) -> None:
        if self.metric not in TITLES:
            raise ValidationError(f"gates: unknown metric {self.metric!r}; known are {', '.join(TITLES)}")
        bound = "at_least" if self.metric in _MORE_IS_BETTER else "at_most"
        if self.bound != bound:
            raise ValidationError(f"gates: {self.metric} takes {bound}, found {self.bound}")

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


@dataclass(frozen=True)
class Undecided:
    """A gate that no number was held against.  why: what was missing, in words."""

    gate: Gate
    why: str

    @property
    def title(self) -> str:
        return TITLES[self.gate.metric]


def read_gates(precision: str, table: Path = TABLE, override: Path | None = None) -> list[Gate]:
    """The gates of a precision, in the order of the report.

    override: a user's table of the same shape, whose rows add gates or tighten those of `table`; a row
    without min_positions keeps that of `table`.
    Raises ValidationError for a damaged table and for a row that would loosen a gate.
    """
    data = _read(table)
    if precision not in data:
        raise ValidationError(f"{table} has no gates for precision {precision!r}")
    gates = {metric: _gate(metric, row, table) for metric, row in _rows(data, precision).items()}
    asked = {} if override is None else _rows(_read(override), precision)
    for metric, row in asked.items():
        gates[metric] = _tightened(gates.get(metric), metric, row, override or table)
    return sorted(gates.values(), key=lambda gate: list(TITLES).index(gate.metric))


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Precision → metric → row, every row checked."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValidationError(f"{path} cannot be read as a table of gates: {error}") from error
    for precision, rows in data.items():
        if precision not in ("every", *CACHE_DTYPES) or not isinstance(rows, dict):
            known = ", ".join(["every", *CACHE_DTYPES])
            raise ValidationError(f"{path}: unknown precision {precision!r}; known are {known}")
        for metric, row in rows.items():
            _gate(metric, row, path)
    return data


def _rows(data: Mapping[str, dict[str, Any]], precision: str) -> dict[str, Any]:
    return {**data.get("every", {}), **data.get(precision, {})}


def _gate(metric: str, row: object, table: Path) -> Gate:
    found = row if isinstance(row, dict) else {}
    bounds = sorted({"at_most", "at_least"} & set(found))
    if len(bounds) != 1 or set(found) - _KEYS or not isinstance(found.get("reason"), str):
        raise ValidationError(
            f"{table}: {metric} must have either at_most or at_least, a reason, and at most min_positions "
            f"and of_text beside them, found {sorted(found)}"
        )
    limit, least, of_text = found[bounds[0]], found.get("min_positions", 0), found.get("of_text", False)
    if type(of_text) is not bool:
        raise ValidationError(f"{table}: of_text of {metric} must be true or false, found {of_text!r}")
    if type(limit) not in (int, float) or not math.isfinite(limit) or type(least) is not int:
        raise ValidationError(
            f"{table}: the limit of {metric} must be a finite number and min_positions a whole one, "
            f"found {limit!r} and {least!r}"
        )
    return Gate(metric, bounds[0], float(limit), found["reason"], least, of_text)


def _tightened(ours: Gate | None, metric: str, row: Mapping[str, Any], path: Path) -> Gate:
    """The row that a user asks for. Raises ValidationError where it asks for less than ours."""
    if ours is None:
        return _gate(metric, row, path)
    asked = _gate(metric, {"min_positions": ours.min_positions, "of_text": ours.of_text, **row}, path)
    if not ours.holds(asked.limit):
        raise ValidationError(
            f"{path}: {metric} may only be tightened: {asked.bound} {asked.limit:g} is looser than "
            f"{ours.bound} {ours.limit:g}; take that row out or give a tighter limit"
        )
    if asked.min_positions > ours.min_positions:
        raise ValidationError(
            f"{path}: {metric} may only be tightened: {asked.min_positions} positions are asked for before "
            f"it decides, {ours.min_positions} are enough; leave min_positions out"
        )
    if asked.of_text and not ours.of_text:
        raise ValidationError(
            f"{path}: {metric} may only be tightened: of_text would not decide over random tokens, and ours "
            "does; leave of_text out"
        )
    return asked


def judge(
    gates: Sequence[Gate], measured: Mapping[str, Measured | None], *, is_text: bool = True
) -> tuple[GateResult, ...]:
    """Hold each gate against its number; those that `undecided` names are left out.

    measured: None where the part that gives the number was not run.  is_text: whether a text was read.
    Raises ValidationError for a gate whose number is not there at all.
    """
    for gate in gates:
        if gate.metric not in measured:
            raise ValidationError(f"gates: {gate.metric} was not measured in this run")
    pairs = [(gate, measured[gate.metric]) for gate in gates if is_text or not gate.of_text]
    return tuple(
        GateResult(gate, found)
        for gate, found in pairs
        if found is not None and found.positions >= gate.min_positions
    )


def undecided(
    gates: Sequence[Gate], measured: Mapping[str, Measured | None], *, is_text: bool = True
) -> tuple[Undecided, ...]:
    """The gates that `judge` leaves out, each with the reason."""
    left = []
    for gate in gates:
        found = measured[gate.metric]
        if found is None:
            left.append(Undecided(gate, "not run"))
        elif gate.of_text and not is_text:
            left.append(Undecided(gate, "takes text, found random tokens"))
        elif found.positions < gate.min_positions:
            of_text = " of text" if gate.metric == "perplexity_ratio" else ""
            why = f"takes {gate.min_positions:,} positions{of_text}, found {found.positions:,}"
            left.append(Undecided(gate, why))
    return tuple(left)


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
