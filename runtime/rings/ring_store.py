"""Idle sessions → rows for those that run: an idle ring keeps its row until a request needs it.

All of it runs on the scheduler's thread. A stream that runs meanwhile waits for the copy of a ring in memory,
never for a disk: where a ring has to wait for one, these methods say so, and are asked again.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mistral_trt.errors import GenerationError, SessionError
from mistral_trt.runtime.cache import RollingCache, RowSnapshot
from mistral_trt.runtime.metrics import Counters
from mistral_trt.runtime.rings.parked_rings import ParkedRings
from mistral_trt.runtime.rings.session_ring import SessionRing

log = logging.getLogger("mistral_trt.runtime")


class NoRoomYet(Exception):
    """A ring needs room in host memory that others leave by and by: ask again after the next message."""


class RingStore:
    """Which rows idle sessions hold, and how their rings leave them and come back.

    wanted: whether a ring's next turn is queued or running.
    """

    def __init__(
        self,
        cache: RollingCache,
        counters: Counters,
        parked: ParkedRings,
        *,
        wanted: Callable[[SessionRing], bool],
    ) -> None:
        self._cache, self._counters, self._parked, self._wanted = cache, counters, parked, wanted
        self._on_rows: dict[SessionRing, None] = {}  # idle ones, the least recently used first

    def usage(self) -> dict[str, int]:
        """Of idle sessions, for `Metrics`; any thread may ask."""
        found = self._parked.usage()
        on_rows = sum(ring.position > 0 for ring in list(self._on_rows))
        return {**found, "idle_sessions": found["idle_sessions"] + on_rows}

    def fetch(self, ring: SessionRing) -> bool:
        """Whether a session can go on once it has a row; otherwise its ring is on its way from a file."""
        return self._parked.fetch(ring)

    def clear_rows(self, count: int, ring: SessionRing | None = None) -> bool:
        """Whether `count` rows are free now, after moving the least recently used idle rings off theirs.

        ring: of the session that is to go on, which may have its row already, or needs none to be told that
        its ring is gone. False: too many rows are used by running requests, or host memory has no room until
        a ring is in its file.
        """
        if ring is not None and (ring.row is not None or ring.lost is not None):
            return True
        if self._cache.free_rows + len(self._on_rows) < count:
            return False
        while self._cache.free_rows < count:
            if not self._clear_row(ring):
                return False
        return True

    def resume(self, ring: SessionRing) -> int:
        """The row where the session goes on, after `fetch` and `clear_rows`.

        Raises SessionError if its ring is gone.
        """
        if ring.lost is not None:
            raise SessionError(ring.lost)
        self._on_rows.pop(ring, None)
        if ring.row is None:
            ring.row = self._cache.acquire()
            state = self._parked.take(ring)
            if state is not None:
                self._cache.restore(ring.row, state)
        return ring.row

    def restart(self, ring: SessionRing) -> int:
        """The row where the session begins anew, at position 0. Raises SessionError if its ring is gone."""
        if ring.lost is None:
            self.drop(ring)
            self._counters.session_restarts += 1
        return self.resume(ring)

    def rest(self, ring: SessionRing) -> None:
        """Its turn has ended; it keeps its row until another request needs one."""
        if ring.row is None:
            self._parked.touch(ring)
        else:
            ring.position = self._cache.position(ring.row)
            self._on_rows.pop(ring, None)
            self._on_rows[ring] = None

    def lose(self, ring: SessionRing, reason: str) -> None:
        """Give up a ring; the session's next turn says why."""
        self.drop(ring)
        self._parked.lose(ring, reason)

    def drop(self, ring: SessionRing) -> None:
        """Forget a ring and give back everything it takes."""
        self._parked.drop(ring)
        self._on_rows.pop(ring, None)
        row, ring.row = ring.row, None
        if row is not None:
            self._cache.release(row)

    def add(self, state: RowSnapshot | None) -> SessionRing:
        """Take in an idle session, its ring on a free row or else in host memory. Raises as `fork`."""
        ring = SessionRing()
        if state is not None:
            if self._cache.free_rows:
                self._fill_free_row(ring, partial(self._cache.restore, snapshot=state))
            else:
                self._require_room()
                self._parked.park(ring, state)
            ring.position = state.position
        return ring

    def fork(self, ring: SessionRing) -> SessionRing:
        """A new idle ring that goes on from where this one is.

        Raises NoRoomYet, SessionError if this one is gone or no room will be found for a copy, and
        GenerationError while a turn is running.
        """
        self._require_between_turns(ring)
        twin = SessionRing()
        if ring.row is None:
            self._parked.share(ring, twin)
        elif self._cache.free_rows:
            self._fill_free_row(twin, partial(self._cache.copy, ring.row))
        else:
            self._require_room()
            self._parked.park(twin, self._cache.snapshot(ring.row))
        twin.position = ring.position
        return twin

    def state(self, ring: SessionRing) -> RowSnapshot | Path | None:
        """The ring of an idle session: a copy of it, or the file it is in; None before its first token."""
        self._require_between_turns(ring)
        return ring.snapshot or ring.file if ring.row is None else self._cache.snapshot(ring.row)

    def close(self) -> None:
        """Remove every file. Nothing is called afterwards, but `usage`."""
        self._on_rows.clear()
        self._parked.close()

    def _require_between_turns(self, ring: SessionRing) -> None:
        if self._wanted(ring):
            raise GenerationError("a session is forked or saved between two turns; this one's is running")
        if ring.lost is not None:
            raise SessionError(ring.lost)

    def _require_room(self) -> None:
        if not self._parked.make_room():
            if self._parked.has_disk:
                raise NoRoomYet
            raise SessionError(
                "no row is free, and session_memory_bytes has no room for one ring more; end a running "
                "stream first, or load the engine with more session_memory_bytes or with session_dir"
            )

    def _fill_free_row(self, ring: SessionRing, fill: Callable[[int], object]) -> None:
        """Give a new idle session a free row with its ring in it. If `fill` raises, the row is free again."""
        row = self._cache.acquire()
        try:
            fill(row)
        except BaseException:
            self._cache.release(row)
            raise
        ring.row = row
        self._on_rows[ring] = None

    def _clear_row(self, leaving: SessionRing | None) -> bool:
        """Move an idle ring off its row. False: it has to wait for room.  leaving: see `make_room`."""
        unwanted = (ring for ring in self._on_rows if not self._wanted(ring))
        ring = next(unwanted, next(iter(self._on_rows)))
        room = self._parked.make_room(leaving, of_wanted=self._parked.has_disk)
        if not room and self._parked.has_disk:
            return False
        assert ring.row is not None
        self._counters.session_moves += 1
        if not room:
            self.lose(ring, self._parked.no_memory())
            return True
        try:
            state = self._cache.snapshot(ring.row)
        except Exception as error:  # whatever a backend raises: the request that needs the row goes on
            self.lose(ring, f"this session's ring could not be read from its row ({error}); start a new one")
            return True
        log.debug("an idle session's ring moved from row %d to host memory", ring.row)
        del self._on_rows[ring]
        self._cache.release(ring.row)
        ring.row = None
        self._parked.park(ring, state)
        return True
