"""Synthetic checkpoints: the hub's layout, the same numbers from the same seed, however they are cut."""

import hashlib
import json
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mistral_trt.artifact import free_disk_bytes
from mistral_trt.cli import main
from mistral_trt.config import ModelConfig, unrecognised_keys
from mistral_trt.errors import ArtifactError, ConfigError, MissingDependencyError
from mistral_trt.export import synth
from mistral_trt.export.checkpoint import Checkpoint, expected_shapes
from mistral_trt.export.synth import ORIGIN, TOKENIZERS, named_config, plan_shards, write_synthetic
from tests.models import TINY

CONFIG = {**TINY.to_json(), "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2}
Written: TypeAlias = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """written(**options) -> a new checkpoint of the tiny configuration."""
    made: list[Path] = []

    def write(config: Mapping[str, Any] = CONFIG, **options: Any) -> Path:
        made.append(tmp_path / f"synthetic-{len(made)}")
        write_synthetic(config, made[-1], **options)
        return made[-1]

    return write


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- the layout


@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000])
@pytest.mark.parametrize("tied", [False, True])
def test_it_opens_as_a_checkpoint(written: Written, max_shard_bytes: int, tied: bool) -> None:
    folder = written({**CONFIG, "tie_word_embeddings": tied}, max_shard_bytes=max_shard_bytes)
    opened = Checkpoint.open(folder)
    shapes = expected_shapes(opened.config)
    assert {name: tuple(tensor.shape) for name, tensor in tensors(folder).items()} == shapes
    assert ("lm_head.weight" in shapes) is not tied


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_transformers_loads_it(written: Written, dtype: str) -> None:
    from transformers import MistralForCausalLM

    folder = written(dtype=dtype, max_shard_bytes=40_000)
    model = MistralForCausalLM.from_pretrained(folder)
    assert str(model.dtype) == f"torch.{synth.PRECISIONS[dtype]}"
    assert equal(model.state_dict(), tensors(folder))
    assert torch.isfinite(model(torch.arange(12)[None]).logits).all()
    assert model.generation_config.eos_token_id == 2


