"""GPU acceptance: real where no GPU is needed, on a simulated device where one is; every check can fail."""

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mistral_trt.devices import Device
from mistral_trt.engines.gpu import find_gpu
from mistral_trt.engines.planning.budget import predict
from mistral_trt.engines.planning.roofline import decode_ceiling, prompt_seconds
from mistral_trt.engines.versions import install_command
from mistral_trt.errors import EngineMismatchError, MissingDependencyError
from mistral_trt.manifest import Manifest, describe_files, read_manifest
from mistral_trt.runtime import engine_folder
from mistral_trt.runtime.cache import RollingCache, Step
from mistral_trt.runtime.engine import open_cache
from mistral_trt.weight_index import RefitWeight, write_weight_index
from tests.models import write_checkpoint
from tests.simulated_gpu import SimulatedContext, SimulatedCuda, SimulatedTensorRT

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
    """bench.runner is bench/gpu_runner.py, and so on; they are no part of the package."""
    sys.path.insert(0, str(BENCH))
    try:
        names = ("runner", "checks", "report", "acceptance")
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


@pytest.fixture
def engine(onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine folder whose plan is a word: the simulation runs the ONNX graph for any."""
    monkeypatch.setattr(engine_folder, "installed_version", lambda _: "1.7.1.116")
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / "model.plan").write_bytes(b"a plan")
    described(folder, onnx).write(folder)
    return folder


def described(folder: Path, onnx: Path, weights: str = "embedded") -> Manifest:
    made = read_manifest(onnx)
    predicted = {
        "weights_bytes": made.details["weights_bytes"],
        "ring_bytes_per_row": made.contract.ring_bytes_per_row,
        "max_batch_size": 3,
        "device_bytes": 10**9,
        "ceilings": {"a10g": {"decode_tokens_per_s": 1e4, "decode_all_rows_tokens_per_s": 3e4}},
    }
    return Manifest(
        stage="engine",
        files=describe_files(folder),
        sources=made.sources,
        contract=made.contract,
        versions=made.versions,
        details={
            "gpus": ["a10g"],
            "gpu_name": "NVIDIA A10G",
            "compute_capabilities": ["8.6"],
            "flavor": "tensorrt-rtx",
            "tensorrt": "1.7.1.116",
            "weights": weights,
            "predicted": predicted,
        },
    )


@pytest.fixture
def simulated(onnx: Path) -> tuple[SimulatedTensorRT, SimulatedCuda]:
    cudart = SimulatedCuda()
    return SimulatedTensorRT(cudart, onnx, read_manifest(onnx).contract), cudart


@pytest.fixture
def backend(bench: Any, engine: Path, simulated: Any) -> Iterator[Any]:
    trt, cudart = simulated
    opened = bench.runner.EngineBackend(trt, cudart, engine, trt.contract)
    yield opened
    opened.close()
    assert not cudart.memory and not cudart.streams and not cudart.graphs


@pytest.fixture
def loaded(bench: Any, checkpoint: Path, onnx: Path, engine: Path, simulated: Any) -> Iterator[Any]:
    """A Bench whose engine is loaded, over 60 positions (R = 12)."""
    opened = bench.checks.Bench(checkpoint, onnx, engine, lambda _: simulated, lambda: A10G, 60)
    bench.checks.load(opened)
    yield opened
    opened.close()


# --- the runner ----------------------------------------------------------------------------------------


def test_the_runner_gives_what_onnxruntime_gives_across_the_wrap(backend: Any, onnx: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 97, 40).tolist()
    graph, device = open_cache(onnx), RollingCache(backend)
    rows = [cache.acquire_rows(3) for cache in (graph, device)]
    for row in (2, 0, 1):
        expected, found = (cache.append(row, tokens[row:30], all_logits=True) for cache in (graph, device))
        np.testing.assert_array_equal(found, expected)
    for position in range(30, 40):
        feed = dict.fromkeys(rows[0], tokens[position])
        expected_rows, found_rows = graph.step(feed), device.step(feed)
        for row in feed:
            np.testing.assert_array_equal(found_rows[row], expected_rows[row])
    for ours, theirs in zip(device.snapshot(1).rings, graph.snapshot(1).rings, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_row_is_written_and_read_where_it_lies(backend: Any) -> None:
    rings = [np.full((3, 12, 64), value, np.float16) for value in range(1, 5)]
    backend.write_row(1, rings)
    for before, after in zip(rings, backend.read_row(1), strict=True):
        np.testing.assert_array_equal(before, after)
    assert not any(ring.any() for row in (0, 2) for ring in backend.read_row(row))
    backend.write_row(1, None)
    assert not any(ring.any() for ring in backend.read_row(1))


def test_a_captured_step_replays_with_other_tokens(backend: Any, simulated: Any) -> None:
    def step(token: int, position: int) -> Step:
        return Step(np.array([[token]]), np.array([[position]]), np.array([[0]]), 0)

    expected = [backend.run(step(token, token)) for token in range(3)]
    backend.write_row(0, None)
    captured = backend.capture(step(0, 0))
    found = [backend.replay(captured, step(token, token)) for token in range(3)]
    np.testing.assert_array_equal(found, expected)
    assert simulated[1].launched == 3
    with pytest.raises(ValueError, match="expected a decode step of 1 rows"):
        backend.replay(captured, Step(np.zeros((2, 1), int), np.zeros((2, 1), int), np.zeros((2, 1), int), 0))
    backend.discard(captured)


@pytest.mark.parametrize("ends", [True, False])
def test_what_breaks_a_capture_is_what_is_told(
    backend: Any, simulated: Any, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """CUDA then refuses to end the capture as well; that is no news, and the stream must be free again."""
    cudart = simulated[1]
    step = Step(np.array([[1]]), np.array([[0]]), np.array([[0]]), 0)
    expected = backend.run(step)

    def refuse(context: Any, stream_handle: int) -> bool:
        if ends:
            cudart.streams[stream_handle].add(lambda: None)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(SimulatedContext, "execute_async_v3", refuse)
        patch.setattr(cudart, "cudaGraphDestroy", lambda graph: (0,))
        with pytest.raises(
            EngineMismatchError, match="^TensorRT did not execute the step; its log says why$"
        ):
            backend.capture(step)
    backend.write_row(0, None)
    np.testing.assert_array_equal(backend.run(step), expected)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda trt, cuda: setattr(trt, "loads", False), "cannot load .*model.plan"),
        (
            lambda trt, cuda: trt.aliases.pop("present.1.key"),
            "expected present.1.key on the memory of past_k",
        ),
        (lambda trt, cuda: setattr(cuda, "cudaMalloc", lambda size: (1, 0)), "CUDA: cudaMalloc gave 1"),
    ],
    ids=["no plan", "no alias", "no memory"],
)
def test_an_engine_that_cannot_be_used_is_told(
    bench: Any, engine: Path, simulated: Any, spoil: Callable[[Any, Any], Any], words: str
) -> None:
    spoil(*simulated)
    with pytest.raises(EngineMismatchError, match=words):
        bench.runner.EngineBackend(*simulated, engine, simulated[0].contract)


def test_a_call_outside_its_profile_is_told(backend: Any) -> None:
    five = np.arange(5)[None]
    with pytest.raises(EngineMismatchError, match=r"does not take input_ids as \[1, 5\]"):
        backend.run(Step(five, five, np.array([[4]]), 0))


def test_a_plan_without_weights_is_refitted(bench: Any, engine: Path, simulated: Any) -> None:
    (engine / "w.data").write_bytes(np.arange(6, dtype=np.float16).tobytes())
    write_weight_index(engine, [RefitWeight("w", "float16", (2, 3), "w.data", 0, 12)])
    trt, taken = simulated[0], {}

    class Refitter:
        missing: tuple[str, ...] = ()

        def __init__(self, engine: Any, logger: Any) -> None: ...

        def set_named_weights(self, name: str, weights: tuple[str, int, int]) -> bool:
            dtype, address, count = weights
            taken[name] = (
                dtype,
                count,
                np.ctypeslib.as_array(_halves(address, count)).view(np.float16).tolist(),
            )
            return True

        def get_missing_weights(self) -> tuple[str, ...]:
            return self.missing

        def refit_cuda_engine(self) -> bool:
            return True

    trt.Refitter, trt.Weights = Refitter, lambda *values: values
    trt.DataType = SimpleNamespace(HALF="HALF")
    bench.runner.EngineBackend(*simulated, engine, trt.contract).close()
    assert taken == {"w": ("HALF", 6, [0, 1, 2, 3, 4, 5])}
    Refitter.missing = ("v",)
    with pytest.raises(EngineMismatchError, match=r"did not refit the plan; missing: \['v'\]"):
        bench.runner.EngineBackend(*simulated, engine, trt.contract)


def _halves(address: int, count: int) -> Any:
    import ctypes

    return (ctypes.c_uint16 * count).from_address(address)


@pytest.mark.parametrize(
    ("module", "missing", "command"),
    [
        ("tensorrt", "tensorrt", install_command("tensorrt")),
        ("tensorrt_rtx", "tensorrt_rtx", install_command("tensorrt-rtx")),
        ("tensorrt_rtx", "cuda.bindings.runtime", "pip install cuda-bindings"),
    ],
)
def test_a_missing_module_is_told_with_what_brings_it(
    bench: Any, monkeypatch: pytest.MonkeyPatch, module: str, missing: str, command: str
) -> None:
    def load(name: str) -> Any:
        if name == missing:
            raise ModuleNotFoundError(name)
        return name

    monkeypatch.setattr(bench.runner, "import_module", load)
    with pytest.raises(
        MissingDependencyError, match=f"^{re.escape(missing)} is not installed; run: "
    ) as error:
        bench.runner.load_gpu(module)
    assert str(error.value).endswith(f"run: {command}")


def test_every_call_exists_in_the_installed_tensorrt() -> None:
    """The half of the API that the simulation stands for."""
    trt = pytest.importorskip("tensorrt_rtx")
    names = {
        trt.ICudaEngine: "get_tensor_name get_tensor_mode num_io_tensors "
        "num_optimization_profiles get_aliased_input_tensor create_execution_context",
        trt.IExecutionContext: "set_optimization_profile_async set_input_shape "
        "set_tensor_address infer_shapes is_stream_capturable execute_async_v3",
        trt.Refitter: "set_named_weights get_missing_weights refit_cuda_engine",
        trt.Runtime: "deserialize_cuda_engine",
        trt.DataType: "FLOAT HALF BF16 INT8 INT4 FP8",
        trt.TensorIOMode: "INPUT OUTPUT",
        trt.Logger: "WARNING",
    }
    for owner, members in names.items():
        assert [name for name in members.split() if not hasattr(owner, name)] == []


# --- the checks ----------------------------------------------------------------------------------------


def test_the_checks_hold_on_a_sound_engine(bench: Any, loaded: Any) -> None:
    found = bench.checks.against_onnxruntime(loaded)
    assert found["failures"] == [] and found["logit_error_max"] == 0 and found["hidden_slots_seen"] == 0
    assert re.search(r"240 positions, \d\d+ pokes, \d gates, 0 failed", found["log"][-1])
    found = bench.checks.against_pytorch(loaded)
    assert found["failures"] == [] and 0 < found["logit_error_max"] < 0.5
    assert "hidden_slots_seen" not in found
    assert bench.checks.cuda_graph(loaded)["log"] == ["3 steps, equal bit for bit"]


def test_wrong_logits_fail_every_comparison(bench: Any, loaded: Any, simulated: Any) -> None:
    def spoil(logits: np.ndarray) -> None:
        logits[..., 0] += 3

    simulated[0].fault = spoil
    for check in (bench.checks.against_onnxruntime, bench.checks.against_pytorch):
        assert any("Logit error, largest" in line for line in check(loaded)["failures"])


def test_a_graph_that_differs_from_its_step_fails(bench: Any, loaded: Any, simulated: Any) -> None:
    trt, cudart = simulated

    def spoil(logits: np.ndarray) -> None:
        if cudart.launched:
            logits.view(np.uint32)[..., 5] ^= 1

    trt.fault = spoil
    assert len(bench.checks.cuda_graph(loaded)["failures"]) == 3


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


def test_on_the_gpu_every_step_is_done(bench: Any, prepared: Any, simulated: Any) -> None:
    report = bench.acceptance.accept(prepared.job, lambda: A10G, lambda _: simulated)
    assert report["verdict"] == "passed", report
    states = {step["name"]: step["status"] for step in report["steps"]}
    assert states.pop("build with tensorrt") == "not-run" and set(states.values()) == {"done"}
    assert list(states)[3:] == [f"{name}, tensorrt-rtx" for name, _ in bench.acceptance.GPU_STEPS]
    assert json.loads((prepared.job.out / "gpu-report.json").read_text()) == report
    page = (prepared.job.out / "gpu-report.html").read_text()
    assert '<h1 class="passed">Passed: every step ran' in page and "<h2>speed, tensorrt-rtx</h2>" in page
    assert "prefers-color-scheme: dark" in page and "http" not in page
    assert not simulated[1].memory


def test_without_a_gpu_it_goes_as_far_as_it_can_and_says_so(
    bench: Any, prepared: Any, simulated: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    report = bench.acceptance.accept(prepared.job, lambda: None, lambda _: simulated)
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
    bench: Any, prepared: Any, simulated: Any
) -> None:
    def spoil(logits: np.ndarray) -> None:
        logits[...] = np.nan

    simulated[0].fault = spoil
    report = bench.acceptance.accept(prepared.job, lambda: A10G, lambda _: simulated)
    assert report["verdict"] == "failed" and bench.acceptance.EXIT["failed"] == 1
    states = {step["name"].split(",")[0]: step["status"] for step in report["steps"]}
    assert states["load"] == "done" and states["compare with PyTorch"] == "failed"
    assert states["compare with ONNX Runtime"] == "failed"
    assert not simulated[1].memory


def test_an_engine_that_does_not_load_stops_its_own_steps(bench: Any, prepared: Any, simulated: Any) -> None:
    simulated[0].loads = False
    report = bench.acceptance.accept(prepared.job, lambda: A10G, lambda _: simulated)
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
    engine_folder.check_engine_folder(built, manifest, lambda: A10G, plan_hashed=False)
    with pytest.raises(EngineMismatchError, match="this machine has no NVIDIA GPU"):
        engine_folder.check_engine_folder(built, manifest, lambda: None)
