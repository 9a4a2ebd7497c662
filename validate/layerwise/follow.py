"""An artifact and a reference, both layer by layer → where the artifact's layers, rings and ranges part.

T tokens   K key/value heads   R slots   D head_dim
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mistral_trt.contract import Ring
from mistral_trt.errors import ValidationError
from mistral_trt.progress import Advance
from mistral_trt.validate.findings import LayerErrors, LayerFindings
from mistral_trt.validate.layerwise.ranges import RangeLog
from mistral_trt.validate.layerwise.runner import LayerRun, SegmentedArtifact
from mistral_trt.validate.layerwise.steps import (
    Array,
    Hidden,
    Recording,
    gather,
    held_positions,
    scatter,
)
from mistral_trt.validate.reference.layers import LayerStates, ReferenceLayers

Errors = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Followed:
    """What is left at the end of both.

    hidden: recording → what left its last layer, for each step float32 [B, S, hidden_size].
    reference: the same of the reference, float32 [T, hidden_size].
    """

    findings: LayerFindings
    hidden: Mapping[str, Hidden]
    reference: Array


def follow(
    artifact: SegmentedArtifact,
    reference: ReferenceLayers,
    *,
    tokens: Sequence[int],
    recordings: Mapping[str, Recording],
    reading: str,
    ranges: RangeLog | None = None,
    progress: Advance = lambda layers: None,
) -> Followed:
    """Go through both, layer after layer; the reference's layer is run before the artifact's is loaded.

    recordings: name → how `tokens` are fed; each runs through all layers, a layer fed what the one before
    it made.  reading: the one whose layers are compared, and also fed what the reference's were; it feeds
    all of `tokens` to row 0.  ranges: gets the activations of `reading`.  progress: called after each layer.
    Raises ValidationError if a recording feeds other tokens, or the reference has other layers.
    """
    names = sorted(recordings, key=lambda name: name != reading)
    _require_alike(artifact, reference, tokens, recordings[reading])
    own = {name: artifact.embed(recordings[name]) for name in names}
    read, entered, errors = recordings[reading], reference.embed(tokens), []
    for index in range(artifact.num_hidden_layers):
        artifact.close()  # so that its layer and the reference's are not in memory together
        states = reference.run(index, entered)
        for name in own:  # `reading` first: what was loaded to be watched serves the others too
            log = ranges if name == reading else None
            own[name] = artifact.run(index, recordings[name], own[name], ranges=log).hidden
        fed = artifact.run(index, read, scatter(read, entered))
        comparison = _Comparison(read, artifact.contract.ring, entered, states)
        errors.append(comparison.errors(index, fed, own[reading]))
        entered = states.hidden
        progress(1)
    artifact.close()
    found = LayerFindings(artifact.words, tuple(errors), ranges.found() if ranges else ())
    return Followed(found, own, entered)


@dataclass(frozen=True)
class _Comparison:
    """One layer of the reference, and what it was fed: float32 [T, hidden_size]."""

    recording: Recording
    ring: Ring
    entered: Array
    states: LayerStates

    def errors(self, index: int, fed: LayerRun, own: Hidden) -> LayerErrors:
        """fed: the artifact's layer, fed the same.  own: what left it after its own layers before it."""
        length, left = len(self.entered), self.states.hidden
        held = held_positions(self.recording, self.ring)
        slots = np.flatnonzero((held >= 0) & (held < length))
        positions = held[slots]
        made = gather(self.recording, fed.hidden, length)
        with np.errstate(invalid="ignore"):  # infinity minus infinity is NaN, and shows
            update = relative_errors(made - self.entered, left - self.entered)
        return LayerErrors(
            index=index,
            hidden=relative_errors(gather(self.recording, own, length), left),
            update=update,
            positions=positions,
            keys=relative_errors(_vectors(fed.keys[0], slots), _vectors(self.states.keys, positions)),
            values=relative_errors(_vectors(fed.values[0], slots), _vectors(self.states.values, positions)),
        )


def relative_errors(found: Array, expected: Array) -> Errors:
    """Norm of the difference over norm of the expected, for each row: float64 [n].

    0 where both are zero, infinity where only the expected is, NaN where a number is.
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        size, off = _norms(expected), _norms(found - expected)
        return np.where(off == 0, 0.0, off / size)


def _norms(vectors: Array) -> Errors:
    """Summed in float64, without a copy in it."""
    squares: Errors = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
    return np.sqrt(squares)


def _vectors(cache: Array, places: npt.NDArray[np.int64]) -> Array:
    """Keys or values [K, R or T, D] at n places, all heads together: float32 [n, K * D]."""
    return cache[:, places].transpose(1, 0, 2).reshape(len(places), -1).astype(np.float32)


def _require_alike(
    artifact: SegmentedArtifact, reference: ReferenceLayers, tokens: Sequence[int], reading: Recording
) -> None:
    if reference.num_hidden_layers != artifact.num_hidden_layers:
        raise ValidationError(
            f"the artifact has {artifact.num_hidden_layers} decoder layers and the reference "
            f"{reference.num_hidden_layers}; pass the checkpoint that it was made from as --reference"
        )
    fed = gather(reading, [step.input_ids for step in reading.steps], len(tokens))
    if not np.array_equal(fed, tokens):
        first = int(np.argmax(fed != np.asarray(tokens)))
        raise ValidationError(
            f"the recording feeds token {fed[first]} at position {first} where the reference reads "
            f"{tokens[first]}; play the same tokens to both"
        )
