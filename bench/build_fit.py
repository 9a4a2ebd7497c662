"""Builds that were measured → the constants of engines/planning/build_memory.py.

Two depths of one model determine two constants of each series:

external            base and bytes a layer: no weights are read, so nothing else can be the cause
embedded            the factor of what grows with depth, and the base, which is what is left. In fp16 all
                    weights have that factor; in quantized precisions codes and scales do, and the others,
                    embedding and head, are counted once: they are carried into the plan as they are

No factor may be negative: a line that falls with depth is fitted again through its points' mean, flat.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mistral_trt.engines.planning.build_memory import BuildMemory
from mistral_trt.weight_index import EMBEDDED, EXTERNAL

Constants = dict[tuple[str, str], BuildMemory]


@dataclass(frozen=True)
class Point:
    """One build.  peak_bytes: anonymous memory, None where the build was refused before it began.

    activation_bytes: of both profiles, as the builder reported them.  note: why it was refused.
    """

    precision: str
    weights: str
    layers: int
    weights_bytes: int
    quantized_bytes: int
    seconds: float
    peak_bytes: int | None = None
    plan_bytes: int = 0
    activation_bytes: int = 0
    predicted_activation_bytes: int = 0
    note: str = ""

    @property
    def series(self) -> tuple[str, str]:
        return self.precision, self.weights

    @property
    def other_bytes(self) -> int:
        return self.weights_bytes - self.quantized_bytes


def predicted(constants: BuildMemory, point: Point) -> int:
    """Peak bytes that the constants foretell."""
    return constants.peak_bytes(
        point.layers, quantized_bytes=point.quantized_bytes, other_bytes=point.other_bytes
    )


def fit(points: Sequence[Point]) -> Constants:
    """The constants of every series of these points; refused builds say nothing."""
    found: Constants = {}
    measured = [point for point in points if point.peak_bytes is not None]
    for precision in dict.fromkeys(point.precision for point in measured):
        outside = [p for p in measured if p.series == (precision, EXTERNAL)]
        inside = [p for p in measured if p.series == (precision, EMBEDDED)]
        if outside:
            found[precision, EXTERNAL] = fit_external(outside)
        if outside and inside:
            found[precision, EMBEDDED] = fit_embedded(inside, found[precision, EXTERNAL])
    return found


def fit_external(points: Sequence[Point]) -> BuildMemory:
    layer, base = fit_line([point.layers for point in points], [point.peak_bytes or 0 for point in points])
    return BuildMemory(round(base), round(layer))


def fit_embedded(points: Sequence[Point], external: BuildMemory) -> BuildMemory:
    """external: what the same builds take without their weights, and the least they take with them."""
    peaks = [point.peak_bytes or 0 for point in points]
    if not any(point.quantized_bytes for point in points):
        factor, base = fit_line([point.other_bytes for point in points], peaks)
        return BuildMemory(round(base), 0, 0.0, factor, external)
    rest = [peak - point.other_bytes for peak, point in zip(peaks, points, strict=True)]
    factor, base = fit_line([point.quantized_bytes for point in points], rest)
    return BuildMemory(round(base), 0, factor, 1.0, external)


def fit_line(places: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Slope and constant of the line nearest to the values; the slope is not negative.

    One place cannot tell two constants apart: then the slope alone, from zero.
    """
    x, y = np.array(places, float), np.array(values, float)
    if len(set(places)) == 1:
        return max(0.0, float(x @ y / (x @ x))), 0.0
    slope = max(0.0, float(np.cov(x, y, bias=True)[0, 1] / x.var()))
    return slope, float(y.mean() - slope * x.mean())
