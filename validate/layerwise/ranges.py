"""Activations, as they are computed → how each class of them uses float16's range."""

from dataclasses import dataclass

import numpy as np

from mistral_trt.validate.findings import FLOAT16_SMALLEST_NORMAL, ActivationRange
from mistral_trt.validate.layerwise.steps import Array


@dataclass(frozen=True)
class _Extent:
    largest: float = 0.0
    subnormal: int = 0
    count: int = 0


class RangeLog:
    """Extents of what was added, by activation and layer."""

    def __init__(self) -> None:
        self._extents: dict[tuple[str, int], _Extent] = {}

    def add(self, activation: str, layer: int, values: Array) -> None:
        """values: any shape and float dtype; padding that was computed counts as well."""
        sizes = np.abs(values, dtype=np.float32)
        before = self._extents.get((activation, layer), _Extent())
        self._extents[activation, layer] = _Extent(
            float(np.maximum(before.largest, sizes.max())),  # unlike max(), it keeps NaN
            before.subnormal + int(np.count_nonzero((sizes > 0) & (sizes < FLOAT16_SMALLEST_NORMAL))),
            before.count + sizes.size,
        )

    def found(self) -> tuple[ActivationRange, ...]:
        """In the order in which they were first added."""
        return tuple(
            ActivationRange(activation, layer, extent.largest, extent.subnormal / extent.count)
            for (activation, layer), extent in self._extents.items()
        )
