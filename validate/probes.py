"""Ring geometry → which tokens are fed in which calls, and the positions where a ring would break.

Everything is teacher-forced: the tokens are fixed beforehand, so a wrong logit cannot change what is asked
next. A scenario covers every position once, in order, with the cache carried from call to call.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mistral_trt.contract import POSITION_ACCURATE_LIMIT, GraphContract, Ring
from mistral_trt.errors import ValidationError
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.text.tokenizer import Tokenizer

Kind = Literal["prefill", "decode", "padded"]
Step = tuple[int, np.ndarray]

TEXT = Path(__file__).with_name("text.txt")
"""Two chapters' beginning of a novel in the public domain (TEXT-SOURCE.md)."""

_ENOUGH_POSITIONS = 2048
_STEPWISE_WORK = 2e10
_DECODE_REACH = 8


@dataclass(frozen=True)
class Tokens:
    """The sequence that both sides are fed.

    ids: T token ids.  sha256: of the ids as little-endian int64.  is_text: whether it can be predicted;
    random tokens cannot.
    """

    ids: tuple[int, ...]
    source: str
    sha256: str
    is_text: bool

    @property
    def targets(self) -> np.ndarray:
        """The token that a model should predict at each position, int64 [T]; -1 where there is none.

        Text 5 9 7 -> 9 7 -1; random tokens -> -1 -1 -1.
        """
        if not self.is_text:
            return np.full(len(self.ids), -1)
        return np.array([*self.ids[1:], -1])


@dataclass(frozen=True)
class Probe:
    """A position where a ring would break."""

    name: str
    position: int


@dataclass(frozen=True)
class Call:
    """One call: tokens start…stop-1 are fed, padded to pad_to tokens where kind is "padded"."""

    start: int
    stop: int
    kind: Kind
    pad_to: int = 0


@dataclass(frozen=True)
class Scenario:
    """Calls that cover positions 0…T-1 in order, on one row."""

    name: str
    description: str
    calls: tuple[Call, ...]

    def decoded(self) -> list[tuple[int, int]]:
        """Stretches (start, stop) that were fed token by token."""
        stretches: list[tuple[int, int]] = []
        for call in self.calls:
            if call.kind != "decode":
                continue
            if stretches and stretches[-1][1] == call.start:
                stretches[-1] = (stretches[-1][0], call.stop)
            else:
                stretches.append((call.start, call.stop))
        return stretches


def default_length(contract: GraphContract) -> int:
    """Positions to compare: past 3W and 2R with a chunk to spare, at least 2,048 and a chunk, within limits.

    W=512, C=256 (R=768): 2312.  W=4096, C=256 (R=4352): 12552.
    """
    ring = contract.ring
    spare = ring.prefill_chunk + 8
    length = max(3 * ring.sliding_window, 2 * ring.capacity, _ENOUGH_POSITIONS) + spare
    return min(length, contract.max_context or POSITION_ACCURATE_LIMIT)


def check_length(length: int, contract: GraphContract) -> int:
    """Raise ValidationError unless `length` positions can be compared."""
    limit = contract.max_context or POSITION_ACCURATE_LIMIT
    if not 2 <= length <= limit:
        raise ValidationError(f"--length must be from 2 to {limit} for this artifact, found {length}")
    return length


