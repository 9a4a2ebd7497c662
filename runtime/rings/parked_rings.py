"""Rings of idle sessions that left their rows → host memory, beyond it files, beyond those gone.

Both bounds always hold. A ring counts in host memory while it lies there, while it is being written to a file
and while it is being read back; in files from when it is written until its file is deleted. Where there is a
disk, the least recently used ring is written as soon as memory is full, so that the next one finds room.
"""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from mistral_trt.runtime.cache import RowSnapshot
from mistral_trt.runtime.rings.ring_folder import Failure, RingFolder
from mistral_trt.runtime.rings.session_ring import SessionRing

log = logging.getLogger("mistral_trt.runtime")


class ParkedRings:
    """All rings are of one size, `ring_bytes`.

    files: where those beyond memory go, None to drop them. Through memory goes what is written, so one ring
    has room there in any case.  wanted: whether a ring's next turn is queued; such a ring goes last.
    """

    def __init__(
        self,
        ring_bytes: int,
        files: RingFolder | None,
        *,
        memory_bytes: int,
        disk_bytes: int,
        wanted: Callable[[SessionRing], bool],
    ) -> None:
        self._ring_bytes, self._files, self._wanted = ring_bytes, files, wanted
        self._memory_bytes, self._disk_bytes = memory_bytes, disk_bytes
        self._memory_rings = max(memory_bytes // ring_bytes, int(files is not None))
        self._disk_rings = disk_bytes // ring_bytes
        self._in_memory: dict[SessionRing, None] = {}  # the least recently used first, as in files
        self._in_files: dict[SessionRing, None] = {}
        self._writing: RowSnapshot | None = None
        self._reading: set[Path] = set()

    @property
    def has_disk(self) -> bool:
        """Whether a lack of room in memory ends by itself."""
        return self._files is not None

    def usage(self) -> dict[str, int]:
        """Sessions whose rings are here, and bytes in memory and files; any thread may ask."""
        return {
            "idle_sessions": len(self._in_memory) + len(self._in_files),
            "session_bytes": self._ring_bytes * self._held(),
            "session_disk_bytes": self._ring_bytes * self._filed(),
        }

    def make_room(self, leaving: SessionRing | None = None, *, of_wanted: bool = False) -> bool:
        """Whether memory has room for one ring more; others are dropped for it, or begun to be written.

        leaving: one that is to be taken as soon as there is.  of_wanted: move even wanted rings.
        """
        while self._held(leaving) >= self._memory_rings:
            victim = self._least_used((r for r in self._in_memory if r is not leaving), of_wanted)
            if victim is None or self._writing is not None:
                return False
            if self._files is None:
                self.lose(victim, self.no_memory())
            else:
                self._write(victim, self._files)
        return True

    def park(self, ring: SessionRing, state: RowSnapshot) -> None:
        """Put a ring where `make_room` found room."""
        ring.snapshot = state
        self._in_memory[ring] = None
        self._make_room_ahead()

    def share(self, ring: SessionRing, twin: SessionRing) -> None:
        """Let a second session have the same ring; that takes no room."""
        twin.snapshot, twin.file = ring.snapshot, ring.file
        if twin.snapshot is not None:
            self._in_memory[twin] = None
        elif twin.file is not None:
            self._in_files[twin] = None

    def fetch(self, ring: SessionRing) -> bool:
        """Whether `take` can be called; otherwise the ring is read from its file as soon as there is room."""
        if ring.file is None or self._files is None:
            return True
        if ring.file not in self._reading and self.make_room():
            self._reading.add(ring.file)
            self._files.read(ring.file, partial(self._has_been_read, ring.file))
        return False

    def take(self, ring: SessionRing) -> RowSnapshot | None:
        """The ring, out of memory; None if there is none."""
        state, ring.snapshot = ring.snapshot, None
        self._in_memory.pop(ring, None)
        return state

    def touch(self, ring: SessionRing) -> None:
        """It is the most recently used one now."""
        for place in (self._in_memory, self._in_files):
            if ring in place:
                del place[ring]
                place[ring] = None

    def drop(self, ring: SessionRing) -> None:
        """Forget a ring, and delete its file if it has that alone."""
        self.take(ring)
        file, ring.file, ring.position = ring.file, None, 0
        self._in_files.pop(ring, None)
        if file is not None:
            self._discard(file)

    def lose(self, ring: SessionRing, reason: str) -> None:
        """Drop a ring; the session's next turn says why."""
        self.drop(ring)
        ring.lost = reason
        log.info("a session's ring is gone: %s", reason)

    def close(self) -> None:
        """Remove every file. Nothing is called afterwards, but `usage`."""
        self._in_memory.clear()
        self._in_files.clear()
        self._writing = None
        self._reading.clear()
        if self._files is not None:
            self._files.close()

    def no_memory(self) -> str:
        """Why a ring has no place."""
        return (
            f"this session was idle, other requests needed its row, and the idle rings that "
            f"session_memory_bytes={self._memory_bytes} holds ({self._memory_rings} of "
            f"{self._ring_bytes} bytes) were used later, so its ring was dropped; start a new session with "
            "its tokens, and load the engine with more session_memory_bytes or with session_dir"
        )

    def _no_disk(self) -> str:
        return (
            f"this session was idle, and the rings that session_disk_bytes={self._disk_bytes} lets into "
            f"session_dir ({self._disk_rings} of {self._ring_bytes} bytes) were used later, so its ring was "
            "dropped; start a new session with its tokens, and load the engine with more session_disk_bytes"
        )

    def _held(self, leaving: SessionRing | None = None) -> int:
        """Rings in memory now, or when `leaving` has left; one that two sessions share counts once."""
        states = [r.snapshot for r in list(self._in_memory) if r is not leaving]
        return len({id(state) for state in (*states, self._writing)} - {id(None)}) + len(self._reading)

    def _filed(self) -> int:
        return len({ring.file for ring in list(self._in_files)} - {None})

    def _least_used(self, rings: Iterable[SessionRing], of_wanted: bool) -> SessionRing | None:
        """The least recently used one that is not wanted, or failing that, with of_wanted, one that is."""
        found = list(rings)
        unwanted = (ring for ring in found if not self._wanted(ring))
        return next(unwanted, found[0] if found and of_wanted else None)

    def _write(self, ring: SessionRing, files: RingFolder) -> None:
        """Begin to write a ring, after dropping those in files that leave no room for it, or else drop it."""
        while self._filed() >= self._disk_rings:
            still = (other for other in self._in_files if other.file not in self._reading)
            victim = self._least_used(still, self._wanted(ring)) or ring
            self.lose(victim, self._no_disk())
            if victim is ring:
                return
        assert ring.snapshot is not None
        self._writing = ring.snapshot
        files.write(ring.snapshot, partial(self._has_been_written, ring.snapshot))

    def _has_been_written(self, state: RowSnapshot, found: Path | Failure) -> None:
        """The sessions that have not gone on from memory meanwhile have their ring in the file now."""
        self._writing = None
        for ring in [ring for ring in self._in_memory if ring.snapshot is state]:
            if isinstance(found, Failure):
                self.lose(ring, f"this session's ring could not be written to session_dir: {found.reason}")
            else:
                self.take(ring)
                ring.file = found
                self._in_files[ring] = None
                log.debug("an idle session's ring moved from host memory to %s", found)
        if isinstance(found, Path):
            self._discard(found)
        self._make_room_ahead()

    def _has_been_read(self, file: Path, found: RowSnapshot | Failure) -> None:
        """The sessions that were not closed meanwhile have their ring in memory now."""
        self._reading.discard(file)
        for ring in [ring for ring in self._in_files if ring.file == file]:
            if isinstance(found, Failure):
                self.lose(ring, f"this session's ring could not be read back: {found.reason}")
            else:
                del self._in_files[ring]
                self._in_memory[ring] = None
                ring.snapshot, ring.file = found, None
        self._discard(file)
        self._make_room_ahead()

    def _make_room_ahead(self) -> None:
        if self._files is not None:
            self.make_room()

    def _discard(self, file: Path) -> None:
        """Delete a file that no session's ring is in any more."""
        if self._files is not None and not any(ring.file == file for ring in self._in_files):
            self._files.remove(file)
