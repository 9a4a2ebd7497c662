"""The benchmarks' measuring: memory of a whole process tree, mapped files left out, bytes written."""

import os
import signal
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.alone

PATH = Path(__file__).parent.parent / "bench" / "process.py"


@pytest.fixture(scope="module")
def process() -> Any:
    """bench/process.py, which is no part of the package."""
    spec = spec_from_file_location("bench_process", PATH)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


HOLD = """
import subprocess, sys, time
block = b"x" * int(sys.argv[1])
if len(sys.argv) > 2:
    subprocess.run([sys.executable, "-c", sys.argv[3], sys.argv[2]])
time.sleep(0.3)
"""


def test_memory_is_that_of_the_whole_tree(process: Any) -> None:
    measured = process.run_measured(python(HOLD, 300_000_000, 200_000_000, HOLD))
    assert measured.status == 0, measured.output
    assert 500_000_000 <= measured.peak_anonymous_bytes < 540_000_000
    alone = process.run_measured(python(HOLD, 300_000_000))
    assert 300_000_000 <= alone.peak_anonymous_bytes < 320_000_000
    assert 0.3 <= alone.seconds < 5


READ_MAPPED = """
import mmap, sys, time
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
    assert sum(view[::4096]) == 0
    assert int(open("/proc/self/statm").read().split()[1]) * 4096 > 100_000_000
    time.sleep(0.2)
"""


def test_a_mapped_file_does_not_count(process: Any, tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(bytes(100_000_000))
    measured = process.run_measured(python(READ_MAPPED, path))
    assert measured.status == 0, measured.output
    assert 0 < measured.peak_anonymous_bytes < 50_000_000


WRITE = "import sys; open(sys.argv[1], 'wb').write(bytes(50_000_000))"
WRITE_BELOW = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[2], sys.argv[1]])"


@pytest.mark.parametrize(("code", "rest"), [(WRITE, []), (WRITE_BELOW, [WRITE])])
def test_what_is_written_counts(process: Any, tmp_path: Path, code: str, rest: list[str]) -> None:
    measured = process.run_measured(python(code, tmp_path / "written", *rest))
    assert measured.status == 0, measured.output
    assert 50_000_000 <= measured.written_bytes < 52_000_000
    linked = process.run_measured(["ln", str(tmp_path / "written"), str(tmp_path / "linked")])
    assert linked.status == 0 and linked.written_bytes < 1_000_000


def test_status_and_the_end_of_what_was_printed_come_back(process: Any, tmp_path: Path) -> None:
    code = "import os, sys; print('x' * 20_000, os.getcwd(), os.environ['A'], flush=True); sys.exit('why')"
    measured = process.run_measured(python(code), env={"A": "b"}, cwd=tmp_path)
    assert measured.status == 1
    assert measured.output.endswith(f"x {tmp_path} b\nwhy\n")
    assert len(measured.output) == process.TAIL_BYTES
    killed = process.run_measured(python("import os; os.kill(os.getpid(), 9)"))
    assert killed.status == -signal.SIGKILL


def test_what_has_ended_holds_nothing(process: Any) -> None:
    assert process.anonymous_bytes(2**22 + 1) == 0
    assert process.tree(2**22 + 1) == [2**22 + 1]
    assert os.getpid() in process.tree(os.getppid())
