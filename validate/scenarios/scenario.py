"""Ring geometry → which tokens are fed in which calls.

Everything is teacher-forced: the tokens are fixed beforehand, so a wrong logit cannot change what is asked
next. A scenario of one row covers every position once, in order, with the cache carried from call to call;
one of several rows lets each decode a stretch of its own, all in the same calls.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mistral_trt.contract import GraphContract, Ring
from mistral_trt.runtime.cache import Logits, RollingCache
from mistral_trt.validate.scenarios.probes import probes, wraps

Name = Literal["prefill", "decode", "padded", "rows", "stepwise"]
Kind = Literal["context", "prefill", "decode", "padded"]
Compared = tuple[np.ndarray, Logits]
"""Positions int64 [n] and their logits [n, V]."""

_DECODE_REACH = 8
_MOST_ROWS = 4


@dataclass(frozen=True)
class Call:
    """Tokens start…stop-1 are fed to a row, padded to pad_to tokens where kind is "padded".

    Position 0 begins a new sequence in the row. kind "context" is a prefill whose logits nobody asks for.
    """

    start: int
    stop: int
    kind: Kind
    pad_to: int = 0
    row: int = 0


@dataclass(frozen=True)
class Together:
    """One decode step over several rows.  positions: of each row's token, None where the row idles."""

    positions: tuple[int | None, ...]


@dataclass(frozen=True)
class Scenario:
    """Calls in order.  rows: how many rows of the ring they use, from row 0."""

    name: str
    description: str
    calls: tuple[Call | Together, ...]
    rows: int = 1

    @property
    def whole(self) -> bool:
        """Whether it compares every position, so that its shares and means are of the whole sequence."""
        return not any(isinstance(call, Together) for call in self.calls)

    @property
    def compared(self) -> int:
        """Positions whose logits are compared."""
        return sum(
            call.stop - call.start
            if isinstance(call, Call)
            else sum(position is not None for position in call.positions)
            for call in self.calls
            if isinstance(call, Together) or call.kind != "context"
        )

    def decoded(self) -> list[tuple[int, int]]:
        """Stretches (start, stop) that were fed token by token, in order."""
        positions = sorted({position for call in self.calls for position in _decoded(call)})
        stretches: list[tuple[int, int]] = []
        for position in positions:
            if stretches and stretches[-1][1] == position:
                stretches[-1] = (stretches[-1][0], position + 1)
            else:
                stretches.append((position, position + 1))
        return stretches


def _decoded(call: Call | Together) -> list[int]:
    if isinstance(call, Together):
        return [position for position in call.positions if position is not None]
    return [call.start] if call.kind == "decode" else []


def scenarios(contract: GraphContract, length: int, *, names: Sequence[Name], seed: int) -> list[Scenario]:
    """The named scenarios for `length` positions, in the order of `names`."""
    ring = contract.ring
    stops = sorted({probe.position for probe in probes(contract, length)} | {*wraps(contract, length)})
    found = []
    for name in names:
        if name == "prefill":
            plan = Scenario(name, "whole chunks, every position's logits", _chunks(ring, length))
        elif name == "decode":
            words = "token by token around every probe, between them turns that start off the chunk edges"
            plan = Scenario(name, words, _mixed(ring, length, stops))
        elif name == "padded":
            plan = Scenario(name, "chunks partly filled, the rest padding", _padded(ring, length, seed))
        elif name == "rows":
            plan = _rows(contract, length, stops)
        else:
            every = tuple(Call(p, p + 1, "decode") for p in range(length))
            plan = Scenario(name, "token by token from the first to the last", every)
        found.append(plan)
    return found


def play(cache: RollingCache, scenario: Scenario, *, tokens: Sequence[int]) -> Iterator[Compared]:
    """Feed a scenario to rows of its own.  Yields what each call gives that is to be compared."""
    rows = cache.acquire_rows(scenario.rows)
    try:
        for call in scenario.calls:
            if isinstance(call, Together):
                yield _together(cache, rows, call=call, tokens=tokens)
                continue
            if call.start == 0 and cache.position(rows[call.row]):
                cache.release(rows[call.row])
                rows[call.row] = cache.acquire()
            logits = _feed(cache, rows[call.row], call=call, tokens=tokens)
            if call.kind != "context":
                yield np.arange(call.start, call.stop), logits
    finally:
        for row in rows:
            cache.release(row)


