"""Artifact + checkpoint → report: the stage's one public function, in the order of the work."""

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

from mistral_trt.artifact import new_artifact, require_apart
from mistral_trt.contract import GraphContract
from mistral_trt.errors import ValidationError
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.lora import Adapter
from mistral_trt.manifest import GRAPH_NAME, Manifest, read_manifest
from mistral_trt.progress import Advance, note, track
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.engine import open_cache
from mistral_trt.runtime.onnxruntime_backend import OnnxRuntimeBackend
from mistral_trt.runtime.text.tokenizer import Tokenizer
from mistral_trt.validate import gates as table
from mistral_trt.validate.gates import ScenarioResult
from mistral_trt.validate.greedy import GreedyAgreement, continue_greedily, greedy_agreement, split
from mistral_trt.validate.metrics import LogitErrors, concatenate, logit_errors
from mistral_trt.validate.parts import measure_parts
from mistral_trt.validate.poke import PokeResult, poke_probe, questions
from mistral_trt.validate.probes import (
    TEXT,
    Scenario,
    Tokens,
    check_length,
    default_length,
    play,
    probes,
    random_tokens,
    scenarios,
    text_tokens,
)
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
from mistral_trt.validate.report import JSON_NAME, Report
from mistral_trt.validate.report_folder import write_report
from mistral_trt.validate.twin import float32_twin

_COMPARED_AT_ONCE = 256


@dataclass(frozen=True)
class Job:
    """What was asked for: the arguments of `validate_artifact`."""

    folder: Path
    reference: Path
    out: Path
    text: Path | None
    length: int | None
    seed: int
    threads: int | None
    loras: tuple[tuple[Path, float], ...] = ()

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValidationError(f"--seed must not be negative, found {self.seed}")
        if self.threads is not None and self.threads < 1:
            raise ValidationError(f"--threads must be at least 1, found {self.threads}")

    @property
    def command(self) -> str:
        """The command line that does the same again."""
        words = ["mistral-trt", "validate", self.folder, "--reference", self.reference, "--out", self.out]
        for name in ("text", "length", "threads"):
            value = getattr(self, name)
            words += [] if value is None else [f"--{name}", value]
        for adapter, scale in self.loras:
            words += ["--lora", f"{adapter}:{scale}"]
        return shlex.join(str(word) for word in [*words, "--seed", self.seed])


