"""Requests of any thread → tokens of each, by one thread that alone calls the rolling cache.

One turn of its loop: take messages and cancellations; give waiting requests rows, in order of arrival and
without overtaking; run at most one prefill chunk, of the oldest request that is still being prefilled; run
one decode step for all rows that decode. So a stream that runs waits, between two of its tokens, for one
chunk and one step at most, whatever else is asked of the engine; and for the copy of a ring where an idle
session makes room, comes back or is forked. Without work it sleeps.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

from mistral_trt.errors import BackendError, GenerationError, NonFiniteLogitsError
from mistral_trt.runtime.backend import Logits
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.failures import backend_error, closed_error, sampling_error
from mistral_trt.runtime.metrics import Counters, Metrics
from mistral_trt.runtime.process_end import watch
from mistral_trt.runtime.request import Delivery, FinishReason, Job, Piece, Sample, SessionRing
from mistral_trt.runtime.request_queue import Call, Message, RequestQueue
from mistral_trt.runtime.ring_store import RingStore

log = logging.getLogger("mistral_trt.runtime")

_Result = TypeVar("_Result")
_CLOSED = "the engine was closed; load it again"
_FORKED = "this engine was loaded before the process was forked; load it in the child"


class Scheduler:
    """A queue of requests, the rows they run on, and the thread that runs them, started at the first.

    inbox: messages for that thread; putting one in never blocks, not even from a finalizer.
    queue_size: see `RequestQueue`.  fixed_batch: decode over max_batch_size rows always.
    """

    def __init__(
        self,
        cache: RollingCache,
        store: RingStore,
        counters: Counters,
        inbox: "SimpleQueue[Message | None]",
        *,
        queue_size: int,
        fixed_batch: bool,
    ) -> None:
        self._cache, self._store, self._counters, self._inbox = cache, store, counters, inbox
        self._queue = RequestQueue(cache.capacity_rows, queue_size)
        self._fixed_batch = fixed_batch
        self._thread: threading.Thread | None = None
        # The thread's own.
        self._stopping = False
        self._reading = False  # the first in the queue waits for its ring to come from a file
        self._jobs: dict[Job, None] = {}
        self._prefilling: deque[Job] = deque()
        self._decoding: dict[int, Sample] = {}
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
        """Run a function on the scheduler's thread, between two steps, and return its result."""
        self.require_other_thread()
        call = Call(function)
        with self._queue.lock:  # so that it lies in the inbox before the queue is closed, or not at all
            self._queue.require_open()
            self._inbox.put(call)
        self._start()
        result: _Result = call.result()
        return result

    def wait(self, job: Job) -> None:
        """Until a request has ended."""
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

    # ------------------------------------------------------------ on the scheduler's thread

    def _run(self) -> None:
        try:
            while self._take_messages():
                self._admit()
                self._prefill()
                self._decode()
        except BaseException as error:
            self._end_all(f"the engine cannot run any more and must be loaded again: {error}", error)
        else:
            self._end_all(_CLOSED, None)

    def _start(self) -> None:
        with self._queue.lock:
            if self._thread is None:
                # A daemon, so that a program may end without closing; `process_end` then waits for it.
                self._thread = threading.Thread(target=self._run, name="mistral-trt-scheduler", daemon=True)
                self._thread.start()

    def _take_messages(self) -> bool:
        """Do what was asked for since the last step, or sleep until something is. False: it was to stop."""
        asleep = not (self._decoding or self._prefilling) and (self._reading or not self._queue.waiting)
        looked = False
        while asleep or not self._inbox.empty():
            message = self._inbox.get()
            asleep, looked = False, True
            if message is not None:
                message()
        if looked:
            for job in [job for job in (*self._queue.all(), *self._jobs) if job.cancelled]:
                self._end_cancelled(job)
        return not self._stopping

    def _admit(self) -> None:
        """Give rows to the requests that wait, the first first, until one does not get any."""
        self._reading = False
        while self._queue.waiting:
            job = self._queue.waiting[0]
            if job.rows > self._store.rows_to_have():
                return
            if job.turn is not None and not job.turn.restart and not self._store.ready(job.turn.ring):
                self._reading = True
                return
            self._queue.admit()
            self._counters.queue_seconds += time.perf_counter() - job.submitted
            self._counters.requests_started += job.rows
            self._jobs[job] = None
            self._place(job)

    def _place(self, job: Job) -> None:
        """Put a request on its rows. A session goes on where its ring is, and takes the new tokens in."""
        turn = job.turn
        try:
            if turn is None:
                rows = self._store.take_rows(job.rows)
            else:
                rows = [(self._store.restart if turn.restart else self._store.resume)(turn.ring)]
                job.feed = turn.begin(job.request.prompt)
        except GenerationError as error:
            self._fail(job, error)
            return
        except Exception as error:
            self._fail(job, backend_error(error), spoilt=True)
            return
        for row, sample in zip(rows, job.samples, strict=True):
            sample.row = row
        self._prefilling.append(job)

    def _prefill(self) -> None:
        """One chunk of the oldest request whose prompt is not all fed."""
        if not self._prefilling:
            return
        started = time.perf_counter()
        job = self._prefilling[0]
        row = job.samples[0].row
        chunk = job.feed[job.fed : job.fed + self._cache.room(row)]
        try:
            logits = self._cache.append(row, chunk, allow_long=True)
            if job.fed + len(chunk) == len(job.feed):
                for other in job.samples[1:]:
                    self._cache.copy(row, other.row)
        except NonFiniteLogitsError as error:
            self._fail(job, error, spoilt=True)
        except Exception as error:
            self._fail(job, backend_error(error), spoilt=True)
        else:
            self._has_been_fed(job, len(chunk), logits)
        self._counters.prefill_seconds += time.perf_counter() - started

    def _has_been_fed(self, job: Job, count: int, logits: Logits) -> None:
        """Count a chunk, and after the last of a prompt choose the first token of each sample."""
        job.fed += count
        self._counters.prefill_chunks += 1
        self._counters.prompt_tokens += count
        if job.fed == len(job.feed):
            self._prefilling.remove(job)
            for sample in job.samples:
                if sample.finished is None:  # an error in one ends all
                    self._decoding[sample.row] = sample
                    self._accept(sample, logits, time.perf_counter())

    def _decode(self) -> None:
        """One token for every sample whose prompt is fed."""
        if not self._decoding:
            return
        started = time.perf_counter()
        tokens = {row: sample.last_token for row, sample in self._decoding.items()}
        try:
            produced = self._cache.decode(tokens, self._cache.capacity_rows if self._fixed_batch else None)
        except NonFiniteLogitsError as error:
            produced = dict(error.healthy)
            for job, row in {self._decoding[row].job: row for row in reversed(error.rows)}.items():
                self._fail(job, NonFiniteLogitsError([row], {}), spoilt=True)
        except Exception as error:
            for job in {sample.job: None for sample in self._decoding.values()}:
                self._fail(job, backend_error(error), spoilt=True)
            return
        now = time.perf_counter()
        self._counters.steps += 1
        for row, logits in produced.items():
            if row in self._decoding:  # an error in one sample ends its siblings
                self._accept(self._decoding[row], logits, now)
        self._counters.decode_seconds += time.perf_counter() - started

    def _accept(self, sample: Sample, logits: Logits, now: float) -> None:
        """Choose a sample's next token and deliver it.  now: when its logits were there."""
        job = sample.job
        try:
            piece = sample.accept(logits)
            last = None if sample.finished is None else sample.ending(sample.finished)
        except Exception as error:  # a logits processor is the caller's code
            self._fail(job, sampling_error(error))
            return
        if piece is not None and piece.token is not None:
            self._count(sample, now)
            if job.ring is not None:
                job.ring.tokens.append(piece.token)
            self._deliver(job, piece)
        if last is not None:
            self._end(sample, last)

    def _count(self, sample: Sample, now: float) -> None:
        """Count a token, and the time since the one before it."""
        counters = self._counters
        counters.generated_tokens += 1
        if sample.produced == 1:
            counters.time_to_first_token.add(now - sample.job.submitted)
        else:
            counters.inter_token.add(now - sample.time)
        sample.time = now

    def _end(self, sample: Sample, last: Piece) -> None:
        """A sample has ended; so has its request with the last of them."""
        job = sample.job
        self._leave(sample, last.finish_reason or "stop")
        if not job.running:
            self._close_job(job)
        self._deliver(job, last)
        if not job.running:
            self._deliver(job, None)

    def _end_cancelled(self, job: Job) -> None:
        if job not in self._jobs:
            self._queue.remove(job)
        for sample in job.samples:
            if sample.finished is None:
                self._end(sample, sample.ending("cancelled"))

    def _fail(self, job: Job, error: Exception, *, spoilt: bool = False) -> None:
        """End all of a request with an error.  spoilt: its rings are not what they should be."""
        if isinstance(error, BackendError) and error.fatal:
            raise error
        if spoilt and job.ring is not None:
            self._store.lose(job.ring, f"this session lost its ring when its last turn failed: {error}")
        for sample in job.samples:
            if sample.finished is None:
                sample.finished = "error"
                self._leave(sample, "error")
        self._close_job(job)
        self._deliver(job, error)
        self._deliver(job, None)

    def _leave(self, sample: Sample, reason: FinishReason) -> None:
        """Count a sample that has ended and free its row; a session's is idle from now on."""
        job = sample.job
        job.running -= 1
        self._counters.requests_finished[reason] += 1
        self._decoding.pop(sample.row, None)
        if job in self._jobs:
            self._queue.used_rows -= 1
        if sample.row >= 0 and job.ring is None:
            self._cache.release(sample.row)
        sample.row = -1

    def _close_job(self, job: Job) -> None:
        """Forget a request, before its last piece is delivered: its session may have its next turn then."""
        self._jobs.pop(job, None)
        if job in self._prefilling:
            self._prefilling.remove(job)
        if job.ring is not None:
            self._store.rest(job.ring)
        job.done.set()

    def _deliver(self, job: Job, item: Delivery) -> None:
        try:
            job.deliver(item)
        except Exception:  # the event loop that was to take it is closed: nobody listens
            log.debug("a request is cancelled: its consumer takes nothing any more")
            self.cancel(job)

    def _forget(self, ring: SessionRing) -> None:
        if ring.job is not None:
            self._end_cancelled(ring.job)
        self._store.lose(ring, "the session was closed; start a new one")

    def _stop(self) -> None:
        self._stopping = True

    def _end_all(self, reason: str, error: BaseException | None) -> None:
        """Close for good: nobody who waits for anything is left waiting."""
        self._queue.close(reason)
        if error is not None:
            log.error("%s", reason, exc_info=error)
        for job in (*self._queue.all(), *self._jobs):
            self._end_for_good(job, reason, error)
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, Call):
                message.refuse(closed_error(reason, error))
        self._release_memory()

    def _end_for_good(self, job: Job, reason: str, error: BaseException | None) -> None:
        """As cancelled when the engine is closed, with an error when it has failed."""
        if job.ring is not None:
            job.ring.job = None
        job.done.set()
        for sample in job.samples:
            if sample.finished is None:
                self._counters.requests_finished["cancelled" if error is None else "error"] += 1
                if error is None:
                    self._deliver(job, sample.ending("cancelled"))
        if error is not None:
            self._deliver(job, closed_error(reason, error))
        self._deliver(job, None)

    def _release_memory(self) -> None:
        try:
            self._store.close()
            self._cache.close()
        except Exception as error:  # of a backend that is broken anyway
            log.warning("the engine's memory could not be given back: %s", error)
