"""What workers share is made once, whole or not at all, and an alteration is found."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.shared import Store


def test_a_folder_is_made_by_the_first_that_asks(tmp_path: Path) -> None:
    """Each worker has a store of its own, over one root."""
    made = []

    def make(folder: Path) -> None:
        folder.mkdir()
        time.sleep(0.05)
        (folder / "file").write_text("whole")
        made.append(folder)

    def ask(_: int) -> str:
        return (Store(tmp_path).folder("kind", "key", make) / "file").read_text()

    with ThreadPoolExecutor(8) as workers:
        assert set(workers.map(ask, range(8))) == {"whole"}
    assert len(made) == 1


def test_another_key_or_kind_is_another_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folders = {store.folder(kind, key, Path.mkdir) for kind in "ab" for key in "cd"}
    assert len(folders) == 4 and {folder.name for folder in folders} == {"tiny"}


def test_what_fails_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        folder.mkdir()
        raise OSError("full")

    store = Store(tmp_path)
    for _ in range(2):
        with pytest.raises(OSError, match="full"):
            store.folder("kind", "key", half)
    assert not list(store.folder("kind", "key", Path.mkdir).iterdir())


def test_an_alteration_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.folder("kind", "key", Path.mkdir)
    other = store.folder("kind", "other", Path.mkdir)
    assert store.altered() == []
    (folder / "new").touch()
    assert store.altered() == [folder]
    (other / "new").touch()
    assert store.folder("kind", "other", Path.mkdir) == other
    assert store.altered() == [folder, other]
