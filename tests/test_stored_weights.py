"""Stored weights against the checkpoint's: nothing is said of a healthy artifact, and every fault by name.

Faults are planted in copies of the files: each is one that export could make, or that a disk or a hand could.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from safetensors.torch import load_file
from transformers import MistralForCausalLM

from mistral_trt.contract import QUANTIZED, GraphContract
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.lora import Adapter
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.export.quantization.settings import QuantizationSettings
from mistral_trt.manifest import read_manifest
from mistral_trt.runtime.engine import open_cache
from mistral_trt.validate.findings import InputRange, WeightFindings
from mistral_trt.validate.reference.decoder import WholeModel
from mistral_trt.validate.reference.fake_quantization import (
    FakeQuantizedLinear,
    fake_quantized,
    fake_quantized_head,
)
from mistral_trt.validate.reference.hugging_face import load_model, run_layers
from mistral_trt.validate.reference.input_log import InputLog, range_used
from mistral_trt.validate.reference.own_precision import AlterHead, own_precision_layers
from mistral_trt.validate.weights.compare import compare_weights
from mistral_trt.validate.weights.distance import spacing
from mistral_trt.validate.weights.graph import nibbles
from mistral_trt.validate.weights.linear import Factor, StoredLinear, norm_of, readers_of
from tests.alteration import edit_graph, exchange_linears, node, reorder_outputs, stored, write_codes
from tests.checkpoints import SINGLE, altered, mistral_format
from tests.conftest import Folder
from tests.graphs import numbers_of
from tests.models import write_tokenizer
from tests.test_lora import train
from tests.test_quantized_export import FORMATS, write_stored

pytestmark = pytest.mark.usefixtures("one_trace")

VOCAB, C = 259, 4
SETTINGS = QuantizationSettings(samples=4, tokens=32)
FLOAT, INTEGERS = ("fp16", "bf16", "fp32"), ("int8", "int8-weight-only", "int4")

WORST_STEPS = {"int8": 0.57, "int8-weight-only": 0.63, "int4": 0.51, "fp8": 0.5005}
"""Half a step, and 127 or 7 times what float16 rounds in a norm and, without activation codes, in a scale."""

LAYER = "model.layers.0."
Q, K, V = (f"{LAYER}self_attn.{kind}_proj.weight" for kind in "qkv")
GATE, UP, DOWN = (f"{LAYER}mlp.{kind}_proj.weight" for kind in ("gate", "up", "down"))
OTHER_GATE = "model.layers.1.mlp.gate_proj.weight"


@dataclass(frozen=True)
class Pair:
    """An ONNX folder and its checkpoint."""

    folder: Path
    checkpoint: Path

    @property
    def contract(self) -> GraphContract:
        return read_manifest(self.folder, check_files=None).contract

    def findings(self, source: Checkpoint | None = None) -> WeightFindings:
        opened = Checkpoint.open(self.checkpoint) if source is None else source
        return compare_weights(self.folder, self.contract, opened, advance=lambda n: None)

    def wrong(self) -> Mapping[str, str]:
        return self.findings().wrong


Made: TypeAlias = Callable[..., Pair]


def random_norms(seed: int) -> dict[str, torch.Tensor]:
    """Norms that differ from each other, as those of a fresh model do not."""
    generator = torch.Generator().manual_seed(seed)
    kinds = ("input_layernorm", "post_attention_layernorm")
    names = [f"model.layers.{i}.{kind}.weight" for i in (0, 1) for kind in kinds]
    return {name: torch.rand(64, generator=generator) + 0.5 for name in [*names, "model.norm.weight"]}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """checkpoint(seed) -> a checkpoint with a tokenizer and norms of its own, made once."""
    made: dict[int, Path] = {}

    def folder(seed: int = 0) -> Path:
        if seed not in made:
            out = tmp_path_factory.mktemp("source") / "tiny"
            plain = tiny_checkpoint(vocab_size=VOCAB, seed=seed)
            made[seed] = write_tokenizer(altered(plain, out, tensors=random_norms(seed)))
        return made[seed]

    return folder


@pytest.fixture(scope="module")
def made(checkpoint: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """made(precision, **settings) -> exported once; settings: of QuantizationSettings."""
    found: dict[str, Pair] = {}

    def pair(precision: str, **settings: Any) -> Pair:
        key = repr((precision, sorted(settings.items())))
        if key not in found:
            root = tmp_path_factory.mktemp("stored")
            options: dict[str, Any] = (
                {"quantization": replace(SETTINGS, **settings)} if precision in QUANTIZED else {}
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
                export_checkpoint(
                    checkpoint(0), root / "onnx", precision=precision, prefill_chunk=C, **options
                )
            found[key] = Pair(root / "onnx", checkpoint(0))
        return found[key]

    return pair


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Made:
    """The same, in a folder that may be altered."""

    def pair(precision: str, **settings: Any) -> Pair:
        whole = made(precision, **settings)
        return replace(whole, folder=Path(shutil.copytree(whole.folder, tmp_path / "copy")))

    return pair


# ---------------------------------------------------------------- healthy artifacts


@pytest.mark.parametrize("precision", [*FLOAT, *QUANTIZED])
def test_nothing_is_said_of_a_healthy_artifact(made: Made, precision: str) -> None:
    pair, steps = made(precision), list[int]()
    source = Checkpoint.open(pair.checkpoint)
    found = compare_weights(pair.folder, pair.contract, source, advance=steps.append)
    assert found.wrong == {} and found.compared == len(source.weights) == sum(steps) == 21
    if precision in FLOAT:
        assert found.worst_steps is None
    else:
        assert found.worst_steps is not None and 0.49 < found.worst_steps < WORST_STEPS[precision]


@pytest.mark.parametrize("precision", INTEGERS)
def test_what_is_kept_is_compared_as_a_cast(copy: Made, precision: str) -> None:
    pair = copy(precision, keep=("*.0.self_attn.v_proj", "*.up_proj"))
    assert pair.wrong() == {}
    stored(pair.folder, V)[0, 0] ^= 1
    assert pair.wrong()[V].startswith("1 of 2,048 numbers are not the checkpoint's in float16")


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_head_is_compared(copy: Made, precision: str) -> None:
    pair = copy(precision, quantize_lm_head=True)
    assert pair.wrong() == {}
    stored(pair.folder, "lm_head.weight").reshape(-1)[0] ^= 0x40
    said = pair.wrong()
    assert list(said) == ["lm_head.weight"] and "is folded into model.norm" in said["lm_head.weight"]


@pytest.mark.parametrize("name", FORMATS)
def test_codes_that_were_stored_must_be_equal(tiny_checkpoint: Folder, tmp_path: Path, name: str) -> None:
    kept = write_stored(tiny_checkpoint(vocab_size=VOCAB), tmp_path / "stored", name)
    export_checkpoint(kept.folder, tmp_path / "onnx", precision=kept.precision, prefill_chunk=C)
    pair = Pair(tmp_path / "onnx", kept.folder)
    found = pair.findings()
    assert found.wrong == {} and found.worst_steps is not None and found.worst_steps < 1e-3
    codes = stored(pair.folder, Q)
    codes[0, 0] ^= 1  # a quarter of a step would be enough
    assert pair.wrong()[Q].startswith("1 of 4,096 codes")


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_merged_adapter_is_part_of_the_checkpoint(
    checkpoint: Callable[[int], Path], tmp_path: Path, precision: str
) -> None:
    model = MistralForCausalLM.from_pretrained(checkpoint(0), dtype=torch.float32)
    train(model, tmp_path / "lora", r=4, target_modules=["q_proj"])
    loras = [(tmp_path / "lora", 0.5)]
    export_checkpoint(checkpoint(0), tmp_path / "onnx", precision=precision, prefill_chunk=C, loras=loras)
    pair = Pair(tmp_path / "onnx", checkpoint(0))
    source = Checkpoint.open(checkpoint(0), [Adapter.open(tmp_path / "lora", 0.5)])
    assert pair.findings(source).wrong == {}
    assert list(pair.wrong()) == [Q, "model.layers.1.self_attn.q_proj.weight"], "without it"


def test_mistrals_own_format_and_linked_files(checkpoint: Callable[[int], Path], tmp_path: Path) -> None:
    own = mistral_format(checkpoint(0), tmp_path / "own")
    export_checkpoint(own, tmp_path / "onnx", precision="fp32", prefill_chunk=C, link=True)
    assert read_manifest(tmp_path / "onnx").details["linked"]
    assert Pair(tmp_path / "onnx", own).wrong() == {}


def test_tied_embeddings_are_one_tensor(onnx_folder: Folder, tiny_checkpoint: Folder, tmp_path: Path) -> None:
    settings = {"tie_word_embeddings": True}
    folder = shutil.copytree(onnx_folder(**settings), tmp_path / "copy")
    pair = Pair(folder, tiny_checkpoint(**settings))
    found = pair.findings()
    assert found.wrong == {} and found.compared == 20
    stored(folder, "model.embed_tokens.weight")[3, 7] ^= 1
    assert list(pair.wrong()) == ["model.embed_tokens.weight"]


# ---------------------------------------------------------------- faults in float weights


def test_one_flipped_exponent_bit_is_seen(copy: Made) -> None:
    pair = copy("fp16")
    stored(pair.folder, Q)[3, 11] ^= 0x04  # the high byte of number 5 in row 3
    said = pair.wrong()
    assert list(said) == [Q]
    assert said[Q].startswith(
        "1 of 4,096 numbers are not the checkpoint's in float16; the worst, [3, 5], is "
    )


@pytest.mark.parametrize("precision", FLOAT)
def test_one_flipped_last_bit_is_seen_in_every_tensor(copy: Made, precision: str) -> None:
    pair = copy(precision)
    names = list(Checkpoint.open(pair.checkpoint).weights)
    for name in names:
        stored(pair.folder, name).reshape(-1)[0] ^= 1
    assert list(pair.wrong()) == names


@pytest.mark.parametrize(
    ("first", "second"), [(GATE, OTHER_GATE), (GATE, UP), (K, V)], ids=["layers", "gate, up", "k, v"]
)
@pytest.mark.parametrize("precision", ["fp16", *QUANTIZED])
def test_exchanged_weights_are_seen_and_named(copy: Made, precision: str, first: str, second: str) -> None:
    pair = copy(precision)
    exchange_linears(pair.folder, first, second)
    said = pair.wrong()
    assert {first, second} <= set(said)
    assert said[first].endswith(f"its numbers are those of {second}")
    others = set(said) - {first, second}
    assert others <= {DOWN, "model.layers.0.post_attention_layernorm.weight"}, "what up_proj's scales are for"


@pytest.mark.parametrize("precision", ["fp16", *QUANTIZED])
def test_another_order_of_rotary_pairs_is_seen(copy: Made, precision: str) -> None:
    """Rows 0 1 2 … D/2 … of each head as 0 D/2 1 …, which is Mistral's own order."""
    pair = copy(precision)
    for name, heads in ((Q, 4), (K, 2)):
        rows = np.arange(heads * 16).reshape(heads, 2, 8).transpose(0, 2, 1).reshape(-1)
        reorder_outputs(pair.folder, name, rows)
    said = pair.wrong()
    assert list(said) == [Q, K]
    assert all(words.endswith("its row 1 is the checkpoint's row 8") for words in said.values())


