"""The reference, the same in the artifact's own precision, and the artifact: what is held against what.

So that rounding, which the second shows as well, is not blamed on the graph.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mistral_trt.progress import track
from mistral_trt.validate.artifact_run import Played
from mistral_trt.validate.metrics import LogitErrors, concatenate, logit_errors
from mistral_trt.validate.reference.decoder import HuggingFaceLayers, LayerSource
from mistral_trt.validate.reference.hugging_face import Reference, run_layers
from mistral_trt.validate.reference.own_precision import Rounding, own_precision_layers
from mistral_trt.validate.scenarios.tokens import Tokens
from mistral_trt.validate.trial import Trial
from mistral_trt.validate.verdict.scenario_results import OwnPrecision

_AT_ONCE = 256


@dataclass(frozen=True)
class Own:
    """The reference in the artifact's own precision.  words: how it computes."""

    reference: Reference
    words: str


@dataclass(frozen=True)
class References:
    """What an artifact is held against.  own: None where there is no third leg."""

    reference: Reference
    own: Own | None

    @property
    def every(self) -> list[Reference]:
        """The reference, and where there is one the reference in the artifact's own precision."""
        return [self.reference] if self.own is None else [self.reference, self.own.reference]


def reference_of(layers: HuggingFaceLayers, hidden: np.ndarray) -> Reference:
    """hidden: float32 [T, hidden_size], what left the last layer."""
    return Reference(layers.norm(hidden), layers.head())


def in_own_precision(trial: Trial, source: LayerSource) -> Own:
    """Run the reference's layers with the artifact's rounding.  source: of the float32 layers."""
    layers = own_precision_layers(
        source,
        precision=trial.contract.precision,
        rounding=rounding_of(trial),
        alter=trial.fake_quantization(),
    )
    with track("own precision", layers.num_hidden_layers, unit="layers") as advance:
        return Own(run_layers(layers, trial.tokens.ids, advance=advance), layers.words)


def rounding_of(trial: Trial) -> Rounding:
    """What is rounded where the artifact is run."""
    if trial.subject.runs_engine:
        return "all"
    return "parameters" if trial.contract.cache_dtype == "bfloat16" else "attention"


def third_leg(references: References, played: Mapping[str, Played], *, tokens: Tokens) -> OwnPrecision | None:
    """The artifact against the reference in its own precision, in every scenario, and that one against the
    reference."""
    if references.own is None:
        return None
    scenarios = tuple(found.results[1] for found in played.values())
    pairs = list(_compare(references.own.reference, references.reference, tokens))
    return OwnPrecision(references.own.words, scenarios, concatenate(pairs))


def _compare(found: Reference, expected: Reference, tokens: Tokens) -> Iterator[LogitErrors]:
    for start in range(0, len(tokens.ids), _AT_ONCE):
        positions = np.arange(start, min(start + _AT_ONCE, len(tokens.ids)))
        yield logit_errors(
            expected.at(positions),
            found.at(positions),
            positions=positions,
            targets=tokens.targets[positions],
        )
