"""The runtime's bench: what a step is, what overhead, what a gap; each bound with a fault that breaks it.

No time of a healthy engine is judged here, where other tests run beside; planted faults are far over a bound.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer

from mistral_trt.runtime import Engine, SamplingParams
from mistral_trt.runtime.onnxruntime_backend import OnnxRuntimeBackend
from mistral_trt.runtime.scheduling.continuous_batch import ContinuousBatch
from mistral_trt.runtime.text.tokenizer import Tokenizer
from tests.conftest import Folder

BENCH = Path(__file__).parent.parent / "bench"
MODULES = ("runtime", "runtime_model", "runtime_peer", "runtime_rhythm", "runtime_steps")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """bench.runtime_steps is bench/runtime_steps.py, and so on; they are no part of the package."""
    sys.path.insert(0, str(BENCH))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def settings(
    bench: Any, tiny_checkpoint: Folder, onnx_folder: Folder, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Every part, as short as can be, on the tests' own model: two rows, W = 8."""
    text = {"tokenizer": True, "vocab_size": 259, "num_hidden_layers": 1}
    checkpoint, artifact = tiny_checkpoint(**text), onnx_folder(max_batch_size=2, **text)
    scratch = tmp_path_factory.mktemp("bench")
    return bench.runtime.Bench(checkpoint, artifact, scratch, threads=1, steps=60, tokens=200, repeat=1)


def failed(part: dict[str, Any]) -> list[str]:
    """What of a part does not keep its bound."""
    return [check.what for check in part["checks"] if check.asked and not check.holds]


# ---------------------------------------------------------------- steps


def test_overhead_and_steps_are_of_decode_runs_that_follow_one_another(bench: Any) -> None:
    run = bench.runtime_steps.Run
    runs = [
        run(0.0, 1.0, 1, 8),  # prefill
        run(1.5, 2.0, 1, 1),
        run(2.25, 3.0, 1, 1),
        run(3.0, 4.0, 1, 8),
        run(4.0, 5.0, 1, 1),
        run(5.5, 6.0, 2, 1),
        run(6.125, 7.0, 2, 1),
    ]
    assert bench.runtime_steps.overheads(runs, 1) == [0.25]
    assert bench.runtime_steps.overheads(runs, 2) == [0.125]
    assert bench.runtime_steps.steps(runs, 1) == [1.0]


@pytest.mark.parametrize(
    ("kinds", "longest"),
    [("pppd", 0), ("pdpdpd", 1), ("ppdppd", 2), ("dpppd", 3), ("dp", 1), ("p", 0), ("", 0)],
)
def test_prefill_before_the_first_decode_run_holds_nobody_up(bench: Any, kinds: str, longest: int) -> None:
    runs = [bench.runtime_steps.Run(0.0, 1.0, 1, 8 if kind == "p" else 1) for kind in kinds]
    assert bench.runtime_steps.longest_prefill(runs) == longest


def test_quantiles(bench: Any) -> None:
    quantile = bench.runtime_steps.quantile
    assert [quantile([4.0, 1.0, 3.0, 2.0], percent) for percent in (25, 50, 51, 99)] == [1.0, 2.0, 3.0, 4.0]
    assert bench.runtime_steps.microseconds([1e-6, 3e-6, 8e-6]) == {
        "median_us": 3.0,
        "p99_us": 8.0,
        "count": 3,
    }


def test_runs_are_timed_while_asked_for_and_nothing_is_left_behind(bench: Any, settings: Any) -> None:
    original = OnnxRuntimeBackend.run
    with settings.engine() as engine:
        with bench.runtime_steps.timed_runs() as runs:
            engine.generate(["abcdef"], SamplingParams(max_tokens=5, ignore_eos=True))
        prefills = [run.new_tokens for run in runs if not run.decodes]
        assert sum(prefills) == len(engine.tokenizer.encode("abcdef")) and len(runs) == len(prefills) + 4
        assert OnnxRuntimeBackend.run is original
        engine.generate(["abc"], SamplingParams(max_tokens=5))
    assert len(runs) == len(prefills) + 4
    assert all(a.began < a.ended <= b.began for a, b in pairwise(runs))


# ---------------------------------------------------------------- the parts


@pytest.mark.slow
def test_every_part_says_what_it_found(bench: Any, settings: Any, tmp_path: Path) -> None:
    bounds = {"import": 1, "overhead": 2, "rhythm": 2, "position": 1, "memory": 1}
    assert {*bounds, "peer"} == set(bench.runtime.PARTS)
    results = {name: bench.runtime.run_part(name, settings) for name in bounds}
    for name, count in bounds.items():
        assert sum(check["asked"] != "" for check in results[name]["checks"]) == count, name
        assert results[name]["settings"] == {"threads": 1, "steps": 60, "tokens": 200, "repeat": 1}
    bench.runtime.write_results(tmp_path / "runtime.json", dict(reversed(results.items())))
    assert list(json.loads((tmp_path / "runtime.json").read_text())) == list(bounds)
    assert results["overhead"]["figures"]["greedy, 1 row(s)"]["host"]["count"] >= 60
    assert results["position"]["figures"]["40 W"]["count"] == 98


