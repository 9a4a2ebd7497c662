"""Faults planted in graph, weights, runtime and quantization: a default run catches each by the gates that
docs/validation.md names; the artifacts they are planted into are healthy.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mistral_trt.contract import CACHE_DTYPES, QUANTIZED
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.export.quantization.settings import QuantizationSettings
from mistral_trt.validate.__main__ import validate
from mistral_trt.validate.report import page
from mistral_trt.validate.verdict.gates import read_gates
from tests.alteration import reseal
from tests.models import write_checkpoint, write_tokenizer
from tests.mutations import MUTATIONS, Mutation, table

DOCUMENT = Path(__file__).parent.parent / "docs" / "validation.md"
NAMES = (
    "window one too wide",
    "slot one too far",
    "one exponent bit flipped",
    "last_token_index off by one",
)
QUICK = [fault for fault in MUTATIONS if fault.name in NAMES and fault.precision in ("fp32", "fp16")]
"""Tried at a short length with every run of the tests."""


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes as long as a short validation, and test_report.py looks after it."""
    monkeypatch.setattr(page, "plots", lambda _: {})


class Workshop:
    """Checkpoints, healthy artifacts and faulty ones, in one folder.  W = 8, C = 4, four rows."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def checkpoint(self, layers: int) -> Path:
        """Made once, with a tokenizer."""
        folder = self.root / f"checkpoint-{layers}"
        if not folder.exists():
            write_tokenizer(write_checkpoint(folder, vocab_size=259, num_hidden_layers=layers))
        return folder

    def healthy(self, precision: str, layers: int = 1) -> Path:
        """Exported once."""
        folder = self.root / f"{precision}-{layers}"
        if not folder.exists():
            self.export(precision, layers, folder)
        return folder

    def export(self, precision: str, layers: int, out: Path) -> Path:
        """A quantized precision is calibrated once, and its scales are found again afterwards."""
        options: dict[str, Any] = {"prefill_chunk": 4, "max_batch_size": 4}
        if precision in QUANTIZED:
            options["quantization"] = QuantizationSettings(samples=4, tokens=32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(self.root / "cache"))
            export_checkpoint(self.checkpoint(layers), out, precision=precision, **options)
        return out

    def faulty(self, mutation: Mutation, out: Path) -> Path:
        """The artifact with the faults that are in its graph or in its files."""
        if mutation.exporting is not None:
            with pytest.MonkeyPatch.context() as patch:
                mutation.exporting(patch)
                return self.export(mutation.precision, mutation.layers, out)
        healthy = self.healthy(mutation.precision, mutation.layers)
        if mutation.altering is None:
            return healthy
        shutil.copytree(healthy, out)
        mutation.altering(out)
        reseal(out)
        return out


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


def named(mutation: Mutation) -> str:
    return f"{mutation.name}-{mutation.precision}"


def failed_gates(workshop: Workshop, mutation: Mutation, out: Path, *options: str) -> set[str]:
    """Plant a fault and run the command; assert exit status 1 and return the gates that failed."""
    folder = workshop.faulty(mutation, out / "onnx")
    checkpoint = workshop.checkpoint(mutation.layers)
    arguments = ["--reference", str(checkpoint), "--out", str(out / "report"), "--threads", "1", *options]
    with pytest.MonkeyPatch.context() as patch:
        if mutation.running is not None:
            mutation.running(patch)
        status = validate([str(folder), *arguments])
    found = json.loads((out / "report" / "report.json").read_text())
    assert status == 1
    assert found["verdict"] == "fail"
    return {gate["name"] for gate in found["gates"] if not gate["passed"]}


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=named)
def test_a_default_run_catches_it(workshop: Workshop, mutation: Mutation, tmp_path: Path) -> None:
    failed = failed_gates(workshop, mutation, tmp_path)
    assert mutation.gate in failed
    assert set(mutation.also) <= failed


@pytest.mark.parametrize("mutation", QUICK, ids=named)
def test_a_short_run_catches_it(workshop: Workshop, mutation: Mutation, tmp_path: Path) -> None:
    assert mutation.gate in failed_gates(workshop, mutation, tmp_path, "--length", "100")


@pytest.mark.slow
@pytest.mark.parametrize("precision", CACHE_DTYPES)
def test_what_faults_are_planted_into_is_healthy(workshop: Workshop, precision: str, tmp_path: Path) -> None:
    folder, out = workshop.healthy(precision), tmp_path / "report"
    arguments = ["--reference", str(workshop.checkpoint(1)), "--out", str(out), "--threads", "1"]
    assert validate([str(folder), *arguments]) == 0


def test_the_document_shows_the_table() -> None:
    """`python -m tests.mutations` prints what belongs there."""
    assert table() in DOCUMENT.read_text(encoding="utf-8")


def test_the_table_names_gates_that_decide() -> None:
    for mutation in MUTATIONS:
        gates = {gate.metric for gate in read_gates(mutation.precision)}
        assert {mutation.gate, *mutation.also} <= gates, named(mutation)
        assert mutation.gate not in mutation.also


def test_there_are_enough_faults_of_every_kind() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) >= 32
    assert len({named(mutation) for mutation in MUTATIONS}) == len(MUTATIONS)
    assert {m.where for m in MUTATIONS} == {"graph", "weights", "runtime", "quantization"}
    assert {m.precision for m in MUTATIONS} == set(CACHE_DTYPES)
