"""Requests of any thread → one thread that alone calls the rolling cache, and delivers each request's pieces.

One turn of its loop: take messages and cancellations; give waiting requests rows, in order of arrival; run at
most one prefill chunk, of the oldest request that is still being prefilled; run one decode step for all rows
that decode. So a stream that runs waits, between two of its tokens, for one chunk and one step at most,
whatever else is asked of the engine; and for the copy of a ring in memory where an idle session makes room,
comes back or is forked. It never waits for a disk. Without work it sleeps.

Which thread may touch what:

- the scheduler's thread alone: `RollingCache` and its backend, `ContinuousBatch`, `RingStore` and
  `ParkedRings`, every `Sample`, `Counters` (to write), a `History` from its turn's begin to its end, every
  consumer's `deliver`, which must not block, and every logits processor, which must not wait for the engine.
- the thread of `RingFolder`: the files of idle rings. Its results come back as messages.
- any thread: this class; `RequestQueue` under its lock; to read, metrics and a `History` between two turns.
- a finalizer runs anywhere, also on a thread that holds a lock: it only puts messages (`cancel`, `forget`,
  `stop`).

What one thread tells the scheduler's is a message in the inbox, or a flag (`Job.cancelled`) and a message
that wakes it.
"""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

from mistral_trt.errors import GenerationError
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.metrics import Counters, Metrics
from mistral_trt.runtime.request import Job
from mistral_trt.runtime.rings.ring_store import RingStore
from mistral_trt.runtime.rings.session_ring import SessionRing
from mistral_trt.runtime.scheduling.continuous_batch import ContinuousBatch
from mistral_trt.runtime.scheduling.failures import closed_error
from mistral_trt.runtime.scheduling.process_end import watch
from mistral_trt.runtime.scheduling.request_queue import Call, RequestQueue, Work

log = logging.getLogger("mistral_trt.runtime")

_Result = TypeVar("_Result")
_CLOSED = "the engine was closed; load it again"
_FORKED = "this engine was loaded before the process was forked; load it in the child"


