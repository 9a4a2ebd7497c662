"""What a rolling cache asks of its backend → a list of it, to be computed later, layer by layer.

A driver (`probes.play`, or any other) is given a `RollingCache` over a `Recording`. How it splits chunks at
their edges, pads them and lets rows idle is then the runtime's own doing; only the numbers are not there yet.

T tokens of a sequence   B rows of a step   S tokens of a row   R slots
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from mistral_trt.contract import GraphContract, Ring
from mistral_trt.errors import ValidationError
from mistral_trt.runtime.backend import Logits, RingArray, Step

Array = npt.NDArray[Any]
Hidden = list[Array]
"""A state for each step of a recording: [B, S, …]."""


@dataclass(frozen=True)
class ZeroedRow:
    """A row's rings were zeroed between two steps."""

    row: int


class Recording:
    """A backend that computes nothing and keeps what was asked of it.  Its logits are all 0."""

    def __init__(self, contract: GraphContract) -> None:
        self.contract = contract
        self.events: list[Step | ZeroedRow] = []
        """Everything, in order."""

    @property
    def steps(self) -> list[Step]:
        return [event for event in self.events if isinstance(event, Step)]

    @property
    def rows(self) -> int:
        """How many rows the steps touch, from row 0."""
        return max((step.first_row + len(step.input_ids) for step in self.steps), default=0)

    @property
    def ready(self) -> bool:
        return True

    def warm_up(self, progress: Callable[[str, float], None] | None = None) -> None:
        """Nothing."""

    def run(self, step: Step) -> Logits:
        arrays = (step.input_ids.copy(), step.position_ids.copy(), step.logits_index.copy())
        self.events.append(Step(*arrays, step.first_row))
        shape = (*step.logits_index.shape, self.contract.config.vocab_size)
        return np.broadcast_to(np.float32(0), shape)

    def read_row(self, row: int) -> tuple[RingArray, ...]:
        self._refuse(f"row {row} cannot be read")

    def write_row(self, row: int, rings: Sequence[RingArray] | None) -> None:
        if rings is not None:
            self._refuse(f"rings cannot be put into row {row}")
        self.events.append(ZeroedRow(row))

    def copy_row(self, source: int, target: int) -> None:
        self._refuse(f"row {source} cannot be copied to row {target}")

    def close(self) -> None:
        """Nothing."""

    def _refuse(self, what: str) -> NoReturn:
        raise ValidationError(
            f"{what}: a recording computes nothing, so it has no rings; feed it without snapshots or forks, "
            "or run the whole artifact"
        )


def gather(recording: Recording, states: Sequence[Array], length: int, *, row: int = 0) -> Array:
    """What the steps made of positions 0…length-1 of a row, [length, …]; of a position that was fed twice
    (as padding, or while the row idled) the later one.

    states: for each step [B, S, …].  Raises ValidationError if a position was not fed.
    """
    found = np.zeros((length, *states[0].shape[2:]), states[0].dtype)
    fed = np.zeros(length, bool)
    for step, state in zip(recording.steps, states, strict=True):
        place = row - step.first_row
        if 0 <= place < len(step.position_ids):
            inside = step.position_ids[place] < length
            positions = step.position_ids[place][inside]
            found[positions] = state[place][inside]
            fed[positions] = True
    if not fed.all():
        raise ValidationError(
            f"expected a recording that feeds positions 0…{length - 1} to row {row}; "
            f"position {int(np.argmin(fed))} was not fed"
        )
    return found


def scatter(recording: Recording, states: Array) -> Hidden:
    """The inverse: states [T, …] of one sequence → for each step [B, S, …].

    What pads a step past the last position is given that position's state: nothing sees it.
    """
    last = len(states) - 1
    return [states[np.minimum(step.position_ids, last)] for step in recording.steps]


def held_positions(recording: Recording, ring: Ring, *, row: int = 0) -> npt.NDArray[np.int64]:
    """Which position each slot of a row must hold after the last step, int64 [R]; -1 for none.

    W=8, C=4 (R=12), 14 tokens: 12 13 2 3 … 11.
    """
    held = np.full(ring.capacity, -1)
    for event in recording.events:
        if isinstance(event, ZeroedRow):
            if event.row == row:
                held[:] = -1
        elif 0 <= row - event.first_row < len(event.position_ids):
            positions = event.position_ids[row - event.first_row]
            held[positions % ring.capacity] = positions
    return held
