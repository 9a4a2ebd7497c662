"""The allocator while a build runs: what is freed is reused, and afterwards given back."""

import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mistral_trt.engines.builder.heap import keeping_heap

BLOCK = 64 << 20
C = ctypes.CDLL(None)
C.malloc.restype = ctypes.c_void_p
C.malloc.argtypes = [ctypes.c_size_t]
C.free.argtypes = [ctypes.c_void_p]
C.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


def faults(blocks: int) -> int:
    """Page faults of taking, clearing and giving back a large block so many times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(blocks):
        address = C.malloc(BLOCK)
        C.memset(address, 0, BLOCK)
        C.free(address)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def check() -> None:
    """Run in a process of its own: other tests' threads have heaps of their own."""
    before, outside = resident_bytes(), faults(4)
    with keeping_heap():
        faults(1)
        inside = faults(4)
        assert resident_bytes() - before > BLOCK / 2, "it is kept"
    assert outside > 10 * max(1, inside), (outside, inside)
    assert resident_bytes() - before < BLOCK / 2, "all is given back"
    assert faults(4) > outside / 2, "as it was before"


@pytest.mark.alone
def test_freed_blocks_are_reused_and_given_back() -> None:
    subprocess.run([sys.executable, "-c", "from tests.test_heap import check; check()"], check=True)


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with keeping_heap():
        pass
