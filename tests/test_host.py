"""What memory and disk this machine has left for a build, and whether files can be linked."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mistral_trt.artifact import free_disk_bytes
from mistral_trt.engines.planning.host import available_memory_bytes, can_link


def test_free_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert free_disk_bytes(tmp_path / "a" / "b") > 0


def fake_root(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 2000 kB\nMemAvailable: 1000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1_024_000),
        ({"proc/self/cgroup": "0::/\n"}, 1_024_000),
        # a container sees its own group at the top, whatever the path says
        (
            {
                "proc/self/cgroup": "0::/host/path\n",
                "sys/fs/cgroup/memory.max": "500000\n",
                "sys/fs/cgroup/memory.current": "300000\n",
                "sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 5000\nactive_file 20000\n",
            },
            225_000,
        ),
        # the tightest group on the way up counts
        (
            {
                "proc/self/cgroup": "0::/user/job\n",
                "sys/fs/cgroup/user/memory.max": "400000\n",
                "sys/fs/cgroup/user/memory.current": "300000\n",
                "sys/fs/cgroup/user/job/memory.max": "max\n",
                "sys/fs/cgroup/user/job/memory.current": "300000\n",
            },
            100_000,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/\n4:memory:/job\n",
                f"{V1}/memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}/memory.usage_in_bytes": "1\n",
                f"{V1}/job/memory.limit_in_bytes": "50000\n",
                f"{V1}/job/memory.usage_in_bytes": "60000\n",
            },
            0,
        ),
    ],
)
def test_available_memory_is_the_machines_or_the_groups(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    assert available_memory_bytes(fake_root(tmp_path, files)) == expected


def test_available_memory_of_this_machine() -> None:
    assert available_memory_bytes() > 0


def test_links_need_one_filesystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "onnx", tmp_path / "elsewhere" / "engine"
    source.mkdir()
    out.parent.mkdir()
    assert can_link(source, out) and can_link(out, source), "what does not exist yet will be where it can be"
    real = Path.stat
    other = SimpleNamespace(st_dev=-1)
    monkeypatch.setattr(Path, "stat", lambda path, **kw: other if path == out.parent else real(path, **kw))
    monkeypatch.setattr(Path, "exists", lambda path: path in (source, out.parent))
    assert not can_link(source, out)
