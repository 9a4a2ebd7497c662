"""A folder appears whole or not at all, whoever is killed, in the way, or there already."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import pytest

from mistral_trt.artifact import MANIFEST_NAME, cache_folder, new_artifact, require_apart, write_file
from mistral_trt.errors import ArtifactError

MARKER = json.dumps({"files": ["file.txt"]})


def make(out: Path, text: str = "content", marker: str = MANIFEST_NAME) -> None:
    with new_artifact(out, marker) as folder:
        (folder / "file.txt").write_text(text)
        (folder / marker).write_text(MARKER)


def left_beside(out: Path) -> list[str]:
    """Names beside `out` that a reader would call litter."""
    return sorted(p.name for p in out.parent.iterdir() if p.name != out.name)


def test_it_appears_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "down" / "out"
    with new_artifact(out) as folder:
        (folder / "file.txt").write_text("content")
        (folder / MANIFEST_NAME).write_text("{}")
        assert not out.exists()
        assert folder.parent == out.parent, "another file system could not be renamed into place"
    assert (out / "file.txt").read_text() == "content"
    assert out.stat().st_mode & 0o777 == 0o755
    assert left_beside(out) == []


def test_a_relative_path_is_taken_from_where_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with new_artifact(Path("out")) as folder:
        (folder / MANIFEST_NAME).write_text("{}")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert (tmp_path / "out" / MANIFEST_NAME).is_file()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ArtifactError])
@pytest.mark.parametrize("before", [True, False])
def test_a_failed_run_leaves_what_was_there(tmp_path: Path, error: type[BaseException], before: bool) -> None:
    out = tmp_path / "out"
    if before:
        make(out, "old")
    with pytest.raises(error), new_artifact(out) as folder:
        (folder / "file.txt").write_text("half")
        (folder / MANIFEST_NAME).write_text("{}")
        raise error("stop")
    assert out.exists() == before
    assert not before or (out / "file.txt").read_text() == "old"
    assert left_beside(out) == []


def test_an_artifact_of_ours_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "old")
    make(out, "new")
    assert sorted(p.name for p in out.iterdir()) == ["file.txt", MANIFEST_NAME]
    assert (out / "file.txt").read_text() == "new"
    assert left_beside(out) == []


@pytest.mark.parametrize("marker", [MARKER, "{}", "[]", "not JSON", '{"files": 3}'])
def test_a_file_that_the_marker_does_not_list_is_not_thrown_away(tmp_path: Path, marker: str) -> None:
    """Other programs write a manifest.json too, and people put their own files beside ours."""
    out = tmp_path / "out"
    make(out, "old")
    (out / MANIFEST_NAME).write_text(marker)
    (out / "a thesis.txt").write_text("years")
    with pytest.raises(ArtifactError, match="holds 'a thesis.txt', which its manifest.json does not list"):
        make(out, "new")
    assert (out / "a thesis.txt").read_text() == "years"
    assert (out / "file.txt").read_text() == "old"


@pytest.mark.parametrize("out", ["in", ".", "in/../in", "link"])
def test_an_output_may_not_replace_its_input(tmp_path: Path, out: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(ArtifactError, match="holds the input .*; choose another --out"):
        require_apart(tmp_path / out, tmp_path / "in")
    require_apart(tmp_path / "in" / "below", tmp_path / "in")
    require_apart(tmp_path / "beside", tmp_path / "in")


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")
    assert (tmp_path / "out" / MANIFEST_NAME).is_file()


def test_a_folder_that_is_not_ours_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with pytest.raises(
        ArtifactError, match="not empty and holds no manifest.json, so it is not replaced; choose"
    ):
        make(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years"


def test_another_marker_is_the_only_one_that_counts(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(ArtifactError, match="holds no ORIGIN.json"):
        make(tmp_path / "out", marker="ORIGIN.json")
    make(tmp_path / "demo", marker="ORIGIN.json")
    make(tmp_path / "demo", "new", marker="ORIGIN.json")
    assert (tmp_path / "demo" / "file.txt").read_text() == "new"


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_what_is_in_the_way_stays(tmp_path: Path, kind: str) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    if kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(elsewhere)
        if kind == "link":
            make(elsewhere, "mine")
    with pytest.raises(ArtifactError, match=r"out is in the way \(not a folder\); choose another --out"):
        make(out)
    assert out.is_symlink() or out.read_text() == "mine"
    assert kind != "link" or (elsewhere / "file.txt").read_text() == "mine"


def test_a_block_that_writes_no_manifest_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="out: nothing wrote a manifest.json"):
        with new_artifact(tmp_path / "out") as folder:
            (folder / "file.txt").write_text("content")
    assert not (tmp_path / "out").exists()
    assert left_beside(tmp_path / "out") == []


def test_a_parent_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot make .*file/sub: Not a directory; choose another --out"):
        make(tmp_path / "file" / "sub" / "out")


def test_a_lock_that_was_removed_while_it_was_opened_is_not_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run before ends between our opening its lock file and our locking it."""
    lock = fcntl.flock

    def late(file: IO[str], how: int) -> None:
        (tmp_path / ".out.lock").unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ArtifactError, match="another run is writing"):
        make(tmp_path / "out")
    monkeypatch.undo()
    make(tmp_path / "out")
    assert left_beside(tmp_path / "out") == []


@pytest.mark.parametrize("step", ["lock", "folder"])
def test_a_parent_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    if step == "lock":
        monkeypatch.setattr(Path, "open", refuse)
    else:
        monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(ArtifactError, match="cannot write in .*: Permission denied; choose another --out"):
        make(tmp_path / "out")


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot write .*out: .*No space left on device"):
        with new_artifact(tmp_path / "out"):
            raise OSError(28, "No space left on device")
    assert left_beside(tmp_path / "out") == []


def test_two_runs_at_once_and_the_second_is_turned_away(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_artifact(out) as folder:
        with pytest.raises(
            ArtifactError, match="another run is writing .*out; wait for it or choose another"
        ):
            make(out, "second")
        make(tmp_path / "other")
        (folder / "file.txt").write_text("first")
        (folder / MANIFEST_NAME).write_text(MARKER)
    assert (out / "file.txt").read_text() == "first"
    make(out, "third")
    assert (out / "file.txt").read_text() == "third"


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import IO
from mistral_trt.artifact import new_artifact
with new_artifact(Path(sys.argv[1])) as folder:
    (folder / "big.bin").write_bytes(b"half")
    (folder / "manifest.json").write_text("{}")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", ["out", "a[1]b", "x.partial-y", "*"])
def test_a_killed_run_leaves_no_artifact_and_the_next_clears_up(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out)], stdin=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(left_beside(out)) == 2, "the test must see the lock and the half-written folder"
    make(out)
    assert (out / "file.txt").read_text() == "content"
    assert left_beside(out) == []


def test_clearing_up_spares_the_half_written_folder_of_another_name(tmp_path: Path) -> None:
    with new_artifact(tmp_path / "out-2") as other:
        make(tmp_path / "out")
        make(tmp_path / "*")
        assert other.is_dir()
        (other / MANIFEST_NAME).write_text("{}")


def test_a_kill_between_the_two_renames_is_cleared_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "my.partial.model"
    make(out, "old")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        make(out, "new")
    assert len(left_beside(out)) == 1, "the retired folder is still there, as after a kill"
    make(out, "newer")
    assert left_beside(out) == []
    assert (out / "file.txt").read_text() == "newer"


def test_write_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    write_file(path, b"old")
    assert path.read_bytes() == b"old"
    assert path.stat().st_mode & 0o777 == 0o644

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_cache_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mistral-trt"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "mistral-trt"