class Scheduler:
    """The thread, started at the first request, and how other threads reach it.

    inbox: work for that thread; putting some in never blocks, not even from a finalizer. None only wakes it.
    fixed_batch: see `ContinuousBatch`.
    """

    def __init__(
        self,
        cache: RollingCache,
        store: RingStore,
        counters: Counters,
        queue: RequestQueue,
        inbox: "SimpleQueue[Work | None]",
        *,
        fixed_batch: bool,
    ) -> None:
        self._cache, self._store, self._counters, self._queue = cache, store, counters, queue
        self._inbox = inbox
        self._batch = ContinuousBatch(
            cache, store, counters, queue, fixed_batch=fixed_batch, unheard=self.cancel
        )
        self._thread: threading.Thread | None = None
        # The thread's own.
        self._stopping = self._released = False
        self._idle = True  # there is nothing to do until a message comes
        self._postponed: list[Call] = []
        watch(self)

    @property
    def closed(self) -> str | None:
        """Why nothing can be asked any more, or None."""
        return self._queue.closed

    def submit(self, job: Job) -> None:
        """Queue a request. Raises QueueFullError, or EngineClosedError."""
        job.submitted = time.perf_counter()
        self._queue.add(job)
        self._start()
        self._inbox.put(None)

    def cancel(self, job: Job) -> None:
        """End a request at the next step. Any thread, also a finalizer: nothing is locked."""
        job.cancelled = True
        self._inbox.put(None)

    def call(self, function: Callable[[], _Result]) -> _Result:
        """Run a function on the scheduler's thread, between two steps, and return its result.

        One that raises NoRoomYet is run again later.
        """
        self.require_other_thread()
        call = Call(function, self._postponed.append)
        with self._queue.lock:  # so that it lies in the inbox before the queue is closed, or not at all
            self._queue.require_open()
            self._inbox.put(call)
        self._start()
        result: _Result = call.result()
        return result

    def wait_for_cancelled(self, ring: SessionRing) -> None:
        """Until a session's turn has ended, if it was cancelled: it ends at the next step."""
        job = self._queue.turn_of(ring)
        if job is not None and job.cancelled:
            self.require_other_thread()
            job.done.wait()

    def require_other_thread(self) -> None:
        """Raise GenerationError where waiting for the scheduler's thread would be waiting for oneself."""
        if threading.current_thread() is self._thread:
            raise GenerationError("a logits processor cannot wait for the engine that runs it")

    def forget(self, ring: SessionRing) -> None:
        """End a session's turn and give back what its ring takes. Any thread, also a finalizer."""
        self._inbox.put(partial(self._forget, ring))

    def metrics(self) -> Metrics:
        """What was counted, and what is the case now."""
        now = {
            "queue_length": len(self._queue.waiting),
            "active_rows": self._queue.used_rows,
            "capacity_rows": self._cache.capacity_rows,
        }
        return self._counters.snapshot({**now, **self._store.usage()})

    def stop(self) -> None:
        """End as `close` does, without waiting for it and without a lock: for a finalizer."""
        self._inbox.put(self._stop)
        if self._thread is None:
            self._release_memory()

    def close(self, timeout_s: float | None = None) -> None:
        """End all requests as cancelled, then the thread, and give memory back.

        timeout_s: how long to wait for a step that is under way.
        """
        self._queue.close(_CLOSED)
        self.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def abandon(self) -> None:
        """In the child of a fork: its thread is in the parent, and so is the device."""
        self._queue.lock = threading.Lock()  # the other may have been held
        self._queue.closed = self._queue.closed or _FORKED

    def _start(self) -> None:
        with self._queue.lock:
            if self._thread is None:
                # A daemon, so that a program may end without closing; `process_end` then waits for it.
                self._thread = threading.Thread(target=self._run, name="mistral-trt-scheduler", daemon=True)
                self._thread.start()

    # ------------------------------------------------------------ on the scheduler's thread

    def _run(self) -> None:
        try:
            while self._take_messages():
                self._idle = not self._batch.admit()
                self._retry_postponed()
                self._batch.prefill()
                self._batch.decode()
        except BaseException as error:
            self._end(f"the engine cannot run any more and must be loaded again: {error}", error)
        else:
            self._end(_CLOSED, None)

    def _take_messages(self) -> bool:
        """Do what was asked for since the last step, or sleep until something is. False: it was to stop."""
        asleep, looked = self._idle, False
        while asleep or not self._inbox.empty():
            message = self._inbox.get()
            asleep, looked = False, True
            if message is not None:
                message()
        if looked:
            for job in self._batch.jobs():
                if job.cancelled:
                    self._batch.cancel(job)
        return not self._stopping

    def _retry_postponed(self) -> None:
        """Calls that waited for room in memory, after the requests that did."""
        for _ in range(len(self._postponed)):  # each may postpone itself again
            self._postponed.pop(0)()

    def _forget(self, ring: SessionRing) -> None:
        job = self._queue.turn_of(ring)
        if job is not None:
            self._batch.cancel(job)
        self._store.lose(ring, "the session was closed; start a new one")

    def _stop(self) -> None:
        self._stopping = True

    def _end(self, reason: str, error: BaseException | None) -> None:
        """Close for good: nobody who waits for anything is left waiting."""
        self._queue.close(reason)
        if error is not None:
            log.error("%s", reason, exc_info=error)
        self._batch.close(reason, error)
        left = self._postponed[:]
        while not self._inbox.empty():
            message = self._inbox.get()
            left += [message] if isinstance(message, Call) else []
        for call in left:
            call.refuse(closed_error(reason, error))
        self._release_memory()

    def _release_memory(self) -> None:
        if self._released:
            return
        self._released = True
        try:
            self._store.close()
            self._cache.close()
        except Exception as error:  # of a backend that is broken anyway
            log.warning("the engine's memory could not be given back: %s", error)
