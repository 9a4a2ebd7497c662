"""What the README tells a reader to type is typed here; its pages under docs/ are held to the same names."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mistral_trt.cli import COMMANDS
from mistral_trt.engines import gpu as gpu_module
from mistral_trt.engines.gpu import find_gpu, load_catalogue
from mistral_trt.engines.targets import parse_gpus
from mistral_trt.errors import GpuError
from tests.conftest import Folder
from tests.models import write_checkpoint

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_embed_example_runs(onnx_folder: Folder, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 10
    artifact = onnx_folder(precision="fp16", tokenizer=True, vocab_size=259)
    shutil.copytree(artifact, tmp_path / "build" / "demo" / "onnx-fp16")
    result = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_every_command_it_names_exists() -> None:
    commands = set(re.findall(r"^    mistral-trt ([a-z-]+)", README, re.MULTILINE))
    assert len(commands) >= 6
    for page in PAGES:
        named = set(re.findall(r"^    mistral-trt ([a-z-]+)", page.read_text(), re.MULTILINE))
        assert named <= set(COMMANDS), page


def test_every_make_target_it_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)) | {"target"}
    assert {"demo", "engine"} <= set(re.findall(r"\bmake ([a-z][a-z-]+)", README)) <= targets
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z][a-z-]+)", page.read_text())) <= targets, page


def test_every_file_it_links_exists() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), (page, link)


def test_every_page_is_linked() -> None:
    linked = {link for page in PAGES for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())}
    for page in (ROOT / "docs").glob("*.md"):
        assert {page.name, f"docs/{page.name}"} & linked, page


def test_no_placeholder_is_left() -> None:
    assert not re.search(r"@[A-Z]+@", README)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout without an environment: what a fresh clone looks like to make."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "engines" / "gpus", tmp_path / "engines" / "gpus")
    (tmp_path / "src" / "mistral_trt").mkdir(parents=True)
    for name in ("engines/gpu.py", "src/mistral_trt/__init__.py", "src/mistral_trt/errors.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def make(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = ["make", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_help_and_clean_install_nothing(tree: Path) -> None:
    shown = make(tree, "help")
    assert shown.returncode == 0
    assert "demo" in shown.stdout and "engine" in shown.stdout
    assert make(tree, "clean").returncode == 0
    assert not (tree / ".venv").exists()


def test_an_unknown_gpu_is_one_line_that_lists_the_known(tree: Path) -> None:
    result = make(tree, "engine", "GPU=nosuch")
    assert result.returncode != 0
    (line,) = result.stderr.strip().splitlines()
    assert "nosuch" in line and "a10g" in line and "rtx5090" in line
    assert not (tree / ".venv").exists()


def test_the_environment_does_not_choose_for_the_user(tree: Path) -> None:
    """GNU screen sets WINDOW in every shell it starts."""
    environment = {**os.environ, "WINDOW": "1", "GPU": "nosuch", "MODEL": "x", "PRECISION": "int9"}

    def export_command(*arguments: str) -> str:
        command = ["make", "--dry-run", ".onnx", "RUN=run", *arguments]
        shown = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        (line,) = [line for line in shown.stdout.splitlines() if " export " in line]
        return line

    command = export_command()
    assert "build/models/smollm2-135m-instruct" in command and "--precision fp16" in command
    assert "--sliding-window" not in command
    assert "--out run/onnx-bf16-w4 --precision bf16 --sliding-window 4" in export_command(
        "WINDOW=4", "PRECISION=bf16"
    )


@pytest.mark.parametrize("gpu", ["A10G", "a10g"])
def test_a_gpus_case_does_not_matter(tree: Path, gpu: str) -> None:
    assert "for gpu in a10g; do" in make(tree, "--dry-run", "engine", f"GPU={gpu}").stdout


@pytest.mark.parametrize("gpus", ["a10g l4", "a10g,l4", "a10g,l4 t4"])
def test_several_gpus_are_an_engine_each_or_one_for_all(tree: Path, gpus: str) -> None:
    assert f"for gpu in {gpus}; do" in make(tree, "--dry-run", "engine", f"GPU={gpus}").stdout


@pytest.mark.parametrize("gpus", ["", "nosuch", "a10g nosuch", "nosuch,l4"])
@pytest.mark.parametrize("target", ["engine", "gpu-acceptance"])
def test_one_unknown_gpu_among_several_is_refused(tree: Path, gpus: str, target: str) -> None:
    unknown = "nosuch" if gpus else ""
    assert f"unknown GPU '{unknown}'; known are a10, a100-40" in make(tree, target, f"GPU={gpus}").stderr


@pytest.mark.parametrize(
    ("gpus", "keys"),
    [
        ("4090", "rtx4090"),
        ("NVIDIA A10G", "a10g"),
        ("rtx 4090,NVIDIA L4 t4", "rtx4090,l4 t4"),
        ("a10g, l4", "a10g,l4"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
    ],
)
def test_make_takes_every_name_that_the_command_takes(tree: Path, gpus: str, keys: str) -> None:
    assert f"for gpu in {keys}; do" in make(tree, "--dry-run", "engine", f"GPU={gpus}").stdout
    found = [target.key for target in parse_gpus(gpus)]
    assert found == keys.replace(",", " ").split()


@pytest.mark.parametrize(
    "alias", [name for gpu in load_catalogue().values() for name in (gpu.name, *gpu.aliases)]
)
def test_make_and_the_command_say_the_same_of_every_name(
    alias: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """ "a100" is two GPUs: both ask which."""
    status = gpu_module.main([alias])
    said = capsys.readouterr().out.strip()
    try:
        assert (status, said) == (0, find_gpu(alias).key)
    except GpuError as error:
        assert (status, said) == (2, str(error))


def test_a_name_that_two_gpus_have_stops_make_with_the_question(tree: Path) -> None:
    assert "GPU 'a100' is ambiguous: say a100-40 or a100-80" in make(tree, "engine", "GPU=a100").stderr
    assert not (tree / ".venv").exists()


def test_names_are_looked_up_by_a_python_that_can(tree: Path) -> None:
    result = make(tree, "engine", "GPU=4090", "PYTHON=nosuch-python")
    assert result.returncode != 0 and "Python 3.11 or newer is needed" in result.stderr


def test_an_engine_for_several_gpus_has_a_folder_of_its_own(tree: Path) -> None:
    shown = make(tree, "--dry-run", ".engine", "RUN=run", "GPU=a10g,l4", "WEIGHTS=external").stdout
    assert "--gpu a10g,l4 --flavor auto --weights external --out run/engines/a10g+l4-fp16-external" in shown


@pytest.mark.parametrize(
    ("budget", "flag", "name"), [("default", "", "report-fp16"), ("quick", "--quick ", "report-fp16-quick")]
)
def test_a_report_of_another_budget_has_a_folder_of_its_own(
    tree: Path, budget: str, flag: str, name: str
) -> None:
    shown = make(tree, "--dry-run", ".report", "RUN=run", "MODEL=ck", f"BUDGET={budget}").stdout
    (line,) = [line for line in shown.splitlines() if " validate " in line]
    assert " ".join(line.split()).startswith(
        f".venv/bin/mistral-trt validate run/onnx-fp16 --reference 'ck' {flag}--out run/{name} |"
    )


@pytest.mark.parametrize("budget", ["", "fast", "quick full", "default default"])
def test_an_unknown_budget_is_refused(tree: Path, budget: str) -> None:
    result = make(tree, "report", f"BUDGET={budget}")
    assert f"BUDGET is '{budget}'; expected quick, default or full" in result.stderr
    assert result.returncode != 0


@pytest.mark.parametrize(
    "changed", ["", "validate/x.py", "validate/report/x.html", "runtime/x.py", "runtime/tensorrt/x.py"]
)
def test_a_report_is_made_again_when_what_makes_it_changed(tree: Path, changed: str) -> None:
    made = ("run/onnx-fp16/manifest.json", "run/report-fp16/report.json", "run/.report-fp16.passed")
    for name, age in [*((name, 100) for name in made), *([(changed, 50)] if changed else [])]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
        os.utime(tree / name, (time.time() - age,) * 2)
    for source in (tree / "src").rglob("*.py"):
        os.utime(source, (1, 1))
    shown = make(tree, "--dry-run", ".report", "RUN=run").stdout
    assert " export " not in shown
    assert (" validate " in shown) == bool(changed)


def test_an_empty_model_is_refused(tree: Path) -> None:
    assert "MODEL is empty" in make(tree, "engine", "MODEL=").stderr


@pytest.mark.slow
def test_make_does_only_what_is_out_of_date(tmp_path: Path) -> None:
    if not (ROOT / ".venv" / "bin" / "mistral-trt").exists():
        pytest.skip("needs the environment that make builds")
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    arguments = (".onnx", f"RUN={tmp_path}", f"MODEL={checkpoint}", "PRECISION=fp32", "CHUNK=4")
    first = make(ROOT, *arguments)
    manifest = tmp_path / "onnx-fp32-c4" / "manifest.json"
    assert first.returncode == 0, first.stderr
    made = manifest.stat().st_mtime_ns
    again = make(ROOT, *arguments)
    assert (again.returncode, manifest.stat().st_mtime_ns) == (0, made)
    other = make(ROOT, *arguments, "WINDOW=4")
    assert other.returncode == 0, other.stderr
    assert (tmp_path / "onnx-fp32-w4-c4" / "manifest.json").is_file()
    manifest.unlink()
    assert make(ROOT, *arguments).returncode != 0  # a folder that is not ours any more is not replaced
