"""Mistral's own checkpoint layout: the same model as Hugging Face's under other names, in another order."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral_trt.errors import CheckpointError, ConfigError
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.conversion import pieces
from mistral_trt.export.mistral_format import config_from_params
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.manifest import read_manifest
from tests.checkpoints import SINGLE, mistral_format
from tests.conftest import Folder
from tests.graphs import weights_of

ONE = "consolidated.safetensors"


@pytest.fixture
def source(tiny_checkpoint: Folder) -> Path:
    return tiny_checkpoint(num_hidden_layers=1)


def split(folder: Path, *, index: bool = False, parts: int = 2) -> Path:
    """The same folder with its weights in several files."""
    tensors = load_file(folder / ONE)
    (folder / ONE).unlink()
    weight_map: dict[str, str] = {}
    for i in range(parts):
        name = f"consolidated-{i + 1:05}-of-{parts:05}.safetensors"
        names = sorted(tensors)[i::parts]
        save_file({key: tensors[key] for key in names}, folder / name)
        weight_map |= dict.fromkeys(names, name)
    if index:
        (folder / f"{ONE}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def numbers(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: torch.cat(list(pieces(weight))) for name, weight in checkpoint.weights.items()}


# ---------------------------------------------------------------- the same model


def same_model(first: Checkpoint, second: Checkpoint) -> None:
    assert first.config == second.config
    ours, theirs = numbers(first), numbers(second)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name].reshape(tensor.shape), tensor), name


@pytest.mark.parametrize("form", ["one file", "several", "several with an index"])
@pytest.mark.parametrize(
    "config", [{}, {"head_dim": 32}, {"sliding_window": None, "rope_theta": 1e6}], ids=str
)
def test_it_is_the_model_that_it_was_made_from(
    tiny_checkpoint: Folder, tmp_path: Path, form: str, config: dict[str, object]
) -> None:
    origin = tiny_checkpoint(num_hidden_layers=1, **config)
    folder = mistral_format(origin, tmp_path / "m")
    if form != "one file":
        split(folder, index="index" in form)
    opened = Checkpoint.open(folder)
    assert opened.format == "mistral"
    same_model(opened, Checkpoint.open(origin))
    with pytest.raises(AssertionError):
        same_model(opened, Checkpoint.open(tiny_checkpoint(num_hidden_layers=1, seed=1, **config)))


def test_rows_left_in_mistrals_order_are_another_model(source: Path, tmp_path: Path) -> None:
    folder = mistral_format(source, tmp_path / "m")
    names = {"attention.wq": "q_proj", "attention.wk": "k_proj", "attention.wv": "v_proj"}
    stored, theirs = load_file(folder / ONE), load_file(source / SINGLE)
    equal = {
        own: torch.equal(stored[f"layers.0.{own}.weight"], theirs[f"model.layers.0.self_attn.{name}.weight"])
        for own, name in names.items()
    }
    assert equal == {"attention.wq": False, "attention.wk": False, "attention.wv": True}


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_both_forms_export_to_the_same_weights(source: Path, tmp_path: Path, precision: str) -> None:
    folder = mistral_format(source, tmp_path / "m")
    for name, origin in (("a", source), ("b", folder)):
        export_checkpoint(origin, tmp_path / name, precision=precision)
    first, second = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    manifest = read_manifest(tmp_path / "b")
    assert manifest.contract == read_manifest(tmp_path / "a").contract
    assert manifest.details["format"] == "mistral"
    assert manifest.details["graph_sha256"] == read_manifest(tmp_path / "a").details["graph_sha256"]


@pytest.mark.usefixtures("untraced")
def test_only_rows_that_change_their_order_are_rewritten(source: Path, tmp_path: Path) -> None:
    folder = mistral_format(source, tmp_path / "m")
    manifest = export_checkpoint(folder, tmp_path / "out", precision="fp32", link=True)
    assert manifest.details["linked"] == [ONE]
    assert (tmp_path / "out" / ONE).samefile(folder / ONE)
    rotated = (64 * 64 + 32 * 64) * 4
    assert manifest.files["model.onnx.data"].bytes == rotated


def test_where_both_forms_lie_together_hugging_faces_is_read(source: Path, tmp_path: Path) -> None:
    folder = mistral_format(source, tmp_path / "m")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    assert Checkpoint.open(folder).format == "huggingface"
    (folder / SINGLE).unlink()
    assert Checkpoint.open(folder).format == "mistral", "config.json alone holds no weights"


# ---------------------------------------------------------------- params.json


PARAMS = {
    "dim": 64,
    "n_layers": 1,
    "head_dim": 16,
    "hidden_dim": 96,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 97,
}


@pytest.mark.parametrize(
    ("params", "theta"),
    [
        ({"sliding_window": 4096}, 1e4),
        ({}, 1e6),
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": 5e5, "sliding_window": 8}, 5e5),
        ({"rope_theta": None, "sliding_window": 8}, 1e4),
    ],
)
def test_a_missing_rope_theta_follows_the_window(
    params: dict[str, object], theta: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mistral_trt"):
        found = config_from_params({**PARAMS, **params})
    assert found["rope_theta"] == theta
    assert bool(caplog.messages) == (params.get("rope_theta") is None)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"dim": ...}, "params.json: 'dim' is missing"),
        ({"moe": {"num_experts": 8}}, "moe = {'num_experts': 8} is not supported"),
        ({"vision_encoder": {"hidden_size": 1}}, "vision_encoder = "),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantization = "),
        ({"yarn": {"factor": 4}}, "yarn = "),
        ({"lora": {"rank": 4}}, "lora = "),
        ({"model_type": "mamba"}, "model_type must be 'transformer', found 'mamba'"),
        ({"causal": False}, "causal = False is not supported"),
        ({"invented": 1}, "invented = 1 is not supported"),
    ],
)
def test_what_is_not_a_plain_decoder_is_refused(params: dict[str, object], words: str) -> None:
    given = {key: value for key, value in {**PARAMS, **params}.items() if value is not ...}
    with pytest.raises(ConfigError) as caught:
        config_from_params(given)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_says_nothing_is_passed_over() -> None:
    assert config_from_params({**PARAMS, "moe": None, "use_biases": False, "max_batch_size": 0})


# ---------------------------------------------------------------- broken folders


def without_params(folder: Path) -> None:
    (folder / "params.json").unlink()


def params_not_json(folder: Path) -> None:
    (folder / "params.json").write_text("{")


def pickled(folder: Path) -> None:
    (folder / ONE).rename(folder / "consolidated.00.pth")


def no_weights(folder: Path) -> None:
    (folder / ONE).unlink()


def part_missing(folder: Path) -> None:
    split(folder, parts=3)
    (folder / "consolidated-00002-of-00003.safetensors").unlink()


def twice(folder: Path) -> None:
    split(folder)
    shutil.copyfile(
        folder / "consolidated-00001-of-00002.safetensors", folder / "consolidated-extra.safetensors"
    )


def stranger(folder: Path) -> None:
    save_file({**load_file(folder / ONE), "vision_encoder.weight": torch.ones(1)}, folder / ONE)


def tensor_missing(folder: Path) -> None:
    tensors = load_file(folder / ONE)
    tensors.pop("layers.0.attention.wo.weight")
    save_file(tensors, folder / ONE)


def misshapen(folder: Path) -> None:
    tensors = load_file(folder / ONE)
    save_file({**tensors, "layers.0.attention.wq.weight": torch.ones(63, 64)}, folder / ONE)


def index_leaves(folder: Path) -> None:
    split(folder, index=True)
    path = folder / f"{ONE}.index.json"
    path.write_text(json.dumps({"weight_map": {"norm.weight": "../consolidated.safetensors"}}))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no params.json": (without_params, "config.json is missing"),
    "params.json not JSON": (params_not_json, "params.json cannot be read as JSON"),
    "pickled": (pickled, "holds pickled weights, which can run code; convert them with: python -c"),
    "no weights": (no_weights, "has params.json but no consolidated.safetensors"),
    "a part is missing": (part_missing, "consolidated-00002-of-00003.safetensors is missing; consolidated-0"),
    "a tensor twice": (twice, "both hold "),
    "a tensor of another model": (stranger, "holds 'vision_encoder.weight', for which"),
    "a tensor is missing": (tensor_missing, "lacks model.layers.0.self_attn.o_proj.weight"),
    "misshapen": (misshapen, "q_proj.weight: config.json calls for shape [64, 64], found [63, 64]"),
    "the index leaves the folder": (index_leaves, "'../consolidated.safetensors' is not a plain name"),
}


@pytest.mark.parametrize(("breakage", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_refused_in_one_line(
    source: Path, tmp_path: Path, breakage: Callable[[Path], None], words: str
) -> None:
    folder = mistral_format(source, tmp_path / "m")
    breakage(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value)
