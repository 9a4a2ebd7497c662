"""This machine → the memory and disk that a build may take of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CGROUP_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Host:
    """What a build may take of a machine.

    disk_bytes: free where the engine folder will be.  linked: external weights can be hard links there.
    copy_bytes: free where a copy of the plan is kept for the next build, on another disk; None without one.
    copy_limit_bytes: a larger plan is not kept.
    """

    memory_bytes: int
    disk_bytes: int
    linked: bool = True
    copy_bytes: int | None = None
    copy_limit_bytes: int = 0

    def kept_copy_bytes(self, plan_bytes: int) -> int:
        """What keeping a plan of this size takes of the other disk."""
        return plan_bytes if self.copy_bytes is not None and plan_bytes <= self.copy_limit_bytes else 0


def can_link(source: Path, out: Path) -> bool:
    """Whether files of one folder can probably be hard-linked into another; neither need exist yet.

    One filesystem is what is looked at; links it refuses all the same become copies when they are made.
    """
    return _device(source) == _device(out)


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory this process may still take: what the machine has left, or its control group if less.

    root: where /proc and /sys are; tests give another.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([machine, *_cgroup_room(root)])


def _device(folder: Path) -> int:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place.stat().st_dev


def _cgroup_room(root: Path) -> Iterator[int]:
    """Room in each control group this process is in, its own and those above it, version 2 or 1."""
    file = root / "proc/self/cgroup"
    for line in file.read_text().splitlines() if file.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # Inside a container `path` may be the host's; the container's own files are then at the top.
        own = top / path.lstrip("/")
        for group in {top, own, *(parent for parent in own.parents if parent.is_relative_to(top))}:
            yield from _room(group, *names)


def _room(group: Path, limit_name: str, usage_name: str) -> Iterator[int]:
    if not (group / limit_name).is_file():
        return
    limit = (group / limit_name).read_text().strip()
    if limit == "max" or int(limit) > _CGROUP_UNLIMITED:
        return
    used = int((group / usage_name).read_text())
    yield max(0, int(limit) - used + _file_cache_bytes(group / "memory.stat"))


def _file_cache_bytes(stat: Path) -> int:
    """Bytes of the group's use that the kernel gives back when asked."""
    values = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
    return int(values.get("inactive_file", 0)) + int(values.get("active_file", 0))
