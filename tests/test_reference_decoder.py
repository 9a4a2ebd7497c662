"""Hugging Face's layers one by one: the whole model's numbers, whatever the blocks and the source."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache

from mistral_trt.errors import ValidationError
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.lora import Adapter
from mistral_trt.export.quantization.layers import LayerStream
from mistral_trt.validate.reference.decoder import (
    HuggingFaceLayers,
    LayerSource,
    WholeModel,
    eager_stream,
    streamed_layers,
    whole_layers,
)
from mistral_trt.validate.reference.hugging_face import load_model, run_layers
from tests.checkpoints import mistral_format
from tests.conftest import Folder
from tests.oracle import oracle_logits, read_weights, rms_norm, rotate
from tests.test_lora import train

TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 97, 60)]
HEADS = 4


def in_blocks(source: LayerSource, queries: int) -> HuggingFaceLayers:
    return HuggingFaceLayers(source, words="", score_bytes=4 * HEADS * len(TOKENS) * queries)


def logits(layers: HuggingFaceLayers) -> np.ndarray:
    return run_layers(layers, TOKENS).logits(0, len(TOKENS))


def attending(checkpoint: Path, window: int, attention: str, *, whole: bool) -> LayerSource:
    """A source of layers with one of Hugging Face's implementations of attention."""
    source: Any
    if whole:
        model: Any = load_model(Checkpoint.open(checkpoint), sliding_window=window)
        model.set_attn_implementation(attention)
        source = WholeModel(model)
    else:
        source = eager_stream(Checkpoint.open(checkpoint), sliding_window=window)
        source.config._attn_implementation = attention
    return source  # type: ignore[no-any-return]


def test_layer_after_layer_is_the_single_forward(tiny_checkpoint: Folder) -> None:
    """Hidden states of every layer, keys, values and logits, bit for bit where there is one block."""
    model = load_model(Checkpoint.open(tiny_checkpoint()), sliding_window=8)
    layers = whole_layers(model)
    cache: Any = DynamicCache()
    with torch.inference_mode():
        single = model(
            torch.tensor([TOKENS]), output_hidden_states=True, past_key_values=cache, use_cache=True
        )
    assert single.hidden_states is not None
    hidden = layers.embed(TOKENS)
    np.testing.assert_array_equal(hidden, single.hidden_states[0][0].numpy())
    for index in range(layers.num_hidden_layers):
        states = layers.run(index, hidden)
        assert states.hidden.dtype == states.keys.dtype == states.values.dtype == np.float32
        np.testing.assert_array_equal(states.keys, cache.layers[index].keys[0].numpy())
        np.testing.assert_array_equal(states.values, cache.layers[index].values[0].numpy())
        hidden = states.hidden
        if index + 1 < layers.num_hidden_layers:  # Hugging Face's last hidden state is normed
            np.testing.assert_array_equal(hidden, single.hidden_states[index + 1][0].numpy())
    np.testing.assert_allclose(logits(layers), single.logits[0].numpy(), atol=2e-6)


def test_keys_are_rotated_and_none_is_forgotten(tiny_checkpoint: Folder) -> None:
    """Of the first layer, by the textbook: all 60 of them, though the window is 8."""
    checkpoint = tiny_checkpoint()
    source, weights = Checkpoint.open(checkpoint), read_weights(checkpoint)
    layers = streamed_layers(source, sliding_window=8)
    embedded, part = weights["model.embed_tokens.weight"][TOKENS], "model.layers.0.{}.weight".format
    normed = rms_norm(embedded, weights[part("input_layernorm")], source.config.rms_norm_eps)
    keys, values = ((normed @ weights[part(f"self_attn.{name}_proj")].T).reshape(60, 2, 16) for name in "kv")
    states = layers.run(0, layers.embed(TOKENS))
    rotated = rotate(keys, source.config.rope_theta).transpose(1, 0, 2)
    np.testing.assert_allclose(states.keys, rotated, atol=1e-5)
    np.testing.assert_allclose(states.values, values.transpose(1, 0, 2), atol=1e-5)
    assert np.abs(states.keys - keys.transpose(1, 0, 2)).max() > 0.1, "unrotated keys would show"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "streamed"])
def test_blocks_change_nothing(tiny_checkpoint: Folder, attention: str, whole: bool) -> None:
    source = attending(tiny_checkpoint(), 8, attention, whole=whole)
    once = in_blocks(source, 60)
    hidden = once.embed(TOKENS)
    expected = once.run(1, hidden)
    for queries in (1, 7, 8, 59):
        found = in_blocks(source, queries).run(1, hidden)
        for name in ("hidden", "keys", "values"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "streamed"])
