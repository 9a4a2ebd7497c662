"""`validate` on an engine, end to end: on a simulated GPU it is run, without one it is reported as it is."""

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mistral_trt.cli import run
from mistral_trt.devices import Device
from mistral_trt.manifest import PLAN_NAME, describe_files, manifest_sha256, read_manifest
from mistral_trt.runtime import device
from mistral_trt.runtime.loading import open_artifact
from mistral_trt.validate import comparison, opening
from mistral_trt.validate.report import page
from mistral_trt.validate.scenarios.poke import poke_probe, questions
from tests.conftest import Folder
from tests.simulated.folder import Machine, machine, write_engine_folder
from tests.simulated.plan import SimulatedPlan, plan_bytes

AUDIT = [
    {"check": "ring writes", "found": "4, each from its past to its present"},
    {"check": "attentions", "found": "2 fused"},
]
CASES = [
    ("tensorrt-rtx", "fp16"),
    ("tensorrt", "fp16"),
    ("tensorrt-rtx", "bf16"),
    pytest.param("tensorrt", "bf16", marks=pytest.mark.slow),
    pytest.param("tensorrt", "fp32", marks=pytest.mark.slow),
]


@dataclass(frozen=True)
class Built:
    """An engine folder, what it was made from, and where its report goes."""

    engine: Path
    onnx: Path
    checkpoint: Path
    out: Path

    def validate(self, *options: object) -> int:
        """The command's exit status; `--onnx` is given unless the options have it."""
        graph = [] if "--onnx" in options else ["--onnx", self.onnx]
        words = [self.engine, *graph, "--reference", self.checkpoint, "--out", self.out, *options]
        return run("validate", [str(word) for word in [*words, "--length", 60]])

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "report.json").read_text())
        return found

    @property
    def failed(self) -> dict[str, str]:
        """Gate → where it failed."""
        return {gate["name"]: gate["where"] for gate in self.record["gates"] if not gate["passed"]}


Build = Callable[..., Built]


@pytest.fixture
def build(onnx_folder: Folder, tiny_checkpoint: Folder, tmp_path: Path) -> Build:
    """build(flavor="tensorrt-rtx", precision="fp16", window=8) -> an engine folder whose manifest says W = 8

    window: of the graph that its plan is of.
    """

    def built(flavor: str = "tensorrt-rtx", precision: str = "fp16", window: int = 8) -> Built:
        onnx = onnx_folder(precision=precision)
        engine = write_engine_folder(onnx, tmp_path / "engine", flavor=flavor)
        if window != 8:
            other = onnx_folder(precision=precision, sliding_window=window)
            (engine / PLAN_NAME).write_bytes(plan_bytes(other))
        made = read_manifest(engine, check_files=None)
        details = {**made.details, "audit": AUDIT}
        replace(made, files=describe_files(engine), details=details).write(engine)
        return Built(engine, onnx, tiny_checkpoint(), tmp_path / "report")

    return built


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No pictures, kernels kept here, and a Polygraphy that is content with everything."""
    monkeypatch.setattr(page, "plots", lambda _: {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    polygraphy(tmp_path, monkeypatch, "exit 0")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "local_device", lambda: None)


def polygraphy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put a script in the place of Polygraphy's command."""
    command = tmp_path / "polygraphy"
    command.write_text(f"#!/bin/sh\n{body}\n")
    command.chmod(0o755)
    monkeypatch.setenv("POLYGRAPHY", str(command))


def on_gpu(monkeypatch: pytest.MonkeyPatch, flavor: str = "tensorrt-rtx") -> Machine:
    found = machine(flavor)
    found.install(monkeypatch)
    return found


# --- on its GPU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flavor", "precision"), CASES)
def test_a_healthy_engine_passes_on_its_gpu(
    build: Build, monkeypatch: pytest.MonkeyPatch, flavor: str, precision: str
) -> None:
    gpu, built = on_gpu(monkeypatch, flavor), build(flavor, precision)
    assert built.validate() == 0, built.failed
    found = built.record
    engine = found["artifact"]["engine"]
    assert engine["executed_on"] == "NVIDIA A10G"
    assert (engine["flavor"], engine["weights"], engine["gpus"]) == (flavor, "embedded", ["a10g"])
    assert engine["manifest_sha256"] == manifest_sha256(built.engine)
    assert engine["audit"] == AUDIT
    assert "The engine ran in TensorRT on NVIDIA A10G" in found["executed"]
    assert {poke["call"] for poke in found["pokes"]} >= {"decode at 24", "chunk 24…27"}
    assert found["quality"]["greedy"]["generated"] == 45
    verdicts = {result["name"]: result["passed"] for result in engine["polygraphy"]}
    assert verdicts == dict.fromkeys(("decode", "prefill"), True if precision == "fp16" else None)
    assert any("Polygraphy compared nothing" in note for note in found["notes"]) == (precision != "fp16")
    assert gpu.device.leaks() == {}
    assert (flavor == "tensorrt") == ("cudaGraphLaunch" in gpu.device.called), "decoded as it is served"


