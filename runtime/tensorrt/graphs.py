"""A decode step → a CUDA graph that replays it, one for each batch. Full TensorRT makes none by itself.

A graph holds addresses, shapes and the state of the context it was captured from, and dies with any of them.
"""

import logging
from collections.abc import Callable
from typing import Any

from mistral_trt.errors import BackendError
from mistral_trt.runtime.tensorrt.cuda import Cuda

_LOG = logging.getLogger("mistral_trt.runtime")


class StepGraphs:
    """Captured steps by their batch."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._instances: dict[int, Any] = {}

    def __contains__(self, batch: int) -> bool:
        return batch in self._instances

    def capture(self, batch: int, enqueue: Callable[[], None]) -> None:
        """Record what `enqueue` puts into the stream, in place of an earlier graph of that batch.

        It must have run before, unrecorded: the first enqueue of a shape does work that is no part of it.
        Raises BackendError; an error inside `enqueue` ends the recording and is raised as it is.
        """
        cuda = self._cuda
        self._drop(batch)
        # Thread-local: what other threads of the process do with CUDA does not break the recording.
        mode = cuda.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        cuda.call("cudaStreamBeginCapture", cuda.stream, mode)
        try:
            enqueue()
        except BaseException:
            self._abandon()
            raise
        try:
            graph = cuda.call("cudaStreamEndCapture", cuda.stream)
        except BackendError as error:
            raise _uncapturable(batch, error) from error
        try:
            self._instances[batch] = cuda.call("cudaGraphInstantiate", graph, 0)
        except BackendError as error:
            raise _uncapturable(batch, error) from error
        finally:
            cuda.release("cudaGraphDestroy", graph)

    def launch(self, batch: int) -> None:
        """Put a captured step into the stream."""
        self._cuda.call("cudaGraphLaunch", self._instances[batch], self._cuda.stream)

    def drop(self) -> None:
        """Forget every graph; none may be running."""
        for batch in list(self._instances):
            self._drop(batch)

    def _drop(self, batch: int) -> None:
        if batch in self._instances:
            self._cuda.release("cudaGraphExecDestroy", self._instances.pop(batch))

    def _abandon(self) -> None:
        """Take the stream out of its recording; that this may fail does not hide why."""
        try:
            graph = self._cuda.call("cudaStreamEndCapture", self._cuda.stream)
        except BackendError as error:
            _LOG.debug("a recording that failed: %s", error)
        else:
            self._cuda.release("cudaGraphDestroy", graph)


def _uncapturable(batch: int, error: BackendError) -> BackendError:
    return BackendError(
        f"the decode step of {batch} rows cannot be captured as a CUDA graph: {error}; "
        "open_tensorrt_backend(…, cuda_graphs=False) runs without graphs",
        fatal=error.fatal,
    )