@pytest.mark.parametrize("precision", ["fp16", *QUANTIZED])
def test_a_norm_of_another_layer_is_seen(copy: Made, precision: str) -> None:
    pair, norm = copy(precision), "model.layers.0.input_layernorm.weight"
    stored(pair.folder, norm)[:] = stored(pair.folder, "model.layers.1.input_layernorm.weight")
    said = pair.wrong()
    if precision in ("fp16", "fp8"):
        assert list(said) == [norm]
        assert said[norm].endswith("its numbers are those of model.layers.1.input_layernorm.weight")
    else:
        assert set(said) == {norm, Q, K, V}
        assert said[norm].endswith("fits none of the linears that read it: q_proj, k_proj, v_proj")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_head_that_is_the_embeddings_or_mixed_up_is_seen(copy: Made, precision: str) -> None:
    pair = copy(precision)
    head, embedding = (stored(pair.folder, f"{name}.weight") for name in ("lm_head", "model.embed_tokens"))
    right = head.copy()
    head[:] = embedding
    assert pair.wrong()["lm_head.weight"].endswith("its numbers are those of model.embed_tokens.weight")
    head[:] = right[::-1]
    assert list(pair.wrong()) == ["lm_head.weight"]
    head[:] = right
    assert pair.wrong() == {}

    def rewire(graph: onnx.GraphProto) -> None:
        node(graph, "lm_head/Transpose").input[0] = "model.embed_tokens.weight"

    edit_graph(pair.folder, rewire)
    expected = "lm_head/MatMul computes with model.embed_tokens.weight; expected lm_head.weight"
    assert pair.wrong() == {"lm_head.weight": expected}


