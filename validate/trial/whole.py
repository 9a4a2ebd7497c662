"""Both sides whole in memory, one after the other → findings.

The artifact is opened twice, for its continuation and for the rest, with the reference loaded between: the
two are never in memory together. One at a time, the artifact's layers are followed beside the reference's.
"""

from contextlib import closing
from functools import partial

from mistral_trt.progress import note, track
from mistral_trt.validate.findings import Findings, GreedyAgreement, LayerFindings
from mistral_trt.validate.layerwise.follow import Followed, follow
from mistral_trt.validate.layerwise.ranges import RangeLog
from mistral_trt.validate.layerwise.replay import record
from mistral_trt.validate.layerwise.runner import SegmentedArtifact
from mistral_trt.validate.opening import openable
from mistral_trt.validate.reference.decoder import HuggingFaceLayers, WholeModel, whole_layers
from mistral_trt.validate.reference.hugging_face import load_model, run_reference
from mistral_trt.validate.trial.artifact_run import attempt, run_greedy, run_pokes, run_scenario
from mistral_trt.validate.trial.greedy import greedy_agreement, split
from mistral_trt.validate.trial.three_way import (
    References,
    own_precision_notes,
    reference_of,
    third_leg,
    try_own_precision,
)
from mistral_trt.validate.trial.trial import Trial
from mistral_trt.validate.trial.worst_cases import worst_cases


def compare_whole(trial: Trial) -> Findings:
    """Greedy continuation, reference, layers, scenarios and poke probe, in this order."""
    tokens = trial.tokens
    subject, threads = trial.subject, trial.job.threads
    with openable(subject.executed, subject.executed_manifest, threads=threads) as opened:
        with closing(opened()) as cache:
            generated, stopped = run_greedy(cache, tokens)
        del cache
        references, greedy, layers, broken = run_references(trial, generated)
        with closing(opened()) as cache:
            played = {
                plan.name: run_scenario(cache, plan, tokens=tokens, references=references.every)
                for plan in trial.plans
            }
            pokes, failure = run_pokes(cache, tokens)
    failures = {"greedy": stopped, "layers": broken, "poke": failure}
    return Findings(
        scenarios=tuple(found.results[0] for found in played.values()),
        greedy=greedy,
        pokes=tuple(pokes),
        layers=layers,
        own_precision=third_leg(references, played, tokens=tokens),
        worst_cases=worst_cases(
            {name: found.worst for name, found in played.items()}, tokens=tokens, tokenizer=trial.tokenizer
        ),
        failures={place: why for place, why in failures.items() if why is not None},
        notes=own_precision_notes(references),
    )


def run_references(
    trial: Trial, generated: list[int]
) -> tuple[References, GreedyAgreement, LayerFindings | None, str | None]:
    """The reference over the tokens, layer by layer beside the artifact's, and in the artifact's precision;
    what it says to the continuation.  The model is gone afterwards.  Last: why the layers failed, if so."""
    tokens = trial.tokens
    note(f"reference: {len(tokens.ids)} positions through MistralForCausalLM, float32, eager attention")
    model = load_model(trial.source, sliding_window=trial.sliding_window)
    prompt, _ = split(len(tokens.ids))
    continued = run_reference(model, [*tokens.ids[:prompt], *generated])
    greedy = greedy_agreement(continued, generated, prompt_tokens=prompt)
    layers = whole_layers(model)
    found, failure = attempt(partial(follow_layers, trial, layers))
    reference = run_reference(model, tokens.ids) if found is None else reference_of(layers, found.reference)
    own = try_own_precision(trial, partial(WholeModel, model))
    return References(reference, own), greedy, None if found is None else found.findings, failure


def follow_layers(trial: Trial, layers: HuggingFaceLayers) -> Followed:
    """The artifact's layers beside the reference's."""
    reading, tokens = trial.reading, trial.tokens
    recording = record(trial.contract, reading, tokens=tokens.ids)
    with (
        SegmentedArtifact(trial.folder, trial.contract, threads=trial.job.threads) as artifact,
        track("layers", artifact.num_hidden_layers, unit="layers") as advance,
    ):
        return follow(
            artifact,
            layers,
            tokens=tokens.ids,
            recordings={reading.name: recording},
            reading=reading.name,
            ranges=RangeLog(),
            progress=advance,
        )
