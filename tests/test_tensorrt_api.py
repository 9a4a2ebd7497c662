"""The listed names of TensorRT's API: in the installed packages, and neither more nor fewer than are used."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mistral_trt.engines.builder.api import (
    BUILDER,
    BUILDER_ENUMS,
    RTX_ONLY,
    SIGNATURES,
    listed,
)
from mistral_trt.engines.gpu import RTX_TARGETS
from mistral_trt.runtime.tensorrt import api as runtime_api

trt = pytest.importorskip("tensorrt_rtx")

ROOT = Path(__file__).resolve().parent.parent
LOCK = (ROOT / "requirements.lock").read_text()
NAMES = "src/mistral_trt/tensorrt_names.py"
LISTS = ("engines/builder/api.py", "runtime/tensorrt/api.py")
FOR_THE_BENCH = ("bench/build.py", "bench/process.py")  # what they measure, whatever it is called elsewhere
LEAN, LEAN_PACKAGES = "tensorrt_lean_bindings", ("tensorrt_lean_cu13_bindings", "tensorrt_lean_cu13_libs")
VARIABLES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "parser": "OnnxParser",
    "layer": "ILayer",
    "product": "ILayer",
    "attention": "IAttention",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "refitter": "Refitter",
    "runtime": "Runtime",
}
"""What a variable of that name is, in a module that has `trt` as a parameter."""


# --- the source -----------------------------------------------------------------------------------------


def sources(*stages: str) -> dict[str, str]:
    """Modules that speak to TensorRT, and the table of names they share: path below the root → text."""
    paths = [path for stage in stages for path in (ROOT / stage).rglob("*.py")]
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [*paths, ROOT / NAMES]}
    speak = r"\btrt: Any|\bnetwork: Any"
    return {name: text for name, text in texts.items() if name == NAMES or re.search(speak, text)}


def module_names(text: str) -> set[str]:
    """`trt.X` and `trt.X.Y` as X and X.Y; `getattr(trt.X, ...)` counts as X."""
    found = {ast.unparse(n) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute)}
    names = {name.removeprefix("trt.") for name in found if name.startswith("trt.")}
    return {name for name in names if "__" not in name}


def attributes(text: str) -> Iterator[tuple[str | None, str]]:
    """(class of the variable by its name or None, attribute) of each attribute access."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and "__" not in node.attr:
            variable = ast.unparse(node.value).removeprefix("parsed.")  # and not `contract.config`
            yield VARIABLES.get(variable), node.attr


def words(text: str) -> set[str]:
    """Strings in capitals: members of enums are compared by name too."""
    constants = {str(n.value) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)}
    return {word for word in constants if re.fullmatch(r"[A-Z][A-Z0-9_]+", word)}


def methods(text: str) -> set[str]:
    """Functions that classes define, as ours do for those of TensorRT they inherit from."""
    classes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef)]
    return {f.name for c in classes for f in c.body if isinstance(f, ast.FunctionDef)}


def members(name: str, api: dict[str, tuple[str, ...]]) -> set[str]:
    """Of a class with what it inherits from ILayer."""
    inherited = api.get("ILayer", ()) if name.endswith("Layer") else ()
    return {*api.get(name, ()), *inherited}


def unlisted(texts: dict[str, str], api: dict[str, tuple[str, ...]]) -> set[str]:
    """What the source uses of TensorRT and the list does not have."""
    found = set()
    for text in texts.values():
        for name in module_names(text):
            owner, _, member = name.partition(".")
            if owner not in api or (member and member not in api[owner]):
                found.add(name)
        for variable, member in attributes(text):
            if variable and hasattr(getattr(trt, variable), member) and member not in members(variable, api):
                found.add(f"{variable}.{member}")
        for enum in ("LayerType", "DataType", "BuilderFlag"):
            known = {word for word in words(text) if hasattr(getattr(trt, enum), word)}
            found |= {f"{enum}.{word}" for word in known if word not in api.get(enum, ())}
    return found


def unused(texts: dict[str, str], api: dict[str, tuple[str, ...]]) -> set[str]:
    """What the list has and no source uses."""
    text = "\n".join(texts.values())
    used = {member for _, member in attributes(text)} | methods(text) | words(text)
    classes = {name.partition(".")[0] for name in module_names(text)} | set(VARIABLES.values())
    silent = {"ITensor", "ILayer", "ParserError", "IAttention", "LayerType", "ComputeCapability"}
    found = {f"{name}.{member}" for name, all_of in api.items() for member in all_of if member not in used}
    found |= {name for name in api if name not in classes | silent}
    return {name for name in found if not name.startswith("ComputeCapability.")}


