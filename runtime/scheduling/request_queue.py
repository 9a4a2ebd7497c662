"""What any thread asks → the order in which requests get rows, and work for the scheduler's thread."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from mistral_trt.errors import BackendError, EngineClosedError, GenerationError, QueueFullError
from mistral_trt.runtime.request import Job
from mistral_trt.runtime.rings.ring_store import NoRoomYet
from mistral_trt.runtime.rings.session_ring import SessionRing

Work = Callable[[], object]
"""Something for the scheduler's thread to do between two steps."""


class Call:
    """Work whose result another thread waits for, and alone gets what goes wrong, unless it is fatal.

    postpone: takes this call where it has to be made again, after NoRoomYet.
    """

    def __init__(self, function: Callable[[], Any], postpone: Callable[["Call"], object]) -> None:
        self._function, self._postpone = function, postpone
        self._future: Future[Any] = Future()

    def __call__(self) -> None:
        try:
            self._future.set_result(self._function())
        except NoRoomYet:
            self._postpone(self)
        except Exception as error:
            self._future.set_exception(error)
            if isinstance(error, BackendError) and error.fatal:
                raise

    def refuse(self, error: Exception) -> None:
        """It will not be done."""
        self._future.set_exception(error)

    def result(self) -> Any:
        """Wait for it, once; raises what it raised.

        An error whose frames lead back to it would keep itself, and what the caller's frames hold.
        """
        try:
            return self._future.result()
        finally:
            if self._future.done():
                del self._future


class RequestQueue:
    """The requests that have no row yet, how many rows the others have, and which turn each session has.

    queue_size: most requests that may wait for a row. One that finds its rows free does not count.
    Any thread may add and close, under `lock`, and read; all else is for the scheduler's thread.
    """

    def __init__(self, capacity_rows: int, queue_size: int) -> None:
        self._capacity_rows, self._queue_size = capacity_rows, queue_size
        self._turns: dict[SessionRing, Job] = {}
        self.lock = threading.Lock()
        self.waiting: deque[Job] = deque()
        self.used_rows = 0
        self.closed: str | None = None

    def add(self, job: Job) -> None:
        """Put a request last.

        Raises QueueFullError, EngineClosedError, or GenerationError for a second turn of a session.
        """
        with self.lock:
            self.require_open()
            self._require_place(job)
            self._claim_turn(job)
            self.waiting.append(job)

    def admit(self, job: Job) -> None:
        """A request gets its rows."""
        with self.lock:
            self.waiting.remove(job)
            self.used_rows += job.rows

    def leave_row(self) -> None:
        """A sample of an admitted request has ended."""
        self.used_rows -= 1

    def end(self, job: Job) -> None:
        """A request has ended, with its rows or without; its session may have another turn."""
        with self.lock:
            if job in self.waiting:
                self.waiting.remove(job)
            if job.turn is not None:
                self._turns.pop(job.turn.ring, None)

    def close(self, reason: str) -> None:
        """Take nothing from now on. What waits is for the scheduler's thread to end."""
        with self.lock:
            self.closed = self.closed or reason

    def all(self) -> list[Job]:
        """Those that wait, the first first."""
        with self.lock:
            return list(self.waiting)

    def turn_of(self, ring: SessionRing) -> Job | None:
        """The turn of this ring's session that is queued or running."""
        return self._turns.get(ring)

    def has_turn(self, ring: SessionRing) -> bool:
        return ring in self._turns

    def require_open(self) -> None:
        if self.closed is not None:
            raise EngineClosedError(self.closed)

    def _claim_turn(self, job: Job) -> None:
        turn = job.turn
        if turn is None:
            return
        if turn.ring in self._turns or len(turn.history.tokens) != turn.length:
            raise GenerationError(
                "a session has one turn at a time: read its stream to the end, or cancel it, before the "
                "next; fork() gives a second session that goes on from here"
            )
        self._turns[turn.ring] = job

    def _require_place(self, job: Job) -> None:
        free, stuck = self._capacity_rows - self.used_rows, 0
        for other in (*self.waiting, job):
            if stuck or other.rows > free:
                stuck += 1
            free -= other.rows
        if stuck > self._queue_size:
            raise QueueFullError(
                f"{stuck - 1} request(s) wait for one of {self._capacity_rows} row(s) already, and "
                f"queue_size={self._queue_size} may; ask again later, or load the engine with a larger "
                "queue_size"
            )
