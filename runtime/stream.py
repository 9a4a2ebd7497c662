"""Pieces that the scheduler's thread delivers → an iterator for a thread or for an event loop."""

from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from mistral_trt.errors import GenerationError
from mistral_trt.runtime.request import Delivery, Job, Piece
from mistral_trt.runtime.scheduling.scheduler import Scheduler


class Stream:
    """The pieces of one request, as they come. One that is closed or no longer referenced is cancelled.

    owner: kept alive as long as pieces come, so that an engine is not closed under its stream.
    """

    _ended = True  # until the request is queued

    def __init__(self, job: Job, scheduler: Scheduler, owner: object) -> None:
        """Queue the request. Raises QueueFullError, or EngineClosedError."""
        self._job, self._scheduler, self._owner = job, scheduler, owner
        self._items: SimpleQueue[Delivery] = SimpleQueue()
        job.deliver = self._items.put
        scheduler.submit(job)
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        """The next piece, waiting for it. Raises what ended the request, GenerationError among others."""
        if self._ended:
            raise StopIteration
        if self._items.empty():
            self._scheduler.require_other_thread()
        item = self._items.get()
        if isinstance(item, Piece):
            return item
        self._ended, self._owner = True, None
        self._items.put(None)  # for another thread that may be waiting here
        if item is None:
            raise StopIteration
        try:
            raise item
        finally:
            del item  # or its own frame would keep the error, and with it what the caller's frames hold

    def cancel(self) -> None:
        """End the request, from any thread; its row is free at the next step.

        What was produced so far can still be read; the last piece says "cancelled".
        """
        if not self._ended:
            self._scheduler.cancel(self._job)

    def close(self) -> None:
        """Cancel, and read no further."""
        self.cancel()
        self._ended, self._owner = True, None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class LoopBuffer:
    """Deliveries from another thread → awaited in the event loop that made this.

    The loop is woken once for all that came since it last looked.
    """

    def __init__(self) -> None:
        import asyncio  # here: a program without an event loop starts without it

        self._loop = asyncio.get_running_loop()
        self._items: deque[tuple[int, Delivery]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._woken = False

    def put(self, item: Delivery, index: int = 0) -> None:
        """Called on the scheduler's thread. Raises RuntimeError when the loop is closed."""
        self._items.append((index, item))
        if not self._woken or self._loop.is_closed():  # a closed loop never looks, however often it is woken
            self._woken = True
            self._loop.call_soon_threadsafe(self._wake)

    async def get(self) -> tuple[int, Delivery]:
        """The next item, with the index it was put under."""
        while not self._items:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._items.popleft()

    def _wake(self) -> None:
        self._woken = False  # first: what is appended from now on wakes again
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncStream:
    """As `Stream`, for `async for`. The request is checked and queued when the first piece is asked for.

    Cancelling the task that waits for a piece cancels the request.
    """

    def __init__(self, prepare: Callable[[], Job], scheduler: Scheduler, owner: object) -> None:
        """prepare: checks what was asked, which may take a while; it runs on a thread of the loop's pool."""
        self._prepare: Callable[[], Job] | None = prepare
        self._scheduler, self._owner = scheduler, owner
        self._buffer: LoopBuffer | None = None
        self._job: Job | None = None
        self._ended = self._awaited = self._cancelled = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        if self._ended:
            raise StopAsyncIteration
        if self._awaited:
            raise GenerationError("one task at a time may wait for a stream's next piece")
        self._awaited = True
        try:
            item = await self._next()
        except BaseException:
            self.close()
            raise
        finally:
            self._awaited = False
        if isinstance(item, Piece):
            return item
        self._ended, self._owner = True, None
        if item is None:
            raise StopAsyncIteration
        try:
            raise item
        finally:
            del item  # as in `Stream`

    async def _next(self) -> Delivery:
        if self._prepare is not None:
            prepare, self._prepare = self._prepare, None
            import asyncio

            job = await asyncio.to_thread(prepare)
            buffer = LoopBuffer()
            job.deliver = buffer.put
            self._scheduler.submit(job)
            self._job, self._buffer = job, buffer
            if self._cancelled:  # while it was prepared
                self._scheduler.cancel(job)
        assert self._buffer is not None
        return (await self._buffer.get())[1]

    def cancel(self) -> None:
        """End the request; its last piece says "cancelled"."""
        self._cancelled = True
        if self._job is not None and not self._ended:
            self._scheduler.cancel(self._job)

    def close(self) -> None:
        """Cancel, and read no further."""
        self.cancel()
        self._ended, self._owner = True, None

    async def aclose(self) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
