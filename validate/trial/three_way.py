"""The reference, the same in the artifact's own precision, and the artifact: what is held against what.

So that rounding, which the second shows as well, is not blamed on the graph.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mistral_trt.contract import QUANTIZED
from mistral_trt.errors import ManifestError, ValidationError
from mistral_trt.progress import track
from mistral_trt.validate.findings import InputRange, OwnPrecision
from mistral_trt.validate.metrics import LogitErrors, concatenate, logit_errors
from mistral_trt.validate.reference.decoder import HuggingFaceLayers, LayerSource
from mistral_trt.validate.reference.fake_quantization import fake_quantized, fake_quantized_head
from mistral_trt.validate.reference.hugging_face import Reference, run_layers
from mistral_trt.validate.reference.input_log import InputLog
from mistral_trt.validate.reference.own_precision import Alter, AlterHead, Rounding, own_precision_layers
from mistral_trt.validate.scenarios.tokens import Tokens
from mistral_trt.validate.trial.artifact_run import Played
from mistral_trt.validate.trial.trial import Trial

_AT_ONCE = 256


@dataclass(frozen=True)
class Own:
    """The reference in the artifact's own precision.

    reference: None where the artifact's scales let none be computed.  words: how it computes, or why not.
    inputs: as in `OwnPrecision`.
    """

    reference: Reference | None
    words: str
    inputs: tuple[InputRange, ...] | None


@dataclass(frozen=True)
class References:
    """What an artifact is held against.  own: None where there is no third leg."""

    reference: Reference
    own: Own | None

    @property
    def every(self) -> list[Reference]:
        """The reference, and where there is one the reference in the artifact's own precision."""
        own = None if self.own is None else self.own.reference
        return [self.reference] if own is None else [self.reference, own]


def reference_of(layers: HuggingFaceLayers, hidden: np.ndarray) -> Reference:
    """hidden: float32 [T, hidden_size], what left the last layer."""
    return Reference(layers.norm(hidden), layers.head())


def try_own_precision(trial: Trial, source: Callable[[], LayerSource]) -> Own | None:
    """`in_own_precision` where there is a third leg. Scales that it cannot use are a finding, not the end."""
    if not trial.compares_own_precision:
        return None
    try:
        return in_own_precision(trial, source())
    except (ManifestError, ValidationError) as error:  # of the artifact: the float32 reference has been run
        return Own(None, f"not computed: {error}", ())


def own_precision_notes(references: References) -> tuple[str, ...]:
    """What has to be said of a third leg that is missing."""
    own = references.own
    if own is None or own.reference is not None:
        return ()
    return (f"The reference in the artifact's own precision was {own.words}.",)


def in_own_precision(trial: Trial, source: LayerSource) -> Own:
    """Run the reference's layers with the artifact's rounding.  source: of the float32 layers."""
    inputs = InputLog()
    layers = own_precision_layers(
        source,
        precision=trial.contract.precision,
        rounding=rounding_of(trial),
        alter=alteration_of(trial, inputs),
        alter_head=alteration_of_head(trial, inputs),
    )
    with track("own precision", layers.num_hidden_layers, unit="layers") as advance:
        reference = run_layers(layers, trial.tokens.ids, advance=advance)
    return Own(reference, layers.words, inputs.found() or None)


def rounding_of(trial: Trial) -> Rounding:
    """What is rounded where the artifact is run."""
    if trial.subject.runs_engine:
        return "all"
    return "parameters" if trial.contract.cache_dtype == "bfloat16" else "attention"


def alteration_of(trial: Trial, inputs: InputLog) -> Alter | None:
    """What the artifact's precision does to the linears of a layer beyond its dtype."""
    if trial.contract.precision not in QUANTIZED:
        return None
    return fake_quantized(trial.folder, trial.contract, inputs)


def alteration_of_head(trial: Trial, inputs: InputLog) -> AlterHead | None:
    """The same of its lm_head."""
    if trial.contract.precision not in QUANTIZED:
        return None
    return fake_quantized_head(trial.folder, trial.contract, inputs)


def third_leg(references: References, played: Mapping[str, Played], *, tokens: Tokens) -> OwnPrecision | None:
    """The artifact against the reference in its own precision, in every scenario, and that one against the
    reference."""
    own = references.own
    if own is None:
        return None
    if own.reference is None:  # no number is held against the gates, and so they fail
        nothing = tuple(replace(found.results[0], errors=concatenate([])) for found in played.values())
        return OwnPrecision(own.words, nothing, concatenate([]), own.inputs)
    scenarios = tuple(found.results[1] for found in played.values())
    pairs = list(_compare(own.reference, references.reference, tokens))
    return OwnPrecision(own.words, scenarios, concatenate(pairs), own.inputs)


def _compare(found: Reference, expected: Reference, tokens: Tokens) -> Iterator[LogitErrors]:
    for start in range(0, len(tokens.ids), _AT_ONCE):
        positions = np.arange(start, min(start + _AT_ONCE, len(tokens.ids)))
        yield logit_errors(
            expected.at(positions),
            found.at(positions),
            positions=positions,
            targets=tokens.targets[positions],
        )