def slowed(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return function(*arguments)

    return slow


def test_a_slow_host_breaks_the_bound_of_overhead(
    bench: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ContinuousBatch, "admit", slowed(ContinuousBatch.admit, 0.001))
    assert len(failed(bench.runtime.overhead(settings))) == 2


def test_a_slow_backend_is_not_taken_for_overhead(
    bench: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxRuntimeBackend, "run", slowed(OnnxRuntimeBackend.run, 0.02))
    with settings.engine() as engine:
        found = bench.runtime.overhead_of(engine, "greedy", 1, 20)
    assert found["run"]["median_us"] > 20_000 and found["host"]["median_us"] < 10_000


def test_a_stream_held_up_by_prefill_breaks_the_bound(
    bench: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = ContinuousBatch.prefill

    def greedy_prefill(self: ContinuousBatch) -> None:
        for _ in range(8):
            prefill(self)

    monkeypatch.setattr(ContinuousBatch, "prefill", greedy_prefill)
    found = bench.runtime.rhythm_(settings)
    assert any("chunks without a step" in what for what in failed(found))
    assert found["figures"]["beside a long prompt"]["chunks_in_a_row"] == 8


def test_steps_that_grow_with_the_position_break_the_bound(
    bench: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = OnnxRuntimeBackend.run

    def reads_everything(self: OnnxRuntimeBackend, step: Any) -> Any:
        if step.input_ids.shape[1] == 1:
            time.sleep(1e-5 * step.position_ids[0, 0])
        return run(self, step)

    monkeypatch.setattr(OnnxRuntimeBackend, "run", reads_everything)
    assert failed(bench.runtime.position(settings)) == ["whole step at position 40 W, × as long"]


def test_a_leak_breaks_the_bound(bench: Any, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    accept, kept = ContinuousBatch._accept, list[bytearray]()

    def leaking(self: ContinuousBatch, *arguments: Any) -> None:
        kept.append(bytearray(b"x" * 500_000))
        accept(self, *arguments)

    monkeypatch.setattr(ContinuousBatch, "_accept", leaking)
    assert len(failed(bench.runtime.memory(settings))) == 1


def test_a_slow_import_breaks_the_bound(bench: Any, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.runtime, "IMPORT", "print(0.31)")
    assert len(failed(bench.runtime.import_(settings))) == 1
    monkeypatch.setattr(bench.runtime, "IMPORT", "print(0.29)")
    assert failed(bench.runtime.import_(settings)) == []


# ---------------------------------------------------------------- the model and the peer


def test_the_model_is_what_the_bounds_are_stated_for(bench: Any, tmp_path: Path) -> None:
    model = bench.runtime_model
    checkpoint = model.make_checkpoint(tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (1, 64, 32_000)
    again = model.make_checkpoint(tmp_path / "again")
    for file in checkpoint.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()
    fast = FastTokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert fast.get_vocab_size() == 32_000 and len(set(fast.get_vocab().values())) == 32_000
    tokenizer = Tokenizer.from_folder(checkpoint)
    text = "naïve 日本 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([300, 31_999]).startswith(" ")


WORKER = """
import json, sys
print(json.dumps("1.2"), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["search"]:
        sys.exit(3)
    print(json.dumps([[7] * asked["tokens"], [0.5] * asked["tokens"]]), flush=True)
"""


def test_a_worker_answers_or_its_end_is_told(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "python").write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path / 'worker.py'}\n")
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "worker.py").write_text(WORKER)
    worker = bench.runtime_peer.Worker(tmp_path / "python", tmp_path, 1)
    count = bench.runtime_peer.TOKENS
    assert worker.version == "1.2" and worker.block("greedy") == ([7] * count, [0.5] * count)
    with pytest.raises(SystemExit, match="onnxruntime-genai ended with status 3"):
        worker.block("top-p")
    worker.close()


def test_other_tokens_than_the_peers_break_a_bound(bench: Any) -> None:
    times = {"ours": {"median_us": 200.0}, "onnxruntime-genai": {"median_us": 400.0}}
    figures = {"version": "1.2", "greedy": times, "top-p": times}
    assert failed({"checks": bench.runtime_peer.checks(figures, 0)}) == []
    found = bench.runtime_peer.checks(figures, 1)
    assert failed({"checks": found}) == ["greedy: tokens of 96 that differ"]
    assert [check.value for check in found if "ours / theirs" in check.what] == [0.5, 0.5]


def test_a_block_is_the_time_between_two_pieces(bench: Any, settings: Any) -> None:
    with Engine.load(settings.artifact, threads=1) as engine:
        tokens, seconds = bench.runtime_peer.block(engine, "greedy")
    assert len(tokens) == bench.runtime_peer.TOKENS == 96 and len(seconds) == 95 and min(seconds) > 0
