"""One engine on its GPU → loaded, compared across the ring's turns, captured and timed.

Everything is teacher-forced and goes through the package's own `RollingCache`, scenarios, poke probe and
gates; only the backend is another.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mistral_trt.devices import Device
from mistral_trt.engines.gpu import find_gpu
from mistral_trt.engines.planning.budget import predict
from mistral_trt.engines.planning.roofline import decode_ceiling, prompt_seconds
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.manifest import Manifest, read_manifest
from mistral_trt.runtime.cache import RollingCache, Step
from mistral_trt.runtime.engine_folder import check_engine_folder, check_machine, read_engine_details
from mistral_trt.runtime.tensorrt.backend import TensorRtBackend, decode_batches
from mistral_trt.runtime.tensorrt.loaded import LoadedEngine
from mistral_trt.validate.budget import DEFAULT
from mistral_trt.validate.findings import ScenarioResult
from mistral_trt.validate.metrics import concatenate, logit_errors
from mistral_trt.validate.opening import openable
from mistral_trt.validate.polygraphy_inputs import input_tokens
from mistral_trt.validate.reference.hugging_face import load_model, run_reference
from mistral_trt.validate.reference.memory import require_memory
from mistral_trt.validate.scenarios.poke import PokeResult, poke_probe, questions
from mistral_trt.validate.scenarios.scenario import Scenario, play, scenarios
from mistral_trt.validate.scenarios.tokens import Tokens
from mistral_trt.validate.trial.artifact_run import run_scenario
from mistral_trt.validate.verdict import gates as table

WARM_STEPS, TIMED_STEPS, TIMED_PROMPTS = 10, 50, 3


@dataclass
class Bench:
    """What the steps of one engine share.  modules: see `gpu_acceptance.accept`.

    backend: once loaded.  plain: the same engine and rings, run without CUDA graphs.
    """

    model: Path
    onnx: Path
    engine: Path
    modules: Callable[[str], tuple[Any, Any]]
    find_device: Callable[[], Device | None]
    length: int | None = None
    backend: TensorRtBackend | None = None
    plain: TensorRtBackend | None = None

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.engine, "engine", check_files=False)

    def cache(self) -> RollingCache:
        """Fresh rows over the loaded engine."""
        assert self.backend is not None
        for row in range(self.backend.contract.max_batch_size):
            self.backend.write_row(row, None)
        bf16 = self.backend.contract.precision == "bf16"
        return RollingCache(_Bfloat16Rows(self.backend) if bf16 else self.backend)

    def tokens(self) -> Tokens:
        tokens = input_tokens(self.onnx, read_manifest(self.onnx, "onnx", check_files=False))
        if self.length is None or self.length >= len(tokens.ids):
            return tokens
        return Tokens(tokens.ids[: self.length], tokens.source, tokens.sha256, tokens.is_text)

    def plans(self, tokens: Tokens) -> list[Scenario]:
        """What is played: token by token from end to end too, where ONNX Runtime is not too slow for it."""
        weights = self.manifest.details["predicted"]["weights_bytes"] // 2
        names = DEFAULT.scenarios(length=len(tokens.ids), weights=weights)
        return scenarios(self.manifest.contract, len(tokens.ids), names=names, seed=0)

    def close(self) -> None:
        if self.backend is not None:
            self.backend.close()
            self.backend = self.plain = None


class _Bfloat16Rows:
    """A bf16 engine whose rings are numbers and not bits, for probes that add to them."""

    def __init__(self, backend: TensorRtBackend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def read_row(self, row: int) -> tuple[Any, ...]:
        return tuple(ring.view(ml_dtypes.bfloat16) for ring in self._backend.read_row(row))


def load(bench: Bench) -> dict[str, Any]:
    """Every check of the loader; then what the runtime does at load, up to the captured decode steps."""
    manifest = read_manifest(bench.engine, "engine")
    check_engine_folder(bench.engine, manifest)
    check_machine(bench.engine, manifest, bench.find_device)
    trt, cudart = bench.modules(read_engine_details(manifest).flavor)
    started = time.perf_counter()
    engine = LoadedEngine(trt, cudart, bench.engine, manifest, cache_dir=bench.engine.parent / "kernels")
    bench.backend = TensorRtBackend(engine)
    loaded = time.perf_counter()
    bench.backend.warm_up()
    warm = time.perf_counter()
    bench.plain = TensorRtBackend(engine, cuda_graphs=False)
    rings = len(manifest.contract.past())
    return {
        "load_s": round(loaded - started, 2),
        "warm_up_s": round(warm - loaded, 2),
        "log": [f"{rings} rings, each present on the memory of its past"],
    }


def against_onnxruntime(bench: Bench) -> dict[str, Any]:
    """Engine and ONNX graph side by side, and the poke probe, which is exact."""
    contract, tokens = bench.manifest.contract, bench.tokens()
    plans = bench.plans(tokens)
    manifest = read_manifest(bench.onnx, "onnx", check_files=False)
    with openable(bench.onnx, manifest, threads=None) as open_graph:
        graph = open_graph()
        results = [side_by_side(graph, bench.cache(), plan, tokens) for plan in plans]
    asked = questions(contract, len(tokens.ids))
    pokes = list(poke_probe(bench.cache(), asked, tokens=tokens.ids))
    return judged(contract.precision, results, pokes)


def against_pytorch(bench: Bench) -> dict[str, Any]:
    """The engine's every position against the checkpoint in float32."""
    contract, tokens = bench.manifest.contract, bench.tokens()
    source = Checkpoint.open(bench.model)
    require_memory(source, len(tokens.ids))
    model = load_model(source, sliding_window=contract.ring.sliding_window)
    reference = run_reference(model, tokens.ids)
    del model
    results = [
        run_scenario(bench.cache(), plan, tokens=tokens, references=[reference]).results[0]
        for plan in bench.plans(tokens)
    ]
    return judged(contract.precision, results, [])


