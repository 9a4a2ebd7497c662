"""GPU acceptance: real where no GPU is needed, on a simulated device where one is; every check can fail."""

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mistral_trt.devices import Device
from mistral_trt.engines.gpu import find_gpu
from mistral_trt.engines.planning.budget import predict
from mistral_trt.engines.planning.roofline import decode_ceiling, prompt_seconds
from mistral_trt.errors import EngineMismatchError
from mistral_trt.manifest import read_manifest
from mistral_trt.runtime import engine_folder
from mistral_trt.runtime.cache import RollingCache
from tests.models import write_checkpoint
from tests.simulated import tensorrt as doubles
from tests.simulated.folder import Machine, machine, write_engine_folder

pytestmark = pytest.mark.usefixtures("one_trace")

Folder = Callable[..., Path]

BENCH = Path(__file__).parent.parent / "bench"
A10G = Device("NVIDIA A10G", 24 << 30, "580.65.06", "8.6")
SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """bench.checks is bench/gpu_checks.py, and so on; they are no part of the package."""
    sys.path.insert(0, str(BENCH))
    try:
        names = ("checks", "report", "acceptance")
        yield SimpleNamespace(**{name: importlib.import_module(f"gpu_{name}") for name in names})
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("gpu") / "checkpoint", **SHAPE)


@pytest.fixture(scope="module")
def onnx(checkpoint: Path) -> Path:
    from mistral_trt.export.onnx_folder import export_checkpoint

    folder = checkpoint.parent / "onnx"
    export_checkpoint(checkpoint, folder, precision="fp16", prefill_chunk=4, max_batch_size=3)
    return folder


FLAVOR = "tensorrt-rtx"


