"""Adapters through the whole pipeline: merged as the weights stream by, and proven against peft."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MistralForCausalLM

from mistral_trt.cli import main
from mistral_trt.errors import ValidationError
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.manifest import read_manifest
from mistral_trt.runtime import Engine
from mistral_trt.validate.comparison import validate_artifact
from mistral_trt.validate.job import Job
from tests.checkpoints import SINGLE, mistral_format
from tests.conftest import Folder
from tests.graphs import weights_of
from tests.models import write_tokenizer
from tests.test_lora import merge_by_peft, train

pytestmark = pytest.mark.usefixtures("one_trace")

LAYER: dict[str, object] = {"num_hidden_layers": 1}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN_PROJ = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Folder) -> Path:
    return tiny_checkpoint(**LAYER)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters of the same model, on other modules."""
    root = tmp_path_factory.mktemp("adapters")
    for name, targets, seed in (("one", ["q_proj", "k_proj"], 1), ("two", ["q_proj", "down_proj"], 2)):
        train(load(base), root / name, seed=seed, r=4, lora_alpha=8, target_modules=targets)
    return root / "one", root / "two"


def load(checkpoint: Path) -> MistralForCausalLM:
    return MistralForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.mark.usefixtures("untraced")
def test_merged_weights_are_pefts_to_float32_rounding(
    base: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    loras = [(adapters[0], 1.0), (adapters[1], 0.5)]
    manifest = export_checkpoint(base, tmp_path / "out", precision="fp32", loras=loras)
    expected = merge_by_peft(load(base), loras)
    for name, bits in weights_of(tmp_path / "out").items():
        torch.testing.assert_close(bits.view(torch.float32), expected[name], rtol=0, atol=1e-6)
    unscaled = merge_by_peft(load(base), [(adapters[0], 1.0), (adapters[1], 1.0)])
    assert (unscaled[DOWN_PROJ] - expected[DOWN_PROJ]).abs().max() > 1e-3, "the scale shows"
    assert [(a["name"], a["scale"]) for a in manifest.details["lora"]] == [("one", 1.0), ("two", 0.5)]
    assert manifest.details["name"] == "tiny+one+two"
    assert set(manifest.sources) == {"checkpoint", "lora"}


@pytest.mark.usefixtures("untraced")
def test_only_touched_weights_are_written(
    tiny_checkpoint: Folder, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    base = tiny_checkpoint(**LAYER, dtype="bfloat16")
    manifest = export_checkpoint(base, tmp_path / "out", precision="bf16", loras=[(adapters[0], 1.0)])
    assert manifest.details["linked"] == [SINGLE]
    assert manifest.files["model.onnx.data"].bytes == 2 * (64 * 64 + 32 * 64)
    found, original = weights_of(tmp_path / "out"), load_file(base / SINGLE)
    changed = {
        name for name, tensor in original.items() if not torch.equal(tensor.view(torch.int16), found[name])
    }
    assert changed == {Q_PROJ, Q_PROJ.replace("q_proj", "k_proj")}


@pytest.mark.usefixtures("untraced")
def test_order_scale_and_adapter_are_part_of_the_identity(
    base: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    one, two = adapters
    wishes = [
        [],
        [(one, 1.0)],
        [(one, 0.5)],
        [(two, 1.0)],
        [(one, 1.0), (two, 1.0)],
        [(two, 1.0), (one, 1.0)],
    ]
    found = []
    for i, loras in enumerate(wishes):
        sources = export_checkpoint(base, tmp_path / str(i), precision="fp32", loras=loras).sources
        found.append((sources["checkpoint"], sources.get("lora")))
    assert len(set(found)) == len(wishes)
    assert len({checkpoint for checkpoint, _ in found}) == 1


def test_both_forms_of_a_base_take_an_adapter_alike(
    base: Path, adapters: tuple[Path, Path], tmp_path: Path, untraced: None
) -> None:
    other = mistral_format(base, tmp_path / "mistral")
    for name, checkpoint in (("a", base), ("b", other)):
        export_checkpoint(checkpoint, tmp_path / name, precision="fp16", loras=[(adapters[0], 1.0)])
    first, second = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("form", ["huggingface", pytest.param("mistral", marks=pytest.mark.slow)])
def test_a_validation_merges_by_peft_and_passes(
    base: Path, adapters: tuple[Path, Path], tmp_path: Path, form: str
) -> None:
    source = base if form == "huggingface" else mistral_format(base, tmp_path / "source")
    loras = [(adapters[0], 1.0), (adapters[1], -0.5)]
    onnx = tmp_path / "onnx"
    export_checkpoint(source, onnx, precision="fp32", prefill_chunk=4, loras=loras)
    job = Job(onnx, reference=source, out=tmp_path / "report", loras=tuple(loras), length=100)
    report = validate_artifact(job)
    assert report.passed, report.verdict
    assert "adapters merged by peft" in report.reference["implementation"]
    assert f"--lora {adapters[1]}:-0.5" in report.run["command"]
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [adapter["name"] for adapter in data["artifact"]["lora"]] == ["one", "two"]
    with pytest.raises(
        ValidationError, match="was made with one at scale 1, two at scale -0.5; pass the same"
    ):
        validate_artifact(Job(onnx, reference=source, out=tmp_path / "x"))
    with pytest.raises(ValidationError, match="pass the same, in the same order"):
        validate_artifact(Job(onnx, reference=source, out=tmp_path / "x", loras=tuple(loras[::-1])))
    plain = tmp_path / "plain"
    export_checkpoint(source, plain, precision="fp32", prefill_chunk=4)
    with pytest.raises(ValidationError, match="made with no adapter; leave --lora out"):
        validate_artifact(Job(plain, reference=source, out=tmp_path / "x", loras=tuple(loras)))


@pytest.mark.slow
def test_an_adapter_with_added_tokens_brings_them(tmp_path: Path, tiny_checkpoint: Folder) -> None:
    """A fine-tune with three new tokens: resized embeddings, its own tokenizer."""
    base = write_tokenizer(shutil.copytree(tiny_checkpoint(**LAYER, vocab_size=259), tmp_path / "base"))
    model = load(base)
    model.resize_token_embeddings(262, mean_resizing=False)
    lora = tmp_path / "chatty"
    train(model, lora, r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    template = tokenizer["added_tokens"][0]
    for i, word in enumerate(["<|user|>", "<|assistant|>", "<|end|>"]):
        tokenizer["added_tokens"].append({**template, "id": 259 + i, "content": word})
    (lora / "tokenizer.json").write_text(json.dumps(tokenizer))
    onnx, loras = tmp_path / "onnx", [(lora, 1.0)]
    manifest = export_checkpoint(base, onnx, precision="fp32", prefill_chunk=4, loras=loras)
    assert manifest.config.vocab_size == 262
    assert Engine.load(onnx).tokenizer.encode("a<|end|>", special_tokens=True)[-1] == 261
    job = Job(onnx, reference=base, out=tmp_path / "report", loras=tuple(loras), length=100)
    assert validate_artifact(job).passed


def test_the_command_line_takes_adapters(
    base: Path,
    adapters: tuple[Path, Path],
    tmp_path: Path,
    untraced: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = ["--lora", f"{adapters[0]}:0.25", "--lora", str(adapters[1])]
    assert main(["export", str(base), "--out", str(out), *arguments, "--quiet"]) == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    assert [(a["name"], a["scale"]) for a in read_manifest(out).details["lora"]] == [
        ("one", 0.25),
        ("two", 1.0),
    ]
    assert main(["identify", str(base), *arguments]) == 0
    first = capsys.readouterr().out
    assert first.startswith("tiny+one+two-")
    assert main(["identify", str(base), "--lora", str(adapters[0])]) == 0
    assert capsys.readouterr().out[-9:] != first[-9:]
    assert main(["export", str(base), "--out", str(tmp_path / "x"), "--lora", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_quiet_says_warnings_only(
    base: Path, tmp_path: Path, untraced: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(base), "--out", str(tmp_path / "a")]) == 0
    assert "weights: " in capsys.readouterr().err
    assert logging.getLogger("mistral_trt").level == logging.INFO
