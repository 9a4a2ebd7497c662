"""Logits + a sequence's parameters and past → its next token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mistral_trt.errors import GenerationError
from mistral_trt.runtime.sampling.candidates import Truncation, Workspace, largest, uniform
from mistral_trt.runtime.sampling.constraint import Constraint
from mistral_trt.runtime.sampling.params import SamplingParams
from mistral_trt.runtime.sampling.penalties import Penalties
from mistral_trt.runtime.sampling.processors import run_processors

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability."""

    token: int
    logprob: float


@dataclass(frozen=True)
class Choice:
    """The next token.

    logprob, top: None unless asked for.  top: the most likely tokens, most likely first, of equal ones the
    lower id first; the chosen one is among them only if it is that likely.
    """

    token: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] | None = None


class Sampler:
    """Chooses the tokens of one sequence.

    The rules apply in this order:
    1. ids from tokenizer_size on are masked: no text has them
    2. the constraint's mask; end tokens are masked until it is complete, then they may come
    3. logit_bias is added
    4. repetition_penalty, then presence_penalty and frequency_penalty (`Penalties`)
    5. logits_processors, one after another; what 1 and 2 masked stays masked
    6. temperature 0 takes the largest logit, of equal ones the lowest id, and ends here; otherwise logits are
       divided by the temperature
    7. top_k keeps the k largest; of equal ones at the border the lower ids
    8. top_p keeps, of those, the fewest most likely whose probabilities sum to p or more (Holtzman et al.
       2020, arXiv:1904.09751)
    9. min_p keeps, of those, the ones with p >= min_p * p_max (Nguyen et al. 2024, arXiv:2407.01082)
    10. one is drawn, by a random number that depends on (seed, index, position) alone

    Log-probabilities are the log-softmax of the model's own logits after rule 1.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt: Sequence[int],
        vocab_size: int,
        tokenizer_size: int | None,
        seed: int,
        index: int = 0,
        end_tokens: frozenset[int],
        constraint: Constraint | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        """prompt: token ids.  vocab_size: V.  tokenizer_size: None masks nothing.  index: which of n texts.

        end_tokens: tokens that end the text.  workspace: of at least V, may be shared by the samplers of one
        thread; None makes one at the first need.
        Raises GenerationError for parameters that name tokens which cannot come.
        """
        self._params = params
        self._vocab_size = vocab_size
        self._size = min(tokenizer_size or vocab_size, vocab_size)
        self._seed, self._index = seed, index
        self._end_tokens = end_tokens
        self._ends = np.array(sorted(token for token in end_tokens if token < self._size), np.intp)
        self._constraint = constraint
        self._room = workspace
        self._check_ids()
        self._bias_ids = np.array(list(params.logit_bias), np.intp)
        self._biases = np.array(list(params.logit_bias.values()), np.float64)
        self._penalties = Penalties(params, prompt, self._size)
        self._tokens = list(prompt) if params.logits_processors else []
        self._truncation = Truncation(
            temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p
        )
        self._changes_logits = bool(
            constraint is not None or params.logit_bias or self._penalties.active or params.logits_processors
        )

    @property
    def finished(self) -> bool:
        """The constraint is complete and allows nothing more: the text ends here."""
        return self._constraint is not None and self._constraint.finished

    def choose(self, logits: Logits, position: int) -> Choice:
        """The token to stand at `position`, which is then counted as part of the text.

        logits: float32 [V], finite, left as they are.
        Raises GenerationError if they are not, or if no token is left to choose from. What a logits processor
        raises is passed on.
        """
        if logits.shape != (self._vocab_size,) or logits.dtype != np.float32:
            raise GenerationError(
                f"expected logits float32 [{self._vocab_size}], found {logits.dtype} {list(logits.shape)}"
            )
        known = logits[: self._size]
        token = self._pick(self._changed(known) if self._changes_logits else known, position)
        choice = self._described(token, known)
        self._add(token)
        return choice

    def _pick(self, logits: Logits, position: int) -> int:
        best = int(logits.argmax())  # of a NaN anywhere: the place of it
        self._check_best(float(logits[best]))
        if self._params.temperature == 0:
            return best
        found = self._truncation.candidates(logits, self._workspace())
        return found.draw(uniform(self._seed, self._index, position))

    def _changed(self, known: Logits) -> Logits:
        """Rules 2 to 5, on a copy."""
        logits = self._workspace().logits[: self._size]
        np.copyto(logits, known)
        masked = self._masked_ids()
        if masked is not None:
            np.copyto(logits, -np.inf, where=masked)
        if len(self._bias_ids):
            logits[self._bias_ids] = logits[self._bias_ids] + self._biases
        if self._penalties.active:
            self._penalties.apply(logits)
        if self._params.logits_processors:
            self._check_best(float(logits.max()))
            self._process(logits)
            if masked is not None:
                np.copyto(logits, -np.inf, where=masked)
        return logits

    def _masked_ids(self) -> npt.NDArray[np.bool_] | None:
        """What the constraint does not let through, bool [size]; None without one."""
        if self._constraint is None:
            return None
        masked = np.logical_not(self._constraint.mask()[: self._size])
        masked[self._ends] = not self._constraint.complete
        return masked

    def _process(self, logits: Logits) -> None:
        """Run the processors on all V logits and take over what they give for the first `size` of them."""
        current = np.full(self._vocab_size, -np.inf, np.float32)
        current[: self._size] = logits
        processed = run_processors(self._params.logits_processors, self._tokens, current)
        np.copyto(logits, processed[: self._size])

    def _described(self, token: int, known: Logits) -> Choice:
        """The choice with the log-probabilities that were asked for."""
        wanted = self._params.logprobs
        if wanted is None:
            return Choice(token)
        weights = self._workspace().weights[: self._size]
        np.copyto(weights, known)
        np.exp(np.subtract(weights, float(known.max()), out=weights), out=weights)
        log_sum = float(known.max()) + math.log(float(weights.sum()))
        if wanted == 0:
            return Choice(token, float(known[token]) - log_sum, ())
        ids = largest(known, wanted)
        ids = ids[np.argsort(-known[ids], kind="stable")]
        top = tuple(TokenLogprob(int(i), float(known[i]) - log_sum) for i in ids)
        return Choice(token, float(known[token]) - log_sum, top)

    def _add(self, token: int) -> None:
        if self._constraint is not None and token not in self._end_tokens:
            self._constraint.accept(token)
        if self._penalties.active:
            self._penalties.add(token)
        if self._params.logits_processors:
            self._tokens.append(token)

    def _workspace(self) -> Workspace:
        if self._room is None:
            self._room = Workspace(self._vocab_size)
        return self._room

    def _check_ids(self) -> None:
        named = {"logit_bias": self._params.logit_bias, "stop_token_ids": self._params.stop_token_ids}
        for name, ids in named.items():
            if max(ids, default=-1) >= self._size:
                raise GenerationError(
                    f"sampling: expected {name}: token ids below {self._size}, found {max(ids)}"
                )
        if (self._params.logprobs or 0) > self._size:
            raise GenerationError(
                f"sampling: expected logprobs <= {self._size}, the number of tokens, "
                f"found {self._params.logprobs}"
            )

    def _check_best(self, best: float) -> None:
        """best: the largest logit; NaN if there is one."""
        if math.isfinite(best):
            return
        if best != -math.inf:
            raise GenerationError(f"expected finite logits, found {best}")
        rules = [name for name in ("logit_bias", "logits_processors") if getattr(self._params, name)]
        rules += ["the constraint (json_schema or regex)"] if self._constraint is not None else []
        raise GenerationError(
            f"sampling: no token is left to choose from: all {self._size} are masked "
            f"by {' and '.join(rules) or 'the model'}"
        )
