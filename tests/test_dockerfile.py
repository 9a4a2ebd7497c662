"""The Dockerfile, as far as it can be tried without Docker: what it copies is there, what it runs runs.

No image is built: base images, apt and useradd are Docker's. Every pip command of it runs here, in a copy of
the build context, with installed packages in place of an index; so does what it starts.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import Distribution, distribution
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.conftest import Folder

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "Dockerfile").read_text()
LOCK = (ROOT / "requirements.lock").read_text()


@dataclass(frozen=True)
class Instruction:
    """One of a Dockerfile.  stage: which FROM it belongs to; -1 before the first."""

    stage: int
    name: str
    words: str


def parse(text: str) -> list[Instruction]:
    """Instructions in order: lines that end in a backslash joined, comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(lines)).splitlines()
    found: list[Instruction] = []
    for line in joined:
        name, words = line.split(maxsplit=1)
        assert name.isupper(), f"not an instruction: {line}"
        stage = (found[-1].stage if found else -1) + (name == "FROM")
        found.append(Instruction(stage, name, words.strip()))
    return found


INSTRUCTIONS = parse(TEXT)


def of(name: str, stage: int | None = None) -> list[str]:
    return [one.words for one in INSTRUCTIONS if one.name == name and stage in (None, one.stage)]


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore keeps a path out of the context: of the patterns that match, the last decides."""
    folders = [PurePosixPath(path), *PurePosixPath(path).parents][: path.count("/") + 1]
    out = False
    for pattern in patterns:
        plain, names = pattern.removeprefix("!"), [str(one) for one in folders]
        if plain.startswith("**/"):
            plain, names = plain.removeprefix("**/"), [one.name for one in folders]
        if any(fnmatch(name, plain) for name in names):
            out = not pattern.startswith("!")
    return out


def patterns() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


# ---------------------------------------------------------------- what it says


def test_the_parser_joins_lines_and_counts_stages() -> None:
    found = parse("# a\nFROM x AS y\nRUN one \\\n && two\n\nFROM z\nUSER me\n")
    assert [(one.stage, one.name, one.words) for one in found] == [
        (0, "FROM", "x AS y"), (0, "RUN", "one  && two"), (1, "FROM", "z"), (1, "USER", "me"),
    ]  # fmt: skip


def test_the_rules_of_the_context_are_understood() -> None:
    rules = ["*", "!src", "**/__pycache__"]
    assert not ignored("src/a/b.py", rules) and ignored("tests/a.py", rules)
    assert ignored("src/a/__pycache__/b.pyc", rules) and ignored("__pycache__", rules)


def test_everything_it_copies_is_there_and_in_the_context() -> None:
    copied = [words.split()[:-1] for words in of("COPY") if not words.startswith("--from")]
    sources = [source for words in copied for source in words]
    assert {"src", "runtime", "requirements.lock", "examples/service.py"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source, patterns()), source
    for kept_out in (".git", ".venv", "build", "tests", "bench", "src/x.egg-info", "runtime/__pycache__"):
        assert ignored(kept_out, patterns()), kept_out


def test_a_stage_copies_only_from_stages_before_it() -> None:
    named = {re.search(r" AS (\w+)$", words)[1]: i for i, words in enumerate(of("FROM")) if " AS " in words}  # type: ignore[index]
    for one in INSTRUCTIONS:
        if one.name == "COPY" and (found := re.match(r"--from=(\w+) ", one.words)):
            assert named[found[1]] < one.stage


def test_the_wheels_stage_holds_every_file_that_the_wheel_is_built_from() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    copied = " ".join(of("COPY", 0)).split()
    links = [link for link in (ROOT / "src" / "mistral_trt").iterdir() if link.is_symlink()]
    assert {link.name for link in links} <= set(copied)
    assert {"pyproject.toml", "src", project["readme"], *project["license-files"]} <= set(copied)


def test_versions_are_those_of_the_lock() -> None:
    """Each install is constrained; TensorRT-RTX, which the plan decides, has a version of its own."""
    installs = [part for run in of("RUN") for part in run.split("&&") if "pip install" in part]
    assert installs and all(re.search(" -c (requirements.lock|constraints.txt) ", one) for one in installs)
    (default,) = (words.split("=")[1] for words in of("ARG", 1) if words.startswith("TENSORRT_RTX="))
    assert f"\ntensorrt_rtx=={default}\n" in LOCK
    (base,) = (words.split("=", 1)[1] for words in of("ARG", -1))
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base), "a base image without a full version"


def test_every_extra_it_installs_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra.strip() for group in re.findall(r"\[([a-z,]+)\]\"", TEXT) for extra in group.split(",")}
    assert named == {"gpu", "service"} and named <= set(extras)


KNOWN = {
    *("FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE"),
    *("HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT", "CMD"),
}
"""Instructions that this file looks at."""
PROGRAMS = {"pip", "grep", "useradd", "install"}
"""What RUN calls: pip is Python's, the others are in every Debian."""