@pytest.mark.parametrize("precision", ["fp16", *QUANTIZED])
def test_another_fine_tune_is_seen_in_every_tensor(
    made: Made, checkpoint: Callable[[int], Path], precision: str
) -> None:
    said = replace(made(precision), checkpoint=checkpoint(1)).wrong()
    assert len(said) == 21


# ---------------------------------------------------------------- faults in codes and scales


@pytest.mark.parametrize("precision", QUANTIZED)
def test_one_flipped_bit_of_a_code_is_seen(copy: Made, precision: str) -> None:
    pair = copy(precision)
    stored(pair.folder, OTHER_GATE)[3, 5] ^= 0x40
    said = pair.wrong()
    assert list(said) == [OTHER_GATE] and said[OTHER_GATE].startswith("1 of 6,144 codes are not")
    assert "input 3" in said[OTHER_GATE]


def test_swapped_nibbles_are_seen(copy: Made) -> None:
    pair = copy("int4")
    codes = stored(pair.folder, Q)
    codes[:] = (codes >> 4) | (codes << 4)
    assert list(pair.wrong()) == [Q]


@pytest.mark.parametrize("name", [Q, GATE, UP, DOWN])
@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize("factor", [2.0, 1.05])
def test_a_scale_that_is_off_is_seen(copy: Made, precision: str, name: str, factor: float) -> None:
    """up_proj's scales also say what its output is multiplied by: then it is down_proj that does not fit."""
    pair = copy(precision)
    scale = stored(pair.folder, f"{name}_scale").reshape(-1)
    scale = scale.view(np.float32 if precision in ("int8", "fp8") else np.float16)
    scale *= scale.dtype.type(factor)
    assert list(pair.wrong()) == [DOWN if name == UP and precision != "fp8" else name]


