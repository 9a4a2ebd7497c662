"""`weights.json`: what is written is read back, and nothing else is read."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mistral_trt.errors import ManifestError
from mistral_trt.weight_index import (
    INDEX_NAME,
    RefitWeight,
    files_of,
    read_weight_index,
    write_weight_index,
)

WEIGHTS = [
    RefitWeight("b", "float16", (3, 4), "b.safetensors", 8, 24),
    RefitWeight("a", "int4", (3, 3), "a.data", 4096, 5),
    RefitWeight("a_scale", "float32", (), "a.data", 0, 4),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.data").write_bytes(bytes(4101))
    (tmp_path / "b.safetensors").write_bytes(bytes(32))
    write_weight_index(tmp_path, WEIGHTS)
    return tmp_path


def test_what_is_written_is_read_back_in_its_order(folder: Path) -> None:
    assert read_weight_index(folder) == WEIGHTS
    assert files_of(WEIGHTS) == ["a.data", "b.safetensors"]
    assert " " not in (folder / INDEX_NAME).read_text()


def test_one_number_has_no_shape_and_counts_as_one() -> None:
    assert [weight.count for weight in WEIGHTS] == [12, 9, 1]


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format_version=2), "expected format_version 1, found 2"),
        (lambda d: d.pop("weights"), "cannot be used .'weights'."),
        (lambda d: d.update(weights=7), "not iterable"),
        (lambda d: d["weights"][0].pop("offset"), "expected entries with bytes, dtype, file, name, offset"),
        (lambda d: d["weights"][0].update(more=1), "expected entries with"),
        (lambda d: d["weights"][0].update(name=""), "must have a name"),
        (lambda d: d["weights"][0].update(name="a"), "a is listed twice"),
        (lambda d: d["weights"][0].update(dtype="float64"), "b: dtype must be one of float32, .*'float64'"),
        (lambda d: d["weights"][0].update(shape=[3, -4]), "b: shape, offset and bytes must be whole numbers"),
        (lambda d: d["weights"][0].update(shape="34"), "must be whole numbers"),
        (lambda d: d["weights"][0].update(shape=3), "not iterable"),
        (lambda d: d["weights"][0].update(offset=True), "must be whole numbers"),
        (lambda d: d["weights"][0].update(bytes=22), r"expected 24 bytes for float16 \[3, 4\].*, found 22"),
        (lambda d: d["weights"][0].update(shape=[0], bytes=0), "more than none, found 0"),
        (lambda d: d["weights"][0].update(file="../secret"), "b: '../secret' is not a plain file name"),
        (lambda d: d["weights"][0].update(file="gone"), "b: expected its numbers in gone, which is missing"),
        (lambda d: d["weights"][0].update(offset=9), "b: expected bytes 9 to 33 of b.safe.*, found 32 bytes"),
    ],
)
def test_each_fault_is_named_with_the_command_that_repairs_it(
    folder: Path, change: Change, words: str
) -> None:
    data = json.loads((folder / INDEX_NAME).read_text())
    change(data)
    (folder / INDEX_NAME).write_text(json.dumps(data))
    with pytest.raises(ManifestError, match=f"(?s){words}.*mistral-trt build .* --weights external"):
        read_weight_index(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "[" * 100_000])
def test_what_is_no_index_is_refused(folder: Path, text: str) -> None:
    (folder / INDEX_NAME).write_text(text)
    with pytest.raises(ManifestError, match=r"weights.json cannot be used"):
        read_weight_index(folder)


def test_a_missing_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"weights.json cannot be used"):
        read_weight_index(tmp_path)


def test_two_weights_of_one_name_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="b is listed twice"):
        write_weight_index(tmp_path, [WEIGHTS[0], replace(WEIGHTS[0], offset=0)])
