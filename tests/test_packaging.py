"""What is installed is what is in the tree: stages under one name, a light runtime, whole wheels."""

import inspect
import io
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Callable
from email.parser import Parser
from importlib import import_module
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mistral_trt
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.runtime import Engine, SamplingParams
from tests.models import write_checkpoint, write_tokenizer
from tests.test_layers import imports, modules, stage_of

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("export", "engines", "runtime", "validate")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHIPPED = {".py", ".toml", ".json", ".jsonl", ".html", ".txt", ".typed"}


def python(code: str, cwd: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that has neither this tree nor the working folder on its path.

    variables: of its environment, over ours.
    """
    return subprocess.run(
        [sys.executable, "-P", *options, "-c", code],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_a_relative_link_to_its_root_folder(stage: str) -> None:
    link = ROOT / "src" / "mistral_trt" / stage
    assert link.is_symlink(), "a checkout without symbolic links builds wheels without stages"
    assert link.readlink() == Path("..") / ".." / stage
    assert link.resolve() == ROOT / stage


def test_stages_have_one_name_each(tmp_path: Path) -> None:
    code = f"""
from importlib.util import find_spec
for stage in {STAGES}:
    assert find_spec("mistral_trt." + stage), stage
    assert find_spec(stage) is None, stage
"""
    found = python(code, tmp_path)
    assert found.returncode == 0, found.stderr


def test_a_stage_seen_as_top_level_would_be_noticed() -> None:
    code = "from importlib.util import find_spec; print(find_spec('export') is not None)"
    seen = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert seen.stdout == "True\n", "with the root on the path, without -P, it is visible"


@pytest.mark.parametrize("name", ["mistral_trt.runtime", "mistral_trt.engines"])
def test_public_names_are_those_it_lists(name: str) -> None:
    module = import_module(name)
    public = {n for n, v in vars(module).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert public == set(module.__all__)
    assert list(module.__all__) == sorted(module.__all__)


def test_the_version_is_that_of_the_project() -> None:
    assert mistral_trt.__version__ == PROJECT["version"]


def test_a_tree_that_was_never_installed_has_a_version_too(tmp_path: Path) -> None:
    shutil.copy(ROOT / "src" / "mistral_trt" / "__init__.py", tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import __init__ as m; print(m.__version__)"
    found = python(code, tmp_path, "-S", "-I")
    assert found.stdout == "0+unknown\n"


# ---------------------------------------------------------------- a light runtime

HEAVY = {
    *("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "rich", "matplotlib"),
    *("onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "llguidance", "huggingface_hub"),
    *("asyncio", "ssl", "multiprocessing", "starlette", "uvicorn"),
}
LOADED = """
import sys
import {module}
print(sorted({heavy} & set(sys.modules)))
"""
DEFERRED = {"jinja2", "importlib.metadata", "email"}
"""What the runtime needs sooner or later, and not to be imported."""
IMPORT_MAX_S = 0.3
TIMED = "import time; started = time.thread_time(); {code}; print(time.thread_time() - started)"
"""Seconds the importing thread had the processor: neither other jobs count, nor numpy's threads that wait."""


def loaded(module: str, cwd: Path, heavy: set[str] = HEAVY) -> subprocess.CompletedProcess[str]:
    return python(LOADED.format(module=module, heavy=heavy), cwd)


def seconds(code: str, cwd: Path) -> float:
    """Median of five fresh interpreters, after one that leaves the compiled modules behind."""
    kept = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(cwd / "compiled")}
    ran = [python(TIMED.format(code=code), cwd, **kept) for _ in range(6)]
    assert not any(one.returncode for one in ran), ran[0].stderr
    return statistics.median(float(one.stdout) for one in ran[1:])


@pytest.mark.parametrize(
    "module",
    ["mistral_trt.runtime", "mistral_trt.runtime.__main__", "mistral_trt.cli", "mistral_trt.inspect"],
)
def test_it_loads_nothing_heavy(module: str, tmp_path: Path) -> None:
    found = loaded(module, tmp_path)
    assert (found.returncode, found.stdout) == (0, "[]\n"), found.stderr


def test_something_heavy_would_be_seen(tmp_path: Path) -> None:
    assert loaded("mistral_trt.runtime, rich", tmp_path).stdout == "['rich']\n"


def test_the_runtime_puts_off_what_only_some_of_its_users_need(tmp_path: Path) -> None:
    assert loaded("mistral_trt.runtime", tmp_path, DEFERRED).stdout == "[]\n"
    assert loaded("mistral_trt.runtime, jinja2", tmp_path, DEFERRED).stdout == "['jinja2']\n"


@pytest.mark.alone
def test_the_runtime_is_imported_in_a_moment(tmp_path: Path) -> None:
    runtime = "import mistral_trt.runtime"
    assert seconds(runtime, tmp_path) <= IMPORT_MAX_S
    slowly = f"{runtime}; exec('while time.thread_time() - started < 0.31: pass')"
    assert seconds(slowly, tmp_path) > IMPORT_MAX_S


