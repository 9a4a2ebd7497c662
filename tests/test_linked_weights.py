"""Weights that stay in the checkpoint's own files: shared, never written to, copied only where it is said."""

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mistral_trt.artifact import link_file
from mistral_trt.errors import ArtifactError, CheckpointError, ManifestError
from mistral_trt.export import onnx_folder as stage
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.manifest import read_manifest
from mistral_trt.validate.comparison import validate_artifact
from mistral_trt.validate.job import Job
from tests.checkpoints import SINGLE, altered, hub_cache, sharded
from tests.conftest import Folder
from tests.graphs import check_weights, files_of

pytestmark = pytest.mark.usefixtures("one_trace")

NORM = "model.norm.weight"


@pytest.fixture
def source(tiny_checkpoint: Folder, tmp_path: Path) -> Path:
    """A bf16 checkpoint of this test's own."""
    return shutil.copytree(tiny_checkpoint(num_hidden_layers=1, dtype="bfloat16"), tmp_path / "checkpoint")


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("layout", ["one file", "shards", "hub cache"])
def test_weights_in_the_graphs_dtype_are_not_written_again(source: Path, tmp_path: Path, layout: str) -> None:
    folder = {
        "one file": lambda: source,
        "shards": lambda: sharded(source, tmp_path / "s", 3),
        "hub cache": lambda: hub_cache(source, tmp_path / "h"),
    }[layout]()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    manifest = export_checkpoint(folder, tmp_path / "out", precision="bf16")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert manifest.details["linked"] == shards
    assert set(manifest.files) == {"model.onnx", *shards}
    for name in shards:
        placed = tmp_path / "out" / name
        assert placed.samefile(folder / name) and not placed.is_symlink()
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    check_weights(tmp_path / "out", source, "bf16")
    read_manifest(tmp_path / "out", "onnx")


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("precision", "link", "shared"),
    [("bf16", None, True), ("bf16", False, False), ("fp16", None, False), ("fp32", None, False)],
)
def test_what_is_shared_depends_on_precision_and_wish(
    source: Path, tmp_path: Path, precision: str, link: bool | None, shared: bool
) -> None:
    manifest = export_checkpoint(source, tmp_path / "out", precision=precision, link=link)
    assert (SINGLE in manifest.files, "model.onnx.data" in manifest.files) == (shared, not shared)
    check_weights(tmp_path / "out", source, precision)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("link", [None, True])
def test_a_float32_checkpoint_is_shared_on_demand_only(
    tiny_checkpoint: Folder, tmp_path: Path, link: bool | None
) -> None:
    checkpoint = tiny_checkpoint(num_hidden_layers=1)
    manifest = export_checkpoint(checkpoint, tmp_path / "out", precision="fp32", link=link)
    assert (manifest.details["linked"] == [SINGLE]) is bool(link)
    check_weights(tmp_path / "out", checkpoint, "fp32")