def test_what_the_engines_use_is_what_is_listed() -> None:
    api = {**BUILDER, **BUILDER_ENUMS}
    texts = sources("engines")
    needed = ("builder/plan.py", "builder/callbacks.py", "network/parse.py", "network/audit.py")
    assert {f"engines/{name}" for name in needed} <= set(texts)
    assert unlisted(texts, api) == set()
    assert unused(texts, api) == set()


@pytest.mark.parametrize("word", ["tensorrt-rtx", "tensorrt_rtx", "HALF", "BF16", "FP8"])
def test_tensorrts_words_are_spelled_once(word: str) -> None:
    """But for the lists of its API, which are lists of words."""
    folders = ("src/mistral_trt", "engines", "runtime", "validate", "export", "bench")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    dtype = word.isupper()
    found = set()
    for path in paths:
        constants = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        name = path.relative_to(ROOT).as_posix()
        if word in constants and name not in (*LISTS, *({} if dtype else FOR_THE_BENCH)):
            found.add(name)
    assert found == ({NAMES, "export/tensor_files.py"} if word == "BF16" else {NAMES})  # safetensors' BF16


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("trt.Refitter(engine, logger)", "Refitter"),
        ("trt.LayerType.CONVOLUTION_X", "LayerType.CONVOLUTION_X"),
        ("trt.BuilderFlag.REFIT", "BuilderFlag.REFIT"),
        ("getattr(trt.HardwareCompatibilityLevel, name)", "HardwareCompatibilityLevel"),
        ("layer.type.name == 'SOFTMAX'", "LayerType.SOFTMAX"),
        ("network.mark_debug(tensor)", "INetworkDefinition.mark_debug"),
        ("parsed.builder.is_network_supported(network, config)", "Builder.is_network_supported"),
        ("config.set_memory_pool_limit(pool, 1)", "IBuilderConfig.set_memory_pool_limit"),
        ("attention.num_ranks", "IAttention.num_ranks"),
    ],
)
def test_a_use_that_is_not_listed_is_found(line: str, found: str) -> None:
    texts = {**sources("engines"), "new.py": f"def new(trt: Any) -> None:\n    {line}\n"}
    assert unlisted(texts, {**BUILDER, **BUILDER_ENUMS}) == {found}


@pytest.mark.parametrize("line", ["contract.config.reset", "self.parser.flags", "config.hidden_size"])
def test_names_of_ours_are_not_taken_for_tensorrts(line: str) -> None:
    assert unlisted({"new.py": f"def new(trt: Any) -> None:\n    {line}\n"}, BUILDER) == set()


@pytest.mark.parametrize(
    ("name", "more", "found"),
    [
        ("Builder", "reset", "Builder.reset"),
        ("ProfilingVerbosity", "LAYER_NAMES_ONLY", "ProfilingVerbosity.LAYER_NAMES_ONLY"),
        ("IStreamWriter", "flush", "IStreamWriter.flush"),
    ],
)
def test_a_listed_name_that_nothing_uses_is_found(name: str, more: str, found: str) -> None:
    api = {**BUILDER, **BUILDER_ENUMS}
    assert unused(sources("engines"), {**api, name: (*api[name], more)}) == {found}


def test_a_listed_class_that_nothing_uses_is_found() -> None:
    assert unused(sources("engines"), {**BUILDER, **BUILDER_ENUMS, "ILoop": ()}) == {"ILoop"}


# --- the installed packages -----------------------------------------------------------------------------


def missing(module: Any, api: dict[str, tuple[str, ...]]) -> set[str]:
    """What a TensorRT does not have of a list."""
    absent = {name for name in api if not hasattr(module, name)}
    here = {name: members for name, members in api.items() if name not in absent}
    return absent | {
        f"{n}.{m}" for n, all_of in here.items() for m in all_of if not hasattr(getattr(module, n), m)
    }


def signatures(module: Any, name: str) -> set[str]:
    """Each overload of a method, as `SIGNATURES` writes it, read from the bindings' own documentation."""
    owner, _, method = name.partition(".")
    text = getattr(getattr(module, owner), method).__doc__ or ""
    found = set()
    for parameters, result in re.findall(rf"\b{method}\(self: [\w.]+(.*?)\) -> ([\w.\[\]:]+)", text):
        names = re.findall(r"(\w+): ", parameters.replace("<", "(").split(">")[0])
        names = [n for n in names if not n[0].isupper()]
        found.add(f"({', '.join(names)}) -> {re.sub(r'[A-Za-z_]+[.]', '', result)}")
    return found


