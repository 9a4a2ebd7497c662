"""A carried cache → exact answers on which slots a call can see; no reference and no tolerance.

A call is run twice from the same snapshot, once with slots of the ring altered in every layer. Slots the
mask must hide leave every logit bit-identical; slots it must show change some.

W=8, C=4 (R=12), decoding q=26: visible are 19…26, so slot 18 % 12 = 6 is hidden and slot 19 % 12 = 7 shows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import ml_dtypes
import numpy as np

from mistral_trt.contract import GraphContract, Ring
from mistral_trt.errors import NonFiniteLogitsError
from mistral_trt.runtime.cache import Logits, RingArray, RollingCache, RowSnapshot

BUMP = 3.0
GARBAGE = 1e4
FLOAT16_KEY_GARBAGE = 100.0
"""ONNX Runtime hides a slot by adding the lowest finite number to its score, in float16 -65504: past that a
key shows through. No model's keys reach it (scores stay in the hundreds), garbage of 1e4 does."""

_OLDEST = "q-W+1, the oldest in the window"
_SHORT_CHUNK = 16


@dataclass(frozen=True)
class Question:
    """A call to be run twice: tokens start…stop-1, padded to pad_to tokens where that is more.

    after_padding: whether the call before was padded to the chunk's edge, past `start`.
    """

    start: int
    stop: int
    pad_to: int = 0
    after_padding: bool = False

    @property
    def width(self) -> int:
        """Tokens the call writes, padding included."""
        return max(self.stop - self.start, self.pad_to)

    @property
    def name(self) -> str:
        if self.width == 1:
            return f"decode at {self.start}" + (", after padding" if self.after_padding else "")
        padding = f", padded to {self.pad_to}" if self.pad_to else ""
        return f"chunk {self.start}…{self.stop - 1}{padding}"


@dataclass(frozen=True)
class Poke:
    """Slots to alter before a call, and whether the call may notice.

    slots: ring indices.  how: "bump" adds 3.0, "garbage" writes ±1e4 (float16 keys: ±100), "values" writes it
    to values alone.  row: whose ring.  layer: whose ring, None for every layer's.  of_last: whether only the
    call's last token is asked; else every token where nothing may change, the first where something must.
    """

    name: str
    slots: tuple[int, ...]
    visible: bool
    how: Literal["bump", "garbage", "values"] = "bump"
    row: Literal["own", "neighbour"] = "own"
    layer: int | None = None
    of_last: bool = False


@dataclass(frozen=True)
class PokeResult:
    """What a poke did.  changed: logits that differ in any bit, of `total` that were compared."""

    question: Question
    poke: Poke
    changed: int
    total: int

    @property
    def passed(self) -> bool:
        return (self.changed > 0) == self.poke.visible


@dataclass(frozen=True)
class Rows:
    """The row that is asked, its neighbour where the artifact has two rows, and that one's clean state."""

    cache: RollingCache
    own: int
    neighbour: int | None
    rest: RowSnapshot | None


