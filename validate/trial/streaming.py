"""Both sides one layer at a time, over mapped weights → findings: a whole 7B in the memory of a layer or two.

Layer i runs every chunk and every decode step of every scenario before layer i + 1 is loaded. What cannot be
known beforehand is left out: a greedy continuation, whose every token needs all layers. The poke probe is put
to one layer at its full width, between the artifact's embedding and head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from mistral_trt.progress import note, track
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.onnxruntime_backend import OnnxRuntimeBackend
from mistral_trt.validate.findings import Findings, LayerFindings, OwnPrecision, ScenarioResult
from mistral_trt.validate.layerwise.follow import Followed, follow
from mistral_trt.validate.layerwise.layer_slice import layer_slice
from mistral_trt.validate.layerwise.ranges import RangeLog
from mistral_trt.validate.layerwise.replay import record, replay
from mistral_trt.validate.layerwise.runner import SegmentedArtifact
from mistral_trt.validate.layerwise.steps import Recording
from mistral_trt.validate.metrics import concatenate
from mistral_trt.validate.reference.decoder import HuggingFaceLayers, eager_stream, streamed_layers
from mistral_trt.validate.scenarios.poke import PokeResult
from mistral_trt.validate.scenarios.scenario import READING
from mistral_trt.validate.trial.artifact_run import Played, attempt, compare_played, run_pokes
from mistral_trt.validate.trial.three_way import (
    References,
    own_precision_notes,
    reference_of,
    third_leg,
    try_own_precision,
)
from mistral_trt.validate.trial.trial import Trial
from mistral_trt.validate.trial.worst_cases import worst_cases


@dataclass(frozen=True)
class Streamed:
    """What layers and scenarios gave.  notes: what could not be compared."""

    layers: LayerFindings | None
    own_precision: OwnPrecision | None
    played: Mapping[str, Played]
    notes: tuple[str, ...] = ()


def compare_streaming(trial: Trial) -> Findings:
    """Layers with all scenarios, the reference's precision, logits, and the poke probe of one layer."""
    found, broken = attempt(partial(run_layers, trial))
    if found is None:
        unplayed = {
            plan.name: Played((ScenarioResult(plan, concatenate([]), broken),), ()) for plan in trial.plans
        }
        found = Streamed(None, None, unplayed)
    index = trial.contract.config.num_hidden_layers // 2
    poked, unasked = attempt(partial(poke_layer, trial, index))
    pokes, failure = poked or ([], unasked)
    failures = {"layers": broken, "poke": failure}
    return Findings(
        scenarios=tuple(played.results[0] for played in found.played.values()),
        greedy=None,
        pokes=tuple(pokes),
        layers=found.layers,
        own_precision=found.own_precision,
        worst_cases=worst_cases(
            {name: played.worst for name, played in found.played.items()},
            tokens=trial.tokens,
            tokenizer=trial.tokenizer,
        ),
        failures={place: why for place, why in failures.items() if why is not None},
        notes=(
            *found.notes,
            "Both sides ran one layer at a time over mapped weights; nothing was generated greedily.",
            f"The poke probe was put to layer {index} alone, at full width, between embedding and head.",
        ),
    )


def run_layers(trial: Trial) -> Streamed:
    """Every layer of both sides, of the artifact's for every scenario."""
    tokens, window = trial.tokens, trial.sliding_window
    recordings = {plan.name: record(trial.contract, plan, tokens=tokens.ids) for plan in trial.plans}
    layers = streamed_layers(trial.source, sliding_window=window)
    with SegmentedArtifact(trial.folder, trial.contract, threads=trial.job.threads) as artifact:
        followed = follow_all(trial, artifact, layers, recordings)
        own = try_own_precision(trial, partial(eager_stream, trial.source, sliding_window=window))
        references = References(reference_of(layers, followed.reference), own)
        played = play_again(trial, artifact, recordings, followed, references)
    notes = own_precision_notes(references)
    return Streamed(followed.findings, third_leg(references, played, tokens=tokens), played, notes)


def follow_all(
    trial: Trial,
    artifact: SegmentedArtifact,
    layers: HuggingFaceLayers,
    recordings: dict[str, Recording],
) -> Followed:
    note(f"reference: {len(trial.tokens.ids)} positions. {layers.words}")
    with track("layers", artifact.num_hidden_layers, unit="layers") as advance:
        return follow(
            artifact,
            layers,
            tokens=trial.tokens.ids,
            recordings=recordings,
            reading=READING,
            ranges=RangeLog(),
            progress=advance,
        )


def play_again(
    trial: Trial,
    artifact: SegmentedArtifact,
    recordings: dict[str, Recording],
    followed: Followed,
    references: References,
) -> dict[str, Played]:
    """Each scenario with the logits that the head gives of what left the last layer."""
    found = {}
    for plan in trial.plans:
        logits = artifact.logits(recordings[plan.name], followed.hidden[plan.name])
        again = replay(recordings[plan.name], logits, plan, tokens=trial.tokens.ids)
        found[plan.name] = compare_played(again, plan, tokens=trial.tokens, references=references.every)
    return found


def poke_layer(trial: Trial, index: int) -> tuple[list[PokeResult], str | None]:
    """The poke probe, put to one layer between the artifact's embedding and head."""
    with layer_slice(trial.folder, trial.contract, index) as (path, contract):
        cache = RollingCache(OnnxRuntimeBackend(path, contract, threads=trial.job.threads, exact=True))
        try:
            return run_pokes(cache, trial.tokens)
        finally:
            cache.close()
