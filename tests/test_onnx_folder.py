"""Checkpoint folder → ONNX folder: every weight in its place, the same bytes each time, all or nothing.

Most of these tests are about files and weights, so they export with a graph of initializers alone.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.numpy_helper import to_array
from safetensors.torch import load_file, save_file

from mistral_trt.contract import GraphContract, plan_contract
from mistral_trt.errors import ArtifactError, CheckpointError, ConfigError, ExportError
from mistral_trt.export import onnx_folder as stage
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.graph import graph_sha256
from mistral_trt.export.onnx_folder import describe, export_checkpoint, generation_ids, require_space
from mistral_trt.manifest import Manifest, read_manifest
from tests.checkpoints import SINGLE, altered, hub_cache, sharded
from tests.conftest import BuiltGraph, Folder
from tests.graphs import bare_graph

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ONE_LAYER: dict[str, Any] = {"precision": "fp16", "num_hidden_layers": 1}
NORM = "model.norm.weight"


@pytest.fixture
def source(tiny_checkpoint: Folder) -> Path:
    return tiny_checkpoint(num_hidden_layers=1)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an ONNX folder as onnx's own loader finds them, as raw 16- or 32-bit integers."""
    names = set(read_manifest(folder, "onnx").details["weights"])
    found = {}
    for initializer in onnx.load(folder / "model.onnx").graph.initializer:
        if initializer.name in names:
            array = to_array(initializer)
            integers = array.view({2: "int16", 4: "int32"}[array.itemsize])
            found[initializer.name] = torch.from_numpy(integers.copy())
    return found


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def check_weights(folder: Path, checkpoint: Path, precision: str) -> None:
    """Every weight of the folder is torch's conversion of the checkpoint's, bit for bit."""
    found, original = weights_of(folder), load_file(checkpoint / SINGLE)
    assert set(found) == set(original)
    for name, tensor in original.items():
        assert torch.equal(found[name], as_integers(tensor.to(DTYPES[precision]))), name


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- what is exported


@pytest.mark.parametrize(
    ("exported", "checkpoint"),
    [
        ({}, {}),
        (ONE_LAYER, {"num_hidden_layers": 1}),
        (
            {"precision": "bf16", "num_hidden_layers": 1, "tie_word_embeddings": True, "head_dim": 32},
            {"num_hidden_layers": 1, "tie_word_embeddings": True, "head_dim": 32},
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
    assert {t.dtype for t in Checkpoint.open(folder).tensors.values()} == {"float32", "float16", "bfloat16"}
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
    assert (
        set(manifest.files) == {"model.onnx", "model.onnx.data"} == set(files_of(folder)) - {"manifest.json"}
    )
    assert manifest.sources == {"checkpoint": checkpoint.sha256()}
    assert manifest.contract == plan_contract(checkpoint.config, precision="fp32", prefill_chunk=4)
    assert {"torch", "onnx", "onnx-ir", "onnxscript", "python", "mistral-trt"} <= set(manifest.versions)
    details = manifest.details
    assert details["name"] == "tiny"
    assert details["weights"] == list(checkpoint.tensors)
    assert details["weights_bytes"] == sum(4 * t.elements for t in checkpoint.tensors.values())
    assert details["text_files"] == []
    assert details["generation"] == {"bos_token_id": 1, "eos_token_ids": [2]}
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert details["graph_sha256"] == graph_sha256(model)


@pytest.mark.usefixtures("untraced")
def test_tokenizer_files_travel_with_it(source: Path, tmp_path: Path) -> None:
    texts = {"tokenizer.json": b"{}", "tokenizer_config.json": b'{"a": 1}', "chat_template.jinja": b"{{ x }}"}
    copy = shutil.copytree(source, tmp_path / "copy")
    for name, text in texts.items():
        (copy / name).write_bytes(text)
    manifest = export_checkpoint(copy, tmp_path / "out")
    assert manifest.details["text_files"] == list(texts)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in texts} == texts
    assert set(texts) < set(manifest.files)


# ---------------------------------------------------------------- the same bytes


def test_two_exports_of_one_checkpoint_are_identical(
    onnx_folder: Folder,
    source: Path,
    tmp_path: Path,
    built_graph: BuiltGraph,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # `built_graph` was traced by itself, so this compares two tracings.
    monkeypatch.setattr(stage, "build_graph", built_graph)
    export_checkpoint(source, tmp_path / "again", precision="fp16", prefill_chunk=4)
    assert files_of(tmp_path / "again") == files_of(onnx_folder(**ONE_LAYER))


def test_another_fine_tune_has_the_same_graph_and_other_weights(
    onnx_folder: Folder,
    tiny_checkpoint: Folder,
    tmp_path: Path,
    built_graph: BuiltGraph,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "build_graph", built_graph)
    other = tiny_checkpoint(seed=1, num_hidden_layers=1)
    manifest = export_checkpoint(other, tmp_path / "other", precision="fp16", prefill_chunk=4)
    first = read_manifest(onnx_folder(**ONE_LAYER))
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
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2, "bos_token_id": 1}, None, (1, [2])),
        ({"eos_token_id": [2, 7], "bos_token_id": None}, None, (None, [2, 7])),
        ({"eos_token_id": 2}, {"eos_token_id": [9, 2], "bos_token_id": 5}, (5, [2, 9])),
        ({"eos_token_id": 0, "bos_token_id": 0}, {}, (0, [0])),
        ({"eos_token_id": None, "bos_token_id": 3}, {"eos_token_id": None}, (3, [])),
    ],
)
def test_ids_that_end_a_text_are_the_union_of_what_both_files_name(
    source: Path,
    tmp_path: Path,
    config: dict[str, Any],
    generation: Any,
    expected: tuple[int | None, list[int]],
) -> None:
    folder = altered(source, tmp_path / "x", config=config)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    found = generation_ids(Checkpoint.open(folder))
    assert (found["bos_token_id"], found["eos_token_ids"]) == expected


