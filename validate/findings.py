"""What the parts of a validation measured, as plain numbers: no part knows how another came by its own.

T positions of the reading scenario   n ring slots that hold a position
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

FLOAT16_MAX = 65504.0
FLOAT16_SMALLEST_NORMAL = 2.0**-14


@dataclass(frozen=True)
class LayerErrors:
    """One decoder layer of the artifact against the reference's.

    Errors are relative: norm of the difference over norm of the reference's vector.
    """

    index: int
    hidden: np.ndarray
    """float64 [T]: what leaves the layer, everything before it run by the artifact too."""
    update: np.ndarray
    """float64 [T]: what the layer adds to its input, when it is fed what the reference's layer was fed."""
    positions: np.ndarray
    """int64 [n]: which position each slot that was compared must hold after the last call."""
    keys: np.ndarray
    """float64 [n]: error of the slot's keys, all heads together; the layer was fed as for `update`."""
    values: np.ndarray
    """float64 [n]: error of the slot's values."""


@dataclass(frozen=True)
class ActivationRange:
    """How one class of activations of one layer uses float16's range.

    activation: "mlp.gate_proj", "self_attn.o_proj", "residual", …  layer: None outside the layers.
    largest: absolute value; infinity or NaN where one occurred.  subnormal: share of the numbers that are
    not zero and below 2**-14.
    """

    activation: str
    layer: int | None
    largest: float
    subnormal: float


@dataclass(frozen=True)
class LayerFindings:
    """Every layer, in order.  words: how the layers were run."""

    words: str
    layers: tuple[LayerErrors, ...]
    ranges: tuple[ActivationRange, ...]


@dataclass(frozen=True)
class WeightFindings:
    """The artifact's stored weights against the checkpoint's, tensor by tensor.

    compared: number of tensors.  wrong: tensor → in a sentence how it differs from what the precision allows.
    worst_steps: largest distance of a quantized weight from the checkpoint's, in steps of its own scale (half
    a step is what rounding allows); None where nothing is quantized.
    """

    compared: int
    wrong: Mapping[str, str]
    worst_steps: float | None


@dataclass(frozen=True)
class Choice:
    """The token that one side puts first.

    text: empty without a tokenizer.  probability: what that side gives it.
    """

    token: int
    text: str
    probability: float


@dataclass(frozen=True)
class WorstCase:
    """A position where the two sides are far apart, for a person to read.

    kl: KL(reference || artifact) there, in nats.  context: text up to the token at `position`, its own the
    last; empty without a tokenizer.  expected: the reference's first choice of the next token.  found: the
    artifact's.
    """

    scenario: str
    position: int
    kl: float
    context: str
    expected: Choice
    found: Choice
