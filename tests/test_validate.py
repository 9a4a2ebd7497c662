"""`validate` end to end: healthy artifacts pass, and every planted fault is caught by its own gates.

A fault is planted where it would be made: in a function of the decoder while the graph is exported, in the
ring's arithmetic, or in the runtime. W = 8, C = 4, R = 12.
"""

import json
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from mistral_trt.contract import Ring
from mistral_trt.errors import ArtifactError, ManifestError, ValidationError
from mistral_trt.export import decoder
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.export.quantization.settings import QuantizationSettings
from mistral_trt.manifest import read_manifest
from mistral_trt.runtime.cache import Logits, RollingCache, Step
from mistral_trt.runtime.engine import open_cache
from mistral_trt.runtime.onnxruntime_backend import OnnxRuntimeBackend
from mistral_trt.validate import opening as opening_module
from mistral_trt.validate import whole
from mistral_trt.validate.__main__ import validate
from mistral_trt.validate.artifact_run import in_words
from mistral_trt.validate.comparison import validate_artifact
from mistral_trt.validate.job import Job
from mistral_trt.validate.reference.hugging_face import load_model
from mistral_trt.validate.report import page
from mistral_trt.validate.report.report import Report
from mistral_trt.validate.scenarios.greedy import GreedyAgreement
from tests.conftest import Folder
from tests.models import write_checkpoint, write_tokenizer

LENGTH = 100
ROUNDING = {"fp32": "kl_max", "fp16": "kl_mean"}
"""The gate that the weakest faults trip first."""

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Fault:
    """A planted fault and a gate that must fail; "" stands for the rounding gate of the precision."""

    name: str
    gate: str
    patch: Patch


def mask(rule: Callable[[Tensor, Tensor, int], Tensor]) -> Patch:
    """Replace the mask.  rule: (held [B, 1, 1, R], query [B, 1, S, 1], W) -> bool [B, 1, S, R]"""

    def visible_slots(position_ids: Tensor, ring: Ring) -> Tensor:
        held = decoder.held_positions(position_ids, ring)[:, None, None, :]
        return rule(held, position_ids[:, None, :, None], ring.sliding_window)

    return lambda patch: patch.setattr(decoder, "visible_slots", visible_slots)


def slot_off_by_one(patch: pytest.MonkeyPatch) -> None:
    def write_slot(position_ids: Tensor, ring: Ring) -> Tensor:
        return torch.remainder(position_ids[:, 0] + 1, ring.capacity)

    patch.setattr(decoder, "write_slot", write_slot)