# ---------------------------------------------------------------- wheel and sdist


def copy_of_tree(to: Path) -> Path:
    """The tree as a checkout has it: no environment, no artifacts, links kept."""
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, to, symlinks=True, ignore=ignore))


def shipped(tree: Path) -> dict[str, bytes]:
    """Every file of the package that belongs into a wheel, by its name there."""
    roots = {f"mistral_trt/{stage}": tree / stage for stage in STAGES}
    files = {f"mistral_trt/{p.name}": p for p in (tree / "src" / "mistral_trt").iterdir() if p.is_file()}
    for name, folder in roots.items():
        files |= {f"{name}/{p.relative_to(folder).as_posix()}": p for p in folder.rglob("*")}
    return {name: p.read_bytes() for name, p in files.items() if p.suffix in SHIPPED}


def build(hook: str, tree: Path, out: Path) -> Path:
    """Run one hook of setuptools as pip does, in a process of its own."""
    out.mkdir()
    code = f"import sys, setuptools.build_meta as b; b.build_{hook}(sys.argv[1])"
    made = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=tree,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    (path,) = out.iterdir()
    return path


def check_wheel(wheel: Path, tree: Path) -> None:
    """The wheel holds every file of the stages as a real file, and nothing beside the package."""
    with zipfile.ZipFile(wheel) as archive:
        names = [info.filename for info in archive.infolist()]
        found = {name: archive.read(name) for name in names if name.startswith("mistral_trt/")}
        links = [info.filename for info in archive.infolist() if info.external_attr >> 28 == 0o12]
    assert links == []
    assert found == shipped(tree)
    assert {name.split("/")[0] for name in names} == {"mistral_trt", wheel_metadata_folder(wheel)}


def wheel_metadata_folder(wheel: Path) -> str:
    return "-".join(wheel.name.split("-")[:2]) + ".dist-info"


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--isolated", *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_tree(tmp_path_factory.mktemp("packaging") / "tree")


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    made = pip(
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(tree.parent / "wheel"),
        str(tree),
    )
    assert made.returncode == 0, made.stderr
    (path,) = (tree.parent / "wheel").iterdir()
    return path


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_every_stage(wheel: Path, tree: Path) -> None:
    check_wheel(wheel, tree)
    names = set(shipped(tree))
    assert {"mistral_trt/engines/gpus/a10g.toml", "mistral_trt/py.typed", "mistral_trt/cli.py"} <= names
    assert any(name.endswith(".html") for name in names) and any(name.endswith(".txt") for name in names)


@pytest.mark.slow
def test_a_wheel_from_a_checkout_without_links_would_be_caught(tmp_path: Path) -> None:
    broken = copy_of_tree(tmp_path / "tree")
    for stage in STAGES:
        link = broken / "src" / "mistral_trt" / stage
        link.unlink()
        link.write_text(f"../../{stage}")
    with pytest.raises(AssertionError):
        check_wheel(build("wheel", broken, tmp_path / "out"), broken)


@pytest.mark.slow
def test_the_wheel_asks_for_what_the_runtime_needs_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folder = wheel_metadata_folder(wheel)
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
        licence = archive.read(f"{folder}/licenses/LICENSE")
    required = metadata.get_all("Requires-Dist") or []
    assert [r for r in required if "extra ==" not in r] == PROJECT["dependencies"]
    assert set(metadata.get_all("Provides-Extra") or []) == set(PROJECT["optional-dependencies"])
    assert "mistral-trt = mistral_trt.cli:main" in entry_points
    assert licence == (ROOT / "LICENSE").read_bytes()