def test_files_are_filled_in_order_and_sorted_by_name(written: Written) -> None:
    folder = written(max_shard_bytes=40_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 3
    sizes = []
    for file in files:
        with safe_open(folder / file, "pt") as opened:
            names = list(opened.offset_keys())
            assert opened.metadata() == {"format": "pt"}
        assert names == sorted(names) == [n for n in index["weight_map"] if index["weight_map"][n] == file]
        sizes.append(sum(t.nbytes for t in load_file(folder / file).values()))
    assert all(size <= 40_000 for size in sizes)
    assert index["metadata"]["total_size"] == sum(sizes)
    assert list(index["weight_map"]) == sorted(expected_shapes(TINY))
    assert index["weight_map"]["model.embed_tokens.weight"] == files[0]
    assert index["weight_map"]["lm_head.weight"] == files[-1]


def test_one_file_needs_no_index(written: Written) -> None:
    folder = written()
    assert set(contents(folder)) == {"config.json", "generation_config.json", "model.safetensors", ORIGIN}
    config = json.loads((folder / "config.json").read_text())
    assert config == {**CONFIG, "torch_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("file", "name"), [("tokenizer.model.v3", "tokenizer.model"), ("tekken_1.json", "tekken.json")]
)
def test_its_origin_lists_every_file(written: Written, tmp_path: Path, file: str, name: str) -> None:
    (tmp_path / file).write_bytes(b"a tokenizer")
    folder = written(max_shard_bytes=40_000, tokenizer=tmp_path / file, source="somebody")
    assert (folder / name).read_bytes() == b"a tokenizer"
    origin = json.loads((folder / ORIGIN).read_text())
    assert origin["source"] == "somebody"
    found = {file: hashlib.sha256(data).hexdigest() for file, data in contents(folder).items()}
    del found[ORIGIN]
    assert origin["files"] == found


HUB_SHARD_BYTES = {
    "mistral-7b-v0.1": [4_943_162_336, 4_999_819_336, 4_540_516_344],
    "mistral-7b-v0.2": [4_943_162_336, 4_999_819_336, 4_540_516_344],
    "mistral-7b-v0.3": [4_949_453_792, 4_999_819_336, 4_546_807_800],
    "mistral-nemo-12b": [4_865_522_496, 4_907_529_424, 4_907_529_456, 4_907_529_456, 4_907_496_272],
}
PARAMETERS = {
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
}


@pytest.mark.parametrize("name", sorted(path.stem for path in synth.CONFIGS.glob("*.json")))
def test_every_configuration_is_the_hubs(name: str) -> None:
    """Its files would be as long as those of the hub, to the byte (v0.1: as the same model in this split)."""
    raw = named_config(name)
    config = ModelConfig.from_huggingface(raw)
    assert unrecognised_keys(raw) == []
    shards = plan_shards(
        raw, dtype="bfloat16", depth=config.num_hidden_layers, max_shard_bytes=synth.MAX_SHARD_BYTES
    )
    draws = [draw for shard in shards.values() for draw in shard]
    assert {draw.name: draw.shape for draw in draws} == expected_shapes(config)
    assert sum(draw.elements for draw in draws) == PARAMETERS[name]
    sizes = [len(synth.header(shard)) + sum(draw.bytes for draw in shard) for shard in shards.values()]
    assert sizes == HUB_SHARD_BYTES[name]
    assert (config.sliding_window, config.rope_theta) == (
        (4096, 1e4) if name.endswith("v0.1") else (None, 1e6)
    )


def test_every_configuration_has_its_tokenizer() -> None:
    assert {path.stem for path in synth.CONFIGS.iterdir()} == set(TOKENIZERS)
    vocabularies = {"tokenizer.model.v1": 32000, "mistral_instruct_tokenizer_240323.model.v3": 32768}
    pytest.importorskip("mistral_common")
    sentencepiece = pytest.importorskip("sentencepiece")
    for name, file in TOKENIZERS.items():
        path = synth.packaged_tokenizer(name)
        if file in vocabularies:
            model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            assert model.vocab_size() == vocabularies[file] == named_config(name)["vocab_size"]
        else:
            config = json.loads(path.read_text())["config"]
            assert config["default_vocab_size"] == named_config(name)["vocab_size"]


# ---------------------------------------------------------------- the numbers


def test_the_same_seed_gives_the_same_bytes(written: Written) -> None:
    first, second, other = written(seed=7), written(seed=7), written(seed=8)
    assert contents(first) == contents(second)
    one, two = tensors(first), tensors(other)
    assert not any(torch.equal(one[name], two[name]) for name in one)


def test_the_bytes_are_those_of_every_other_day(written: Written) -> None:
    """A change here means that figures measured on earlier checkpoints are of other weights."""
    digest = hashlib.sha256((written() / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "1bde0b6b4a719a83e65bdd882190011de813c3f368f897c716e22d0bacaf1787"


def test_a_few_layers_are_the_first_of_all(written: Written) -> None:
    deep = {**CONFIG, "num_hidden_layers": 4}
    whole, first = tensors(written(deep)), tensors(written(deep, layers=2, max_shard_bytes=40_000))
    assert equal(first, {name: whole[name] for name in expected_shapes(TINY)})
    assert set(whole) > set(first)


def test_how_they_are_cut_changes_nothing(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tensors(written())
    monkeypatch.setattr(synth, "_PIECE_ELEMENTS", 1000)
    assert equal(tensors(written(max_shard_bytes=1)), whole)


def test_a_dtype_only_rounds(written: Written) -> None:
    exact = tensors(written(dtype="fp32"))
    for dtype in (torch.bfloat16, torch.float16):
        name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        assert equal(tensors(written(dtype=name)), {k: v.to(dtype) for k, v in exact.items()})


def test_they_have_the_scale_of_a_model_at_its_start(written: Written) -> None:
    found = tensors(written({**CONFIG, "num_hidden_layers": 8, "hidden_size": 256}, layers=1, dtype="fp32"))
    for name, tensor in found.items():
        if name.endswith("norm.weight"):
            assert 0.5 <= tensor.min() < 0.52 and 1.48 < tensor.max() <= 1.5
            continue
        scaled = "o_proj" in name or "down_proj" in name
        std = 0.02 / (2 * 8) ** 0.5 if scaled else 0.02
        assert tensor.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(tensor.mean().item()) < 4 * std / tensor.numel() ** 0.5
        within = (tensor.abs() < std).float().mean().item()
        assert within == pytest.approx(0.6827, abs=0.02)


def test_tensors_are_not_alike() -> None:
    config = ModelConfig.from_huggingface(CONFIG)
    shards = plan_shards(CONFIG, dtype="float32", depth=2, max_shard_bytes=10**9)
    draws = [draw for draw in shards["model.safetensors"] if draw.shape == (config.hidden_size,) * 2]
    rows = np.stack([np.concatenate(list(synth.pieces(d, 0))).view(np.float32) for d in draws])
    alike = np.corrcoef(rows) - np.eye(len(rows))
    assert len(rows) == 4 and abs(alike).max() < 0.1


# ---------------------------------------------------------------- refusals


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**7, 10**7))
    assert free_disk_bytes(tmp_path) == 10**7
    with pytest.raises(ArtifactError, match=r"needs 14\.55 GB of disk, 0\.01 GB are free; free some, choose"):
        write_synthetic(named_config("mistral-7b-v0.1"), tmp_path / "big")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(draw: synth.Draw, seed: int) -> Iterator[synth.Bits]:
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr(synth, "pieces", full)
    with pytest.raises(ArtifactError, match="cannot write .*: .*No space left on device"):
        write_synthetic(CONFIG, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ArtifactError, match=r"is not empty and holds no ORIGIN\.json"):
        write_synthetic(CONFIG, tmp_path)
    assert contents(tmp_path) == {"mine": b"mine"}


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"layers": 0}, "--layers must be at least 1, found 0"),
        ({}, {"layers": -1}, "--layers must be at least 1, found -1"),
        ({}, {"dtype": "int8"}, "dtype must be one of bf16, fp16, fp32, found 'int8'"),
        ({"rope_scaling": {"type": "yarn"}}, {}, "rope_scaling = .* is not supported"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, config: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        write_synthetic({**CONFIG, **config}, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the command


@pytest.fixture
def tiny_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration `tiny` in place of the real ones, with a tokenizer of a few bytes."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tiny.model.v1").write_bytes(b"pieces")
    monkeypatch.setattr(synth, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(synth, "packaged_tokenizer", lambda _: tmp_path / "tiny.model.v1")
    return "tiny"


def test_the_command_prints_the_folder(
    tiny_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--layers", "1", "--dtype", "fp16", "--seed", "3"]
    assert main(["synth", "--config", tiny_name, "--out", str(out), *options]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n" and printed.err.startswith("weights: 0 MB in ")
    opened = Checkpoint.open(out)
    assert opened.config.num_hidden_layers == 1
    assert {str(tensor.dtype) for tensor in tensors(out).values()} == {"torch.float16"}
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
    source = json.loads((out / ORIGIN).read_text())["source"]
    assert source == "mistral-trt synth --config tiny --layers 1 --dtype fp16 --seed 3"
    assert main(["synth", "--config", tiny_name, "--out", str(out), "--quiet"]) == 0
    assert capsys.readouterr() == (f"{out}\n", "")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--config", "mistral-8b"],
            "no configuration is called 'mistral-8b'; known: mistral-7b-v0.1, mistral-7b-v0.2, "
            "mistral-7b-v0.3, mistral-nemo-12b",
        ),
        (
            ["--config", "../configs/mistral-7b-v0.1"],
            "no configuration is called '../configs/mistral-7b-v0.1'",
        ),
        (["--config", "mistral-7b-v0.1", "--layers", "0"], "--layers must be at least 1, found 0"),
    ],
)
def test_a_refusal_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    line: str,
) -> None:
    monkeypatch.setattr(synth, "packaged_tokenizer", lambda _: tmp_path / "none")
    assert main(["synth", *arguments, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"mistral-trt synth: {line}")
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_dtype_that_is_not_known_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["synth", "--config", "mistral-7b-v0.1", "--out", "x", "--dtype", "int8"])
    assert "invalid choice: 'int8'" in capsys.readouterr().err


def test_without_mistral_common_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "mistral_common", None)
    assert main(["synth", "--config", "mistral-7b-v0.1", "--out", str(tmp_path / "out")]) == 2
    assert "run: pip install 'mistral-trt[synth]'" in capsys.readouterr().err


def test_a_mistral_common_without_the_file_is_to_be_upgraded(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mistral_common")
    monkeypatch.setitem(TOKENIZERS, "mistral-7b-v0.1", "tokenizer.model.v99")
    with pytest.raises(
        MissingDependencyError, match=r"has no tokenizer\.model\.v99; run: pip install --upgr"
    ):
        synth.packaged_tokenizer("mistral-7b-v0.1")
