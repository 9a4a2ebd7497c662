"""What a task asks: multiple-choice questions and completions, as text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MultipleChoice:
    """Which of `choices` follows `context`; `answer` is the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        _require(_is_text(self.context), "context must be a text with more than blanks", self.context)
        whole = isinstance(self.choices, tuple) and all(isinstance(one, str) and one for one in self.choices)
        _require(whole and len(set(self.choices)) == len(self.choices) >= 2,
                 "choices must be two or more texts, no two alike and none empty", self.choices)  # fmt: skip
        _require(_is_count(self.answer) and self.answer < len(self.choices),
                 f"answer must be an index of choices, 0…{len(self.choices) - 1}", self.answer)  # fmt: skip


@dataclass(frozen=True)
class Completion:
    """A prompt whose greedy completion of max_tokens tokens should begin with `answer`."""

    prompt: str
    answer: str
    max_tokens: int

    def __post_init__(self) -> None:
        _require(_is_text(self.prompt), "prompt must be a text with more than blanks", self.prompt)
        _require(_is_text(self.answer), "answer must be a text with more than blanks", self.answer)
        _require(_is_count(self.max_tokens) and self.max_tokens >= 1,
                 "max_tokens must be a whole number of at least 1", self.max_tokens)  # fmt: skip


Item = MultipleChoice | Completion


@dataclass(frozen=True)
class Task:
    """Items under one name.  sha256: of the file they came from, None for those of lm-eval."""

    name: str
    items: tuple[Item, ...]
    sha256: str | None = None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(holds: bool, expected: str, found: object) -> None:
    if not holds:
        raise ValueError(f"{expected}; found {found!r}")