def test_every_listed_name_is_in_tensorrt_rtx() -> None:
    assert missing(trt, listed("tensorrt-rtx")) == set()


def test_a_name_that_a_version_lacks_is_found() -> None:
    old = SimpleNamespace(Builder=SimpleNamespace(create_network=1))
    assert missing(old, {"Builder": ("create_network", "new"), "IMoELayer": ()}) == {
        "Builder.new",
        "IMoELayer",
    }


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_signatures_are_those_relied_on(name: str) -> None:
    owner, _, member = name.partition(".")
    assert member == "__init__" or member in listed("tensorrt-rtx")[owner]
    assert SIGNATURES[name] in signatures(trt, name)


def test_another_signature_is_found() -> None:
    found = signatures(trt, "INetworkDefinition.set_weights_name")
    assert found == {"(weights, name) -> bool"}
    assert "(name, weights) -> bool" not in found


def test_targets_are_those_of_the_catalogue() -> None:
    assert set(BUILDER_ENUMS["ComputeCapability"]) == {"SM" + c.replace(".", "") for c in RTX_TARGETS}


# --- the other flavor -----------------------------------------------------------------------------------


def lean() -> ModuleType:
    """The runtime half of full TensorRT, which imports without a GPU; it is in the lock."""
    if find_spec(LEAN) is None and not any(name in LOCK for name in LEAN_PACKAGES):
        pytest.skip(f"{' and '.join(LEAN_PACKAGES)} are not in requirements.lock")
    return import_module(LEAN)


def test_only_what_a_flavor_has_is_listed_for_it() -> None:
    full, rtx = listed("tensorrt"), listed("tensorrt-rtx")
    assert "ComputeCapability" in rtx and "ComputeCapability" not in full
    assert set(rtx["IBuilderConfig"]) - set(full["IBuilderConfig"]) == {
        "num_compute_capabilities",
        "set_compute_capability",
    }
    assert full["Builder"] == rtx["Builder"]
    assert {n if "." not in n else n.split(".")[0] for n in RTX_ONLY} <= set(rtx)


def unguarded(text: str) -> list[str]:
    """Uses of what only RTX has that are not under an `if` that asks for RTX."""
    tree = ast.parse(text)
    only = {name.split(".")[-1] for name in RTX_ONLY} - {"deserialize", "serialize"}
    asked = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "RTX" in ast.unparse(n.test)]
    guarded = {id(inner) for branch in asked for part in branch.body for inner in ast.walk(part)}
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in only]
    return [use.attr for use in uses if id(use) not in guarded]


def test_what_only_rtx_has_is_used_for_rtx_only() -> None:
    texts = sources("engines")
    assert [name for text in texts.values() for name in unguarded(text)] == []
    assert "num_compute_capabilities" in texts["engines/builder/plan.py"]


def test_a_call_for_the_wrong_flavor_is_found() -> None:
    line = "config.set_compute_capability(c, 0)"
    assert unguarded(f"def f(config):\n    {line}\n") == ["set_compute_capability"]
    assert unguarded(f"def f(config):\n    if flavor == RTX:\n        {line}\n") == []
    assert unguarded(f"if flavor == RTX:\n    pass\nelse:\n    {line}\n") == ["set_compute_capability"]


# --- the runtime ----------------------------------------------------------------------------------------

OF_RUNTIME = {
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "self.engine": "ICudaEngine",
    "self._plan.engine": "ICudaEngine",
    "context": "IExecutionContext",
    "self._context": "IExecutionContext",
    "runtime_config": "IRuntimeConfig",
    "engine.create_runtime_config()": "IRuntimeConfig",
    "self.cache": "IRuntimeCache",
    "refitter": "Refitter",
}
"""What an expression is in the modules of runtime/tensorrt."""


def runtime_sources() -> dict[str, str]:
    """But the lists themselves."""
    paths = [*(ROOT / "runtime" / "tensorrt").glob("*.py"), ROOT / NAMES]
    return {path.name: path.read_text() for path in paths if path.name != "api.py"}


def used_of_tensorrt(texts: dict[str, str]) -> set[str]:
    """Classes, class.member and enum.member of the installed TensorRT-RTX that the source names."""
    enums = runtime_api.TENSORRT_ENUMS
    found: set[str] = set()
    for text in texts.values():
        found |= {name.partition(".")[0] for name in module_names(text)}
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
        for node in nodes:
            owner = OF_RUNTIME.get(ast.unparse(node.value))
            if owner and hasattr(getattr(trt, owner), node.attr):
                found.add(f"{owner}.{node.attr}")
        capitals = {node.attr for node in nodes if node.attr.isupper()} | words(text)
        found |= {
            f"{enum}.{word}" for enum in enums for word in capitals if hasattr(getattr(trt, enum), word)
        }
        found |= {f"ILogger.{name}" for name in methods(text) & {"log"}}
    return found