def _feed(cache: RollingCache, row: int, *, call: Call, tokens: Sequence[int]) -> Logits:
    new = tokens[call.start : call.stop]
    if call.kind == "decode":
        return cache.step({row: new[0]})[row][None]
    if call.kind == "padded":
        padding = tokens[0]  # any token may pad; this one is not always 0
        return cache.append_padded(row, new, pad_to=call.pad_to, pad_token=padding, all_logits=True)
    return cache.append(row, new, all_logits=call.kind == "prefill")


def _together(cache: RollingCache, rows: Sequence[int], *, call: Together, tokens: Sequence[int]) -> Compared:
    fed = {row: p for row, p in zip(rows, call.positions, strict=True) if p is not None}
    found = cache.step({row: tokens[position] for row, position in fed.items()})
    return np.array(list(fed.values())), np.stack([found[row] for row in fed])


def _chunks(ring: Ring, length: int) -> tuple[Call, ...]:
    return _spans(0, length, ring.prefill_chunk)


def _mixed(ring: Ring, length: int, stops: Sequence[int]) -> tuple[Call, ...]:
    """Decode near each stop; between two stops one prefill, which begins and ends off the chunk edges."""
    reach = _reach(ring)
    near = {p for stop in stops for p in range(stop - reach, stop + reach + 1)}
    calls: list[Call] = []
    start = 0
    while start < length:
        if start in near:
            calls.append(Call(start, start + 1, "decode"))
            start += 1
            continue
        stop = next((p for p in range(start, length) if p in near), length)
        calls += _spans(start, stop, 2 * ring.prefill_chunk)
        start = stop
    return tuple(calls)


def _reach(ring: Ring) -> int:
    return max(1, min(_DECODE_REACH, ring.prefill_chunk // 4))


def _spans(start: int, stop: int, size: int) -> tuple[Call, ...]:
    return tuple(Call(p, min(p + size, stop), "prefill") for p in range(start, stop, size))


def _padded(ring: Ring, length: int, seed: int) -> tuple[Call, ...]:
    """Fill between half and all of the room in the chunk; every other call is padded up to the edge."""
    draw = np.random.default_rng(seed)
    calls: list[Call] = []
    start = 0
    while start < length:
        room = ring.room_in_chunk(start)
        count = int(draw.integers(max(1, room // 2), room + 1))
        pad_to = room if len(calls) % 2 else int(draw.integers(count, room + 1))
        calls.append(Call(start, min(start + count, length), "padded", pad_to))
        start += count
    return tuple(calls)


def _rows(contract: GraphContract, length: int, stops: Sequence[int]) -> Scenario:
    """Rows at different positions in the same calls; they join one after another, the last row first.

    A step covers every row up to the highest that decodes: those that join later idle in it, their context
    behind them. The artifact's last row is one of them, so that the first steps cover all it has.
    At the end row 0, full of its old sequence, is given to a new one.
    """
    reach = max(_MOST_ROWS, _reach(contract.ring))
    span = 2 * reach + 1
    last = max(0, length - span)
    starts = _spread([min(max(0, stop - reach), last) for stop in stops], contract.max_batch_size)
    rows = _evenly(contract.max_batch_size, len(starts))
    calls: list[Call | Together] = [
        Call(0, start, "context", row=row) for row, start in zip(rows, starts, strict=True) if start
    ]
    for k in range(span + len(starts) - 1):
        fed: list[int | None] = [None] * contract.max_batch_size
        for wait, row, start in zip(reversed(range(len(rows))), rows, starts, strict=True):
            fed[row] = _in_turn(k - wait, start, min(start + span, length))
        if any(position is not None for position in fed):
            calls.append(Together(tuple(fed)))
    anew = min(length, contract.ring.prefill_chunk)
    calls.append(Call(0, anew, "prefill"))
    calls += [Call(p, p + 1, "decode") for p in range(anew, min(anew + span, length))]
    words = f"{len(starts)} rows at different positions decode together; then a used row takes a new sequence"
    return Scenario("rows", words, tuple(calls), contract.max_batch_size)


def _in_turn(k: int, start: int, stop: int) -> int | None:
    """The k-th position from start on, None before it begins and past its end."""
    return start + k if 0 <= k < stop - start else None


def _spread(starts: Sequence[int], rows: int) -> list[int]:
    """Some of the starts, far apart, the last first.  1 5 9 13, 2 rows -> 13 1"""
    distinct = sorted(set(starts) | {0})
    count = min(rows, _MOST_ROWS, len(distinct))
    if count == 1:
        return distinct[-1:]
    return [distinct[i] for i in reversed(_evenly(len(distinct), count))]


def _evenly(size: int, count: int) -> list[int]:
    """Of 0…size-1 so many, the first and the last among them.  9, 4 -> 0 3 5 8"""
    return [int(i) for i in np.linspace(0, size - 1, count).round()]
