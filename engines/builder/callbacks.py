"""TensorRT's logger, progress monitor and stream writer → our log, progress bar and plan file.

TensorRT calls these from inside its build. An exception must not cross it, so each callback keeps what
went wrong and tells TensorRT to stop; `build` raises it afterwards. Their base classes come from a module
that is chosen at run time, which is why each class is made by a function.
"""

import hashlib
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from mistral_trt.engines.build_log import FAILURES, BuilderLog
from mistral_trt.progress import Advance, note

_LOG = logging.getLogger("mistral_trt")


class _OneLogger:
    """The ILogger of this process, and the log of the build that now runs.

    TensorRT knows one logger a process for as long as any builder lives, and a failed build's traceback keeps
    its builder alive: another logger gets "The logger passed into createInferBuilder differs", or nothing.
    """

    def __init__(self) -> None:
        self.loggers: dict[Any, Any] = {}  # by base class: both TensorRTs may be installed
        self.log: BuilderLog | None = None
        self.building = threading.Lock()

    def add(self, severity: str, message: str) -> None:
        if self.log is not None:
            self.log.add(severity, message)
        elif severity in FAILURES:
            _LOG.warning("TensorRT, outside of a build: %s", message)


_ONE = _OneLogger()


def make_logger(trt: Any, log: BuilderLog) -> Any:
    """TensorRT's ILogger, always the same one, which from now on writes into `log`."""
    _ONE.log = log
    if trt.ILogger not in _ONE.loggers:

        class Logger(trt.ILogger):  # type: ignore[misc]  # a base known only at run time
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                _ONE.add(severity.name, message)

        _ONE.loggers[trt.ILogger] = Logger()
    return _ONE.loggers[trt.ILogger]


@contextmanager
def only_build(trt: Any, log: BuilderLog) -> Iterator[Any]:
    """TensorRT's logger for a build that no other of this process runs beside.

    With one logger, lines of two builds could not be told apart. Builds of other processes are their own.
    """
    if not _ONE.building.acquire(blocking=False):
        note("waiting until another build in this process has ended")
        _ONE.building.acquire()
    try:
        yield make_logger(trt, log)
    finally:
        _ONE.log = None
        _ONE.building.release()


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class PhaseTree:
    """TensorRT's nested phases as one percentage that never falls and stays below 100 until `finish`."""

    def __init__(self, advance: Advance) -> None:
        self.advance, self.shown = advance, 0
        self.open: dict[str, _Phase] = {}
        self.lock = threading.Lock()  # TensorRT may report from several threads

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self.lock:
            self.open[name] = _Phase(parent, max(1, steps))

    def step(self, name: str) -> None:
        with self.lock:
            if name in self.open:
                self.open[name].done += 1
            self._show(max((self._part(n) for n, p in self.open.items() if p.parent is None), default=0.0))

    def end(self, name: str) -> None:
        with self.lock:
            self.open.pop(name, None)

    def finish(self) -> None:
        self.advance(100 - self.shown)
        self.shown = 100

    def _part(self, name: str) -> float:
        phase = self.open[name]
        inner = max((self._part(n) for n, p in self.open.items() if p.parent == name), default=0.0)
        return min(1.0, (phase.done + inner) / phase.steps)

    def _show(self, part: float) -> None:
        percent = min(99, int(100 * part))
        if percent > self.shown:
            self.advance(percent - self.shown)
            self.shown = percent


def make_monitor(trt: Any, phases: PhaseTree, cancel: threading.Event) -> Any:
    """An IProgressMonitor that feeds `phases` and ends the build once `cancel` is set."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # a base known only at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            phases.start(name, parent, steps)

        def step_complete(self, name: str, _step: int) -> bool:
            phases.step(name)
            return not cancel.is_set()

        def phase_finish(self, name: str) -> None:
            phases.end(name)

    return Monitor()


class PlanSink:
    """Where the plan goes piece by piece: a file, its hash and size. `error` keeps what stopped it."""

    def __init__(self, file: BinaryIO, cancel: threading.Event) -> None:
        self.file, self.cancel = file, cancel
        self.digest, self.bytes = hashlib.sha256(), 0
        self.error: OSError | ValueError | None = None

    def write(self, data: bytes) -> int:
        """Returns how many bytes were taken; TensorRT stops when that is not all of them."""
        if self.cancel.is_set() or self.error is not None:
            return 0
        try:
            self.file.write(data)
        except (OSError, ValueError) as error:  # ValueError: the file was closed
            self.error = error
            return 0
        self.digest.update(data)
        self.bytes += len(data)
        return len(data)


def make_writer(trt: Any, sink: PlanSink) -> Any:
    """An IStreamWriter that fills `sink`."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]  # a base known only at run time
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return sink.write(data)

    return Writer()
