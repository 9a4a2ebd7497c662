"""A folder that appears whole or not at all.

An artifact is written into a hidden folder beside its place and moved there in one rename when its
manifest, the last file, is on disk. A killed run leaves a hidden folder that the next run removes.
"""

import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mistral_trt.errors import ArtifactError

MANIFEST_NAME = "manifest.json"

_CANNOT_LINK = {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}


def cache_folder() -> Path:
    """Where this package keeps what it can make again: $XDG_CACHE_HOME/mistral-trt."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mistral-trt"


def free_disk_bytes(out: Path) -> int:
    """Free bytes where `out`, which need not exist yet, will be written."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def require_space(out: Path, needed_bytes: int, remedy: str = "free some or choose another --out") -> None:
    """Raise ArtifactError if the disk under `out` has less than `needed_bytes` free."""
    free = free_disk_bytes(out)
    if free < needed_bytes:
        raise ArtifactError(
            f"{out} needs {needed_bytes / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; {remedy}"
        )


def require_apart(out: Path, source: Path) -> None:
    """Raise ArtifactError if writing `out` would replace the folder it is made from."""
    target, origin = out.resolve(), source.resolve()
    if target == origin or target in origin.parents:
        raise ArtifactError(f"{out} holds the input {source}; choose another --out")


@contextmanager
def new_artifact(out: Path, marker: str = MANIFEST_NAME) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` if the block ends well and vanishes if it does not.

    marker: the JSON file, written last, whose presence says that the folder is whole; its `files` names
    every other file. Raises ArtifactError if `out` holds anything that such a marker does not name, if
    another run is writing it, or if the block leaves no marker.
    """
    out = out.absolute()
    _refuse_foreign(out, marker)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot make {out.parent}: {error.strerror}; choose another --out") from error
    with _lock(out):
        partial = _empty_partial(out)
        try:
            yield partial
            if not (partial / marker).is_file():
                raise ArtifactError(f"{out}: nothing wrote a {marker}")
            _sync(partial)
            _replace(partial, out)
        except OSError as error:
            raise ArtifactError(f"cannot write {out}: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file so that it appears whole, under its final name, or not at all."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def link_file(source: Path, target: Path) -> bool:
    """Give a file a second name in an artifact; its bytes are shared and never opened for writing.

    Symbolic links are followed first. Returns False, with nothing done, where the two places cannot share
    a file: other disks, a filesystem without links, a file of another owner.
    """
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno in _CANNOT_LINK:
            return False
        raise
    return True


def _refuse_foreign(out: Path, marker: str) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ArtifactError(f"{out} is in the way (not a folder); choose another --out")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / marker).is_file():
        raise ArtifactError(
            f"{out} is not empty and holds no {marker}, so it is not replaced; "
            "choose another --out or remove it"
        )
    strangers = sorted({path.name for path in out.iterdir()} - _listed_files(out / marker) - {marker})
    if strangers:
        raise ArtifactError(
            f"{out} holds {strangers[0]!r}, which its {marker} does not list, so it is not replaced; "
            "choose another --out or remove it"
        )


def _listed_files(marker: Path) -> set[str]:
    """Files that a marker says are part of its folder: the names in its `files`, none if it has no such."""
    try:
        return set(json.loads(marker.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return set()


def _empty_partial(out: Path) -> Path:
    """A new hidden folder beside `out`; those that killed runs left are removed."""
    try:
        for stale in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
            shutil.rmtree(stale)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        partial.chmod(0o755)
    except OSError as error:
        raise ArtifactError(
            f"cannot write in {out.parent}: {error.strerror}; choose another --out"
        ) from error
    return partial


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    path = out.parent / f".{out.name}.lock"
    try:
        file = path.open("w")
    except OSError as error:
        raise ArtifactError(
            f"cannot write in {out.parent}: {error.strerror}; choose another --out"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(file.fileno()).st_ino == path.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            held = False  # taken, or the run that had it has just removed it
        if not held:
            raise ArtifactError(f"another run is writing {out}; wait for it or choose another --out")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(partial: Path, out: Path) -> None:
    retired = partial.with_name(f"{partial.name}-old")
    if out.exists():
        out.rename(retired)
    partial.rename(out)
    shutil.rmtree(retired, ignore_errors=True)
