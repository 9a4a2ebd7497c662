"""Tokens of each row → logits, with every row's ring and position kept between calls.

This is the one place that holds state. A sequence owns one row of the rings from its first token to its
last; which slot a token lands in follows from its position alone (`contract.Ring`). Everything a backend
has to do is run one step on buffers it owns.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mistral_trt.contract import GraphContract
from mistral_trt.errors import GenerationError, NonFiniteLogitsError

Tokens = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
RingArray = npt.NDArray[Any]


@dataclass(frozen=True)
class Step:
    """One call of the graph over rows first_row … first_row + B - 1.

    input_ids, position_ids: int64 [B, S].  logits_index: int64 [B, N], which of the S get logits.
    """

    input_ids: Tokens
    position_ids: Tokens
    logits_index: Tokens
    first_row: int


class Backend(Protocol):
    """Runs the graph; owns the rings [max_batch_size, K, R, D], zeroed when allocated."""

    @property
    def contract(self) -> GraphContract: ...

    def run(self, step: Step) -> Logits:
        """Run one step and update the rings of its rows in place.  Returns float32 [B, N, V]."""

    def read_row(self, row: int) -> tuple[RingArray, ...]:
        """Copies of one row's rings, keys and values of layer 0, then layer 1, …: [K, R, D] each."""

    def write_row(self, row: int, rings: Sequence[RingArray] | None) -> None:
        """Overwrite one row's rings; None zeroes them."""


@dataclass(frozen=True)
class RowSnapshot:
    """One sequence's state: its next position and its rings ([K, R, D] each, order of `past()`)."""

    position: int
    rings: tuple[RingArray, ...]


