"""A calibration under way or finished → files in the cache folder, so that a stopped run goes on.

One folder for each calibration, named after everything it depends on: a file of scales for each finished
layer, and the hidden states that enter the first unfinished one.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from mistral_trt.artifact import cache_folder, write_file
from mistral_trt.export.quantization.scales import LinearScales, load_scales, save_scales
from mistral_trt.progress import note

_REMEMBERED = 4
_LOCK = ".lock"
_HIDDEN = "hidden.safetensors"


@dataclass(frozen=True)
class CalibrationStore:
    """The folder of one calibration, whose parts are the layers and, if asked for, the lm_head."""

    folder: Path

    def save(self, part: int, scales: dict[str, LinearScales]) -> None:
        """Keep the scales of one finished part."""
        save_scales(self._path(part), scales)

    def load(self, parts: int) -> dict[str, LinearScales] | None:
        """Scales of all parts, None unless every one is finished."""
        paths = [self._path(part) for part in range(parts)]
        if not all(path.is_file() for path in paths):
            return None
        return {name: found for path in paths for name, found in load_scales(path).items()}

    def save_hidden(self, part: int, hidden: Tensor) -> None:
        """Keep what enters `part`, the first that is not finished."""
        write_file(self.folder / _HIDDEN, save({"hidden": hidden, "part": torch.tensor(part)}))

    def load_hidden(self) -> tuple[int, Tensor] | None:
        """The first part that is not finished and what enters it; None at the beginning."""
        path = self.folder / _HIDDEN
        if not path.is_file():
            return None
        found = load_file(path)
        return int(found["part"]), found["hidden"]

    def finish(self) -> None:
        """Every part is kept: the hidden states are not needed any more."""
        (self.folder / _HIDDEN).unlink(missing_ok=True)

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:03d}.safetensors"


@contextmanager
def open_store(key: str) -> Iterator[CalibrationStore]:
    """The store of this key, for this process alone; another that wants it waits.

    Of other stores that nobody uses, the newest few are kept.
    """
    folder = cache_folder() / "calibration" / key
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        if not _locked(lock):
            note("another run makes the same calibration: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(folder)
        _forget([path for path in folder.parent.iterdir() if path != folder])
        yield CalibrationStore(folder)


def _forget(others: Sequence[Path]) -> None:
    """Remove all but the newest few stores, and none that is in use."""
    newest_first = sorted(others, key=lambda path: -path.stat().st_mtime)
    for folder in newest_first[_REMEMBERED:]:
        with suppress(OSError), (folder / _LOCK).open("w") as lock:
            if _locked(lock):
                shutil.rmtree(folder, ignore_errors=True)


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
