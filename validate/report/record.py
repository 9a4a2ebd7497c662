"""A report → the content of `report.json`, whose fields docs/report-format.md describes."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from mistral_trt.validate.findings import LayerErrors, LayerFindings, WeightFindings, WorstCase
from mistral_trt.validate.metrics import LogitErrors, mean, percentile, perplexity, top5_agreement, worst
from mistral_trt.validate.report.figures import number
from mistral_trt.validate.report.report import FORMAT_VERSION, HTML_NAME, JUNIT_NAME, Report
from mistral_trt.validate.scenarios.poke import PokeResult
from mistral_trt.validate.scenarios.tokens import Tokens
from mistral_trt.validate.verdict.gates import GateResult, Undecided
from mistral_trt.validate.verdict.parts import Offender
from mistral_trt.validate.verdict.quality import READING, Pair, Quality, three_way
from mistral_trt.validate.verdict.scenario_results import ScenarioResult


def to_json(report: Report) -> dict[str, Any]:
    """The record; a part that was not run is None."""
    return {
        "format_version": FORMAT_VERSION,
        "files": [HTML_NAME, JUNIT_NAME],
        "verdict": "pass" if report.passed else "fail",
        "summary": report.verdict,
        "artifact": dict(report.artifact),
        "reference": dict(report.reference),
        "executed": report.executed,
        "tokens": {
            "source": report.tokens.source,
            "count": len(report.tokens.ids),
            "sha256": report.tokens.sha256,
        },
        "notes": list(report.notes),
        "gates": [gate_json(gate) for gate in report.gates],
        "undecided": [undecided_json(gate) for gate in report.undecided],
        "weights": weights_json(report.weights),
        "layers": layers_json(report.layers, report.offender),
        "own_precision": own_precision_json(report),
        "worst_cases": worst_cases_json(report.worst_cases),
        "quality": quality_json(report.quality, report.tokens),
        "quantization": None if report.quantization is None else dict(report.quantization),
        "probes": [asdict(probe) for probe in report.probes],
        "scenarios": [scenario_json(result) for result in report.scenarios],
        "pokes": [poke_json(result) for result in report.pokes],
        "run": dict(report.run),
    }


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
        "greedy": None if quality.greedy is None else asdict(quality.greedy),
    }


def scenario_json(result: ScenarioResult) -> dict[str, Any]:
    """Summary and arrays of one scenario; the i-th entry of each array is of the i-th entry of `position`."""
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
        "max_abs_p99": number(percentile(errors, "max_abs", 99)),
        "mean_abs_mean": number(mean(errors, "mean_abs")),
        "relative_mean": number(mean(errors, "relative")),
        "relative_p99": number(percentile(errors, "relative", 99)),
        "relative_max": number(worst(errors, "relative").value),
        "cosine_distance_max": number(worst(errors, "cosine").value),
        "kl_max": number(worst(errors, "kl").value),
        "kl_mean": number(mean(errors, "kl")),
        "perplexity_ratio": number(perplexity(errors).ratio),
        "top1_agreement": number(mean(errors, "agree")),
        "top5_agreement": number(top5_agreement(errors)),
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


def undecided_json(left: Undecided) -> dict[str, Any]:
    gate = left.gate
    return {"name": gate.metric, gate.bound: gate.limit, "why": left.why, "reason": gate.reason}


def weights_json(weights: WeightFindings | None) -> dict[str, Any] | None:
    if weights is None:
        return None
    steps = weights.worst_steps
    return {
        "compared": weights.compared,
        "wrong": dict(weights.wrong),
        "worst_steps": None if steps is None else number(steps),
    }


def layers_json(layers: LayerFindings | None, offender: Offender | None) -> dict[str, Any] | None:
    """Each layer in a few numbers: the arrays behind them, a number a position, are not kept."""
    if layers is None:
        return None
    return {
        "words": layers.words,
        "first_wrong": None if offender is None else offender_json(offender),
        "layers": [layer_json(layer) for layer in layers.layers],
        "ranges": [
            {**asdict(found), "largest": number(found.largest), "subnormal": number(found.subnormal)}
            for found in layers.ranges
        ],
    }


def offender_json(offender: Offender) -> dict[str, Any]:
    return {
        "layer": offender.layer,
        "error": number(offender.error),
        "median": number(offender.median),
        "limit": offender.limit,
    }


def layer_json(layer: LayerErrors) -> dict[str, Any]:
    positions = np.arange(len(layer.update))
    return {
        "index": layer.index,
        "hidden": spread(layer.hidden, positions),
        "update": spread(layer.update, positions),
        "keys": spread(layer.keys, layer.positions),
        "values": spread(layer.values, layer.positions),
    }


def spread(errors: np.ndarray, positions: np.ndarray) -> dict[str, Any]:
    """Mean and largest of a layer's errors, and the position of the largest; None where there are none."""
    if not len(errors):
        return {"mean": None, "max": None, "position": None}
    place = int(np.argmax(errors))  # stops at the first NaN
    return {
        "mean": number(float(np.mean(errors))),
        "max": number(errors[place]),
        "position": int(positions[place]),
    }


def own_precision_json(report: Report) -> dict[str, Any] | None:
    if report.own_precision is None:
        return None
    pairs = three_way(report.scenarios, report.own_precision)
    return {
        "words": report.own_precision.words,
        "pairs": [pair_json(pair, report.tokens) for pair in pairs],
    }


def pair_json(pair: Pair, tokens: Tokens) -> dict[str, Any]:
    """No perplexity of random tokens."""
    perplexities = {
        "against": number(pair.perplexity.reference),
        "side": number(pair.perplexity.artifact),
        "ratio": number(pair.perplexity.ratio),
        "positions": pair.perplexity.positions,
    }
    return {
        "side": pair.side,
        "against": pair.against,
        "positions": pair.positions,
        "perplexity": perplexities if tokens.is_text else None,
        "kl_mean": number(pair.kl_mean),
        "top1_agreement": number(pair.top1_agreement),
        "relative_error_mean": number(pair.relative_error_mean),
    }


def worst_cases_json(cases: Sequence[WorstCase] | None) -> list[dict[str, Any]] | None:
    if cases is None:
        return None
    found = []
    for case in cases:
        entry = asdict(case) | {"kl": number(case.kl)}
        for side in ("expected", "found"):
            entry[side]["probability"] = number(entry[side]["probability"])
        found.append(entry)
    return found
