"""Results of a validation → `report.json` for machines and a self-contained `report.html` for people.

`report.json` is the record (format_version 2); the page is drawn from the same values. Neither loads
anything from a network.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mistral_trt.artifact import write_file
from mistral_trt.contract import GraphContract
from mistral_trt.validate.gates import GateResult, ScenarioResult
from mistral_trt.validate.metrics import LogitErrors, mean, perplexity, worst
from mistral_trt.validate.plots import Axis, agreement_plot, error_plot, sensitivity_plot
from mistral_trt.validate.poke import PokeResult
from mistral_trt.validate.probes import Probe
from mistral_trt.validate.quality import READING, Quality, calibration_remark
from mistral_trt.validate.tokens import Tokens

FORMAT_VERSION = 2
JSON_NAME, HTML_NAME = "report.json", "report.html"

_TEMPLATE = Path(__file__).with_name("report.html")
_DIGITS = 4
_WORST_LINEARS = 10
_HEADLINES = (("perplexity_ratio", "logit_error_max"), ("kl_max", "kl_mean"), ("top1_agreement",))
"""What a verdict and the head of the page show: of each group the first that is gated."""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Report:
    """Everything a validation found.

    artifact, reference: what was compared, by hash.  executed: what ran, and what did not.
    quantization: details.quantization of the artifact's manifest, None where nothing is quantized.
    run: the command, versions, machine, duration.  notes: what a reader has to know beside the numbers.
    """

    contract: GraphContract
    artifact: Mapping[str, Any]
    reference: Mapping[str, Any]
    executed: str
    tokens: Tokens
    probes: tuple[Probe, ...]
    scenarios: tuple[ScenarioResult, ...]
    pokes: tuple[PokeResult, ...]
    gates: tuple[GateResult, ...]
    quality: Quality
    quantization: Mapping[str, Any] | None
    notes: tuple[str, ...]
    run: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    @property
    def failed(self) -> list[GateResult]:
        return [gate for gate in self.gates if not gate.passed]

    @property
    def headlines(self) -> list[GateResult]:
        """The gates that are shown first."""
        gates = {gate.name: gate for gate in self.gates}
        found = [next((gates[name] for name in group if name in gates), None) for group in _HEADLINES]
        return [gate for gate in found if gate is not None]

    @property
    def positions(self) -> int:
        """Positions compared, all scenarios together."""
        return sum(len(result.errors) for result in self.scenarios)

    @property
    def verdict(self) -> str:
        """One line.  PASS demo fp16: 9 gates hold over 6,936 positions; Logit error, largest: 0.106 …"""
        name = f"{self.artifact['name']} {self.contract.precision}"
        if self.failed:
            found = "; ".join(describe(gate) for gate in self.failed)
            return f"FAIL {name}: {len(self.failed)} of {len(self.gates)} gates failed: {found}"
        found = "; ".join(describe(gate) for gate in self.headlines)
        short = self.contract.wraps and len(self.tokens.ids) <= self.contract.ring.capacity
        unseen = " (the ring never turned)" if short else ""
        gates = f"{len(self.gates)} gates hold over {self.positions:,} positions{unseen}"
        return f"PASS {name}: {gates}; {found}"

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "files": [HTML_NAME],
            "verdict": "pass" if self.passed else "fail",
            "summary": self.verdict,
            "artifact": dict(self.artifact),
            "reference": dict(self.reference),
            "executed": self.executed,
            "tokens": {
                "source": self.tokens.source,
                "count": len(self.tokens.ids),
                "sha256": self.tokens.sha256,
            },
            "notes": list(self.notes),
            "gates": [gate_json(gate) for gate in self.gates],
            "quality": quality_json(self.quality, self.tokens),
            "quantization": None if self.quantization is None else dict(self.quantization),
            "probes": [asdict(probe) for probe in self.probes],
            "scenarios": [scenario_json(result) for result in self.scenarios],
            "pokes": [poke_json(result) for result in self.pokes],
            "run": dict(self.run),
        }


def describe(result: GateResult) -> str:
    """Logit error, largest: 0.106 (at most 0.5)"""
    bound = result.gate.bound.replace("_", " ")
    where = f", {result.measured.where}" if result.measured.where and not result.passed else ""
    return f"{result.title}: {figure(result.measured.value)} ({bound} {figure(result.gate.limit)}){where}"


def gate_json(result: GateResult) -> dict[str, Any]:
    gate, measured = result.gate, result.measured
    return {
        "name": gate.metric,
        "value": number(measured.value),
        gate.bound: gate.limit,
        "passed": result.passed,
        "where": measured.where,
        "positions": measured.positions,
        "reason": gate.reason,
    }


def quality_json(quality: Quality, tokens: Tokens) -> dict[str, Any]:
    """The figures, and the text they are of; no perplexity of random tokens."""
    found = {name: number(value) for name, value in asdict(quality.perplexity).items()}
    return {
        "scenario": READING,
        "tokens": tokens.source,
        "positions": quality.positions,
        "perplexity": found if tokens.is_text else None,
        "kl_mean": number(quality.kl_mean),
        "top1_agreement": number(quality.top1_agreement),
        "greedy": asdict(quality.greedy),
    }


def scenario_json(result: ScenarioResult) -> dict[str, Any]:
    """Summary and per-position arrays of one scenario; position i is the i-th entry of each array."""
    errors = result.errors
    arrays = {
        field.name: [number(value) for value in getattr(errors, field.name)]
        for field in fields(LogitErrors)
        if field.name not in ("agree", "scored")
    }
    return {
        "name": result.scenario.name,
        "description": result.scenario.description,
        "calls": len(result.scenario.calls),
        "failure": result.failure,
        "summary": summary(errors),
        "per_position": {**arrays, "agree": [int(value) for value in errors.agree]},
    }


def summary(errors: LogitErrors) -> dict[str, Any]:
    """A scenario in a few numbers; None where there was nothing to measure."""
    return {
        "positions": len(errors),
        "max_abs_max": number(worst(errors, "max_abs").value),
        "mean_abs_mean": number(mean(errors, "mean_abs")),
        "relative_mean": number(mean(errors, "relative")),
        "cosine_distance_max": number(worst(errors, "cosine").value),
        "kl_max": number(worst(errors, "kl").value),
        "kl_mean": number(mean(errors, "kl")),
        "perplexity_ratio": number(perplexity(errors).ratio),
        "top1_agreement": number(mean(errors, "agree")),
    }


def poke_json(result: PokeResult) -> dict[str, Any]:
    return {
        "call": result.question.name,
        "poke": result.poke.name,
        "slots": len(result.poke.slots),
        "expected": "changed" if result.poke.visible else "unchanged",
        "changed_logits": result.changed,
        "of": result.total,
        "passed": result.passed,
    }


def number(value: float) -> float | int | None:
    """A number as JSON can hold it, to four digits; None for NaN and infinity."""
    value = float(value)
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else float(f"{value:.{_DIGITS}g}")


def figure(value: float) -> str:
    """A number as a person reads it.  0.0005 -> 5 × 10⁻⁴; 0.99784 -> 0.9978; 2312 -> 2,312; NaN -> none"""
    value = float(value)
    if not math.isfinite(value):
        return "none" if math.isnan(value) else "infinity"
    if value.is_integer():
        return f"{int(value):,}"
    if abs(value) >= 0.001:
        return f"{value:.4g}" if abs(value) > 0.9 else f"{value:.3g}"
    digits, exponent = f"{value:.1e}".split("e")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
    return power if digits == "1.0" else f"{digits.removesuffix('.0')} × {power}"


def render_html(report: Report) -> str:
    """The page. Everything that came from outside is escaped; the pictures are ours."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": figure}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        plots=plots(report),
        summary=summary,
        calls=calls(report),
        calibration=calibration_remark(report.quantization, report.tokens),
        worst_linears=sensitivity(report)[:_WORST_LINEARS],
    )