def test_two_openings_of_an_engine_are_never_in_memory_together(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, used = on_gpu(monkeypatch), []

    def opened(folder: Path, **options: Any) -> Any:
        used.append(gpu.device.used_bytes)
        return open_artifact(folder, **options)

    monkeypatch.setattr(opening, "open_artifact", opened)
    assert build().validate() == 0
    assert used == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("window", "gate"),
    [(9, "hidden_slots_seen"), (7, "visible_slots_unseen")],
    ids=["wider", "narrower"],
)
def test_a_plan_of_another_window_is_caught(
    build: Build, monkeypatch: pytest.MonkeyPatch, precision: str, window: int, gate: str
) -> None:
    """The graph beside it is healthy, so only the engine can have shown it."""
    on_gpu(monkeypatch)
    built = build(precision=precision, window=window)
    assert built.validate() == 1
    assert gate in built.failed
    assert built.record["layers"]["first_wrong"] is None


def test_wrong_logits_of_an_engine_are_caught(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(logits: np.ndarray) -> None:
        logits *= np.float32(1.5)

    built = build()
    monkeypatch.setattr(on_gpu(monkeypatch).trt, "_spoil", spoil)
    assert built.validate() == 1
    assert {"logit_error_max", "relative_error_mean"} <= set(built.failed)


@pytest.mark.parametrize("exact", [True, False])
def test_the_poke_probe_waits_for_the_kernels_it_asks(
    build: Build, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    """TensorRT-RTX serves a new shape in a general kernel first, whose last bits are others."""
    on_gpu(monkeypatch)
    monkeypatch.setattr(opening, "open_artifact", lambda *a, **k: open_artifact(*a, **{**k, "exact": exact}))
    with closing(opening.open_engine(build().engine)) as cache:
        asked = questions(cache.contract, 60)
        results = list(poke_probe(cache, asked, tokens=range(60)))
    assert all(result.passed for result in results) == exact


# --- what cannot run ------------------------------------------------------------------------------------


def swap_aliases(plan: SimulatedPlan) -> None:
    first, second = list(plan.aliases)[:2]
    plan.aliases[first], plan.aliases[second] = plan.aliases[second], plan.aliases[first]


def test_a_ring_that_is_written_elsewhere_is_not_run(
    build: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu, built = on_gpu(monkeypatch), build()
    monkeypatch.setattr(gpu.trt, "_alter", swap_aliases)
    assert built.validate() == 2
    assert "present.0.key" in capsys.readouterr().err
    assert not built.out.exists()
    assert gpu.device.leaks() == {}


def test_an_engine_for_another_gpu_is_not_run(
    build: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = build()
    on_gpu(monkeypatch)
    other = Device("NVIDIA H100", 80 * 10**9, "580.65.06", "9.0")
    monkeypatch.setattr(device, "local_device", lambda: other)
    monkeypatch.setattr(comparison, "stored_weights", None)  # it is refused before anything is compared
    assert built.validate() == 2
    assert "was built for NVIDIA A10G (compute capability 8.6)" in capsys.readouterr().err
    assert not built.out.exists()


def test_an_engine_runs_whole(
    build: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = build()
    on_gpu(monkeypatch)
    assert built.validate("--streaming") == 2
    assert "an engine runs whole on its GPU; leave --streaming out" in capsys.readouterr().err


@pytest.mark.usefixtures("no_gpu")
def test_the_graph_of_another_engine_is_refused(
    build: Build, onnx_folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    built = build()
    assert built.validate("--onnx", onnx_folder(precision="fp32")) == 2
    assert f"{built.engine} was not built from" in capsys.readouterr().err


@pytest.mark.usefixtures("no_gpu")
def test_an_engine_alone_is_told_what_it_lacks(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    built = build()
    sides = [built.engine, "--reference", built.checkpoint, "--out", built.out]
    assert run("validate", [str(word) for word in sides]) == 2
    assert "holds a TensorRT engine; name the ONNX folder it was built from" in capsys.readouterr().err


# --- without a GPU --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("streaming", [False, True])
def test_without_a_gpu_the_report_says_so_plainly(
    build: Build, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setattr(opening, "open_engine", partial(pytest.fail, "no engine can be opened here"))
    built = build()
    assert built.validate(*(["--streaming"] if streaming else [])) == 0
    found = built.record
    words = "The engine engine (a10g, tensorrt-rtx) was audited when it was built but not executed"
    engine, html = found["artifact"]["engine"], (built.out / "report.html").read_text()
    assert words in found["executed"] and words in html
    assert engine["executed_on"] is None and engine["polygraphy"] == []
    assert engine["audit"] == AUDIT
    assert all(row["check"] in html and row["found"] in html for row in AUDIT)
    assert engine["manifest_sha256"] in html


# --- Polygraphy -----------------------------------------------------------------------------------------


def test_what_polygraphy_finds_apart_fails_the_engine(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of everything, the layers too."""
    on_gpu(monkeypatch)
    polygraphy(
        tmp_path, monkeypatch, 'case "$*" in *--trt-outputs*inputs.py:prefill*) echo apart; exit 1;; esac'
    )
    built = build()
    assert built.validate("--full") == 1
    assert built.failed == {"calls_failed": "polygraphy layers-prefill"}
    found = built.record["artifact"]["engine"]["polygraphy"]
    assert [result["passed"] for result in found] == [True, True, True, False]
    said = "Polygraphy found engine and ONNX graph apart (layers-prefill). apart"
    assert said in built.record["notes"] and said in (built.out / "report.html").read_text()


def test_without_polygraphy_its_verdict_is_left_out(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch)
    monkeypatch.setenv("POLYGRAPHY", "no-such-command")
    built = build()
    assert built.validate() == 0
    found = built.record["artifact"]["engine"]["polygraphy"]
    assert [result["passed"] for result in found] == [None, None]
    assert any("no-such-command: command not found" in note for note in built.record["notes"])
