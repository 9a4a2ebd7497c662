"""A model → log-likelihoods of continuations and greedy completions: the artifact's, and the reference's.

Both sides answer the same two questions in token ids. The artifact carries its ring from call to call and
puts it back for each continuation of a context. The reference reads a whole text in one forward, without a
cache, for log-likelihoods; for completions it uses Hugging Face's own cache, as its generation does.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import DynamicCache, MistralForCausalLM

from mistral_trt.errors import ValidationError
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.validate.reference.hugging_face import Reference, run_reference

Ended = Callable[[Sequence[int]], bool]
"""Whether a completion is over, from its tokens so far (at least one)."""

_POSITIONS_AT_ONCE = 64


@dataclass(frozen=True)
class Score:
    """loglikelihood: of all tokens of a continuation, in nats.  greedy: whether each is the first choice."""

    loglikelihood: float
    greedy: bool


@dataclass(frozen=True)
class Completion:
    """tokens: each the first choice after those before it.  margins: its logit above the second's."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...]


class Side(Protocol):
    """One of the two that are compared."""

    def scores(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        """Score each continuation of a context. Neither may be empty."""
        ...

    def complete(self, prompt: Sequence[int], max_tokens: int, *, ended: Ended) -> Completion:
        """Continue a prompt greedily until `ended` or for max_tokens tokens; the last one is kept."""
        ...


class ArtifactSide:
    """The artifact over its rolling cache; one row is used."""

    def __init__(self, cache: RollingCache) -> None:
        self._cache = cache

    def scores(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        """As `Side.scores`; the context is run once, and its ring put back before each continuation."""
        row = self._cache.acquire()
        try:
            first = self._cache.append(row, context)  # [V]
            state = self._cache.snapshot(row) if any(len(tokens) > 1 for tokens in continuations) else None
            found = []
            for tokens in continuations:
                if state is not None and len(tokens) > 1:
                    self._cache.restore(row, state)
                found.append(score(self._logits(row, first, tokens), tokens))
            return found
        finally:
            self._cache.release(row)

    def complete(self, prompt: Sequence[int], max_tokens: int, *, ended: Ended) -> Completion:
        row = self._cache.acquire()
        try:
            logits = self._cache.append(row, prompt)
            return choose_greedily(
                logits, lambda token: self._cache.step({row: token})[row], max_tokens, ended
            )
        finally:
            self._cache.release(row)

    def _logits(self, row: int, first: np.ndarray, tokens: Sequence[int]) -> Iterator[np.ndarray]:
        """Logits before each token, in pieces [n, V].  first: [V], those before the first token."""
        yield first[None]
        for start in range(0, len(tokens) - 1, _POSITIONS_AT_ONCE):
            fed = tokens[start : min(start + _POSITIONS_AT_ONCE, len(tokens) - 1)]
            yield self._cache.append(row, fed, all_logits=True)


class ReferenceSide:
    """The checkpoint as `reference.load_model` gives it."""

    def __init__(self, model: MistralForCausalLM) -> None:
        self._model = model

    def scores(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        """As `Side.scores`; continuations of one token share a forward."""
        found: list[Score] = []
        fed: tuple[int, ...] = ()
        reference: Reference | None = None
        for tokens in continuations:
            if reference is None or fed != (*context, *tokens[:-1]):
                fed = (*context, *tokens[:-1])
                reference = run_reference(self._model, fed)
            found.append(score(in_pieces(reference, len(context) - 1, len(fed)), tokens))
        return found

    def complete(self, prompt: Sequence[int], max_tokens: int, *, ended: Ended) -> Completion:
        past = DynamicCache(config=self._model.config)

        def feed(tokens: Sequence[int]) -> np.ndarray:
            return self._last_logits(tokens, past)

        return choose_greedily(feed(prompt), lambda token: feed([token]), max_tokens, ended)

    def _last_logits(self, tokens: Sequence[int], past: DynamicCache) -> np.ndarray:
        """Logits after the last of the tokens, float32 [V]; the cache takes the tokens in."""
        with torch.inference_mode():
            body: Any = self._model.model
            hidden = body(input_ids=torch.tensor([list(tokens)]), past_key_values=past, use_cache=True)
            logits: np.ndarray = self._model.lm_head(hidden.last_hidden_state[0, -1]).numpy()
        if not np.isfinite(logits).all():
            raise ValidationError("the checkpoint itself gives NaN or infinity in float32; it proves nothing")
        return logits


def in_pieces(reference: Reference, start: int, stop: int) -> Iterator[np.ndarray]:
    """Logits of positions start…stop-1, float32 [n, V] at a time."""
    for first in range(start, stop, _POSITIONS_AT_ONCE):
        yield reference.logits(first, min(first + _POSITIONS_AT_ONCE, stop))


def score(pieces: Iterable[np.ndarray], tokens: Sequence[int]) -> Score:
    """Sum of log-softmax at the tokens, in float64.  pieces: float32 [n, V], all n together len(tokens)."""
    total, greedy, start = 0.0, True, 0
    for logits in pieces:
        targets = list(tokens[start : start + len(logits)])
        total += float(log_softmax(logits)[np.arange(len(targets)), targets].sum())
        greedy = greedy and bool((logits.argmax(axis=-1) == targets).all())
        start += len(logits)
    return Score(total, greedy)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 [n, V] -> float64 [n, V]."""
    shifted: np.ndarray = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    logs: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logs


def choose_greedily(
    logits: np.ndarray, feed: Callable[[int], np.ndarray], max_tokens: int, ended: Ended
) -> Completion:
    """The first choice, fed back for the logits of the next.  logits: [V], those after the prompt."""
    tokens: list[int] = []
    margins: list[float] = []
    while True:
        second, first = np.partition(logits, -2)[-2:]
        tokens.append(int(logits.argmax()))
        margins.append(float(first - second))
        if len(tokens) >= max_tokens or ended(tokens):
            return Completion(tuple(tokens), tuple(margins))
        logits = feed(tokens[-1])
