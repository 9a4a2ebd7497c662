"""A file of an artifact → its bytes, mapped, and known to be those of the manifest."""

import hashlib
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mistral_trt.errors import ManifestError
from mistral_trt.manifest import Manifest, repair_command

_HASHED_AT_ONCE = 1 << 24


@contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """The bytes of a file, read only as they are touched."""
    with path.open("rb") as file:
        if path.stat().st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
                yield view
        else:  # which no mapping can be made of
            yield memoryview(b"")


def require_hash(data: memoryview, folder: Path, name: str, manifest: Manifest) -> None:
    """Raise ManifestError unless `data` is what the manifest says of the file `name`."""
    entry = manifest.files.get(name)
    if entry is None or sha256(data) != entry.sha256:
        said = "is not among the manifest's files" if entry is None else "was altered after it was made"
        repair = repair_command(folder, manifest.stage, manifest.details)
        raise ManifestError(
            f"{folder / name} {said}"
            + (" (its SHA-256 differs from the manifest's)" if entry else "")
            + f"; make the folder again with: {repair}"
        )


@contextmanager
def hashed_file(folder: Path, name: str, manifest: Manifest) -> Iterator[memoryview]:
    """The bytes of a file of an artifact, once they are known to be the manifest's.

    Raises ManifestError if they are not.
    """
    with mapped(folder / name) as data:
        require_hash(data, folder, name, manifest)
        yield data


def sha256(data: memoryview) -> str:
    """Hash bytes from first to last, in pieces large enough to leave other threads the interpreter."""
    digest = hashlib.sha256()
    for start in range(0, len(data), _HASHED_AT_ONCE):
        digest.update(data[start : start + _HASHED_AT_ONCE])
    return digest.hexdigest()
