"""Both sides whole in memory, one after the other → findings.

The artifact is opened twice, for its continuation and for the rest, with the reference loaded between: the
two are never in memory together. One at a time, the artifact's layers are followed beside the reference's.
"""

from contextlib import closing

import numpy as np

from mistral_trt.errors import MistralTrtError
from mistral_trt.progress import note, track
from mistral_trt.validate.artifact_run import in_words, run_greedy, run_pokes, run_scenario
from mistral_trt.validate.findings import LayerFindings
from mistral_trt.validate.layerwise.follow import follow
from mistral_trt.validate.layerwise.ranges import RangeLog
from mistral_trt.validate.layerwise.replay import record
from mistral_trt.validate.layerwise.runner import SegmentedArtifact
from mistral_trt.validate.opening import openable
from mistral_trt.validate.reference.decoder import HuggingFaceLayers, WholeModel, whole_layers
from mistral_trt.validate.reference.hugging_face import load_model, run_reference
from mistral_trt.validate.scenarios.greedy import GreedyAgreement, greedy_agreement, split
from mistral_trt.validate.three_way import References, in_own_precision, reference_of, third_leg
from mistral_trt.validate.trial import Findings, Trial
from mistral_trt.validate.worst_cases import worst_cases


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
        worst_cases=worst_cases({name: found.worst for name, found in played.items()}, trial),
        failures={place: why for place, why in failures.items() if why is not None},
        notes=(),
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
    found, failure = follow_layers(trial, layers)
    reference = run_reference(model, tokens.ids) if found is None else reference_of(layers, found[1])
    own = in_own_precision(trial, WholeModel(model)) if trial.compares_own_precision else None
    return References(reference, own), greedy, None if found is None else found[0], failure


def follow_layers(
    trial: Trial, layers: HuggingFaceLayers
) -> tuple[tuple[LayerFindings, np.ndarray] | None, str | None]:
    """The artifact's layers beside the reference's, and what left the reference's last one.

    A layer that ONNX Runtime fails to run is a finding, not the end.
    """
    reading, tokens, ranges = trial.reading, trial.tokens, RangeLog()
    recording = record(trial.contract, reading, tokens=tokens.ids)
    with (
        SegmentedArtifact(trial.folder, trial.contract, threads=trial.job.threads) as artifact,
        track("layers", artifact.num_hidden_layers, unit="layers") as advance,
    ):
        try:
            found = follow(
                artifact,
                layers,
                tokens=tokens.ids,
                recordings={reading.name: recording},
                reading=reading.name,
                ranges=ranges,
                progress=advance,
            )
        except (MemoryError, MistralTrtError):
            raise
        except Exception as error:  # ONNX Runtime raises a class of its own for each status
            return None, in_words(error)
    return (found.findings, found.reference), None
