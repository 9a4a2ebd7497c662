"""Progress goes to stderr: a bar on a terminal, plain lines everywhere else."""

import logging
import sys
import time

import pytest

from mistral_trt.cli import log_to_stderr
from mistral_trt.progress import note, quiet, track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until its one entry is changed."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_note_goes_to_the_log_of_the_package(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mistral_trt"):
        note("said")
    assert [(record.name, record.message) for record in caplog.records] == [("mistral_trt", "said")]


@pytest.mark.parametrize(
    ("unit", "lines"),
    [
        (
            "bytes",
            [
                "work: 500 MB of 2000 MB, 11 s, 45 MB/s",
                "work: 1200 MB of 2000 MB, 23 s, 52 MB/s",
                "work: 1200 MB in 23.0 s, 52 MB/s",
            ],
        ),
        (
            "layers",
            [
                "work: 500000000 layers of 2000000000 layers, 11 s",
                "work: 1200000000 layers of 2000000000 layers, 23 s",
                "work: 1200000000 layers in 23.0 s",
            ],
        ),
    ],
)
def test_plain_lines_come_every_ten_seconds_and_at_the_end(
    clock: list[float], caplog: pytest.LogCaptureFixture, unit: str, lines: list[str]
) -> None:
    with caplog.at_level(logging.INFO, "mistral_trt"), track("work", 2_000_000_000, unit=unit) as advance:
        for seconds, amount in ((1, 200_000_000), (10, 300_000_000), (2, 400_000_000), (10, 300_000_000)):
            clock[0] += seconds
            advance(amount)
    assert caplog.messages == lines


def test_work_that_is_done_is_one_line(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mistral_trt"), track("work", 3) as advance:
        advance(1)
        advance(1)
        clock[0] += 50
        advance(1)
    assert caplog.messages == ["work: 3 steps in 50.0 s"]


@pytest.mark.parametrize(("unit", "shown"), [("bytes", "2.0/2.0 kB"), ("steps", "2000/2000")])
def test_a_terminal_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unit: str, shown: str
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    log_to_stderr()
    with track("work", 2000, unit=unit) as advance:
        advance(1500)
        advance(500)
    written = capsys.readouterr()
    assert written.out == ""
    assert "work" in written.err and shown in written.err


@pytest.mark.parametrize("terminal", [True, False])
def test_when_it_is_quiet_only_warnings_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    log_to_stderr()
    quiet()
    note("unsaid")
    with track("work", 1, unit="bytes") as advance:
        advance(1)
    logging.getLogger("mistral_trt").warning("said")
    assert capsys.readouterr() == ("", "said\n")


def test_work_without_a_moment_has_no_rate(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mistral_trt"), track("work", 10**9, unit="bytes") as advance:
        advance(10**9)
    assert caplog.messages == ["work: 1000 MB in 0.0 s"]


def test_nothing_of_it_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr()
    with track("work", 1) as advance:
        advance(1)
    written = capsys.readouterr()
    assert written.out == "" and written.err.startswith("work: 1 steps in ")