@pytest.fixture
def engine(onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine folder that the simulation can run, with ceilings that a build predicts."""
    return engine_folder_of(onnx, tmp_path / "engine", FLAVOR, monkeypatch)


def engine_folder_of(onnx: Path, out: Path, flavor: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_engine_folder(onnx, out, flavor=flavor)
    manifest = read_manifest(out)
    ceilings = {"decode_tokens_per_s": 1e4, "decode_all_rows_tokens_per_s": 3e4}
    predicted = {**manifest.details["predicted"], "ceilings": {"a10g": ceilings}}
    replace(manifest, details={**manifest.details, "predicted": predicted}).write(out)
    monkeypatch.setattr(engine_folder, "installed_version", lambda _: manifest.details["tensorrt"])
    return out


@pytest.fixture
def simulated() -> Machine:
    return machine(FLAVOR)


def modules_of(gpu: Machine) -> Callable[[str], tuple[Any, Any]]:
    return lambda flavor: (gpu.trt, gpu.cudart)


def open_bench(bench: Any, checkpoint: Path, onnx: Path, engine: Path, gpu: Machine) -> Any:
    """A Bench whose engine is loaded, over 60 positions (R = 12)."""
    opened = bench.checks.Bench(checkpoint, onnx, engine, modules_of(gpu), lambda: A10G, 60)
    bench.checks.load(opened)
    return opened


@pytest.fixture
def loaded(bench: Any, checkpoint: Path, onnx: Path, engine: Path, simulated: Machine) -> Iterator[Any]:
    opened = open_bench(bench, checkpoint, onnx, engine, simulated)
    yield opened
    opened.close()
    assert simulated.device.leaks() == {}


# --- the checks ----------------------------------------------------------------------------------------


def test_the_checks_hold_on_a_sound_engine(bench: Any, loaded: Any) -> None:
    found = bench.checks.against_onnxruntime(loaded)
    assert found["failures"] == [] and found["logit_error_max"] < 2e-5 and found["hidden_slots_seen"] == 0
    assert re.search(r"280 positions, \d\d+ pokes, \d gates, 0 failed", found["log"][-1])
    found = bench.checks.against_pytorch(loaded)
    assert found["failures"] == [] and 0 < found["logit_error_max"] < 0.5
    assert "hidden_slots_seen" not in found and loaded.backend.ready
    assert bench.checks.cuda_graph(loaded)["log"] == ["3 steps, equal bit for bit"]


def test_wrong_logits_fail_every_comparison(bench: Any, loaded: Any, simulated: Machine) -> None:
    def spoil(logits: np.ndarray) -> None:
        logits[..., 0] += 3

    simulated.trt._spoil = spoil
    for check in (bench.checks.against_onnxruntime, bench.checks.against_pytorch):
        assert any("Logit error, largest" in line for line in check(loaded)["failures"])


def test_a_graph_that_differs_from_its_step_fails(
    bench: Any, checkpoint: Path, onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In full TensorRT, whose graphs are launched by hand and so can be told apart here."""
    folder, gpu = engine_folder_of(onnx, tmp_path / "full", "tensorrt", monkeypatch), machine("tensorrt")
    loaded = open_bench(bench, checkpoint, onnx, folder, gpu)

    def spoil(logits: np.ndarray) -> None:
        if gpu.device.called[-2:] == ["cudaGraphLaunch", "cudaStreamSynchronize"]:
            logits.view(np.uint32)[..., 5] ^= 1

    assert bench.checks.cuda_graph(loaded)["failures"] == []
    gpu.trt._spoil = spoil
    assert len(bench.checks.cuda_graph(loaded)["failures"]) == 3
    loaded.close()


def test_bfloat16_rings_are_numbers_to_the_probes(bench: Any) -> None:
    """The runtime has their bits; to add 3.0 to those would poke nothing."""
    rings = (np.full((2, 3, 4), 1.5, ml_dtypes.bfloat16),)
    bits = SimpleNamespace(read_row=lambda row: tuple(r.view(np.uint16) for r in rings), contract="its")
    numbers = bench.checks._Bfloat16Rows(bits)
    np.testing.assert_array_equal(numbers.read_row(0)[0], rings[0])
    assert numbers.contract == "its"


def test_the_speed_has_every_batch_beside_its_rooflines(
    bench: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.checks, "TIMED_STEPS", 3)
    found = bench.checks.speed(loaded)
    assert [figures["batch"] for figures in found["batches"]] == [1, 2, 3]
    assert found["prompt_tokens"] == 8 and len(found["log"]) == 3
    contract, weights = loaded.manifest.contract, loaded.manifest.details["predicted"]["weights_bytes"]
    budget, gpu = predict(contract, weights), find_gpu("a10g")
    prompt_ms = 1e3 * prompt_seconds(budget, gpu, 8)
    for figures in found["batches"]:
        batch, best = figures["batch"], max(figures["tokens_per_s"], figures["tokens_per_s_graph"])
        ceiling = decode_ceiling(budget, gpu, batch)
        assert figures["decode_roofline_tokens_per_s"] == round(ceiling, 1)
        assert figures["decode_percent"] == round(100 * best / ceiling, 1)
        assert 0 < figures["first_token_ms"] <= figures["every_first_token_ms"]
        assert figures["first_token_roofline_ms"] == round(prompt_ms, 3)
        assert figures["every_first_token_roofline_ms"] == round(batch * prompt_ms, 3)
        share = 100 * prompt_ms / figures["first_token_ms"]
        assert figures["first_token_percent"] == round(share, 1)


class Clock:
    """Time that passes only when a test says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_prompts_that_arrive_together_are_timed_from_their_arrival(
    bench: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    clock, fed = Clock(), []
    append = RollingCache.append

    def slow(cache: RollingCache, row: int, tokens: Any) -> Any:
        fed.append((row, len(tokens)))
        clock.now += 2.0
        return append(cache, row, tokens)

    monkeypatch.setattr(bench.checks, "time", clock)
    monkeypatch.setattr(RollingCache, "append", slow)
    prompt = loaded.tokens().ids[:8]
    assert bench.checks.first_tokens(loaded, prompt, batch) == (2000.0, 2000.0 * batch)
    assert fed == [(row, 8) for row in range(batch)] * (1 + bench.checks.TIMED_PROMPTS)


def test_each_batch_has_its_own_roofline(bench: Any, loaded: Any) -> None:
    """Twice the time for the same rows is half the percentage."""
    figures = {"batch": 2, "tokens_per_s": 10.0, "tokens_per_s_graph": 20.0}
    times = {"first_token_ms": 1.0, "every_first_token_ms": 4.0}
    slower = {"first_token_ms": 2.0, "every_first_token_ms": 8.0}
    one, two = (bench.checks.beside(loaded.manifest, 8, {**figures, **both}) for both in (times, slower))
    for name in ("first_token_percent", "every_first_token_percent"):
        assert two[name] == pytest.approx(one[name] / 2, abs=0.1)
    assert one["every_first_token_roofline_ms"] == pytest.approx(2 * one["first_token_roofline_ms"], abs=2e-3)
    assert one["decode_percent"] == two["decode_percent"]


def test_the_report_shows_each_measurement_beside_its_roofline(bench: Any) -> None:
    figures = {name: float(10 + index) for index, (_, name) in enumerate(bench.report.SPEEDS)}
    step = {"name": "speed, x", "figures": {"prompt_tokens": 4096, "batches": [{**figures, "batch": 8}]}}
    page = "".join(bench.report._speeds(step))
    cells = re.findall(r'<td class="number">([\d.,]+)</td>', page)
    assert cells == ["8", *(f"{10.0 + index}" for index in range(1, len(bench.report.SPEEDS)))]
    assert page.count("predicted roofline") == 3 and "Prompts of 4096 tokens arrive together" in page


# --- the steps -----------------------------------------------------------------------------------------


@pytest.fixture
def prepared(
    bench: Any, engine: Path, onnx: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """A job whose export and build are there already: what is tested is what follows."""
    job = bench.acceptance.Job(checkpoint, "a10g", "fp16", tmp_path / "out", length=40)
    job.out.mkdir()
    (job.out / "onnx").symlink_to(onnx)
    (job.out / "engines").mkdir()
    (job.out / "engines" / "tensorrt-rtx").symlink_to(engine)
    commands: list[tuple[str, ...]] = []

    def command(*arguments: str, check: bool = False) -> Any:
        commands.append(arguments)
        return SimpleNamespace(returncode=0, stdout="{}", stderr="")

    monkeypatch.setattr(bench.acceptance, "command", command)
    monkeypatch.setattr(bench.checks, "TIMED_STEPS", 2)
    monkeypatch.setattr(bench.acceptance, "FULL", SimpleNamespace(name="tensorrt", installed=False))
    monkeypatch.setattr(bench.acceptance, "RTX", SimpleNamespace(name="tensorrt-rtx", installed=True))
    return SimpleNamespace(job=job, commands=commands)


def test_on_the_gpu_every_step_is_done(bench: Any, prepared: Any, simulated: Machine) -> None:
    report = bench.acceptance.accept(prepared.job, lambda: A10G, modules_of(simulated))
    assert report["verdict"] == "passed", report
    states = {step["name"]: step["status"] for step in report["steps"]}
    assert states.pop("build with tensorrt") == "not-run" and set(states.values()) == {"done"}
    assert list(states)[3:] == [f"{name}, tensorrt-rtx" for name, _ in bench.acceptance.GPU_STEPS]
    assert json.loads((prepared.job.out / "gpu-report.json").read_text()) == report
    page = (prepared.job.out / "gpu-report.html").read_text()
    assert '<h1 class="passed">Passed: every step ran' in page and "<h2>speed, tensorrt-rtx</h2>" in page
    assert "prefers-color-scheme: dark" in page and "http" not in page
    assert simulated.device.leaks() == {}


def test_without_a_gpu_it_goes_as_far_as_it_can_and_says_so(
    bench: Any, prepared: Any, simulated: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    report = bench.acceptance.accept(prepared.job, lambda: None, modules_of(simulated))
    assert report["verdict"] == "needs-gpu" and bench.acceptance.EXIT["needs-gpu"] == 3
    needing = [step for step in report["steps"] if step["status"] == "needs-gpu"]
    assert len(needing) == len(bench.acceptance.GPU_STEPS)
    for step in needing:
        assert step["log"] == ["needs an NVIDIA GPU (NVIDIA A10G), and this machine has none: not run"]
    page = (prepared.job.out / "gpu-report.html").read_text()
    assert "Not decided: the steps that need the GPU were not run" in page and "no NVIDIA GPU" in page


def test_another_gpu_does_not_count(bench: Any) -> None:
    l4 = Device("NVIDIA L4", 24 << 30, "580", "8.9")
    target = find_gpu("a10g")
    assert bench.acceptance.missing(target, l4) == (
        "needs an NVIDIA A10G, and this machine has an NVIDIA L4: not run"
    )
    assert bench.acceptance.missing(target, A10G) is None


def test_a_failed_check_fails_the_whole_and_the_rest_still_runs(
    bench: Any, prepared: Any, simulated: Machine
) -> None:
    def spoil(logits: np.ndarray) -> None:
        logits[...] = np.nan

    simulated.trt._spoil = spoil
    report = bench.acceptance.accept(prepared.job, lambda: A10G, modules_of(simulated))
    assert report["verdict"] == "failed" and bench.acceptance.EXIT["failed"] == 1
    states = {step["name"].split(",")[0]: step["status"] for step in report["steps"]}
    assert states["load"] == "done" and states["compare with PyTorch"] == "failed"
    assert states["compare with ONNX Runtime"] == "failed"
    assert simulated.device.leaks() == {}


def test_an_engine_that_does_not_load_stops_its_own_steps(
    bench: Any, prepared: Any, simulated: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doubles._Runtime, "deserialize_cuda_engine", lambda *arguments: None)
    report = bench.acceptance.accept(prepared.job, lambda: A10G, modules_of(simulated))
    assert report["verdict"] == "failed"
    assert [step["status"] for step in report["steps"]][-5:] == ["failed", *["not-run"] * 4]
    assert report["steps"][-1]["log"] == ["the engine did not load"]


def test_the_command_line_prints_the_steps_and_returns_the_status(
    bench: Any, prepared: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [{"name": "export", "status": "done", "log": ["1 GB"]}]
    report = {"verdict": "needs-gpu", "steps": steps}
    monkeypatch.setattr(bench.acceptance, "accept", lambda job: report)
    assert bench.acceptance.main(["model", "--gpu", "a10g", "--out", "there"]) == 3
    assert capsys.readouterr().out == "done      export  1 GB\nneeds-gpu: there/gpu-report.html\n"


def test_a_machine_that_does_not_say_which_gpu_comes_first_is_a_usage_error(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ("NVIDIA A10G, 23028, 580, 8.6, GPU-1", "NVIDIA L4, 23034, 580, 8.9, GPU-2")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    assert bench.acceptance.main(["model", "--gpu", "a10g", "--out", str(tmp_path / "o")]) == 2
    assert "run: export CUDA_DEVICE_ORDER=PCI_BUS_ID" in capsys.readouterr().err


def test_an_unknown_gpu_is_a_usage_error(bench: Any, tmp_path: Path, capsys: Any) -> None:
    arguments = ["model", "--gpu", "voodoo", "--out", str(tmp_path / "o")]
    assert bench.acceptance.main(arguments) == 2
    assert "unknown GPU 'voodoo'" in capsys.readouterr().err


@pytest.mark.slow
def test_what_needs_no_gpu_is_done_for_real(bench: Any, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    job = bench.acceptance.Job(
        checkpoint, "a10g", "fp16", tmp_path / "out", export=("--prefill-chunk", "4", "--max-batch-size", "2")
    )
    report = bench.acceptance.accept(job, lambda: None)
    states = {step["name"].split(",")[0]: step["status"] for step in report["steps"]}
    assert states["environment"] == states["export"] == states["build with tensorrt-rtx"] == "done", report
    assert report["verdict"] == "needs-gpu"
    built = tmp_path / "out" / "engines" / "tensorrt-rtx"
    manifest = read_manifest(built, "engine")
    engine_folder.check_engine_folder(built, manifest)
    engine_folder.check_machine(built, manifest, lambda: A10G)
    with pytest.raises(EngineMismatchError, match="this machine has no NVIDIA GPU"):
        engine_folder.check_machine(built, manifest, lambda: None)
