"""Where each weight of an ONNX folder lies: linked as it is, or written anew on page edges."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mistral_trt.errors import CheckpointError, ExportError
from mistral_trt.export import conversion
from mistral_trt.export.conversion import Census, Weight
from mistral_trt.export.tensor_files import StoredTensor, read_header
from mistral_trt.export.weights import (
    ALIGNMENT_BYTES,
    DATA_NAME,
    PlacedTensor,
    bind_weights,
    inspect_linked,
    plan_weights,
    write_weights,
)

DTYPES = ["float32", "float16", "bfloat16"]
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def saved(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, StoredTensor]:
    save_file(dict(tensors), path)
    return read_header(path)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def entry(name: str, shape: tuple[int, ...]) -> Weight:
    return Weight(name, StoredTensor(name, "float32", shape, Path("x"), 0, 4 * math.prod(shape)))


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
    plan = plan_weights({name: entry(name, shape) for name, shape in shapes.items()}, dtype, link=False)
    placed = plan.placed
    assert list(placed) == plan.written and not plan.in_place and not plan.linked
    assert [(t.name, t.shape, t.dtype) for t in placed] == [(n, s, dtype) for n, s in shapes.items()]
    end = 0
    for target in placed:
        assert target.bytes == math.prod(target.shape) * ITEM_BYTES[dtype]
        assert target.offset % ALIGNMENT_BYTES == 0
        assert 0 <= target.offset - end < ALIGNMENT_BYTES, "tensors overlap, or a page is wasted"
        end = target.offset + target.bytes
    assert plan.data_bytes == end


def test_the_layout_of_a_few_known_sizes() -> None:
    shapes = {"a": (1,), "b": (1024,), "c": (1025,), "d": (3, 5)}
    plan = plan_weights({name: entry(name, shape) for name, shape in shapes.items()}, "float32", link=False)
    assert [(t.offset, t.bytes) for t in plan.placed] == [(0, 4), (4096, 4096), (8192, 4100), (16384, 60)]
    assert plan.data_bytes == 16444


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("piece", [5, 1 << 22])
def test_the_file_is_the_layout_and_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, piece: int
) -> None:
    monkeypatch.setattr(conversion, "PIECE_ELEMENTS", piece)
    made = {
        "b": torch.randn(3, 7),
        "a": torch.randn(1100).to(torch.float16),
        "c": torch.randn(5).to(torch.bfloat16),
    }
    stored = saved(tmp_path / "x.safetensors", made)
    tensors = {name: Weight(name, stored[name]) for name in ("b", "a", "c")}
    plan = plan_weights(tensors, target, link=False)
    digest = write_weights(tensors, plan, tmp_path / DATA_NAME, census=Census(target))
    data = (tmp_path / DATA_NAME).read_bytes()
    assert digest == hashlib.sha256(data).hexdigest()
    assert len(data) == plan.data_bytes
    expected = bytearray(len(data))
    for t in plan.placed:
        expected[t.offset : t.offset + t.bytes] = bits(made[t.name].to(getattr(torch, target)))
    assert data == expected, "padding must be zero and every tensor in its place"


# ---------------------------------------------------------------- linking


def stored_as(path: Path, **dtypes: str) -> dict[str, Weight]:
    """A file of tensors of 100 elements each, by name and dtype."""
    made = {name: torch.randn(100).to(getattr(torch, dtype)) for name, dtype in dtypes.items()}
    return {name: Weight(name, stored) for name, stored in saved(path, made).items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_has_the_dtype_already_stays_where_it_lies(tmp_path: Path, dtype: str) -> None:
    weights = stored_as(tmp_path / "m.safetensors", **dict.fromkeys("abcdefgh", dtype))
    plan = plan_weights(weights, dtype)
    assert plan.linked == {"m.safetensors": tmp_path / "m.safetensors"}
    assert plan.written == [] and plan.data_bytes == 0
    for target in plan.placed:
        stored = weights[target.name].stored
        assert (target.file, target.offset, target.bytes) == ("m.safetensors", stored.offset, stored.bytes)
    assert plan_weights(weights, dtype, link=False).linked == {}


def test_only_what_is_touched_or_of_another_dtype_is_written(tmp_path: Path) -> None:
    weights = stored_as(tmp_path / "m.safetensors", **dict.fromkeys("abcdefghijkl", "bfloat16"))
    weights |= stored_as(tmp_path / "n.safetensors", x="float32")
    weights["b"] = Weight("b", weights["b"].stored, interleaved_heads=2)
    plan = plan_weights(weights, "bfloat16")
    assert [target.name for target in plan.written] == ["b", "x"]
    assert list(plan.linked) == ["m.safetensors"]
    assert [target.name for target in plan.placed] == list(weights), "the graph's order is kept"


def test_a_file_that_serves_little_is_not_dragged_along(tmp_path: Path) -> None:
    weights = stored_as(tmp_path / "m.safetensors", a="bfloat16", b="float32", c="float32")
    assert plan_weights(weights, "bfloat16").linked == {}
    assert list(plan_weights(weights, "float32").linked) == ["m.safetensors"]


def test_a_number_off_its_boundary_is_written_anew(tmp_path: Path) -> None:
    stored = saved(tmp_path / "m.safetensors", {"w": torch.randn(1000)})["w"]
    odd = Weight("w", replace(stored, offset=stored.offset + 2))
    assert plan_weights({"w": odd}, "float32").linked == {}


def test_two_files_of_one_name_do_not_meet_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    weights = stored_as(tmp_path / "m.safetensors", a="bfloat16", b="bfloat16", c="bfloat16")
    weights |= stored_as(tmp_path / "adapter" / "m.safetensors", x="bfloat16", y="bfloat16")
    plan = plan_weights(weights, "bfloat16")
    assert plan.linked == {"m.safetensors": tmp_path / "m.safetensors"}
    assert [target.name for target in plan.written] == ["x", "y"]


def test_linked_weights_are_looked_at_too(tmp_path: Path) -> None:
    values = torch.ones(100)
    values[7] = float("nan")
    weights = {"w": Weight("w", saved(tmp_path / "m.safetensors", {"w": values})["w"])}
    plan = plan_weights(weights, "float32")
    with pytest.raises(CheckpointError, match="w holds NaN or infinity"):
        inspect_linked(weights, plan, census=Census("float32"))


def test_a_disk_that_fills_up_is_not_passed_over(tmp_path: Path) -> None:
    weights = stored_as(tmp_path / "m.safetensors", a="float32")
    plan = plan_weights(weights, "float16")
    with pytest.raises(OSError, match="No space left on device"):
        write_weights(weights, plan, Path("/dev/full"), census=Census("float16"))


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


PLACED = [
    PlacedTensor("a", "float16", (2, 3), "model.safetensors", 72, 12),
    PlacedTensor("b", "float16", (5,), DATA_NAME, 4096, 10),
]


def test_initializers_point_to_their_bytes() -> None:
    model = graph_of(b=(5,), a=(2, 3))
    bind_weights(model, PLACED)
    tensor = model.graph.initializers["b"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert (tensor.location, tensor.offset, tensor.length) == (DATA_NAME, 4096, 10)
    other = model.graph.initializers["a"].const_value
    assert isinstance(other, ir.ExternalTensor)
    assert (other.location, other.offset, other.length) == ("model.safetensors", 72, 12)
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
