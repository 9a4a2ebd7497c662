"""One plan for every fine-tune of a graph: what a refit takes from where, and what it refuses.

The plans are stand-ins, since a refit only passes them on, but for one real build.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from mistral_trt.engines import build as build_module
from mistral_trt.engines import refit as refit_module
from mistral_trt.engines.__main__ import refit as refit_command
from mistral_trt.engines.build import build_engine
from mistral_trt.engines.builder.plan import Plan
from mistral_trt.engines.engine_cache import EngineCache
from mistral_trt.engines.network.placeholders import refit_weights
from mistral_trt.engines.refit import differences, refit_engine
from mistral_trt.errors import ArtifactError, BuildError, ManifestError
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.manifest import Manifest, manifest_sha256, read_manifest
from mistral_trt.weight_index import RefitWeight, read_weight_index
from tests.graphs import files_of
from tests.models import write_checkpoint, write_tokenizer

pytest.importorskip("tensorrt_rtx")

pytestmark = pytest.mark.usefixtures("one_trace")

Folder = Callable[..., Path]
PLAN = b"a plan" * 1000
SIZES = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 192, "vocab_size": 259}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """folders(seed=0, prefill_chunk=4, max_batch_size=2, precision="fp16", **config) → an ONNX folder."""
    root = tmp_path_factory.mktemp("refit")

    def folder(seed: int = 0, **changes: Any) -> Path:
        settings = {"precision": "fp16", "prefill_chunk": 4, "max_batch_size": 2}
        settings |= {name: changes.pop(name) for name in list(changes) if name in settings}
        out = root / hashlib.sha256(repr((seed, settings, changes)).encode()).hexdigest()[:8] / "onnx"
        if not out.exists():
            checkpoint = out.with_name(f"fine-tune-{seed}")
            write_checkpoint(checkpoint, seed=seed, num_hidden_layers=1, **{**SIZES, **changes})
            write_tokenizer(checkpoint)
            (checkpoint / "chat_template.jinja").write_text(f"{{{{ {seed} }}}}")
            export_checkpoint(checkpoint, out, **settings)  # type: ignore[arg-type]
        return out

    return folder


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds that take no time and no TensorRT."""

    def build_plan(*arguments: Any, **settings: Any) -> Plan:
        file: BinaryIO = arguments[-1]
        file.write(PLAN)
        details = {"network_layers": {"CONSTANT": 1}, "audit": [], "compiled": {}}
        return Plan(hashlib.sha256(PLAN).hexdigest(), len(PLAN), details)

    monkeypatch.setattr(build_module, "build_plan", build_plan)
    monkeypatch.setattr(build_module, "check_external_plan", lambda *arguments: None)


@pytest.fixture
def engine(stand_in: None, folders: Folder, tmp_path: Path) -> Path:
    build_engine(folders(), "a10g", tmp_path / "engine", weights="external")
    return tmp_path / "engine"


