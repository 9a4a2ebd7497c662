"""Errors at every position and of every linear → SVG pictures that take their colours from the page.

matplotlib draws in sentinel colours, which are then replaced by the page's CSS variables, so one picture
serves light and dark. Text stays text. The same numbers give the same bytes.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mistral_trt.contract import GraphContract
from mistral_trt.export.quantization.scheme import KINDS
from mistral_trt.validate.gates import GateResult, ScenarioResult
from mistral_trt.validate.probes import Probe

COLOURS = {
    "#010203": "var(--ink)",
    "#010204": "var(--quiet)",
    "#010205": "var(--rule)",
    "#010206": "var(--data)",
    "#010207": "var(--bad)",
    "#010208": "var(--mark)",
    "#010209": "var(--shade)",
}
"""Sentinel → CSS variable of report.html."""

INK, QUIET, RULE, DATA, BAD, MARK, SHADE = COLOURS

_NAMESPACES = 'role="img" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MOST_TURNS, _FIRST_TURNS = 40, 5
_WIDTH_INCHES = 8.6
_PANEL_INCHES = 1.35
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
    results: Sequence[ScenarioResult], metric: str, *, axis: Axis, limit: GateResult | None, name: str
) -> str:
    """One panel a scenario: a metric at every position on a log axis, with its gate.

    name: prefix of every id in the picture, so that several fit in one page.  Returns an <svg> element.
    """
    figure, panels = _panels(len(results))
    floor, top = _range(results, metric, limit)
    for result, panel in zip(results, panels, strict=True):
        values = getattr(result.errors, metric)
        panel.set_yscale("log")
        panel.set_ylim(floor, top)
        panel.yaxis.set_major_locator(LogLocator(numticks=5))
        panel.yaxis.set_major_formatter(FuncFormatter(_power_of_ten))
        panel.yaxis.set_minor_locator(NullLocator())
        shown = np.clip(np.nan_to_num(values, nan=top), floor, top)
        panel.plot(result.errors.position, shown, color=DATA, linewidth=0.7)
        _mark_probes(panel, axis, shown)
        if limit is not None:
            panel.axhline(limit.gate.limit, color=BAD, linewidth=0.9, dashes=(5, 3))
        _dress(panel, result, axis)
    _label_turns(panels[0], axis)
    return _svg(figure, name)


def agreement_plot(results: Sequence[ScenarioResult], *, axis: Axis, name: str) -> str:
    """One row a scenario, a stroke at every position where the two sides put another token first."""
    figure, panels = _panels(len(results), height=0.55)
    for result, panel in zip(results, panels, strict=True):
        disagree = np.flatnonzero(~result.errors.agree)
        panel.set_ylim(0, 1)
        panel.yaxis.set_major_locator(NullLocator())
        panel.vlines(disagree, 0.15, 0.85, color=BAD, linewidth=1.1)
        _dress(panel, result, axis)
    _label_turns(panels[0], axis)
    return _svg(figure, name)


def sensitivity_plot(sensitivity: Sequence[Mapping[str, Any]], *, name: str) -> str:
    """One panel a kind of linear, a bar a layer: the error of quantizing it; another colour if it was kept.

    sensitivity: `name`, `error` and `kept` of each linear.  One outside the layers stands after the last.
    """
    kinds = _kinds(sensitivity)
    figure, panels = _panels(len(kinds), height=0.55, label="layer")
    top = 1.1 * max(max(entry["error"] for entry in sensitivity), 1e-9)
    last = max(layer for bars in kinds.values() for layer, _ in bars)
    for (kind, bars), panel in zip(kinds.items(), panels, strict=True):
        layers = [layer for layer, _ in bars]
        colours = [MARK if entry["kept"] else DATA for _, entry in bars]
        panel.bar(layers, [entry["error"] for _, entry in bars], width=0.75, color=colours)
        panel.set_ylim(0, top)
        panel.yaxis.set_major_locator(MaxNLocator(2))
        _frame(panel, kind, (-0.6, last + 0.6))
    return _svg(figure, name)


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


def _panels(count: int, height: float = _PANEL_INCHES, label: str = "position") -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH_INCHES, count * (height + 0.28) + 0.75))
    inches = figure.get_size_inches()[1]
    grid = figure.subplots(count, 1, sharex=True, squeeze=False)
    figure.subplots_adjust(left=0.06, right=0.985, top=1 - 0.38 / inches, bottom=0.48 / inches, hspace=0.34)
    panels = list(grid[:, 0])
    panels[-1].set_xlabel(label, color=QUIET)
    return figure, panels


def _dress(panel: Axes, result: ScenarioResult, axis: Axis) -> None:
    """Title, turns of the ring, shaded decode stretches, and nothing that is not needed."""
    _frame(panel, result.scenario.name, (0, axis.length))
    for position, label in axis.turns():
        ring_turn = "R" in label
        panel.axvline(position, color=RULE, linewidth=0.9, dashes=(None, None) if ring_turn else (2, 2))
    stretches = result.scenario.decoded()
    if 1 < len(stretches) <= _MOST_TURNS:
        for start, stop in stretches:
            panel.axvspan(start, stop, color=SHADE, linewidth=0)


def _frame(panel: Axes, title: str, limits: tuple[float, float]) -> None:
    panel.set_xlim(*limits)
    panel.set_title(title, loc="left", color=INK, fontsize=9, pad=4)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color(RULE)
    panel.tick_params(colors=QUIET, labelsize=8, length=3, width=0.6)
    panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))


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


def _range(results: Sequence[ScenarioResult], metric: str, limit: GateResult | None) -> tuple[float, float]:
    """Decades that hold all finite values above zero, and the gate."""
    values = np.concatenate([getattr(result.errors, metric) for result in results])
    values = values[np.isfinite(values) & (values > 0)]
    known = [*np.percentile(values, [1, 100])] if len(values) else [1e-9, 1.0]
    if limit is not None:
        known.append(limit.gate.limit)
    return 10 ** np.floor(np.log10(min(known))), 10 ** (np.log10(max(known)) + 0.35)


def _power_of_ten(value: float, _: object) -> str:
    """0.001 -> 10⁻³"""
    return "10" + str(round(float(np.log10(value)))).translate(_SUPERSCRIPTS)


def _svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element that brings no colours, fonts, sizes or clashing ids of its own."""
    figure.patch.set_visible(False)
    for panel in figure.axes:
        panel.patch.set_visible(False)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "DejaVu Sans"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for pattern, replacement in (
        (r"<metadata>.*?</metadata>", ""),
        (r"<style.*?</style>", ""),
        (r"<!--.*?-->", ""),
        (r"\n\s*(?=\n|<)", "\n"),
        (r'\bid="', f'id="{name}-'),
        (r'(xlink:href="#|url\(#)', rf"\g<1>{name}-"),
        (r"font-family: [^;\"]*; ?", ""),
        (r"(\d\.\d\d)\d+", r"\1"),
    ):
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    text = re.sub(r'^<svg[^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" {_NAMESPACES}>', text)
    for sentinel, variable in COLOURS.items():
        text = text.replace(sentinel, variable)
    return text
