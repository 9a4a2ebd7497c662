"""Tokens of each row → logits, with every row's ring and position kept between calls.

This is the one place that holds state. A sequence owns one row of the rings from its first token to its
last; which slot a token lands in follows from its position alone (`contract.Ring`). Everything a backend
has to do is run one step on buffers it owns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mistral_trt.contract import GraphContract
from mistral_trt.errors import BackendError, GenerationError, NonFiniteLogitsError
from mistral_trt.runtime.backend import Backend, Logits, RingArray, Step, Tokens

__all__ = [
    "Backend",
    "Logits",
    "RingArray",
    "RollingCache",
    "RowSnapshot",
    "Step",
    "Tokens",
    "check_edge",
]


@dataclass(frozen=True)
class RowSnapshot:
    """One sequence's state: its next position and its rings ([K, R, D] each, order of `past()`).

    tainted: the slot of the next position may hold NaN, which the next token overwrites.
    """

    position: int
    rings: tuple[RingArray, ...]
    tainted: bool = False


class RollingCache:
    """Rows of ring buffers over a backend.

    It has one owner: one thread calls it at a time. The logits it returns are the caller's own, but those
    of `decode`.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.contract: GraphContract = backend.contract
        rows = self.contract.max_batch_size
        self._active = [False] * rows
        self._next = np.zeros((rows, 1), np.int64)  # each row's next position, 0 where the row is free
        self._poisoned: set[int] = set()  # NaN, infinity or a failed step: the sequence has failed
        self._tainted: set[int] = set()  # the same while idle: its next token overwrites the slot
        self._decode_steps: dict[int, Step] = {}

    @property
    def capacity_rows(self) -> int:
        return self.contract.max_batch_size

    @property
    def free_rows(self) -> int:
        return self._active.count(False)

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()

    def acquire(self) -> int:
        """Give a new sequence the lowest free row. Raises GenerationError if none is free."""
        return self.acquire_rows(1)[0]

    def acquire_rows(self, count: int) -> list[int]:
        """Give `count` new sequences the lowest free rows, all or none.

        Raises GenerationError if fewer are free.
        """
        rows = [row for row, active in enumerate(self._active) if not active][:count]
        if len(rows) < count:
            raise GenerationError(
                f"{count} row(s) wanted, {self.free_rows} of {self.capacity_rows} free (max_batch_size "
                "of this artifact); end a running stream first, or export with a larger --max-batch-size"
            )
        for row in rows:
            self._active[row] = True
        return rows

    def release(self, row: int) -> None:
        """End a sequence. A row that held NaN or infinity is zeroed: a mask cannot hide those.

        Raises BackendError, fatal, if that fails: nothing may run beside such a row.
        """
        self._require_active(row)
        if row in self._poisoned or row in self._tainted:
            self._zero(row)
            self._poisoned.discard(row)
            self._tainted.discard(row)
        self._active[row] = False
        self._next[row] = 0

    def position(self, row: int) -> int:
        """Position the row's next token will have."""
        self._require_active(row)
        return int(self._next[row, 0])

    def append(
        self, row: int, tokens: Sequence[int], *, all_logits: bool = False, allow_long: bool = False
    ) -> Logits:
        """Feed tokens to one row, chunk by chunk, up to the chunk edges.

        Returns the last token's logits [V], or with all_logits those of every token [len(tokens), V].
        Raises NonFiniteLogitsError, or GenerationError past the artifact's context.
        """
        self._require_tokens(tokens)
        self._require_context(row, len(tokens), allow_long)
        logits = np.empty((len(tokens) if all_logits else 1, self.contract.config.vocab_size), np.float32)
        start = 0
        while start < len(tokens):
            size = min(self.room(row), len(tokens) - start)
            found = self._run_chunk(row, tokens[start : start + size], all_logits=all_logits)
            logits[start if all_logits else 0 :][: len(found)] = found
            start += size
        return logits if all_logits else logits[0]

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
        logits = self._run_chunk(row, padded, real=len(tokens), all_logits=all_logits).copy()
        return logits if all_logits else logits[-1]

    def step(self, tokens: Mapping[int, int], *, allow_long: bool = False) -> dict[int, Logits]:
        """Decode one token for each given row in one call.  Returns row → logits [V].

        Raises NonFiniteLogitsError naming the rows that failed and carrying the logits of the others.
        """
        for row, token in tokens.items():
            self._require_tokens([token])
            self._require_context(row, 1, allow_long)
        return {row: logits.copy() for row, logits in self.decode(tokens).items()}

    def decode(self, tokens: Mapping[int, int], batch: int | None = None) -> dict[int, Logits]:
        """As `step`, for a caller that knows its rows, tokens and positions to be right.

        batch: B, by default the smallest that covers the rows. The logits hold until the next call.
        """
        step = self._decode_step(self.batch_for(max(tokens)) if batch is None else batch)
        size, ids = len(step.input_ids), step.input_ids
        for row, token in tokens.items():
            ids[row] = token
        # A row that is not decoding writes where its own next token will land: nothing visible is there.
        step.position_ids[:] = self._next[:size]
        logits = self._run(step, tokens)[:, 0]
        for row in tokens:
            self._next[row] += 1
        found = {row: logits[row] for row in tokens}
        if not np.isfinite(logits).all():
            self._tainted |= {r for r in self._idle(size, tokens) if not np.isfinite(logits[r]).all()}
            self._require_finite(found)
        return found

    def batch_for(self, highest_row: int) -> int:
        """Decode batch that covers a row: the smallest of 1, 2, 4, …, max_batch_size."""
        batch = 1
        while batch <= highest_row:
            batch *= 2
        return min(batch, self.capacity_rows)

    def room(self, row: int) -> int:
        """Tokens that the row's next call can take: those up to the chunk edge."""
        return self.contract.ring.room_in_chunk(self.position(row))

    def copy(self, source: int, target: int) -> None:
        """Make the sequence of row `target` go on from where that of row `source` is."""
        self._require_active(source)
        self._require_active(target)
        self._require_sound(source)
        self._poisoned.add(target)  # until it is whole
        self._backend.copy_row(source, target)
        self._settle(target, self.position(source), source in self._tainted)

    def snapshot(self, row: int) -> RowSnapshot:
        """Copy one row's state."""
        return RowSnapshot(self.position(row), self._backend.read_row(row), row in self._tainted)

    def restore(self, row: int, snapshot: RowSnapshot) -> None:
        """Put a snapshot back, into any active row of an equal artifact."""
        self._require_active(row)
        self._poisoned.add(row)  # until it is whole
        self._backend.write_row(row, snapshot.rings)
        self._settle(row, snapshot.position, snapshot.tainted)

    def _zero(self, row: int) -> None:
        try:
            self._backend.write_row(row, None)
        except Exception as error:
            raise BackendError(f"row {row} could not be zeroed: {error}", fatal=True) from error

    def _settle(self, row: int, position: int, tainted: bool) -> None:
        """What is known of a row whose rings were just overwritten."""
        self._next[row] = position
        self._poisoned.discard(row)
        (self._tainted.add if tainted else self._tainted.discard)(row)

    def _run_chunk(
        self, row: int, tokens: Sequence[int], *, all_logits: bool, real: int | None = None
    ) -> Logits:
        """One prefill call on one row; `real` tokens count, the rest is padding.  Returns [N, V]."""
        count = len(tokens) if real is None else real
        start = self.position(row)
        check_edge(self.contract, start, len(tokens))
        positions = np.arange(start, start + len(tokens), dtype=np.int64)
        index = np.arange(0 if all_logits else count - 1, count, dtype=np.int64)
        step = Step(np.array([tokens], np.int64), positions[None], index[None], row)
        logits = self._run(step, (row,))[0]
        self._next[row] = start + count
        return self._require_finite({row: logits})[row]

    def _run(self, step: Step, rows: Mapping[int, int] | tuple[int, ...]) -> Logits:
        """Run a step that feeds `rows`; if it fails, all that it may have written counts as spoilt."""
        try:
            return self._backend.run(step)
        except BaseException:
            self._poisoned.update(rows)
            if step.first_row == 0:
                self._tainted |= self._idle(len(step.input_ids), rows)
            raise

    def _idle(self, batch: int, rows: Mapping[int, int] | tuple[int, ...]) -> set[int]:
        """Rows with a sequence that a step over `batch` rows covers but does not feed."""
        return {row for row in range(batch) if self._active[row] and row not in rows}

    def _decode_step(self, batch: int) -> Step:
        """The step of this B, whose arrays are filled anew for each call."""
        if batch not in self._decode_steps:
            ids, positions, index = (np.zeros((batch, 1), np.int64) for _ in range(3))
            self._decode_steps[batch] = Step(ids, positions, index, 0)
        return self._decode_steps[batch]

    def _require_finite(self, logits: dict[int, Logits]) -> dict[int, Logits]:
        failed = [row for row, values in logits.items() if not np.isfinite(values).all()]
        if failed:
            self._poisoned.update(failed)
            healthy = {row: values.copy() for row, values in logits.items() if row not in failed}
            raise NonFiniteLogitsError(failed, healthy)
        return logits

    def _require_active(self, row: int) -> None:
        if not (0 <= row < self.capacity_rows and self._active[row]):
            raise GenerationError(f"row {row} has no sequence; call acquire() first")

    def _require_sound(self, row: int) -> None:
        if row in self._poisoned:
            raise GenerationError(f"row {row} produced NaN or infinity, or its step failed; release it")

    def _require_context(self, row: int, count: int, allow_long: bool) -> None:
        self._require_active(row)
        self._require_sound(row)
        last = self.position(row) + count - 1
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
