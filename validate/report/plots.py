"""Errors at every position and of every linear → SVG pictures."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from mistral_trt.contract import GraphContract
from mistral_trt.export.quantization.scheme import KINDS
from mistral_trt.validate.report.drawing import (
    BAD,
    DATA,
    MARK,
    QUIET,
    RULE,
    SHADE,
    decades,
    frame,
    log_scale,
    mark_limit,
    on_scale,
    panels,
    to_svg,
)
from mistral_trt.validate.scenarios.probes import Probe
from mistral_trt.validate.verdict.scenario_results import ScenarioResult

_MOST_TURNS, _FIRST_TURNS = 40, 5
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Axis:
    """What every panel shares: positions 0…length-1, the turns of the ring, the probes."""

    contract: GraphContract
    length: int
    probes: Sequence[Probe]

    def turns(self) -> list[tuple[int, str]]:
        """Where the window and the ring have turned once more; names of equal positions are joined.

        W=512, R=768: 512 W, 768 R, 1024 2W, 1536 3W = 2R, 2048 4W, 2304 3R. Of very many, the first.
        """
        if not self.contract.wraps:
            return []
        ring = self.contract.ring
        names: dict[int, list[str]] = {}
        for letter, size in (("W", ring.sliding_window), ("R", ring.capacity)):
            for turn in range(1, -(-self.length // size)):
                names.setdefault(turn * size, []).append(letter if turn == 1 else f"{turn}{letter}")
        marked = sorted(names) if len(names) <= _MOST_TURNS else sorted(names)[:_FIRST_TURNS]
        return [(position, " = ".join(names[position])) for position in marked]


def error_plot(
    results: Sequence[ScenarioResult], metric: str, *, axis: Axis, limit: float | None, name: str
) -> str:
    """One panel a scenario: a metric at every position on a log axis, with its gate.

    name: prefix of every id in the picture, so that several fit in one page.  Returns an <svg> element.
    """
    figure, column = panels(len(results))
    found = np.concatenate([getattr(result.errors, metric) for result in results])
    limits = decades(found, [limit or 0.0])
    for result, panel in zip(results, column, strict=True):
        log_scale(panel, limits)
        shown = on_scale(getattr(result.errors, metric), limits)
        if result.scenario.whole:
            panel.plot(result.errors.position, shown, color=DATA, linewidth=0.7)
            _mark_probes(panel, axis, shown)
        else:
            panel.plot(result.errors.position, shown, color=DATA, linestyle="", marker="o", markersize=1.6)
        mark_limit(panel, limit)
        _dress(panel, result, axis)
    _label_turns(column[0], axis)
    return to_svg(figure, name)


def agreement_plot(results: Sequence[ScenarioResult], *, axis: Axis, name: str) -> str:
    """One row a scenario, a stroke at every position where the two sides put another token first."""
    figure, column = panels(len(results), height=0.55)
    for result, panel in zip(results, column, strict=True):
        disagree = result.errors.position[~result.errors.agree]
        panel.set_ylim(0, 1)
        panel.yaxis.set_major_locator(NullLocator())
        panel.vlines(disagree, 0.15, 0.85, color=BAD, linewidth=1.1)
        _dress(panel, result, axis)
    _label_turns(column[0], axis)
    return to_svg(figure, name)


def sensitivity_plot(sensitivity: Sequence[Mapping[str, Any]], *, name: str) -> str:
    """One panel a kind of linear, a bar a layer: the error of quantizing it; another colour if it was kept.

    sensitivity: `name`, `error` and `kept` of each linear.  One outside the layers stands after the last.
    """
    kinds = _kinds(sensitivity)
    figure, column = panels(len(kinds), height=0.55, label="layer")
    top = 1.1 * max(max(entry["error"] for entry in sensitivity), 1e-9)
    last = max(layer for bars in kinds.values() for layer, _ in bars)
    for (kind, bars), panel in zip(kinds.items(), column, strict=True):
        layers = [layer for layer, _ in bars]
        colours = [MARK if entry["kept"] else DATA for _, entry in bars]
        panel.bar(layers, [entry["error"] for _, entry in bars], width=0.75, color=colours)
        panel.set_ylim(0, top)
        panel.yaxis.set_major_locator(MaxNLocator(2))
        frame(panel, kind, (-0.6, last + 0.6))
    return to_svg(figure, name)


def _kinds(sensitivity: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, Mapping[str, Any]]]]:
    """Linears by kind, with their layers: mlp.up_proj -> (0, …), (1, …); lm_head -> (L, …)."""
    found = [(_LAYER.fullmatch(entry["name"]), entry) for entry in sensitivity]
    after = 1 + max((int(match[1]) for match, _ in found if match), default=-1)
    kinds: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for match, entry in found:
        kind, layer = (match[2], int(match[1])) if match else (entry["name"], after)
        kinds.setdefault(kind, []).append((layer, entry))
    return {kind: kinds[kind] for kind in sorted(kinds, key=_forward)}


def _forward(kind: str) -> tuple[int, str]:
    """Sort key that follows the forward pass."""
    return (KINDS.index(kind) if kind in KINDS else len(KINDS), kind)


def _dress(panel: Axes, result: ScenarioResult, axis: Axis) -> None:
    """Title, turns of the ring, shaded decode stretches, and nothing that is not needed."""
    frame(panel, result.scenario.name, (0, axis.length))
    for position, label in axis.turns():
        ring_turn = "R" in label
        panel.axvline(position, color=RULE, linewidth=0.9, dashes=(None, None) if ring_turn else (2, 2))
    stretches = result.scenario.decoded()
    if 1 < len(stretches) <= _MOST_TURNS:
        for start, stop in stretches:
            panel.axvspan(start, stop, color=SHADE, linewidth=0)


def _mark_probes(panel: Axes, axis: Axis, values: np.ndarray) -> None:
    found = [probe.position for probe in axis.probes if probe.position < len(values)]
    panel.plot(found, values[found], linestyle="", marker="o", markersize=2.6, color=MARK)


def _label_turns(panel: Axes, axis: Axis) -> None:
    """Names above the first panel, as many as fit beside each other."""
    free_from = -1.0
    for position, label in axis.turns():
        at = position / axis.length
        if at < free_from or at > 0.985:
            continue
        panel.text(
            at, 1.03, label, transform=panel.transAxes, ha="center", va="bottom", fontsize=8, color=QUIET
        )
        free_from = at + 0.02 + 0.009 * len(label)
