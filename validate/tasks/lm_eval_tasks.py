"""Names of lm-eval's multiple-choice tasks → items, put as lm-eval puts them: prompt, examples, delimiter."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from mistral_trt.errors import ValidationError
from mistral_trt.validate.tasks.items import MultipleChoice, Task

_FEWSHOT_SEED = 1234  # lm-eval's own


def lm_eval_tasks(names: Sequence[str], *, folder: Path | None, limit: int | None) -> list[Task]:
    """Load lm-eval's tasks.  folder: of task definitions beside its own.  limit: items of each.

    Raises ValidationError for a task that is unknown, no multiple choice, or has a context for each choice.
    """
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = sorted(set(names) - {*manager.all_tasks})
    if unknown:
        raise ValidationError(f"lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists what it has")
    return [_task(name, task, limit) for name, task in manager.load(list(names))["tasks"].items()]


def _task(name: str, task: Any, limit: int | None) -> Task:
    if task.OUTPUT_TYPE != "multiple_choice":
        raise ValidationError(
            f"{name} is not a multiple-choice task of lm-eval but {task.OUTPUT_TYPE}; run it with "
            "python -m mistral_trt.validate.tasks.lm_eval_adapter run --model mistral-trt, for each side"
        )
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    task.build_all_requests(limit=limit)
    asked: dict[int, list[Any]] = defaultdict(list)
    for instance in task.instances:
        asked[instance.doc_id].append(instance)
    return Task(name, tuple(_item(name, task, instances) for instances in asked.values()))


def _item(name: str, task: Any, instances: Sequence[Any]) -> MultipleChoice:
    doc = instances[0].doc
    words = task.doc_to_choice(doc)
    pairs = [instance.args for instance in instances[: len(words)]]  # mutual information asks for more
    contexts = {context for context, _ in pairs}
    if len(contexts) != 1 or len(pairs) != len(words):
        raise ValidationError(f"{name} has a context for each choice, which eval does not ask")
    target = task.doc_to_target(doc)
    answer = words.index(target) if isinstance(target, str) else target
    try:
        return MultipleChoice(contexts.pop(), tuple(choice for _, choice in pairs), answer)
    except ValueError as error:
        raise ValidationError(f"{name}, item {instances[0].doc_id + 1}: {error}") from error
