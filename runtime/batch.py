"""Many requests → the outputs of all, a few at a time, in the order they were asked for."""

from collections import deque
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
        self._made: deque[Job] = deque()  # of the requests from _next on
        self._next = 0

    def outputs(self) -> list[Output]:
        """Request 0 sample 0, request 0 sample 1, …"""
        return [
            sample.output(with_logprobs=request.params.logprobs is not None)
            for request, samples in zip(self._requests, self._collected, strict=True)
            for sample in samples
        ]

    @property
    def lacking(self) -> int:
        """How many requests there is room for that are not made yet."""
        room = min(self._width - len(self._running), len(self._requests) - self._next)
        return max(room - len(self._made), 0)

    def make(self) -> None:
        """Make those that are lacking, which may take a while; nothing is queued, so any thread may."""
        for _ in range(self.lacking):
            self._made.append(self._make_job(self._requests[self._next + len(self._made)]))

    def feed(self, put: Put) -> bool:
        """Queue those that are made; False when all have ended.  put: takes (index, delivery).

        Raises QueueFullError if others fill the queue and none of these is in flight.
        """
        self._scheduler.require_other_thread()
        while self._made:
            job, index = self._made[0], self._next
            job.deliver = lambda item, index=index: put(index, item)  # type: ignore[misc]
            try:
                self._scheduler.submit(job)
            except QueueFullError:
                if not self._running:
                    raise
                break
            self._running[index] = self._made.popleft()
            self._next += 1
        return bool(self._running)

    def take(self, index: int, item: Delivery) -> None:
        """Put a delivery where it belongs. Raises what a request failed with."""
        if item is None:
            del self._running[index]
        elif isinstance(item, Piece):
            self._collected[index][item.index].add(item)
        else:
            try:
                raise item
            finally:
                del item  # as in `Stream`

    def cancel(self) -> None:
        """End what is still in flight."""
        for job in self._running.values():
            self._scheduler.cancel(job)


def run_batch(batch: Batch) -> list[Output]:
    """Wait for all of them. If one fails, the others are cancelled and its error is raised."""
    items: SimpleQueue[tuple[int, Delivery]] = SimpleQueue()
    try:
        batch.make()
        while batch.feed(lambda index, item: items.put((index, item))):
            batch.take(*items.get())
            batch.make()
    finally:
        batch.cancel()
    return batch.outputs()


async def run_batch_async(make_batch: Callable[[], Batch]) -> list[Output]:
    """As `run_batch`, without blocking the event loop that runs it.

    make_batch: checks what was asked. It and what makes requests run on threads of the loop's pool. Only the
    loop queues them, so a task that is cancelled meanwhile leaves nothing in the queue.
    """
    import asyncio

    batch, buffer = await asyncio.to_thread(make_batch), LoopBuffer()
    try:
        while True:
            if batch.lacking:
                await asyncio.to_thread(batch.make)
            if not batch.feed(lambda index, item: buffer.put(item, index)):
                return batch.outputs()
            batch.take(*await buffer.get())
    finally:
        batch.cancel()
