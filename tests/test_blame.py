"""Names in TensorRT's messages → modules of the model; what is no name of ours is left alone."""

import onnx
import pytest

from mistral_trt.engines.network.blame import blame, blaming, module_of
from mistral_trt.errors import BuildError, ManifestError
from tests.conftest import Folder


@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("model.layers.3.self_attn/Attention", "layer 3, self_attn"),
        ("model.layers.31.self_attn.q_proj/MatMul", "layer 31, self_attn.q_proj"),
        ("model.layers.0.mlp.down_proj.weight", "layer 0, mlp.down_proj"),
        ("model.layers.0.mlp.down_proj.weight_scale", "layer 0, mlp.down_proj"),
        ("model.layers.2.self_attn.v_proj.input/QuantizeLinear", "layer 2, self_attn.v_proj"),
        ("model.layers.2.self_attn.v_proj.output/Cast", "layer 2, self_attn.v_proj"),
        ("model.layers.5/Add_1", "layer 5"),
        ("model.layers.5.input_layernorm/RMSNormalization_47", "layer 5, input_layernorm"),
        ("past_key_values.12.key", "layer 12, key ring"),
        ("present.0.value", "layer 0, value ring"),
        ("model.embed_tokens/Gather", "embed_tokens"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("model.norm/RMSNormalization", "norm"),
        ("model.rotary/Cos", "rotary"),
        ("lm_head/MatMul", "lm_head"),
        ("lm_head.weight", "lm_head"),
        ("model/And_1", "positions and mask"),
        (
            "Cannot compile operation 'model.layers.1.self_attn.v_proj/MatMul' for Turing (SM75)",
            "layer 1, self_attn.v_proj",
        ),
    ],
)
def test_a_name_tells_its_module(text: str, module: str) -> None:
    assert module_of(text) == module


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Cannot compile for target(s) sm75, because the model contains HW-specific datatypes: b16",
        "TensorRT cannot read build/onnx/model.onnx: it gives no reason",
        "cannot read /home/me/model.layers.3.onnx",
        "TensorRT cannot read model/graph.onnx",
        "logits",
        "the norm of it",
        "constant.0",
    ],
)
def test_what_names_no_node_of_ours_has_no_module(text: str) -> None:
    assert module_of(text) is None
    assert blame(text) == text


def test_a_message_begins_with_the_module_and_says_it_once() -> None:
    message = "layer 3, self_attn (node 'model.layers.3.self_attn/Attention'): has no mask"
    assert blame("model.layers.3.self_attn/Attention: has no mask") == message
    assert blame(message) == message


def test_a_name_within_a_message_stays_where_it_is() -> None:
    said = "ring write: expected present.1.key, found copy"
    assert blame(said) == f"layer 1, key ring (tensor 'present.1.key'): {said}"


def test_build_errors_are_blamed_and_others_are_not() -> None:
    with pytest.raises(BuildError, match=r"^lm_head \(node 'lm_head/MatMul'\): is wrong$"), blaming():
        raise BuildError("lm_head/MatMul: is wrong")
    with pytest.raises(ManifestError, match="^lm_head/MatMul: is wrong$"), blaming():
        raise ManifestError("lm_head/MatMul: is wrong")


def test_every_node_of_a_layer_and_every_weight_has_a_module(onnx_folder: Folder) -> None:
    """The names are the exporter's; if it names otherwise, this is what is told of it."""
    graph = onnx.load(onnx_folder() / "model.onnx", load_external_data=False).graph
    without = [node.name for node in graph.node if module_of(node.name) is None]
    assert all(name.split("_")[0] in ("Unsqueeze", "Expand", "GatherElements", "Cast") for name in without)
    weights = [w.name for w in graph.initializer if w.name.endswith("weight")]
    assert len(weights) > 10
    assert [name for name in weights if module_of(name) is None] == []
