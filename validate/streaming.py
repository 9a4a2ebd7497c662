"""Both sides one layer at a time, over mapped weights → findings: a whole 7B in the memory of a layer or two.

Layer i runs every chunk and every decode step of every scenario before layer i + 1 is loaded. What cannot be
known beforehand is left out: a greedy continuation, whose every token needs all layers. The poke probe is put
to one layer at its full width, between the artifact's embedding and head.
"""

from mistral_trt.progress import note, track
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.onnxruntime_backend import OnnxRuntimeBackend
from mistral_trt.validate.artifact_run import Played, compare_played, run_pokes
from mistral_trt.validate.layerwise.follow import Followed, follow
from mistral_trt.validate.layerwise.layer_slice import layer_slice
from mistral_trt.validate.layerwise.ranges import RangeLog
from mistral_trt.validate.layerwise.replay import record, replay
from mistral_trt.validate.layerwise.runner import SegmentedArtifact
from mistral_trt.validate.layerwise.steps import Recording
from mistral_trt.validate.reference.decoder import HuggingFaceLayers, eager_stream, streamed_layers
from mistral_trt.validate.scenarios.poke import PokeResult
from mistral_trt.validate.three_way import References, in_own_precision, reference_of, third_leg
from mistral_trt.validate.trial import Findings, Trial
from mistral_trt.validate.verdict.quality import READING
from mistral_trt.validate.worst_cases import worst_cases


def compare_streaming(trial: Trial) -> Findings:
    """Layers with all scenarios, the reference's precision, logits, and the poke probe of one layer."""
    tokens, window = trial.tokens, trial.sliding_window
    recordings = {plan.name: record(trial.contract, plan, tokens=tokens.ids) for plan in trial.plans}
    layers = streamed_layers(trial.source, sliding_window=window)
    with SegmentedArtifact(trial.folder, trial.contract, threads=trial.job.threads) as artifact:
        followed = follow_all(trial, artifact, layers, recordings)
        own = None
        if trial.compares_own_precision:
            own = in_own_precision(trial, eager_stream(trial.source, sliding_window=window))
        references = References(reference_of(layers, followed.reference), own)
        played = play_again(trial, artifact, recordings, followed, references)
    index = trial.contract.config.num_hidden_layers // 2
    pokes, failure = poke_layer(trial, index)
    return Findings(
        scenarios=tuple(found.results[0] for found in played.values()),
        greedy=None,
        pokes=tuple(pokes),
        layers=followed.findings,
        own_precision=third_leg(references, played, tokens=tokens),
        worst_cases=worst_cases({name: found.worst for name, found in played.items()}, trial),
        failures={} if failure is None else {"poke": failure},
        notes=(
            "Both sides ran one layer at a time over mapped weights; nothing was generated greedily.",
            f"The poke probe was put to layer {index} alone, at full width, between embedding and head.",
        ),
    )


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