@pytest.mark.parametrize("queries", [7, 60])
def test_the_window_is_the_oracles_to_the_token(
    tiny_checkpoint: Folder, attention: str, whole: bool, queries: int
) -> None:
    """The float64 oracle's at W, and neither at W - 1 nor at W + 1."""
    checkpoint = tiny_checkpoint()
    config, weights = Checkpoint.open(checkpoint).config, read_weights(checkpoint)
    expected = oracle_logits(weights, config, tokens=TOKENS, sliding_window=8)
    for window in (7, 8, 9):
        found = logits(in_blocks(attending(checkpoint, window, attention, whole=whole), queries))
        error = np.abs(found - expected).max(axis=-1)
        if window == 8:
            assert error.max() < 1e-5
        else:
            assert error[9:].min() > 1e-2


@pytest.mark.parametrize(
    "shape", [{}, {"tie_word_embeddings": True}, {"dtype": "bfloat16"}, {"sliding_window": None}], ids=str
)
def test_streamed_is_whole(tiny_checkpoint: Folder, shape: dict[str, object]) -> None:
    source = Checkpoint.open(tiny_checkpoint(**shape))
    whole = logits(whole_layers(load_model(source, sliding_window=8)))
    np.testing.assert_allclose(logits(streamed_layers(source, sliding_window=8)), whole, atol=1e-6)


def test_mistrals_own_format_is_streamed(tiny_checkpoint: Folder, tmp_path: Path) -> None:
    theirs = Checkpoint.open(mistral_format(tiny_checkpoint(), tmp_path / "own"))
    expected = logits(streamed_layers(Checkpoint.open(tiny_checkpoint()), sliding_window=8))
    np.testing.assert_array_equal(logits(streamed_layers(theirs, sliding_window=8)), expected)


def test_adapters_are_merged_and_it_is_said_by_whom(tiny_checkpoint: Folder, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    bare = Checkpoint.open(checkpoint)
    targets = ["q_proj", "down_proj"]
    train(load_model(bare, sliding_window=8), tmp_path / "a", r=4, lora_alpha=8, target_modules=targets)
    source = Checkpoint.open(checkpoint, [Adapter.open(tmp_path / "a", 0.5)])
    whole = logits(whole_layers(load_model(source, sliding_window=8)))
    streamed = streamed_layers(source, sliding_window=8)
    np.testing.assert_allclose(logits(streamed), whole, atol=1e-4)
    assert np.abs(logits(streamed_layers(bare, sliding_window=8)) - whole).max() > 1e-2
    assert "merges the adapters, not peft" in streamed.words
    assert "peft" not in streamed_layers(bare, sliding_window=8).words


def test_one_layer_is_in_memory_at_a_time(tiny_checkpoint: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    read, made = LayerStream.layer, list[weakref.ref[nn.Module]]()

    def reading(stream: LayerStream, index: int) -> nn.Module:
        gc.collect()
        assert all(reference() is None for reference in made)
        layer = read(stream, index)
        made.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(LayerStream, "layer", reading)
    source = Checkpoint.open(tiny_checkpoint(num_hidden_layers=3))
    logits(streamed_layers(source, sliding_window=8))
    assert len(made) == 3


def test_each_layer_is_counted_once(tiny_checkpoint: Folder) -> None:
    counted: list[int] = []
    run_layers(
        streamed_layers(Checkpoint.open(tiny_checkpoint()), sliding_window=8), TOKENS, advance=counted.append
    )
    assert counted == [1, 1]


def test_what_goes_in_may_be_read_only_and_is_left_alone(tiny_checkpoint: Folder) -> None:
    layers = streamed_layers(Checkpoint.open(tiny_checkpoint()), sliding_window=8)
    hidden = layers.embed(TOKENS)
    before = hidden.copy()
    hidden.setflags(write=False)
    layers.run(0, hidden)
    np.testing.assert_array_equal(hidden, before)


def test_a_layer_that_gives_nan_is_refused(tiny_checkpoint: Folder) -> None:
    model = load_model(Checkpoint.open(tiny_checkpoint()), sliding_window=8)
    with torch.no_grad():
        next(model.model.layers[1].mlp.parameters())[0] = torch.nan
    with pytest.raises(ValidationError, match="NaN or infinity in float32"):
        run_layers(whole_layers(model), TOKENS)
