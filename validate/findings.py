"""What the parts of a validation measured, as plain values: no part knows how another came by its own.

T positions of the reading scenario   n ring slots that hold a position
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mistral_trt.validate.metrics import LogitErrors
from mistral_trt.validate.scenarios.poke import PokeResult
from mistral_trt.validate.scenarios.scenario import Scenario

FLOAT16_MAX = 65504.0
FLOAT16_SMALLEST_NORMAL = 2.0**-14


@dataclass(frozen=True)
class ScenarioResult:
    """What a scenario gave: errors of the positions it reached, and why it stopped short if it did."""

    scenario: Scenario
    errors: LogitErrors
    failure: str | None


@dataclass(frozen=True)
class Divergence:
    """The first token that the reference would not have chosen.

    position: where it stands in prompt and continuation.  reference_margin: how far the reference's logit
    of its own choice lies above that of the artifact's.
    """

    position: int
    artifact_token: int
    reference_token: int
    reference_margin: float


@dataclass(frozen=True)
class GreedyAgreement:
    """How many of the generated tokens, from the first on, the reference would have chosen too."""

    prompt_tokens: int
    generated: int
    agreed: int
    diverged: Divergence | None


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

    activation: "mlp.gate_proj", "self_attn.o_proj", "residual", …: what that module, or sum, gives.
    largest: absolute value; infinity or NaN where one occurred.  subnormal: share of the numbers that are
    not zero and below 2**-14.
    """

    activation: str
    layer: int
    largest: float
    subnormal: float


@dataclass(frozen=True)
class LayerFindings:
    """Every layer, in order.  words: how the layers were run."""

    words: str
    layers: tuple[LayerErrors, ...]
    ranges: tuple[ActivationRange, ...]


@dataclass(frozen=True)
class InputRange:
    """How much of the range that its step can hold the input of one linear uses.

    Of a position that is its largest |x|, over the last code times the step; what is above 1 is cut.
    linear: "layer 3 mlp.down_proj" or "lm_head".  largest: of all positions.  typical: their median.
    """

    linear: str
    largest: float
    typical: float


@dataclass(frozen=True)
class OwnPrecision:
    """The reference computed in the artifact's own precision: what rounding alone does.

    words: how.  scenarios: the artifact's logits against it, in the order they were played.  reference: its
    own against the float32 reference's, at every position.  inputs: of every linear whose input is rounded;
    None where there is none, empty where it could not be computed.
    """

    words: str
    scenarios: tuple[ScenarioResult, ...]
    reference: LogitErrors
    inputs: tuple[InputRange, ...] | None = None


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


@dataclass(frozen=True)
class Findings:
    """What was found.  greedy: None where nothing was generated.  layers, own_precision: None where not run.

    failures: place outside the scenarios → why a call failed there.  notes: what this way leaves out.
    """

    scenarios: tuple[ScenarioResult, ...]
    greedy: GreedyAgreement | None
    pokes: tuple[PokeResult, ...]
    layers: LayerFindings | None
    own_precision: OwnPrecision | None
    worst_cases: tuple[WorstCase, ...]
    failures: Mapping[str, str]
    notes: tuple[str, ...]
