"""TensorRT's log → Python's `logging`, and its ERROR lines into the message of what failed.

TensorRT knows one logger a process: a second one is ignored for as long as anything made with the first
lives. So there is one for each of the two modules, and it is never given back.
"""

import logging
import threading
from collections import deque
from typing import Any

_LOG = logging.getLogger("mistral_trt.runtime")
_LEVELS = {
    "INTERNAL_ERROR": logging.ERROR,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.DEBUG,
}
"""TensorRT's severities as levels; VERBOSE lines are dropped."""

_KEPT_LINES = 8


class TensorRtLog:
    """What TensorRT says. It calls `add` from threads of its own.

    logger: its ILogger, to be passed to what takes one.
    """

    def __init__(self, trt: Any) -> None:
        self._errors: deque[str] = deque(maxlen=_KEPT_LINES)
        self._lock = threading.Lock()
        self.logger = _make_logger(trt, self)

    def add(self, severity: str, message: str) -> None:
        level = _LEVELS.get(severity)
        if level is None:
            return
        text = " ".join(message.split())
        _LOG.log(level, "TensorRT: %s", text)
        if level == logging.ERROR:
            with self._lock:
                self._errors.append(text)

    def take_errors(self) -> list[str]:
        """The ERROR lines since the last call, the latest few of them."""
        with self._lock:
            found = list(self._errors)
            self._errors.clear()
        return found

    def because(self) -> str:
        """`: ` and the ERROR lines, to end a message with; or that there are none."""
        return ": " + ("; ".join(self.take_errors()) or "it gives no reason")


_ONE: dict[Any, TensorRtLog] = {}
_ONE_LOCK = threading.Lock()


def tensorrt_log(trt: Any) -> TensorRtLog:
    """The one log of this process for a TensorRT module."""
    with _ONE_LOCK:
        if trt.ILogger not in _ONE:
            _ONE[trt.ILogger] = TensorRtLog(trt)
        return _ONE[trt.ILogger]


def _make_logger(trt: Any, log: TensorRtLog) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # a base known only at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.add(severity.name, message)

    return Logger()
