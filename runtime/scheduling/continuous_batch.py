"""Requests that wait → rows, prefill chunks, decode steps and tokens of each, and the end of each.

All of it runs on the scheduler's thread. A request ends in one of three ways: `_finish` for a sample whose
text is whole, `cancel`, and `fail`. They meet in `_vacate`, for each sample, and `_retire`, for the request.
"""

import logging
import time
from collections import deque
from collections.abc import Callable

from mistral_trt.errors import BackendError, GenerationError, NonFiniteLogitsError
from mistral_trt.runtime.backend import Logits
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.metrics import Counters
from mistral_trt.runtime.request import Delivery, FinishReason, Job, Piece, Sample
from mistral_trt.runtime.rings.ring_store import RingStore
from mistral_trt.runtime.scheduling.failures import backend_error, closed_error, sampling_error
from mistral_trt.runtime.scheduling.request_queue import RequestQueue

log = logging.getLogger("mistral_trt.runtime")


class ContinuousBatch:
    """The requests that have rows: those being prefilled and the samples that decode.

    fixed_batch: decode over max_batch_size rows always.  unheard: told of a request whose consumer takes
    nothing any more, to have it cancelled.
    """

    def __init__(
        self,
        cache: RollingCache,
        store: RingStore,
        counters: Counters,
        queue: RequestQueue,
        *,
        fixed_batch: bool,
        unheard: Callable[[Job], object],
    ) -> None:
        self._cache, self._store, self._counters, self._queue = cache, store, counters, queue
        self._fixed_batch, self._unheard = fixed_batch, unheard
        self._jobs: dict[Job, None] = {}
        self._prefilling: deque[Job] = deque()
        self._decoding: dict[int, Sample] = {}  # by row
        self._closing = False

    def jobs(self) -> list[Job]:
        """Every request that has not ended, also those that wait."""
        return [*self._queue.all(), *self._jobs]

    def admit(self) -> bool:
        """Give rows to requests that wait, in order of arrival, until one does not get any.

        A session's turn whose ring is on its way from a file keeps its place and holds nobody up.
        Returns whether there is anything to do until the next message comes.
        """
        admitted = False
        for job in self._queue.all() if self._queue.waiting else ():
            resumed = None if job.turn is None or job.turn.restart else job.turn.ring
            if resumed is not None and not self._store.fetch(resumed):
                continue
            if not self._store.clear_rows(job.rows, None if job.turn is None else job.turn.ring):
                break
            self._queue.admit(job)
            self._counters.queue_seconds += time.perf_counter() - job.submitted
            self._counters.requests_started += job.rows
            self._jobs[job] = None
            self._place(job)
            admitted = True
        return admitted or bool(self._jobs)

    def prefill(self) -> None:
        """Run one chunk of the oldest request whose prompt is not all fed."""
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
            self.fail(job, error, spoilt=True)
        except Exception as error:
            self.fail(job, backend_error(error), spoilt=True)
        else:
            self._has_been_fed(job, len(chunk), logits)
        self._counters.prefill_seconds += time.perf_counter() - started

    def decode(self) -> None:
        """Run one step: a token for every sample whose prompt is fed."""
        if not self._decoding:
            return
        started = time.perf_counter()
        tokens = {row: sample.last_token for row, sample in self._decoding.items()}
        try:
            produced = self._cache.decode(tokens, self._cache.capacity_rows if self._fixed_batch else None)
        except NonFiniteLogitsError as error:
            produced = dict(error.healthy)
            for job, row in {self._decoding[row].job: row for row in reversed(error.rows)}.items():
                self.fail(job, NonFiniteLogitsError([row], {}), spoilt=True)
        except Exception as error:
            for job in {sample.job: None for sample in self._decoding.values()}:
                self.fail(job, backend_error(error), spoilt=True)
            return
        now = time.perf_counter()
        self._counters.steps += 1
        for row, logits in produced.items():
            if row in self._decoding:  # an error in one sample ends its siblings
                self._accept(self._decoding[row], logits, now)
        self._counters.decode_seconds += time.perf_counter() - started

    def cancel(self, job: Job) -> None:
        """End a request as cancelled, wherever it is."""
        for sample in job.running():
            self._finish(sample, sample.ending("cancelled"))

    def fail(self, job: Job, error: Exception, *, spoilt: bool = False) -> None:
        """End a request with an error.  spoilt: its rings are not what they should be.

        Raises what is fatal: that ends every request.
        """
        if isinstance(error, BackendError) and error.fatal:
            raise error
        if spoilt and job.turn is not None:
            self._store.lose(job.turn.ring, f"this session lost its ring when its last turn failed: {error}")
        for sample in job.running():
            self._vacate(sample, "error")
        self._retire(job)
        self._deliver(job, error)
        self._deliver(job, None)

    def close(self, reason: str, error: BaseException | None) -> None:
        """End every request: as cancelled when the engine is closed, with an error when it has failed.

        Rows are not given back one by one: the backend may be what failed, and ends itself.
        """
        self._closing = True
        for job in self.jobs():
            if error is None:
                self.cancel(job)
            else:
                self.fail(job, closed_error(reason, error))

    def _place(self, job: Job) -> None:
        """Put a request on its rows. A session goes on where its ring is, and takes the new tokens in."""
        turn = job.turn
        try:
            if turn is None:
                rows = self._cache.acquire_rows(job.rows)
            else:
                rows = [(self._store.restart if turn.restart else self._store.resume)(turn.ring)]
                job.feed = turn.begin(job.request.prompt)
        except GenerationError as error:
            self.fail(job, error)
            return
        except Exception as error:
            self.fail(job, backend_error(error), spoilt=True)
            return
        for row, sample in zip(rows, job.samples, strict=True):
            sample.row = row
        self._prefilling.append(job)

    def _has_been_fed(self, job: Job, count: int, logits: Logits) -> None:
        """Count a chunk, and after the last of a prompt choose the first token of each sample."""
        job.fed += count
        self._counters.prefill_chunks += 1
        self._counters.prompt_tokens += count
        if job.fed == len(job.feed):
            self._prefilling.remove(job)
            for sample in job.samples:
                if not sample.ended:  # an error in one ends all
                    self._decoding[sample.row] = sample
                    self._accept(sample, logits, time.perf_counter())

    def _accept(self, sample: Sample, logits: Logits, now: float) -> None:
        """Choose a sample's next token and deliver it.  now: when its logits were there."""
        job = sample.job
        try:
            piece = sample.accept(logits)
            last = None if sample.finished is None else sample.ending(sample.finished)
        except Exception as error:  # a logits processor is the caller's code
            self.fail(job, sampling_error(error))
            return
        if piece is not None and piece.token is not None:
            self._count(sample, now)
            if job.turn is not None:
                job.turn.history.tokens.append(piece.token)
            self._deliver(job, piece)
        if last is not None:
            self._finish(sample, last)

    def _count(self, sample: Sample, now: float) -> None:
        """Count a token, and the time since the one before it."""
        counters = self._counters
        counters.generated_tokens += 1
        if sample.produced == 1:
            counters.time_to_first_token.add(now - sample.job.submitted)
        else:
            counters.inter_token.add(now - sample.time)
        sample.time = now

    def _finish(self, sample: Sample, last: Piece) -> None:
        """A sample's text ends with its last piece, and its request with the last sample."""
        job = sample.job
        self._vacate(sample, last.finish_reason or "stop")
        whole = not job.running()
        if whole:
            self._retire(job)
        self._deliver(job, last)
        if whole:
            self._deliver(job, None)

    def _vacate(self, sample: Sample, reason: FinishReason) -> None:
        """Count a sample that has ended and free its row; a session's is idle from now on."""
        job, row = sample.job, sample.row
        sample.finished, sample.ended, sample.row = reason, True, -1
        self._counters.requests_finished[reason] += 1
        self._decoding.pop(row, None)
        if job in self._jobs:
            self._queue.leave_row()
        if row >= 0 and job.turn is None and not self._closing:
            self._cache.release(row)

    def _retire(self, job: Job) -> None:
        """Forget a request, before its last piece is delivered: its session may have its next turn then."""
        self._jobs.pop(job, None)
        if job in self._prefilling:
            self._prefilling.remove(job)
        if job.turn is not None and not self._closing:
            self._store.rest(job.turn.ring)
        self._queue.end(job)
        job.done.set()

    def _deliver(self, job: Job, item: Delivery) -> None:
        try:
            job.deliver(item)
        except Exception:  # the event loop that was to take it is closed: nobody listens
            log.debug("a request is cancelled: its consumer takes nothing any more")
            self._unheard(job)
