"""Fixtures for all tests: tiny seeded checkpoints and their ONNX folders, each made once a session.

What the factories return is shared, by pytest-xdist's workers too: a test that alters a folder copies it
first (`shutil.copytree`), and `shared_store` looks whether all did.
Torch and transformers are imported where they are needed, so that a test without them starts at once.
"""

import gc
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest
from hypothesis import settings

from tests.shared import Store

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

if TYPE_CHECKING:
    import onnx_ir as ir

    from mistral_trt.contract import GraphContract

Folder: TypeAlias = Callable[..., Path]
BuiltGraph: TypeAlias = "Callable[[GraphContract], ir.Model]"

_EXPORT_DEFAULTS: dict[str, object] = {
    "precision": "fp32",
    "prefill_chunk": 4,
    "max_batch_size": 4,
    "max_context": None,
}


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """What is made once a session, for all workers."""
    own = tmp_path_factory.getbasetemp()
    store = Store((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "store")
    yield store
    assert not store.altered(), "a test altered what others share: it should copy the folder first"


@pytest.fixture(scope="session")
def tiny_checkpoint(shared_store: Store) -> Folder:
    """tiny_checkpoint(tokenizer=False, seed=0, dtype="float32", **config) -> a checkpoint folder.

    config: any key of `config.json`, over the defaults of `tests.models.write_checkpoint` (2 layers, W = 8).
    tokenizer: with that of `tests.models.write_tokenizer`, which calls for a vocab_size of 259 or more.
    Each set of arguments is written once a session.
    """
    from transformers.utils import logging as transformers_logging

    from tests.models import write_checkpoint, write_tokenizer

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    def checkpoint(*, tokenizer: bool = False, **overrides: object) -> Path:
        def make(folder: Path) -> None:
            write_checkpoint(folder, **overrides)  # type: ignore[arg-type]
            if tokenizer:
                write_tokenizer(folder)

        return shared_store.folder("checkpoints", json.dumps([tokenizer, overrides], sort_keys=True), make)

    return checkpoint


@pytest.fixture(scope="session")
def onnx_folder(shared_store: Store, tiny_checkpoint: Folder, built_graph: "BuiltGraph") -> Folder:
    """onnx_folder(precision="fp32", prefill_chunk=4, max_batch_size=4, max_context=None, **checkpoint)

    -> the ONNX folder of `tiny_checkpoint(**checkpoint)`, exported with the trace of `built_graph`.
    `sliding_window` is the checkpoint's. Each set of arguments is exported once a session, so tests that can
    share arguments should: the defaults are W = 8, C = 4, R = 12, fp32.
    """
    from mistral_trt.export import onnx_folder as stage

    def folder(**arguments: object) -> Path:
        options = {name: arguments.pop(name, default) for name, default in _EXPORT_DEFAULTS.items()}
        checkpoint = tiny_checkpoint(**arguments)

        def make(out: Path) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(stage, "build_graph", built_graph)
                stage.export_checkpoint(checkpoint, out, **options)  # type: ignore[arg-type]

        return shared_store.folder("onnx", json.dumps([options, arguments], sort_keys=True), make)

    return folder


@pytest.fixture(scope="session")
def kept_traces(shared_store: Store, pytestconfig: pytest.Config) -> Store:
    """Where `built_graph` keeps its graphs: in pytest's cache, from run to run.

    Under the hash of all that could alter them, so another source or another torch traces anew.
    """
    import mistral_trt
    from mistral_trt import export
    from mistral_trt.manifest import tool_versions
    from tests import graphs

    cache = getattr(pytestconfig, "cache", None)
    if cache is None:  # `-p no:cacheprovider`
        return shared_store
    packages = [Path(str(package.__file__)).parent for package in (mistral_trt, export)]
    paths = [path for package in packages for path in sorted(package.glob("*.py"))]
    sources = [path.read_text() for path in (*paths, Path(graphs.__file__))]
    tools = tool_versions("torch", "onnx", "onnx-ir", "onnxscript")
    digest = hashlib.sha256(json.dumps([sources, tools]).encode()).hexdigest()[:16]
    return Store(cache.mkdir("traces") / digest)


@pytest.fixture(scope="session")
def built_graph(kept_traces: Store) -> "BuiltGraph":
    """built_graph(contract) -> what `build_graph(contract)` gives, which takes seconds.

    Traced once for each config, ring and dtype of the rings: of the rest of a contract the graph knows
    nothing (`tests/test_graph.py` holds it to that, and to the graph as it comes back from its file).
    """
    from mistral_trt.export.graph import build_graph
    from tests.graphs import read_graph, write_graph

    def graph(contract: "GraphContract") -> "ir.Model":
        key = repr((contract.config, contract.ring, contract.cache_dtype))
        folder = kept_traces.folder("graphs", key, lambda folder: write_graph(build_graph(contract), folder))
        return read_graph(folder)

    return graph


@pytest.fixture(scope="module")
def one_trace(built_graph: "BuiltGraph") -> Iterator[None]:
    """A module's own exports take their graphs from `built_graph`: for tests of what becomes of a graph."""
    from mistral_trt.export import onnx_folder as stage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "build_graph", built_graph)
        yield


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports write a graph without nodes: for tests of files and weights, in milliseconds."""
    from mistral_trt.export import onnx_folder
    from tests.graphs import bare_graph

    monkeypatch.setattr(onnx_folder, "build_graph", bare_graph)


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> None:
    """What was imported so far is not looked through each time garbage is collected: half a second with all
    of torch and ModelOpt, in calibration once a layer."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_log() -> Iterator[None]:
    """Undo `log_to_stderr`: its handler holds the stderr of the test that called it."""
    log = logging.getLogger("mistral_trt")
    handlers, level = list(log.handlers), log.level
    yield
    log.handlers[:] = handlers
    log.setLevel(level)