def questions(contract: GraphContract, length: int) -> list[Question]:
    """Calls to put to the test, by position, within `length`.

    A ring with its first token, a ring before its first turn, the first token to leave the window, the first
    slot to be taken again, and after two turns: the chunk's first tokens, a whole chunk, a padded one, what
    follows a padded one, the chunk's last token.
    """
    window, capacity = contract.ring.sliding_window, contract.ring.capacity
    chunk = contract.ring.prefill_chunk
    late = late_edge(contract, length)
    half = late + max(2, chunk // 2)
    short = min(chunk, _SHORT_CHUNK)
    asked = {
        Question(1, 2),
        Question(chunk, chunk + 1),
        Question(window, window + 1),
        Question(capacity, capacity + 1),
        Question(late, late + 1),
        Question(late, late + chunk),
        Question(late, late + max(1, short // 2), pad_to=short if chunk > 1 else 0),
        Question(late + 1, late + 2),
        Question(late + chunk - 1, late + chunk),
    }
    if half < late + chunk - 1:
        asked.add(Question(half, half + 1, after_padding=True))
    fitting = [question for question in asked if 0 < question.start and question.stop <= length]
    return sorted(fitting, key=lambda question: (question.start, question.width))


def late_edge(contract: GraphContract, length: int) -> int:
    """2R where the sequence gets past it, else its last chunk edge with a chunk to spare."""
    chunk = contract.ring.prefill_chunk
    return min(2 * contract.ring.capacity, max(0, length - chunk) // chunk * chunk)


def pokes(ring: Ring, question: Question, *, neighbours: bool = False) -> list[Poke]:
    """Everything to alter before this call.

    The ring holds positions up to start - 1. What is hidden from a chunk's first query is hidden from all
    of them, because the first sees farthest back. The slots this call writes are hidden too: what was there
    is overwritten before anything is read.
    """
    held = {slot: ring.held_position(slot, question.start - 1) for slot in range(ring.capacity)}
    hidden = {slot for slot, position in held.items() if not ring.visible(question.start, position)}
    named = _edge_slots(ring, question, held)
    if question.width == 1:
        named |= _far_slots(ring, question, held)
        named["every hidden slot"] = hidden
    found = [_alter(name, tuple(sorted(slots)), slots <= hidden) for name, slots in named.items() if slots]
    if hidden:
        found.append(Poke("every hidden slot, garbage", tuple(sorted(hidden)), False, "garbage"))
    if neighbours and question.width == 1:
        every = tuple(range(ring.capacity))
        found.append(Poke("a neighbour's whole ring, garbage", every, False, "garbage", "neighbour"))
    return found


def _alter(name: str, slots: tuple[int, ...], hidden: bool) -> Poke:
    """What must show is altered by far, and in its values alone, so that it keeps its weight: of a window of
    1,500 tokens a bump of the oldest is lost where fp8 rounds what attention gives."""
    return Poke(name, slots, not hidden, "bump" if hidden else "values")


def layer_pokes(contract: GraphContract, question: Question) -> list[Poke]:
    """What is altered in one layer alone.

    For a step the window's oldest slot, in each layer: one that does not see it is hidden by the others.
    For a chunk both sides of its last token's window, in the last layer: below it the chunk's first tokens,
    which see more, would pass it on.
    """
    ring, layers = contract.ring, contract.config.num_hidden_layers
    oldest = question.stop - ring.sliding_window
    inside, outside = (_held_slot(ring, question, position) for position in (oldest, oldest - 1))
    found = []
    if question.width == 1 and inside:
        found += [Poke(f"{_OLDEST}, in layer {i}", inside, True, "values", layer=i) for i in range(layers)]
    elif question.width > 1 and inside:
        name = "the oldest in the last token's window"
        found.append(Poke(name, inside, True, "values", layer=layers - 1, of_last=True))
    if question.width > 1 and outside:
        name = "just outside the last token's window"
        found.append(Poke(name, outside, False, layer=layers - 1, of_last=True))
    return found


def _held_slot(ring: Ring, question: Question, position: int) -> tuple[int, ...]:
    """The slot of a position, where the ring holds it before the call and still does after."""
    held = 0 <= position < question.start and position >= question.start + question.width - ring.capacity
    return (ring.cache_slot(position),) if held else ()


def _edge_slots(ring: Ring, question: Question, held: Mapping[int, int]) -> dict[str, set[int]]:
    """Both sides of the window's old end, and its newest slot."""
    oldest = question.start - ring.sliding_window + 1
    return {
        _OLDEST: _at(held, oldest),
        "q-W, just outside it": _at(held, oldest - 1),
        "q-1, the token before": _at(held, question.start - 1),
    }


def _far_slots(ring: Ring, question: Question, held: Mapping[int, int]) -> dict[str, set[int]]:
    """The oldest slot, those never written and those that only padding wrote."""
    edge = question.start + ring.room_in_chunk(question.start)
    padded = (
        {ring.cache_slot(p) for p in range(question.start + 1, edge)} if question.after_padding else set()
    )
    return {
        "q-R+1, the oldest in the ring": _at(held, question.start - ring.capacity + 1),
        "the slot this call writes": {ring.cache_slot(question.start)},
        "slots never written": {slot for slot, position in held.items() if position < 0} - padded,
        "slots that padding wrote": padded,
    }


def _at(held: Mapping[int, int], position: int) -> set[int]:
    return {slot for slot, p in held.items() if p == position and p >= 0}


def poke_probe(
    cache: RollingCache, asked: Sequence[Question], *, tokens: Sequence[int]
) -> Iterator[PokeResult]:
    """Put every poke to every question, in order, with the ring carried from question to question.

    Where the artifact has two rows, the second is asked while the first idles beside it. The last step that
    is asked about is also asked about each layer, and about the row that idles.
    """
    neighbour = cache.acquire() if cache.capacity_rows > 1 else None
    own = cache.acquire()
    try:
        rest = None if neighbour is None else cache.snapshot(neighbour)
        rows = Rows(cache, own, neighbour, rest)
        last = max((each for each in asked if each.width == 1), key=lambda each: each.start, default=None)
        for question in asked:
            _advance(rows, question, tokens)
            by_layer = question is last or question.width > 1
            more = layer_pokes(cache.contract, question) if by_layer else []
            yield from _put(rows, question, tokens, more=more)
            if question is last and neighbour is not None:
                yield _step_beside(rows, question, tokens)
    finally:
        cache.release(own)
        if neighbour is not None:
            cache.release(neighbour)


def _advance(rows: Rows, question: Question, tokens: Sequence[int]) -> None:
    """Feed what lies before the question."""
    cache, position = rows.cache, rows.cache.position(rows.own)
    ahead = tokens[position : question.start]
    if not ahead:
        return
    if question.after_padding:
        room = cache.contract.ring.room_in_chunk(position)
        cache.append_padded(rows.own, ahead, room, pad_token=tokens[0])
    else:
        cache.append(rows.own, ahead)


def _put(
    rows: Rows, question: Question, tokens: Sequence[int], *, more: Sequence[Poke]
) -> Iterator[PokeResult]:
    """Run the call clean, then once for each poke; leave the row as it was before."""
    cache = rows.cache
    before = cache.snapshot(rows.own)
    clean = _ask(rows, question, tokens)
    for poke in [*pokes(cache.contract.ring, question, neighbours=rows.neighbour is not None), *more]:
        own = before if poke.row == "neighbour" else poked(before, poke)
        cache.restore(rows.own, own)
        if rows.neighbour is not None and rows.rest is not None:
            cache.restore(rows.neighbour, poked(rows.rest, poke) if poke.row == "neighbour" else rows.rest)
        try:
            answer = _ask(rows, question, tokens)
        except NonFiniteLogitsError:  # it saw what was put there, and overflowed
            answer = np.full_like(clean, np.nan)
        yield _judge(question, poke, clean=clean, answer=answer)
    cache.restore(rows.own, before)
    if rows.neighbour is not None and rows.rest is not None:
        cache.restore(rows.neighbour, rows.rest)


def _step_beside(rows: Rows, question: Question, tokens: Sequence[int]) -> PokeResult:
    """Both rows hold the same sequence. What the neighbour says must not depend on whether it idled through a
    step of the other before."""
    cache, own, neighbour, token = rows.cache, rows.own, rows.neighbour, tokens[question.start]
    assert neighbour is not None and rows.rest is not None
    before = cache.snapshot(own)
    cache.restore(neighbour, before)
    clean = cache.step({neighbour: token})[neighbour][None]
    cache.restore(neighbour, before)
    idle_with = (tokens[question.start - 1] + 1) % cache.contract.config.vocab_size
    cache.step({own: token, neighbour: idle_with})  # an idle row is fed its last token: not the one it holds
    cache.restore(own, before)
    cache.restore(neighbour, before)
    cache.step({own: token})
    try:
        answer = cache.step({neighbour: token})[neighbour][None]
    except NonFiniteLogitsError:
        answer = np.full_like(clean, np.nan)
    cache.restore(own, before)
    cache.restore(neighbour, rows.rest)
    poke = Poke("a step of another row, through which the row idled", (), False, row="neighbour")
    return _judge(question, poke, clean=clean, answer=answer)


def _ask(rows: Rows, question: Question, tokens: Sequence[int]) -> Logits:
    """Logits of the call, [stop - start, V]."""
    new = tokens[question.start : question.stop]
    if question.pad_to:
        return rows.cache.append_padded(rows.own, new, question.pad_to, pad_token=tokens[0], all_logits=True)
    if question.width == 1:
        return rows.cache.step({rows.own: new[0]})[rows.own][None]
    return rows.cache.append(rows.own, new, all_logits=True)


def poked(snapshot: RowSnapshot, poke: Poke) -> RowSnapshot:
    """The snapshot with the poke's slots altered in the keys and values of its layers."""
    slots = list(poke.slots)
    rings = []
    for i, ring in enumerate(snapshot.rings):  # [K, R, D], keys and values in turn
        if poke.layer not in (None, i // 2) or (poke.how == "values" and i % 2 == 0):
            rings.append(ring)
            continue
        altered = ring.copy()
        numbers = _numbers(altered)
        if poke.how == "bump":
            numbers[:, slots] += np.asarray(BUMP, numbers.dtype)
        else:
            size = FLOAT16_KEY_GARBAGE if ring.dtype == np.float16 and i % 2 == 0 else GARBAGE
            numbers[:, slots] = np.resize(np.array([size, -size], numbers.dtype), numbers[:, slots].shape)
        rings.append(altered)
    return replace(snapshot, rings=tuple(rings))


def _numbers(ring: RingArray) -> RingArray:
    """The same memory as numbers: the rings of a bf16 engine come as the bits of bfloat16, in uint16."""
    return ring.view(ml_dtypes.bfloat16) if ring.dtype == np.uint16 else ring


def _judge(question: Question, poke: Poke, *, clean: Logits, answer: Logits) -> PokeResult:
    """Compare bit by bit what the poke asks about."""
    asked = slice(-1, None) if poke.of_last else slice(1 if poke.visible else None)
    differs = clean[asked].view(np.uint32) != answer[asked].view(np.uint32)
    return PokeResult(question, poke, int(np.count_nonzero(differs)), differs.size)