def problems(text: str) -> list[str]:
    """What can be seen to be wrong with a Dockerfile without building it."""
    found, declared = [], dict[int, set[str]]()
    for one in parse(text):
        names = declared.setdefault(one.stage, set())
        if one.name not in KNOWN:
            found.append(f"unknown instruction {one.name}")
        reach = declared.get(-1, set()) if one.name == "FROM" else names
        found += [
            f"{name} is not declared" for name in re.findall(r"\$\{(\w+)\}", one.words) if name not in reach
        ]
        if one.name in ("ARG", "ENV"):
            names |= set(re.findall(r"(\w+)=", one.words))
        if one.name in ("CMD", "ENTRYPOINT"):
            found += [] if isinstance(_json(one.words), list) else [f"{one.name} is no list of words"]
        if one.name == "HEALTHCHECK":
            options, _, command = one.words.partition("CMD ")
            whole = re.fullmatch(r"(--(interval|timeout|start-period|retries)=\d+[smh]? *)+", options)
            found += [] if whole and isinstance(_json(command), list) else ["HEALTHCHECK"]
        if one.name == "RUN":
            checked = subprocess.run(["sh", "-n", "-c", one.words], capture_output=True)
            called = {part.split()[0] for part in re.split(r"&&|\|\|?|;", one.words)}
            found += ["RUN is no shell command"] if checked.returncode else []
            found += [f"RUN calls {name}" for name in sorted(called - PROGRAMS)]
    return found


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def test_nothing_is_seen_to_be_wrong_with_it() -> None:
    assert problems(TEXT) == []


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("STOPSIGNAL", "STOPSIGNALS", "unknown instruction STOPSIGNALS"),
        ("ARG TENSORRT_RTX=", "ARG TENSORRT=", "TENSORRT_RTX is not declared"),
        ("ARG BASE=", "ARG BASIS=", "BASE is not declared"),
        ('CMD ["/engine"', 'CMD [/engine"', "CMD is no list of words"),
        ("--interval=10s", "--intervall=10s", "HEALTHCHECK"),
        ("--start-period=15m", "--start-period=15 m", "HEALTHCHECK"),
        ("RUN useradd", "RUN adduser", "RUN calls adduser"),
        ('[gpu,service]"', "[gpu,service]", "RUN is no shell command"),
    ],
)
def test_what_is_wrong_would_be_seen(right: str, wrong: str, words: str) -> None:
    assert TEXT.count(right) >= 1
    assert words in problems(TEXT.replace(right, wrong))


GLIBC = {"bookworm": (2, 36), "trixie": (2, 41)}
"""Debian release → its C library."""


def in_the_image() -> dict[str, Distribution]:
    """What pip puts there beside this package, as it is installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    waiting = [*project["dependencies"], *extras["gpu"], *extras["service"], "tensorrt-rtx"]
    found: dict[str, Distribution] = {}
    while waiting:
        asked = Requirement(waiting.pop())
        if asked.name not in found and (asked.marker is None or asked.marker.evaluate({"extra": ""})):
            found[asked.name] = distribution(asked.name)
            waiting += found[asked.name].requires or []
    return found


def fits(tag: str, glibc: tuple[int, int]) -> bool:
    """Whether a wheel of that tag runs on x86-64 with that C library and what else manylinux names."""
    platform = tag.split("-")[2]
    newer = re.fullmatch(r"manylinux_(\d+)_(\d+)_x86_64", platform)
    if newer:
        return (int(newer[1]), int(newer[2])) <= glibc
    return platform in ("any", "manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64")


def test_every_wheel_that_it_installs_fits_the_base_image() -> None:
    """No compiler is there, and no library but Debian's own: wheels have to bring theirs."""
    (base,) = (words.split("=", 1)[1] for words in of("ARG", -1))
    version, debian = re.fullmatch(r"python:([\d.]+)-slim-(\w+)", base).groups()  # type: ignore[union-attr]
    found = in_the_image()
    assert {"numpy", "tokenizers", "cuda-bindings", "starlette", "uvicorn", "tensorrt-rtx"} <= set(found)
    for name, one in found.items():
        tags = re.findall(r"^Tag: (.+)$", one.read_text("WHEEL") or "", re.MULTILINE)
        assert any(fits(tag, GLIBC[debian]) for tag in tags), (name, tags)
        assert version in SpecifierSet(one.metadata["Requires-Python"] or ""), name
    assert not fits("cp311-cp311-manylinux_2_39_x86_64", GLIBC[debian])
    assert not fits("cp311-cp311-linux_x86_64", GLIBC[debian])