@pytest.mark.parametrize("value", ["2", 2.0, True, -1, [2, "3"], {"id": 2}], ids=repr)
@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id"])
def test_what_is_no_token_id_is_refused(source: Path, tmp_path: Path, key: str, value: Any) -> None:
    folder = altered(source, tmp_path / "x")
    (folder / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(ConfigError, match=f"{key} must be a token id or a list of them, found "):
        export_checkpoint(folder, tmp_path / "out")


# ---------------------------------------------------------------- all or nothing


class Failure(NamedTuple):
    make: Callable[[Path, Path], Path]
    error: type[Exception]
    words: str


def with_norm(value: float) -> Callable[[Path, Path], Path]:
    weight = torch.ones(64)
    weight[7] = value
    return lambda source, out: altered(source, out, tensors={NORM: weight})


FAILURES = {
    "NaN": Failure(
        with_norm(float("nan")), CheckpointError, f"{NORM} holds NaN or infinity: the checkpoint is"
    ),
    "infinity": Failure(with_norm(float("-inf")), CheckpointError, f"{NORM} holds NaN or infinity"),
    "overflow": Failure(with_norm(-70000.0), CheckpointError, f"{NORM} holds 70000, which overflows float16"),
}


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("before", [True, False])
def test_weights_that_cannot_be_exported_leave_what_was_there(
    source: Path, tmp_path: Path, failure: Failure, before: bool
) -> None:
    out, broken = tmp_path / "exports" / "out", failure.make(source, tmp_path / "broken")
    if before:
        export_checkpoint(source, out)
    old = files_of(out) if before else None
    with pytest.raises(failure.error, match=failure.words):
        export_checkpoint(broken, out)
    assert (files_of(out) if out.exists() else None) == old
    assert [p.name for p in out.parent.iterdir() if p.name != "out"] == []


@pytest.mark.usefixtures("untraced")
def test_a_value_past_float16_fits_in_bf16_as_the_message_says(source: Path, tmp_path: Path) -> None:
    large = with_norm(-70000.0)(source, tmp_path / "large")
    export_checkpoint(large, tmp_path / "out", precision="bf16")
    check_weights(tmp_path / "out", large, "bf16")


def test_a_graph_of_other_weights_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(contract: GraphContract) -> ir.Model:
        model = bare_graph(contract)
        model.graph.initializers.pop(NORM)
        return model

    monkeypatch.setattr(stage, "build_graph", forgetful)
    with pytest.raises(ExportError, match=f"graph and checkpoint disagree on the weights: .*{NORM}"):
        export_checkpoint(source, tmp_path / "exports" / "out")
    assert [p.name for p in (tmp_path / "exports").iterdir()] == []


def never(_: GraphContract) -> ir.Model:
    raise AssertionError("the graph must not be traced for an export that cannot be written")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_not_ours_is_refused_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(stage, "build_graph", never)
    mine = tmp_path / "mine"
    if kind == "folder":
        mine.mkdir()
        (mine / "thesis.txt").write_text("years")
    else:
        mine.write_text("years")
    with pytest.raises(ArtifactError, match="choose another --out"):
        export_checkpoint(source, mine)
    assert (mine / "thesis.txt" if kind == "folder" else mine).read_text() == "years"


def test_the_checkpoint_itself_is_not_replaced(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "build_graph", never)
    before = files_of(source)
    with pytest.raises(ArtifactError, match="holds the input"):
        export_checkpoint(source, source)
    assert files_of(source) == before


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_full_disk_is_told_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "build_graph", never)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 10**7, 10**7))
    out = tmp_path / "not" / "yet" / "there"
    with pytest.raises(
        ArtifactError, match="there needs 0.07 GB of disk, 0.01 GB are free; free some or choose"
    ):
        export_checkpoint(source, out)
    assert list(tmp_path.iterdir()) == []


