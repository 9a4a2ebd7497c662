"""An evaluation → `eval.json` for machines and a short table for people. docs/eval.md describes both."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mistral_trt.artifact import write_file
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.manifest import Manifest
from mistral_trt.validate.provenance import describe_artifact, describe_execution, describe_reference
from mistral_trt.validate.tasks.agreement import Agreement, Outcome, Share, agreement, is_right
from mistral_trt.validate.tasks.answers import Answer, ChoiceAnswer, NoAnswer
from mistral_trt.validate.tasks.items import Task

FORMAT_VERSION = 1
EVAL_NAME = "eval.json"

_COLUMNS = ("task", "items", "agree", "95 %", "checkpoint", "artifact", "only c./a.", "largest difference")


@dataclass(frozen=True)
class Skipped:
    """An item that was not asked.  tokens: it takes.  why: in words."""

    task: str
    number: int
    tokens: int
    why: str


@dataclass(frozen=True)
class Evaluation:
    """Everything an evaluation found."""

    folder: Path
    manifest: Manifest
    source: Checkpoint
    tasks: tuple[Task, ...]
    outcomes: tuple[Outcome, ...]
    skipped: tuple[Skipped, ...]
    run: Mapping[str, Any]

    @property
    def overall(self) -> Agreement:
        return agreement(self.outcomes)

    @property
    def by_task(self) -> dict[str, Agreement]:
        """Figures of each task of which an item was asked."""
        parts = {
            task.name: [one for one in self.outcomes if one.question.task == task.name] for task in self.tasks
        }
        return {name: agreement(part) for name, part in parts.items() if part}

    def to_json(self) -> dict[str, Any]:
        contract, by_task = self.manifest.contract, self.by_task
        return {
            "format_version": FORMAT_VERSION,
            "files": [],
            "artifact": describe_artifact(self.folder, self.manifest),
            "reference": {
                **describe_reference(self.source, contract),
                "completions": "token by token with Hugging Face's own cache",
            },
            "executed": (
                "The TensorRT engine ran on its GPU."
                if self.manifest.stage == "engine"
                else describe_execution(contract)
            ),
            "overall": agreement_json(self.overall),
            "tasks": [
                {"name": task.name, "sha256": task.sha256, **agreement_json(by_task[task.name])}
                for task in self.tasks
                if task.name in by_task
            ],
            "items": [outcome_json(outcome) for outcome in self.outcomes],
            "skipped": [asdict(item) for item in self.skipped],
            "run": dict(self.run),
        }


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write eval.json into a folder."""
    text = json.dumps(evaluation.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    write_file(folder / EVAL_NAME, f"{text}\n".encode())


def table(evaluation: Evaluation) -> list[str]:
    """The figures of each task and of all together, a line each, below a line of titles."""
    by_task = evaluation.by_task
    rows = [_COLUMNS, *(_row(name, found) for name, found in by_task.items())]
    if len(by_task) > 1:
        rows.append(_row("all", evaluation.overall))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _row(name: str, found: Agreement) -> tuple[str, ...]:
    low, high = found.same.interval
    difference = found.loglikelihood_difference
    return (
        name,
        str(found.same.total),
        f"{found.same.value:.1%}",
        f"{low:.1%} … {high:.1%}",
        f"{found.reference.value:.1%}",
        f"{found.artifact.value:.1%}",
        f"{found.only_reference}/{found.only_artifact}",
        "" if difference is None else f"{difference[1]:.2g} nats",
    )


def agreement_json(found: Agreement) -> dict[str, Any]:
    values = {name: getattr(found, name) for name in found.__dataclass_fields__}
    return {
        name: share_json(value) if isinstance(value, Share) else _pair_json(name, value)
        for name, value in values.items()
    }


def share_json(found: Share) -> dict[str, Any]:
    """count, total, value, and interval: Wilson's at 95 %."""
    return {
        "count": found.count,
        "total": found.total,
        "value": found.value,
        "interval": list(found.interval),
    }


def _pair_json(name: str, value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    second = {"loglikelihood_difference": "max", "rank_correlation": "min"}[name]
    return {"mean": value[0], second: value[1]}


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    question = outcome.question
    return {
        "task": question.task,
        "number": question.number,
        "tokens": question.length,
        "same": outcome.same,
        "loglikelihood_difference": outcome.loglikelihood_difference,
        "rank_correlation": outcome.rank_correlation,
        "diverged": outcome.diverged,
        "reference": {"right": is_right(question, outcome.reference), **answer_json(outcome.reference)},
        "artifact": {"right": is_right(question, outcome.artifact), **answer_json(outcome.artifact)},
    }


def answer_json(answer: Answer) -> dict[str, Any]:
    if isinstance(answer, NoAnswer):
        return {"failed": answer.why}
    if isinstance(answer, ChoiceAnswer):
        return {
            "choice": answer.choice,
            "choice_per_byte": answer.choice_per_byte,
            "loglikelihoods": list(answer.loglikelihoods),
        }
    return {"text": answer.text, "tokens": list(answer.tokens), "margins": list(answer.margins)}


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    """In words, what an artifact could not answer."""
    return [
        f"{one.question.task}, item {one.question.number}: the artifact failed: {one.artifact.why}"
        for one in outcomes
        if isinstance(one.artifact, NoAnswer)
    ]
