"""A seed and lengths in windows → texts that give passwords away and, much later, ask for one of them.

The passwords stand `distance` windows before the question and the text is `length` windows long, so the same
file asks what the window still shows, or what it has lost, of any model. A model that has lost it can only
guess; two models that are the same guess alike.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

from mistral_trt.validate.tasks.items import MultipleChoice

_PLACES = "red blue green white black yellow brown grey".split()
_WORDS = "apple river stone horse window garden silver winter paper bridge candle mirror forest ocean".split()
_WHO = "miller baker sailor teacher farmer doctor painter hunter weaver gardener".split()
_DID = "carried counted cleaned mended sold found borrowed painted washed wrapped".split()
_WHAT = "baskets ropes lamps chairs bottles hats boxes wheels coats plates".split()
_WHERE = "harbour market station school mill church library barn kitchen tower".split()


@dataclass(frozen=True)
class Recall:
    """How to make a task.

    items: how many.  choices: passwords given in each, 2…8.  length: of the context; distance: from the last
    password to the question; both in windows, at least that much.
    """

    items: int
    seed: int
    choices: int
    length: float
    distance: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kinds = getattr(self, field.name), (int,) if field.type is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                words = "a whole number" if field.type is int else "a number"
                raise ValueError(f"{field.name} must be {words}, found {value!r}")
        if self.items < 1 or not 2 <= self.choices <= len(_PLACES):
            raise ValueError(
                f"expected items of at least 1 and choices of 2…{len(_PLACES)}, "
                f"found {self.items} and {self.choices}"
            )
        if not 0 <= self.distance <= self.length <= 64:
            raise ValueError(
                f"expected 0 <= distance <= length <= 64 windows, found {self.distance} and {self.length}"
            )


def recall_items(
    recall: Recall, *, window: int, count_tokens: Callable[[str], int]
) -> Iterator[MultipleChoice]:
    """Yield the items, the same for the same seed, window and tokenizer.  window: W, in tokens."""
    for index in range(recall.items):
        yield _item(recall, random.Random(f"{recall.seed}-{index}"), window, count_tokens)


def _item(
    recall: Recall, draw: random.Random, window: int, count_tokens: Callable[[str], int]
) -> MultipleChoice:
    places = draw.sample(_PLACES, recall.choices)
    words = draw.sample(_WORDS, recall.choices)
    given = "".join(
        f" The password of the {place} house is {word}." for place, word in zip(places, words, strict=True)
    )
    answer = draw.randrange(recall.choices)
    question = f" Remember: the password of the {places[answer]} house is"
    after = _filler(draw, recall.distance * window - count_tokens(question), count_tokens)
    rest = recall.length * window - count_tokens(given + after + question)
    before = _filler(draw, rest, count_tokens)
    return MultipleChoice((before + given + after + question).lstrip(), tuple(f" {w}" for w in words), answer)


def _filler(draw: random.Random, tokens: float, count_tokens: Callable[[str], int]) -> str:
    """Sentences of at least so many tokens, about nothing that is asked."""
    text = ""
    while (missing := tokens - (count_tokens(text) if text else 0)) > 0:
        while missing > 0:
            sentence = (
                f" On day {draw.randint(1, 365)} the {draw.choice(_WHO)} {draw.choice(_DID)} "
                f"{draw.randint(2, 99)} {draw.choice(_WHAT)} at the {draw.choice(_WHERE)}."
            )
            text += sentence
            missing -= count_tokens(sentence)
    return text