@pytest.mark.parametrize("precision", INTEGERS)
def test_one_scale_for_all_channels_is_seen(copy: Made, precision: str) -> None:
    """Both with codes that were taken with other scales and with codes that were taken with it."""
    pair = copy(precision)
    scale = stored(pair.folder, f"{V}_scale").reshape(-1)
    scale = scale.view(np.float32 if precision == "int8" else np.float16)
    scale[:] = scale.max()
    assert list(pair.wrong()) == [V] and "codes are not" in pair.wrong()[V]
    write_codes(pair.folder, V, np.rint(smoothed_value_weight(pair) / float(scale[0])))
    assert list(pair.wrong()) == [V] and "scales are larger than the numbers they are for" in pair.wrong()[V]


def smoothed_value_weight(pair: Pair) -> npt.NDArray[Any]:
    """v_proj's weight, divided by what its norm was multiplied by: [in, out]."""
    weights, norm = load_file(pair.checkpoint / SINGLE), f"{LAYER}input_layernorm.weight"
    factor = numbers_of(pair.folder)[norm] / weights[norm].numpy()
    return np.asarray(weights[V].numpy() / factor).T


def test_a_scale_of_another_shape_is_seen(copy: Made) -> None:
    pair = copy("int8")

    def one_scale(graph: onnx.GraphProto) -> None:
        (scale,) = [tensor for tensor in graph.initializer if tensor.name == f"{Q}_scale"]
        del scale.dims[:]
        next(entry for entry in scale.external_data if entry.key == "length").value = "4"

    edit_graph(pair.folder, one_scale)
    assert pair.wrong()[Q].startswith("has scales of shape []; int8 asks for [64]")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_seen(copy: Made, value: float) -> None:
    pair = copy("int8")
    stored(pair.folder, f"{Q}_scale").reshape(-1).view(np.float32)[3] = value
    assert pair.wrong()[Q] == f"{Q}_scale holds a number that is not positive and finite, so it is no scale"


