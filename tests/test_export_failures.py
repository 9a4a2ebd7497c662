"""Exports that cannot end well: each is told early, in one line, and leaves what was there before."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

from mistral_trt.artifact import require_space
from mistral_trt.contract import GraphContract
from mistral_trt.errors import ArtifactError, CheckpointError, ExportError
from mistral_trt.export import onnx_folder as stage
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.manifest import Manifest, read_manifest
from tests.checkpoints import altered, sharded
from tests.conftest import Folder
from tests.graphs import bare_graph, check_weights, files_of

ONE_LAYER: dict[str, Any] = {"precision": "fp16", "num_hidden_layers": 1}
NORM = "model.norm.weight"


@pytest.fixture
def source(tiny_checkpoint: Folder) -> Path:
    return tiny_checkpoint(num_hidden_layers=1)


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

def slow(weight, dtype, census):
    yield from convert(weight, dtype, census)
    if weight.name.endswith("q_proj.weight"):
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
    assert (partial / "model.onnx.data").exists(), "it was killed too early for this test"
    assert not (partial / "manifest.json").exists()
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


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.0, 2.5, 4.0, 5.0, 6.0])
def test_an_export_killed_at_any_moment_is_whole_or_not_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    out = tmp_path / "exports" / "out"
    arguments = ["export", str(source), "--out", str(out), "--prefill-chunk", "4", "--quiet"]
    command = [sys.executable, "-m", "mistral_trt.cli", *arguments]
    with contextlib.suppress(subprocess.TimeoutExpired):  # run kills what runs out of its time
        subprocess.run(command, timeout=seconds, stdout=subprocess.DEVNULL)
    if out.exists():
        read_manifest(out, "onnx")
    monkeypatch.setattr(stage, "build_graph", bare_graph)
    export_checkpoint(source, out)
    assert [path.name for path in out.parent.iterdir() if path.is_dir()] == ["out"]
    check_weights(out, source, "fp16")


def test_a_broken_shard_among_good_ones_is_named(source: Path, tmp_path: Path) -> None:
    split = sharded(source, tmp_path / "split", 3)
    victim = sorted(split.glob("*.safetensors"))[1]
    os.truncate(victim, victim.stat().st_size - 4)
    with pytest.raises(CheckpointError, match=f"{victim.name} is truncated"):
        export_checkpoint(split, tmp_path / "out")
    save_file({}, victim)
    with pytest.raises(CheckpointError, match=f"{victim.name} does not hold"):
        export_checkpoint(split, tmp_path / "out")
