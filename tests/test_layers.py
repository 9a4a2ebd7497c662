"""Who may import whom, read from the source text: stages meet in files and in the core, not in code."""

import ast
import re
import shutil
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("export", "engines", "runtime", "validate")
HEAVY = {
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "transformers",
    "rich",
    "matplotlib",
    "tensorrt",
    "tensorrt_rtx",
}
_STAGE_NAME = re.compile(rf"mistral_trt\.({'|'.join(STAGES)})(\.\w+)*")


class Import(NamedTuple):
    """One import of a module.  deferred: inside a function, so only when that is called."""

    line: int
    module: str
    deferred: bool


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its name: the core and the four stage folders."""
    found = {}
    for path in sorted((root / "src" / "mistral_trt").glob("*.py")):
        found[f"mistral_trt.{path.stem}".removesuffix(".__init__")] = path
    for stage in STAGES:
        for path in sorted((root / stage).rglob("*.py")):
            dotted = ".".join(path.relative_to(root).with_suffix("").parts)
            found[f"mistral_trt.{dotted}".removesuffix(".__init__")] = path
    return found


@cache
def imports(text: str) -> list[Import]:
    """Every module that a source text imports; relative ones keep their dots.

    A stage named in a call (`import_module("mistral_trt.export.graph")`) counts as an import.
    """
    tree, found = ast.parse(text), []
    deferred = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names = [f"{base}.{a.name}" for a in node.names] if base == "mistral_trt" else [base]
        elif isinstance(node, ast.Call):
            texts = [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
            names = [text for text in texts if _STAGE_NAME.fullmatch(text)]
        found += [Import(node.lineno, name, id(node) in deferred) for name in names]  # type: ignore[attr-defined]
    return found


def stage_of(module: str) -> str | None:
    """mistral_trt.export.graph -> export; None for the core and for everything that is not ours."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "mistral_trt" and parts[1] in STAGES else None


def violations(root: Path) -> list[str]:
    """Imports that break the layers, as `file:line: why`."""
    found = []
    for name, path in modules(root).items():
        own = stage_of(name)
        for line, target, _ in imports(path.read_text()):
            where = f"{path.relative_to(root)}:{line}: "
            if target.startswith("."):
                found.append(f"{where}relative import of {target}")
            elif target.split(".")[0] in STAGES:
                found.append(f"{where}{target} is imported as if it were top-level")
            elif stage_of(target) not in (None, own) and own != "validate":
                found.append(f"{where}{own or 'the core'} imports the stage {stage_of(target)}")
    return found + heavy_runtime_imports(root)


def heavy_runtime_imports(root: Path) -> list[str]:
    """What `import mistral_trt.runtime.…` would load although the runtime must do without."""
    runtime = [name for name in modules(root) if stage_of(name) == "runtime"]
    return [f"{where}: the runtime loads {target}" for where, target in loaded(root, runtime, HEAVY)]


def loaded(root: Path, start: list[str], packages: set[str]) -> list[tuple[str, str]]:
    """Imports of `packages` that run when the modules of `start` are imported: (file:line, module)."""
    known = modules(root)
    waiting, seen, found = list(start), set(), []
    while waiting:
        name = waiting.pop()
        if name in seen or name not in known:
            continue
        seen.add(name)
        for line, target, deferred in imports(known[name].read_text()):
            if target.split(".")[0] in packages and not deferred:
                found.append((f"{known[name].relative_to(root)}:{line}", target))
            if not deferred:
                waiting.append(target)
    return found


def circles(root: Path, stage: str) -> list[list[str]]:
    """Parts of a stage that import each other in circles: for each such part the shortest way round.

    A part is a sub-package, or a module that is in none; what a stage's `__init__` exports is no part of it.
    """
    edges: dict[str, set[str]] = {}
    for name, path in modules(root).items():
        if stage_of(name) == stage and len(name.split(".")) > 2:
            found = {target for _, target, _ in imports(path.read_text()) if stage_of(target) == stage}
            parts = {target.split(".")[2] for target in found if len(target.split(".")) > 2}
            own = name.split(".")[2]
            edges.setdefault(own, set()).update(parts - {own})

    circles = []
    for part in sorted(edges):
        ways, seen = [[part]], {part}
        for way in ways:  # grows as it goes
            if part in edges.get(way[-1], ()):
                circles.append([*way, part])
                break
            new = sorted(edges.get(way[-1], set()) - seen)
            ways += [[*way, target] for target in new]
            seen.update(new)
    return circles


