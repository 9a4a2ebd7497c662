"""Checkpoint folder → ONNX folder: every weight in its place, the same bytes each time, all or nothing.

Most of these tests are about files and weights, so they export with a graph of initializers alone.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file

from mistral_trt.contract import plan_contract
from mistral_trt.errors import ConfigError
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.graph import graph_sha256
from mistral_trt.export.onnx_folder import describe, export_checkpoint, generation_ids
from mistral_trt.export.tokenizer_files import TextFiles
from mistral_trt.manifest import read_manifest
from tests.checkpoints import SINGLE, altered, hub_cache, sharded
from tests.conftest import Folder
from tests.graphs import DTYPES, check_weights, files_of, weights_of
from tests.models import write_tokenizer

ONE_LAYER: dict[str, Any] = {"precision": "fp16", "num_hidden_layers": 1}
NORM = "model.norm.weight"


@pytest.fixture
def source(tiny_checkpoint: Folder) -> Path:
    return tiny_checkpoint(num_hidden_layers=1)


# ---------------------------------------------------------------- what is exported


@pytest.mark.parametrize(
    ("exported", "checkpoint"),
    [
        ({}, {}),
        (ONE_LAYER, {"num_hidden_layers": 1}),
        pytest.param(
            {"precision": "bf16", "num_hidden_layers": 1, "tie_word_embeddings": True, "head_dim": 32},
            {"num_hidden_layers": 1, "tie_word_embeddings": True, "head_dim": 32},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["fp32", "fp16", "bf16, tied, head_dim 32"],
)
def test_every_weight_is_the_checkpoints(
    onnx_folder: Folder, tiny_checkpoint: Folder, exported: dict[str, Any], checkpoint: dict[str, Any]
) -> None:
    folder, original = onnx_folder(**exported), tiny_checkpoint(**checkpoint)
    check_weights(folder, original, exported.get("precision", "fp32"))
    with pytest.raises(AssertionError):
        check_weights(folder, tiny_checkpoint(seed=1, **checkpoint), exported.get("precision", "fp32"))


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("precision", DTYPES)
def test_a_checkpoint_of_mixed_dtypes_is_converted_tensor_by_tensor(
    source: Path, tmp_path: Path, precision: str
) -> None:
    dtypes = list(DTYPES.values())
    weights = load_file(source / SINGLE)
    mixed = {name: weights[name].to(dtypes[i % 3]) for i, name in enumerate(sorted(weights))}
    folder = altered(source, tmp_path / "mixed", tensors=mixed)
    assert {w.stored.dtype for w in Checkpoint.open(folder).weights.values()} == {
        "float32",
        "float16",
        "bfloat16",
    }
    export_checkpoint(folder, tmp_path / "out", precision=precision)
    check_weights(tmp_path / "out", folder, precision)


def test_an_explicit_head_dim_shapes_the_projections(onnx_folder: Folder) -> None:
    folder = onnx_folder(precision="bf16", num_hidden_layers=1, tie_word_embeddings=True, head_dim=32)
    config = read_manifest(folder).config
    assert config.head_dim == 32 != config.hidden_size // config.num_attention_heads
    assert weights_of(folder)["model.layers.0.self_attn.q_proj.weight"].shape == (4 * 32, 64)
    assert weights_of(folder)["model.layers.0.self_attn.o_proj.weight"].shape == (64, 4 * 32)


def test_the_manifest_tells_what_is_in_the_folder(onnx_folder: Folder, tiny_checkpoint: Folder) -> None:
    folder, checkpoint = onnx_folder(), Checkpoint.open(tiny_checkpoint())
    manifest = read_manifest(folder, "onnx")
    data = {"model.onnx", "model.onnx.data"}
    assert set(manifest.files) == data == set(files_of(folder)) - {"manifest.json"}
    assert manifest.sources == checkpoint.sources()
    assert manifest.contract == plan_contract(checkpoint.config, precision="fp32", prefill_chunk=4)
    assert {"torch", "onnx", "onnx-ir", "onnxscript", "python", "mistral-trt"} <= set(manifest.versions)
    details = manifest.details
    assert details["name"] == "tiny"
    assert details["weights"] == list(checkpoint.weights)
    assert details["weights_bytes"] == sum(4 * t.elements for t in checkpoint.weights.values())
    assert details["text_files"] == []
    assert details["generation"] == {"bos_token_id": 1, "bos_token_ids": [1], "eos_token_ids": [2]}
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert details["graph_sha256"] == graph_sha256(model)


@pytest.mark.usefixtures("untraced")
def test_the_manifest_counts_what_float16_cannot_hold_well(source: Path, tmp_path: Path) -> None:
    weight = torch.ones(64)
    weight[:5] = torch.tensor([1e-5, -1e-6, 1e-9, 0.0, -1e-10])
    folder = altered(source, tmp_path / "small", tensors={NORM: weight})
    before = export_checkpoint(source, tmp_path / "a", precision="fp16").details["hazards"]
    after = export_checkpoint(folder, tmp_path / "b", precision="fp16").details["hazards"]
    found = {key: after[key] - before[key] for key in ("subnormal", "flushed_to_zero", "overflow")}
    assert found == {"subnormal": 2, "flushed_to_zero": 2, "overflow": 0}
    assert export_checkpoint(folder, tmp_path / "c", precision="fp32").details["hazards"]["worst"] is None


@pytest.mark.usefixtures("untraced")
def test_tokenizer_files_travel_with_it(source: Path, tmp_path: Path) -> None:
    copy = write_tokenizer(shutil.copytree(source, tmp_path / "copy"))
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    manifest = export_checkpoint(copy, tmp_path / "out")
    assert manifest.details["text_files"] == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (copy / name).read_bytes()
    assert set(names) < set(manifest.files)


# ---------------------------------------------------------------- the same bytes


def test_two_exports_of_one_checkpoint_are_identical(
    onnx_folder: Folder, source: Path, tmp_path: Path
) -> None:
    """Traced by themselves: `onnx_folder` takes the trace of `built_graph`."""
    export_checkpoint(source, tmp_path / "again", precision="fp16", prefill_chunk=4)
    assert files_of(tmp_path / "again") == files_of(onnx_folder(**ONE_LAYER))


def test_another_fine_tune_has_the_same_graph_and_other_weights(
    onnx_folder: Folder,
) -> None:
    first, manifest = (read_manifest(onnx_folder(**seed, **ONE_LAYER)) for seed in ({}, {"seed": 1}))
    assert manifest.details["graph_sha256"] == first.details["graph_sha256"]
    assert manifest.files["model.onnx.data"] != first.files["model.onnx.data"]
    assert manifest.sources != first.sources


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("layout", ["sharded", "hub cache"])
def test_every_layout_of_a_checkpoint_gives_the_same_data(source: Path, tmp_path: Path, layout: str) -> None:
    if layout == "sharded":
        other, name = sharded(source, tmp_path / "split", 3), "split"
    else:
        other, name = hub_cache(source, tmp_path / "hub", "org/Model-7B"), "Model-7B"
    first = export_checkpoint(source, tmp_path / "a")
    second = export_checkpoint(other, tmp_path / "b")
    for file in ("model.onnx", "model.onnx.data"):
        assert first.files[file] == second.files[file]
        assert not (tmp_path / "b" / file).is_symlink()
    assert (first.details["name"], second.details["name"]) == ("tiny", name)


@pytest.mark.usefixtures("untraced")
def test_rope_theta_may_stand_at_the_top_or_in_rope_parameters(source: Path, tmp_path: Path) -> None:
    top = altered(source, tmp_path / "top", config={"rope_theta": 5e5}, without=("rope_parameters",))
    nested = altered(source, tmp_path / "nested", config={"rope_parameters": {"rope_theta": 5e5}})
    first, second = (export_checkpoint(f, tmp_path / f"{f.name}-onnx") for f in (top, nested))
    assert first.contract == second.contract
    assert first.config.rope_theta == 5e5
    both = altered(nested, tmp_path / "both", config={"rope_theta": 1e4})
    with pytest.raises(ConfigError, match="rope_theta is 10000.0 at the top and 500000.0 in rope_parameters"):
        export_checkpoint(both, tmp_path / "x")


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("positions", "max_context", "expected"), [(4096, None, 4096), (32768, None, 8192), (32768, 300, 300)]
)
def test_a_model_without_a_window_ends_somewhere(
    source: Path, tmp_path: Path, positions: int, max_context: int | None, expected: int
) -> None:
    config = {"sliding_window": None, "max_position_embeddings": positions}
    folder = altered(source, tmp_path / "full", config=config)
    contract = export_checkpoint(folder, tmp_path / "out", max_context=max_context).contract
    assert (contract.max_context, contract.ring.sliding_window, contract.wraps) == (expected, expected, False)
    assert contract.config.sliding_window is None


# ---------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({}, {}, "window of 8 tokens, chunks of 4; fp16: ring of 12 slots, 0.0 MB a"),
        ({}, {"sliding_window": 5}, "window of 5 tokens (overridden), chunks of 4; fp16: ring of 8 slots"),
        ({"sliding_window": None}, {}, "no sliding window: sequences end at 4096 tokens, the ring never"),
        ({}, {"max_context": 6}, "max_context within the window: sequences end at 6 tokens, the ring"),
    ],
)  # fmt: skip
def test_the_ring_is_described_in_one_line(
    source: Path, tmp_path: Path, config: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    model = Checkpoint.open(altered(source, tmp_path / "x", config=config)).config
    text = describe(plan_contract(model, precision="fp16", prefill_chunk=4, **options))
    assert text.startswith(words)
    assert "\n" not in text


@pytest.mark.usefixtures("untraced")
def test_an_export_says_what_the_ring_will_be(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mistral_trt"):
        export_checkpoint(source, tmp_path / "out")
    assert any("ring of 512 slots" in message for message in caplog.messages)
    assert any(message.startswith("weights: ") for message in caplog.messages)


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "expected"),
    [
        ({"eos_token_id": 2, "bos_token_id": 1}, None, (None, ()), ([1], [2])),
        ({"eos_token_id": [2, 7], "bos_token_id": None}, None, (None, ()), ([], [2, 7])),
        ({"eos_token_id": 2}, {"eos_token_id": [9, 2], "bos_token_id": 5}, (None, ()), ([5, 1], [2, 9])),
        ({"eos_token_id": 0, "bos_token_id": 0}, {}, (None, ()), ([0], [0])),
        ({"eos_token_id": None, "bos_token_id": 3}, {"eos_token_id": None}, (None, ()), ([3], [])),
        ({"eos_token_id": 2, "bos_token_id": 3}, {"bos_token_id": None}, (4, (6,)), ([3, 4], [2, 6])),
        ({"eos_token_id": None, "bos_token_id": None}, None, (4, (6,)), ([4], [6])),
    ],
)
def test_ids_that_start_and_end_a_text_are_the_union_of_what_all_files_name(
    source: Path,
    tmp_path: Path,
    config: dict[str, Any],
    generation: Any,
    tokenizer: tuple[int | None, tuple[int, ...]],
    expected: tuple[list[int], list[int]],
) -> None:
    folder = altered(source, tmp_path / "x", config=config)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    found = generation_ids(Checkpoint.open(folder), TextFiles({}, (), *tokenizer))
    starts, ends = expected
    assert found["bos_token_id"] == next(iter(starts), None), "generation_config first, then config"
    assert (found["bos_token_ids"], found["eos_token_ids"]) == (sorted(starts), ends)


@pytest.mark.parametrize("value", ["2", 2.0, True, -1, [2, "3"], {"id": 2}], ids=repr)
@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id"])
def test_what_is_no_token_id_is_refused(source: Path, tmp_path: Path, key: str, value: Any) -> None:
    folder = altered(source, tmp_path / "x")
    (folder / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(ConfigError, match=f"{key} must be a token id or a list of them, found "):
        export_checkpoint(folder, tmp_path / "out")
