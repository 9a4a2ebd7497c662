"""An opened artifact → what it gave in every scenario, to the poke probe and when left to itself.

A call that raises ends what it belongs to and is a finding of its own, except for want of memory.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mistral_trt.progress import Advance, track
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.validate.metrics import LogitErrors, by_position, concatenate, logit_errors
from mistral_trt.validate.reference.hugging_face import Reference
from mistral_trt.validate.scenarios.greedy import continue_greedily, split
from mistral_trt.validate.scenarios.poke import PokeResult, poke_probe, questions
from mistral_trt.validate.scenarios.scenario import Compared, Scenario, play
from mistral_trt.validate.scenarios.tokens import Tokens
from mistral_trt.validate.verdict.scenario_results import ScenarioResult
from mistral_trt.validate.worst_cases import FarPosition, far_positions, furthest

_COMPARED_AT_ONCE = 256


def run_greedy(cache: RollingCache, tokens: Tokens) -> tuple[list[int], str | None]:
    """Let the artifact continue the beginning of the tokens. A call that raises ends it and is a finding."""
    prompt, count = split(len(tokens.ids))
    generated: list[int] = []
    with track("greedy", count, unit="tokens") as advance:
        try:
            for token in continue_greedily(cache, tokens.ids[:prompt], count):
                generated.append(token)
                advance(1)
        except MemoryError:
            raise
        except Exception as error:  # each backend raises classes of its own
            return generated, in_words(error)
    return generated, None


@dataclass(frozen=True)
class Played:
    """What a scenario gave: a result for each reference, and where it is furthest from the first of them."""

    results: tuple[ScenarioResult, ...]
    worst: tuple[FarPosition, ...]


def run_scenario(
    cache: RollingCache, scenario: Scenario, *, tokens: Tokens, references: Sequence[Reference]
) -> Played:
    """Play a scenario and compare every position with each reference."""
    played = play(cache, scenario, tokens=tokens.ids)
    return compare_played(played, scenario, tokens=tokens, references=references)


def compare_played(
    played: Iterable[Compared], scenario: Scenario, *, tokens: Tokens, references: Sequence[Reference]
) -> Played:
    """Compare what a scenario gives, while it gives it.  played: positions and logits, call by call."""
    waiting, failure = Waiting(references, tokens.targets), None
    with track(scenario.name, scenario.compared, unit="positions") as advance:
        try:
            for positions, logits in played:
                waiting.add(positions, logits)
                advance(len(positions))
        except MemoryError:
            raise
        except Exception as error:  # each backend raises classes of its own
            failure = in_words(error)
    results = tuple(ScenarioResult(scenario, errors, failure) for errors in waiting.results())
    return Played(results, tuple(waiting.worst))


class Waiting:
    """Logits that are gathered until there are enough to compare at once, and what was found so far."""

    def __init__(self, references: Sequence[Reference], targets: np.ndarray) -> None:
        """targets: int64 [T], as `Tokens.targets`."""
        self._references = references
        self._targets = targets
        self._positions: list[np.ndarray] = []
        self._logits: list[np.ndarray] = []
        self._found: list[list[LogitErrors]] = [[] for _ in references]
        self.worst: list[FarPosition] = []

    def add(self, positions: np.ndarray, logits: np.ndarray) -> None:
        """positions: int64 [n].  logits: [n, V]."""
        self._positions.append(positions)
        self._logits.append(logits)
        if sum(map(len, self._positions)) >= _COMPARED_AT_ONCE:
            self._compare()

    def results(self) -> list[LogitErrors]:
        """For each reference every error, in order of position."""
        if self._positions:
            self._compare()
        return [by_position(concatenate(found)) for found in self._found]

    def _compare(self) -> None:
        positions, artifact = np.concatenate(self._positions), np.concatenate(self._logits)
        self._positions, self._logits = [], []
        targets = self._targets[positions]
        for i, (reference, found) in enumerate(zip(self._references, self._found, strict=True)):
            expected = reference.at(positions)
            found.append(logit_errors(expected, artifact, positions=positions, targets=targets))
            if i == 0:
                self.worst = furthest([*self.worst, *far_positions(found[-1], expected, artifact)])


def run_pokes(cache: RollingCache, tokens: Tokens) -> tuple[list[PokeResult], str | None]:
    """Put the poke probe to the artifact. A call that raises ends it and is a finding."""
    asked = questions(cache.contract, len(tokens.ids))
    results: list[PokeResult] = []
    with track("poke", len(asked), unit="calls") as advance:
        try:
            for result in poke_probe(cache, asked, tokens=tokens.ids):
                _count_calls(results, result, advance)
                results.append(result)
        except MemoryError:
            raise
        except Exception as error:  # each backend raises classes of its own
            return results, in_words(error)
    return results, None


def _count_calls(results: Sequence[PokeResult], result: PokeResult, advance: Advance) -> None:
    if not results or results[-1].question != result.question:
        advance(1)


def in_words(error: Exception) -> str:
    """Class and message of an error; of a long message the beginning and the end."""
    text = " ".join(str(error).split())
    short = text if len(text) <= 240 else f"{text[:100]} … {text[-130:]}"
    return f"{type(error).__name__}: {short}"