class RollingCache:
    """Rows of ring buffers over a backend.

    Each row belongs to whoever acquired it. Threads may use different rows at once: calls of the graph
    take turns, and between two of them every row is whole.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.contract = backend.contract
        self._positions: dict[int, int] = {}
        self._poisoned: set[int] = set()  # produced NaN or infinity: the sequence has failed
        self._tainted: set[int] = set()  # did so while idle: its next token overwrites the slot
        self._turn = threading.Condition()

    @property
    def capacity_rows(self) -> int:
        return self.contract.max_batch_size

    @property
    def free_rows(self) -> int:
        return self.capacity_rows - len(self._positions)

    def acquire(self) -> int:
        """Give a new sequence the lowest free row. Raises GenerationError if none is free."""
        return self.acquire_rows(1)[0]

    def acquire_rows(self, count: int, *, timeout_s: float = 0.0) -> list[int]:
        """Give `count` new sequences the lowest free rows, all or none, waiting up to timeout_s for them.

        Raises GenerationError if they do not come free.
        """
        with self._turn:
            if not self._turn.wait_for(lambda: self.free_rows >= count, timeout_s):
                raise GenerationError(
                    f"{count} row(s) wanted, {self.free_rows} of {self.capacity_rows} free (max_batch_size "
                    "of this artifact); end a running stream first, or export with a larger --max-batch-size"
                )
            rows = [row for row in range(self.capacity_rows) if row not in self._positions][:count]
            self._positions.update(dict.fromkeys(rows, 0))
            return rows

    def release(self, row: int) -> None:
        """End a sequence. A row that held NaN or infinity is zeroed: a mask cannot hide those."""
        with self._turn:
            self._require_active(row)
            if row in self._poisoned or row in self._tainted:
                self._backend.write_row(row, None)
                self._poisoned.discard(row)
                self._tainted.discard(row)
            del self._positions[row]
            self._turn.notify_all()

    def position(self, row: int) -> int:
        """Position the row's next token will have."""
        self._require_active(row)
        return self._positions[row]

    def append(
        self, row: int, tokens: Sequence[int], *, all_logits: bool = False, allow_long: bool = False
    ) -> Logits:
        """Feed tokens to one row, chunk by chunk, up to the chunk edges.

        Returns the last token's logits [V], or with all_logits those of every token [len(tokens), V].
        Raises NonFiniteLogitsError, or GenerationError past the artifact's context.
        """
        self._require_tokens(tokens)
        self._require_context(row, len(tokens), allow_long)
        pieces: list[Logits] = []
        start = 0
        while start < len(tokens):
            size = min(self.contract.ring.room_in_chunk(self._positions[row]), len(tokens) - start)
            logits = self._run_chunk(row, tokens[start : start + size], all_logits=all_logits)
            pieces = [*pieces, logits] if all_logits else [logits]
            start += size
        return np.concatenate(pieces) if all_logits else pieces[-1][-1]

    def append_padded(
        self,
        row: int,
        tokens: Sequence[int],
        pad_to: int,
        *,
        pad_token: int = 0,
        all_logits: bool = False,
    ) -> Logits:
        """Feed one partly filled chunk: `tokens`, then `pad_token` up to pad_to tokens, in one call.

        The position advances by len(tokens); what the padding wrote is overwritten before it is visible.
        Returns as `append`.
        """
        self._require_tokens(tokens)
        self._require_context(row, len(tokens), False)
        padded = [*tokens, *[pad_token] * (pad_to - len(tokens))]
        logits = self._run_chunk(row, padded, real=len(tokens), all_logits=all_logits)
        return logits if all_logits else logits[-1]

    def step(self, tokens: Mapping[int, int], *, allow_long: bool = False) -> dict[int, Logits]:
        """Decode one token for each given row in one call.  Returns row → logits [V].

        Raises NonFiniteLogitsError naming the rows that failed and carrying the logits of the others.
        """
        for row, token in tokens.items():
            self._require_tokens([token])
            self._require_context(row, 1, allow_long)
        batch = self.batch_for(max(tokens))
        ids = [[tokens.get(row, 0)] for row in range(batch)]
        with self._turn:
            # A row that is not decoding writes where its own next token will land: nothing visible is there.
            positions = [[self._positions.get(row, 0)] for row in range(batch)]
            logits = self._run(ids, positions, [[0]] * batch, first_row=0)
            for row in tokens:
                self._positions[row] += 1
            idle = [row for row in self._positions if row < batch and row not in tokens]
            self._tainted.update(row for row in idle if not np.isfinite(logits[row]).all())
        return self._finite({row: logits[row, 0] for row in tokens})

    def batch_for(self, highest_row: int) -> int:
        """Decode batch that covers a row: the smallest of 1, 2, 4, …, max_batch_size."""
        batch = 1
        while batch <= highest_row:
            batch *= 2
        return min(batch, self.capacity_rows)

    def snapshot(self, row: int) -> RowSnapshot:
        """Copy one row's state."""
        with self._turn:
            return RowSnapshot(self.position(row), self._backend.read_row(row))

    def restore(self, row: int, snapshot: RowSnapshot) -> None:
        """Put a snapshot back, into any active row of an equal artifact."""
        with self._turn:
            self._require_active(row)
            self._backend.write_row(row, snapshot.rings)
            self._positions[row] = snapshot.position
            self._poisoned.discard(row)

    def _run_chunk(
        self, row: int, tokens: Sequence[int], *, all_logits: bool, real: int | None = None
    ) -> Logits:
        """One prefill call on one row; `real` tokens count, the rest is padding.  Returns [N, V]."""
        count = len(tokens) if real is None else real
        start = self._positions[row]
        index = list(range(count)) if all_logits else [count - 1]
        positions = [list(range(start, start + len(tokens)))]
        with self._turn:
            logits = self._run([list(tokens)], positions, [index], first_row=row)
            self._positions[row] = start + count
        return self._finite({row: logits[0]})[row]

    def _run(
        self, ids: list[list[int]], positions: list[list[int]], index: list[list[int]], first_row: int
    ) -> Logits:
        for row_positions in positions:
            check_edge(self.contract, row_positions[0], len(row_positions))
        step = Step(
            np.asarray(ids, np.int64), np.asarray(positions, np.int64), np.asarray(index, np.int64), first_row
        )
        return self._backend.run(step)

    def _finite(self, logits: dict[int, Logits]) -> dict[int, Logits]:
        failed = [row for row, values in logits.items() if not np.isfinite(values).all()]
        if failed:
            self._poisoned.update(failed)
            raise NonFiniteLogitsError(failed, {r: v for r, v in logits.items() if r not in failed})
        return logits

    def _require_active(self, row: int) -> None:
        if row not in self._positions:
            raise GenerationError(f"row {row} has no sequence; call acquire() first")

    def _require_context(self, row: int, count: int, allow_long: bool) -> None:
        self._require_active(row)
        if row in self._poisoned:
            raise GenerationError(f"row {row} produced NaN or infinity; release it")
        last = self._positions[row] + count - 1
        if reason := self.contract.check_position(last, allow_long=allow_long):
            raise GenerationError(reason)

    def _require_tokens(self, tokens: Sequence[int]) -> None:
        if not len(tokens):
            raise GenerationError("expected at least one token, found none")
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= self.contract.config.vocab_size:
            last, found = self.contract.config.vocab_size - 1, low if low < 0 else high
            raise GenerationError(f"token ids must lie in 0…{last}, found {found}")


def check_edge(contract: GraphContract, position: int, count: int) -> None:
    """Raise GenerationError if a call of `count` tokens from `position` would cross a chunk edge.

    R is a multiple of C, so a call that stays in its chunk never crosses the ring's end.
    C=4: 3 tokens from position 5 fit (5 6 7), 4 do not.
    """
    room = contract.ring.room_in_chunk(position)
    if count > room:
        raise GenerationError(
            f"a call of {count} tokens from position {position} crosses the chunk edge; "
            f"prefill_chunk is {contract.ring.prefill_chunk}, so {room} fit"
        )
