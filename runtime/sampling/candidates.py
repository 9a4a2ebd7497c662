"""Logits → the tokens that may be drawn and their weights, by temperature, top_k, top_p, min_p; and the draw.

The vocabulary is not sorted. top_p looks for the border of its set in a histogram of the logits and sorts
what lies around that border; where rounding could decide, it falls back to the plain statement of the rule,
so the set always is that of `top_p_by_sorting`.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float32]
Weights = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

_SORTED_AT_MOST = 1024
_BINS = 1024
_BLOCK = 256
_COLUMN = 32
_SLACK = 1e-10
"""Relative: far above the rounding of a float64 sum over any vocabulary, far below a token that matters."""


@dataclass(frozen=True)
class Candidates:
    """Tokens that may be drawn.

    ids: [n], ascending; None for 0…n-1.  weights: float64 [n], proportional to the probabilities; a token of
    weight 0 is never drawn.
    """

    ids: Ids | None
    weights: Weights

    def draw(self, uniform: float) -> int:
        """The token at this share, in [0, 1), of the weights summed in the order of ids."""
        sums = np.cumsum(np.add.reduceat(self.weights, np.arange(0, len(self.weights), _BLOCK)))
        share = uniform * float(sums[-1])
        block = _first_above(sums, share)
        start = block * _BLOCK
        inner = np.cumsum(self.weights[start : start + _BLOCK])
        place = start + _first_above(inner, share - float(sums[block - 1]) if block else share)
        return place if self.ids is None else int(self.ids[place])


class Workspace:
    """Room for one thread's sums over the vocabulary, 41 bytes a token; sequences may share it in turn."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.logits = np.empty(size, np.float32)
        self.distance = np.empty(size, np.float32)
        self.weights = np.empty(size, np.float64)
        self.near_logits = np.empty(size, np.float32)
        self.near_weights = np.empty(size, np.float64)
        self.flags = np.empty(size, np.bool_)
        self.bins = np.empty(size, np.intp)
        self.every_id = np.arange(size, dtype=np.int32)