def test_the_service_is_not_run_by_root() -> None:
    last = max(one.stage for one in INSTRUCTIONS)
    (user,) = of("USER", last)
    order = [one.name for one in INSTRUCTIONS if one.stage == last]
    assert user not in ("root", "0") and f"useradd --uid 10001 --create-home {user} " in of("RUN", last)[0]
    assert order.index("USER") < order.index("ENTRYPOINT") and "RUN" not in order[order.index("USER") :]


# ---------------------------------------------------------------- what it does


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build context: what .dockerignore lets through, links kept."""
    root, rules = tmp_path_factory.mktemp("docker"), patterns()

    def skip(folder: str, names: list[str]) -> set[str]:
        inside = Path(folder).relative_to(ROOT)
        return {name for name in names if ignored((inside / name).as_posix(), rules)}

    return Path(shutil.copytree(ROOT, root / "context", symlinks=True, ignore=skip))


def stage_folder(context: Path, stage: int, root: Path) -> Path:
    """Do the COPY instructions of a stage.  root: stands for / in it.  Returns its working directory."""
    (work,) = of("WORKDIR", stage)
    folder = root / work.lstrip("/")
    folder.mkdir(parents=True)
    for words in of("COPY", stage):
        *sources, target = words.split()
        if words.startswith("--from"):
            continue
        for source in sources:
            found, to = context / source, folder / target
            if found.is_dir():
                shutil.copytree(found, to, symlinks=True)
            else:
                shutil.copy(found, to)
    return folder


def sh(command: str, cwd: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """As RUN does, but offline: pip takes what is installed here, and installs nothing."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "PIP_NO_INDEX": "1", "PIP_DRY_RUN": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment = {**os.environ, **own, **variables}
    return subprocess.run(["sh", "-ec", command], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_pip_command_runs(context: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    first = stage_folder(context, 0, tmp_path / "first")
    for run in of("RUN", 0):
        done = sh(run.replace("/wheels", str(wheels)), first)
        assert done.returncode == 0, done.stderr
    (wheel,) = wheels.iterdir()
    assert wheel.name.startswith("mistral_trt-")
    second = stage_folder(context, 1, tmp_path / "second")
    (version,) = (words.split("=")[1] for words in of("ARG", 1))
    runs = [run for run in of("RUN", 1) if "pip" in run]
    for run in runs:
        done = sh(run.replace("/wheels", str(wheels)), second, TENSORRT_RTX=version)
        assert done.returncode == 0, done.stderr
    assert "Would install mistral-trt" in done.stdout
    assert "tensorrt" not in (second / "constraints.txt").read_text()
    wrong = runs[-1].replace("service]", "services]").replace("/wheels", str(wheels))
    assert "does not provide the extra 'services'" in sh(wrong, second).stderr
    assert sh(runs[0], second, TENSORRT_RTX="1.0").returncode != 0


def test_what_it_starts_starts_and_its_health_check_tells(
    context: Path, onnx_folder: Folder, tmp_path: Path
) -> None:
    engine = onnx_folder(tokenizer=True, vocab_size=259, num_hidden_layers=1)
    folder = stage_folder(context, 1, tmp_path / "image")
    words = [*json.loads(of("ENTRYPOINT")[0]), *json.loads(of("CMD")[0])]
    ours = {"python": sys.executable, "/engine": str(engine), "8000": "0", "0.0.0.0": "127.0.0.1"}
    assert set(ours) <= set(words) and f"EXPOSE {words[-1]}" in TEXT
    command = [ours.get(word, word) for word in words]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        said = next(line for line in run.stderr if "running on" in line)
        port = said.split("127.0.0.1:")[1].split()[0]
        assert health(port).returncode == 0
        run.send_signal(getattr(signal, of("STOPSIGNAL")[0]))
        assert run.wait(60) == 0
    assert health(port).returncode != 0


def health(port: str) -> "subprocess.CompletedProcess[str]":
    """What HEALTHCHECK runs."""
    (words,) = of("HEALTHCHECK")
    check = json.loads(words[words.index("CMD") + 3 :])
    assert check[0] == "python" and ":8000/" in check[-1]
    command = [sys.executable, *(word.replace(":8000/", f":{port}/") for word in check[1:])]
    return subprocess.run(command, capture_output=True, text=True)
