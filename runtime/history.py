"""A session's tokens so far, and what its next turn adds to them → the tokens to feed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mistral_trt.errors import GenerationError
from mistral_trt.runtime.rings.session_ring import SessionRing
from mistral_trt.runtime.text.chat import Message


@dataclass(eq=False)
class History:
    """What was asked and said, and the ring that holds the first `ring.position` tokens of it.

    messages: of a chat, without the latest answer, whose tokens start at `answer_start`.
    From a turn's begin to its end the scheduler's thread alone writes it; between two turns nobody does.
    """

    tokens: list[int] = field(default_factory=list)
    messages: tuple[Message, ...] | None = None
    answer_start: int = 0
    ring: SessionRing = field(default_factory=SessionRing)

    def forked(self, ring: SessionRing) -> "History":
        """The same, with another ring."""
        return History(list(self.tokens), self.messages, self.answer_start, ring)


@dataclass(frozen=True)
class Turn:
    """A request as a session's next turn.

    length: how many tokens the history had when the turn was made from them.  messages: of the chat, the new
    ones among them.  restart: the ring begins anew at position 0.
    """

    history: History
    length: int
    messages: tuple[Message, ...] | None = None
    restart: bool = False

    @property
    def ring(self) -> SessionRing:
        return self.history.ring

    def begin(self, prompt: Sequence[int]) -> Sequence[int]:
        """The turn has its row: what it asks is part of the history from now on.

        Returns the tokens to feed, known only now: the turn before may have ended since it was asked.
        """
        feed, history = self.to_feed(prompt), self.history
        history.tokens, history.messages, history.answer_start = list(prompt), self.messages, len(prompt)
        return feed

    def to_feed(self, prompt: Sequence[int]) -> Sequence[int]:
        """What the ring does not hold of a prompt. Raises GenerationError if that is nothing."""
        if len(prompt) <= self.ring.position:
            raise GenerationError("all tokens of this session are fed: go on with a prompt of at least one")
        return prompt[self.ring.position :]