def test_exactly_enough_disk_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(100, 0, 100)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    require_space(tmp_path / "a" / "b", 100)
    with pytest.raises(ArtifactError):
        require_space(tmp_path / "a" / "b", 101)
    assert set(asked) == {tmp_path}, "the disk that is asked is the one the folder will be on"


def test_two_exports_at_once_and_the_second_is_turned_away(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(contract: GraphContract) -> ir.Model:
        monkeypatch.setattr(stage, "build_graph", never)
        with pytest.raises(
            ArtifactError, match="another run is writing .*out; wait for it or choose another"
        ):
            export_checkpoint(source, tmp_path / "out")
        return bare_graph(contract)

    monkeypatch.setattr(stage, "build_graph", meanwhile)
    export_checkpoint(source, tmp_path / "out")
    check_weights(tmp_path / "out", source, "fp16")


@pytest.mark.usefixtures("untraced")
def test_a_new_export_replaces_an_old_one(source: Path, tmp_path: Path) -> None:
    export_checkpoint(source, tmp_path / "out", precision="fp32")
    manifest: Manifest = export_checkpoint(source, tmp_path / "out", precision="fp16")
    assert read_manifest(tmp_path / "out", "onnx") == manifest
    check_weights(tmp_path / "out", source, "fp16")


@pytest.mark.usefixtures("untraced")
def test_the_checkpoint_is_only_read(source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    for path in (*copy.iterdir(), copy):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = files_of(copy)
    export_checkpoint(copy, tmp_path / "out")
    assert files_of(copy) == before
    copy.chmod(0o755)


# ---------------------------------------------------------------- in a process of its own

HALF_WAY = """
import sys, time
from pathlib import Path
from mistral_trt.export import weights
from mistral_trt.export.onnx_folder import export_checkpoint

convert = weights.convert

def slow(tensor, dtype):
    yield from convert(tensor, dtype)
    if tensor.name.endswith("q_proj.weight"):
        print("half", flush=True)
        time.sleep(600)

weights.convert = slow
export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), precision="fp16", prefill_chunk=4)
"""


@pytest.mark.slow
def test_an_export_killed_half_way_leaves_no_folder_and_the_next_clears_up(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "exports" / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", HALF_WAY, str(source), str(out)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child, child.stdout:
        assert child.stdout.readline() == "half\n"
        os.kill(child.pid, signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    (partial,) = (p for p in out.parent.iterdir() if p.is_dir())
    assert (partial / "model.onnx").stat().st_size > 0, "it was killed too early for this test"
    assert (partial / "model.onnx.data").exists() and not (partial / "manifest.json").exists()
    monkeypatch.setattr(stage, "build_graph", bare_graph)
    export_checkpoint(source, out)
    assert [p.name for p in out.parent.iterdir() if p.is_dir()] == ["out"]
    check_weights(out, source, "fp16")


@pytest.mark.slow
def test_another_process_with_another_hash_seed_writes_the_same_bytes(
    source: Path, tmp_path: Path, onnx_folder: Folder
) -> None:
    command = "from mistral_trt.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    for seed in ("1", "2"):
        arguments = ["export", str(source), "--out", str(tmp_path / seed), "--prefill-chunk", "4"]
        subprocess.run(
            [sys.executable, "-c", command, *arguments],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdin=subprocess.DEVNULL,
            check=True,
        )
        assert files_of(tmp_path / seed) == files_of(onnx_folder(**ONE_LAYER))


def test_a_broken_shard_among_good_ones_is_named(source: Path, tmp_path: Path) -> None:
    split = sharded(source, tmp_path / "split", 3)
    victim = sorted(split.glob("*.safetensors"))[1]
    os.truncate(victim, victim.stat().st_size - 4)
    with pytest.raises(CheckpointError, match=f"{victim.name} is truncated"):
        export_checkpoint(split, tmp_path / "out")
    save_file({}, victim)
    with pytest.raises(CheckpointError, match=f"{victim.name} does not hold"):
        export_checkpoint(split, tmp_path / "out")