def test_a_build_of_another_fine_tune_takes_the_kept_plan(
    stand_in: None, folders: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan without weights is the graph's, in the cache as in a refit."""
    cache = EngineCache(tmp_path / "cache")
    before = build_engine(folders(), "a10g", tmp_path / "a", weights="external", cache=cache)
    monkeypatch.setattr(build_module, "build_plan", lambda *_, **__: pytest.fail("it began to build"))
    build_engine(folders(seed=1), "a10g", tmp_path / "b", weights="external", cache=cache)
    check_refitted(tmp_path / "b", before, folders(seed=1))
    assert (tmp_path / "a" / "model.plan").samefile(tmp_path / "b" / "model.plan")


# --- what it makes --------------------------------------------------------------------------------------


def check_refitted(folder: Path, engine: Manifest, onnx_dir: Path) -> None:
    """The engine's plan and what it says of it; the ONNX folder's weights, texts and what it says of them."""
    manifest, source = read_manifest(folder, "engine"), read_manifest(onnx_dir, "onnx")
    assert manifest.files["model.plan"] == engine.files["model.plan"]
    taken = {name for name in source.files if name != "model.onnx"}
    assert set(manifest.files) == {"model.plan", "weights.json", *taken}
    assert all(manifest.files[name] == source.files[name] for name in taken)
    assert (folder / "model.onnx.data").samefile(onnx_dir / "model.onnx.data")
    assert read_weight_index(folder) == refit_weights(onnx_dir / "model.onnx")
    assert manifest.sources["onnx"] == manifest_sha256(onnx_dir)
    assert manifest.sources["checkpoint"] == source.sources["checkpoint"]
    for key in ("name", "generation", "graph_sha256", "text_files"):
        assert manifest.details[key] == source.details[key]
    same = ("gpus", "gpu_name", "compute_capabilities", "flavor", "tensorrt", "predicted", "plan_bytes")
    for key in (*same, "network_layers", "audit", "compiled"):
        assert manifest.details[key] == engine.details[key]
    assert manifest.details["weights"] == "external"
    assert manifest.contract.ring == source.contract.ring
    assert manifest.contract.max_batch_size == engine.contract.max_batch_size


def test_another_fine_tune_gets_the_plan(engine: Path, folders: Folder, tmp_path: Path) -> None:
    before = read_manifest(engine)
    made = refit_engine(engine, folders(seed=1), tmp_path / "other")
    check_refitted(tmp_path / "other", before, folders(seed=1))
    assert made == read_manifest(tmp_path / "other")
    assert made.sources["engine"] == manifest_sha256(engine)
    assert (tmp_path / "other" / "model.plan").samefile(engine / "model.plan")
    assert (made.details["name"], before.details["name"]) == ("fine-tune-1", "fine-tune-0")
    assert made.files["model.onnx.data"] != before.files["model.onnx.data"]
    check_refitted(engine, before, folders())  # the engine it came from is as it was


def test_the_engine_itself_is_replaced_and_can_be_again(engine: Path, folders: Folder) -> None:
    before = read_manifest(engine)
    for seed in (1, 0):
        refit_engine(engine, folders(seed=seed))
        check_refitted(engine, before, folders(seed=seed))
    assert read_manifest(engine).files == before.files
    assert sorted(path.name for path in engine.parent.iterdir()) == ["engine"]


def test_out_may_name_the_engine(engine: Path, folders: Folder) -> None:
    refit_engine(engine, folders(seed=1), engine.parent / "." / "engine")
    assert read_manifest(engine).details["name"] == "fine-tune-1"


def test_the_originals_may_go(engine: Path, folders: Folder, tmp_path: Path) -> None:
    shutil.copytree(folders(seed=1), tmp_path / "onnx")
    refit_engine(engine, tmp_path / "onnx", tmp_path / "other")
    shutil.rmtree(tmp_path / "onnx")
    shutil.rmtree(engine)
    read_manifest(tmp_path / "other", "engine")
    assert len(read_weight_index(tmp_path / "other")) == 12


def test_what_is_not_in_the_graph_may_differ_and_the_engine_keeps_its_rows(
    engine: Path, folders: Folder
) -> None:
    refit_engine(engine, folders(seed=1, max_batch_size=3, max_position_embeddings=8192))
    contract = read_manifest(engine).contract
    assert (contract.max_batch_size, contract.config.max_position_embeddings) == (2, 8192)


def test_a_checkpoints_own_file_is_linked_through(engine: Path, folders: Folder) -> None:
    """A float16 checkpoint's file is the ONNX folder's, and then the engine's."""
    onnx_dir = folders(seed=1, dtype="float16")
    refit_engine(engine, onnx_dir)
    checkpoint = onnx_dir.with_name("fine-tune-1")
    assert (engine / "model.safetensors").samefile(checkpoint / "model.safetensors")
    assert {weight.file for weight in read_weight_index(engine)} == {"model.safetensors"}
    read_manifest(engine, "engine")


def test_the_command_prints_the_folder(
    engine: Path, folders: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx_dir = str(folders(seed=1))
    assert refit_command([str(engine), "--from", onnx_dir, "--out", str(tmp_path / "other")]) == 0
    assert refit_command([str(engine), "--from", onnx_dir]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'other'}\n{engine}\n"


# --- what it refuses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_theta": 1e6}, r"found another one: rope_theta 10000.0 and 1000000.0\. Build"),
        pytest.param({"rms_norm_eps": 1e-6}, r"rms_norm_eps 1e-05 and 1e-06\. Build", marks=pytest.mark.slow),
        pytest.param(
            {"prefill_chunk": 3},
            r"found another one: prefill_chunk 4 and 3\. Build",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"sliding_window": 9},
            r"found another one: sliding_window 8 and 9\. Build",
            marks=pytest.mark.slow,
        ),
        (
            {"precision": "bf16"},
            r"precision fp16 and bf16; weights: only the engine's lm_head.weight \(float16",
        ),
        pytest.param(
            {"intermediate_size": 256},
            r"intermediate_size 192 and 256; weights: only the engine's model.layers.0",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"tie_word_embeddings": True},
            r"tie_word_embeddings False and True; weights: only .* lm_head.weight",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_plan_of_another_graph_is_refused_by_what_differs(
    engine: Path, folders: Folder, change: dict[str, Any], words: str
) -> None:
    onnx_dir, before = folders(**change), files_of(engine)
    with pytest.raises(BuildError, match=words) as error:
        refit_engine(engine, onnx_dir)
    remedy = f"mistral-trt build {onnx_dir} --gpu a10g --weights external --out DIR"
    assert str(error.value).endswith(f"Build its own: {remedy}")
    assert files_of(engine) == before


def test_two_chunks_may_have_one_graph_and_are_told_apart(folders: Folder) -> None:
    """W = 8 gives R = 12 with C = 4 and with C = 3; only the plan's profiles know C."""
    four, three = read_manifest(folders()), read_manifest(folders(prefill_chunk=3))
    assert four.details["graph_sha256"] == three.details["graph_sha256"]
    assert four.contract.ring.capacity == three.contract.ring.capacity


def test_another_graph_under_one_configuration_is_refused(
    engine: Path, folders: Folder, tmp_path: Path
) -> None:
    shutil.copytree(folders(), tmp_path / "onnx")
    source = read_manifest(tmp_path / "onnx")
    replace(source, details={**source.details, "graph_sha256": "0" * 64}).write(tmp_path / "onnx")
    with pytest.raises(BuildError, match=r"agree, so constants or nodes of the graphs differ \(exported by"):
        refit_engine(engine, tmp_path / "onnx")


def quantized(folders: Folder, **changes: Any) -> Manifest:
    source = read_manifest(folders())
    found = {
        "scheme": {"precision": "int8", "weights": "int8", "activations": "int8", "block_size": None},
        "quantized": ["a", "b", "c", "d", "e"],
        "kept": ["f"],
        "pre_quant_scales": {"norm": 2, "mul": 1},
    }
    contract = replace(source.contract, precision="int8")
    return replace(
        source, contract=contract, details={**source.details, "quantization": {**found, **changes}}
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        (
            {"quantized": ["a"], "kept": ["b", "c", "d", "e", "f"]},
            [
                "linears quantized: only the engine's b, c, d and 1 more",
                "linears kept: only the ONNX folder's b, c, d and 1 more",
            ],
        ),
        (
            {"pre_quant_scales": {"norm": 3, "mul": 0}},
            ["pre_quant_scales.norm 2 and 3", "pre_quant_scales.mul 1 and 0"],
        ),
        (
            {"scheme": {"weights": "int8", "activations": None, "block_size": None}},
            ["scheme.activations int8 and None"],
        ),
    ],
)
def test_what_was_quantized_is_compared(folders: Folder, changes: dict[str, Any], words: list[str]) -> None:
    found = differences(quantized(folders), quantized(folders, **changes), [], [])
    assert list(found) == words


