"""Idle rings of sessions → a row while one is free, then host memory, then a file, then gone.

All of it runs on the scheduler's thread, but the writing and reading of files, which has a thread of its
own: a stream that runs meanwhile waits for a copy in memory, not for a disk.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mistral_trt.errors import GenerationError, SessionError
from mistral_trt.runtime.cache import RollingCache, RowSnapshot
from mistral_trt.runtime.metrics import Counters
from mistral_trt.runtime.request import SessionRing
from mistral_trt.runtime.ring_file import RingFolder

log = logging.getLogger("mistral_trt.runtime")


class RingStore:
    """Where the rings of idle sessions are; all of them are of one size.

    memory_bytes: host memory they may take.  files: where those beyond it go, None to drop them; the least
    recently used go first, and none whose next turn is queued.
    """

    def __init__(
        self, cache: RollingCache, counters: Counters, *, memory_bytes: int, files: RingFolder | None
    ) -> None:
        self._cache, self._counters, self._files = cache, counters, files
        self._memory_bytes = memory_bytes
        self._ring_bytes = cache.contract.ring_bytes_per_row
        self._idle: dict[SessionRing, None] = {}  # the least recently used first

    def usage(self) -> dict[str, int]:
        """Of idle sessions, for `Metrics`; any thread may ask."""
        idle = list(self._idle)
        return {
            "idle_sessions": sum(ring.position > 0 for ring in idle),
            "session_bytes": self._ring_bytes * sum(ring.snapshot is not None for ring in idle),
            "session_disk_bytes": self._ring_bytes * sum(ring.file is not None for ring in idle),
        }

    def rows_to_have(self) -> int:
        """Rows that a request could get now: the free ones and those of idle sessions."""
        return self._cache.free_rows + sum(ring.row is not None for ring in self._idle)

    def take_rows(self, count: int) -> list[int]:
        """The lowest free rows, after moving as many least recently used idle rings away as it takes."""
        while self._cache.free_rows < count:
            self._clear_row(next(ring for ring in self._idle if ring.row is not None))
        return self._cache.acquire_rows(count)

    def ready(self, ring: SessionRing) -> bool:
        """Whether `resume` can go on at once; otherwise the ring is being read from its file."""
        if ring.file is not None and not ring.moving and self._files is not None:
            ring.moving = True
            self._files.read(ring.file, lambda found: self._has_been_read(ring, found))
        return ring.file is None

    def resume(self, ring: SessionRing) -> int:
        """The row where the session goes on. Raises SessionError if its ring is gone."""
        if ring.lost is not None:
            raise SessionError(ring.lost)
        self._idle.pop(ring, None)
        if ring.row is None:
            (ring.row,) = self.take_rows(1)
            if ring.snapshot is not None:
                self._cache.restore(ring.row, ring.snapshot)
                ring.snapshot = None
        return ring.row

    def restart(self, ring: SessionRing) -> int:
        """The row where the session begins anew, at position 0. Raises SessionError if its ring is gone."""
        if ring.lost is None:
            self.drop(ring)
            self._counters.session_restarts += 1
        return self.resume(ring)

    def rest(self, ring: SessionRing) -> None:
        """Its turn has ended; it keeps its row until another request needs one."""
        if ring.row is not None:
            ring.position = self._cache.position(ring.row)
        ring.job = None
        self._idle.pop(ring, None)
        if ring.lost is None:
            self._idle[ring] = None
        self._shrink()

    def lose(self, ring: SessionRing, reason: str) -> None:
        """Give up a ring; the session's next turn says why."""
        self.drop(ring)
        ring.lost = reason
        log.info("a session's ring is gone: %s", reason)

    def drop(self, ring: SessionRing) -> None:
        """Forget a ring and give back everything it takes."""
        self._idle.pop(ring, None)
        row, file = ring.row, ring.file
        ring.row, ring.file, ring.snapshot, ring.position = None, None, None, 0
        if file is not None:
            _remove(file)
        if row is not None:
            self._cache.release(row)

    def add(self, ring: SessionRing, state: RowSnapshot | None) -> SessionRing:
        """Take in an idle session, its ring on a free row or else in host memory."""
        self._idle[ring] = None
        if state is not None:
            ring.position = state.position
            if self._cache.free_rows:
                self._fill_free_row(ring, partial(self._cache.restore, snapshot=state))
            else:
                ring.snapshot = state
                self._shrink()
        return ring

    def fork(self, ring: SessionRing) -> SessionRing | Path:
        """A new idle session that goes on from where this one is; of a ring in a file, the file."""
        twin = replica(ring)
        if ring.row is not None and self._cache.free_rows and ring.job is None:
            twin.position = ring.position
            self._fill_free_row(twin, partial(self._cache.copy, ring.row))
            self._idle[twin] = None
            return twin
        state = self.state(ring)
        return state if isinstance(state, Path) else self.add(twin, state)

    def state(self, ring: SessionRing) -> RowSnapshot | Path | None:
        """The ring of an idle session: a copy of it, or the file it is in; None before its first token."""
        if ring.job is not None:
            raise GenerationError("a session is forked or saved between two turns; this one's is running")
        if ring.lost is not None:
            raise SessionError(ring.lost)
        return ring.snapshot or ring.file if ring.row is None else self._cache.snapshot(ring.row)

    def close(self) -> None:
        """Remove every file. Nothing is called afterwards."""
        self._idle.clear()
        if self._files is not None:
            self._files.close()

    def _fill_free_row(self, ring: SessionRing, fill: Callable[[int], object]) -> None:
        """Give a session a free row with its ring in it. What `fill` raises is raised, and the row freed."""
        row = self._cache.acquire()
        try:
            fill(row)
        except Exception:
            self._idle.pop(ring, None)
            self._cache.release(row)
            raise
        ring.row = row

    def _clear_row(self, ring: SessionRing) -> None:
        """Move an idle session off its row."""
        assert ring.row is not None
        self._counters.session_moves += 1
        if self._files is None and self._memory_bytes < self._ring_bytes and ring.job is None:
            self.lose(ring, self._no_room())
            return
        try:
            state = self._cache.snapshot(ring.row)
        except Exception as error:  # whatever a backend raises: the request that needs the row goes on
            self.lose(ring, f"this session's ring could not be read from its row ({error}); start a new one")
            return
        row, ring.row, ring.snapshot = ring.row, None, state
        self._cache.release(row)
        log.debug("an idle session's ring moved from row %d to host memory", row)
        self._shrink()

    def _shrink(self) -> None:
        """Bring host memory back within its bound."""
        held = [r for r in self._idle if r.snapshot is not None and not r.moving]
        excess = len(held) - self._memory_bytes // self._ring_bytes
        for ring in [r for r in held if r.job is None][: max(0, excess)]:
            if self._files is None or ring.snapshot is None:
                self.lose(ring, self._no_room())
            else:
                ring.moving = True
                self._files.write(ring.snapshot, self._written(ring, ring.snapshot))

    def _written(self, ring: SessionRing, state: RowSnapshot) -> Callable[[Path | Exception], None]:
        """What to do once `state` is in a file, unless the session went on from memory meanwhile."""

        def settle(found: Path | Exception) -> None:
            ring.moving = False
            if isinstance(found, Exception):
                if ring.snapshot is state:
                    self.lose(ring, f"this session's ring could not be written to session_dir: {found}")
            elif ring.snapshot is state:
                ring.snapshot, ring.file = None, found
                log.debug("an idle session's ring moved from host memory to %s", found)
            else:
                _remove(found)
            self._shrink()

        return settle

    def _has_been_read(self, ring: SessionRing, found: RowSnapshot | Exception) -> None:
        ring.moving = False
        if ring.file is None:  # the session was closed meanwhile
            return
        if isinstance(found, Exception):
            self.lose(ring, f"this session's ring could not be read back: {found}")
        else:
            ring.file, ring.snapshot = None, found
            self._shrink()

    def _no_room(self) -> str:
        return (
            f"this session was idle, other requests needed its row, and the idle rings that "
            f"session_memory_bytes={self._memory_bytes} holds ({self._memory_bytes // self._ring_bytes} of "
            f"{self._ring_bytes} bytes) were used later, so its ring was dropped; start a new session with "
            "its tokens, and load the engine with more session_memory_bytes or with session_dir"
        )


def replica(ring: SessionRing) -> SessionRing:
    """A session with the same history and no ring yet."""
    return SessionRing(list(ring.tokens), ring.messages, ring.answer_start)


def _remove(file: Path) -> None:
    """A file that cannot be deleted costs room on the disk, and no running stream."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s is not needed any more and could not be deleted: %s", file, error)
