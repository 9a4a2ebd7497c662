"""Checkpoint folders: whole ones in every layout are read alike, broken ones are refused in one line."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral_trt.errors import CheckpointError, ConfigError, MistralTrtError
from mistral_trt.export.checkpoint import Checkpoint, expected_shapes, require_folder
from tests.checkpoints import INDEX, SINGLE, altered, forged, hub_cache, sharded, stored
from tests.conftest import Folder

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

Make = Callable[[Path, Path], Path]


@pytest.fixture
def source(tiny_checkpoint: Folder) -> Path:
    return tiny_checkpoint(num_hidden_layers=1)


def contents(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The raw bytes of every tensor, in order."""
    found = {}
    for name, weight in checkpoint.weights.items():
        with weight.stored.path.open("rb") as file:
            file.seek(weight.stored.offset)
            found[name] = file.read(weight.stored.bytes)
    return found


# ---------------------------------------------------------------- whole checkpoints


def test_it_finds_every_weight_of_the_model_and_its_bytes(source: Path) -> None:
    checkpoint = Checkpoint.open(source)
    weights = load_file(source / SINGLE)
    assert checkpoint.config.num_hidden_layers == 1
    assert list(checkpoint.weights) == list(expected_shapes(checkpoint.config))
    assert contents(checkpoint) == {
        name: weights[name].view(torch.uint8).numpy().tobytes() for name in checkpoint.weights
    }


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_hold_the_same_as_one_file(source: Path, tmp_path: Path, shards: int) -> None:
    split = Checkpoint.open(sharded(source, tmp_path / "split", shards))
    assert len({weight.stored.path for weight in split.weights.values()}) == shards
    assert contents(split) == contents(Checkpoint.open(source))


def test_a_single_file_goes_before_an_index_as_in_transformers(source: Path, tmp_path: Path) -> None:
    both = sharded(source, tmp_path / "both")
    shutil.copyfile(source / SINGLE, both / SINGLE)
    assert {weight.stored.path.name for weight in Checkpoint.open(both).weights.values()} == {SINGLE}


def test_a_hub_cache_of_links_is_read_and_named_after_its_repository(source: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(source, tmp_path)
    assert all(path.is_symlink() for path in snapshot.iterdir())
    checkpoint = Checkpoint.open(snapshot)
    assert checkpoint.name == "Some-Model-7B"
    assert checkpoint.sources() == Checkpoint.open(source).sources()
    assert contents(checkpoint) == contents(Checkpoint.open(source))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny", "tiny"),
        ("My Model (v2)", "My-Model-v2"),
        ("模型", "model"),
        ("...", "model"),
        ("a.b_c-d", "a.b_c-d"),
    ],
)
def test_names_are_fit_for_a_path(source: Path, tmp_path: Path, name: str, expected: str) -> None:
    assert Checkpoint.open(shutil.copytree(source, tmp_path / name)).name == expected


def test_a_relative_path_has_a_name_too(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source)
    assert Checkpoint.open(Path()).name == "tiny"


def test_tied_weights_may_be_stored_once_or_twice_alike(tiny_checkpoint: Folder, tmp_path: Path) -> None:
    tied = tiny_checkpoint(num_hidden_layers=1, tie_word_embeddings=True)
    assert HEAD not in load_file(tied / SINGLE)
    twice = altered(tied, tmp_path / "twice", tensors={HEAD: load_file(tied / SINGLE)[EMBEDDING]})
    assert HEAD in load_file(twice / SINGLE)
    assert contents(Checkpoint.open(tied)) == contents(Checkpoint.open(twice))


def test_the_rotary_tables_of_old_checkpoints_are_passed_over(source: Path, tmp_path: Path) -> None:
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    old = Checkpoint.open(altered(source, tmp_path / "old", tensors=table))
    assert list(old.weights) == list(Checkpoint.open(source).weights)


def test_an_unknown_key_is_noted_and_does_not_stop(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = altered(source, tmp_path / "x", config={"mystery": 7})
    with caplog.at_level(logging.INFO, "mistral_trt"):
        Checkpoint.open(folder)
    assert caplog.messages == ["config.json: mystery = 7 is not known here and has no effect on the graph"]


# ---------------------------------------------------------------- identity


def set_config(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "rope_theta": 10000.0}))


def set_weight(folder: Path) -> None:
    weights = load_file(folder / SINGLE)
    weights[NORM][0] += 1
    save_file(weights, folder / SINGLE, {"format": "pt"})