def test_weights_are_compared_by_name_dtype_and_shape(folders: Folder) -> None:
    source = read_manifest(folders())
    old = [RefitWeight("a", "float16", (2,), "f", 0, 4), RefitWeight("b", "float16", (2,), "f", 4, 4)]
    moved = [replace(weight, file="g", offset=0) for weight in old]
    assert list(differences(source, source, old, moved)) == []
    new = [old[0], replace(old[1], dtype="int8", bytes=2)]
    assert list(differences(source, source, old, new)) == [
        "weights: only the engine's b (float16 [2]); only the ONNX folder's b (int8 [2])"
    ]


def test_weights_that_the_plan_does_not_know_are_refused_whatever_the_hash_says(
    engine: Path, folders: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = refit_weights(folders(seed=1) / "model.onnx")
    monkeypatch.setattr(refit_module, "refit_weights", lambda path: whole[:-1])
    with pytest.raises(BuildError, match=r"weights: only the engine's lm_head.weight|only the engine's"):
        refit_engine(engine, folders(seed=1))


def test_an_engine_with_its_weights_inside_is_refused(
    stand_in: None, folders: Folder, tmp_path: Path
) -> None:
    build_engine(folders(), "l4", tmp_path / "engine", weights="embedded")
    with pytest.raises(
        BuildError, match=r"found embedded ones, .*mistral-trt build .* --gpu l4 --weights external"
    ):
        refit_engine(tmp_path / "engine", folders(seed=1))


def test_a_plan_for_several_gpus_is_not_sent_to_external_weights(
    stand_in: None, folders: Folder, tmp_path: Path
) -> None:
    """TensorRT-RTX has no such plan: what is to be run instead is accepted."""
    build_engine(folders(), "l4,a10g", tmp_path / "engine")
    with pytest.raises(BuildError, match=r"mistral-trt build .* --gpu a10g,l4 --out DIR$") as error:
        refit_engine(tmp_path / "engine", folders(seed=1))
    assert "--weights external" not in str(error.value)
    build_engine(folders(seed=1), "a10g,l4", tmp_path / "again")


def alter(path: Path) -> None:
    """Change a byte in a copy, so that files that share it keep theirs."""
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.unlink()
    path.write_bytes(data)


def test_an_altered_plan_is_not_passed_on(engine: Path, folders: Folder) -> None:
    alter(engine / "model.plan")
    with pytest.raises(ManifestError, match="model.plan was altered after it was made"):
        refit_engine(engine, folders(seed=1))


def test_altered_weights_are_not_taken(engine: Path, folders: Folder, tmp_path: Path) -> None:
    shutil.copytree(folders(seed=1), tmp_path / "onnx")
    alter(tmp_path / "onnx" / "model.onnx.data")
    with pytest.raises(ManifestError, match=r"model.onnx.data was altered after it was made"):
        refit_engine(engine, tmp_path / "onnx")


def test_folders_of_the_wrong_stage_are_refused(engine: Path, folders: Folder) -> None:
    with pytest.raises(ManifestError, match="expected an engine folder, found an onnx folder"):
        refit_engine(folders(), folders(seed=1))
    with pytest.raises(ManifestError, match="expected an onnx folder, found an engine folder"):
        refit_engine(engine, engine, engine.parent / "other")


def test_nothing_it_reads_is_overwritten(engine: Path, folders: Folder, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds the input"):
        refit_engine(engine, folders(seed=1), folders(seed=1))
    with pytest.raises(ArtifactError, match="holds the input"):
        refit_engine(engine, folders(seed=1), engine.parent)


@pytest.mark.parametrize("step", ["bring_file", "place_files"])
def test_a_refit_that_ends_half_way_leaves_the_engine_whole(
    engine: Path, folders: Folder, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before, inode = files_of(engine), (engine / "model.plan").stat().st_ino
    whole = getattr(refit_module, step)

    def end(*arguments: Any) -> None:
        whole(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(refit_module, step, end)
    with pytest.raises(KeyboardInterrupt):
        refit_engine(engine, folders(seed=1))
    assert files_of(engine) == before
    assert (engine / "model.plan").stat().st_ino == inode
    read_manifest(engine, "engine")
    assert [path.name for path in engine.parent.iterdir()] == ["engine"]


# --- a real plan ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_plan_serves_two_fine_tunes(folders: Folder, tmp_path: Path) -> None:
    built = build_engine(folders(), "a10g", tmp_path / "first", weights="external")
    refit_engine(tmp_path / "first", folders(seed=1), tmp_path / "second")
    check_refitted(tmp_path / "second", built, folders(seed=1))
    first, second = (
        json.loads((tmp_path / name / "weights.json").read_text()) for name in ("first", "second")
    )
    assert first == second
    assert built.details["plan_bytes"] < 12_000_000