def side_by_side(graph: RollingCache, engine: RollingCache, plan: Scenario, tokens: Tokens) -> ScenarioResult:
    """Play a scenario on both and compare call by call."""
    found = []
    calls = zip(play(graph, plan, tokens=tokens.ids), play(engine, plan, tokens=tokens.ids), strict=True)
    for (positions, expected), (_, logits) in calls:
        targets = tokens.targets[positions]
        found.append(logit_errors(expected, logits, positions=positions, targets=targets))
    return ScenarioResult(plan, concatenate(found), None)


def judged(precision: str, results: Sequence[ScenarioResult], pokes: Sequence[PokeResult]) -> dict[str, Any]:
    """The gates of `mistral-trt validate`, held against what was found; without pokes, theirs left out."""
    measured = dict.fromkeys(table.TITLES) | table.measure(results, pokes)
    gates = [g for g in table.read_gates(precision) if pokes or not g.metric.endswith(("_seen", "_unseen"))]
    verdicts = table.judge(gates, measured)
    failed = [f"{v.title}: {v.measured.value:.3g} at {v.measured.where}" for v in verdicts if not v.passed]
    failed += [f"{result.scenario.name}: {result.failure}" for result in results if result.failure]
    positions = sum(len(result.errors) for result in results)
    summary = f"{positions} positions, {len(pokes)} pokes, {len(verdicts)} gates, {len(failed)} failed"
    figures = {v.name: float(f"{v.measured.value:.4g}") for v in verdicts}
    return {**figures, "failures": failed, "log": [*failed, summary]}


def cuda_graph(bench: Bench) -> dict[str, Any]:
    """A captured decode step and the same step not captured: equal logits, bit for bit, three times."""
    assert bench.backend is not None and bench.plain is not None
    backend, cache, contract = bench.backend, bench.cache(), bench.manifest.contract
    row, tokens = cache.acquire(), bench.tokens().ids
    start = max(0, min(contract.ring.capacity + 1, len(tokens) - 4))
    cache.append(row, tokens[:start])
    before = cache.snapshot(row).rings
    steps = [_step([tokens[p]], [p]) for p in range(start, min(start + 3, len(tokens)))]
    expected = [bench.plain.run(step) for step in steps]
    backend.write_row(row, before)
    replayed = [backend.run(step) for step in steps]
    differ = [
        f"position {start + i}: the replayed step's logits differ"
        for i, (a, b) in enumerate(zip(expected, replayed, strict=True))
        if not np.array_equal(a.view(np.uint32), b.view(np.uint32))
    ]
    return {
        "steps": len(steps),
        "failures": differ,
        "log": differ or [f"{len(steps)} steps, equal bit for bit"],
    }


