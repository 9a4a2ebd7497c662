"""Rings → files of one engine's own, written, read and removed by a thread of its own."""

import logging
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mistral_trt.contract import GraphContract
from mistral_trt.errors import SessionError
from mistral_trt.runtime.cache import RowSnapshot
from mistral_trt.runtime.rings.ring_file import read_ring, write_ring

log = logging.getLogger("mistral_trt.runtime")

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Failure:
    """Why something was not done. Not the exception itself: its frames would keep the ring in memory."""

    reason: str


class RingFolder:
    """A folder inside `parent`, made when the first ring is written. Only `close` waits for the disk.

    What is asked for is done in that order, one thing at a time.
    wake: called on that thread with what is to be done with a result, on the thread that owns the rings.
    """

    def __init__(
        self,
        parent: Path,
        contract: GraphContract,
        artifact_sha256: str,
        wake: Callable[[Callable[[], object]], object],
    ) -> None:
        self._parent, self._contract, self._artifact, self._wake = parent, contract, artifact_sha256, wake
        self._folder: Path | None = None
        self._count = 0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="mistral-trt-rings")

    def write(self, state: RowSnapshot, done: Callable[[Path | Failure], object]) -> None:
        """Write a ring; `done` gets its file, or what went wrong."""
        self._begin(lambda: self._store(state), done)

    def read(self, path: Path, done: Callable[[RowSnapshot | Failure], object]) -> None:
        """Read a ring; `done` gets it, or what went wrong."""
        self._begin(lambda: self._fetch(path), done)

    def remove(self, path: Path) -> None:
        """Delete a file. One that cannot be deleted costs room on the disk, and is logged."""
        self._begin(lambda: _unlink(path), lambda _: None)

    def close(self) -> None:
        """Wait for what is under way and remove the folder."""
        self._worker.shutdown(cancel_futures=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _begin(self, work: Callable[[], _Result], done: Callable[[_Result | Failure], object]) -> None:
        try:
            self._worker.submit(self._then, work, done)
        except RuntimeError as error:  # the interpreter is ending
            failure = Failure(str(error))
            self._wake(lambda: done(failure))

    def _then(self, work: Callable[[], _Result], done: Callable[[_Result | Failure], object]) -> None:
        result: _Result | Failure
        try:
            result = work()
        except Exception as error:  # a full disk, a damaged file: told to whoever waits
            result = Failure(str(error))
        self._wake(lambda: done(result))

    def _store(self, state: RowSnapshot) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="mistral-trt-", dir=self._parent))
        self._count += 1
        path = self._folder / f"{self._count}.ring"
        write_ring(path, self._contract, self._artifact, state, {})
        return path

    def _fetch(self, path: Path) -> RowSnapshot:
        state = read_ring(path, self._contract, self._artifact).state
        if state is None:
            raise SessionError(f"{path} holds no ring")
        return state


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s is not needed any more and could not be deleted: %s", path, error)