def test_steps_of_one_input_must_agree(copy: Made) -> None:
    pair = copy("int8")
    name = K.replace("weight", "input_scale")
    stored(pair.folder, name).reshape(-1).view(np.float32)[0] *= np.float32(1.5)
    assert list(pair.wrong()) == [K] and "expected one step for one input" in pair.wrong()[K]


def test_a_pre_quant_scale_that_is_off_is_seen(copy: Made) -> None:
    pair, name = copy("int8"), f"{LAYER}self_attn.o_proj"
    stored(pair.folder, f"{name}.pre_quant_scale").reshape(-1).view(np.float32)[5] *= np.float32(1.5)
    said = pair.wrong()
    assert list(said) == [f"{name}.weight"] and "input 5" in said[f"{name}.weight"]


def test_an_input_that_is_always_zero_is_no_ones_fault(
    checkpoint: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a norm is 0, what was folded into it cannot be told, and does not matter."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    norms = random_norms(0)
    norms["model.layers.0.input_layernorm.weight"][7] = 0.0
    source = altered(checkpoint(0), tmp_path / "source", tensors=norms)
    export_checkpoint(source, tmp_path / "onnx", precision="int8", prefill_chunk=C, quantization=SETTINGS)
    pair = Pair(tmp_path / "onnx", source)
    assert pair.wrong() == {}
    norm = stored(pair.folder, "model.layers.0.input_layernorm.weight").reshape(-1).view(np.float16)
    norm[7] = 0.5
    assert "model.layers.0.input_layernorm.weight" in pair.wrong()


# ---------------------------------------------------------------- faults of the graph


def set_scalar(name: str, place: int, factor: float) -> Callable[[onnx.GraphProto], None]:
    """Multiply the constant that a node reads."""

    def edit(graph: onnx.GraphProto) -> None:
        constant = node(graph, name).input[place]
        (tensor,) = [tensor for tensor in graph.initializer if tensor.name == constant]
        array = onnx.numpy_helper.to_array(tensor)
        tensor.raw_data = (array * factor).astype(array.dtype).tobytes()

    return edit


def set_epsilon(graph: onnx.GraphProto) -> None:
    for attribute in node(graph, f"{LAYER}post_attention_layernorm/RMSNormalization").attribute:
        if attribute.name == "epsilon":
            attribute.f = 1e-6


@pytest.mark.parametrize(
    ("edit", "name", "words"),
    [
        (set_epsilon, f"{LAYER}post_attention_layernorm.weight", "rms_norm_eps 1e-05"),
        (set_scalar("model.rotary/Mul", 1, 1.0001), "constant.1", "rope_theta 10000"),
        (set_scalar("model/Sub_2", 1, 2), "model/Sub_2", "expected W = 8"),
        (set_scalar("model/Mod", 1, 2), "model/Mod", "expected R = 12"),
        (set_scalar(f"{LAYER}self_attn/Mul", 1, 2), f"{LAYER}self_attn/Mul", "head_dim ** -0.5 = 0.25"),
    ],
    ids=["epsilon", "rope_theta", "W", "R", "scale of the query"],
)
def test_constants_are_those_of_the_config(copy: Made, edit: Any, name: str, words: str) -> None:
    pair = copy("fp16")
    edit_graph(pair.folder, edit)
    assert words in pair.wrong()[name]


def test_rewired_modules_are_seen(copy: Made) -> None:
    """Each initializer whole, and none used where it belongs."""
    pair = copy("fp16")

    def rewire(graph: onnx.GraphProto) -> None:
        gate, up = (node(graph, f"{LAYER}mlp.{kind}_proj/Transpose") for kind in ("gate", "up"))
        gate.input[0], up.input[0] = up.input[0], gate.input[0]
        norm = node(graph, f"{LAYER}input_layernorm/RMSNormalization")
        norm.input[1] = "model.layers.1.input_layernorm.weight"
        node(graph, f"{LAYER}self_attn.v_proj/MatMul").input[0] = "model.embed_tokens/Gather"

    edit_graph(pair.folder, rewire)
    said = pair.wrong()
    assert list(said) == [f"{LAYER}input_layernorm.weight", V, GATE, UP]
    assert said[GATE] == f"{LAYER}mlp.gate_proj/MatMul computes with {UP}; expected {GATE}"


def test_what_belongs_to_nothing_is_seen(copy: Made) -> None:
    pair = copy("fp16")

    def add(graph: onnx.GraphProto) -> None:
        bias = onnx.numpy_helper.from_array(np.ones(64, np.float16), f"{LAYER}self_attn.q_proj.bias")
        graph.initializer.append(bias)

    edit_graph(pair.folder, add)
    assert pair.wrong() == {f"{LAYER}self_attn.q_proj.bias": "belongs to no weight of the checkpoint"}


def test_every_weight_of_the_checkpoint_is_used(made: Made) -> None:
    pair, name = made("fp16"), "model.layers.2.mlp.up_proj.weight"
    source = Checkpoint.open(pair.checkpoint)
    deeper = replace(source, weights={**source.weights, name: source.weights[UP]})
    assert pair.findings(deeper).wrong == {name: "has no module in the graph"}


def test_a_zero_point_is_seen(copy: Made) -> None:
    pair = copy("int8")

    def shift(graph: onnx.GraphProto) -> None:
        (tensor,) = [tensor for tensor in graph.initializer if tensor.name == "zero_point.96"]
        tensor.raw_data = bytes([1] * 96)

    edit_graph(pair.folder, shift)
    assert set(pair.wrong()) >= {GATE, UP} and "zero point that is not 0" in pair.wrong()[GATE]


# ---------------------------------------------------------------- the parts


def test_spacing_is_the_distance_to_the_next_code() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)  # 0 … 448, in order
    gaps = codes.float().diff()
    assert torch.equal(spacing(codes)[:-1], gaps)
    assert spacing(torch.tensor([5], dtype=torch.int8)) == 1


