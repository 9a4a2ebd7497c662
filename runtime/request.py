"""A prompt and its parameters → a request in flight: what was asked, and how far each sample of it is."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mistral_trt.contract import POSITION_ACCURATE_LIMIT, POSITION_LIMIT, GraphContract
from mistral_trt.errors import GenerationError
from mistral_trt.runtime.backend import Logits
from mistral_trt.runtime.history import Turn
from mistral_trt.runtime.sampling.params import SamplingParams
from mistral_trt.runtime.sampling.sampler import Choice, Sampler, TokenLogprob
from mistral_trt.runtime.text.text_stream import TextStream

FinishReason = Literal["stop", "length", "context", "cancelled", "error"]
"""stop: an end token, a stop string, or a constraint that allows nothing more.  length: max_tokens.
context: the last position was reached.  cancelled: by the caller, or the engine was closed.  error: the
request failed, and its stream raises why."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A bit of streamed text; the last one of a sample has a finish_reason and no token.

    text: may be empty while a character or a stop string is incomplete.  logprob, top_logprobs: of `token`,
    where they were asked for.  index: which of the n samples.
    """

    text: str
    token: int | None
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] | None = None
    index: int = 0


@dataclass(frozen=True)
class Output:
    """A finished text.

    tokens: those generated, without the end token that ended the text; a stop string's are among them and
    its text is not in `text`.  logprobs: for each token, where they were asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[Choice, ...] | None = None
    index: int = 0


Delivery = Piece | Exception | None
"""What a consumer gets: a piece, why the request failed, or None at the very end."""

Deliver = Callable[[Delivery], object]


@dataclass(frozen=True)
class Request:
    """What was asked, checked.

    prompt: the tokens before the first new one, a session's history included.  end_tokens: those that end
    the text.  allow_long: go past position 2**20.
    """

    prompt: Sequence[int]
    params: SamplingParams
    end_tokens: frozenset[int]
    seed: int
    allow_long: bool = False

    def check(self, contract: GraphContract) -> None:
        """Raise GenerationError if this artifact cannot serve it."""
        if not self.prompt:
            raise GenerationError("expected a prompt of at least one token, found an empty one")
        low, high, size = min(self.prompt), max(self.prompt), contract.config.vocab_size
        if low < 0 or high >= size:
            raise GenerationError(
                f"the prompt's token ids must lie in 0…{size - 1}, found {low if low < 0 else high}"
            )
        if reason := contract.check_position(len(self.prompt), allow_long=self.allow_long):
            raise GenerationError(f"the prompt has {len(self.prompt)} tokens, the first new one: {reason}")
        if self.params.n > contract.max_batch_size:
            raise GenerationError(
                f"n={self.params.n} samples need as many rows, and this artifact has "
                f"{contract.max_batch_size} (max_batch_size); ask for fewer, or export with a larger "
                "--max-batch-size"
            )

    def end_position(self, contract: GraphContract) -> int:
        """The first position where no token may stand."""
        limit = POSITION_LIMIT if self.allow_long else POSITION_ACCURATE_LIMIT
        return limit if contract.max_context is None else min(limit, contract.max_context)


class Sample:
    """One of a request's n texts, from its first token to its last.

    position: where its next token will stand.  row: of the rings, -1 while it has none.  finished: why its
    text ends, as soon as that is known.  ended: it has given back what it took.
    """

    __slots__ = (
        "_end_position", "_params", "_sampler", "_text", "ended", "finished", "index", "job", "last_token",
        "position", "produced", "row", "time",
    )  # fmt: skip

    def __init__(self, job: "Job", index: int, sampler: Sampler, text: TextStream | None) -> None:
        self.job, self.index = job, index
        self._sampler, self._text = sampler, text
        self._params = job.request.params
        self._end_position = job.end_position
        self.position, self.row = len(job.request.prompt), -1
        self.produced = 0
        self.last_token = -1
        self.time = 0.0
        self.finished: FinishReason | None = None
        self.ended = False

    def accept(self, logits: Logits) -> Piece | None:
        """Choose the next token; `finished` then says whether it was the last.  logits: float32 [V].

        Returns its piece, or None for an end token. Raises what a logits processor raises.
        """
        choice = self._sampler.choose(logits, self.position)
        token = choice.token
        if token in self.job.request.end_tokens:
            self.finished = "stop"
            return None
        text = "" if self._text is None else self._text.push(token)
        self.position += 1
        self.produced += 1
        self.last_token = token
        self.finished = self._reached()
        return Piece(text, token, None, choice.logprob, choice.top, self.index)

    def ending(self, reason: FinishReason) -> Piece:
        """The last piece: what was held back, and why the text ends."""
        self.finished = reason
        held = "" if self._text is None else self._text.finish()
        return Piece(held, None, reason, index=self.index)

    def _reached(self) -> FinishReason | None:
        if self._sampler.finished or (self._text is not None and self._text.stopped is not None):
            return "stop"
        if self.produced >= self._params.max_tokens:
            return "length"
        return "context" if self.position >= self._end_position else None


class Job:
    """A request in flight.

    turn: of the session that asked.  samples: its n texts.  feed: the tokens to prefill, `fed` of which are.
    deliver: takes its pieces, on the scheduler's thread; it must not block.  done: set just before the last
    piece is delivered.  submitted: when it was queued.
    """

    def __init__(self, request: Request, contract: GraphContract, turn: Turn | None = None) -> None:
        self.request, self.turn = request, turn
        self.end_position = request.end_position(contract)
        self.samples: list[Sample] = []
        self.feed: Sequence[int] = request.prompt
        self.fed = 0
        self.deliver: Deliver = _nowhere
        self.cancelled = False
        self.done = threading.Event()
        self.submitted = 0.0

    @property
    def rows(self) -> int:
        """How many rows it needs."""
        return self.request.params.n

    def running(self) -> list[Sample]:
        """The samples that have not ended."""
        return [sample for sample in self.samples if not sample.ended]


def _nowhere(item: Delivery) -> None:
    """Before a consumer is known."""
