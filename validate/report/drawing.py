"""A matplotlib figure → an SVG picture that takes its colours from the page.

matplotlib draws in sentinel colours, which are then replaced by the page's CSS variables, so one picture
serves light and dark. Text stays text. The same numbers give the same bytes.
"""

import io
import re
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mistral_trt.validate.report.figures import power_of_ten

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
WIDTH_INCHES = 8.6
_PANEL_INCHES = 1.35


def panels(count: int, height: float = _PANEL_INCHES, label: str = "position") -> tuple[Figure, list[Axes]]:
    """A column of panels that share their axis of x."""
    figure = Figure(figsize=(WIDTH_INCHES, count * (height + 0.28) + 0.75))
    inches = figure.get_size_inches()[1]
    grid = figure.subplots(count, 1, sharex=True, squeeze=False)
    figure.subplots_adjust(left=0.06, right=0.985, top=1 - 0.38 / inches, bottom=0.48 / inches)
    figure.subplots_adjust(hspace=max(0.34, 0.28 / height))
    column = list(grid[:, 0])
    column[-1].set_xlabel(label, color=QUIET)
    return figure, column


def frame(panel: Axes, title: str, limits: tuple[float, float]) -> None:
    """Title, quiet axes, and nothing that is not needed."""
    panel.set_xlim(*limits)
    panel.set_title(title, loc="left", color=INK, fontsize=9, pad=4)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color(RULE)
    panel.tick_params(colors=QUIET, labelsize=8, length=3, width=0.6)
    panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def log_scale(panel: Axes, limits: tuple[float, float]) -> None:
    """A log axis of y that names decades only."""
    panel.set_yscale("log")
    panel.set_ylim(*limits)
    panel.yaxis.set_major_locator(LogLocator(numticks=5))
    panel.yaxis.set_major_formatter(FuncFormatter(decade_label))
    panel.yaxis.set_minor_locator(NullLocator())


def decades(values: np.ndarray, limits: Sequence[float]) -> tuple[float, float]:
    """Decades that hold all finite values above zero, and the limits above zero."""
    values = values[np.isfinite(values) & (values > 0)]
    known = [*np.percentile(values, [1, 100])] if len(values) else [1e-9, 1.0]
    known += [limit for limit in limits if limit > 0]
    return 10 ** np.floor(np.log10(min(known))), 10 ** (np.log10(max(known)) + 0.35)


def mark_limit(panel: Axes, limit: float | None) -> None:
    """A dashed line at a gate's limit; a log axis has no place for zero."""
    if limit:
        panel.axhline(limit, color=BAD, linewidth=0.9, dashes=(5, 3))


def on_scale(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Values as a log axis can show them: NaN and infinity at its top, zero at its foot."""
    clipped: np.ndarray = np.clip(np.nan_to_num(values, nan=limits[1]), *limits)
    return clipped


def decade_label(value: float, _: object) -> str:
    """0.001 -> 10⁻³"""
    return power_of_ten(round(float(np.log10(value))))


def to_svg(figure: Figure, name: str) -> str:
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
