"""Which folder is validated, which one is run, and that the two belong together."""

from pathlib import Path

import pytest

from mistral_trt.errors import ManifestError, ValidationError
from mistral_trt.manifest import read_manifest
from mistral_trt.runtime import device
from mistral_trt.validate.subject import open_subject
from tests.conftest import Folder
from tests.simulated.folder import machine, write_engine_folder


@pytest.fixture
def engine(onnx_folder: Folder, tmp_path: Path) -> Path:
    return write_engine_folder(onnx_folder(), tmp_path / "engine")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "local_device", lambda: None)


def test_an_onnx_folder_is_its_own_graph(onnx_folder: Folder) -> None:
    subject = open_subject(onnx_folder(), None)
    assert subject.executed == onnx_folder()
    assert subject.engine is None
    with pytest.raises(ValidationError, match="an ONNX folder itself; leave --onnx out"):
        open_subject(onnx_folder(), onnx_folder())


@pytest.mark.usefixtures("no_gpu")
def test_without_its_gpu_the_graph_stands_in_for_an_engine(engine: Path, onnx_folder: Folder) -> None:
    subject = open_subject(engine, onnx_folder())
    assert subject.engine is not None
    assert subject.engine.folder == engine
    assert subject.executed == onnx_folder()
    assert not subject.runs_engine


def test_with_its_gpu_the_engine_is_run(
    engine: Path, onnx_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine().install(monkeypatch)
    subject = open_subject(engine, onnx_folder())
    assert subject.executed == engine
    assert subject.runs_engine
    assert subject.folder == onnx_folder()


@pytest.mark.usefixtures("no_gpu")
def test_an_engine_needs_the_graph_it_was_built_from(engine: Path, onnx_folder: Folder) -> None:
    made_from = read_manifest(engine).sources["onnx"]
    with pytest.raises(ValidationError, match=rf"name the ONNX folder .*{made_from[:12]}.* as --onnx DIR"):
        open_subject(engine, None)
    with pytest.raises(ValidationError, match="was not built from"):
        open_subject(engine, onnx_folder(num_hidden_layers=1))
    with pytest.raises(ValidationError, match="was not built from"):
        open_subject(engine, engine)


@pytest.mark.usefixtures("no_gpu")
def test_an_altered_engine_is_refused(engine: Path, onnx_folder: Folder) -> None:
    plan = engine / "model.plan"
    plan.write_bytes(plan.read_bytes() + b"x")
    with pytest.raises(ManifestError):
        open_subject(engine, onnx_folder())
