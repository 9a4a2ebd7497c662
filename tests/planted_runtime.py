"""Faults of the runtime: patches of the rolling cache and of its backend while an artifact is validated."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mistral_trt.contract import Ring
from mistral_trt.runtime.cache import Logits, RollingCache, Step
from mistral_trt.runtime.onnxruntime_backend import OnnxRuntimeBackend

Patch = Callable[[pytest.MonkeyPatch], None]
"""Plants a fault until the test ends."""


def altered_step(alter: Callable[[Step], Step]) -> Patch:
    run = OnnxRuntimeBackend.run
    return lambda patch: patch.setattr(OnnxRuntimeBackend, "run", lambda self, step: run(self, alter(step)))


def at_positions(change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Patch:
    return altered_step(lambda step: replace(step, position_ids=change(step.position_ids)))


@altered_step
def earlier_logits(step: Step) -> Step:
    return replace(step, logits_index=np.maximum(step.logits_index - 1, 0))


@altered_step
def tokens_of_the_row_before(step: Step) -> Step:
    return replace(step, input_ids=np.roll(step.input_ids, 1, axis=0))


@altered_step
def chunks_to_row_0(step: Step) -> Step:
    return replace(step, first_row=0)


def altered_logits(change: Callable[[Step, Logits], Logits]) -> Patch:
    run = OnnxRuntimeBackend.run
    return lambda patch: patch.setattr(
        OnnxRuntimeBackend, "run", lambda self, step: change(step, run(self, step))
    )


@altered_logits
def nan_at_50(step: Step, logits: Logits) -> Logits:
    logits[step.position_ids[:, -1] == 50] = np.nan
    return logits


@altered_logits
def rows_exchanged(step: Step, logits: Logits) -> Logits:
    return logits[::-1]


@altered_logits
def rows_mixed(step: Step, logits: Logits) -> Logits:
    """Each row's logits are the mean of its own and those of the row before it."""
    mixed: Logits = np.mean([logits, np.roll(logits, 1, axis=0)], axis=0, dtype=np.float32)
    return mixed


def forgetful(rings: Callable[[list[npt.NDArray[Any]]], list[npt.NDArray[Any]]]) -> Patch:
    """Zero some rings of the row before every call, as if the cache were not carried."""
    run = OnnxRuntimeBackend.run

    def forget(self: OnnxRuntimeBackend, step: Step) -> Logits:
        for ring in rings(self._rings.arrays):
            ring[step.first_row] = 0
        return run(self, step)

    return lambda patch: patch.setattr(OnnxRuntimeBackend, "run", forget)


def chunk_edges_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ring, "room_in_chunk", lambda self, position: self.prefill_chunk)


def padding_counted(patch: pytest.MonkeyPatch) -> None:
    """What pads a chunk takes positions from the tokens that follow."""
    append = RollingCache.append_padded

    def counted(self: RollingCache, row: int, tokens: Any, pad_to: int, **options: Any) -> Logits:
        logits = append(self, row, tokens, pad_to, **options)
        self._next[row] += pad_to - len(tokens)
        return logits

    patch.setattr(RollingCache, "append_padded", counted)


def row_kept_after_eviction(patch: pytest.MonkeyPatch) -> None:
    """A new sequence goes on where the one before it in its row ended."""
    release = RollingCache.release

    def kept(self: RollingCache, row: int) -> None:
        position = self._next[row].copy()
        release(self, row)
        self._next[row] = position

    patch.setattr(RollingCache, "release", kept)


def idle_row_overwritten(patch: pytest.MonkeyPatch) -> None:
    """A row that idles is fed its last position in place of its next."""
    decode = RollingCache.decode

    def overwritten(self: RollingCache, tokens: Any, batch: int | None = None) -> dict[int, Logits]:
        idle = [row for row in range(self.capacity_rows) if row not in tokens and self._next[row, 0]]
        self._next[idle] -= 1
        found = decode(self, tokens, batch)
        self._next[idle] += 1
        return found

    patch.setattr(RollingCache, "decode", overwritten)


all_forgotten = forgetful(lambda rings: rings)
last_values_forgotten = forgetful(lambda rings: rings[-1:])
positions_from_one = at_positions(lambda positions: positions + 1)
positions_repeated = at_positions(lambda positions: positions % 16)