@pytest.mark.slow
def test_the_sdist_holds_real_files_and_builds_the_same_wheel(tree: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tree, tmp_path / "sdist")) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    check_wheel(build("wheel", unpacked, tmp_path / "wheel"), tree)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[int, str, str]]:
    """Run a program of a fresh environment that holds the wheel and no other package."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(home, with_pip=False)
    made = pip("--python", str(home), "install", "--no-deps", "--no-index", str(wheel))
    assert made.returncode == 0, made.stderr

    def program(name: str, *arguments: str) -> tuple[int, str, str]:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        ended = subprocess.run(
            [home / "bin" / name, *arguments],
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        return ended.returncode, ended.stdout, ended.stderr

    return program


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (("export", "x", "--out", "y"), "", "export"),
        (("gpus",), "", "engines"),
        (("build", "x", "--gpu", "a10g", "--out", "y"), "", "engines"),
        (("validate", "x", "--reference", "y", "--out", "z"), "", "validate"),
        (("generate", "x", "--prompt", "y"), "numpy", "onnxruntime"),
    ],
)
def test_an_installed_command_says_which_extra_is_missing(
    installed: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], package: str, extra: str
) -> None:
    status, out, err = installed("mistral-trt", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"mistral-trt {arguments[0]}: this command needs the package '{package}")
    assert err.endswith(f"which is not installed; run: pip install 'mistral-trt[{extra}]'\n")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_the_installed_command_needs_no_package_for_what_needs_none(
    installed: Callable[..., tuple[int, str, str]],
) -> None:
    assert installed("mistral-trt", "--version") == (0, f"mistral-trt {PROJECT['version']}\n", "")
    status, out, _ = installed("mistral-trt", "--help")
    assert status == 0 and "  export " in out
    status, _, err = installed("mistral-trt", "inspect", "nowhere")
    assert status == 2 and err.startswith("mistral-trt inspect: nowhere is not a folder")
    status, out, err = installed("python", "-c", "import mistral_trt.export, mistral_trt.validate, export")
    assert status == 1 and "No module named 'export'" in err


# ---------------------------------------------------------------- the runtime alone


def needed(wheel: Path, *extras: str) -> dict[str, Distribution]:
    """The installed distributions that pip would install with the wheel, by name."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"{wheel_metadata_folder(wheel)}/METADATA").decode())
    waiting = [(Requirement(line), extras) for line in metadata.get_all("Requires-Dist") or []]
    found: dict[str, Distribution] = {}
    while waiting:
        requirement, wanted = waiting.pop()
        asked = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("", *wanted)
        )
        if asked and requirement.name not in found:
            found[requirement.name] = distribution(requirement.name)
            inner = found[requirement.name].requires or []
            waiting += [(Requirement(line), tuple(requirement.extras)) for line in inner]
    return found


@pytest.fixture(scope="module")
def embedded(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, ONNX Runtime and what the two ask for, linked from this one."""
    home = tmp_path_factory.mktemp("embedded") / "venv"
    venv.create(home, with_pip=False)
    (site,) = home.glob("lib/python*/site-packages")
    for found in needed(wheel, "onnxruntime").values():
        for name in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(str(found.locate_file(name)))
    made = pip("--python", str(home), "install", "--no-deps", "--no-index", str(wheel))
    assert made.returncode == 0, made.stderr
    return home


@pytest.mark.slow
def test_pip_finds_nothing_missing_there(embedded: Path) -> None:
    checked = pip("--python", str(embedded), "check")
    assert (checked.returncode, checked.stdout) == (0, "No broken requirements found.\n"), checked.stdout


@pytest.mark.slow
def test_the_runtime_alone_generates_text(embedded: Path, tmp_path: Path) -> None:
    """What is installed is the wheel and what it asks for; neither torch nor onnx is there."""
    checkpoint = write_tokenizer(write_checkpoint(tmp_path / "checkpoint", vocab_size=259))
    export_checkpoint(checkpoint, tmp_path / "artifact", precision="fp32", prefill_chunk=4)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def program(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = [str(embedded / "bin" / "python"), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)

    example = str(ROOT / "examples" / "stream.py")
    told = program(example, "artifact", "abc")
    assert told.returncode == 0, told.stderr.decode()
    params = SamplingParams(max_tokens=64, temperature=0.7, top_p=0.9, seed=1)
    with Engine.load(tmp_path / "artifact") as engine:
        expected = "".join(piece.text for piece in engine.stream("abc", params))
    assert told.stdout.decode() == expected + "\n"
    assert b"No module named 'torch'" in program("-c", "import torch").stderr
    assert b"No module named 'onnx'" in program("-c", "import onnx").stderr


@pytest.mark.parametrize("requirement", PROJECT["dependencies"])
def test_every_dependency_is_imported_by_the_runtime(requirement: str) -> None:
    name = Requirement(requirement).name
    imported = {
        one.module.split(".")[0]
        for module, path in modules(ROOT).items()
        if stage_of(module) in ("runtime", None)
        for one in imports(path.read_text())
    }
    assert name in imported


def test_the_checker_of_wheels_can_fail(tmp_path: Path) -> None:
    name = f"mistral_trt-{PROJECT['version']}"
    wheel = tmp_path / f"{name}-py3-none-any.whl"

    def write(files: dict[str, bytes]) -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for file, data in files.items():
                archive.writestr(file, data)
        wheel.write_bytes(buffer.getvalue())

    whole = {**shipped(ROOT), f"{name}.dist-info/METADATA": b""}
    write(whole)
    check_wheel(wheel, ROOT)
    for wrong in (
        {k: v for k, v in whole.items() if k != "mistral_trt/engines/gpus/a10g.toml"},
        {**whole, "mistral_trt/export/graph.py": b"altered"},
        {**whole, "export/graph.py": b""},
        {**whole, "mistral_trt/notes.bin": b""},
    ):
        write(wrong)
        with pytest.raises(AssertionError):
            check_wheel(wheel, ROOT)
