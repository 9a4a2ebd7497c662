"""Polygraphy's verdicts on an engine, by a stand-in for its command."""

from dataclasses import replace
from pathlib import Path

import pytest

from mistral_trt.manifest import read_manifest
from mistral_trt.validate.polygraphy_run import ENGINE, run_polygraphy
from mistral_trt.validate.subject import Engine, Subject, open_subject
from tests.conftest import Folder
from tests.simulated.folder import machine, write_engine_folder


@pytest.fixture
def subject(onnx_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    machine().install(monkeypatch)
    onnx = onnx_folder(precision="fp16")
    return open_subject(write_engine_folder(onnx, tmp_path / "engine"), onnx)


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    command = tmp_path / "stand-in"
    command.write_text(f"#!/bin/sh\n{body}\n")
    command.chmod(0o755)
    monkeypatch.setenv("POLYGRAPHY", str(command))


def engine_of(subject: Subject) -> Engine:
    assert subject.engine is not None
    return subject.engine


def test_each_comparison_passes_or_fails_by_its_status(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which one is run is told by the inputs' script."""
    stand_in(tmp_path, monkeypatch, 'echo "$*"; case "$*" in *inputs.py:prefill*) exit 1;; esac')
    decode, prefill = run_polygraphy(subject, engine_of(subject), ENGINE)
    assert (decode.name, decode.passed) == ("decode", True)
    assert (prefill.name, prefill.passed) == ("prefill", False)
    assert "inputs.py:prefill" in prefill.words
    assert [path.name for path in tmp_path.iterdir() if "polygraphy" in path.name] == []


def test_the_plan_that_is_compared_is_the_engines(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = engine_of(subject).folder / "model.plan"
    same = f"cmp \"$word\" '{plan}' || exit 1"
    stand_in(tmp_path, monkeypatch, f'for word in "$@"; do case $word in *.plan) {same};; esac; done')
    assert [found.passed for found in run_polygraphy(subject, engine_of(subject), ENGINE)] == [True, True]


def test_what_cannot_be_compared_says_why(subject: Subject) -> None:
    engine = engine_of(subject)
    external = replace(engine.manifest, details={**engine.manifest.details, "weights": "external"})
    found = run_polygraphy(subject, replace(engine, manifest=external), ["decode"])
    assert [result.passed for result in found] == [None]
    assert "does not refit one" in found[0].words
    assert read_manifest(engine.folder).details["weights"] == "embedded"
