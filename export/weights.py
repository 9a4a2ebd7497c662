"""Checkpoint tensors → `model.onnx.data`, converted on the way and bound to the graph by name.

Weights stream: a piece of a tensor is mapped, converted, hashed and written before the next is touched,
so memory does not grow with the model.
"""

import hashlib
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from mistral_trt.contract import DTYPE_BYTES
from mistral_trt.errors import CheckpointError, ExportError
from mistral_trt.export.tensor_files import StoredTensor
from mistral_trt.progress import track

DATA_NAME = "model.onnx.data"
ALIGNMENT_BYTES = 4096
_PIECE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class PlacedTensor:
    """Where a converted tensor lies in the data file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


def place_tensors(tensors: Mapping[str, StoredTensor], dtype: str) -> list[PlacedTensor]:
    """Lay the tensors out one after the other, each on a page edge so that it can be mapped."""
    placed, offset = [], 0
    for name, tensor in tensors.items():
        size = tensor.elements * DTYPE_BYTES[dtype]
        placed.append(PlacedTensor(name, dtype, tensor.shape, offset, size))
        offset += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return placed


def data_bytes(placed: list[PlacedTensor]) -> int:
    """Size of the data file."""
    return placed[-1].offset + placed[-1].bytes


def write_weights(tensors: Mapping[str, StoredTensor], placed: list[PlacedTensor], path: Path) -> str:
    """Write the data file and return its SHA-256.

    Raises CheckpointError for a weight that is not finite, or not finite in the target dtype.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file, track("weights", data_bytes(placed), unit="bytes") as advance:
        for target in placed:
            padding = bytes(target.offset - file.tell())
            file.write(padding)
            digest.update(padding)
            for piece in convert(tensors[target.name], target.dtype):
                file.write(piece)
                digest.update(piece)
                advance(len(piece))
    return digest.hexdigest()


def convert(tensor: StoredTensor, dtype: str) -> Iterator[memoryview]:
    """The tensor's bytes in `dtype`, rounded to nearest even, in pieces of a few megabytes.

    A piece is valid until the next is asked for.
    """
    source, target = getattr(torch, tensor.dtype), getattr(torch, dtype)
    item = DTYPE_BYTES[tensor.dtype]
    skipped = tensor.offset % mmap.ALLOCATIONGRANULARITY
    with tensor.path.open("rb") as file:
        length = tensor.bytes + skipped
        with mmap.mmap(
            file.fileno(), length, access=mmap.ACCESS_COPY, offset=tensor.offset - skipped
        ) as view:
            for start in range(0, tensor.elements, _PIECE_ELEMENTS):
                count = min(_PIECE_ELEMENTS, tensor.elements - start)
                piece = torch.frombuffer(view, dtype=source, count=count, offset=skipped + start * item)
                converted = piece.to(target)
                _require_finite(tensor.name, piece, converted, dtype)
                yield converted.view(torch.uint8).numpy().data
                del piece, converted


def bind_weights(model: ir.Model, placed: list[PlacedTensor]) -> None:
    """Point the graph's initializers at the data file. Raises ExportError unless they match one to one."""
    waiting = {name for name, value in model.graph.initializers.items() if value.const_value is None}
    names = {target.name for target in placed}
    if waiting != names:
        raise ExportError(f"graph and checkpoint disagree on the weights: {sorted(waiting ^ names)}")
    for target in placed:
        value = model.graph.initializers[target.name]
        shape = tuple(value.shape or ())
        if shape != target.shape:
            raise ExportError(f"{target.name}: the graph has shape {shape}, the checkpoint {target.shape}")
        value.const_value = ir.ExternalTensor(
            DATA_NAME,
            target.offset,
            target.bytes,
            ir.DataType[{"float32": "FLOAT"}.get(target.dtype, target.dtype.upper())],
            shape=ir.Shape(target.shape),
            name=target.name,
        )


def _require_finite(name: str, before: torch.Tensor, after: torch.Tensor, dtype: str) -> None:
    # The largest magnitude is NaN or infinite if any is, and is found 60 times faster than isfinite().all().
    if math.isfinite(after.abs().max().item()):
        return
    found, largest = before.abs().max().item(), torch.finfo(after.dtype).max
    if not math.isfinite(found):
        raise CheckpointError(f"{name} holds NaN or infinity: the checkpoint is damaged")
    wider = "fp32" if dtype == "bfloat16" else "bf16"
    raise CheckpointError(
        f"{name} holds {found:.6g}, which overflows {dtype} (largest: {largest:g}); use --precision {wider}"
    )
