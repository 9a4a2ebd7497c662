"""The tokens of a sequence so far → its logits less repetition, presence and frequency penalties."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mistral_trt.errors import GenerationError
from mistral_trt.runtime.sampling.params import SamplingParams


class Penalties:
    """Counts of one sequence's tokens, and the penalties they bring.

    repetition: of a token in prompt or text, a logit > 0 is divided by the penalty and any other multiplied
    by it (CTRL, Keskar et al. 2019, arXiv:1909.05858, section 4.1, which divides; multiplying the negative
    ones, as Hugging Face's RepetitionPenaltyLogitsProcessor does, keeps it a penalty for them).
    presence, frequency: a token that is c > 0 times in the text, the prompt left out, loses
    presence + c * frequency (OpenAI's API reference, chat completions).

    Worked out in float64 and rounded to float32 once.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], size: int) -> None:
        """prompt: token ids, of which those >= size are passed over.

        Raises GenerationError for a negative id in the prompt.
        """
        self._repetition = params.repetition_penalty
        self._presence = params.presence_penalty
        self._frequency = params.frequency_penalty
        self._ids = np.empty(0, np.intp)
        if self._repetition != 1 and len(prompt):
            self._ids = np.unique(np.asarray(prompt, np.intp))
            if self._ids[0] < 0:
                raise GenerationError(f"expected token ids >= 0 in the prompt, found {self._ids[0]}")
            self._ids = self._ids[self._ids < size]
        self._counts = np.zeros(len(self._ids), np.float64)
        self._used = len(self._ids)
        self._place = {int(token): place for place, token in enumerate(self._ids)}

    @property
    def active(self) -> bool:
        return (self._repetition, self._presence, self._frequency) != (1, 0, 0)

    def add(self, token: int) -> None:
        """Count a token of the text."""
        place = self._place.setdefault(token, self._used)
        if place == self._used:
            if self._used == len(self._ids):
                self._ids = np.resize(self._ids, 2 * self._used + 64)
                self._counts = np.resize(self._counts, 2 * self._used + 64)
            self._ids[place], self._counts[place] = token, 0
            self._used += 1
        self._counts[place] += 1

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        """Take the penalties from logits [size], in place."""
        ids, counts = self._ids[: self._used], self._counts[: self._used]
        values = logits[ids].astype(np.float64)
        if self._repetition != 1:
            values = np.where(values > 0, values / self._repetition, values * self._repetition)
        values -= self._presence * (counts > 0) + self._frequency * counts
        logits[ids] = values