def unrotated(heads: str) -> Patch:
    """Leave the rotary embedding of queries or keys out, by an angle of zero."""
    rotate = decoder.Attention.rotate

    def leave(self: decoder.Attention, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if x.shape[1] == getattr(self, heads):
            rotary = (torch.ones_like(rotary[0]), torch.zeros_like(rotary[1]))
        return rotate(self, x, rotary)

    return lambda patch: patch.setattr(decoder.Attention, "rotate", leave)


def rope_theta_doubled(patch: pytest.MonkeyPatch) -> None:
    init = decoder.RotaryAngles.__init__

    def doubled(self: decoder.RotaryAngles, size: int, theta: float, dtype: torch.dtype) -> None:
        init(self, size, 2 * theta, dtype)

    patch.setattr(decoder.RotaryAngles, "__init__", doubled)


def epsilon_too_large(patch: pytest.MonkeyPatch) -> None:
    init = decoder.RMSNorm.__init__

    def larger(self: decoder.RMSNorm, size: int, eps: float, dtype: torch.dtype) -> None:
        init(self, size, 100 * eps, dtype)

    patch.setattr(decoder.RMSNorm, "__init__", larger)


def gate_and_up_swapped(patch: pytest.MonkeyPatch) -> None:
    def forward(self: decoder.MLP, x: Tensor) -> Tensor:
        swapped: Tensor = self.down_proj(torch.nn.functional.silu(self.up_proj(x)) * self.gate_proj(x))
        return swapped

    patch.setattr(decoder.MLP, "forward", forward)


def ring_capacity(rule: Callable[[Ring], int]) -> Patch:
    return lambda patch: patch.setattr(Ring, "capacity", property(rule))


def no_chunk_multiple(ring: Ring) -> int:
    return ring.sliding_window + ring.prefill_chunk - 1


def wider_by(tokens: int) -> Patch:
    return mask(lambda held, query, window: (held >= 0) & (held <= query) & (held > query - window - tokens))


ASKED_FOR = [
    Fault("window one too wide", "hidden_slots_seen", wider_by(1)),
    Fault("window one too narrow", "visible_slots_unseen", wider_by(-1)),
    Fault("mask missing", "hidden_slots_seen", mask(lambda h, q, w: h - q == h - q)),
    Fault("slot off by one", "calls_failed", slot_off_by_one),
    Fault("unrotated keys", "logit_error_max", unrotated("key_heads")),
    Fault("a chunk crosses the ring's end", "calls_failed", ring_capacity(no_chunk_multiple)),
]
MORE = [
    Fault("later tokens visible", "logit_error_max", mask(lambda h, q, w: (h >= 0) & (h > q - w))),
    Fault("empty slots visible", "hidden_slots_seen", mask(lambda h, q, w: (h <= q) & (h > q - w))),
    Fault("unrotated queries", "logit_error_max", unrotated("query_heads")),
    Fault("rope_theta doubled", "", rope_theta_doubled),
    Fault("epsilon times 100", "", epsilon_too_large),
    Fault("gate and up swapped", "logit_error_max", gate_and_up_swapped),
    Fault("R a chunk too small", "visible_slots_unseen", ring_capacity(lambda ring: ring.sliding_window)),
]


def graph_cases() -> Iterator[ParameterSet]:
    """Each fault at both precisions; the unit suite takes those that were asked for, at fp32."""
    for fault in ASKED_FOR + MORE:
        for precision in ("fp32", "fp16"):
            quick = fault in ASKED_FOR and precision == "fp32"
            marks = () if quick else (pytest.mark.slow,)
            yield pytest.param(fault, precision, marks=marks, id=f"{fault.name}-{precision}")


def forgetful(rings: Callable[[OnnxRuntimeBackend], list[np.ndarray]]) -> Patch:
    """Zero some rings of the row before every call, as if the cache were not carried."""
    run = OnnxRuntimeBackend.run

    def forget(self: OnnxRuntimeBackend, step: Step) -> Logits:
        for ring in rings(self):
            ring[step.first_row] = 0
        return run(self, step)

    return lambda patch: patch.setattr(OnnxRuntimeBackend, "run", forget)


def altered_step(alter: Callable[[Step], Step]) -> Patch:
    run = OnnxRuntimeBackend.run
    return lambda patch: patch.setattr(OnnxRuntimeBackend, "run", lambda self, step: run(self, alter(step)))


def chunk_edge_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ring, "room_in_chunk", lambda self, position: self.prefill_chunk)


def nan_at_a_position(patch: pytest.MonkeyPatch) -> None:
    run = OnnxRuntimeBackend.run

    def nan(self: OnnxRuntimeBackend, step: Step) -> Logits:
        logits = run(self, step)
        logits[step.position_ids[:, -1] == 50] = np.nan
        return logits

    patch.setattr(OnnxRuntimeBackend, "run", nan)


def at_positions(change: Callable[[np.ndarray], np.ndarray]) -> Patch:
    return altered_step(lambda step: replace(step, position_ids=change(step.position_ids)))


def earlier_logits(step: Step) -> Step:
    return replace(step, logits_index=np.maximum(step.logits_index - 1, 0))


