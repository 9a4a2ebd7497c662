"""The reference in the artifact's precision: Hugging Face's rounding, and nearer to what it does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import MistralForCausalLM

from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.manifest import read_manifest
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.engine import open_cache
from mistral_trt.runtime.onnxruntime_backend import OnnxRuntimeBackend
from mistral_trt.validate.reference.decoder import (
    LayerSource,
    WholeModel,
    eager_stream,
    head_logits,
    whole_layers,
)
from mistral_trt.validate.reference.hugging_face import load_model, quiet_transformers, run_layers
from mistral_trt.validate.reference.own_precision import Alter, Rounding, WideProducts, own_precision_layers
from mistral_trt.validate.twin import float32_twin
from tests.conftest import Folder

TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 97, 120)]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def model_of(checkpoint: Path, window: int = 8) -> MistralForCausalLM:
    return load_model(Checkpoint.open(checkpoint), sliding_window=window)


def own(
    source: LayerSource,
    precision: str = "fp16",
    *,
    rounding: Rounding = "all",
    alter: Alter | None = None,
    score_bytes: int = 1 << 28,
) -> np.ndarray:
    layers = own_precision_layers(
        source, precision=precision, rounding=rounding, alter=alter, score_bytes=score_bytes
    )
    return run_layers(layers, TOKENS).logits(0, len(TOKENS))


def float32(checkpoint: Path) -> np.ndarray:
    return run_layers(whole_layers(model_of(checkpoint)), TOKENS).logits(0, len(TOKENS))


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square difference over the spread of the logits, median over positions."""
    errors = np.sqrt(((found - expected) ** 2).mean(axis=-1)) / expected.std(axis=-1)
    return float(np.median(errors))


@pytest.fixture(scope="module")
def artifact(onnx_folder: Folder) -> np.ndarray:
    """Logits of the tiny fp16 artifact in ONNX Runtime."""
    cache = open_cache(onnx_folder(precision="fp16"), threads=1, trust_weights=True, exact=True)
    return cache.append(cache.acquire(), TOKENS, all_logits=True)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_it_is_hugging_faces_model_of_that_dtype(tiny_checkpoint: Folder, precision: str) -> None:
    """PyTorch's own half-precision products say the same, but for the order of a few sums."""
    checkpoint = tiny_checkpoint()
    with quiet_transformers():
        model = MistralForCausalLM.from_pretrained(
            checkpoint, dtype=DTYPES[precision], attn_implementation="eager"
        )
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0].float().numpy()
    found = own(WholeModel(model_of(checkpoint)), precision)
    assert distance(found, expected) < 0.1 * distance(float32(checkpoint), expected)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_number_is_one_of_the_dtype(tiny_checkpoint: Folder, precision: str) -> None:
    layers = own_precision_layers(
        WholeModel(model_of(tiny_checkpoint())), precision=precision, rounding="all"
    )
    entering = layers.embed(TOKENS)
    states = layers.run(0, entering)
    logits = head_logits(layers.norm(states.hidden), layers.head())
    for numbers in (entering, states.hidden, states.keys, states.values, logits):
        tensor = torch.tensor(numbers)
        assert torch.equal(tensor, tensor.to(DTYPES[precision]).float())


def test_an_artifact_is_nearer_to_its_own_precision(tiny_checkpoint: Folder, artifact: np.ndarray) -> None:
    checkpoint = tiny_checkpoint()
    source, reference = WholeModel(model_of(checkpoint)), float32(checkpoint)
    nearest = distance(artifact, own(source, rounding="attention"))
    assert nearest < 0.85 * distance(artifact, reference)
    all_rounded = own(source)
    assert distance(artifact, reference) < 1.2 * distance(all_rounded, reference), "rounding explains it"


@pytest.mark.parametrize("rounding", ["all", "attention"])
def test_planted_faults_make_it_differ(
    tiny_checkpoint: Folder, artifact: np.ndarray, rounding: Rounding
) -> None:
    def epsilon(layer: Any, index: int) -> nn.Module:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.variance_epsilon *= 100
        altered: nn.Module = layer
        return altered

    checkpoint = tiny_checkpoint()
    right = distance(artifact, own(WholeModel(model_of(checkpoint)), rounding=rounding))
    for window in (7, 9):
        wrong = own(WholeModel(model_of(checkpoint, window)), rounding=rounding)
        assert distance(artifact, wrong) > 100 * right
    wrong = own(WholeModel(model_of(checkpoint)), rounding=rounding, alter=epsilon)
    assert distance(artifact, wrong) > 10 * right