def text_tokens(tokenizer: Tokenizer, path: Path, *, length: int, vocab_size: int) -> Tokens:
    """The first `length` tokens of a text, repeated from its start where it is shorter.

    Raises ValidationError for a file that is not text or a tokenizer that is not this model's.
    """
    try:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValidationError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if not ids:
        raise ValidationError(f"{path} holds no text")
    if max(ids) >= vocab_size:
        raise ValidationError(
            f"the artifact's tokenizer gives token {max(ids)}, but its model knows {vocab_size} tokens only: "
            "it is another model's"
        )
    repeats = -(-length // len(ids))
    name = "Moby-Dick, chapters 1 and 2" if path == TEXT else path.name
    again = f", {repeats} times over" if repeats > 1 else ""
    return _tokens((ids * repeats)[:length], f"text: {name}{again}", is_text=True)


def random_tokens(*, length: int, vocab_size: int, seed: int) -> Tokens:
    """Uniform random tokens, the same for the same seed."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, length)
    return _tokens(ids.tolist(), f"random tokens, seed {seed}", is_text=False)


def _tokens(ids: Sequence[int], source: str, *, is_text: bool) -> Tokens:
    sha256 = hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()
    return Tokens(tuple(ids), source, sha256, is_text)


def probes(contract: GraphContract, length: int) -> list[Probe]:
    """Positions of interest below `length`, in order; names of equal positions are joined.

    W=8, C=4 (R=12): C 4, W-1 7, W 8, W+1 9, R-1 11, R 12, R+1 13, 2W 16, 2R = 3W 24.
    """
    ring = contract.ring
    window, capacity, chunk = ring.sliding_window, ring.capacity, ring.prefill_chunk
    named = [("C-1", chunk - 1), ("C", chunk), ("C+1", chunk + 1)]
    if contract.wraps:
        named += [("W-1", window - 1), ("W", window), ("W+1", window + 1)]
        named += [("R-1", capacity - 1), ("R", capacity), ("R+1", capacity + 1)]
        named += [("2W", 2 * window), ("2R", 2 * capacity), ("3W", 3 * window)]
    else:
        named += [("end", length - 1)]
    names: dict[int, list[str]] = {}
    for name, position in named:
        names.setdefault(position, []).append(name)
    return [Probe(" = ".join(names[p]), p) for p in sorted(names) if 0 < p < length]


def wraps(contract: GraphContract, length: int) -> list[int]:
    """Positions below `length` at which the window or the ring has turned once more."""
    ring = contract.ring
    if not contract.wraps:
        return []
    turns = {*range(0, length, ring.sliding_window), *range(0, length, ring.capacity)} - {0}
    return sorted(turns)


def scenarios(contract: GraphContract, length: int, *, weights: int, seed: int) -> list[Scenario]:
    """Every scenario for `length` positions.  weights: parameters of the model, to know what is cheap."""
    ring = contract.ring
    stops = sorted({probe.position for probe in probes(contract, length)} | {*wraps(contract, length)})
    plans = [
        Scenario("prefill", "whole chunks, every position's logits", _chunks(ring, length)),
        Scenario("decode", "token by token around every probe, prefill between", _mixed(ring, length, stops)),
        Scenario("padded", "chunks partly filled, the rest padding", _padded(ring, length, seed)),
    ]
    if length * weights <= _STEPWISE_WORK:
        every = tuple(Call(p, p + 1, "decode") for p in range(length))
        plans.append(Scenario("stepwise", "token by token from the first to the last", every))
    return plans


def play(cache: RollingCache, scenario: Scenario, *, tokens: Sequence[int]) -> Iterator[Step]:
    """Feed a scenario to a row of its own.  Yields (first position, logits [n, V]) of each call."""
    row = cache.acquire()
    try:
        for call in scenario.calls:
            yield call.start, _feed(cache, row, call=call, tokens=tokens)
    finally:
        cache.release(row)


def _feed(cache: RollingCache, row: int, *, call: Call, tokens: Sequence[int]) -> np.ndarray:
    new = tokens[call.start : call.stop]
    if call.kind == "decode":
        return cache.step({row: new[0]})[row][None]
    if call.kind == "padded":
        padding = tokens[0]  # any token may pad; this one is not always 0
        return cache.append_padded(row, new, pad_to=call.pad_to, pad_token=padding, all_logits=True)
    return cache.append(row, new, all_logits=True)


def _chunks(ring: Ring, length: int) -> tuple[Call, ...]:
    return _spans(0, length, ring.prefill_chunk)


def _mixed(ring: Ring, length: int, stops: Sequence[int]) -> tuple[Call, ...]:
    """Decode near each stop; between two stops one prefill, which begins and ends off the chunk edges."""
    reach = max(1, min(_DECODE_REACH, ring.prefill_chunk // 4))
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
