"""safetensors headers: the same tensors as the reference reader's, and every lie refused."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mistral_trt.errors import CheckpointError
from mistral_trt.export.tensor_files import StoredTensor, read_header
from tests.checkpoints import forged, stored

HUGE = 2**62
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

tensors = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(
        st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
        st.lists(st.integers(0, 4), max_size=3),
    ),
    min_size=1,
    max_size=5,
)


def stored_bytes(tensor: StoredTensor) -> bytes:
    return tensor.path.read_bytes()[tensor.offset : tensor.offset + tensor.bytes]


@same_folder
@given(tensors, st.booleans())
def test_it_reads_what_the_reference_library_writes(
    tmp_path: Path, contents: Mapping[str, tuple[torch.dtype, list[int]]], metadata: bool
) -> None:
    path = tmp_path / "model.safetensors"
    made = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in contents.items()}
    save_file(made, path, {"format": "pt"} if metadata else None)
    found = read_header(path)
    assert set(found) == set(made)
    for name, tensor in load_file(path).items():
        entry = found[name]
        assert (entry.name, entry.shape, entry.path) == (name, tuple(tensor.shape), path)
        assert entry.elements == tensor.numel()
        assert stored_bytes(entry) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float32, "float32"),
        (torch.float16, "float16"),
        (torch.bfloat16, "bfloat16"),
        (torch.float64, "F64"),
    ],
)
def test_dtypes_are_named_as_torch_does_where_they_are_plain_weights(
    tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    save_file({"a": torch.zeros(2, dtype=dtype)}, tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors")["a"].dtype == name


GOOD = {"a": stored([2], 0, 8), "b": stored([3], 8, 20)}


def one(**fields: object) -> dict[str, Any]:
    """A header of one float32 in 4 bytes, with fields replaced."""
    return {"a": {**stored([1], 0, 4), **fields}}


# What is wrong: the header, the bytes that follow it, the words of the refusal.
LIES: dict[str, tuple[Any, int, str]] = {
    "not an object": ([], 0, "the header must be an object, found list"),
    "not JSON": (b"{'a'}", 0, r"the header is not JSON \("),
    "not UTF-8": (b'{"\xff": 1}', 0, r"the header is not JSON \("),
    "nested to death": (b'{"a":' + b"[" * 100_000, 0, r"the header is not JSON \("),
    "a number too long": (b'{"a":' + b"9" * 5000 + b"}", 0, r"the header is not JSON \("),
    "empty": (b"", 0, r"the header is not JSON \("),
    "a name twice": (b'{"a": {}, "b": {}, "a": {}}', 0, "the header names 'a' twice"),
    "a key twice": (b'{"a": {"dtype": "F32", "dtype": "F16"}}', 0, "the header names 'dtype' twice"),
    "an entry of null": ({"a": None}, 0, "'a' must have dtype, shape and data_offsets, found None"),
    "an entry that is a list": ({"a": [1]}, 0, "'a' must have dtype, shape and data_offsets, found"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, 4, "must have dtype, shape and data_offsets, fo"),
    "a key too many": (one(x=1), 4, "'a' must have dtype, shape and data_offsets, found"),
    "an unknown dtype": (one(dtype="F33"), 4, "'a' has the unknown dtype 'F33'"),
    "a dtype of null": (one(dtype=None), 4, "'a' has the unknown dtype None"),
    "a dtype that is a list": (one(dtype=["F32"]), 4, r"'a' has the unknown dtype \['F32'\]"),
    "a negative size": (one(shape=[-1]), 4, r"'a' has the shape \[-1\]; expected whole numbers >= 0"),
    "two negative sizes": (one(shape=[-1, -1]), 4, r"the shape \[-1, -1\]; expected whole numbers >= 0"),
    "a size that is no integer": (one(shape=[1.0]), 4, r"shape \[1.0\]; expected whole numbers"),
    "a size of true": (one(shape=[True]), 4, r"shape \[True\]; expected whole numbers"),
    "a shape that is a text": (one(shape="2"), 4, "shape '2'; expected whole numbers"),
    "a giant size": (one(shape=[HUGE, HUGE]), 4, r"'a' has 4 bytes, but F32 of shape .* takes \d+"),
    "too few bytes for the shape": (one(shape=[3]), 4, r"4 bytes, but F32 of shape \[3\] takes 12"),
    "too many bytes for the dtype": (one(dtype="F16"), 4, r"4 bytes, but F16 of shape \[1\] takes 2"),
    "reversed offsets": (one(data_offsets=[4, 0]), 4, r"data_offsets \[4, 0\]; expected \[begin, end\]"),
    "negative offsets": (one(data_offsets=[-4, 0]), 4, r"data_offsets \[-4, 0\]; expected"),
    "three offsets": (one(data_offsets=[0, 4, 8]), 8, r"data_offsets \[0, 4, 8\]; expected"),
    "offsets of text": (one(data_offsets="04"), 4, "data_offsets '04'; expected"),
    "offsets past the end": (GOOD, 19, r"is truncated: 'b' ends at byte \d+, the file at byte \d+"),
    "offsets far past the end": (one(data_offsets=[HUGE, HUGE + 4]), 4, "is truncated: 'a' ends at byte"),
    "an overlap": ({**one(), "b": stored([2], 3, 11)}, 11, "'b' overlaps the tensor before it"),
    "the same bytes twice": ({**one(), "b": stored([1], 0, 4)}, 4, "overlaps the tensor before it"),
}


def test_the_forger_can_make_a_true_file(tmp_path: Path) -> None:
    found = read_header(forged(tmp_path / "x", GOOD, bytes(range(20))))
    assert stored_bytes(found["b"]) == bytes(range(8, 20))


@pytest.mark.parametrize(("header", "data_bytes", "words"), LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, data_bytes: int, words: str) -> None:
    path = forged(tmp_path / "model.safetensors", header, bytes(data_bytes))
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("claim", [1_000, 10**9, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused_unread(tmp_path: Path, claim: int) -> None:
    path = forged(tmp_path / "x", GOOD, bytes(20), length=claim)
    size = path.stat().st_size
    with pytest.raises(
        CheckpointError, match=f"not a whole .* its header claims {claim} bytes, the file has {size}"
    ):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"PK\x03\x04"])
def test_a_file_shorter_than_a_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=f"not a safetensors file: {len(content)} bytes, shorter than a header"
    ):
        read_header(tmp_path / "x")


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_file_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "missing" if kind == "missing" else tmp_path
    with pytest.raises(CheckpointError, match="cannot be read: (No such file|Is a directory)"):
        read_header(path)


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    whole = forged(tmp_path / "x", GOOD, bytes(20)).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_header(tmp_path / "x")
    (tmp_path / "x").write_bytes(whole)
    assert len(read_header(tmp_path / "x")) == 2


@same_folder
@given(st.binary(max_size=80), st.integers(0, 100), st.binary(max_size=30))
def test_any_bytes_give_sound_tensors_or_an_error(
    tmp_path: Path, replacement: bytes, position: int, data: bytes
) -> None:
    text = json.dumps(GOOD).encode()
    check_sound(
        forged(tmp_path / "x", text[:position] + replacement + text[position + len(replacement) :], data)
    )


@same_folder
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c", "__metadata__"]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "I8", "X"]),
                "shape": st.lists(st.integers(-1, 4), max_size=2),
                "data_offsets": st.lists(st.integers(-1, 24), min_size=2, max_size=2),
            }
        ),
    ),
    st.integers(0, 24),
)
def test_any_layout_gives_sound_tensors_or_an_error(tmp_path: Path, header: Any, data_bytes: int) -> None:
    check_sound(forged(tmp_path / "x", header, bytes(data_bytes)))


def check_sound(path: Path) -> None:
    """What is read without an error lies inside the file, after the header, and shares no byte."""
    try:
        found = read_header(path)
    except CheckpointError:
        return
    size = path.stat().st_size
    position = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    for tensor in sorted(found.values(), key=lambda t: (t.offset, t.bytes)):
        assert position <= tensor.offset <= tensor.offset + tensor.bytes <= size
        position = tensor.offset + tensor.bytes
