"""Ring geometry → the positions where a ring would break."""

from dataclasses import dataclass

from mistral_trt.contract import GraphContract


@dataclass(frozen=True)
class Probe:
    """A position where a ring would break."""

    name: str
    position: int


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
