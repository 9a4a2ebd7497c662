"""What a reference has to offer to be followed layer by layer, whatever precision it computes in.

T tokens   K key/value heads   D head_dim
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerStates:
    """What one decoder layer made of T tokens, from position 0.

    hidden: float32 [T, hidden_size], what leaves the layer.  keys, values: float32 [K, T, D], what a cache
    has to hold of it: keys are rotated.
    """

    hidden: Array
    keys: Array
    values: Array


class ReferenceLayers(Protocol):
    """A model without a ring or a cache, one layer at a time."""

    @property
    def num_hidden_layers(self) -> int: ...

    def embed(self, tokens: Sequence[int]) -> Array:
        """What enters layer 0: float32 [T, hidden_size]."""

    def run(self, index: int, hidden: Array) -> LayerStates:
        """Layer `index` over all T tokens.  hidden: float32 [T, hidden_size]."""
