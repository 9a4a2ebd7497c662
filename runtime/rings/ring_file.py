"""One row's ring ↔ a file: what a session is saved to, and where idle rings go beyond host memory.

The file is a magic line, the length of a JSON header (8 bytes, little-endian), the header, the rings one
after the other as raw bytes, and the SHA-256 of all of that. Nothing in it is executed. It appears under its
name whole or not at all.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mistral_trt.contract import GraphContract
from mistral_trt.errors import SessionError
from mistral_trt.runtime.backend import RingArray
from mistral_trt.runtime.cache import RowSnapshot

FORMAT_VERSION = 1

_MAGIC = b"mistral-trt ring\n"
_HEADER_LIMIT_BYTES = 1 << 28
_STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
"""Cache dtype → how its bits are stored: numpy has no bfloat16."""


@dataclass(frozen=True)
class RingFile:
    """What is in one.  state: None for a session that has fed nothing.  details: the session's own."""

    state: RowSnapshot | None
    details: Mapping[str, Any]


def write_ring(
    path: Path,
    contract: GraphContract,
    artifact_sha256: str,
    state: RowSnapshot | None,
    details: Mapping[str, Any],
) -> None:
    """Write a ring, atomically.  details: anything JSON can hold.  Raises OSError."""
    header = {
        "format_version": FORMAT_VERSION,
        "artifact": artifact_sha256,
        **_layout(contract),
        "position": 0 if state is None else state.position,
        "tainted": state is not None and state.tainted,
        "holds_ring": state is not None,
        "details": dict(details),
    }
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            _write(file, header, () if state is None else state.rings)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_ring(path: Path, contract: GraphContract, artifact_sha256: str) -> RingFile:
    """Read one back. Raises SessionError for a file of another artifact, or one that is not whole."""
    try:
        with path.open("rb") as file:
            return _read(file, path, contract, artifact_sha256)
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {error.strerror}") from error


def _layout(contract: GraphContract) -> dict[str, Any]:
    """What of the rings must be equal in the file and in the artifact that reads it."""
    spec = contract.past()[0]
    return {"dtype": contract.cache_dtype, "shape": list(spec.shape[1:]), "rings": len(contract.past())}


def _write(file: BinaryIO, header: Mapping[str, Any], rings: tuple[RingArray, ...]) -> None:
    digest = hashlib.sha256()
    text = json.dumps(header, separators=(",", ":")).encode()
    lead = _MAGIC + len(text).to_bytes(8, "little") + text
    digest.update(lead)
    file.write(lead)
    for ring in rings:
        data = np.ascontiguousarray(ring).reshape(-1).view(np.uint8).data
        digest.update(data)
        file.write(data)
    file.write(digest.digest())


def _read(file: BufferedReader, path: Path, contract: GraphContract, artifact_sha256: str) -> RingFile:
    lead, header = _read_header(file, path)
    _require_fits(header, path, contract, artifact_sha256)
    digest = hashlib.sha256(lead)
    rings = []
    dtype: np.dtype[Any] = _STORED[contract.cache_dtype]
    shape: tuple[int, ...] = tuple(header["shape"])
    for _ in range(header["rings"] if header["holds_ring"] else 0):
        ring = np.empty(shape, dtype)
        data = ring.reshape(-1).view(np.uint8).data
        if file.readinto(data) != len(data):
            raise _damaged(path, "it ends too early")
        digest.update(data)
        rings.append(ring)
    if file.read(digest.digest_size + 1) != digest.digest():
        raise _damaged(path, "its SHA-256 differs from the one at its end")
    details = header["details"]
    if not header["holds_ring"]:
        return RingFile(None, details)
    return RingFile(RowSnapshot(header["position"], tuple(rings), header["tainted"]), details)


def _read_header(file: BufferedReader, path: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes up to the rings, and the header among them."""
    lead = file.read(len(_MAGIC) + 8)
    if not lead.startswith(_MAGIC) or len(lead) < len(_MAGIC) + 8:
        raise SessionError(f"{path} is not a saved session; expected a file that Session.save wrote")
    size = int.from_bytes(lead[len(_MAGIC) :], "little")
    text = file.read(size) if size <= _HEADER_LIMIT_BYTES else b""
    if len(text) != size:
        raise _damaged(path, "its header is not whole")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not JSON") from error
    if not isinstance(header, dict) or header.get("format_version") != FORMAT_VERSION:
        found = header.get("format_version") if isinstance(header, dict) else header
        raise SessionError(
            f"{path}: expected format_version {FORMAT_VERSION} of a saved session, found {found!r}; save it "
            "again with this version"
        )
    return lead + text, header


def _require_fits(
    header: Mapping[str, Any], path: Path, contract: GraphContract, artifact_sha256: str
) -> None:
    if header.get("artifact") != artifact_sha256:
        raise SessionError(
            f"{path} was saved with another artifact (manifest SHA-256 {str(header.get('artifact'))[:12]}…, "
            f"this one's is {artifact_sha256[:12]}…); its keys and values mean nothing to this model: load "
            "the engine it was saved with"
        )
    for name, expected in _layout(contract).items():
        if header.get(name) != expected:
            raise _damaged(path, f"{name} must be {expected}, found {header.get(name)!r}")
    position = header.get("position")
    if not isinstance(position, int) or position < 0 or not isinstance(header.get("details"), dict):
        raise _damaged(path, f"position {position!r} or the details are not what they must be")
    if not isinstance(header.get("tainted"), bool) or not isinstance(header.get("holds_ring"), bool):
        raise _damaged(path, "tainted and holds_ring must be true or false")


def _damaged(path: Path, why: str) -> SessionError:
    return SessionError(
        f"{path} is damaged: {why}; it was cut short or altered after it was saved, so save the session again"
    )
