"""Artifact + checkpoint → report: the stage's one public function, in the order of the work."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from mistral_trt.artifact import new_artifact, require_apart
from mistral_trt.contract import GraphContract
from mistral_trt.errors import ValidationError
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.lora import Adapter
from mistral_trt.manifest import GRAPH_NAME, Manifest, read_manifest
from mistral_trt.progress import note
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.engine import open_cache
from mistral_trt.runtime.onnxruntime_backend import OnnxRuntimeBackend
from mistral_trt.runtime.text.tokenizer import Tokenizer
from mistral_trt.validate import gates as table
from mistral_trt.validate.budget import check_length
from mistral_trt.validate.gates import ScenarioResult
from mistral_trt.validate.greedy import GreedyAgreement, greedy_agreement, split
from mistral_trt.validate.job import Job
from mistral_trt.validate.poke import PokeResult
from mistral_trt.validate.probes import probes
from mistral_trt.validate.provenance import (
    describe_artifact,
    describe_execution,
    describe_failures,
    describe_limits,
    describe_reference,
    describe_run,
    describe_undecided,
)
from mistral_trt.validate.quality import measure_quality
from mistral_trt.validate.reference import (
    Reference,
    load_model,
    require_memory,
    require_same_checkpoint,
    run_reference,
)
from mistral_trt.validate.report import JSON_NAME, Report, write_report
from mistral_trt.validate.scenarios import scenarios
from mistral_trt.validate.tokens import TEXT, Tokens, random_tokens, text_tokens
from mistral_trt.validate.trials import run_greedy, run_pokes, run_scenario
from mistral_trt.validate.twin import float32_twin


def validate_artifact(job: Job) -> Report:
    """Compare an artifact with the checkpoint it was made from and write the report to `job.out`.

    A failed gate is a report with `passed` False; ValidationError and others mean it could not run.
    """
    require_apart(job.out, job.folder)
    require_apart(job.out, job.reference)
    manifest = read_manifest(job.folder)
    require_runnable(job.folder, manifest)
    source = Checkpoint.open(job.reference, [Adapter.open(adapter, scale) for adapter, scale in job.loras])
    require_same_checkpoint(manifest, source)
    tokens = choose_tokens(job, manifest)
    require_memory(source, len(tokens.ids))
    with new_artifact(job.out, JSON_NAME) as partial:
        report = run(job, manifest, source=source, tokens=tokens)
        write_report(report, partial)
    return report


@dataclass(frozen=True)
class Findings:
    """What was found.  failures: place outside the scenarios → why a call failed there, or None."""

    scenarios: tuple[ScenarioResult, ...]
    greedy: GreedyAgreement
    pokes: tuple[PokeResult, ...]
    failures: Mapping[str, str | None]


def run(job: Job, manifest: Manifest, *, source: Checkpoint, tokens: Tokens) -> Report:
    """Everything that takes time."""
    started, clock = datetime.now(UTC), time.monotonic()
    contract, length = manifest.contract, len(tokens.ids)
    limits = table.read_gates(contract.precision)
    found = compare(job, manifest, source=source, tokens=tokens)
    failures = {place: why for place, why in found.failures.items() if why is not None}
    measured = table.measure(found.scenarios, found.pokes, failures=list(failures))
    return Report(
        contract=contract,
        artifact=describe_artifact(job.folder, manifest),
        reference=describe_reference(source, contract),
        executed=describe_execution(contract),
        tokens=tokens,
        probes=tuple(probes(contract, length)),
        scenarios=found.scenarios,
        pokes=found.pokes,
        gates=table.judge(limits, measured),
        quality=measure_quality(found.scenarios, found.greedy),
        quantization=manifest.details.get("quantization"),
        notes=tuple(
            describe_failures(failures)
            + describe_limits(contract, length)
            + describe_undecided(table.undecided(limits, measured))
        ),
        run=describe_run(job.command, job.seed, started=started, seconds=time.monotonic() - clock),
    )


def compare(job: Job, manifest: Manifest, *, source: Checkpoint, tokens: Tokens) -> Findings:
    """Run both sides.

    The artifact is opened twice, for its continuation and for the rest, with the reference loaded between:
    the two are never in memory together.
    """
    contract = manifest.contract
    weights = sum(weight.elements for weight in source.weights.values())
    length = len(tokens.ids)
    names = job.budget.scenarios(length=length, weights=weights)
    plans = scenarios(contract, length, names=names, seed=job.seed)
    with runnable(job, manifest) as open_artifact:
        generated, stopped = run_greedy(open_artifact(), tokens)
        expected, greedy = run_references(source, contract, tokens=tokens, generated=generated)
        cache = open_artifact()
        results = tuple(run_scenario(cache, plan, tokens=tokens, references=[expected])[0] for plan in plans)
        pokes, failure = run_pokes(cache, tokens)
    return Findings(results, greedy, tuple(pokes), {"greedy": stopped, "poke": failure})


def require_runnable(folder: Path, manifest: Manifest) -> None:
    """Raise ValidationError for a TensorRT engine: without its GPU it cannot be executed."""
    if manifest.stage != "onnx":
        made_from = str(manifest.sources.get("onnx", "unknown"))
        raise ValidationError(
            f"{folder} holds a TensorRT engine, which runs on its GPU only and not here; validate the ONNX "
            f"folder it was built from (manifest {made_from[:12]}…): the graph is the same"
        )


def choose_tokens(job: Job, manifest: Manifest) -> Tokens:
    """Text where the artifact has a tokenizer, else random tokens. Raises ValidationError."""
    contract = manifest.contract
    vocab_size = contract.config.vocab_size
    length = job.budget.length(contract) if job.length is None else check_length(job.length, contract)
    if job.random_tokens:
        return random_tokens(length=length, vocab_size=vocab_size, seed=job.seed)
    if "tokenizer.json" in manifest.files:
        tokenizer = Tokenizer.from_folder(job.folder)
        return text_tokens(tokenizer, job.text or TEXT, length=length, vocab_size=vocab_size)
    if job.text is not None:
        raise ValidationError(
            f"{job.folder} has no tokenizer, so --text cannot be read; leave it out for random tokens"
        )
    return random_tokens(length=length, vocab_size=vocab_size, seed=job.seed)


@contextmanager
def runnable(job: Job, manifest: Manifest) -> Iterator[Callable[[], RollingCache]]:
    """What opens the artifact itself, or its float32 twin where a CPU cannot run bfloat16; anew each time."""
    if manifest.contract.cache_dtype != "bfloat16":
        yield partial(open_cache, job.folder, threads=job.threads, trust_weights=True, exact=True)
        return
    note("bf16: making the float32 twin")
    with float32_twin(job.folder / GRAPH_NAME, manifest.contract) as (path, contract):
        yield lambda: RollingCache(OnnxRuntimeBackend(path, contract, threads=job.threads))


def run_references(
    source: Checkpoint, contract: GraphContract, *, tokens: Tokens, generated: Sequence[int]
) -> tuple[Reference, GreedyAgreement]:
    """The reference over the tokens, and what it says to the continuation; the model is gone afterwards."""
    note(f"reference: {len(tokens.ids)} positions through MistralForCausalLM, float32, eager attention")
    model = load_model(source, sliding_window=contract.ring.sliding_window)
    prompt, _ = split(len(tokens.ids))
    continued = run_reference(model, [*tokens.ids[:prompt], *generated])
    return run_reference(model, tokens.ids), greedy_agreement(continued, generated, prompt_tokens=prompt)
