"""Logits that were computed step by step → a backend that gives them again for the same steps.

The driver that was recorded is run once more over it: how it puts the logits of its calls together, and what
it refuses, is then the same as over a whole artifact.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import numpy as np

from mistral_trt.contract import GraphContract
from mistral_trt.errors import ValidationError
from mistral_trt.runtime.backend import Logits, RingArray, Step
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.validate.layerwise.steps import Recording
from mistral_trt.validate.scenarios.scenario import Compared, Scenario, play


def record(contract: GraphContract, scenario: Scenario, *, tokens: Sequence[int]) -> Recording:
    """The steps of a scenario."""
    recording = Recording(contract)
    for _ in play(RollingCache(recording), scenario, tokens=tokens):
        pass
    return recording


def replay(
    recording: Recording, logits: Iterator[Logits], scenario: Scenario, *, tokens: Sequence[int]
) -> Iterator[Compared]:
    """What `play` yields of the scenario that was recorded.  logits: of each step [B, N, V], in order."""
    return play(RollingCache(Replay(recording, logits)), scenario, tokens=tokens)


class Replay:
    """A backend over a recording.  logits: of each step [B, N, V], in order, taken as they are needed."""

    def __init__(self, recording: Recording, logits: Iterator[Logits]) -> None:
        self.contract = recording.contract
        self._steps, self._logits = iter(recording.steps), logits

    @property
    def ready(self) -> bool:
        return True

    def warm_up(self, progress: Callable[[str, float], None] | None = None) -> None:
        """Nothing."""

    def run(self, step: Step) -> Logits:
        recorded = next(self._steps, None)
        if recorded is None or not _same(recorded, step):
            raise ValidationError("a replay is asked for another step than was recorded; record it anew")
        return next(self._logits)

    def read_row(self, row: int) -> tuple[RingArray, ...]:
        self._refuse()

    def write_row(self, row: int, rings: Sequence[RingArray] | None) -> None:
        if rings is not None:
            self._refuse()

    def copy_row(self, source: int, target: int) -> None:
        self._refuse()

    def close(self) -> None:
        """Nothing."""

    def _refuse(self) -> NoReturn:
        raise ValidationError("a replay has no rings; run the whole artifact for snapshots and forks")


def _same(a: Step, b: Step) -> bool:
    pairs = (
        (a.input_ids, b.input_ids),
        (a.position_ids, b.position_ids),
        (a.logits_index, b.logits_index),
    )
    return a.first_row == b.first_row and all(np.array_equal(one, other) for one, other in pairs)