def sensitivity(report: Report) -> list[Mapping[str, Any]]:
    """Name, error and whether it was kept of each linear that was calibrated, worst first."""
    found = [] if report.quantization is None else report.quantization["sensitivity"]
    return sorted(found, key=lambda entry: -entry["error"])


def calls(report: Report) -> list[tuple[str, list[PokeResult]]]:
    """Pokes, gathered by the call they were put to."""
    gathered: dict[str, list[PokeResult]] = {}
    for result in report.pokes:
        gathered.setdefault(result.question.name, []).append(result)
    return list(gathered.items())


def plots(report: Report) -> dict[str, Markup]:
    """The pictures of the page, by name, without the scenarios that never gave a position."""
    found = sensitivity(report)
    pictures = {"sensitivity": sensitivity_plot(found, name="sensitivity")} if found else {}
    shown = [result for result in report.scenarios if len(result.errors)]
    if shown:
        pictures |= position_plots(report, shown)
    return {name: Markup(picture) for name, picture in pictures.items()}


def position_plots(report: Report, shown: Sequence[ScenarioResult]) -> dict[str, str]:
    axis = Axis(report.contract, len(report.tokens.ids), report.probes)
    limits = {gate.name: gate for gate in report.gates}
    return {
        "error": error_plot(shown, "max_abs", axis=axis, limit=limits.get("logit_error_max"), name="error"),
        "kl": error_plot(shown, "kl", axis=axis, limit=limits.get("kl_max"), name="kl"),
        "agreement": agreement_plot(shown, axis=axis, name="agreement"),
    }


def write_report(report: Report, folder: Path) -> None:
    """Write the page, then the record, whose presence says that both are whole."""
    text = json.dumps(report.to_json(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    write_file(folder / HTML_NAME, render_html(report).encode())
    write_file(folder / JSON_NAME, (text + "\n").encode())