def test_with_parameters_rounded_alone_it_is_the_float32_twin(
    tiny_checkpoint: Folder, onnx_folder: Folder
) -> None:
    folder = onnx_folder(precision="bf16")
    with float32_twin(folder / "model.onnx", read_manifest(folder).contract) as (path, contract):
        twin = RollingCache(OnnxRuntimeBackend(path, contract))
        found = twin.append(twin.acquire(), TOKENS, all_logits=True)
    checkpoint = tiny_checkpoint()
    expected = own(WholeModel(model_of(checkpoint)), "bf16", rounding="parameters")
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - float32(checkpoint)).max() > 1e-2


@pytest.mark.parametrize("rounding", ["all", "attention", "parameters"])
def test_source_and_blocks_make_no_difference(tiny_checkpoint: Folder, rounding: Rounding) -> None:
    """A layer read alone is rounded as one of the whole model is; blocks change the order of sums only."""
    checkpoint = tiny_checkpoint()
    expected = own(WholeModel(model_of(checkpoint)), rounding=rounding)
    streamed = eager_stream(Checkpoint.open(checkpoint), sliding_window=8)
    np.testing.assert_array_equal(own(streamed, rounding=rounding), expected)
    blocks = own(streamed, rounding=rounding, score_bytes=4 * 4 * 120 * 7)
    assert distance(blocks, expected) < 0.5 * distance(expected, float32(checkpoint))


def test_the_reference_is_left_as_it_was(tiny_checkpoint: Folder) -> None:
    def zeroed(layer: nn.Module, index: int) -> nn.Module:
        for parameter in layer.parameters():
            parameter.data.zero_()
        return layer

    model = model_of(tiny_checkpoint())
    before = run_layers(whole_layers(model), TOKENS).logits(0, 120)
    own(WholeModel(model), rounding="attention", alter=zeroed)
    np.testing.assert_array_equal(run_layers(whole_layers(model), TOKENS).logits(0, 120), before)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("rounding", ["all", "attention", "parameters"])
def test_linears_are_replaced_and_what_replaces_them_is_not_cast(
    tiny_checkpoint: Folder, rounding: Rounding
) -> None:
    class Coarse(nn.Module):
        """A linear whose weights have seven levels, in float32."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            assert linear.weight.dtype == torch.float32
            assert not torch.equal(linear.weight, linear.weight.half().float()), "not rounded before"
            scale = linear.weight.abs().amax(dim=1, keepdim=True) / 3
            self.weight = nn.Parameter((linear.weight / scale).round() * scale)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.weight.dtype == torch.float32
            return F.linear(x.float(), self.weight).to(x.dtype)

    altered: list[int] = []

    def alter(layer: Any, index: int) -> nn.Module:
        altered.append(index)
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, Coarse(linear))
        replaced: nn.Module = layer
        return replaced

    source = WholeModel(model_of(tiny_checkpoint()))
    plain, coarse = own(source, rounding=rounding), own(source, "int8", rounding=rounding, alter=alter)
    assert altered == [0, 1]
    assert distance(coarse, plain) > 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_are_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(1, 40, 40, generator=generator).to(dtype) for _ in range(2))
    exact = x.double() @ w.double().transpose(1, 2)
    with WideProducts():
        found = [F.linear(x, w[0]), torch.matmul(x, w.transpose(1, 2))]
    for product in found:
        assert product.dtype == dtype
        assert (product != exact.to(dtype)).float().mean() < 0.01, "a tie of float32 sums now and then"
    query, key = x.view(1, 2, 20, 40), w.view(1, 2, 20, 40)
    with WideProducts():
        attended = F.scaled_dot_product_attention(query, key, key, scale=0.5)
    expected = F.scaled_dot_product_attention(query.double(), key.double(), key.double(), scale=0.5)
    assert (attended != expected.to(dtype)).float().mean() < 0.01


def test_products_of_float32_are_left_alone() -> None:
    x = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    with WideProducts():
        assert torch.equal(F.linear(x, x), x @ x.T)
        assert F.linear(x, x).dtype == torch.float32


def test_words_say_what_is_rounded(tiny_checkpoint: Folder) -> None:
    source = WholeModel(model_of(tiny_checkpoint()))
    words = {
        rounding: own_precision_layers(source, precision="bf16", rounding=rounding).words
        for rounding in ("all", "attention", "parameters")
    }
    assert len(set(words.values())) == 3
    assert all("bfloat16" in text for text in words.values())
    quantized = own_precision_layers(
        source, precision="int4", rounding="attention", alter=lambda layer, index: layer
    )
    assert "float16" in quantized.words
    assert "linears quantized as int4" in quantized.words


def test_float32_has_no_other_precision_of_its_own(tiny_checkpoint: Folder) -> None:
    with pytest.raises(ValueError, match="is the reference itself"):
        own_precision_layers(WholeModel(model_of(tiny_checkpoint())), precision="fp32", rounding="all")
