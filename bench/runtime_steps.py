"""What the engine does step by step → when its backend ran, and all the time between.

The backend that the engine opens is timed from the outside: its `run`, and nothing else of the runtime, is
wrapped, so what lies between two runs is everything that a step costs beside the graph.
"""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

from mistral_trt.runtime.onnxruntime_backend import OnnxRuntimeBackend


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the backend: seconds when it began and ended, rows, and new tokens a row."""

    began: float
    ended: float
    rows: int
    new_tokens: int

    @property
    def decodes(self) -> bool:
        return self.new_tokens == 1

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@contextmanager
def timed_runs() -> Iterator[list[Run]]:
    """The runs of every backend that is used meanwhile, as they end."""
    original, runs = OnnxRuntimeBackend.run, list[Run]()

    def run(self: OnnxRuntimeBackend, step: Any) -> Any:
        began = perf_counter()
        logits = original(self, step)
        runs.append(Run(began, perf_counter(), *step.input_ids.shape))
        return logits

    OnnxRuntimeBackend.run = run  # type: ignore[method-assign]
    try:
        yield runs
    finally:
        OnnxRuntimeBackend.run = original  # type: ignore[method-assign]


def decode_pairs(runs: Sequence[Run], rows: int) -> list[tuple[Run, Run]]:
    """Decode runs of so many rows that followed one another."""
    wanted = ((a, b) for a, b in pairwise(runs) if a.decodes and b.decodes)
    return [(a, b) for a, b in wanted if a.rows == b.rows == rows]


def overheads(runs: Sequence[Run], rows: int) -> list[float]:
    """Seconds from the end of one decode run to the beginning of the next."""
    return [after.began - before.ended for before, after in decode_pairs(runs, rows)]


def steps(runs: Sequence[Run], rows: int) -> list[float]:
    """Seconds of whole decode steps: from the end of one run to the end of the next."""
    return [after.ended - before.ended for before, after in decode_pairs(runs, rows)]


def longest_prefill(runs: Sequence[Run]) -> int:
    """Most prefill runs without a decode run between two of them, after the first decode run."""
    longest = count = 0
    for run in runs[next((i for i, run in enumerate(runs) if run.decodes), len(runs)) :]:
        count = 0 if run.decodes else count + 1
        longest = max(longest, count)
    return longest


def quantile(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least so many percent of all do not exceed.  1 2 3 4: 50 -> 2, 99 -> 4"""
    return sorted(values)[-(-len(values) * percent // 100) - 1]


def microseconds(values: Sequence[float]) -> dict[str, float]:
    """Median and tail of times in seconds."""
    return {
        "median_us": round(1e6 * statistics.median(values), 1),
        "p99_us": round(1e6 * quantile(values, 99), 1),
        "count": len(values),
    }
