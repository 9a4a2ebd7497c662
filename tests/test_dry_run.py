"""`mistral-trt build --dry-run`: what it prints, and what it refuses."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mistral_trt.cli import run
from mistral_trt.engines.__main__ import build as build_command
from mistral_trt.engines.build import build_engine
from mistral_trt.engines.engine_cache import EngineCache
from mistral_trt.engines.gpu import find_gpu
from mistral_trt.engines.planning import settle as settle_module
from mistral_trt.engines.planning.budget import predict, usable_bytes
from mistral_trt.engines.planning.dry_run import describe_budget, dry_run, to_json
from mistral_trt.engines.planning.host import Host
from mistral_trt.engines.planning.roofline import ceilings
from mistral_trt.engines.planning.settle import predict_budget, settle
from mistral_trt.errors import BuildError, ConfigError
from mistral_trt.manifest import read_manifest
from mistral_trt.weight_index import EMBEDDED, EXTERNAL
from tests.conftest import Folder
from tests.test_budget import FLOAT_BYTES, contract_7b

AMPLE = Host(memory_bytes=10**12, disk_bytes=10**12)

LABELS = [
    "all of it predicted for",
    "build memory",
    "disk",
    "GPU: weights",
    "GPU: rings",
    "GPU: activations",
    "GPU: logits",
    "GPU: reserve",
    "GPU: all but reserve",
    "largest batch",
    "decode, one row",
    "decode, 4 rows",
    "prefill",
]


@pytest.fixture
def onnx(onnx_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny ONNX folder on a machine with memory for any build of it."""
    monkeypatch.setattr(settle_module, "available_memory_bytes", lambda: 8_000_000_000)
    return onnx_folder(precision="fp16")


def rows_7b(weights: str, **of_the_host: Any) -> dict[str, str]:
    budget, gpu = predict(contract_7b(rows=4), FLOAT_BYTES, weights=weights), find_gpu("a10g")
    return dict(describe_budget(budget, gpu, ceilings(budget, gpu), replace(AMPLE, **of_the_host)))


def test_the_rows_of_a_7b_on_an_a10g() -> None:
    rows = rows_7b(EMBEDDED)
    assert list(rows) == LABELS
    assert rows["all of it predicted for"] == "NVIDIA A10G, fp16, weights embedded"
    assert rows["disk"] == "14.52 GB, the plan 14.52 GB"
    assert rows["GPU: weights"] == "14.48 GB"
    assert rows["GPU: rings"] == "2.28 GB, 4 x 570.4 MB"
    assert rows["GPU: logits"] == "32.8 MB"
    assert rows["GPU: all but reserve"].endswith(" of 22.55 GB usable")
    assert rows["largest batch"] == "13 rows"
    assert rows["decode, one row"] == "at most 41 tokens/s, ring full"
    assert rows["decode, 4 rows"].endswith(" tokens/s together")
    assert rows["prefill"] == "at most 4,346 tokens/s, window full"


def test_weights_beside_the_plan_are_links_or_copies() -> None:
    assert rows_7b(EXTERNAL)["disk"].endswith(", its weights beside it as hard links")
    copied = rows_7b(EXTERNAL, linked=False)["disk"]
    assert copied.startswith("14.5") and copied.endswith("as copies")


