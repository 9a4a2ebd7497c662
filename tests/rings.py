"""A rolling buffer that is literally written: the brute force behind the laws of the ring."""

from collections.abc import Iterator
from dataclasses import dataclass

from hypothesis import strategies as st

from mistral_trt.contract import Ring


@dataclass(frozen=True)
class Call:
    """One call of the graph: `tokens` real tokens from position `start`, padded to `width`.

    tokens = 0: a row that idles while others run; what it writes is padding.
    """

    start: int
    tokens: int
    width: int


def simulate(ring: Ring, history: list[Call]) -> Iterator[tuple[Call, list[int | None]]]:
    """Write each call's positions, padding included, into a list; yield the list after each call."""
    slots: list[int | None] = [None] * ring.capacity
    for call in history:
        for position in range(call.start, call.start + call.width):
            slots[ring.cache_slot(position)] = position
        yield call, slots


@st.composite
def calls(draw: st.DrawFn, ring: Ring) -> list[Call]:
    """A sequence fed in any chunks that the rules allow, until it has wrapped more than twice."""
    history: list[Call] = []
    position = 0
    while position < 3 * ring.capacity and len(history) < 60:
        width = draw(st.integers(1, ring.room_in_chunk(position)))
        tokens = draw(st.integers(0, width))
        history.append(Call(position, tokens, width))
        position += tokens
    return history


def full_chunks(ring: Ring, first: int = 3, end: int = 60) -> list[Call]:
    """A short call and then the longest ones that are allowed."""
    history = [Call(0, first, first)]
    while (position := history[-1].start + history[-1].width) < end:
        room = ring.room_in_chunk(position)
        history.append(Call(position, room, room))
    return history
