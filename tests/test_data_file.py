"""Large files: what was written is what lies there, whatever the filesystem can do."""

import errno
import fcntl
import hashlib
import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mistral_trt.export import data_file
from mistral_trt.export.data_file import DataFile


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_file, "_BLOCK_BYTES", 8192)


def write(path: Path, pieces: list[bytes]) -> tuple[str, int]:
    """The hash DataFile gives, and the bytes it counted."""
    counted: list[int] = []
    with DataFile(path, counted.append) as file:
        for piece in pieces:
            file.write(piece)
    return file.sha256(), sum(counted)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 20_000), max_size=12))
def test_the_file_is_the_pieces_joined(tmp_path: Path, sizes: list[int]) -> None:
    pieces = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
    whole = b"".join(pieces)
    found = write(tmp_path / "x", pieces)
    assert (tmp_path / "x").read_bytes() == whole
    assert found == (hashlib.sha256(whole).hexdigest(), len(whole))


def test_a_piece_may_be_changed_once_it_is_handed_over(tmp_path: Path) -> None:
    buffer = bytearray(5000)
    with DataFile(tmp_path / "x", lambda _: None) as file:
        for i in range(20):
            buffer[:] = bytes([i]) * 5000
            file.write(memoryview(buffer))
    assert (tmp_path / "x").read_bytes() == b"".join(bytes([i]) * 5000 for i in range(20))


@pytest.mark.parametrize("refuses", ["open", "write"])
def test_a_filesystem_without_direct_writes_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    direct: set[int] = set()
    real_open, real_write, real_fcntl = os.open, os.write, fcntl.fcntl

    def opening(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT and refuses == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        descriptor = real_open(path, flags & ~os.O_DIRECT, mode)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def writing(descriptor: int, data: bytes) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, data)

    def controlling(descriptor: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_GETFL:
            return real_fcntl(descriptor, command) | (os.O_DIRECT if descriptor in direct else 0)
        direct.discard(descriptor)
        return 0

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "write", writing)
    monkeypatch.setattr(fcntl, "fcntl", controlling)
    data = os.urandom(30_001)
    assert write(tmp_path / "x", [data]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert (tmp_path / "x").read_bytes() == data


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:4096]))
    data = os.urandom(50_000)
    write(tmp_path / "x", [data])
    assert (tmp_path / "x").read_bytes() == data


@pytest.mark.parametrize("pieces", [1, 40])
def test_a_full_disk_is_told(tmp_path: Path, pieces: int) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        write(Path("/dev/full"), [b"x" * 5000] * pieces)


def test_a_failure_outside_leaves_no_thread_and_no_open_file(tmp_path: Path) -> None:
    threads, descriptors = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ValueError, match="stop"), DataFile(tmp_path / "x", lambda _: None) as file:
        file.write(b"x" * 50_000)
        raise ValueError("stop")
    assert threading.active_count() == threads
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