def speed(bench: Bench) -> dict[str, Any]:
    """Tokens/s of full rings, and the time to the first tokens, at B = 1, 2, 4, …, beside the rooflines."""
    contract, tokens = bench.manifest.contract, bench.tokens().ids
    prompt = tokens[: min(contract.ring.sliding_window, len(tokens) - 1)]
    most = contract.max_batch_size
    batches = decode_batches(most)
    measured = []
    for batch in batches:
        first, every = first_tokens(bench, prompt, batch)
        rates = decode_rates(bench, tokens[len(prompt)], len(prompt), batch)
        measured.append({"batch": batch, **rates, "first_token_ms": first, "every_first_token_ms": every})
    found = [{**figures, **beside(bench.manifest, len(prompt), figures)} for figures in measured]
    return {"prompt_tokens": len(prompt), "batches": found, "log": [_words(figures) for figures in found]}


def first_tokens(bench: Bench, prompt: Sequence[int], batch: int) -> tuple[float, float]:
    """Milliseconds from the arrival of `batch` equal prompts to the first row's logits and to the last's.

    Prompts are taken one row after another, as the engine's prefill has one row; the median of several times.
    """
    times = []
    for _ in range(1 + TIMED_PROMPTS):  # the first is not counted
        cache = bench.cache()
        rows, arrived = cache.acquire_rows(batch), time.perf_counter()
        ends = []
        for row in rows:
            cache.append(row, prompt)
            ends.append(time.perf_counter())
        times.append((ends[0] - arrived, ends[-1] - arrived))
    first, every = (1e3 * statistics.median(column) for column in zip(*times[1:], strict=True))
    return round(first, 3), round(every, 3)


def decode_rates(bench: Bench, token: int, position: int, batch: int) -> dict[str, float]:
    """Tokens/s of the first `batch` rows, which hold a prompt: step by step, and by CUDA graph."""
    assert bench.backend is not None and bench.plain is not None
    step = _step([token] * batch, [position] * batch)
    rates = {}
    for name, backend in (("tokens_per_s", bench.plain), ("tokens_per_s_graph", bench.backend)):
        rates[name] = _rate(lambda backend=backend: backend.run(step), batch)
    return rates


def beside(manifest: Manifest, prompt_tokens: int, figures: Mapping[str, float]) -> dict[str, float]:
    """The predicted rooflines of a batch, and how much of each was reached, in percent."""
    gpu = find_gpu(manifest.details["gpus"][0])
    budget = predict(manifest.contract, manifest.details["predicted"]["weights_bytes"])
    rows = int(figures["batch"])
    ceiling = decode_ceiling(budget, gpu, rows)
    prefill_ms = 1e3 * prompt_seconds(budget, gpu, prompt_tokens)
    best = max(figures["tokens_per_s"], figures["tokens_per_s_graph"])
    return {
        "decode_roofline_tokens_per_s": round(ceiling, 1),
        "decode_percent": round(100 * best / ceiling, 1),
        "first_token_roofline_ms": round(prefill_ms, 3),
        "first_token_percent": round(100 * prefill_ms / figures["first_token_ms"], 1),
        "every_first_token_roofline_ms": round(rows * prefill_ms, 3),
        "every_first_token_percent": round(100 * rows * prefill_ms / figures["every_first_token_ms"], 1),
    }


def _rate(call: Callable[[], Any], batch: int) -> float:
    """Tokens/s of the median of TIMED_STEPS calls, upload and download included."""
    for _ in range(WARM_STEPS):
        call()
    times = []
    for _ in range(TIMED_STEPS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return round(batch / statistics.median(times), 1)


def _words(figures: Mapping[str, float]) -> str:
    graph, plain, first, every = (
        f"{figures[name]:.1f}"
        for name in ("tokens_per_s_graph", "tokens_per_s", "first_token_ms", "every_first_token_ms")
    )
    decode, one, all_of_them = (
        f"{figures[f'{name}_percent']:g} %" for name in ("decode", "first_token", "every_first_token")
    )
    return (
        f"B={figures['batch']}: {graph} tokens/s by CUDA graph, {plain} without, {decode} of the roofline; "
        f"first token after {first} ms ({one}), every row's after {every} ms ({all_of_them})"
    )


def _step(tokens: Sequence[int], positions: Sequence[int]) -> Step:
    """A decode step of rows 0…B-1."""
    column = [np.asarray(values, np.int64)[:, None] for values in (tokens, positions)]
    return Step(column[0], column[1], np.zeros_like(column[0]), 0)
