"""The float32 twin of a bf16 graph: the same numbers in another dtype."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from mistral_trt.errors import EngineMismatchError, ValidationError
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.manifest import read_manifest
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.engine import open_cache
from mistral_trt.runtime.onnxruntime_backend import OnnxRuntimeBackend
from mistral_trt.validate.reference.hugging_face import load_model, run_reference
from mistral_trt.validate.twin import NARROW, float32_twin, widen
from tests.conftest import Folder
from tests.graphs import weights_of

TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, 97, 60)]


SHAPE = {"dtype": "bfloat16", "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def bf16(onnx_folder: Folder) -> Path:
    return onnx_folder(precision="bf16", **SHAPE)


def test_the_twin_holds_the_same_weights_and_no_bfloat16(bf16: Path) -> None:
    original = ir.load(bf16 / "model.onnx")
    with float32_twin(bf16 / "model.onnx", read_manifest(bf16).contract) as (path, contract):
        assert contract.precision == "fp32"
        onnx.checker.check_model(path)
        found = ir.load(path)
        values = [*found.graph.inputs, *found.graph.outputs, *found.graph.initializers.values()]
        assert all(value.dtype != NARROW for value in values)
        assert len(found.graph.initializers) == len(original.graph.initializers)
        for name, value in original.graph.initializers.items():
            copy = found.graph.initializers[name].const_value
            assert value.const_value is not None
            assert copy is not None
            if not isinstance(value.const_value, ir.ExternalTensor):
                np.testing.assert_array_equal(
                    copy.numpy(), value.const_value.numpy().astype(copy.numpy().dtype)
                )
        for name, bits in weights_of(bf16).items():
            copy = found.graph.initializers[name].const_value
            assert copy is not None
            assert torch.equal(torch.from_numpy(copy.numpy().copy()), bits.view(torch.bfloat16).float())
    assert not path.exists()


def test_the_twin_of_a_bf16_checkpoint_gives_float32_logits(bf16: Path, tiny_checkpoint: Folder) -> None:
    """Where the checkpoint is bfloat16, nothing is rounded on the way."""
    model = load_model(Checkpoint.open(tiny_checkpoint(**SHAPE)), sliding_window=8)
    expected = run_reference(model, TOKENS).logits(0, len(TOKENS))
    with float32_twin(bf16 / "model.onnx", read_manifest(bf16).contract) as (path, contract):
        widened = RollingCache(OnnxRuntimeBackend(path, contract))
        found = widened.append(widened.acquire(), TOKENS, all_logits=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_bf16_artifact_itself_does_not_run_here(bf16: Path) -> None:
    with pytest.raises(EngineMismatchError, match="no bfloat16 kernels"):
        open_cache(bf16)


def test_constants_inside_nodes_are_widened_too() -> None:
    one = ir.tensor([1.5], dtype=NARROW, name="one")
    constant = ir.node("Constant", [], attributes={"value": one})
    cast = ir.node("Cast", [constant.outputs[0]], attributes={"to": NARROW})
    shape = ir.node("Shape", [cast.outputs[0]], attributes={"start": int(NARROW)})
    graph = ir.Graph([], [shape.outputs[0]], nodes=[constant, cast, shape], opset_imports={"": 24})
    widen(ir.Model(graph, ir_version=10))
    value = constant.attributes["value"].as_tensor()
    np.testing.assert_array_equal(value.numpy(), np.array([1.5], np.float32))
    assert cast.attributes["to"].as_int() == ir.DataType.FLOAT
    assert shape.attributes["start"].as_int() == int(NARROW), "not every 16 is a dtype"


def test_a_full_disk_is_said_in_words(bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with (
        pytest.raises(ValidationError, match="No space left on device; set TMPDIR"),
        float32_twin(bf16 / "model.onnx", read_manifest(bf16).contract),
    ):
        pass
