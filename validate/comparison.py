"""Artifact + checkpoint → report: the stage's one public function, in the order of the work."""

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from mistral_trt.artifact import new_artifact, require_apart
from mistral_trt.errors import ValidationError
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.lora import Adapter
from mistral_trt.progress import note, track
from mistral_trt.runtime.text.tokenizer import Tokenizer
from mistral_trt.validate.budget import FULL, check_length
from mistral_trt.validate.expected_time import (
    Work,
    in_words,
    measure_speed,
    poke_work,
    predict_seconds,
    scenario_work,
)
from mistral_trt.validate.findings import WeightFindings
from mistral_trt.validate.job import Job
from mistral_trt.validate.polygraphy_run import ENGINE, LAYERS, PolygraphyResult, run_polygraphy
from mistral_trt.validate.provenance import (
    describe_artifact,
    describe_engine,
    describe_execution,
    describe_failures,
    describe_limits,
    describe_polygraphy,
    describe_reference,
    describe_run,
    describe_undecided,
)
from mistral_trt.validate.reference.hugging_face import require_memory, require_same_checkpoint
from mistral_trt.validate.report.folder import write_report
from mistral_trt.validate.report.report import JSON_NAME, Report
from mistral_trt.validate.scenarios.poke import questions
from mistral_trt.validate.scenarios.probes import probes
from mistral_trt.validate.scenarios.scenario import Scenario, scenarios
from mistral_trt.validate.scenarios.tokens import TEXT, Tokens, random_tokens, text_tokens
from mistral_trt.validate.streaming import compare_streaming
from mistral_trt.validate.subject import Subject, open_subject
from mistral_trt.validate.trial import Trial
from mistral_trt.validate.verdict import gates as table
from mistral_trt.validate.verdict.gates import Gate
from mistral_trt.validate.verdict.parts import measure_parts
from mistral_trt.validate.verdict.quality import measure_quality
from mistral_trt.validate.weights.compare import compare_weights
from mistral_trt.validate.weights.tokenizer import compare_tokenizers
from mistral_trt.validate.whole import compare_whole


def validate_artifact(job: Job) -> Report:
    """Compare an artifact with the checkpoint it was made from and write the report to `job.out`.

    A failed gate is a report with `passed` False; ValidationError and others mean it could not run.
    """
    require_apart(job.out, job.folder)
    require_apart(job.out, job.reference)
    trial, limits = prepare(job)
    with new_artifact(job.out, JSON_NAME) as partial:
        report = run(trial, limits)
        write_report(report, partial)
    return report


def prepare(job: Job) -> tuple[Trial, list[Gate]]:
    """What is to be compared and what it is held to; whatever can be refused is refused here."""
    subject = open_subject(job.folder, job.onnx)
    limits = table.read_gates(subject.contract.precision, override=job.gates)
    if job.streaming and subject.runs_engine:
        raise ValidationError("an engine runs whole on its GPU; leave --streaming out")
    source = Checkpoint.open(job.reference, [Adapter.open(adapter, scale) for adapter, scale in job.loras])
    require_same_checkpoint(subject.manifest, source)
    tokens = choose_tokens(job, subject)
    require_memory(source, len(tokens.ids), streaming=job.streaming)
    return Trial(job, subject, source, tokens, plan(job, subject, source, len(tokens.ids))), limits


def choose_tokens(job: Job, subject: Subject) -> Tokens:
    """Text where the artifact has a tokenizer, else random tokens. Raises ValidationError."""
    contract = subject.contract
    vocab_size = contract.config.vocab_size
    length = job.budget.length(contract) if job.length is None else check_length(job.length, contract)
    if job.random_tokens:
        return random_tokens(length=length, vocab_size=vocab_size, seed=job.seed)
    if "tokenizer.json" in subject.manifest.files:
        tokenizer = Tokenizer.from_folder(subject.folder)
        return text_tokens(tokenizer, job.text or TEXT, length=length, vocab_size=vocab_size)
    if job.text is not None:
        raise ValidationError(
            f"{subject.folder} has no tokenizer, so --text cannot be read; leave it out for random tokens"
        )
    return random_tokens(length=length, vocab_size=vocab_size, seed=job.seed)


def plan(job: Job, subject: Subject, source: Checkpoint, length: int) -> tuple[Scenario, ...]:
    names = job.budget.scenarios(length=length, weights=elements(source))
    return tuple(scenarios(subject.contract, length, names=names, seed=job.seed))


