"""The two references: each other's equal, and each able to tell a wrong window from a right one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from mistral_trt.config import ModelConfig
from mistral_trt.errors import ValidationError
from mistral_trt.export.checkpoint import Checkpoint, expected_shapes
from mistral_trt.export.conversion import Weight
from mistral_trt.export.synth import named_config
from mistral_trt.export.tensor_files import StoredTensor
from mistral_trt.manifest import read_manifest
from mistral_trt.validate.reference import hugging_face, memory
from mistral_trt.validate.reference.decoder import queries_at_once
from mistral_trt.validate.reference.hugging_face import (
    Reference,
    load_model,
    require_same_checkpoint,
    run_reference,
)
from mistral_trt.validate.reference.memory import predict_memory, require_memory
from tests.conftest import Folder
from tests.models import write_checkpoint
from tests.oracle import band, oracle_logits, read_weights, rms_norm, rotate, softmax

TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 97, 60)]
SHAPES: list[dict[str, object]] = [
    {},
    {"tie_word_embeddings": True},
    {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 500.0},
    {"sliding_window": 1},
    {"sliding_window": None, "rms_norm_eps": 1e-2},
]


def oracle(checkpoint: Path, window: int, tokens: list[int] = TOKENS) -> np.ndarray:
    config = Checkpoint.open(checkpoint).config
    return oracle_logits(read_weights(checkpoint), config, tokens=tokens, sliding_window=window)


def read(checkpoint: Path, window: int = 8) -> Reference:
    return run_reference(load_model(Checkpoint.open(checkpoint), sliding_window=window), TOKENS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_huggingface_equals_the_oracle(tiny_checkpoint: Folder, shape: dict[str, object]) -> None:
    checkpoint = tiny_checkpoint(**shape)
    for window in (1, 8, 60):
        found = read(checkpoint, window)
        np.testing.assert_allclose(found.logits(0, 60), oracle(checkpoint, window), atol=1e-5)


def test_a_window_off_by_one_is_seen(tiny_checkpoint: Folder) -> None:
    checkpoint = tiny_checkpoint()
    right = oracle(checkpoint, 8)
    for wrong in (7, 9):
        error = np.abs(oracle(checkpoint, wrong) - right).max(axis=-1)
        assert error[:7].max() == 0, "nothing differs before either window is full"
        assert error[9:].min() > 1e-2


def test_the_band_counts_the_query_itself() -> None:
    np.testing.assert_array_equal(band(4, 2), [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])
    np.testing.assert_array_equal(band(3, 1), np.eye(3))


def test_rotation_depends_on_distance_only() -> None:
    key = np.random.default_rng(0).normal(size=(1, 1, 8)).repeat(9, axis=0)
    rotated = rotate(key, 100.0)
    products = rotated[:, 0] @ rotated[:, 0].T
    np.testing.assert_allclose(rotated[0], key[0])
    np.testing.assert_allclose(np.diag(products, 3), products[0, 3])
    assert abs(products[0, 3] - products[0, 4]) > 1e-3


def test_norm_and_softmax_of_known_values() -> None:
    np.testing.assert_allclose(
        rms_norm(np.array([[3.0, 4.0]]), np.array([1.0, 2.0]), 0.0) * 12.5**0.5, [[3, 8]]
    )
    np.testing.assert_allclose(softmax(np.array([[0.0, np.log(3.0), -np.inf]])), [[0.25, 0.75, 0]])
    assert np.isfinite(softmax(np.array([[1e5, 0.0]]))).all()


def test_logits_in_pieces_equal_the_whole_forward(tiny_checkpoint: Folder) -> None:
    checkpoint = tiny_checkpoint()
    model = load_model(Checkpoint.open(checkpoint), sliding_window=8)
    with torch.inference_mode():
        whole = model(torch.tensor([TOKENS])).logits[0].numpy()
    found = run_reference(model, TOKENS)
    pieces = np.concatenate([found.logits(0, 7), found.logits(7, 60)])
    assert pieces.dtype == np.float32
    np.testing.assert_allclose(pieces, whole, atol=2e-6)


def test_a_forward_leaves_nothing_for_the_next(tiny_checkpoint: Folder) -> None:
    """One model reads two sequences: each as if it were the only one."""
    model = load_model(Checkpoint.open(tiny_checkpoint()), sliding_window=8)
    alone = run_reference(model, TOKENS).logits(0, 60)
    run_reference(model, TOKENS[::-1])
    np.testing.assert_array_equal(run_reference(model, TOKENS).logits(0, 60), alone)


def test_the_window_is_the_artifacts_not_the_checkpoints(tiny_checkpoint: Folder) -> None:
    windowless = read(tiny_checkpoint(sliding_window=None)).logits(0, 60)
    np.testing.assert_array_equal(windowless, read(tiny_checkpoint()).logits(0, 60))


def test_a_half_loaded_reference_is_refused(tiny_checkpoint: Folder, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "holes")
    source = Checkpoint.open(checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.norm.weight"]  # as if transformers looked for it under another name
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValidationError, match=r"did not load model\.norm\.weight"):
        load_model(source, sliding_window=8)


def test_a_reference_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "nan")
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValidationError, match="NaN or infinity"):
        read(checkpoint)


def test_another_checkpoint_is_refused(onnx_folder: Folder, tiny_checkpoint: Folder) -> None:
    manifest = read_manifest(onnx_folder())
    require_same_checkpoint(manifest, Checkpoint.open(tiny_checkpoint()))
    with pytest.raises(ValidationError, match="not the checkpoint this artifact was made from"):
        require_same_checkpoint(manifest, Checkpoint.open(tiny_checkpoint(seed=1)))


def test_a_reference_larger_than_memory_is_refused(
    tiny_checkpoint: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Checkpoint.open(tiny_checkpoint())
    for streaming in (False, True):
        needed = predict_memory(source, 100, streaming=streaming)
        monkeypatch.setattr(memory, "available_memory_bytes", lambda needed=needed: needed.total_bytes)
        require_memory(source, 100, streaming=streaming)
        with pytest.raises(ValidationError, match="GB for 10000 tokens.*use a smaller --length"):
            require_memory(source, 10_000, streaming=streaming)
        monkeypatch.setattr(memory, "available_memory_bytes", lambda needed=needed: needed.weights_bytes - 1)
        with pytest.raises(
            ValidationError, match="a machine with more memory" if streaming else "--streaming"
        ):
            require_memory(source, 1, streaming=streaming)


def seven_billion() -> Checkpoint:
    """Mistral 7B v0.1 as names and shapes."""
    config = ModelConfig.from_huggingface(named_config("mistral-7b-v0.1"))
    weights = {
        name: Weight(name, StoredTensor(name, "bfloat16", shape, Path("none"), 0, 0))
        for name, shape in expected_shapes(config).items()
    }
    return Checkpoint(Path("7b"), "huggingface", config, {}, weights, frozenset())


def test_the_memory_of_seven_billion_parameters() -> None:
    whole, streamed = (predict_memory(seven_billion(), 12_552, streaming=s) for s in (False, True))
    assert whole.weights_bytes > 28e9
    assert streamed.total_bytes < 8e9
    assert whole.work_bytes == streamed.work_bytes


def test_scores_do_not_outgrow_a_block() -> None:
    """Past the first block memory grows with the tokens, not with their square."""
    lengths = [20_000, 40_000, 80_000]
    work = [predict_memory(seven_billion(), length, streaming=True).work_bytes for length in lengths]
    assert work[2] - work[1] < 2.1 * (work[1] - work[0])
    assert queries_at_once(9, 2312) == 2312
    assert queries_at_once(32, 12_552) == 167
    assert queries_at_once(32, 10**9) == 1


def test_transformers_settings_are_left_as_they_were() -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with pytest.raises(KeyError), hugging_face.quiet_transformers():
        assert not transformers_logging.is_progress_bar_enabled()
        raise KeyError
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