RUNTIME_FAULTS = [
    Fault("cache not carried", "visible_slots_unseen", forgetful(lambda backend: backend._rings.arrays)),
    Fault(
        "last values not carried", "logit_error_max", forgetful(lambda backend: backend._rings.arrays[-1:])
    ),
    Fault("positions from one", "logit_error_max", at_positions(lambda positions: positions + 1)),
    Fault("positions repeat", "logit_error_max", at_positions(lambda positions: positions % 16)),
    Fault("logits of the token before", "logit_error_max", altered_step(earlier_logits)),
    Fault("chunk edges ignored", "calls_failed", chunk_edge_ignored),
    Fault("NaN at one position", "calls_failed", nan_at_a_position),
]


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a short validation is spent on drawing, which test_report.py looks after."""
    monkeypatch.setattr(page, "plots", lambda _: {})


def failed_gates(folder: Path, checkpoint: Path, out: Path) -> set[str]:
    """Run the command; assert exit status 1 and return the gates that failed."""
    arguments = ["--reference", str(checkpoint), "--out", str(out), "--length", str(LENGTH), "--threads", "1"]
    status = validate([str(folder), *arguments])
    found = json.loads((out / "report.json").read_text())
    assert status == 1
    assert found["verdict"] == "fail"
    return {gate["name"] for gate in found["gates"] if not gate["passed"]}


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(("fault", "precision"), list(graph_cases()))
def test_a_fault_in_the_graph_is_caught(
    fault: Fault, precision: str, tiny_checkpoint: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_checkpoint(num_hidden_layers=1)
    fault.patch(monkeypatch)
    export_checkpoint(checkpoint, tmp_path / "onnx", precision=precision, prefill_chunk=4, max_batch_size=1)
    failed = failed_gates(tmp_path / "onnx", checkpoint, tmp_path / "report")
    assert (fault.gate or ROUNDING[precision]) in failed


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("fault", RUNTIME_FAULTS, ids=lambda fault: fault.name)
def test_a_fault_in_the_runtime_is_caught(
    fault: Fault,
    precision: str,
    tiny_checkpoint: Folder,
    onnx_folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = onnx_folder(precision=precision)
    fault.patch(monkeypatch)
    assert fault.gate in failed_gates(folder, tiny_checkpoint(), tmp_path / "report")


@pytest.mark.parametrize("precision", ["fp32", "fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_healthy_artifact_passes(
    onnx_folder: Folder, tiny_checkpoint: Folder, tmp_path: Path, precision: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """At the default length, so that every gate decides."""
    out = tmp_path / "report"
    folder = onnx_folder(precision=precision)
    arguments = ["--reference", str(tiny_checkpoint()), "--out", str(out), "--threads", "1"]
    assert validate([str(folder), *arguments]) == 0
    path, verdict = capsys.readouterr().out.splitlines()
    assert path == str(out / "report.html")
    assert verdict.startswith("PASS tiny ")
    found = json.loads((out / "report.json").read_text())
    compared = {scenario["name"]: scenario["summary"]["positions"] for scenario in found["scenarios"]}
    assert compared.pop("rows") > 40
    assert set(compared.values()) == {2060}
    assert found["notes"] == []
    assert ("twin" in found["executed"]) == (precision == "bf16")
    assert "No TensorRT engine was executed" in found["executed"]
    if precision == "fp32":
        assert max(scenario["summary"]["max_abs_max"] for scenario in found["scenarios"]) <= 1e-5


def compare(folder: Path, checkpoint: Path, out: Path, **options: Any) -> Report:
    """`validate_artifact` on one thread: on tiny graphs more threads only wait for each other."""
    return validate_artifact(Job(folder, checkpoint, out, threads=1, **options))


@pytest.mark.usefixtures("without_pictures")
def test_the_report_says_what_was_compared(
    onnx_folder: Folder, tiny_checkpoint: Folder, tmp_path: Path
) -> None:
    folder, checkpoint = onnx_folder(), tiny_checkpoint()
    result = compare(folder, checkpoint, tmp_path / "report", length=LENGTH, seed=3)
    manifest = read_manifest(folder)
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert result.passed
    assert found["reference"]["sha256"] == manifest.sources["checkpoint"]
    assert found["artifact"]["graph_sha256"] == manifest.details["graph_sha256"]
    assert found["tokens"] == {
        "source": "random tokens, seed 3",
        "count": 100,
        "sha256": result.tokens.sha256,
    }
    assert found["run"]["command"].endswith("--length 100 --threads 1 --seed 3")
    assert {"torch", "transformers", "onnxruntime"} <= set(found["run"]["versions"])
    assert found["run"]["machine"]["cores"] >= 1
    assert "Not gated (takes 1,000 positions, found 100): Top-1 agreement." in found["notes"]
    assert found["quality"]["perplexity"] is None
    assert found["quality"]["greedy"] == {
        "prompt_tokens": 25, "generated": 64, "agreed": 64, "diverged": None,
    }  # fmt: skip
    assert found["quantization"] is None


def test_a_ring_that_never_wraps_is_validated_to_its_end(
    onnx_folder: Folder, tiny_checkpoint: Folder, tmp_path: Path
) -> None:
    shape = {"sliding_window": None, "num_hidden_layers": 1}
    folder = onnx_folder(max_context=50, **shape)
    result = compare(folder, tiny_checkpoint(**shape), tmp_path / "report")
    assert result.passed
    assert len(result.tokens.ids) == 50
    assert "the ring never wraps" in result.notes[0]
    assert {probe.name for probe in result.probes} == {"C-1", "C", "C+1", "end"}
    asked = {result.poke.name for result in result.pokes}
    assert "slots never written" in asked
    assert "q-W, just outside it" not in asked


@pytest.mark.usefixtures("without_pictures")
def test_a_short_run_says_what_it_did_not_reach(
    onnx_folder: Folder, tiny_checkpoint: Folder, tmp_path: Path
) -> None:
    result = compare(onnx_folder(), tiny_checkpoint(), tmp_path / "r", length=13)
    assert "ends before 2R (24), 3W (24)" in result.notes[0]
    assert "before the ring had turned twice" in result.notes[1]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with a tokenizer, W = 8, and its ONNX folder, exported with W = 5."""
    root = tmp_path_factory.mktemp("reader")
    checkpoint = write_tokenizer(write_checkpoint(root / "ck", vocab_size=259, num_hidden_layers=1))
    export_checkpoint(checkpoint, root / "onnx", precision="fp32", sliding_window=5, prefill_chunk=3)
    return root / "onnx", checkpoint


