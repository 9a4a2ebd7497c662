"""Requests of any thread → the order in which they get rows: first come, first served, nobody overtakes."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from mistral_trt.errors import BackendError, EngineClosedError, QueueFullError
from mistral_trt.runtime.request import Job

Message = Callable[[], object]
"""Something for the scheduler's thread to do between two steps."""


class Call:
    """A message whose result another thread waits for, and alone gets what goes wrong, unless it is fatal."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._future: Future[Any] = Future()

    def __call__(self) -> None:
        try:
            self._future.set_result(self._function())
        except Exception as error:
            self._future.set_exception(error)
            if isinstance(error, BackendError) and error.fatal:
                raise

    def refuse(self, error: Exception) -> None:
        """It will not be done."""
        self._future.set_exception(error)

    def result(self) -> Any:
        """Wait for it; raises what it raised."""
        return self._future.result()


class RequestQueue:
    """The requests that have no row yet, and how many rows the others have.

    queue_size: most requests that may wait for a row. One that finds its rows free does not count.
    Any thread may add; all else but reading is for the scheduler's thread.
    """

    def __init__(self, capacity_rows: int, queue_size: int) -> None:
        self._capacity_rows, self._queue_size = capacity_rows, queue_size
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
            if job.turn is not None:
                job.turn.claim(job)
            self.waiting.append(job)

    def admit(self) -> None:
        """The first request gets its rows."""
        with self.lock:
            self.used_rows += self.waiting.popleft().rows

    def remove(self, job: Job) -> None:
        """A request is not to get any."""
        with self.lock:
            self.waiting.remove(job)

    def close(self, reason: str) -> None:
        """Take nothing from now on. What waits is for the scheduler's thread to end."""
        with self.lock:
            self.closed = self.closed or reason

    def all(self) -> list[Job]:
        """Those that wait, the first first."""
        with self.lock:
            return list(self.waiting)

    def require_open(self) -> None:
        if self.closed is not None:
            raise EngineClosedError(self.closed)

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
