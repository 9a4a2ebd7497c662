"""A safetensors file → where each tensor's bytes lie.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the header's length, little
endian; the header, JSON, tensor name → dtype, shape, [begin, end); then the bytes. A header is checked in
full before anything is read through it: a tensor must lie inside the file, be as long as its shape says,
and share no byte with another.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_trt.errors import CheckpointError

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors dtype → ours. Anything else in a Mistral checkpoint is not a plain weight."""

_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
    "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: bytes [offset, offset + bytes) of `path`, row-major, little endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one file by name. Raises CheckpointError saying what in the header is wrong."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = _header_length(path, file.read(8), size)
            text = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    header = _parse_header(path, text)
    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    tensors = {name: _tensor(path, name, entry, data_start) for name, entry in header.items()}
    _check_layout(path, list(tensors.values()), data_start, size)
    return tensors


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise CheckpointError(f"{path} is not a safetensors file: {size} bytes, shorter than a header")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(_MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{path} is not a whole safetensors file: its header claims {length} bytes, the file has {size}"
        )
    return int(length)


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: the header names {twice!r} twice")
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header must be an object, found {type(header).__name__}")
    return header


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: {name!r} must have dtype, shape and data_offsets, found {entry!r}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{path}: {name!r} has the unknown dtype {dtype!r}")
    if not _naturals(shape):
        raise CheckpointError(f"{path}: {name!r} has the shape {shape!r}; expected whole numbers >= 0")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: {name!r} has the data_offsets {offsets!r}; expected [begin, end]")
    length = offsets[1] - offsets[0]
    expected = math.prod(shape) * _ITEM_BYTES[dtype]
    if length != expected:
        raise CheckpointError(
            f"{path}: {name!r} has {length} bytes, but {dtype} of shape {shape} takes {expected}"
        )
    return StoredTensor(name, DTYPES.get(dtype, dtype), tuple(shape), path, data_start + offsets[0], length)


def _check_layout(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    position = data_start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.bytes)):
        if tensor.offset < position:
            raise CheckpointError(f"{path}: {tensor.name!r} overlaps the tensor before it")
        position = tensor.offset + tensor.bytes
        if position > size:
            raise CheckpointError(
                f"{path} is truncated: {tensor.name!r} ends at byte {position}, the file at byte {size}"
            )


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
