"""Long work → a progress bar on a terminal, plain lines everywhere else.

Progress goes to stderr; stdout belongs to results.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]

_PLAIN_INTERVAL_S = 10.0


log = logging.getLogger("mistral_trt")


def note(message: str) -> None:
    """One line of log; the command line sends it to stderr."""
    log.info(message)


def quiet() -> None:
    """Say nothing of how far the work is; warnings and errors are still said."""
    log.setLevel(logging.WARNING)


@contextmanager
def track(title: str, total: int, *, unit: str = "steps") -> Iterator[Advance]:
    """Yield `advance(n)`. unit: "bytes" shows sizes and rates, anything else counts."""
    if not log.isEnabledFor(logging.INFO):
        yield lambda n: None
    elif sys.stderr.isatty():
        with _rich_bar(title, total, unit) as advance:
            yield advance
    else:
        with _plain_lines(title, total, unit) as advance:
            yield advance


@contextmanager
def _rich_bar(title: str, total: int, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )

    counts = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda n: progress.advance(task, n)


@contextmanager
def _plain_lines(title: str, total: int, unit: str) -> Iterator[Advance]:
    started = last = time.monotonic()
    done = 0

    def amount(n: int) -> str:
        return f"{n / 1e6:.0f} MB" if unit == "bytes" else f"{n} {unit}"

    def rate(seconds: float) -> str:
        return f", {done / 1e6 / seconds:.0f} MB/s" if unit == "bytes" and seconds else ""

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if done < total and now - last > _PLAIN_INTERVAL_S:
            last = now
            seconds = now - started
            note(f"{title}: {amount(done)} of {amount(total)}, {seconds:.0f} s{rate(seconds)}")

    yield advance
    seconds = time.monotonic() - started
    note(f"{title}: {amount(done)} in {seconds:.1f} s{rate(seconds)}")
