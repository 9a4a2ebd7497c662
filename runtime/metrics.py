"""What the scheduler does → numbers a service can watch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LATEST = 4096
"""How many of the latest times a quantile is taken of."""


@dataclass(frozen=True)
class Quantiles:
    """Of the latest 4096 times, in seconds; 0 before there is one."""

    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0


@dataclass(frozen=True)
class Metrics:
    """One moment of an engine; counters start at 0 when it is loaded.

    requests_started: those that got a row.  requests_finished: by finish reason, "error" among them; with
    n > 1 each sample counts, and so does one that was cancelled before it got a row.
    prompt_tokens: fed in prefill.  generated_tokens: sampled, end tokens left out.
    steps, decode_seconds: calls that decode, and the time of all of them.  prefill_chunks, prefill_seconds:
    the same of calls that prefill.  Both times take in sampling and text.
    queue_length: requests waiting for a row.  queue_seconds: how long all of those admitted have waited.
    active_rows: rows of running requests, of capacity_rows.
    time_to_first_token: from the call of `stream` to the first token, queue and prefill included.
    inter_token: between two tokens of one stream.
    idle_sessions: sessions that hold a ring and do not run; session_bytes: what their rings take in host
    memory, session_disk_bytes: in files.  session_moves: rings that left their row for another request.
    session_restarts: turns that had to be fed from position 0 again.
    """

    requests_started: int = 0
    requests_finished: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    prefill_chunks: int = 0
    queue_length: int = 0
    active_rows: int = 0
    capacity_rows: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    queue_seconds: float = 0.0
    time_to_first_token: Quantiles = Quantiles()
    inter_token: Quantiles = Quantiles()
    idle_sessions: int = 0
    session_bytes: int = 0
    session_disk_bytes: int = 0
    session_moves: int = 0
    session_restarts: int = 0


class Latest:
    """The latest 4096 values, written by one thread and read by any."""

    def __init__(self) -> None:
        self._values: list[float] = []
        self._count = 0

    def add(self, value: float) -> None:
        if self._count < LATEST:
            self._values.append(value)
        else:
            self._values[self._count % LATEST] = value
        self._count += 1

    def quantiles(self) -> Quantiles:
        return quantiles(self._values[:])


class Counters:
    """Where the scheduler's thread counts. It alone writes, so nothing is locked."""

    def __init__(self) -> None:
        self.requests_started = 0
        self.requests_finished = dict.fromkeys(("stop", "length", "context", "cancelled", "error"), 0)
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.steps = 0
        self.prefill_chunks = 0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.queue_seconds = 0.0
        self.session_moves = 0
        self.session_restarts = 0
        self.time_to_first_token = Latest()
        self.inter_token = Latest()

    def snapshot(self, now: Mapping[str, int]) -> Metrics:
        """The counters, and what is true `now`: fields of `Metrics` that are no counters."""
        fields: dict[str, Any] = {
            **vars(self),
            "requests_finished": dict(self.requests_finished),
            "time_to_first_token": self.time_to_first_token.quantiles(),
            "inter_token": self.inter_token.quantiles(),
            **now,
        }
        return Metrics(**fields)


def quantiles(values: Sequence[float]) -> Quantiles:
    """The smallest value that at least the fraction p of all do not exceed.

    1 2 3 4: p50 2, p90 4, p99 4.
    """
    ordered = sorted(values)
    if not ordered:
        return Quantiles()
    # The rank is -(-n * percent // 100), counted from 1: whole numbers, which 0.9 * n is not.
    return Quantiles(*(ordered[-(-len(ordered) * percent // 100) - 1] for percent in (50, 90, 99)))
