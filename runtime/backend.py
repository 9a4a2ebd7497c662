"""Tokens of a call → logits: what whatever runs the graph has to do for the rolling cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mistral_trt.contract import GraphContract

Tokens = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
RingArray = npt.NDArray[Any]

Progress = Callable[[str, float], None]
"""Called with what is being done and which share of it is done, 0 to 1."""


@dataclass(frozen=True)
class Step:
    """One call of the graph over rows first_row … first_row + B - 1.

    input_ids, position_ids: int64 [B, S].  logits_index: int64 [B, N], which of the S get logits.
    The arrays are the caller's, who may fill them anew once the call has returned.
    """

    input_ids: Tokens
    position_ids: Tokens
    logits_index: Tokens
    first_row: int


class Backend(Protocol):
    """Runs the graph; owns the rings [max_batch_size, K, R, D], zeroed when allocated.

    One thread calls it at a time. A method that fails raises BackendError; with `fatal` nothing can be run
    any more, otherwise a step that failed has touched only the slots that it was to write.
    """

    @property
    def contract(self) -> GraphContract: ...

    @property
    def ready(self) -> bool:
        """Whether every shape that serving repeats has been run, and nothing has failed for good."""

    def warm_up(self, progress: Progress | None = None) -> None:
        """Run those shapes, before the first sequence."""

    def run(self, step: Step) -> Logits:
        """Run one step and update the rings of its rows in place.

        Returns float32 [B, N, V], which may lie in memory that the next call overwrites.
        """

    def read_row(self, row: int) -> tuple[RingArray, ...]:
        """Copies of one row's rings, keys and values of layer 0, then layer 1, …: [K, R, D] each."""

    def write_row(self, row: int, rings: Sequence[RingArray] | None) -> None:
        """Overwrite one row's rings; None zeroes them."""

    def copy_row(self, source: int, target: int) -> None:
        """Overwrite the rings of row `target` with those of row `source`."""

    def close(self) -> None:
        """Give memory back. Nothing may be called afterwards but `close`, which then does nothing."""
