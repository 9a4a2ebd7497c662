"""Fixtures for all tests: tiny seeded checkpoints and their ONNX folders, each made once a session.

What the factories return is shared: a test that alters a folder copies it first (`shutil.copytree`).
Torch and transformers are imported where they are needed, so that a test without them starts at once.
"""

import gc
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest
from hypothesis import settings

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
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """tiny_checkpoint(tokenizer=False, seed=0, dtype="float32", **config) -> a checkpoint folder.

    config: any key of `config.json`, over the defaults of `tests.models.write_checkpoint` (2 layers, W = 8).
    tokenizer: with that of `tests.models.write_tokenizer`, which calls for a vocab_size of 259 or more.
    Each set of arguments is written once a session.
    """
    from transformers.utils import logging as transformers_logging

    from tests.models import write_checkpoint, write_tokenizer

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    made: dict[str, Path] = {}

    def checkpoint(*, tokenizer: bool = False, **overrides: object) -> Path:
        key = json.dumps([tokenizer, overrides], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
            made[key] = write_checkpoint(folder, **overrides)  # type: ignore[arg-type]
            if tokenizer:
                write_tokenizer(folder)
        return made[key]

    return checkpoint


@pytest.fixture(scope="session")
def onnx_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Folder, built_graph: "BuiltGraph"
) -> Folder:
    """onnx_folder(precision="fp32", prefill_chunk=4, max_batch_size=4, max_context=None, **checkpoint)

    -> the ONNX folder of `tiny_checkpoint(**checkpoint)`, exported with the trace of `built_graph`.
    `sliding_window` is the checkpoint's. Each set of arguments is exported once a session, so tests that can
    share arguments should: the defaults are W = 8, C = 4, R = 12, fp32.
    """
    from mistral_trt.export import onnx_folder as stage

    made: dict[str, Path] = {}

    def folder(**arguments: object) -> Path:
        options = {name: arguments.pop(name, default) for name, default in _EXPORT_DEFAULTS.items()}
        key = json.dumps([options, arguments], sort_keys=True)
        if key not in made:
            out = tmp_path_factory.mktemp("onnx") / "tiny"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(stage, "build_graph", built_graph)
                stage.export_checkpoint(tiny_checkpoint(**arguments), out, **options)  # type: ignore[arg-type]
            made[key] = out
        return made[key]

    return folder


@pytest.fixture(scope="session")
def built_graph() -> "BuiltGraph":
    """built_graph(contract) -> a copy of `build_graph(contract)`, which takes seconds.

    Traced once a session for each config, ring and dtype of the rings: of the rest of a contract the graph
    knows nothing (`tests/test_graph.py` holds it to that).
    """
    from mistral_trt.export.graph import build_graph

    made: dict[str, ir.Model] = {}

    def graph(contract: "GraphContract") -> "ir.Model":
        key = repr((contract.config, contract.ring, contract.cache_dtype))
        if key not in made:
            made[key] = build_graph(contract)
        return made[key].clone()

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
