"""Items → token ids that a side is asked with, and the side's answers.

A continuation is tokenized with its context, as lm-eval does: the whole is encoded, and what follows as many
tokens as the context has alone is the continuation. Blanks that end a context go to the continuation.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mistral_trt.errors import BackendError, NonFiniteLogitsError, ValidationError
from mistral_trt.validate.tasks.items import Completion, Item, MultipleChoice, Task
from mistral_trt.validate.tasks.sides import Side

Encode = Callable[[str], list[int]]
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Question:
    """An item in token ids.

    number: of the item in its task, from 1.  prompt: the context, or the text to complete.
    continuations: one a choice, none for a completion.
    """

    task: str
    number: int
    item: Item
    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...] = ()

    @property
    def length(self) -> int:
        """Positions that the longest text of the item takes."""
        new = self.item.max_tokens if isinstance(self.item, Completion) else max(map(len, self.continuations))
        return len(self.prompt) + new


@dataclass(frozen=True)
class ChoiceAnswer:
    """loglikelihoods: of each choice, in nats.  per_byte: the same over the choice's bytes of UTF-8."""

    loglikelihoods: tuple[float, ...]
    per_byte: tuple[float, ...]

    @property
    def choice(self) -> int:
        return self.loglikelihoods.index(max(self.loglikelihoods))

    @property
    def choice_per_byte(self) -> int:
        return self.per_byte.index(max(self.per_byte))


@dataclass(frozen=True)
class CompletionAnswer:
    """text: of the tokens, up to one that ends a text.  margins: as `sides.Completion`."""

    text: str
    tokens: tuple[int, ...]
    margins: tuple[float, ...]


@dataclass(frozen=True)
class NoAnswer:
    """The side failed: it gave NaN, or its backend raised."""

    why: str


Answer = ChoiceAnswer | CompletionAnswer | NoAnswer


def questions(task: Task, encode: Encode, *, limit: int | None) -> Iterator[Question]:
    """The first `limit` items of a task in token ids.

    Raises ValidationError for a choice that has no token of its own.
    """
    for number, item in enumerate(task.items[:limit], 1):
        if isinstance(item, Completion):
            yield Question(task.name, number, item, tuple(encode(item.prompt)))
            continue
        pairs = [encode_pair(encode, item.context, choice) for choice in item.choices]
        for choice, (_, continuation) in zip(item.choices, pairs, strict=True):
            if not continuation:
                raise ValidationError(
                    f"{task.name}, item {number}: the choice {choice!r} melts into the last token of its "
                    "context, so it cannot be scored; begin it with a blank or end the context earlier"
                )
        yield Question(task.name, number, item, pairs[0][0], tuple(pair[1] for pair in pairs))


def encode_pair(encode: Encode, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a context and of what follows it.

    "2 + 2 = ", "4" -> those of "2 + 2 =" and the rest of those of "2 + 2 = 4"
    """
    stripped = context.rstrip()
    before = encode(stripped)
    whole = encode(context + continuation)
    return tuple(before), tuple(whole[len(before) :])


def ask(side: Side, question: Question, *, decode: Decode, end_tokens: frozenset[int]) -> Answer:
    """Put a question to a side. A call that fails is an answer, too."""
    try:
        if isinstance(question.item, Completion):
            return _complete(side, question, question.item.max_tokens, decode=decode, end_tokens=end_tokens)
        return _choose(side, question, question.item)
    except (NonFiniteLogitsError, BackendError) as error:
        return NoAnswer(str(error))


def _choose(side: Side, question: Question, item: MultipleChoice) -> ChoiceAnswer:
    scores = side.scores(question.prompt, question.continuations)
    sums = tuple(score.loglikelihood for score in scores)
    sizes = [len(choice.encode()) for choice in item.choices]
    return ChoiceAnswer(sums, tuple(total / size for total, size in zip(sums, sizes, strict=True)))


def _complete(
    side: Side, question: Question, max_tokens: int, *, decode: Decode, end_tokens: frozenset[int]
) -> CompletionAnswer:
    found = side.complete(question.prompt, max_tokens, ended=lambda tokens: tokens[-1] in end_tokens)
    kept = found.tokens[:-1] if found.tokens[-1] in end_tokens else found.tokens
    return CompletionAnswer(decode(kept), found.tokens, found.margins)
