"""Weights on their way into the data file: laid out on pages, converted bit for bit as torch does."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from safetensors.torch import save_file

from mistral_trt.errors import CheckpointError, ExportError
from mistral_trt.export import weights
from mistral_trt.export.tensor_files import StoredTensor, read_header
from mistral_trt.export.weights import (
    ALIGNMENT_BYTES,
    DATA_NAME,
    PlacedTensor,
    bind_weights,
    convert,
    data_bytes,
    place_tensors,
    write_weights,
)

DTYPES = ["float32", "float16", "bfloat16"]
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
NUMPY = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(bfloat16)}


def saved(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, StoredTensor]:
    save_file(dict(tensors), path)
    return read_header(path)


def converted(tensor: StoredTensor, dtype: str) -> bytes:
    """Each piece is copied before the next is asked for: a piece may lie in the file's own pages."""
    return b"".join(bytes(piece) for piece in convert(tensor, dtype))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def entry(name: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(name, "float32", shape, Path("x"), 0, 4 * math.prod(shape))


# ---------------------------------------------------------------- layout


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=4),
        st.lists(st.integers(1, 60), min_size=1, max_size=3).map(tuple),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(DTYPES),
)
def test_tensors_lie_in_order_on_page_edges_without_touching(
    shapes: dict[str, tuple[int, ...]], dtype: str
) -> None:
    placed = place_tensors({name: entry(name, shape) for name, shape in shapes.items()}, dtype)
    assert [(t.name, t.shape, t.dtype) for t in placed] == [(n, s, dtype) for n, s in shapes.items()]
    end = 0
    for target in placed:
        assert target.bytes == math.prod(target.shape) * ITEM_BYTES[dtype]
        assert target.offset % ALIGNMENT_BYTES == 0
        assert 0 <= target.offset - end < ALIGNMENT_BYTES, "tensors overlap, or a page is wasted"
        end = target.offset + target.bytes
    assert data_bytes(placed) == end


def test_the_layout_of_a_few_known_sizes() -> None:
    shapes = {"a": (1,), "b": (1024,), "c": (1025,), "d": (3, 5)}
    placed = place_tensors({name: entry(name, shape) for name, shape in shapes.items()}, "float32")
    assert [(t.offset, t.bytes) for t in placed] == [(0, 4), (4096, 4096), (8192, 4100), (16384, 60)]
    assert data_bytes(placed) == 16444


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("piece", [5, 1 << 22])
def test_the_file_is_the_layout_and_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, piece: int
) -> None:
    monkeypatch.setattr(weights, "_PIECE_ELEMENTS", piece)
    made = {
        "b": torch.randn(3, 7),
        "a": torch.randn(1100).to(torch.float16),
        "c": torch.randn(5).to(torch.bfloat16),
    }
    tensors = saved(tmp_path / "x.safetensors", made)
    tensors = {name: tensors[name] for name in ("b", "a", "c")}
    placed = place_tensors(tensors, target)
    digest = write_weights(tensors, placed, tmp_path / DATA_NAME)
    data = (tmp_path / DATA_NAME).read_bytes()
    assert digest == hashlib.sha256(data).hexdigest()
    assert len(data) == data_bytes(placed)
    expected = bytearray(len(data))
    for t in placed:
        expected[t.offset : t.offset + t.bytes] = bits(made[t.name].to(getattr(torch, target)))
    assert data == expected, "padding must be zero and every tensor in its place"


# ---------------------------------------------------------------- conversion


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
    monkeypatch.setattr(weights, "_PIECE_ELEMENTS", piece)
    values = torch.randn(1000)
    tensor = saved(tmp_path / "x.safetensors", {"a": torch.ones(1), "w": values})["w"]
    sizes = [len(found) for found in convert(tensor, "float16")]
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
    for piece in convert(tensor, "float32"):
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


# ---------------------------------------------------------------- binding


def graph_of(**shapes: tuple[int, ...]) -> ir.Model:
    """A graph of initializers without values, and one constant that has its own."""
    values = [
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT16))
        for name, shape in shapes.items()
    ]
    constant = ir.Value(name="constant", const_value=ir.tensor([1, 2], name="constant"))
    graph = ir.Graph([], [], nodes=[], initializers=[*values, constant], opset_imports={"": 24}, name="g")
    return ir.Model(graph, ir_version=10)


PLACED = [PlacedTensor("a", "float16", (2, 3), 0, 12), PlacedTensor("b", "float16", (5,), 4096, 10)]


def test_initializers_point_into_the_data_file() -> None:
    model = graph_of(b=(5,), a=(2, 3))
    bind_weights(model, PLACED)
    tensor = model.graph.initializers["b"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert (tensor.location, tensor.offset, tensor.length) == (DATA_NAME, 4096, 10)
    assert tensor.dtype == ir.DataType.FLOAT16
    assert not isinstance(model.graph.initializers["constant"].const_value, ir.ExternalTensor)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"a": (2, 3)}, r"graph and checkpoint disagree on the weights: \['b'\]"),
        ({"a": (2, 3), "b": (5,), "c": (1,)}, r"graph and checkpoint disagree on the weights: \['c'\]"),
        ({"a": (2, 3), "x": (5,)}, r"disagree on the weights: \['b', 'x'\]"),
        ({"a": (3, 2), "b": (5,)}, r"a: the graph has shape \(3, 2\), the checkpoint \(2, 3\)"),
    ],
)
def test_a_graph_of_other_weights_is_refused(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        bind_weights(graph_of(**shapes), PLACED)