def validate_artifact(
    folder: Path,
    *,
    reference: Path,
    out: Path,
    text: Path | None = None,
    length: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    loras: Sequence[tuple[Path, float]] = (),
) -> Report:
    """Compare an ONNX folder with the checkpoint it was made from and write the report to `out`.

    text: what both read, None for the text that comes along (random tokens without a tokenizer).
    length: positions compared, None for enough to wrap twice.  threads: of ONNX Runtime.
    loras: the adapters it was made with, and their scales.
    A failed gate is a report with `passed` False; ValidationError and others mean it could not run.
    """
    job = Job(folder, reference, out, text, length, seed, threads, tuple(loras))
    require_apart(out, folder)
    require_apart(out, reference)
    manifest = read_manifest(folder)
    require_runnable(folder, manifest)
    source = Checkpoint.open(reference, [Adapter.open(adapter, scale) for adapter, scale in loras])
    require_same_checkpoint(manifest, source)
    tokens = choose_tokens(job, manifest)
    require_memory(source, len(tokens.ids))
    with new_artifact(out, JSON_NAME) as partial:
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
    measured = {
        **table.measure(found.scenarios, found.pokes, failures=list(failures)),
        **measure_parts(layers=None, own=None, weights=None, ring=contract.ring),
    }
    left = table.undecided(limits, measured)
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
        undecided=left,
        weights=None,
        layers=None,
        own_precision=None,
        worst_cases=None,
        quality=measure_quality(found.scenarios, found.greedy),
        quantization=manifest.details.get("quantization"),
        notes=tuple(
            describe_failures(failures) + describe_limits(contract, length) + describe_undecided(left)
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
    plans = scenarios(contract, len(tokens.ids), weights=weights, seed=job.seed)
    with runnable(job, manifest) as open_artifact:
        generated, stopped = run_greedy(open_artifact(), tokens)
        expected, greedy = run_references(source, contract, tokens=tokens, generated=generated)
        cache = open_artifact()
        results = tuple(run_scenario(cache, plan, tokens=tokens, reference=expected) for plan in plans)
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
    length = default_length(contract) if job.length is None else check_length(job.length, contract)
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


def run_greedy(cache: RollingCache, tokens: Tokens) -> tuple[list[int], str | None]:
    """Let the artifact continue the beginning of the tokens. A call that raises ends it and is a finding."""
    prompt, count = split(len(tokens.ids))
    generated: list[int] = []
    with track("greedy", count, unit="tokens") as advance:
        try:
            for token in continue_greedily(cache, tokens.ids[:prompt], count):
                generated.append(token)
                advance(1)
        except MemoryError:
            raise
        except Exception as error:  # each backend raises classes of its own
            return generated, in_words(error)
    return generated, None


def run_scenario(
    cache: RollingCache, scenario: Scenario, *, tokens: Tokens, reference: Reference
) -> ScenarioResult:
    """Play a scenario and compare every position. A call that raises ends it and is a finding."""
    found, waiting, failure = [], Waiting(reference, tokens.targets), None
    with track(scenario.name, len(tokens.ids), unit="positions") as advance:
        try:
            for _, logits in play(cache, scenario, tokens=tokens.ids):
                found += waiting.add(logits)
                advance(len(logits))
        except MemoryError:
            raise
        except Exception as error:  # each backend raises classes of its own
            failure = in_words(error)
        found += waiting.compare()
    return ScenarioResult(scenario, concatenate(found), failure)


class Waiting:
    """Logits in order of position, gathered until there are enough to compare at once."""

    def __init__(self, reference: Reference, targets: np.ndarray) -> None:
        """targets: int64 [T], as `Tokens.targets`."""
        self._reference = reference
        self._targets = targets
        self._start = 0
        self._logits: list[np.ndarray] = []

    def add(self, logits: np.ndarray) -> list[LogitErrors]:
        """logits: [n, V], of the positions that follow.  Returns what was compared, if anything."""
        self._logits.append(logits)
        enough = sum(map(len, self._logits)) >= _COMPARED_AT_ONCE
        return self.compare() if enough else []

    def compare(self) -> list[LogitErrors]:
        """Compare what waits."""
        if not self._logits:
            return []
        artifact = np.concatenate(self._logits)
        stop = self._start + len(artifact)
        expected, targets = self._reference.logits(self._start, stop), self._targets[self._start : stop]
        errors = logit_errors(expected, artifact, targets=targets)
        self._start, self._logits = stop, []
        return [errors]


def run_pokes(cache: RollingCache, tokens: Tokens) -> tuple[list[PokeResult], str | None]:
    """Put the poke probe to the artifact. A call that raises ends it and is a finding."""
    asked = questions(cache.contract, len(tokens.ids))
    results: list[PokeResult] = []
    with track("poke", len(asked), unit="calls") as advance:
        try:
            for result in poke_probe(cache, asked, tokens=tokens.ids):
                _count_calls(results, result, advance)
                results.append(result)
        except MemoryError:
            raise
        except Exception as error:  # each backend raises classes of its own
            return results, in_words(error)
    return results, None


def _count_calls(results: Sequence[PokeResult], result: PokeResult, advance: Advance) -> None:
    if not results or results[-1].question != result.question:
        advance(1)


def in_words(error: Exception) -> str:
    """Class and message of an error; of a long message the beginning and the end."""
    text = " ".join(str(error).split())
    short = text if len(text) <= 240 else f"{text[:100]} … {text[-130:]}"
    return f"{type(error).__name__}: {short}"
