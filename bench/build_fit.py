"""Builds that were measured → the constants of engines/planning/build_memory.py.

Two depths of one model determine two constants of each series, so each series has two that are free, and
takes the rest from the series that measures it alone:

external            base and bytes a layer: no weights are read, so nothing else can be the cause
embedded            the external line of its precision, because the graph and the builder are the same; and
    quantized       a factor for codes and scales and one for the other weights. With depth only codes grow:
                    the slope gives the first, and what is left at no layers, embedding and head, the second
    fp16            a factor for weights, from the slope, and a constant, from what is left

Every constant but the base multiplies something that a model's width changes too, and none may be negative: a
line that has to be drawn through zero is fitted again with the other constant alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mistral_trt.engines.planning.build_memory import BuildMemory
from mistral_trt.weight_index import EMBEDDED, EXTERNAL

Constants = dict[tuple[str, str], BuildMemory]
Matrix = npt.NDArray[np.float64]


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
    columns = np.array([[1.0, point.layers] for point in points])
    base, layer = positive_least_squares(columns, np.array([point.peak_bytes for point in points], float))
    return BuildMemory(round(base), round(layer), 0.0, 0.0)


def fit_embedded(points: Sequence[Point], external: BuildMemory) -> BuildMemory:
    """external: what the same builds take without their weights."""
    over = [(point.peak_bytes or 0) - predicted(external, point) for point in points]
    if any(point.quantized_bytes for point in points):
        columns = np.array([[float(point.quantized_bytes), point.other_bytes] for point in points])
        quantized, other = positive_least_squares(columns, np.array(over, float))
        return BuildMemory(external.base_bytes, external.layer_bytes, quantized, other)
    columns = np.array([[float(point.other_bytes), 1.0] for point in points])
    factor, base = positive_least_squares(columns, np.array(over, float))
    return BuildMemory(external.base_bytes + round(base), external.layer_bytes, 0.0, factor)


def positive_least_squares(columns: Matrix, values: Matrix) -> tuple[float, float]:
    """The two coefficients, neither negative, of [n, 2] columns that come nearest to [n] values.

    One point cannot tell two constants apart: then the first column alone is fitted.
    """
    alone = [max(0.0, float(column @ values / (column @ column))) for column in columns.T]
    candidates = [(alone[0], 0.0)]
    if len(values) > 1:
        scale = np.abs(columns).max(axis=0)
        both = np.linalg.lstsq(columns / scale, values, rcond=None)[0] / scale
        candidates += [(0.0, alone[1])]
        if (both >= 0).all():
            candidates = [(float(both[0]), float(both[1]))]
    return min(candidates, key=lambda pair: float(np.square(columns @ np.array(pair) - values).sum()))
