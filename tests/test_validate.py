"""`validate` end to end: what it compares, what it reports and what it refuses.  W = 8, C = 4, R = 12.

Planted faults have tests of their own: test_mutations.py.
"""

import json
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mistral_trt.errors import ArtifactError, ManifestError, ValidationError
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.export.quantization.settings import QuantizationSettings
from mistral_trt.manifest import read_manifest
from mistral_trt.runtime.cache import Logits, RollingCache
from mistral_trt.runtime.engine import open_cache
from mistral_trt.runtime.onnxruntime_backend import OnnxRuntimeBackend
from mistral_trt.validate import opening as opening_module
from mistral_trt.validate.__main__ import validate
from mistral_trt.validate.comparison import validate_artifact
from mistral_trt.validate.findings import GreedyAgreement
from mistral_trt.validate.job import Job
from mistral_trt.validate.reference.hugging_face import load_model
from mistral_trt.validate.report import page
from mistral_trt.validate.report.report import Report
from mistral_trt.validate.trial import whole
from mistral_trt.validate.trial.artifact_run import in_words
from tests.conftest import Folder
from tests.models import write_checkpoint, write_tokenizer
from tests.planted_runtime import nan_at_50

pytestmark = pytest.mark.usefixtures("one_trace")

LENGTH = 100


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a short validation is spent on drawing, which test_report.py looks after."""
    monkeypatch.setattr(page, "plots", lambda _: {})


@pytest.mark.parametrize(
    "precision",
    ["fp16", *(pytest.param(other, marks=pytest.mark.slow) for other in ("fp32", "bf16"))],
)
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
    assert [result.scenario.name for result in own.scenarios] == [
        "prefill",
        "decode",
        "padded",
        "rows",
        "stepwise",
    ]
    for result in own.scenarios:
        assert result.errors.kl.mean() < 0.3 * own.reference.kl.mean()


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
    nan_at_50(monkeypatch)
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


@pytest.mark.parametrize("where", ["", "report", "../onnx/a/../b"])
def test_a_report_is_not_put_into_an_artifact(tmp_path: Path, where: str) -> None:
    """It holds what its manifest lists; the report would make it another, or be checked by itself."""
    onnx, engine = tmp_path / "onnx", tmp_path / "engine"
    for folder, graph in ((onnx, None), (engine, onnx)):
        with pytest.raises(ValidationError, match="lies in the artifact .*onnx, .* give a folder outside it"):
            Job(folder, tmp_path, onnx / where, onnx=graph)
    Job(onnx, tmp_path, tmp_path / "onnx-report")


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