def listed_of_tensorrt() -> set[str]:
    both = {**runtime_api.TENSORRT, **runtime_api.TENSORRT_ENUMS}
    return {f"{name}.{member}" for name, members in both.items() for member in members} | set(both)


UNNAMED = {"ICudaEngine", "IExecutionContext", "IRuntimeConfig", "IRuntimeCache"}
"""Classes that TensorRT makes: their names stand nowhere in the source."""


def test_what_the_runtime_uses_is_what_is_listed() -> None:
    texts = runtime_sources()
    assert {"backend.py", "contexts.py", "cuda.py", "plan.py", "refit.py"} <= set(texts)
    assert used_of_tensorrt(texts) | UNNAMED == listed_of_tensorrt()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("trt.OnnxParser(network)", {"OnnxParser"}),
        ("self.engine.serialize()", {"ICudaEngine.serialize"}),
        ("context.execute_v2([])", {"IExecutionContext.execute_v2"}),
        ("runtime_config.get_runtime_cache()", {"IRuntimeConfig.get_runtime_cache"}),
        ("strategies.STATIC", {"ExecutionContextAllocationStrategy.STATIC"}),
        ("kernels.NONE", {"DynamicShapesKernelSpecializationStrategy.NONE", "TensorIOMode.NONE"}),
    ],
)
def test_a_use_in_the_runtime_that_is_not_listed_is_found(line: str, found: set[str]) -> None:
    texts = {**runtime_sources(), "new.py": f"def new():\n    {line}\n"}
    assert used_of_tensorrt(texts) - listed_of_tensorrt() == found


def test_what_the_runtime_no_longer_uses_is_found() -> None:
    texts = runtime_sources()
    del texts["refit.py"]
    assert listed_of_tensorrt() - used_of_tensorrt(texts) - UNNAMED == {
        "ICudaEngine.refittable",
        "Refitter",
        "Refitter.get_missing_weights",
        "Refitter.refit_cuda_engine",
        "Refitter.set_named_weights",
        "Weights",
    }


def cuda_words(texts: dict[str, str]) -> set[str]:
    """Every name of the CUDA runtime, as an attribute or as a text."""
    trees = [ast.parse(text) for text in texts.values()]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    named = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    named |= {str(node.value) for node in nodes if isinstance(node, ast.Constant)}
    return {name for name in named if re.fullmatch(r"cuda[A-Z]\w+", name)}


def test_what_the_runtime_uses_of_cuda_is_what_is_listed() -> None:
    enums = runtime_api.CUDART_ENUMS
    listed_names = {*runtime_api.CUDART, *enums, *(m for members in enums.values() for m in members)}
    assert cuda_words(runtime_sources()) == listed_names
    assert "cudaDeviceReset" in cuda_words({"new.py": "api.cudaDeviceReset()"})


def test_every_name_that_the_runtime_uses_is_installed() -> None:
    cudart = import_module("cuda.bindings.runtime")
    assert missing(trt, {**runtime_api.TENSORRT, **runtime_api.TENSORRT_ENUMS}) == set()
    assert missing(cudart, dict.fromkeys(runtime_api.CUDART, ()) | runtime_api.CUDART_ENUMS) == set()


def test_what_the_runtime_has_for_rtx_only_is_what_full_tensorrt_lacks() -> None:
    everything = {**runtime_api.TENSORRT, **runtime_api.TENSORRT_ENUMS}
    assert missing(lean(), everything) == runtime_api.RTX_ONLY
    only = {name.split(".")[-1] for name in runtime_api.RTX_ONLY} - {"IRuntimeCache", "create_runtime_cache"}
    tree = ast.parse(runtime_sources()["contexts.py"])
    branches = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "RTX" in ast.unparse(n.test)]
    guarded = {id(inner) for branch in branches for part in branch.body for inner in ast.walk(part)}
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in only]
    assert len(uses) >= 5 and all(id(use) in guarded for use in uses)


@pytest.mark.parametrize("name", sorted(runtime_api.SIGNATURES))
def test_signatures_that_the_runtime_relies_on_are_those_installed(name: str) -> None:
    assert runtime_api.SIGNATURES[name] in signatures(trt, name)
    if not {name, name.partition(".")[0]} & runtime_api.RTX_ONLY:
        assert runtime_api.SIGNATURES[name] in signatures(lean(), name)