def test_a_dry_run_prints_and_builds_nothing(
    onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "engine"
    assert build_command([str(onnx), "--gpu", "a10g", "--out", str(out), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24].rstrip() for line in lines] == LABELS
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_as_json(onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(onnx), "--gpu", "l4", "--out", str(tmp_path / "engine"), "--weights", "external"]
    assert build_command([*words, "--dry-run", "--json", "--max-batch-size", "32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["weights"], found["refusal"]) == ("external", None)
    assert found["predicted"]["max_batch_size"] == 32
    assert found["rings_bytes"] == 32 * found["predicted"]["ring_bytes_per_row"]
    (gpu,) = found["gpus"]
    assert gpu["gpu"] == "l4" and gpu["rows_that_fit"] > 32 and gpu["usable_bytes"] < 24e9
    assert set(gpu["ceilings"]) == {
        "decode_tokens_per_s",
        "decode_all_rows_tokens_per_s",
        "prefill_tokens_per_s",
    }


def test_a_dry_run_for_several_gpus(onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(onnx), "--gpu", "l4,a10g", "--out", str(tmp_path / "engine"), "--dry-run"]
    assert build_command([*words, "--json"]) == 0
    gpus = {gpu["gpu"]: gpu for gpu in json.loads(capsys.readouterr().out)["gpus"]}
    assert list(gpus) == ["a10g", "l4"]
    for key, gpu in gpus.items():
        assert gpu["usable_bytes"] == usable_bytes(find_gpu(key))
        assert gpu["ceilings"]["prefill_tokens_per_s"] > 0 and gpu["rows_that_fit"] > 0
    assert build_command(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24].rstrip() for line in lines] == [*LABELS, *LABELS]
    named = [line for line in lines if "NVIDIA A10G" in line or "NVIDIA L4" in line]
    assert named == [lines[0], lines[len(LABELS)]]


def test_the_smallest_of_several_gpus_decides(onnx: Path, tmp_path: Path) -> None:
    rows = 12_000_000_000 // read_manifest(onnx).contract.ring_bytes_per_row
    dry_run(onnx, "l40s,l4", tmp_path / "engine", max_batch_size=rows)
    with pytest.raises(BuildError, match=r"t4 has 14.5 GB usable; use --max-batch-size \d+$"):
        dry_run(onnx, "l4,t4", tmp_path / "engine", max_batch_size=2 * rows)


def test_json_without_a_dry_run_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_command(["onnx", "--gpu", "a10g", "--out", "out", "--json"])
    assert "--json is for --dry-run" in capsys.readouterr().err


def test_a_refusal_comes_after_the_rows_with_status_2(
    onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settle_module, "available_memory_bytes", lambda: 100_000_000)
    words = [str(onnx), "--gpu", "a10g", "--out", str(tmp_path / "engine"), "--weights", "embedded"]
    assert run("build", [*words, "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == len(LABELS)
    assert "mistral-trt build: predicted: the build needs" in printed.err
    assert run("build", [*words, "--dry-run", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["refusal"].startswith("predicted: the build needs") and found["weights"] == "embedded"


def test_rows_that_do_not_fit_are_refused_in_a_dry_run_and_in_a_build(onnx: Path, tmp_path: Path) -> None:
    message = r"predicted: 9000000 rows of ring need .*; t4 has 14.5 GB usable; use --max-batch-size \d+$"
    for start in (dry_run, build_engine):
        with pytest.raises(BuildError, match=message):
            start(onnx, "t4", tmp_path / "engine", max_batch_size=9_000_000)


def test_no_rows_at_all_are_refused(onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_batch_size must be a positive integer, found 0"):
        dry_run(onnx, "a10g", tmp_path / "engine", max_batch_size=0)


def test_an_external_build_is_refused_too_where_there_is_no_memory(
    onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settle_module, "available_memory_bytes", lambda: 100_000_000)
    with pytest.raises(BuildError, match="for 2 layers without their weights.*; free some or build on a"):
        dry_run(onnx, "a10g", tmp_path / "engine", weights=EXTERNAL)


def test_the_json_of_a_refusal() -> None:
    budget, gpu = predict(contract_7b(rows=4), FLOAT_BYTES), find_gpu("a10g")
    found = to_json(budget, [gpu], AMPLE, refusal=BuildError("why"))
    assert found["refusal"] == "why"
    assert found["disk_bytes"] == budget.plan_bytes


# ---------------------------------------------------------------- the copy that is kept for the next build


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of plans is on another disk than everything else."""
    monkeypatch.setattr(settle_module, "can_link", lambda source, out: "elsewhere" not in str(out))


def predicted_copy(onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> int:
    words = [str(onnx), "--gpu", "a10g", "--out", str(tmp_path / "engine"), "--dry-run", "--json", *options]
    assert build_command(words) == 0
    return int(json.loads(capsys.readouterr().out)["cache_disk_bytes"])


def test_a_kept_plan_on_another_disk_is_a_copy_that_counts(
    onnx: Path,
    tmp_path: Path,
    apart: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    plan = predict_budget(read_manifest(onnx)).plan_bytes
    assert predicted_copy(onnx, tmp_path, capsys) == plan
    assert predicted_copy(onnx, tmp_path, capsys, "--cache-gb", f"{plan / 1e9}") == plan
    assert predicted_copy(onnx, tmp_path, capsys, "--cache-gb", f"{(plan - 1) / 1e9}") == 0, "it is not kept"
    assert predicted_copy(onnx, tmp_path, capsys, "--no-cache") == 0
    external = predicted_copy(onnx, tmp_path, capsys, "--weights", "external")
    assert 0 < external < plan, "the plan alone is kept"


def test_a_kept_plan_on_the_same_disk_is_a_second_name(
    onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert predicted_copy(onnx, tmp_path, capsys) == 0


def test_the_row_of_the_disk_names_the_copy() -> None:
    rows = rows_7b(EMBEDDED, copy_bytes=0, copy_limit_bytes=20_000_000_000)
    assert rows["disk"] == "14.52 GB, the plan 14.52 GB; 14.52 GB more on the cache's own disk"
    assert rows_7b(EMBEDDED, copy_bytes=0, copy_limit_bytes=14_000_000_000)["disk"].endswith("14.52 GB")


def test_a_cache_without_room_is_told_before_the_build_and_refuses_nothing(
    onnx: Path, tmp_path: Path, apart: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mistral_trt")
    monkeypatch.setattr(
        settle_module, "free_disk_bytes", lambda out: 0 if "elsewhere" in str(out) else 10**12
    )
    cache = EngineCache(tmp_path / "elsewhere")
    settle(onnx, "a10g", tmp_path / "engine", cache=cache)
    (said,) = caplog.messages
    assert re.fullmatch(
        r"predicted: to keep the plan for the next build takes 0.04 GB of the cache's disk, and 0.00 GB is "
        r"free there, so it will not be kept; free some, or set XDG_CACHE_HOME to a folder on another disk",
        said,
    )
    caplog.clear()
    settle(onnx, "a10g", tmp_path / "engine", cache=None)
    assert caplog.messages == []