@dataclass(frozen=True)
class Truncation:
    """The rules that cut the tail.

    temperature: > 0.  top_k: 0 keeps all.  top_p: 1 keeps all.  min_p: 0 keeps all.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float

    def candidates(self, logits: Floats, room: Workspace) -> Candidates:
        """Apply top_k, then top_p among those, then min_p among those.

        logits: float32 [at most room.size], at least one finite and none NaN or +inf.  The result is valid
        until `room` is used again.
        """
        ids = None
        if 0 < self.top_k < len(logits):
            ids = largest(logits, self.top_k)
            logits = logits[ids]
        found = Candidates(ids, self._softmax(logits, room))
        if self.top_p < 1:
            found = self._nucleus(logits, found, room)
        if self.min_p > 0:  # p >= min_p * p_max, and the largest weight is 1
            np.multiply(found.weights, found.weights >= self.min_p, out=found.weights)
        return found

    def _softmax(self, logits: Floats, room: Workspace) -> Weights:
        """exp((logit - largest) / temperature), not divided by its sum."""
        weights = room.weights[: len(logits)]
        np.copyto(weights, logits)
        np.subtract(weights, float(logits.max()), out=weights)
        with np.errstate(over="ignore"):  # a tiny temperature: all but the most likely go to zero
            np.multiply(weights, min(1 / self.temperature, 1e300), out=weights)
        return np.exp(weights, out=weights)

    def _nucleus(self, logits: Floats, found: Candidates, room: Workspace) -> Candidates:
        """The fewest most likely tokens whose weights sum to top_p of the total or more."""
        weights, flags = found.weights, room.flags[: len(logits)]
        total = float(weights.sum())
        # Tokens below this sum to less than half of what may be left out: none of them is in the set.
        least = (1 - self.top_p) * total / (2 * len(weights))
        count = int(np.count_nonzero(np.greater_equal(weights, least, out=flags)))
        ids, likely, near = found.ids, logits, weights
        if count < len(weights) // 2:
            chosen = np.flatnonzero(flags)
            ids = chosen if ids is None else ids[chosen]
            likely = np.take(logits, chosen, out=room.near_logits[:count], mode="clip")
            near = np.take(weights, chosen, out=room.near_weights[:count], mode="clip")
        lowest = float(logits.max()) + self.temperature * math.log(least)
        kept = _prefix(likely, near, self.top_p * total, _SLACK * total, lowest, room)
        if kept is None:
            flags.fill(False)
            flags[top_p_by_sorting(logits, weights, self.top_p)] = True
            return Candidates(found.ids, np.multiply(weights, flags, out=weights))
        return Candidates(ids, np.multiply(near, kept, out=near))


def _prefix(
    logits: Floats, weights: Weights, target: float, slack: float, lowest: float, room: Workspace
) -> Flags | None:
    """Which tokens make up `target`, most likely first; None if that is closer than `slack`."""
    border, above = _border(logits, weights, target, lowest, room)
    border = border[np.argsort(-logits[border], kind="stable")]
    sums = above + np.cumsum(weights[border])
    last = int(np.searchsorted(sums, target))
    if last == len(sums):
        return None
    before = float(sums[last - 1]) if last else above
    if sums[last] - target <= slack or target - before <= slack:
        return None
    kept: Flags = np.greater(logits, logits[border[0]], out=room.flags[: len(logits)])
    kept[border[: last + 1]] = True
    return kept


def _border(
    logits: Floats, weights: Weights, target: float, lowest: float, room: Workspace
) -> tuple[Ids, float]:
    """A run of neighbours in likelihood within which the sum reaches `target`, and the weight above it.

    lowest: about where the sum must have been reached; the histogram need not look further down.
    """
    border, above = room.every_id[: len(logits)], 0.0
    while len(logits) > _SORTED_AT_MOST:
        highest = logits.max()
        least = float(logits.min())
        span = float(highest) - max(lowest, least)
        if not 1e-20 < span < 1e30:  # ties, or a span that float32 cannot divide
            break
        bins = _bins(logits, highest, span, room, clipped=least < lowest)
        sums = np.cumsum(np.bincount(bins, weights=weights, minlength=_BINS))
        place = min(int(np.searchsorted(sums, target - above)), _BINS - 1)
        above += float(sums[place - 1]) if place else 0.0
        inside = np.flatnonzero(bins == place)
        border, logits, weights = border[inside], logits[inside], weights[inside]
    return border, above


def _bins(
    logits: Floats, highest: np.float32, span: float, room: Workspace, *, clipped: bool
) -> npt.NDArray[np.intp]:
    """Which of _BINS equal parts of [highest - span, highest] each logit is in, from above."""
    distance, bins = room.distance[: len(logits)], room.bins[: len(logits)]
    with np.errstate(over="ignore"):
        np.subtract(highest, logits, out=distance)
    if clipped:
        np.minimum(distance, np.float32(span), out=distance)
    distance *= np.float32((_BINS - 1) / span)
    np.copyto(bins, distance, casting="unsafe")
    return bins


def top_p_by_sorting(logits: Floats, weights: Weights, top_p: float) -> Ids:
    """The rule of top_p as it stands, in float64: most likely first, of equal ones the lower id first."""
    order = np.argsort(-logits, kind="stable")
    sums = np.cumsum(weights[order])
    return order[: int(np.searchsorted(sums, top_p * sums[-1])) + 1]


def largest(logits: Floats, count: int) -> Ids:
    """Ids of the `count` largest, in ascending order of id; of equal ones at the border the lower ids."""
    columns = len(logits) // _COLUMN
    if count <= columns:  # as many logits are not below the count-th largest maximum of a column
        tops = logits[: columns * _COLUMN].reshape(_COLUMN, columns).max(axis=0)
        ids = np.flatnonzero(logits >= np.partition(tops, columns - count)[columns - count])
        logits = logits[ids]
    else:
        ids = np.arange(len(logits))
    least = np.partition(logits, len(logits) - count)[len(logits) - count]
    kept = logits > least
    ties = np.flatnonzero(logits == least)
    kept[ties[: count - int(np.count_nonzero(kept))]] = True
    found: Ids = ids[kept]
    return found


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else (Philox, a counter-based generator)."""
    key = seed | index << 64
    return float(np.random.Generator(np.random.Philox(key=key, counter=position)).random())


def _first_above(sums: Weights, share: float) -> int:
    """The first place whose sum is above `share`; rounding never leads past the last weight that counts."""
    return int(np.searchsorted(sums, min(share, np.nextafter(sums[-1], 0)), side="right"))
