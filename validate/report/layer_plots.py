"""Findings about the layers → SVG pictures: error over depth, the cache's slots, the range of activations."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mistral_trt.contract import Ring
from mistral_trt.validate.findings import FLOAT16_MAX, ActivationRange, LayerErrors
from mistral_trt.validate.report.drawing import (
    BAD,
    DATA,
    INK,
    MARK,
    QUIET,
    RULE,
    WIDTH_INCHES,
    decade_label,
    decades,
    frame,
    log_scale,
    mark_limit,
    on_scale,
    panels,
    to_svg,
)
from mistral_trt.validate.report.figures import figure as in_words
from mistral_trt.validate.verdict.parts import Offender, largest_of

_ROW_INCHES = 0.24
_FIGURES_DECADES = 300.0


def depth_plot(
    layers: Sequence[LayerErrors],
    *,
    update_limit: float | None,
    cache_limit: float | None,
    offender: Offender | None,
    name: str,
) -> str:
    """Three panels against the layer: what piled up, what each layer adds, what its cache holds.

    A full line is the mean over positions, a broken one the worst position.
    """
    figure, column = panels(3, label="layer")
    places = np.array([layer.index for layer in layers])
    titles = ("hidden state: all that came before included", "each layer's own update", "cache")
    errors = ([layer.hidden for layer in layers], [layer.update for layer in layers])
    limits = (None, update_limit, cache_limit)
    for panel, title, kept, limit in zip(column, titles, (*errors, None), limits, strict=True):
        lines = _cache_lines(layers) if kept is None else _mean_and_worst(kept)
        scale = decades(np.concatenate([values for values, _ in lines]), [limit or 0.0])
        log_scale(panel, scale)
        for values, (colour, dashes) in lines:
            dots = {"marker": "o", "markersize": 2.6} if dashes is None else {"dashes": dashes}
            panel.plot(places, on_scale(values, scale), color=colour, linewidth=0.9, **dots)
        mark_limit(panel, limit)
        frame(panel, title, (-0.6, places[-1] + 0.6))
    if offender is not None:
        _mark_offender(column[1], offender)
    return to_svg(figure, name)


_Line = tuple[np.ndarray, tuple[str, tuple[int, int] | None]]


def _mean_and_worst(errors: Sequence[np.ndarray]) -> list[_Line]:
    mean = np.array([np.mean(values) for values in errors])
    worst = np.array([np.max(values) for values in errors])
    return [(worst, (QUIET, (2, 2))), (mean, (DATA, None))]


def _cache_lines(layers: Sequence[LayerErrors]) -> list[_Line]:
    keys = np.array([np.mean(layer.keys) for layer in layers])
    values = np.array([np.mean(layer.values) for layer in layers])
    return [(keys, (DATA, None)), (values, (MARK, None))]


def _mark_offender(panel: Axes, offender: Offender) -> None:
    low, high = panel.get_ylim()
    at = on_scale(np.array([offender.error]), (low, high))
    panel.axvline(offender.layer, color=BAD, linewidth=0.9)
    panel.plot([offender.layer], at, linestyle="", marker="o", markersize=5, color=BAD)
    label = f"layer {offender.layer}"
    panel.text(
        offender.layer, 1.03, label, transform=panel.get_xaxis_transform(), ha="center", fontsize=8, color=BAD
    )


def slots_plot(layer: LayerErrors, *, ring: Ring, limit: float | None, name: str) -> str:
    """Error of keys and values in every slot of one layer's ring; a line where the newest token lies."""
    figure, column = panels(2, label="slot")
    slots = layer.positions % ring.capacity
    for panel, title, values, colour in (
        (column[0], f"layer {layer.index}, keys", layer.keys, DATA),
        (column[1], f"layer {layer.index}, values", layer.values, MARK),
    ):
        scale = decades(values, [limit or 0.0])
        log_scale(panel, scale)
        panel.plot(slots, on_scale(values, scale), linestyle="", marker="o", markersize=2.2, color=colour)
        panel.axvline(ring.cache_slot(int(layer.positions.max())), color=RULE, linewidth=0.9, zorder=1)
        mark_limit(panel, limit)
        frame(panel, title, (-0.5, ring.capacity - 0.5))
    return to_svg(figure, name)


def ranges_plot(ranges: Sequence[ActivationRange], *, name: str) -> str:
    """A bar a class of activations: the largest number of all layers, and the largest subnormal share."""
    classes = by_class(ranges)
    figure = Figure(figsize=(WIDTH_INCHES, _ROW_INCHES * len(classes) + 0.95))
    inches = figure.get_size_inches()[1]
    largest, subnormal = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    figure.subplots_adjust(left=0.2, right=0.985, top=1 - 0.38 / inches, bottom=0.42 / inches, wspace=0.08)
    _bars_of_largest(largest, [found for _, found, _ in classes])
    share = [100 * share for _, _, share in classes]
    subnormal.barh(range(len(classes)), share, height=0.6, color=MARK)
    frame(subnormal, "subnormal, % of the numbers", (0, max(*share, 1e-3) * 1.1))
    subnormal.xaxis.set_major_locator(MaxNLocator(3))
    subnormal.tick_params(axis="y", length=0)
    largest.set_yticks(range(len(classes)), [found for found, _, _ in classes], color=INK)
    largest.set_ylim(len(classes) - 0.4, -0.6)
    return to_svg(figure, name)


def _bars_of_largest(panel: Axes, found: Sequence[ActivationRange]) -> None:
    """A bar each on a log axis that ends past float16's largest number, its figure beside it."""
    values = np.array([entry.largest for entry in found])
    finite = values[np.isfinite(values) & (values > 0)]
    low = 10 ** np.floor(np.log10(min(finite, default=1.0))) / 2
    high = 2 * max([*finite, FLOAT16_MAX])
    colours = [DATA if value <= FLOAT16_MAX else BAD for value in values]
    panel.set_xscale("log")
    shown = on_scale(values, (low, high))
    panel.barh(range(len(values)), shown - low, left=low, height=0.6, color=colours)
    frame(panel, "largest absolute value; float16 ends at the line", (low, high * _FIGURES_DECADES))
    panel.xaxis.set_major_locator(LogLocator(numticks=8))
    panel.xaxis.set_major_formatter(FuncFormatter(decade_label))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.axvline(FLOAT16_MAX, color=BAD, linewidth=0.9, dashes=(5, 3))
    for row, entry in enumerate(found):
        text = f"{in_words(entry.largest)}, layer {entry.layer}"
        panel.text(high * 1.3, row, text, va="center", fontsize=7.5, color=QUIET)


def by_class(ranges: Sequence[ActivationRange]) -> list[tuple[str, ActivationRange, float]]:
    """Each class in the order it is met, its largest number's range, and its largest subnormal share."""
    gathered: dict[str, list[ActivationRange]] = {}
    for found in ranges:
        gathered.setdefault(found.activation, []).append(found)
    return [
        (name, largest, max(entry.subnormal for entry in entries))
        for name, entries in gathered.items()
        if (largest := largest_of(entries)) is not None
    ]
