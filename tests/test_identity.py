"""Hashes that identify files, and what is remembered of them."""

import os
from pathlib import Path

import pytest

from mistral_trt.export import identity
from mistral_trt.export.identity import files_sha256, remembered_sha256
from mistral_trt.manifest import sha256_file


def test_hashes_of_large_files_are_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "_REMEMBER_BYTES", 4)
    hashed: list[Path] = []

    def counting(path: Path) -> str:
        hashed.append(path)
        return sha256_file(path)

    monkeypatch.setattr(identity, "sha256_file", counting)
    big, small = tmp_path / "big", tmp_path / "small"
    big.write_bytes(b"large")
    small.write_bytes(b"ab")
    (tmp_path / "link").symlink_to(big)
    assert remembered_sha256(big) == remembered_sha256(tmp_path / "link") == sha256_file(big)
    assert hashed == [big]
    assert remembered_sha256(small) == remembered_sha256(small) == sha256_file(small)
    assert hashed == [big, small, small]
    big.write_bytes(b"other")
    os.utime(big, ns=(1, 1))
    assert remembered_sha256(big) == sha256_file(big)
    assert hashed[3:] == [big]
    (tmp_path / "cache" / "mistral-trt" / "sha256.json").write_text("not json")
    assert remembered_sha256(big) == sha256_file(big)
    (tmp_path / "cache" / "mistral-trt" / "sha256.json").write_text("[1]")
    assert remembered_sha256(big) == sha256_file(big)


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(identity, "_REMEMBER_BYTES", 0)
    assert remembered_sha256(tmp_path / "file") == sha256_file(tmp_path / "file")


def test_the_hash_of_files_follows_names_and_contents_but_not_places(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        for name in ("x", "y"):
            (tmp_path / folder / name).write_text(name)
    first, second = (
        [tmp_path / folder / name for name in names] for folder, names in (("a", "xy"), ("b", "yx"))
    )
    assert files_sha256(first) == files_sha256(second)
    second[0].rename(tmp_path / "b" / "z")
    assert files_sha256(first) != files_sha256([second[1], tmp_path / "b" / "z"])
    first_hash = files_sha256(first)
    first[0].write_text("changed")
    assert files_sha256(first) != first_hash
