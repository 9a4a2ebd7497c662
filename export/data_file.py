"""Bytes → a large file, hashed on the way and written past the page cache where the filesystem can do that.

A checkpoint's worth of weights through the page cache costs a core more time than everything else an export
does, and pushes out the checkpoint that is being read.
"""

import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mistral_trt.progress import Advance

_BLOCK_BYTES, _BLOCKS = 1 << 22, 4
_PAGE_BYTES = 4096


class DataFile:
    """A new file that is appended to. A thread of its own hashes and writes full blocks while others fill.

    advance: called with the bytes of each block. Use it in a `with`; what a block's writing raised is raised
    by a later `write` or at the end.
    """

    def __init__(self, path: Path, advance: Advance) -> None:
        self._descriptor = _open(path)
        self._advance = advance
        self._digest = hashlib.sha256()
        self._blocks = deque(np.frombuffer(mmap.mmap(-1, _BLOCK_BYTES), np.uint8) for _ in range(_BLOCKS))
        self._filled = self._bytes = 0
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; they may be changed afterwards."""
        waiting = np.frombuffer(data, np.uint8)
        while len(waiting):
            taken = min(len(waiting), _BLOCK_BYTES - self._filled)
            self._blocks[0][self._filled : self._filled + taken] = waiting[:taken]
            self._filled += taken
            waiting = waiting[taken:]
            if self._filled == _BLOCK_BYTES:
                self._hand_over()

    def sha256(self) -> str:
        """The hash of everything written; for after the `with`."""
        return self._digest.hexdigest()

    def __enter__(self) -> "DataFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._pool:
                if kind is None:
                    self._hand_over()
                    self._settle(0)
                    os.ftruncate(self._descriptor, self._bytes)
                    os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def _hand_over(self) -> None:
        self._pending.append(self._pool.submit(self._emit, self._blocks[0], self._filled))
        self._settle(_BLOCKS - 1)
        self._blocks.rotate(-1)
        self._filled = 0

    def _settle(self, left: int) -> None:
        """Wait until at most `left` blocks are still to be written."""
        while len(self._pending) > left:
            self._pending.popleft().result()

    def _emit(self, block: np.ndarray, count: int) -> None:
        self._digest.update(block[:count].data)
        whole = (
            -(-count // _PAGE_BYTES) * _PAGE_BYTES
        )  # what is beyond the end is cut off when all is written
        done = 0
        while done < whole:
            done += _write(self._descriptor, block[done:whole].data)
        self._bytes += count
        self._advance(count)


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a filesystem without direct writes, tmpfs for one
            raise
        return os.open(path, flags, 0o644)


def _write(descriptor: int, data: memoryview) -> int:
    """os.write; a filesystem that takes the flag and then no direct write gets an ordinary one."""
    try:
        return os.write(descriptor, data)
    except OSError as error:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
            raise
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return os.write(descriptor, data)
