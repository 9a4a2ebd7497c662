"""Many requests → the outputs of all, a few at a time, in the order they were asked for."""

from collections.abc import Callable, Sequence
from queue import SimpleQueue

from mistral_trt.errors import QueueFullError
from mistral_trt.runtime.request import Delivery, FinishReason, Job, Output, Piece, Request
from mistral_trt.runtime.sampling.sampler import Choice
from mistral_trt.runtime.scheduling.scheduler import Scheduler
from mistral_trt.runtime.stream import LoopBuffer

Put = Callable[[int, Delivery], object]


class Collected:
    """The pieces of one sample so far."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._texts: list[str] = []
        self._choices: list[Choice] = []
        self._finish_reason: FinishReason = "error"

    def add(self, piece: Piece) -> None:
        self._texts.append(piece.text)
        if piece.token is not None:
            self._choices.append(Choice(piece.token, piece.logprob, piece.top_logprobs))
        if piece.finish_reason is not None:
            self._finish_reason = piece.finish_reason

    def output(self, *, with_logprobs: bool) -> Output:
        tokens = tuple(choice.token for choice in self._choices)
        logprobs = tuple(self._choices) if with_logprobs else None
        return Output("".join(self._texts), tokens, self._finish_reason, logprobs, self._index)


class Batch:
    """Requests that are queued as others end, so that a long list does not fill the engine's queue.

    make_job: what turns one into a request in flight.  width: how many may be in flight.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        make_job: Callable[[Request], Job],
        scheduler: Scheduler,
        width: int,
    ) -> None:
        self._requests, self._make_job, self._scheduler, self._width = requests, make_job, scheduler, width
        self._collected = [[Collected(index) for index in range(r.params.n)] for r in requests]
        self._running: dict[int, Job] = {}
        self._made: Job | None = None  # the next one, where the queue had no room for it
        self._next = 0

    def outputs(self) -> list[Output]:
        """Request 0 sample 0, request 0 sample 1, …"""
        return [
            sample.output(with_logprobs=request.params.logprobs is not None)
            for request, samples in zip(self._requests, self._collected, strict=True)
            for sample in samples
        ]

    def feed(self, put: Put) -> bool:
        """Queue what there is room for; False when all have ended.  put: takes (index, delivery).

        Raises QueueFullError if others fill the queue and none of these is in flight.
        """
        self._scheduler.require_other_thread()
        while self._next < len(self._requests) and len(self._running) < self._width:
            index = self._next
            job = self._made = self._made or self._make_job(self._requests[index])
            job.deliver = lambda item, index=index: put(index, item)  # type: ignore[misc]
            try:
                self._scheduler.submit(job)
            except QueueFullError:
                if not self._running:
                    raise
                break
            self._running[index], self._made = job, None
            self._next += 1
        return bool(self._running)

    def take(self, index: int, item: Delivery) -> None:
        """Put a delivery where it belongs. Raises what a request failed with."""
        if item is None:
            del self._running[index]
        elif isinstance(item, Piece):
            self._collected[index][item.index].add(item)
        else:
            raise item

    def cancel(self) -> None:
        """End what is still in flight."""
        for job in self._running.values():
            self._scheduler.cancel(job)


def run_batch(batch: Batch) -> list[Output]:
    """Wait for all of them. If one fails, the others are cancelled and its error is raised."""
    items: SimpleQueue[tuple[int, Delivery]] = SimpleQueue()
    try:
        while batch.feed(lambda index, item: items.put((index, item))):
            batch.take(*items.get())
    finally:
        batch.cancel()
    return batch.outputs()


async def run_batch_async(batch: Batch) -> list[Output]:
    """As `run_batch`, without blocking the event loop that runs it."""
    buffer = LoopBuffer()
    try:
        while batch.feed(lambda index, item: buffer.put(item, index)):
            batch.take(*await buffer.get())
    finally:
        batch.cancel()
    return batch.outputs()
