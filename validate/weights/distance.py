"""A stored weight and the checkpoint's → how far apart they are: in bits for floats, in steps for codes."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mistral_trt.contract import DTYPE_BYTES
from mistral_trt.export.conversion import Weight, pieces
from mistral_trt.validate.weights.linear import NEGLIGIBLE, Factor, StoredLinear

ARITHMETIC = 1e-3
"""Steps that float32 arithmetic may add to the distance of a code."""

_INTEGERS = {2: torch.int16, 4: torch.int32}
_ROWS_AT_ONCE = 64  # fits a core's cache


@dataclass(frozen=True)
class CodeDistance:
    """How far codes are from the checkpoint's weight.

    steps: the largest distance, in steps of the scale (E4M3: units of the code's last place).
    wrong: how many are further than they may be.  worst: row and column of the one that is most.
    unused: groups whose largest code is not the last one, as calibration makes it.
    """

    steps: float
    wrong: int
    worst: tuple[int, int]
    unused: int


def cast_error(data: npt.NDArray[np.uint8], weight: Weight, dtype: str) -> str | None:
    """How the bytes of a tensor differ from the checkpoint's in a dtype; None where they do not.

    A merged adapter's sums depend on the processor in the last bit of float32, so there a unit of the last
    place is allowed.
    """
    wrong, worst, end, size = 0, (-1.0, 0, 0.0, 0.0), 0, DTYPE_BYTES[dtype]
    for piece in pieces(weight):
        flat = piece.reshape(-1)
        expected = flat if flat.dtype == getattr(torch, dtype) else flat.float().to(getattr(torch, dtype))
        start, end = end, end + len(expected)
        own = expected.view(torch.uint8).numpy()
        stored = data[start * size : end * size]
        if np.array_equal(stored, own):
            continue
        found = torch.from_numpy(np.array(stored)).view(expected.dtype)
        bad = _different(found, expected, rounded=bool(weight.updates))
        if not bad.any():
            continue
        off = torch.where(bad, (found.float() - expected.float()).abs().nan_to_num(torch.inf), -1.0)
        at = int(off.argmax())
        wrong += int(bad.sum())
        worst = max(worst, (float(off[at]), start + at, float(found[at]), float(expected[at])))
    if not wrong:
        return None
    place = [int(i) for i in np.unravel_index(worst[1], weight.shape)]
    return (
        f"{wrong:,} of {end:,} numbers are not the checkpoint's in {dtype}; the worst, {place}, is "
        f"{worst[2]:.6g} and must be {worst[3]:.6g}"
    )


def _different(found: Tensor, expected: Tensor, *, rounded: bool) -> Tensor:
    """Which numbers differ in their bits, or by more than a unit of the last place."""
    integers = _INTEGERS[found.element_size()]
    bad = found.view(integers) != expected.view(integers)
    if not rounded:
        return bad
    allowed = torch.finfo(found.dtype).eps * expected.float().abs() + 2.0**-22 * expected.float().abs().max()
    return bad & ~((found.float() - expected.float()).abs() <= allowed)


def code_distance(
    linear: StoredLinear, weight: Tensor, *, reads: Factor | None, gives: Factor | None, exact: bool
) -> CodeDistance:
    """Distance of every code from where the checkpoint's weight lies on its grid.

    weight: float32 [out, in].  reads, gives: what the linear's input and output are multiplied by.  exact:
    the codes are the checkpoint's own, and not rounded from its numbers.  What float16 rounds in scales moves
    the grid by a share of each code, and is allowed on top of half a step.
    """
    drift = linear.drift(reads, gives)
    unread = torch.isnan(reads.values) if reads else torch.zeros(weight.shape[1], dtype=torch.bool)
    limit = (0.0 if exact else 0.5) + ARITHMETIC
    found, steps, wrong, worst, unused = (0, 0), 0.0, 0, -1.0, []
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        codes, places = linear.codes[rows].float(), _places(linear, weight[rows], rows, reads, gives)
        step = spacing(linear.codes[rows])
        off = torch.where(unread, 0.0, ((places - codes).abs() / step).nan_to_num(torch.inf))
        beyond = off - drift * codes.abs() / step
        steps, wrong = max(steps, float(off.max())), wrong + int((beyond > limit).sum())
        if float(beyond.max()) > worst:
            worst, at = float(beyond.max()), int(beyond.argmax())
            found = (start + at // codes.shape[1], at % codes.shape[1])
        unused.append(_unused(codes, places.nan_to_num(0.0), linear.scale[rows], linear.bound))
    short = torch.cat(unused)
    return CodeDistance(
        steps, wrong, found, 0 if exact else int(short.all() if linear.whole else short.sum())
    )


def _places(
    linear: StoredLinear, weight: Tensor, rows: slice, reads: Factor | None, gives: Factor | None
) -> Tensor:
    """Where some rows of the weight lie on the grid of codes: float32 [n, in]."""
    scale = linear.scale[rows] if gives is None else linear.scale[rows] / gives.values[rows, None]
    target = weight if reads is None else weight / reads.values
    return (target.reshape(*scale.shape, -1) / scale[:, :, None]).view(weight.shape)


def _unused(codes: Tensor, places: Tensor, scale: Tensor, bound: float) -> Tensor:
    """Which groups of some rows stop short of the last code, though not all zero: bool [n, groups]."""
    blocks = (*scale.shape, -1)
    present = places.view(blocks).abs().amax(-1) * scale > NEGLIGIBLE
    return present & (codes.view(blocks).abs().amax(-1) < bound)


def spacing(codes: Tensor) -> Tensor:
    """Distance between neighbouring codes: 1, or in E4M3 the unit of the last place.  448.0 -> 32.0"""
    if codes.dtype == torch.int8:
        return torch.ones(())
    exponent = torch.frexp(codes.float().abs().clamp(min=2.0**-6)).exponent - 1
    return torch.ldexp(torch.ones(exponent.shape), exponent - 3)
