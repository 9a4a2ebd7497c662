"""An artifact followed beside Hugging Face's layers: a fault shows in its own layer and its own slots."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

from mistral_trt.contract import GraphContract, Ring
from mistral_trt.errors import ValidationError
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.manifest import GRAPH_NAME, read_manifest
from mistral_trt.runtime.backend import Step
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.validate.layerwise.follow import Followed, follow, relative_errors
from mistral_trt.validate.layerwise.ranges import RangeLog
from mistral_trt.validate.layerwise.runner import SegmentedArtifact
from mistral_trt.validate.layerwise.steps import Recording, gather, held_positions, scatter
from mistral_trt.validate.reference.hugging_face import load_model
from mistral_trt.validate.reference.layers import LayerStates
from mistral_trt.validate.scenarios.scenario import play, scenarios
from tests.conftest import Folder
from tests.models import TINY
from tests.rings import Call, calls, simulate

LAYERS, LENGTH, WINDOW, CLOSE = 3, 30, 8, 1e-5
TOKENS = tuple(int(t) for t in np.random.default_rng(3).integers(0, TINY.vocab_size, LENGTH))
FAULTY = 1


@dataclass(frozen=True)
class HuggingFaceLayers:
    """Hugging Face's decoder layers, float32, over all tokens at once."""

    model: Any

    @property
    def num_hidden_layers(self) -> int:
        return len(self.model.model.layers)

    @torch.inference_mode()
    def embed(self, tokens: Sequence[int]) -> np.ndarray:
        found: np.ndarray = self.model.model.embed_tokens(torch.tensor(list(tokens))).numpy()
        return found

    @torch.inference_mode()
    def run(self, index: int, hidden: np.ndarray) -> LayerStates:
        layer, x = self.model.model.layers[index], torch.from_numpy(hidden)[None]
        places = torch.arange(len(hidden))
        seen = (places[None] <= places[:, None]) & (places[None] > places[:, None] - WINDOW)
        mask = torch.where(seen, 0.0, float("-inf"))[None, None]
        angles = self.model.model.rotary_emb(x, places[None])
        left = layer(x, attention_mask=mask, position_ids=places[None], position_embeddings=angles)
        read = layer.input_layernorm(x)
        keys, values = (
            linear(read).view(1, len(hidden), -1, TINY.head_dim).transpose(1, 2)
            for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        keys, _ = apply_rotary_pos_emb(keys, keys, *angles)
        return LayerStates(left[0].numpy(), keys[0].numpy(), values[0].numpy())

    @torch.inference_mode()
    def logits(self, hidden: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.model.lm_head(self.model.model.norm(torch.from_numpy(hidden))).numpy()
        return found


@dataclass(frozen=True)
class Pair:
    folder: Path
    contract: GraphContract
    reference: HuggingFaceLayers

    def recordings(self) -> dict[str, Recording]:
        found = {}
        for scenario in scenarios(
            self.contract, LENGTH, names=["prefill", "decode", "padded", "stepwise"], seed=0
        ):
            found[scenario.name] = recording = Recording(self.contract)
            for _ in play(RollingCache(recording), scenario, tokens=TOKENS):
                pass
        return found

    def follow(self, reading: str = "prefill", **options: Any) -> Followed:
        options = {"recordings": self.recordings(), "tokens": TOKENS, **options}
        with SegmentedArtifact(self.folder, self.contract, threads=1) as artifact:
            return follow(artifact, options.pop("reference", self.reference), reading=reading, **options)

    def altered(self, folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> "Pair":
        """With another value of one initializer."""
        shutil.copytree(self.folder, folder)
        model = ir.load(self.folder / GRAPH_NAME)
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(change(value.const_value.numpy()), dtype=value.dtype, name=name)
        ir.save(model, folder / GRAPH_NAME, external_data=f"{GRAPH_NAME}.data")
        return replace(self, folder=folder)


@pytest.fixture(scope="module")
def pair(onnx_folder: Folder, tiny_checkpoint: Folder) -> Pair:
    folder, source = onnx_folder(num_hidden_layers=LAYERS), tiny_checkpoint(num_hidden_layers=LAYERS)
    model = load_model(Checkpoint.open(source), sliding_window=WINDOW)
    return Pair(folder, read_manifest(folder).contract, HuggingFaceLayers(model))


def test_a_sound_artifact_is_the_reference_in_every_layer(pair: Pair) -> None:
    for reading in pair.recordings():
        followed = pair.follow(reading)
        for i, layer in enumerate(followed.findings.layers):
            assert layer.index == i and layer.hidden.shape == layer.update.shape == (LENGTH,)
            for errors in (layer.hidden, layer.update, layer.keys, layer.values):
                assert errors.dtype == np.float64 and errors.max() < CLOSE
            assert len(layer.positions) == len(layer.keys) == len(layer.values)
            assert set(range(LENGTH - 8, LENGTH)) <= set(layer.positions) <= set(range(LENGTH))


def test_what_is_left_gives_every_scenarios_logits(pair: Pair) -> None:
    followed, recordings = pair.follow(), pair.recordings()
    expected = pair.reference.logits(followed.reference)
    assert set(followed.hidden) == set(recordings)
    with SegmentedArtifact(pair.folder, pair.contract, threads=1) as artifact:
        for name, recording in recordings.items():
            found = np.concatenate([x[0] for x in artifact.logits(recording, followed.hidden[name])])
            np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_fault_shows_in_its_own_layer(pair: Pair, tmp_path: Path) -> None:
    """`update` there alone; `hidden` from there on; a linear after attention leaves the ring as it was."""
    name = f"model.layers.{FAULTY}.mlp.down_proj.weight"
    broken = pair.altered(tmp_path / "broken", name, lambda weight: weight * np.float32(1.02))
    layers = broken.follow().findings.layers
    assert [layer.update.max() > 1e-3 for layer in layers] == [False, True, False]
    assert [layer.hidden.max() > 1e-3 for layer in layers] == [False, True, True]
    assert all(max(layer.keys.max(), layer.values.max(), layer.update.max()) < CLOSE for layer in layers[::2])
    assert max(layers[FAULTY].keys.max(), layers[FAULTY].values.max()) < CLOSE


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_a_fault_of_keys_or_values_shows_in_the_ring(pair: Pair, tmp_path: Path, kind: str) -> None:
    name = f"model.layers.{FAULTY}.self_attn.{kind[0]}_proj.weight"
    broken = pair.altered(tmp_path / "broken", name, lambda weight: weight * np.float32(1.02))
    for layer in broken.follow().findings.layers:
        for measured in ("keys", "values"):
            errors = getattr(layer, measured)
            if layer.index == FAULTY and measured == kind:
                np.testing.assert_allclose(errors, 0.02, rtol=1e-3)
            else:
                assert errors.max() < CLOSE


def test_a_fault_of_one_position_shows_in_its_slot(pair: Pair) -> None:
    position = LENGTH - 3

    class Other(HuggingFaceLayers):
        def run(self, index: int, hidden: np.ndarray) -> LayerStates:
            states = super().run(index, hidden)
            keys = states.keys.copy()
            keys[0, position] += 1.0 if index == FAULTY else 0.0
            return replace(states, keys=keys)

    for layer in pair.follow(reference=Other(pair.reference.model)).findings.layers:
        wrong = layer.positions[layer.keys > CLOSE]
        assert list(wrong) == ([position] if layer.index == FAULTY else [])


def test_a_window_off_by_one_shows_where_the_window_ends(pair: Pair, tmp_path: Path) -> None:
    graph = ir.load(pair.folder / GRAPH_NAME).graph
    window = next(node for node in graph if node.name == "model/Sub_2").inputs[1]
    assert window is not None and window.const_value is not None and window.const_value.numpy() == 8
    broken = pair.altered(tmp_path / "broken", str(window.name), lambda size: size + 1)
    for layer in broken.follow("decode").findings.layers:
        assert layer.update[:8].max() < CLOSE < 1e-4 < layer.update[8:].max()


def test_each_layer_is_counted_and_its_ranges_kept(pair: Pair) -> None:
    done: list[int] = []
    found = pair.follow("padded", ranges=RangeLog(), progress=done.append).findings
    assert done == [1] * LAYERS and "one layer at a time" in found.words
    assert {r.layer for r in found.ranges} == set(range(LAYERS))
    assert pair.follow("padded").findings.ranges == ()


def test_what_cannot_be_compared_is_refused(pair: Pair, tiny_checkpoint: Folder) -> None:
    with pytest.raises(
        ValidationError, match=r"the recording feeds token \d+ at position 0 where the reference"
    ):
        pair.follow(tokens=tuple(t ^ 1 for t in TOKENS))
    with pytest.raises(ValidationError, match=f"position {LENGTH} was not fed"):
        pair.follow(tokens=(*TOKENS, 0))
    model = load_model(Checkpoint.open(tiny_checkpoint(num_hidden_layers=2)), sliding_window=WINDOW)
    with pytest.raises(ValidationError, match="the artifact has 3 decoder layers and the reference 2"):
        pair.follow(reference=HuggingFaceLayers(model))


def test_relative_errors_of_zeros_and_of_what_is_not_finite() -> None:
    expected = np.array([[3, 4], [0, 0], [0, 0], [1, 0], [1, 0]], np.float32)
    found = np.array([[3, 4.5], [0, 0], [0, 1], [np.nan, 0], [np.inf, 0]], np.float32)
    np.testing.assert_array_equal(relative_errors(found, expected), [0.1, 0, np.inf, np.nan, np.inf])


# ---------------------------------------------------------------- positions


def recording_of(history: Sequence[Call], contract: GraphContract) -> Recording:
    recording = Recording(contract)
    for call in history:
        positions = np.arange(call.start, call.start + call.width)[None]
        recording.run(Step(positions, positions, np.zeros((1, 1), np.int64), 0))
    return recording


@given(st.data())
def test_held_positions_are_those_of_a_ring_that_is_written(data: st.DataObject) -> None:
    ring = data.draw(st.builds(Ring, st.integers(1, 12), st.integers(1, 6)))
    history = data.draw(calls(ring))
    recording = recording_of(history, GraphContract(TINY, "fp32", ring, 1, None))
    *_, (_, slots) = simulate(ring, history)
    assert list(held_positions(recording, ring)) == [-1 if held is None else held for held in slots]
    recording.write_row(0, None)
    assert (held_positions(recording, ring) == -1).all()
    assert (held_positions(recording, ring, row=1) == -1).all()


@given(st.data())
def test_gather_undoes_scatter(data: st.DataObject) -> None:
    ring = data.draw(st.builds(Ring, st.integers(1, 12), st.integers(1, 6)))
    history = data.draw(calls(ring))
    length = max(call.start + call.tokens for call in history)
    if length:
        recording = recording_of(history, GraphContract(TINY, "fp32", ring, 1, None))
        states = np.arange(2 * length).reshape(length, 2)
        np.testing.assert_array_equal(gather(recording, scatter(recording, states), length), states)