def elements(source: Checkpoint) -> int:
    """Parameters of the model."""
    return sum(weight.elements for weight in source.weights.values())


def run(trial: Trial, limits: Sequence[Gate]) -> Report:
    """Everything that takes time."""
    started, clock = datetime.now(UTC), time.monotonic()
    job, subject, contract, length = trial.job, trial.subject, trial.contract, len(trial.tokens.ids)
    expected = predicted_seconds(trial)
    note(f"{job.budget.name}: {length} positions, {in_words(expected)} on this machine (predicted)")
    weights = stored_weights(trial)
    found = compare_streaming(trial) if job.streaming else compare_whole(trial)
    polygraphy = polygraphy_verdicts(trial)
    failures = [*found.failures, *(f"polygraphy {p.name}" for p in polygraphy if p.passed is False)]
    measured = {
        **table.measure(found.scenarios, found.pokes, failures=failures),
        **measure_parts(layers=found.layers, own=found.own_precision, weights=weights, ring=contract.ring),
    }
    is_text = trial.tokens.is_text
    left = table.undecided(limits, measured, is_text=is_text)
    return Report(
        contract=contract,
        artifact=describe_artifact(subject.folder, subject.manifest)
        | describe_engine(subject.engine, polygraphy),
        reference=describe_reference(trial.source, contract, streaming=job.streaming),
        executed=describe_execution(contract, subject.engine),
        tokens=trial.tokens,
        probes=tuple(probes(contract, length)),
        scenarios=found.scenarios,
        pokes=found.pokes,
        gates=table.judge(limits, measured, is_text=is_text),
        undecided=left,
        weights=weights,
        layers=found.layers,
        own_precision=found.own_precision,
        worst_cases=found.worst_cases,
        quality=measure_quality(found.scenarios, found.greedy),
        quantization=subject.manifest.details.get("quantization"),
        notes=(
            *describe_failures(found.failures),
            *describe_polygraphy(polygraphy),
            *found.notes,
            *describe_limits(contract, length),
            *describe_undecided(left),
        ),
        run=describe_run(job.command, job.seed, started=started, seconds=time.monotonic() - clock)
        | {"budget": job.budget.name, "streaming": job.streaming, "predicted_seconds": round(expected)},
    )


def predicted_seconds(trial: Trial) -> float:
    """Of everything, before it is run."""
    contract, length = trial.contract, len(trial.tokens.ids)
    layers, own = contract.config.num_hidden_layers, trial.compares_own_precision
    references = 1 + own  # each reads everything once, with every key
    fed = 1 if trial.job.streaming else 2  # the layers with the states of the reference, with their own
    work = Work(
        tokens=(references + fed) * length,
        steps=0,
        compared=own * (length + sum(plan.compared for plan in trial.plans)),
        layer_runs=layers,
        scored=references * length**2,
    )
    for scenario in trial.plans:
        work += scenario_work(scenario)
    poked = poke_work(contract, questions(contract, length))
    weights = elements(trial.source)
    seconds = predict_seconds(work, contract, weights=weights, speed=(speed := measure_speed()))
    of_the_model = weights // layers if trial.job.streaming else weights
    return seconds + predict_seconds(poked, contract, weights=of_the_model, speed=speed)


def stored_weights(trial: Trial) -> WeightFindings:
    """Weights and tokenizer against the checkpoint's, before anything is computed with them."""
    source = trial.source
    with track("weights", len(source.weights), unit="tensors") as advance:
        found = compare_weights(trial.folder, trial.contract, source, advance=advance)
    tokenizer = compare_tokenizers(trial.folder, source, text_of(trial.job))
    if tokenizer is None or not tokenizer.differ:
        return found
    words = (
        f"{tokenizer.differ:,} of {tokenizer.tokens:,} tokens of the text are not the checkpoint's, the "
        f"first {tokenizer.where}"
    )
    return replace(found, wrong={**found.wrong, "tokenizer.json": words})


def text_of(job: Job) -> str:
    path: Path = job.text or TEXT
    return path.read_text(encoding="utf-8")


def polygraphy_verdicts(trial: Trial) -> tuple[PolygraphyResult, ...]:
    """Of the engine where it runs here; its layers too where everything is asked for."""
    engine = trial.subject.engine
    if engine is None or not trial.subject.runs_engine:
        return ()
    names = (*ENGINE, *LAYERS) if trial.job.budget is FULL else ENGINE
    return run_polygraphy(trial.subject, engine, names)
