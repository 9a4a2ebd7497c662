"""One decoder weight → its numbers in a target dtype, piece by piece.

A weight is a stored tensor and what has to happen to it on the way: rows brought into another order,
low-rank updates added. Memory is a few pieces, whatever the weight's size. On its way every number is
held against what the target dtype can say: see `Census`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import numpy as np
import torch

from mistral_trt.contract import DTYPE_BYTES
from mistral_trt.errors import CheckpointError
from mistral_trt.export.stored_codes import StoredCodes
from mistral_trt.export.tensor_files import StoredTensor

PIECE_ELEMENTS = 1 << 20  # of 4 bytes at most: what a core's cache still holds
_COUNTED_AT_ONCE = 1 << 17  # fits a core's cache several times over
_BITS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}


@dataclass(frozen=True)
class LowRankUpdate:
    """scale * left @ right, added to a weight [rows, columns]; the factors lie as an adapter stores them.

    left: [rows, rank].  right: [rank, columns].  transposed: they are stored as [rank, rows] and
    [columns, rank] instead (LoRA on an embedding).
    """

    left: StoredTensor
    right: StoredTensor
    scale: float
    transposed: bool = False


@dataclass(frozen=True)
class Weight:
    """One weight of the decoder under Hugging Face's name.

    interleaved_heads: 0, or the number of heads whose rows are stored with the two halves of each rotary
    pair side by side (Mistral's own format) and have to be brought into Hugging Face's order.
    updates: added in float32 after that.  codes: of a weight that is stored quantized; `stored` is then what
    they are packed into.
    """

    name: str
    stored: StoredTensor
    interleaved_heads: int = 0
    updates: tuple[LowRankUpdate, ...] = ()
    codes: StoredCodes | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape if self.codes else self.stored.shape

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def untouched(self) -> bool:
        """Whether the stored bytes are the weight as they lie."""
        return not self.interleaved_heads and not self.updates and self.codes is None


@dataclass
class Counts:
    """Numbers of one weight that the target dtype cannot say well.

    non_finite: NaN or infinite before conversion.  overflow: finite before, infinite after.
    subnormal: not zero, below the smallest normal number after; such a number has lost precision.
    flushed_to_zero: zero after, not before.
    """

    non_finite: int = 0
    overflow: int = 0
    subnormal: int = 0
    flushed_to_zero: int = 0


@dataclass
class Census:
    """What converting all weights to `dtype` did to them; weights without a hazard are left out."""

    dtype: str
    by_weight: dict[str, Counts] = field(default_factory=dict)

    def take(self, name: str, piece: torch.Tensor) -> None:
        """Count one piece of a weight, before its conversion. Raises CheckpointError for what has no value.

        The counts are made on bit patterns: of two positive floats the larger has the larger pattern.
        """
        edges = _edges(str(piece.dtype).removeprefix("torch."), self.dtype)
        signed, unsigned = _BITS[piece.element_size()]
        magnitudes = piece.reshape(-1).view(signed).numpy().view(unsigned)
        found = Counts()
        for start in range(0, len(magnitudes), _COUNTED_AT_ONCE):
            block = magnitudes[start : start + _COUNTED_AT_ONCE] & edges.magnitude
            if block.max() >= edges.infinite_after:
                found.non_finite += int(np.count_nonzero(block >= edges.infinite))
                found.overflow += int(np.count_nonzero(block >= edges.infinite_after)) - found.non_finite
            small = block[block < edges.normal_after]
            found.subnormal += int(np.count_nonzero(small >= edges.nonzero_after))
            found.flushed_to_zero += int(np.count_nonzero((small < edges.nonzero_after) & (small != 0)))
        if found.non_finite or found.overflow:
            _refuse(name, piece, found, self.dtype)
        if found != Counts():
            total = self.by_weight.setdefault(name, Counts())
            for counted in fields(Counts):
                total.__dict__[counted.name] += getattr(found, counted.name)

    def to_json(self) -> dict[str, Any]:
        """Totals, and the weight with the most numbers below the dtype's normal range."""
        totals = {
            counted.name: sum(getattr(counts, counted.name) for counts in self.by_weight.values())
            for counted in fields(Counts)
        }
        worst = max(
            self.by_weight,
            key=lambda name: self.by_weight[name].subnormal + self.by_weight[name].flushed_to_zero,
            default=None,
        )
        return {"dtype": self.dtype, **totals, "worst": worst}


@dataclass(frozen=True)
class _Edges:
    """Bit patterns of a source dtype where the target's answer changes.

    magnitude: all bits but the sign.  infinite: the source's own infinity.  …_after: the least positive
    pattern that the target holds as non-zero, as a normal number, as infinity.
    """

    magnitude: int
    infinite: int
    nonzero_after: int
    normal_after: int
    infinite_after: int


@cache
def _edges(source: str, target: str) -> _Edges:
    dtype, info = getattr(torch, source), torch.finfo(getattr(torch, target))
    integers, _ = _BITS[dtype.itemsize]

    def bits(value: float) -> int:
        return int(torch.tensor(value, dtype=dtype).view(integers))

    def least(bound: float) -> int:
        """The first pattern whose conversion reaches `bound`, by bisection."""
        low, high = 0, bits(torch.inf)
        while low < high:
            middle = (low + high) // 2
            value = torch.tensor(middle, dtype=integers).view(dtype).to(getattr(torch, target))
            low, high = (low, middle) if value.double() >= bound else (middle + 1, high)
        return low

    magnitude = (1 << (8 * dtype.itemsize - 1)) - 1
    smallest = float(info.smallest_normal) * float(info.eps)
    return _Edges(magnitude, bits(torch.inf), least(smallest), least(info.smallest_normal), least(torch.inf))


def pieces(weight: Weight) -> Iterator[torch.Tensor]:
    """A weight's numbers in order, a few megabytes at a time.

    In the stored dtype, or in float32 where updates were added or codes multiplied by their scales. Raises
    CheckpointError for a file that ends too early.
    """
    if weight.codes is not None:
        yield from _dequantized(weight.codes)
        return
    with weight.stored.path.open("rb") as file:
        if weight.untouched:
            for start in range(0, weight.elements, PIECE_ELEMENTS):
                yield _read(file, weight.stored, start, min(PIECE_ELEMENTS, weight.elements - start))
            return
        rows, columns = weight.shape
        head_rows = rows // weight.interleaved_heads if weight.interleaved_heads else 1
        step = max(1, PIECE_ELEMENTS // (columns * head_rows)) * head_rows
        factors = [_factors(update) for update in weight.updates]
        for start in range(0, rows, step):
            count = min(step, rows - start)
            block = _read(file, weight.stored, start * columns, count * columns).view(count, columns)
            if weight.interleaved_heads:
                block = halves_from_pairs(block, head_rows)
            for left, right, scale in factors:
                block = block.float().addmm(left[start : start + count], right, alpha=scale)
            yield block


def convert(weight: Weight, dtype: str, census: Census) -> Iterator[memoryview]:
    """The weight's bytes in `dtype`, rounded to nearest even, in pieces of a few megabytes.

    Raises CheckpointError for a number that is not finite, before or after.
    """
    for piece in pieces(weight):
        census.take(weight.name, piece)
        if piece.dtype == torch.bfloat16 and dtype == "float16":
            piece = piece.float()  # exact, and faster than in one step
        yield piece.to(getattr(torch, dtype)).contiguous().view(-1).view(torch.uint8).numpy().data


def read_whole(stored: StoredTensor) -> torch.Tensor:
    """A stored tensor in memory."""
    with stored.path.open("rb") as file:
        return _read(file, stored, 0, stored.elements).view(stored.shape)


def read_float32(weight: Weight) -> torch.Tensor:
    """A weight in memory, float32."""
    whole = torch.empty(weight.elements)
    end = 0
    for piece in pieces(weight):
        whole[end : end + piece.numel()] = piece.reshape(-1)
        end += piece.numel()
    return whole.view(weight.shape)


def halves_from_pairs(rows: torch.Tensor, head_rows: int) -> torch.Tensor:
    """Rows of whole heads from Mistral's rotary order to Hugging Face's.

    Mistral rotates rows 2j and 2j + 1 of a head against each other, Hugging Face rows j and j + D/2.
    rows: [heads * D, columns].  head_rows: D.
    D = 4:  rows 0 1 2 3 -> 0 2 1 3
    """
    split = rows.view(-1, head_rows // 2, 2, rows.shape[1])  # [heads, pairs, 2, columns]
    return split.transpose(1, 2).reshape(rows.shape)


def _dequantized(stored: StoredCodes) -> Iterator[torch.Tensor]:
    """codes * scales, a block of rows at a time: float32 [rows, columns]."""
    codes, scales = torch.from_numpy(stored.codes()), torch.from_numpy(stored.scales())
    rows, columns = stored.shape
    step = max(1, PIECE_ELEMENTS // columns)
    for start in range(0, rows, step):
        block = codes[start : start + step].float().view(-1, scales.shape[1], columns // scales.shape[1])
        yield (block * scales[start : start + step, :, None]).view(-1, columns)


def _factors(update: LowRankUpdate) -> tuple[torch.Tensor, torch.Tensor, float]:
    left, right = read_whole(update.left).float(), read_whole(update.right).float()
    return (left.T, right.T, update.scale) if update.transposed else (left, right, update.scale)


def _read(file: Any, stored: StoredTensor, start: int, count: int) -> torch.Tensor:
    """`count` elements from element `start` on. Read, not mapped: a file cut short is then an error."""
    item = DTYPE_BYTES[stored.dtype]
    buffer = torch.empty(count, dtype=getattr(torch, stored.dtype))
    file.seek(stored.offset + start * item)
    if file.readinto(buffer.view(torch.uint8).numpy().data) != count * item:
        raise CheckpointError(f"{stored.path} became shorter while it was read: {stored.name!r} is cut off")
    return buffer


def _refuse(name: str, piece: torch.Tensor, found: Counts, dtype: str) -> None:
    if found.non_finite:
        raise CheckpointError(f"{name} holds NaN or infinity: the checkpoint is damaged")
    largest, limit = piece.abs().max().item(), torch.finfo(getattr(torch, dtype)).max
    wider = "fp32" if dtype == "bfloat16" else "bf16"
    raise CheckpointError(
        f"{name} holds {largest:.6g}, which overflows {dtype} (largest: {limit:g}); use --precision {wider}"
    )


def same_numbers(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two stored tensors hold the same bytes."""
    if (a.shape, a.dtype) != (b.shape, b.dtype) or a.dtype not in DTYPE_BYTES:
        return False
    pairs = zip(pieces(Weight(a.name, a)), pieces(Weight(b.name, b)), strict=True)
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)
