"""Weights on their way to another dtype: bit for bit as torch converts them, every hazard counted."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from safetensors.torch import save_file

from mistral_trt.errors import CheckpointError
from mistral_trt.export import conversion
from mistral_trt.export.conversion import (
    Census,
    Counts,
    LowRankUpdate,
    Weight,
    convert,
    halves_from_pairs,
    pieces,
    same_numbers,
)
from mistral_trt.export.tensor_files import StoredTensor, read_header

DTYPES = ["float32", "float16", "bfloat16"]
NUMPY = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(bfloat16)}


def saved(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, StoredTensor]:
    save_file(dict(tensors), path)
    return read_header(path)


def converted(tensor: StoredTensor, dtype: str) -> bytes:
    return b"".join(bytes(piece) for piece in convert(Weight("w", tensor), dtype, Census(dtype)))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def awkward(dtype: torch.dtype) -> torch.Tensor:
    """Every finite value of a 16-bit type; of float32, values around what the 16-bit types can hold."""
    if dtype != torch.float32:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        return every[every.isfinite()]
    halves = [awkward(t).to(torch.float32) for t in (torch.float16, torch.bfloat16)]
    near = torch.cat([v.view(torch.int32) + d for v in halves for d in (-1, 0, 1, 2**12, 2**15)])
    values = near.view(torch.float32)
    return values[values.isfinite()]


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_conversion_equals_torch_and_numpy_bit_for_bit(tmp_path: Path, source: str, target: str) -> None:
    values = awkward(getattr(torch, source))
    expected = values.to(getattr(torch, target))
    values, expected = values[expected.isfinite()], expected[expected.isfinite()]
    assert len(values) > 60_000 or (source, target) == ("bfloat16", "float16")
    tensor = saved(tmp_path / "x.safetensors", {"odd": torch.ones(3).half(), "w": values})["w"]
    found = converted(tensor, target)
    assert found == bits(expected)
    as_numpy = np.frombuffer(bits(values), NUMPY[source]).astype(np.float32)
    assert found == as_numpy.astype(NUMPY[target]).tobytes()
    assert found != bits(torch.nextafter(expected, torch.full_like(expected, 1))), "the test can fail"


@pytest.mark.parametrize("piece", [1, 7, 64, 1000, 1001])
def test_pieces_join_to_the_whole_and_none_is_larger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(conversion, "PIECE_ELEMENTS", piece)
    values = torch.randn(1000)
    tensor = saved(tmp_path / "x.safetensors", {"a": torch.ones(1), "w": values})["w"]
    sizes = [len(found) for found in convert(Weight("w", tensor), "float16", Census("float16"))]
    assert max(sizes) <= 2 * piece
    assert len(sizes) == -(-1000 // piece)
    assert converted(tensor, "float16") == bits(values.half())


def test_an_offset_off_every_boundary_is_read_right(tmp_path: Path) -> None:
    made = {f"t{i:03}": torch.full((2**i + 1,), float(i)).to(torch.bfloat16) for i in range(14)}
    tensors = saved(tmp_path / "x.safetensors", made)
    assert any(t.offset % 4 for t in tensors.values()) and any(t.offset > 8192 for t in tensors.values())
    for name, tensor in tensors.items():
        assert converted(tensor, "float32") == bits(made[name].float())


def test_nothing_is_written_through_to_the_checkpoint(tmp_path: Path) -> None:
    tensor = saved(tmp_path / "x.safetensors", {"w": torch.randn(100)})["w"]
    before = tensor.path.read_bytes()
    for piece in convert(Weight("w", tensor), "float32", Census("float32")):
        piece[0] = piece[0] ^ 0xFF
    assert tensor.path.read_bytes() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_a_weight_that_is_not_finite_is_a_damaged_checkpoint(
    tmp_path: Path, source: str, target: str, value: float
) -> None:
    values = torch.ones(1000)
    values[777] = value
    tensor = saved(tmp_path / "x.safetensors", {"w": values.to(getattr(torch, source))})["w"]
    with pytest.raises(CheckpointError, match="w holds NaN or infinity: the checkpoint is damaged"):
        converted(tensor, target)


@pytest.mark.parametrize(
    ("source", "target", "value", "words"),
    [
        ("float32", "float16", 65520.0, "w holds 65520, which overflows float16 (largest: 65504); use --pre"),
        ("bfloat16", "float16", -1e5, "which overflows float16 (largest: 65504); use --precision bf16"),
        ("float32", "bfloat16", 3.4e38, "bfloat16 (largest: 3.38953e+38); use --precision fp32"),
    ],
)
def test_a_weight_too_large_for_the_precision_is_told_with_one_that_holds_it(
    tmp_path: Path, source: str, target: str, value: float, words: str
) -> None:
    values = torch.zeros(1000)
    values[3] = value
    tensor = saved(tmp_path / "x.safetensors", {"w": values.to(getattr(torch, source))})["w"]
    with pytest.raises(CheckpointError) as caught:
        converted(tensor, target)
    assert words in str(caught.value)


def test_the_largest_value_that_fits_is_kept(tmp_path: Path) -> None:
    tensor = saved(tmp_path / "x.safetensors", {"w": torch.tensor([65504.0, 65519.0, -65504.0])})["w"]
    assert converted(tensor, "float16") == bits(torch.tensor([65504.0, 65504.0, -65504.0]).half())


def test_a_file_that_becomes_shorter_while_it_is_read_is_told(tmp_path: Path) -> None:
    tensor = saved(tmp_path / "x.safetensors", {"w": torch.randn(1000)})["w"]
    with tensor.path.open("r+b") as file:
        file.truncate(tensor.offset + 100)
    with pytest.raises(CheckpointError, match="became shorter while it was read: 'w' is cut off"):
        converted(tensor, "float16")


# ---------------------------------------------------------------- hazards


def counted(values: torch.Tensor, target: str) -> Counts:
    census = Census(target)
    census.take("w", values)
    return census.by_weight.get("w", Counts())


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_the_census_is_what_torchs_conversion_did(source: str, target: str) -> None:
    values = awkward(getattr(torch, source))
    after = values.to(getattr(torch, target))
    values, after = values[after.isfinite()], after[after.isfinite()].double().abs()
    normal = torch.finfo(getattr(torch, target)).smallest_normal
    assert counted(values, target) == Counts(
        subnormal=int(((after > 0) & (after < normal)).sum()),
        flushed_to_zero=int(((after == 0) & (values != 0)).sum()),
    )


def test_the_census_of_a_few_known_numbers() -> None:
    values = torch.tensor([1.0, -1.0, 0.0, -0.0, 1e-5, -1e-7, 1e-9, 65504.0, 2**-14, 2**-15])
    assert counted(values, "float16") == Counts(subnormal=3, flushed_to_zero=1)
    assert counted(values, "bfloat16") == counted(values, "float32") == Counts()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=50), st.integers(1, 9))
def test_the_census_does_not_depend_on_how_a_weight_is_cut(values: list[float], piece: int) -> None:
    whole = torch.tensor([v for v in values if abs(v) < 65504])
    census = Census("float16")
    for start in range(0, len(whole), piece):
        census.take("w", whole[start : start + piece])
    assert census.by_weight.get("w", Counts()) == counted(whole, "float16")


def test_the_census_names_the_weight_with_the_most_hazards() -> None:
    census = Census("float16")
    census.take("clean", torch.ones(5))
    census.take("some", torch.tensor([1e-6]))
    census.take("many", torch.tensor([1e-6, 1e-9, 1e-9]))
    assert census.to_json() == {
        "dtype": "float16",
        "non_finite": 0,
        "overflow": 0,
        "subnormal": 2,
        "flushed_to_zero": 2,
        "worst": "many",
    }
    assert Census("float16").to_json()["worst"] is None


# ---------------------------------------------------------------- what is done on the way


def test_rotary_pairs_become_halves() -> None:
    rows = torch.arange(8.0)[:, None]
    assert halves_from_pairs(rows, 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 40))
def test_rotating_pairs_and_rotating_halves_give_the_same_scores(
    heads: int, half: int, columns: int, position: int
) -> None:
    """Mistral's rotation of its own rows equals Hugging Face's of the reordered ones, as a dot product."""
    made = torch.Generator().manual_seed(heads * 100 + half)
    shape = (heads * 2 * half, columns)
    query, key = (torch.randn(shape, dtype=torch.float64, generator=made) for _ in range(2))
    x = torch.randn(columns, dtype=torch.float64, generator=made)
    angles = position / 10.0 ** torch.arange(half, dtype=torch.float64)

    def pairs(rows: torch.Tensor) -> torch.Tensor:
        numbers = torch.view_as_complex((rows @ x).view(heads, half, 2))
        return torch.view_as_real(numbers * torch.polar(torch.ones(half).double(), angles)).flatten(1)

    def halves(rows: torch.Tensor) -> torch.Tensor:
        first, second = (rows @ x).view(heads, 2, half).unbind(1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], 1)

    unrotated = (key @ x).view(heads, -1)
    ours = (halves(halves_from_pairs(query, 2 * half)) * _ordered(unrotated, half)).sum(1)
    torch.testing.assert_close(ours, (pairs(query) * unrotated).sum(1))


def _ordered(scores: torch.Tensor, half: int) -> torch.Tensor:
    """[heads, 2 * half] of pairs -> of halves."""
    return halves_from_pairs(scores.reshape(-1, 1), 2 * half).view(scores.shape)


@pytest.mark.parametrize("piece", [1, 100, 1 << 20])
@pytest.mark.parametrize("target", DTYPES)
def test_reordered_rows_and_updates_are_those_of_the_whole_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, target: str
) -> None:
    monkeypatch.setattr(conversion, "PIECE_ELEMENTS", piece)
    torch.manual_seed(0)
    made = {
        "w": torch.randn(24, 10).bfloat16(),
        "b": torch.randn(24, 3),
        "a": torch.randn(3, 10).half(),
        "left": torch.randn(2, 24),
        "right": torch.randn(10, 2),
    }
    stored = saved(tmp_path / "x.safetensors", made)
    updates = (
        LowRankUpdate(stored["b"], stored["a"], 0.5),
        LowRankUpdate(stored["left"], stored["right"], -2.0, transposed=True),
    )
    base = halves_from_pairs(made["w"], 6)
    reordered = Weight("w", stored["w"], interleaved_heads=4)
    found = b"".join(bytes(p) for p in convert(reordered, target, Census(target)))
    assert found == bits(base.to(getattr(torch, target)))
    whole = base.float() + 0.5 * made["b"] @ made["a"].float() - 2 * made["left"].T @ made["right"].T
    merged = Weight("w", stored["w"], interleaved_heads=4, updates=updates)
    assert {p.dtype for p in pieces(merged)} == {torch.float32}
    torch.testing.assert_close(torch.cat(list(pieces(merged))), whole)
    assert (reordered.untouched, merged.untouched, Weight("w", stored["w"]).untouched) == (False, False, True)


def test_numbers_are_the_same_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "PIECE_ELEMENTS", 7)
    values = torch.randn(50)
    other = values.clone()
    other[49] += 1
    made = {
        "a": values,
        "b": values.clone(),
        "c": other,
        "d": values.view(5, 10).clone(),
        "e": values.double(),
    }
    stored = saved(tmp_path / "x.safetensors", made)
    assert same_numbers(stored["a"], stored["b"])
    assert not any(same_numbers(stored["a"], stored[name]) for name in "cde")
    assert not same_numbers(stored["e"], stored["e"]), "float64 is not a weight's dtype"
