"""Layers, own precision and stored weights → the numbers that can be gated, and the first wrong layer.

A part that was not run is None, and so are its numbers: no gate passes on them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mistral_trt.contract import Ring
from mistral_trt.validate.findings import ActivationRange, LayerErrors, LayerFindings, WeightFindings
from mistral_trt.validate.verdict.gates import Measured, measure
from mistral_trt.validate.verdict.scenario_results import OwnPrecision

_JUMP = 5.0
"""A layer stands out above this many times the median layer: healthy layers are within a factor of two."""


@dataclass(frozen=True)
class Offender:
    """The layer to look at first.

    error: mean over the positions of its update's error.  median: of all layers.  limit: the gate that it
    is above; None where it is above none and only stands out.
    """

    layer: int
    error: float
    median: float
    limit: float | None

    @property
    def words(self) -> str:
        name = "first layer to stand out" if self.limit is None else "first wrong layer"
        return f"{name}: {self.layer}"


def measure_parts(
    *,
    layers: LayerFindings | None,
    own: OwnPrecision | None,
    weights: WeightFindings | None,
    ring: Ring,
) -> dict[str, Measured | None]:
    """Every number of the parts that can be gated, None where its part was not run."""
    return {
        "weights_wrong": None if weights is None else _wrong_weights(weights),
        "layer_update_error_max": None if layers is None else _worst_update(layers),
        "cache_error_max": None if layers is None else _worst_cache(layers, ring),
        "activation_max": None if layers is None else _largest_activation(layers),
        **_own_precision(own),
    }


def first_offender(layers: LayerFindings, limit: float | None) -> Offender | None:
    """The first layer whose update's error is above the limit, else the first that stands out.

    limit: of the gate `layer_update_error_max`, None where there is none.
    Errors 1 1 1 9 9: layer 3 with limit 2; layer 3 too without one, where 5 is a jump.
    """
    errors = update_means(layers)
    finite = [error for error in errors if math.isfinite(error)]
    median = float(np.median(finite)) if finite else math.nan
    above = [i for i, error in enumerate(errors) if limit is not None and not error <= limit]
    jumps = [i for i, error in enumerate(errors) if not error <= _JUMP * median]
    if not above and not jumps:
        return None
    place = (above or jumps)[0]
    return Offender(layers.layers[place].index, errors[place], median, limit if above else None)


def update_means(layers: LayerFindings) -> list[float]:
    """Error of each layer's update, mean over the positions."""
    return [_mean(layer.update) for layer in layers.layers]


def worst_cache(layers: Sequence[LayerErrors]) -> LayerErrors:
    """The layer whose keys or values are furthest off in the mean."""
    return max(layers, key=lambda layer: max(_order(_mean(errors)) for _, errors in _kept(layer)))


def place_of(position: int, ring: Ring) -> str:
    """513 -> slot 1, position 513"""
    return f"slot {ring.cache_slot(position)}, position {position}"


def largest_of(ranges: Iterable[ActivationRange]) -> ActivationRange | None:
    """The range with the largest number; NaN counts as largest."""
    return max(ranges, key=lambda found: _order(found.largest), default=None)


def _wrong_weights(weights: WeightFindings) -> Measured:
    names = sorted(weights.wrong)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return Measured(len(names), names[0] + more if names else "", weights.compared)


def _worst_update(layers: LayerFindings) -> Measured:
    if not layers.layers:
        return Measured(math.nan, "", 0)
    found = [(_mean(layer.update), layer) for layer in layers.layers]
    value, layer = max(found, key=lambda pair: _order(pair[0]))
    where = f"layer {layer.index}"
    if len(layer.update):
        where += f" (position {int(np.argmax(layer.update))})"  # argmax stops at the first NaN
    return Measured(value, where, len(layer.update))


def _worst_cache(layers: LayerFindings, ring: Ring) -> Measured:
    found = [(_mean(e), (layer, what, e)) for layer in layers.layers for what, e in _kept(layer)]
    if not found:
        return Measured(math.nan, "", 0)
    value, (layer, what, errors) = max(found, key=lambda pair: _order(pair[0]))
    where = f"layer {layer.index} {what}"
    if len(errors):
        where += f" ({place_of(int(layer.positions[np.argmax(errors)]), ring)})"
    return Measured(value, where, len(errors))


def _kept(layer: LayerErrors) -> tuple[tuple[str, np.ndarray], ...]:
    return ("keys", layer.keys), ("values", layer.values)


def _largest_activation(layers: LayerFindings) -> Measured:
    found = largest_of(layers.ranges)
    if found is None:
        return Measured(math.nan, "", 0)
    where = found.activation if found.layer is None else f"layer {found.layer} {found.activation}"
    positions = max((len(layer.update) for layer in layers.layers), default=0)
    return Measured(found.largest, where, positions)


def _own_precision(own: OwnPrecision | None) -> dict[str, Measured | None]:
    """The same numbers as of the scenarios against the float32 reference."""
    names = ("relative_error_mean", "kl_mean", "top1_agreement")
    found: dict[str, Measured] = {} if own is None else measure(own.scenarios, ())
    return {f"own_{name}": found.get(name) for name in names}


def _mean(errors: np.ndarray) -> float:
    return float(np.mean(errors)) if len(errors) else math.nan


def _order(value: float) -> float:
    """NaN sorts as the worst."""
    return math.inf if math.isnan(value) else value
