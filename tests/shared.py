"""Folders that are made once for all of pytest-xdist's workers: by the first that asks; the others wait."""

import fcntl
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path


class Store:
    """Folders by kind and key, under a root that every worker knows."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._seen: dict[Path, dict[str, tuple[int, int]]] = {}

    def folder(self, kind: str, key: str, make: Callable[[Path], object]) -> Path:
        """The folder `tiny` as `make` wrote it, in this process or in another."""
        home = self.root / kind / hashlib.sha256(key.encode()).hexdigest()[:16]
        made = made_once(home, lambda begun: make(begun / "tiny")) / "tiny"
        self._seen.setdefault(made, files_of(made))
        return made

    def altered(self) -> list[Path]:
        """The folders that are no longer as they were when first asked for here."""
        return [folder for folder, before in self._seen.items() if files_of(folder) != before]


def made_once(home: Path, make: Callable[[Path], object]) -> Path:
    """`home`, a folder that `make` filled.  One that raises leaves none, and the next to ask tries again."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with home.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed, or its process ends
        if not home.exists():
            begun = home.with_suffix(".begun")
            shutil.rmtree(begun, ignore_errors=True)
            begun.mkdir()
            make(begun)
            begun.rename(home)
    return home


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Name of every file: its size and when it was last written to."""
    stats = {str(path): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