@pytest.mark.usefixtures("untraced")
def test_one_weight_of_another_dtype_is_written_and_the_rest_shared(source: Path, tmp_path: Path) -> None:
    mixed = altered(source, tmp_path / "mixed", tensors={NORM: load_file(source / SINGLE)[NORM].float()})
    manifest = export_checkpoint(mixed, tmp_path / "out", precision="bf16")
    assert manifest.files["model.onnx.data"].bytes == 64 * 2
    assert manifest.details["linked"] == [SINGLE]
    check_weights(tmp_path / "out", mixed, "bf16")


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM])
def test_where_no_link_can_be_made_the_copy_is_said_aloud(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    with caplog.at_level(logging.WARNING, "mistral_trt"):
        export_checkpoint(source, tmp_path / "out", precision="bf16")
    assert any("cannot be hard-linked" in m and "copying its 0.00 GB" in m for m in caplog.messages)
    assert not (tmp_path / "out" / SINGLE).samefile(source / SINGLE)
    assert files_of(tmp_path / "out")[SINGLE] == (source / SINGLE).read_bytes()
    check_weights(tmp_path / "out", source, "bf16")


def test_a_link_that_fails_for_another_reason_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("y")
    with pytest.raises(FileExistsError):
        link_file(tmp_path / "a", tmp_path / "b")
    with pytest.raises(FileNotFoundError):
        link_file(tmp_path / "nothing", tmp_path / "c")


def test_room_for_copies_is_asked_for_before_the_first_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "build_graph", lambda _: pytest.fail("nothing may be done"))
    asked: list[int] = []

    def refuse(out: Path, needed_bytes: int) -> None:
        asked.append(needed_bytes)
        raise ArtifactError("no room")

    monkeypatch.setattr(stage, "require_space", refuse)
    monkeypatch.setattr(stage, "copied_bytes", lambda plan, out: 10**15)
    with pytest.raises(ArtifactError, match="no room"):
        export_checkpoint(source, tmp_path / "out", precision="bf16")
    assert asked[0] > 10**15


@pytest.mark.usefixtures("untraced")
def test_replacing_an_artifact_leaves_the_checkpoint_alone(source: Path, tmp_path: Path) -> None:
    before = files_of(source)
    for precision in ("bf16", "fp16", "bf16"):
        export_checkpoint(source, tmp_path / "out", precision=precision)
        assert files_of(source) == before
    shutil.rmtree(tmp_path / "out")
    assert files_of(source) == before


@pytest.mark.usefixtures("untraced")
def test_a_checkpoint_changed_in_place_is_noticed_by_the_artifact(source: Path, tmp_path: Path) -> None:
    export_checkpoint(source, tmp_path / "out", precision="bf16")
    with (source / SINGLE).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with pytest.raises(ManifestError, match=f"{SINGLE} was altered after it was made"):
        read_manifest(tmp_path / "out", "onnx")


@pytest.mark.usefixtures("untraced")
def test_a_damaged_weight_is_found_though_nothing_is_converted(source: Path, tmp_path: Path) -> None:
    weight = torch.ones(64, dtype=torch.bfloat16)
    weight[3] = float("inf")
    broken = altered(source, tmp_path / "broken", tensors={NORM: weight})
    with pytest.raises(CheckpointError, match=f"{NORM} holds NaN or infinity"):
        export_checkpoint(broken, tmp_path / "exports" / "out", precision="bf16")
    assert list((tmp_path / "exports").iterdir()) == []


# ---------------------------------------------------------------- what reads them


def test_a_validation_runs_over_shared_files(source: Path, tmp_path: Path) -> None:
    export_checkpoint(source, tmp_path / "onnx", precision="bf16", prefill_chunk=4)
    assert (tmp_path / "onnx" / SINGLE).samefile(source / SINGLE)
    job = Job(tmp_path / "onnx", reference=source, out=tmp_path / "report", length=100)
    report = validate_artifact(job)
    assert report.passed, report.verdict
    hazards = report.artifact["hazards"]
    assert (hazards["dtype"], hazards["overflow"], hazards["non_finite"]) == ("bfloat16", 0, 0)
    assert "in bfloat16:" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.slow
def test_an_engine_is_built_over_shared_files(tiny_checkpoint: Folder, tmp_path: Path) -> None:
    from mistral_trt.engines.build import build_engine

    checkpoint = tiny_checkpoint(num_hidden_layers=1, dtype="bfloat16", head_dim=64)
    export_checkpoint(checkpoint, tmp_path / "onnx", precision="bf16", prefill_chunk=4)
    assert read_manifest(tmp_path / "onnx").details["linked"] == [SINGLE]
    engine = build_engine(tmp_path / "onnx", "l4", tmp_path / "engine")
    weights = read_manifest(tmp_path / "onnx").details["weights_bytes"]
    assert engine.files["model.plan"].bytes > weights