def test_nibbles_are_unpacked_low_one_first() -> None:
    assert nibbles(np.array([0xE1, 0x87], np.uint8), 3).tolist() == [1, -2, 7]


def test_norms_and_their_readers_are_inverse() -> None:
    norms = [f"model.layers.3.{kind}" for kind in ("input_layernorm", "post_attention_layernorm")]
    for norm in [*norms, "model.norm"]:
        assert {norm_of(reader) for reader in readers_of(norm)} == {norm}
    assert norm_of("model.layers.3.self_attn.o_proj") is norm_of("model.layers.3.mlp.down_proj") is None


# ---------------------------------------------------------------- the reference with the artifact's scales


LENGTH = 40
FAKE = {"int8": 0.06, "int8-weight-only": 0.01, "int4": 0.03, "fp8": 0.12}
"""Relative RMS of the artifact's logits to the fake-quantized model's: codes of activations flip."""


def tokens() -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(0, VOCAB, LENGTH)]


def reference(pair: Pair, *, dtype: torch.dtype = torch.float32, fake: bool) -> npt.NDArray[Any]:
    """Logits of Hugging Face's model: float32 [T, V]."""
    model = MistralForCausalLM.from_pretrained(pair.checkpoint, dtype=dtype, attn_implementation="eager")
    if fake:
        alter = fake_quantized(pair.folder, pair.contract)
        for index, layer in enumerate(model.model.layers):
            assert alter(layer, index) is layer
        model.lm_head = fake_quantized_head(pair.folder, pair.contract)(model.lm_head, model.model.norm)
    with torch.no_grad():
        return np.asarray(model(torch.tensor([tokens()])).logits[0].float())


def artifact(pair: Pair) -> npt.NDArray[Any]:
    """Logits of ONNX Runtime's exact kernels: float32 [T, V]."""
    cache = open_cache(pair.folder, threads=1, exact=True, trust_weights=True)
    row = cache.acquire()
    parts = [cache.append(row, tokens()[i : i + C], all_logits=True) for i in range(0, LENGTH, C)]
    return np.concatenate(parts)