def undeclared(root: Path) -> list[str]:
    """Third-party modules that a stage imports and that neither the package nor its extra asks for."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def packages(requirements: list[str]) -> set[str]:
        names: set[str] = set()
        for requirement in requirements:
            if inner := re.match(r"mistral-trt\[(.*)\]", requirement):
                names |= set().union(*(packages(extras[extra.strip()]) for extra in inner[1].split(",")))
            else:
                name = re.match(r"[\w-]+", requirement)[0].replace("-", "_")  # type: ignore[index]
                names.add(name.removeprefix("nvidia_"))  # nvidia-modelopt is imported as modelopt
        return names

    allowed = {"export": "export", "engines": "engines", "validate": "validate", "runtime": "onnxruntime"}
    own = {"demo_model": "demo", "synth": "synth", "quantization": "quantize"}
    own |= {"fake_quantization": "quantize", "lm_eval_adapter": "lm-eval", "lm_eval_tasks": "lm-eval"}
    base, found = packages(project["dependencies"]), []
    for name, path in modules(root).items():
        stage = stage_of(name)
        declared = set(base) | {"mistral_trt"}
        if stage:
            extra = own.get(path.stem) or own.get(path.parent.name) or allowed[stage]
            declared |= packages(extras[extra])
        elif path.stem == "progress":
            declared |= packages(extras["export"]) & packages(extras["engines"])
        for line, target, _ in imports(path.read_text()):
            top = target.split(".")[0]
            if top not in declared and top not in sys.stdlib_module_names:
                found.append(f"{path.relative_to(root)}:{line}: {top} is not declared")
    return found


def test_the_modules_are_found() -> None:
    found = modules(ROOT)
    assert {"mistral_trt", "mistral_trt.contract", "mistral_trt.runtime", "mistral_trt.export.graph"} <= set(
        found
    )
    assert {stage_of(name) for name in found} == {None, *STAGES}
    assert len(found) > 25


def test_the_layers_hold() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize("stage", STAGES)
def test_the_parts_of_a_stage_do_not_import_each_other_in_circles(stage: str) -> None:
    assert circles(ROOT, stage) == []


@pytest.mark.parametrize("start", ["mistral_trt.export.__main__", "mistral_trt.export.quantization.recipe"])
def test_only_a_quantized_export_loads_modelopt_and_transformers(start: str) -> None:
    found = loaded(ROOT, [start], {"modelopt", "transformers", "safetensors"})
    assert bool(found) == start.endswith("recipe")


def test_every_package_that_is_imported_is_declared() -> None:
    assert undeclared(ROOT) == []


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source text, for planting faults."""
    for name in ("src", *STAGES):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", *(STAGES if name == "src" else ()))
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


PLANTED = {
    "export imports engines": ("export/graph.py", "import mistral_trt.engines.build", "the stage engines"),
    "engines import export": ("engines/build.py", "from mistral_trt.export import graph", "the stage export"),
    "runtime imports validate": (
        "runtime/cache.py",
        "from mistral_trt import validate",
        "the stage validate",
    ),
    "runtime imports export": ("runtime/engine.py", "import mistral_trt.export", "the stage export"),
    "in a function": ("runtime/cache.py", "def f():\n    import mistral_trt.engines", "the stage engines"),
    "named in a call": ("runtime/cache.py", "import_module('mistral_trt.export.graph')", "the stage export"),
    "core imports a stage": ("src/mistral_trt/contract.py", "import mistral_trt.runtime", "the core imports"),
    "core names a stage": ("src/mistral_trt/errors.py", "f('mistral_trt.validate')", "the core imports"),
    "relative": ("validate/report.py", "from . import metrics", "relative import of ."),
    "relative to the core": (
        "export/graph.py",
        "from ..contract import Ring",
        "relative import of ..contract",
    ),
    "as if top-level": (
        "validate/report.py",
        "import runtime.cache",
        "runtime.cache is imported as if it were",
    ),
    "torch in the runtime": ("runtime/cache.py", "import torch.nn", "the runtime loads torch.nn"),
    "torch behind the core": ("src/mistral_trt/contract.py", "import torch", "the runtime loads torch"),
    "onnx in a class": ("runtime/cache.py", "class X:\n    import onnx", "the runtime loads onnx"),
    "in a try": ("runtime/cache.py", "try:\n    import rich\nexcept ImportError: pass", "runtime loads rich"),
}


@pytest.mark.parametrize(("file", "text", "words"), PLANTED.values(), ids=PLANTED)
def test_a_planted_violation_is_found(tree: Path, file: str, text: str, words: str) -> None:
    assert violations(tree) == []
    with (tree / file).open("a") as source:
        source.write(f"\n{text}\n")
    found = violations(tree)
    assert found[0].startswith(f"{file}:") and words in found[0]


@pytest.mark.parametrize(
    ("file", "line", "circle"),
    [
        ("network/parse.py", "from mistral_trt.engines.builder.callbacks import x", ["builder", "network"]),
        ("network/audit.py", "import mistral_trt.engines.planning.budget", ["network", "planning"]),
        ("builder/api.py", "import mistral_trt.engines.planning.settle", None),
        ("targets.py", "from mistral_trt.engines.planning import wish", ["planning", "targets"]),
        ("gpu.py", "def f():\n    import mistral_trt.engines.flavor", ["flavor", "gpu"]),
    ],
)
def test_a_planted_circle_is_found(tree: Path, file: str, line: str, circle: list[str] | None) -> None:
    with (tree / "engines" / file).open("a") as source:
        source.write(f"\n{line}\n")
    found = circles(tree, "engines")
    assert ([*circle, circle[0]] in found) if circle else found == []


def test_what_is_allowed_is_not_reported(tree: Path) -> None:
    with (tree / "validate" / "report.py").open("a") as source:
        source.write("\nimport mistral_trt.export.graph, mistral_trt.runtime.cache, torch\n")
    with (tree / "runtime" / "cache.py").open("a") as source:
        source.write("\nfrom mistral_trt.runtime.cache import Step\ndef f():\n    import torch\n")
        source.write("if TYPE_CHECKING:\n    import onnx\n")
    assert violations(tree) == []


@pytest.mark.parametrize(
    ("file", "package"),
    [
        ("runtime/cache.py", "requests"),
        ("src/mistral_trt/contract.py", "numpy_"),
        ("engines/gpu.py", "torch"),
    ],
)
def test_an_undeclared_package_is_found(tree: Path, file: str, package: str) -> None:
    with (tree / file).open("a") as source:
        source.write(f"\nimport {package}\n")
    (found,) = undeclared(tree)
    assert found.startswith(f"{file}:") and found.endswith(f": {package} is not declared")