@pytest.mark.usefixtures("without_pictures")
def test_text_is_read_where_there_is_a_tokenizer(reader: tuple[Path, Path], tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("To be, or not to be, that is the question.")
    read = compare(*reader, tmp_path / "report", length=30, text=own)
    default = compare(*reader, tmp_path / "report", length=30)
    assert read.passed
    assert read.tokens.source == "text: own.txt"
    assert default.tokens.source == "text: Moby-Dick, chapters 1 and 2"
    assert f"--text {own}" in read.run["command"]


@pytest.mark.usefixtures("without_pictures")
def test_the_window_that_was_exported_is_the_one_compared(reader: tuple[Path, Path], tmp_path: Path) -> None:
    """--sliding-window overrides the checkpoint's, for artifact and reference alike."""
    result = compare(*reader, tmp_path / "report", length=60)
    assert result.passed
    assert result.reference["sliding_window"] == 5
    assert result.reference["config"]["sliding_window"] == 8


@pytest.fixture(scope="module")
def int8_reader(tiny_checkpoint: Folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An int8 ONNX folder with a tokenizer, and its checkpoint."""
    root = tmp_path_factory.mktemp("int8")
    checkpoint = tiny_checkpoint(tokenizer=True, vocab_size=259, num_hidden_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        export_checkpoint(
            checkpoint,
            root / "onnx",
            precision="int8",
            prefill_chunk=4,
            max_batch_size=1,
            quantization=QuantizationSettings(samples=4, tokens=32),
        )
    return root / "onnx", checkpoint


def perplexity_of(checkpoint: Path, tokens: Sequence[int]) -> float:
    """By Hugging Face's logits and torch's cross entropy, in float64."""
    with torch.inference_mode():
        model = load_model(Checkpoint.open(checkpoint), sliding_window=8)
        logits = model(torch.tensor([list(tokens)])).logits[0].double()
    return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:])).exp())


def test_a_quantized_artifact_is_held_to_its_quality(int8_reader: tuple[Path, Path], tmp_path: Path) -> None:
    result = compare(*int8_reader, tmp_path / "report", length=1100)
    assert result.passed, result.verdict
    assert result.notes == ()
    gates = {gate.name: gate for gate in result.gates}
    assert {"perplexity_ratio", "kl_mean", "top1_agreement", "own_kl_mean", "weights_wrong"} <= set(gates)
    assert gates["perplexity_ratio"].measured.positions == 1099
    quality = result.quality
    assert quality.positions == 1100
    assert quality.perplexity.reference == pytest.approx(
        perplexity_of(int8_reader[1], result.tokens.ids), 1e-5
    )
    assert quality.perplexity.ratio == pytest.approx(1, abs=0.1)
    assert quality.kl_mean == pytest.approx(np.mean(result.scenarios[0].errors.kl))
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert found["quantization"] == read_manifest(int8_reader[0]).details["quantization"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "model.layers.0.mlp.down_proj" in page
    assert "not the text that the scales were calibrated on (State of the Union" in page
    assert "dequantized when it was loaded" in found["executed"]
    assert "±100 for keys" in page


@pytest.mark.usefixtures("without_pictures")
def test_the_rounding_of_a_quantized_artifact_is_told_from_its_mistakes(
    int8_reader: tuple[Path, Path], tmp_path: Path
) -> None:
    """Against the reference in its own precision the artifact is nearer than that one is to float32."""
    own = compare(*int8_reader, tmp_path / "report", length=300).own_precision
    assert own is not None
    assert own.artifact.kl.mean() < 0.3 * own.reference.kl.mean()


@pytest.mark.usefixtures("without_pictures")
def test_of_random_tokens_a_quantized_artifact_proves_no_perplexity(
    int8_reader: tuple[Path, Path], tmp_path: Path
) -> None:
    result = compare(*int8_reader, tmp_path / "report", length=LENGTH, random_tokens=True)
    assert result.passed, result.verdict
    assert any("Perplexity, over the reference's" in note for note in result.notes)
    assert np.isnan(result.quality.perplexity.ratio)


@pytest.mark.usefixtures("without_pictures")
def test_an_overconfident_artifact_fails_by_its_perplexity(
    int8_reader: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times the logits put the same token first everywhere, and give the text's own much less."""
    run = OnnxRuntimeBackend.run
    monkeypatch.setattr(OnnxRuntimeBackend, "run", lambda self, step: 3 * run(self, step))
    result = compare(*int8_reader, tmp_path / "report", length=1100)
    failed = {gate.name for gate in result.failed}
    assert {"perplexity_ratio", "kl_mean"} <= failed
    assert "weights_wrong" not in failed
    assert "top1_agreement" not in failed
    assert result.quality.perplexity.ratio > 1.5


@pytest.mark.usefixtures("without_pictures")
def test_a_call_that_fails_while_generating_is_a_finding(
    onnx_folder: Folder, tiny_checkpoint: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Position 50 is the 26th after a prompt of 25: its token was chosen, what follows was not."""
    nan_at_a_position(monkeypatch)
    result = compare(onnx_folder(), tiny_checkpoint(), tmp_path / "report", length=LENGTH)
    calls = next(gate for gate in result.failed if gate.name == "calls_failed")
    assert "greedy" in calls.measured.where.split("; ")
    assert result.notes[0].startswith("Greedy generation stopped at a call that failed. NonFiniteLogitsError")
    assert result.quality.greedy == GreedyAgreement(25, 26, 26, None)


@pytest.mark.usefixtures("without_pictures")
def test_reference_and_artifact_are_never_in_memory_together(
    onnx_folder: Folder, tiny_checkpoint: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[weakref.ref[RollingCache]] = []
    models: list[weakref.ref[torch.nn.Module]] = []
    events: list[tuple[str, int, int]] = []

    def alive(found: Sequence[weakref.ref[Any]]) -> int:
        return sum(ref() is not None for ref in found)

    def opening(folder: Path, **options: Any) -> RollingCache:
        events.append(("artifact", alive(caches), alive(models)))
        cache = open_cache(folder, **options)
        caches.append(weakref.ref(cache))
        return cache

    def loading(source: Checkpoint, **options: Any) -> torch.nn.Module:
        events.append(("reference", alive(caches), alive(models)))
        model = load_model(source, **options)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(opening_module, "open_cache", opening)
    monkeypatch.setattr(whole, "load_model", loading)
    assert compare(onnx_folder(), tiny_checkpoint(), tmp_path / "report", length=30).passed
    assert events == [("artifact", 0, 0), ("reference", 0, 0), ("artifact", 0, 0)]


def test_text_without_a_tokenizer_is_refused(
    onnx_folder: Folder, tiny_checkpoint: Folder, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match="has no tokenizer, so --text cannot be read"):
        compare(onnx_folder(), tiny_checkpoint(), tmp_path / "r", text=tmp_path / "x.txt")


@pytest.mark.parametrize(("option", "value"), [("--seed", "-1"), ("--threads", "0"), ("--length", "1")])
def test_impossible_options_are_refused(
    onnx_folder: Folder, tiny_checkpoint: Folder, tmp_path: Path, option: str, value: str
) -> None:
    arguments = [str(onnx_folder()), "--reference", str(tiny_checkpoint()), "--out", str(tmp_path / "r")]
    with pytest.raises(ValidationError, match=f"{option} must"):
        validate([*arguments, option, value])
    assert not (tmp_path / "r").exists()


def test_another_checkpoint_is_refused_before_anything_runs(
    onnx_folder: Folder, tiny_checkpoint: Folder, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match="not the checkpoint this artifact was made from"):
        compare(onnx_folder(), tiny_checkpoint(seed=1), tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_an_altered_artifact_is_refused(onnx_folder: Folder, tiny_checkpoint: Folder, tmp_path: Path) -> None:
    altered = tmp_path / "onnx"
    shutil.copytree(onnx_folder(), altered)
    data = bytearray((altered / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (altered / "model.onnx.data").write_bytes(data)
    with pytest.raises(ManifestError, match="was altered"):
        compare(altered, tiny_checkpoint(), tmp_path / "report")


@pytest.mark.usefixtures("without_pictures")
def test_a_report_replaces_a_report_and_nothing_else(
    onnx_folder: Folder, tiny_checkpoint: Folder, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    for seed in (0, 1):
        compare(onnx_folder(), tiny_checkpoint(), out, length=30, seed=seed)
        assert f"seed {seed}" in (out / "report.html").read_text()
    assert {path.name for path in out.iterdir()} == {"report.json", "report.html", "junit.xml"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(ArtifactError):
        compare(onnx_folder(), tiny_checkpoint(), tmp_path / "mine", length=30)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not touch"


def test_a_killed_run_leaves_no_report(
    onnx_folder: Folder, tiny_checkpoint: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> Logits:
        raise KeyboardInterrupt

    monkeypatch.setattr(RollingCache, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        compare(onnx_folder(), tiny_checkpoint(), tmp_path / "report", length=30)
    assert not (tmp_path / "report").exists()


def test_running_out_of_memory_is_not_a_finding(
    onnx_folder: Folder, tiny_checkpoint: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> Logits:
        raise MemoryError

    for method in ("append", "append_padded", "snapshot"):
        with monkeypatch.context() as patch:
            patch.setattr(RollingCache, method, full)
            with pytest.raises(MemoryError):
                compare(onnx_folder(), tiny_checkpoint(), tmp_path / "r", length=30)


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    assert in_words(RuntimeError("a\n  b")) == "RuntimeError: a b"
    short = in_words(RuntimeError("first " + "x" * 500 + " last"))
    assert short.startswith("RuntimeError: first")
    assert short.endswith(" last")
    assert len(short) < 260


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.slow
def test_what_the_faults_are_planted_into_is_healthy(
    onnx_folder: Folder, tiny_checkpoint: Folder, tmp_path: Path
) -> None:
    folder = onnx_folder(num_hidden_layers=1, max_batch_size=1)
    assert compare(folder, tiny_checkpoint(num_hidden_layers=1), tmp_path / "r", length=LENGTH).passed