def distance(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Root mean square of the difference over that of the expected."""
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("precision", QUANTIZED)
def test_the_fake_quantized_model_gives_the_artifacts_logits(
    made: Made, precision: str, dtype: torch.dtype
) -> None:
    pair = made(precision)
    found = artifact(pair)
    near = distance(found, reference(pair, dtype=dtype, fake=True))
    assert near < FAKE[precision]
    assert near < 0.5 * distance(found, reference(pair, dtype=dtype, fake=False)), "quantization shows"


@pytest.mark.parametrize("name", [Q, UP])
@pytest.mark.parametrize("precision", QUANTIZED)
def test_a_doubled_scale_of_the_artifact_shows(copy: Made, precision: str, name: str) -> None:
    pair = copy(precision)
    scale = stored(pair.folder, f"{name}_scale").reshape(-1)
    scale = scale.view(np.float32 if precision in ("int8", "fp8") else np.float16)
    scale *= scale.dtype.type(2)
    assert distance(artifact(pair), reference(pair, fake=True)) > 2 * FAKE[precision]


def test_the_codes_come_from_the_checkpoint(copy: Made) -> None:
    """Codes of the artifact that are wrong are not taken over."""
    pair = copy("int4")
    healthy = reference(pair, fake=True)
    stored(pair.folder, Q)[:] = 0
    assert distance(reference(pair, fake=True), healthy) < FAKE["int4"]
    assert distance(artifact(pair), healthy) > 5 * FAKE["int4"]


def test_the_range_used_is_the_largest_number_of_a_position_over_what_the_step_holds() -> None:
    x = torch.tensor([[[1.0, -6.35], [0.5, 0.0]], [[2.54, 1.0], [12.7, 0.0]]])
    assert range_used(x, 127 * 0.05).tolist() == pytest.approx([1.0, 0.5 / 6.35, 0.4, 2.0])
    assert range_used(x, 448 * 1e-38).isfinite().all(), "no step is too small"


@pytest.mark.parametrize("bound", [127.0, 448.0])
def test_what_is_logged_is_what_entered_the_rounding(bound: float) -> None:
    """The input times its factors, over all calls: at most 1 where nothing is cut."""
    codes, scale = torch.ones(3, 2, dtype=torch.int8), torch.ones(3, 1)
    linear = StoredLinear(codes, bound, scale, roundings=0, whole=False, input_scale=0.5)
    log, reads = InputLog(), Factor(torch.tensor([1.0, 4.0]), 0)
    saw = partial(log.add, "model.layers.3.mlp.down_proj")
    fake = FakeQuantizedLinear(torch.ones(3, 2), linear, reads=reads, gives=None, saw=saw)
    fake(torch.tensor([[[bound / 8, 0.0], [0.0, -bound / 8]]]))
    fake(torch.tensor([[[0.0, 3 * bound / 8]]]))
    assert log.found() == (InputRange("layer 3 mlp.down_proj", 3.0, 1.0),)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_head_is_one_in_the_artifacts_own_precision(made: Made, precision: str) -> None:
    pair = made(precision, quantize_lm_head=True)
    model = load_model(Checkpoint.open(pair.checkpoint), sliding_window=pair.contract.ring.sliding_window)

    def own(alter_head: AlterHead | None) -> npt.NDArray[Any]:
        layers = own_precision_layers(
            WholeModel(model),
            precision=precision,
            rounding="attention",
            alter=fake_quantized(pair.folder, pair.contract),
            alter_head=alter_head,
        )
        return run_layers(layers, tokens()).logits(0, LENGTH)

    found = artifact(pair)
    near = distance(found, own(fake_quantized_head(pair.folder, pair.contract)))
    assert near < FAKE[precision]
    assert near < 0.7 * distance(found, own(None))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_head_and_what_is_kept_are_as_in_the_artifact(made: Made, precision: str) -> None:
    pair = made(precision, quantize_lm_head=True)
    model = MistralForCausalLM.from_pretrained(pair.checkpoint, dtype=torch.float32)
    alter = fake_quantized_head(pair.folder, pair.contract)
    assert alter(model.lm_head, model.model.norm) is not model.lm_head
    assert distance(artifact(pair), reference(pair, fake=True)) < FAKE[precision]
    plain = made(precision)
    assert fake_quantized_head(plain.folder, plain.contract)(model.lm_head, model.model.norm) is model.lm_head
    kept = made(precision, keep=("*.0.self_attn.v_proj", "*.up_proj"))
    layer = fake_quantized(kept.folder, kept.contract)(model.model.layers[0], 0)
    assert isinstance(layer.get_submodule("self_attn.v_proj"), torch.nn.Linear)
    assert not isinstance(layer.get_submodule("self_attn.q_proj"), torch.nn.Linear)
    assert distance(artifact(kept), reference(kept, fake=True)) < FAKE[precision]
