"""A command → what it took: seconds, peak memory of its own, bytes written; and the machine it ran on.

Memory is anonymous memory (RssAnon) summed over the process and all its descendants, sampled every 20 ms:
what the command itself holds, without the files it has mapped. Pages that a fork shares count once for
each process that has them.
"""

import os
import platform
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mistral_trt.manifest import tool_versions

SAMPLE_S = 0.02
TAIL_BYTES = 8000
TOOLS = ("torch", "onnx", "onnxruntime", "transformers", "tensorrt-rtx")


@dataclass(frozen=True)
class Measurement:
    """What one command took.  written_bytes: by it and its descendants, page cache included.

    output: the end of what it printed, stdout and stderr together.
    """

    seconds: float
    peak_anonymous_bytes: int
    written_bytes: int
    status: int
    output: str


def run_measured(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Measurement:
    """Run a command to its end. A status other than 0 is not an error here."""
    with tempfile.TemporaryFile() as printed:
        started = time.perf_counter()
        with subprocess.Popen(
            command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT
        ) as child:
            sampler = Sampler(child.pid)
            try:
                _, status, usage = os.wait4(child.pid, 0)
                seconds = time.perf_counter() - started
                child.returncode = os.waitstatus_to_exitcode(status)
            except BaseException:
                child.kill()
                raise
            finally:
                peak = sampler.stop()
        return Measurement(seconds, peak, usage.ru_oublock * 512, child.returncode, _tail(printed))


class Sampler:
    """A thread that looks at a process tree until it is stopped."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._stopped = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Peak in bytes."""
        self._stopped.set()
        self._thread.join()
        return self._peak

    def _sample(self) -> None:
        while True:
            self._peak = max(self._peak, sum(anonymous_bytes(pid) for pid in tree(self._pid)))
            if self._stopped.wait(SAMPLE_S):
                return


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for process in found:  # grows as it goes
        try:
            threads = list(Path(f"/proc/{process}/task").glob("*/children"))
            found += [int(child) for children in threads for child in children.read_text().split()]
        except OSError:  # ended while we looked
            continue
    return found


def anonymous_bytes(pid: int) -> int:
    """RssAnon of one process; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = (line.split() for line in status.splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[0] == "RssAnon:"), 0)


def _tail(printed: IO[bytes]) -> str:
    size = printed.seek(0, os.SEEK_END)
    printed.seek(max(0, size - TAIL_BYTES))
    return printed.read().decode(errors="replace")


def machine() -> dict[str, Any]:
    """This machine and the versions of what is measured on it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpus": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "platform": platform.platform(terse=True),
        "versions": tool_versions(*TOOLS),
    }
