"""Artifact + checkpoint + task files → `eval.json`: the one public function, in the order of the work.

The artifact answers everything first and is closed, then the reference is loaded and answers the same: the
two are never in memory together.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mistral_trt.artifact import new_artifact, require_apart
from mistral_trt.errors import ValidationError, require
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.lora import Adapter
from mistral_trt.manifest import Manifest, read_manifest
from mistral_trt.progress import note, track
from mistral_trt.runtime.loading import require_used
from mistral_trt.runtime.text.tokenizer import Tokenizer
from mistral_trt.validate.opening import openable
from mistral_trt.validate.provenance import describe_run
from mistral_trt.validate.reference.hugging_face import load_model, require_same_checkpoint
from mistral_trt.validate.reference.memory import require_memory
from mistral_trt.validate.tasks.agreement import Outcome
from mistral_trt.validate.tasks.answers import Answer, Question, ask, questions
from mistral_trt.validate.tasks.items import Task
from mistral_trt.validate.tasks.record import EVAL_NAME, Evaluation, Skipped, write_evaluation
from mistral_trt.validate.tasks.sides import ArtifactSide, ReferenceSide, Side
from mistral_trt.validate.tasks.task_file import read_tasks, require_names_apart, shipped_tasks


@dataclass(frozen=True)
class Job:
    """What was asked for.

    tasks, lm_eval: task files, and names of lm-eval's multiple-choice tasks; with neither, the files that
    come along.  lm_eval_path: a folder of task definitions for lm-eval.  limit: items of each task.
    length: tokens; longer items are left out and named.  threads: of ONNX Runtime.  loras: the adapters the
    artifact was made with, and their scales.  command: the command line, for the record.
    """

    folder: Path
    reference: Path
    out: Path
    tasks: Sequence[Path] = ()
    lm_eval: Sequence[str] = ()
    lm_eval_path: Path | None = None
    limit: int | None = None
    length: int | None = None
    threads: int | None = None
    loras: Sequence[tuple[Path, float]] = ()
    command: str = ""

    def __post_init__(self) -> None:
        for name in ("limit", "length", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValidationError(f"--{name} must be at least 1, found {value}")


@dataclass(frozen=True)
class Asked:
    """What is put to both sides.  end_tokens: those that end a text."""

    tokenizer: Tokenizer
    tasks: tuple[Task, ...]
    end_tokens: frozenset[int]
    questions: tuple[Question, ...]
    skipped: tuple[Skipped, ...]


def evaluate_artifact(job: Job) -> Evaluation:
    """Ask the artifact and its checkpoint the same, and write eval.json to `job.out`.

    Raises ValidationError and others where it could not run; that the sides differ is no error.
    """
    require_used(job.folder, threads=job.threads, provider="auto", cache_dir=None)
    require_apart(job.out, job.folder)
    require_apart(job.out, job.reference)
    started, clock = datetime.now(UTC), time.monotonic()
    manifest = read_manifest(job.folder)
    source = Checkpoint.open(job.reference, [Adapter.open(adapter, scale) for adapter, scale in job.loras])
    require_same_checkpoint(manifest, source)
    asked = prepare(job, manifest)
    require_memory(source, max(question.length for question in asked.questions))
    with new_artifact(job.out, EVAL_NAME) as partial:
        outcomes = answer(job, manifest, source=source, asked=asked)
        evaluation = Evaluation(
            folder=job.folder,
            manifest=manifest,
            source=source,
            tasks=asked.tasks,
            outcomes=tuple(outcomes),
            skipped=asked.skipped,
            run=describe_run(job.command, 0, started=started, seconds=time.monotonic() - clock),
        )
        write_evaluation(evaluation, partial)
    return evaluation


def prepare(job: Job, manifest: Manifest) -> Asked:
    """Read and tokenize the tasks. Raises ValidationError, also if nothing is left to ask."""
    tokenizer = Tokenizer.from_folder(job.folder)
    paths = job.tasks or ([] if job.lm_eval else shipped_tasks())
    others = lm_eval_tasks(job.lm_eval, folder=job.lm_eval_path, limit=job.limit) if job.lm_eval else []
    empty, ring = len(tokenizer.encode("")), manifest.contract.ring
    read = read_tasks(paths, ring=ring, count_tokens=lambda text: len(tokenizer.encode(text)) - empty)
    tasks = require_names_apart([*read, *others])
    kept, skipped = [], []
    for question in (one for task in tasks for one in questions(task, tokenizer.encode, limit=job.limit)):
        if why := _out_of_reach(question, manifest, job.length):
            skipped.append(Skipped(question.task, question.number, question.length, why))
        else:
            kept.append(question)
    if not kept:
        raise ValidationError(f"no item is left to ask; the first was left out because {skipped[0].why}")
    end_tokens = frozenset(manifest.details.get("generation", {}).get("eos_token_ids", ()))
    return Asked(tokenizer, tuple(tasks), end_tokens, tuple(kept), tuple(skipped))


def lm_eval_tasks(names: Sequence[str], *, folder: Path | None, limit: int | None) -> list[Task]:
    """As `lm_eval_tasks.lm_eval_tasks`. Raises MissingDependencyError where lm-eval is not installed."""
    module: Any = require("mistral_trt.validate.tasks.lm_eval_tasks", "lm-eval")
    tasks: list[Task] = module.lm_eval_tasks(names, folder=folder, limit=limit)
    return tasks


def _out_of_reach(question: Question, manifest: Manifest, length: int | None) -> str | None:
    if length is not None and question.length > length:
        return f"it takes {question.length} tokens, more than --length {length}"
    return manifest.contract.check_position(question.length - 1)


def answer(job: Job, manifest: Manifest, *, source: Checkpoint, asked: Asked) -> Iterator[Outcome]:
    """Let the artifact answer everything, then the reference; pair the answers."""
    with openable(job.folder, manifest, threads=job.threads) as open_artifact:
        cache = open_artifact()
        found = answers(ArtifactSide(cache), asked, title="artifact")
        cache.close()
    del cache
    note("reference: MistralForCausalLM, float32, eager attention")
    model = load_model(source, sliding_window=manifest.contract.ring.sliding_window)
    expected = answers(ReferenceSide(model), asked, title="reference")
    for question, first, second in zip(asked.questions, expected, found, strict=True):
        yield Outcome(question, reference=first, artifact=second)


def answers(side: Side, asked: Asked, *, title: str) -> list[Answer]:
    """What a side answers to each question."""
    found = []
    with track(title, len(asked.questions), unit="items") as advance:
        for question in asked.questions:
            found.append(ask(side, question, decode=asked.tokenizer.decode, end_tokens=asked.end_tokens))
            advance(1)
    return found