CHANGES: dict[str, Callable[[Path], object]] = {
    "config": set_config,
    "weight": set_weight,
    "generation_config": lambda f: (f / "generation_config.json").write_text('{"eos_token_id": 3}'),
    "tokenizer": lambda f: (f / "tokenizer.json").write_text("{}"),
    "tokenizer_config": lambda f: (f / "tokenizer_config.json").write_text("{}"),
    "chat_template": lambda f: (f / "chat_template.jinja").write_text("{{ x }}"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_hash_follows_every_file_that_can_change_an_export(
    source: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    before = Checkpoint.open(copy).sources()
    assert before == Checkpoint.open(source).sources(), "a copy is the same checkpoint"
    (copy / "README.md").write_text("read by nobody")
    assert Checkpoint.open(copy).sources() == before
    change(copy)
    assert Checkpoint.open(copy).sources() != before


# ---------------------------------------------------------------- folders that are none


def test_a_hub_id_is_answered_with_the_command_that_downloads_it() -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(Path("mistralai/Mistral-7B-v0.1"))
    assert "is not a folder here; if it is a hub ID, download it with: hf download" in str(caught.value)
    assert (
        "hf download mistralai/Mistral-7B-v0.1 --local-dir models/Mistral-7B-v0.1 "
        "--exclude '*.bin' 'consolidated*'   and pass models/Mistral-7B-v0.1"
    ) in str(caught.value)


def test_a_hub_caches_root_is_answered_with_its_snapshots(tmp_path: Path) -> None:
    (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="is a hub cache; pass one of the folders in .*snapshots"):
        Checkpoint.open(tmp_path / "models--a--b")


def test_a_file_is_no_checkpoint_folder(source: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file; expected a checkpoint folder with config.json"):
        require_folder(source / SINGLE)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "nowhere", "a/b/c"])
def test_a_path_that_does_not_exist(path: str) -> None:
    with pytest.raises(CheckpointError, match=f"{path} does not exist; expected a checkpoint folder"):
        require_folder(Path(path))


# ---------------------------------------------------------------- broken checkpoints


def edit_index(**weight_map: object) -> Make:
    """A sharded copy whose index has entries replaced, or dropped where None."""

    def make(source: Path, out: Path) -> Path:
        sharded(source, out)
        index = json.loads((out / INDEX).read_text())
        index["weight_map"] |= weight_map
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v is not None}
        (out / INDEX).write_text(json.dumps(index))
        return out

    return make


def with_file(name: str, content: bytes) -> Make:
    def make(source: Path, out: Path) -> Path:
        shutil.copytree(source, out)
        (out / name).write_bytes(content)
        return out

    return make


def without_file(name: str) -> Make:
    def make(source: Path, out: Path) -> Path:
        shutil.copytree(source, out)
        (out / name).unlink()
        return out

    return make


def with_tensors(**tensors: torch.Tensor) -> Make:
    return lambda source, out: altered(source, out, tensors=tensors)


def without(*names: str) -> Make:
    return lambda source, out: altered(source, out, without=names)


def with_config(**config: object) -> Make:
    return lambda source, out: altered(source, out, config=config)


def pickled(source: Path, out: Path) -> Path:
    without_file(SINGLE)(source, out)
    (out / "pytorch_model.bin").write_bytes(b"\x80\x04")
    return out


def cut(source: Path, out: Path) -> Path:
    shutil.copytree(source, out)
    os.truncate(out / SINGLE, (out / SINGLE).stat().st_size - 1)
    return out


def lying(source: Path, out: Path) -> Path:
    shutil.copytree(source, out)
    forged(out / SINGLE, {EMBEDDING: stored([97, 64], 0, 97 * 64 * 4)}, b"", length=2**40)
    return out


def quantized(source: Path, out: Path) -> Path:
    codes = torch.zeros(64, 64, dtype=torch.int8)
    return altered(source, out, tensors={Q_PROJ: codes})


def without_shard(source: Path, out: Path) -> Path:
    sharded(source, out)
    (out / "model-00002-of-00002.safetensors").unlink()
    return out


def with_index(text: str) -> Make:
    def make(source: Path, out: Path) -> Path:
        sharded(source, out)
        (out / INDEX).write_text(text)
        return out

    return make


def tied_apart(source: Path, out: Path) -> Path:
    return altered(source, out, config={"tie_word_embeddings": True})


def tied_but_misshapen(source: Path, out: Path) -> Path:
    return altered(source, out, config={"tie_word_embeddings": True}, tensors={HEAD: torch.ones(96, 64)})


BIAS = "model.layers.0.self_attn.q_proj.bias"
MANY = (NORM, Q_PROJ, HEAD, "model.layers.0.input_layernorm.weight")

# What is wrong: how to make it, and words of the refusal.
BROKEN: dict[str, tuple[Make, str]] = {
    "no config": (without_file("config.json"), "config.json is missing"),
    "config not JSON": (with_file("config.json", b"{"), "cannot be read as JSON: "),
    "config not UTF-8": (with_file("config.json", b"\xff\xfe"), "cannot be read as JSON: "),
    "config too deep": (with_file("config.json", b"[" * 100_000), "cannot be read as JSON: "),
    "config a list": (with_file("config.json", b"[]"), "must hold a JSON object, found list"),
    "no weights": (without_file(SINGLE), f"has neither {SINGLE} nor {INDEX}"),
    "pickled weights": (pickled, "pickled weights, which can run code; convert them with: pyt"),
    "truncated file": (cut, "is truncated: "),
    "lying header": (lying, "its header claims 1099511627776 bytes"),
    "missing tensor": (without(Q_PROJ), f"lacks {Q_PROJ}, which its config.json calls for"),
    "missing tensors": (without(*MANY), " and 1 more, which its config.json calls for"),
    "missing head": (without(HEAD), "lacks lm_head.weight"),
    "one layer missing": (with_config(num_hidden_layers=2), "and 6 more, which its config"),
    "a billion layers": (with_config(num_hidden_layers=10**9), "for 1000000000 layers, the che"),
    "surplus tensor": (with_tensors(**{"adapter.weight": torch.ones(1)}), "holds adapter.weight"),
    "bias tensor": (with_tensors(**{BIAS: torch.ones(64)}), "which a Mistral decoder with this"),
    "wrong shape": (with_tensors(**{NORM: torch.ones(63)}), "shape [64], found [63]"),
    "transposed": (with_tensors(**{HEAD: torch.ones(64, 97)}), "shape [97, 64], found [64, 97]"),
    "one dimension more": (with_tensors(**{NORM: torch.ones(1, 64)}), "found [1, 64]"),
    "quantized tensor": (quantized, "found I8 (a quantized checkpoint says how"),
    "float64 tensor": (with_tensors(**{NORM: torch.ones(64).double()}), "bfloat16, found F64"),
    "tied, another head": (tied_apart, "tie_word_embeddings is true, but lm_head.weight differs"),
    "tied, head misshapen": (tied_but_misshapen, "to use both, set it to false in config.json"),
    "index not JSON": (with_index("{"), "cannot be read as JSON"),
    "index without a map": (with_index("{}"), f"{INDEX} has no weight_map"),
    "index with an empty map": (with_index('{"weight_map": {}}'), "has no weight_map"),
    "index with a list": (with_index('{"weight_map": ["a"]}'), "has no weight_map"),
    "index leaves the folder": (edit_index(**{NORM: "../evil"}), "'../evil' is not a plain name"),
    "index names a root path": (edit_index(**{NORM: "/etc/passwd"}), "is not a plain name"),
    "index names null": (edit_index(**{NORM: 5}), "'5' is not a plain name of a safetensors file"),
    "missing shard": (without_shard, "model-00002-of-00002.safetensors is missing; model.safete"),
    "quantized nobody knows how": (with_config(quantization_config={}), "config.json, quantization_config: "),
    "tensor not in its shard": (edit_index(x="model-00001-of-00002.safetensors"), "not hold 'x'"),
    "tensor not in the index": (edit_index(**{NORM: None}), f"holds '{NORM}', which {INDEX}"),
}  # fmt: skip
UNSUPPORTED: dict[str, tuple[Make, str]] = {
    "another model": (with_config(model_type="llama"), "model_type must be 'mistral', found 'llama'"),
    "biases": (with_config(attention_bias=True), "attention_bias = True is not supported"),
    "scaled rotary": (with_config(rope_scaling={"factor": 2}), "(scaled rotary embeddings)"),
    "no window named": (without("sliding_window"), "'sliding_window' is missing"),
    "two rope_theta": (with_config(rope_theta=1e6), "1000000.0 at the top and 10000.0 in rope_para"),
}  # fmt: skip


REFUSED = {name: (*entry, CheckpointError) for name, entry in BROKEN.items()} | {
    name: (*entry, ConfigError) for name, entry in UNSUPPORTED.items()
}


@pytest.mark.parametrize(("make", "words", "error"), REFUSED.values(), ids=REFUSED)
def test_a_broken_checkpoint_is_refused_in_one_line(
    source: Path, tmp_path: Path, make: Make, words: str, error: type[MistralTrtError]
) -> None:
    Checkpoint.open(source)
    broken = make(source, tmp_path / "broken")
    with pytest.raises(error) as caught:
        Checkpoint.open(broken)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_enough_kinds_of_breakage_are_tried() -> None:
    assert len(REFUSED) >= 25
