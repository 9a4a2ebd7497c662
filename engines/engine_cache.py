"""The key of a build → the plan that such a build made before, if it is still kept.

One folder for each plan: `model.plan`, a second name of the artifact's own file where the disk allows it, and
`entry.json`. One lock file for all: readers share it and changes hold it alone, so nothing is removed while
it is read. A cache that cannot be read or written costs time and nothing else.
"""

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mistral_trt.artifact import cache_folder, link_file, require_space, write_file
from mistral_trt.engines.build_key import BuildKey
from mistral_trt.errors import ArtifactError
from mistral_trt.manifest import content_sha256, sha256_file
from mistral_trt.progress import note

DEFAULT_LIMIT_BYTES = 20_000_000_000

_PLAN, _ENTRY, _LOCK, _PARTIAL = "model.plan", "entry.json", ".lock", ".partial-"
_LOG = logging.getLogger("mistral_trt")


@dataclass(frozen=True)
class CachedPlan:
    """A plan that was built before.  details: what its build said of it, as `store` was given it."""

    sha256: str
    bytes: int
    details: dict[str, Any]


@dataclass(frozen=True)
class EngineCache:
    """Plans by key, safe for several processes; past the limit the least recently used are removed."""

    folder: Path = field(default_factory=lambda: cache_folder() / "engines")
    limit_bytes: int = DEFAULT_LIMIT_BYTES

    def find(self, key: BuildKey, target: Path) -> CachedPlan | None:
        """Put the plan of this key at `target`, a new file; None, and no file, where there is none to use.

        Size and SHA-256 are compared first: a plan that was altered, perhaps through an artifact that shares
        its file, is removed, and a warning says so. Never open `target` for writing: its bytes are shared.
        """
        entry = self.folder / key.digest
        if not entry.is_dir():
            return None
        try:
            with self._locked(fcntl.LOCK_SH):
                if found := _sound(entry, key):
                    with suppress(OSError):
                        os.utime(entry)
                    _give(entry / _PLAN, target)
            if found is None:
                self._drop_altered(entry, key)
        except (OSError, ArtifactError) as error:
            note(f"the plan kept in {entry} is not used: {error}")
            return None
        if found:
            self._trim(entry)  # the limit may have been larger when it was kept
        return found

    def store(self, key: BuildKey, plan: Path, sha256: str, details: Mapping[str, Any]) -> bool:
        """Keep a finished plan under its key, all or nothing; False, with a reason in the log, if it is not.

        sha256: of the plan, as its build took it.  details: JSON, which `find` returns.
        """
        size = plan.stat().st_size
        if size > self.limit_bytes:
            note(
                f"the plan is not kept for the next build: it has {size / 1e9:.2f} GB and the cache's limit "
                f"is {self.limit_bytes / 1e9:.2f} GB; raise it with --cache-gb"
            )
            return False
        content = {"key": dict(key.parts), "plan_sha256": sha256, "bytes": size, "details": dict(details)}
        text = json.dumps({**content, "sha256": content_sha256(content)}, indent=1)
        try:
            with self._partial(key.digest) as partial:
                _give(plan, partial / _PLAN)
                write_file(partial / _ENTRY, text.encode())
                with self._locked(fcntl.LOCK_EX):
                    self._place(partial, self.folder / key.digest)
        except (OSError, ArtifactError) as error:
            note(f"the plan is not kept for the next build: {error}")
            return False
        return True

    def explain_miss(self, key: BuildKey) -> str | None:
        """What a rebuild is for: "tensorrt 1.7.0 → 1.7.1", against the kept plan that differs in least.

        None where no plan is kept that differs in versions alone.
        """
        known = [_read(entry / _ENTRY).get("key") for entry in reversed(self._entries())]
        changes = [key.changes_since(parts) for parts in known if isinstance(parts, dict)]
        fewest = min((found for found in changes if found), key=len, default=[])
        return ", ".join(fewest) or None

    def _entries(self) -> list[Path]:
        """Least recently used first."""
        return sorted((path.parent for path in self.folder.glob(f"[!.]*/{_ENTRY}")), key=_last_used)

    def _place(self, partial: Path, entry: Path) -> None:
        """Rename what is complete into its place and make room; the cache is locked for us alone."""
        if entry.exists():
            _remove(entry)  # the newer plan is the one that an artifact has
        partial.rename(entry)
        os.utime(entry)
        for path in self.folder.glob(f".*{_PARTIAL}*"):
            _remove_abandoned(path)
        self._make_room(entry)

    def _trim(self, used: Path) -> None:
        """Hold the limit after a hit, which is none the worse if that fails."""
        try:
            if sum(map(_size, self._entries())) > self.limit_bytes:
                with self._locked(fcntl.LOCK_EX):
                    self._make_room(used)
        except OSError as error:
            note(f"the plans in {self.folder} take more than they may: {error}")

    def _make_room(self, used: Path) -> None:
        """Remove the least recently used until the limit holds; the cache is locked for us alone.

        `used` stays, unless its plan alone is over the limit.
        """
        kept = self._entries()
        total = sum(map(_size, kept))
        for entry in kept:
            may_go = entry != used or (entry / _PLAN).stat().st_size > self.limit_bytes
            if total > self.limit_bytes and may_go:
                total -= _size(entry)
                _remove(entry)

    def _drop_altered(self, entry: Path, key: BuildKey) -> None:
        with self._locked(fcntl.LOCK_EX):
            if entry.is_dir() and _sound(entry, key) is None:  # nobody has replaced it meanwhile
                _remove(entry)
                _LOG.warning("%s was altered after it was kept; it is removed and built again", entry)

    @contextmanager
    def _partial(self, digest: str) -> Iterator[Path]:
        """A hidden folder for an entry under way, locked so that nobody takes it for abandoned."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(fcntl.LOCK_SH):  # no one clears up between the next three lines
            path = Path(tempfile.mkdtemp(prefix=f".{digest}{_PARTIAL}", dir=self.folder))
            descriptor = os.open(path, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        with (self.folder / _LOCK).open("a") as lock:
            fcntl.flock(lock, how)
            yield


def _sound(entry: Path, key: BuildKey) -> CachedPlan | None:
    """The entry, if it is of this key, whole and unaltered."""
    content, plan = _read(entry / _ENTRY), entry / _PLAN
    if content.get("sha256") != content_sha256(content) or BuildKey(content["key"]).digest != key.digest:
        return None
    found = CachedPlan(content["plan_sha256"], content["bytes"], content["details"])
    if not plan.is_file() or plan.stat().st_size != found.bytes or sha256_file(plan) != found.sha256:
        return None
    return found


def _give(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where there can be none. Raises ArtifactError without the room."""
    if link_file(source, target):
        return
    require_space(target, source.stat().st_size, "a copy of the plan does not fit there")
    try:
        shutil.copyfile(source, target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _remove(entry: Path) -> None:
    """Out of sight in one step; should we be killed before the rest, the next run clears up."""
    gone = entry.with_name(f".{entry.name}{_PARTIAL}removed")
    shutil.rmtree(gone, ignore_errors=True)
    entry.rename(gone)
    shutil.rmtree(gone)


def _remove_abandoned(partial: Path) -> None:
    """Remove the half-made folder of a run that was killed: no process holds its lock."""
    with suppress(OSError):
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial)
        finally:
            os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if the file holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _last_used(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:  # removed by another process
        return 0.0


def _size(entry: Path) -> int:
    return sum(path.stat().st_size for path in entry.iterdir())
