"""Task file → items: multiple-choice questions and completions, as text.

A `.jsonl` file holds one item a line and is named after itself. A `.toml` file says how to make items of long
recall (`long_recall.py`), whose length depends on the artifact's window. docs/eval.md describes both.
"""

import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mistral_trt.contract import Ring
from mistral_trt.errors import ValidationError
from mistral_trt.validate.tasks.items import Completion, Item, MultipleChoice, Task
from mistral_trt.validate.tasks.long_recall import Recall, recall_items

SETS = Path(__file__).with_name("sets")
"""The tasks that come along."""


def shipped_tasks() -> list[Path]:
    """The task files that come along, in the order of their names."""
    return sorted(path for path in SETS.iterdir() if path.suffix in (".jsonl", ".toml"))


def read_task(path: Path, *, ring: Ring, count_tokens: Callable[[str], int]) -> Task:
    """Read a task file.  ring, count_tokens: what items of long recall are measured by.

    Raises ValidationError naming the line and what was expected there.
    """
    try:
        data = path.read_bytes()
        text, sha256 = data.decode(), hashlib.sha256(data).hexdigest()
    except (OSError, UnicodeDecodeError) as error:
        raise ValidationError(f"{path} cannot be read as a UTF-8 task file: {error}") from error
    if path.suffix == ".jsonl":
        return Task(path.stem, tuple(_items(text.splitlines(), path)), sha256)
    if path.suffix == ".toml":
        recall = _recall(text, path)
        items = recall_items(recall, window=ring.sliding_window, count_tokens=count_tokens)
        return Task(path.stem, tuple(items), sha256)
    raise ValidationError(f"{path}: a task file ends in .jsonl (items) or .toml (long recall)")


def read_tasks(paths: Sequence[Path], *, ring: Ring, count_tokens: Callable[[str], int]) -> list[Task]:
    return [read_task(path, ring=ring, count_tokens=count_tokens) for path in paths]


def require_names_apart(tasks: Sequence[Task]) -> list[Task]:
    """The tasks. Raises ValidationError where two have one name: their figures could not be told apart."""
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ValidationError(f"two tasks are called {name!r}; rename one of the files")
    return list(tasks)


def _items(lines: Sequence[str], path: Path) -> list[Item]:
    items = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                items.append(_item(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ValidationError(f"{path}, line {number}: {error}") from error
    if not items:
        raise ValidationError(f"{path} holds no items; expected one JSON object a line")
    return items


def _item(found: object) -> Item:
    """Raises ValueError."""
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found {type(found).__name__}")
    for kind in (MultipleChoice, Completion):
        names = [field.name for field in fields(kind)]
        if set(found) == set(names):
            return kind(**{name: _frozen(found[name]) for name in names})
    raise ValueError(
        "expected the keys context, choices, answer (multiple choice) or prompt, answer, max_tokens "
        f"(completion), found {', '.join(sorted(found)) or 'none'}"
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _recall(text: str, path: Path) -> Recall:
    try:
        settings: Mapping[str, Any] = tomllib.loads(text)
        names = {field.name for field in fields(Recall)}
        if set(settings) != names:
            raise ValueError(f"expected the keys {', '.join(sorted(names))}, found {', '.join(settings)}")
        return Recall(**settings)
    except ValueError as error:  # TOMLDecodeError is one and names the line
        raise ValidationError(f"{path}: {error}") from error
