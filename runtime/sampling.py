"""Logits → the next token.

The random number of a token depends on (seed, position) alone, so a request's text does not depend on
when it ran or on what ran beside it.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mistral_trt.errors import GenerationError
from mistral_trt.runtime.cache import Logits


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen, and when it ends.

    max_tokens: most tokens to produce.
    temperature: 0 takes the most likely token; otherwise logits are divided by it.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: of those, keep the fewest whose probabilities sum to at least p; 1 keeps all.
    seed: None draws one for the request.
    stop_token_ids: tokens that end the text, beside the model's own; they are not part of it.
    ignore_eos: do not end at the model's own end tokens.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(
            isinstance(self.max_tokens, int) and self.max_tokens >= 1, "max_tokens >= 1", self.max_tokens
        )
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0, "temperature >= 0", self.temperature
        )
        _require(isinstance(self.top_k, int) and self.top_k >= 0, "top_k >= 0", self.top_k)
        _require(0 < self.top_p <= 1, "0 < top_p <= 1", self.top_p)
        seeded = self.seed is None or (isinstance(self.seed, int) and 0 <= self.seed < 2**64)
        _require(seeded, "0 <= seed < 2**64", self.seed)


def sample(logits: Logits, params: SamplingParams, seed: int, position: int) -> int:
    """The token to stand at `position`.  logits: float32 [V], finite."""
    if params.temperature == 0:
        return int(np.argmax(logits))
    tokens, probabilities = candidates(logits, params)
    threshold = uniform(seed, position) * probabilities.sum()
    chosen = np.searchsorted(np.cumsum(probabilities), threshold, side="right")
    return int(tokens[min(chosen, len(tokens) - 1)])


def candidates(
    logits: Logits, params: SamplingParams
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Tokens that may be drawn, most likely first (ties: lower id first), and their probabilities.

    Probabilities are those after top_k, before top_p cut the tail: they need not sum to 1.
    """
    order = np.argsort(-logits, kind="stable")
    if params.top_k:
        order = order[: params.top_k]
    below = logits[order].astype(np.float64) - float(logits[order[0]])
    with np.errstate(over="ignore"):  # a tiny temperature: everything but the most likely goes to zero
        weights = np.exp(below / params.temperature)
    probabilities = weights / weights.sum()
    if params.top_p < 1:
        kept = int(np.searchsorted(np.cumsum(probabilities), params.top_p, side="left")) + 1
        order, probabilities = order[:kept], probabilities[:kept]
    return order, probabilities


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else (Philox, a counter-based generator)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _require(holds: bool, rule: str, found: object) -> None:
    if not holds:
        raise GenerationError(f"sampling: expected {rule}, found {found!r}")
