"""Streams of one engine → how soon the first token comes, and how evenly the others follow.

Times are a consumer's: each stream is read by a thread of its own.
"""

import statistics
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any

from quantization_checks import Check
from runtime_steps import Run, longest_prefill, microseconds, quantile, timed_runs

from mistral_trt.runtime import Engine, SamplingParams

SHORT = [0, *range(3, 34)]
LONG_WINDOWS, LONG_PROMPTS = 40, 5
ROUNDS = 20
"""Of short requests, for the time to the first token; one more before them does not count."""
GAP_MAX = 3.0
"""Over the graph's time for a chunk and a step; host time and other threads come on top of that."""


def prompt_of(engine: Engine, windows: int) -> list[int]:
    """A prompt of so many windows of the engine's model, of the bytes' tokens."""
    return [0, *(3 + i % 250 for i in range(windows * engine.manifest.contract.ring.sliding_window - 1))]


@dataclass
class Reader:
    """A stream that a thread reads.  times: when each token was there, after `asked`."""

    engine: Engine
    prompt: Sequence[int]
    tokens: int
    times: list[float] = field(default_factory=list)
    first: threading.Event = field(default_factory=threading.Event)

    def start(self) -> "Reader":
        self.asked = perf_counter()
        params = SamplingParams(max_tokens=self.tokens, ignore_eos=True)
        self._stream = self.engine.stream(self.prompt, params)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        return self

    def join(self) -> None:
        self._thread.join()

    def cancel(self) -> None:
        self._stream.cancel()

    @property
    def first_token_s(self) -> float:
        return self.times[0] - self.asked

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.times)]

    def _read(self) -> None:
        for piece in self._stream:
            if piece.token is not None:
                self.times.append(perf_counter())
                self.first.set()


def rhythm(engine: Engine, *, tokens: int) -> dict[str, Any]:
    """One stream, a stream on each row, and one stream beside the prefill of a prompt of 40 windows."""
    rows = engine.manifest.contract.max_batch_size
    figures = {
        "1 stream": together(engine, 1, tokens),
        f"{rows} streams": together(engine, rows, tokens),
        "beside a long prompt": beside_prefill(engine),
    }
    return {"figures": figures, "checks": checks(figures), "remarks": []}


def together(engine: Engine, count: int, tokens: int) -> dict[str, Any]:
    """So many streams at once: twenty times a token of each, then all their tokens."""
    rounds = [read_together(engine, count, 1) for _ in range(1 + ROUNDS)][1:]
    return {
        "first_token": microseconds([reader.first_token_s for readers in rounds for reader in readers]),
        "gap": microseconds([gap for reader in read_together(engine, count, tokens) for gap in reader.gaps]),
    }


def read_together(engine: Engine, count: int, tokens: int) -> list[Reader]:
    readers = [Reader(engine, SHORT, tokens).start() for _ in range(count)]
    for reader in readers:
        reader.join()
    return readers


def beside_prefill(engine: Engine) -> dict[str, Any]:
    """The gaps of a stream while long prompts are prefilled, beside the time of one chunk and one step."""
    chunk, prompt = engine.manifest.contract.ring.prefill_chunk, prompt_of(engine, LONG_WINDOWS)
    with timed_runs() as runs:
        running = Reader(engine, SHORT, 100_000).start()
        running.first.wait()
        longs = [Reader(engine, prompt, 1).start() for _ in range(LONG_PROMPTS)]
        for long in longs:
            long.join()
        running.cancel()
        running.join()
    chunks = [run for run in runs if run.new_tokens == chunk and run.began > longs[0].asked]
    began, ended = chunks[0].began, chunks[-1].ended
    gaps = [b - a for a, b in pairwise(running.times) if began <= a and b <= ended]
    expected = statistics.median(run.seconds for run in chunks) + decode_seconds(runs, began, ended)
    return {
        "first_token": microseconds([longs[0].first_token_s]),
        "gap": microseconds(gaps),
        "chunk_and_step_us": round(1e6 * expected, 1),
        "gap_p90_over_chunk_and_step": round(quantile(gaps, 90) / expected, 3),
        "chunks_in_a_row": longest_prefill(runs),
    }


def decode_seconds(runs: Sequence[Run], began: float, ended: float) -> float:
    return statistics.median(run.seconds for run in runs if run.decodes and began <= run.began <= ended)


def checks(figures: Mapping[str, Any]) -> list[Check]:
    found = []
    for what, of in figures.items():
        found += [
            Check(f"{what}: time to first token, median, ms", of["first_token"]["median_us"] / 1e3),
            Check(f"{what}: inter-token gap, median, ms", of["gap"]["median_us"] / 1e3),
            Check(f"{what}: inter-token gap, p99, ms", of["gap"]["p99_us"] / 1e3),
        ]
    beside = figures["beside a long prompt"]
    ratio, in_a_row = beside["gap_p90_over_chunk_and_step"], beside["chunks_in_a_row"]
    return [
        *found,
        Check("beside a long prompt: gap p90 / (chunk + step)", ratio, at_most=GAP_MAX),
        Check("beside a long prompt: chunks without a step between", in_a_row, at_most=1),
    ]
