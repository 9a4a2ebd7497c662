"""The TensorRT backend on a simulated GPU: what it computes, gives back, and does when something fails."""

import logging
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import cuda.bindings.runtime as cudart
import ml_dtypes
import numpy as np
import pytest

import mistral_trt.runtime.tensorrt as package
from mistral_trt.errors import BackendError, EngineMismatchError, ManifestError, MissingDependencyError
from mistral_trt.manifest import GRAPH_NAME, PLAN_NAME, Manifest, describe_files, read_manifest
from mistral_trt.runtime import Engine, SamplingParams, mapped_file
from mistral_trt.runtime.backend import Logits, RingArray, Step
from mistral_trt.runtime.onnxruntime_backend import OnnxRuntimeBackend
from mistral_trt.runtime.tensorrt import api, contexts, kernel_cache, loaded, refit
from mistral_trt.runtime.tensorrt import log as log_module
from mistral_trt.runtime.tensorrt.backend import TensorRtBackend, decode_batches, open_tensorrt_backend
from mistral_trt.runtime.tensorrt.buffers import StepBuffers
from mistral_trt.runtime.tensorrt.contexts import BoundContext
from mistral_trt.runtime.tensorrt.cuda import STICKY, Cuda, Gpu
from mistral_trt.runtime.tensorrt.graphs import StepGraphs
from mistral_trt.runtime.tensorrt.log import tensorrt_log
from mistral_trt.runtime.tensorrt.memory import Demand, demand, require_memory
from mistral_trt.runtime.tensorrt.rings import DeviceRings, require_aligned_rows, stored_dtype
from mistral_trt.weight_index import INDEX_NAME, read_weight_index, write_weight_index
from tests.simulated import tensorrt as doubles
from tests.simulated.device import Error
from tests.simulated.folder import FLAVORS, Machine, engine_manifest, machine, write_engine_folder
from tests.simulated.plan import SimulatedPlan
from tests.simulated.rules import RuleBroken

Folder = Callable[..., Path]
SOURCES = [Path(path) for path in package.__path__]


# --- every line runs ------------------------------------------------------------------------------------

RAN: dict[str, set[int]] = {}
"""Name of a module of the package → its lines that ran since this file began."""


NOTES: dict[str, Any] = {}
"""File → what notes its lines, None for a file of no interest; asked at every call, so it has to be quick."""


def trace(frame: FrameType, event: str, argument: Any) -> Any:
    """Note lines of the package; all else runs untraced."""
    name = frame.f_code.co_filename
    if name not in NOTES:
        NOTES[name] = note_of(Path(name))
    note = NOTES[name]
    return note and note(frame, event, argument)


def note_of(path: Path) -> Any:
    if path.parent.name != "tensorrt" or path.parent.parent.name != "runtime":
        return None
    lines = RAN.setdefault(path.name, set())

    def note(frame: FrameType, event: str, argument: Any) -> Any:
        lines.add(frame.f_lineno)
        return note

    return note


@pytest.fixture(scope="module", autouse=True)
def own_log() -> Iterator[None]:
    """A log that is made here, and not by the tests before: the last test counts the lines that made it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_module, "_ONE", {})
        yield


@pytest.fixture(scope="module", autouse=True)
def traced(onnx_folder: Folder) -> Iterator[None]:
    """Trace what runs while this file's tests do, but for the export that they need."""
    onnx_folder()
    before = sys.gettrace()
    sys.settrace(trace)
    threading.settrace(trace)
    yield
    sys.settrace(before)
    threading.settrace(before)


def lines_of(code: CodeType) -> set[int]:
    """Lines of the functions in a module, each without its first, which is the `def` or the decorator."""
    found: set[int] = set()
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            own = {line for _, _, line in inner.co_lines() if line is not None}
            is_class = "__qualname__" in inner.co_names
            found |= (set() if is_class else own - {inner.co_firstlineno}) | lines_of(inner)
    return found


# --- what is run ----------------------------------------------------------------------------------------


@pytest.fixture
def onnx(onnx_folder: Folder) -> Path:
    return onnx_folder()


@pytest.fixture(params=FLAVORS)
def flavor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(onnx: Path, tmp_path: Path, flavor: str) -> Path:
    return write_engine_folder(onnx, tmp_path / "engine", flavor=flavor)


@pytest.fixture
def external(onnx: Path, tmp_path: Path, flavor: str) -> Path:
    return write_engine_folder(onnx, tmp_path / "external", flavor=flavor, weights="external")


@pytest.fixture
def gpu(flavor: str) -> Iterator[Machine]:
    """A simulated GPU on which everything is given back in the end."""
    made = machine(flavor)
    yield made
    if made.device.sticky is None:
        assert made.device.leaks() == {}


@pytest.fixture
def opened(gpu: Machine, engine: Path) -> Iterator[TensorRtBackend]:
    found = gpu.open(engine)
    yield found
    found.close()


def decode_step(tokens: list[int], positions: list[int]) -> Step:
    ids = np.array(tokens, np.int64)[:, None]
    return Step(ids, np.array(positions, np.int64)[:, None], np.zeros_like(ids), 0)


def prefill_step(row: int, tokens: list[int], position: int, index: list[int]) -> Step:
    positions = np.arange(position, position + len(tokens))[None]
    return Step(np.array([tokens]), positions, np.array([index]), row)


class Reference:
    """ONNX Runtime on the same graph beside the backend: every call goes to both and must be equal."""

    def __init__(self, ours: Any, onnx: Path) -> None:
        manifest = read_manifest(onnx, check_files=False)
        self.ours, self.contract = ours, manifest.contract
        self.theirs = OnnxRuntimeBackend(onnx / GRAPH_NAME, manifest.contract, threads=1)
        self.positions = [0] * manifest.contract.max_batch_size

    def run(self, step: Step) -> None:
        found: Logits = self.ours.run(step)  # in a general kernel their last bits are others
        np.testing.assert_allclose(found, self.theirs.run(step), rtol=2e-6, atol=0)

    def prefill(self, row: int, tokens: list[int], *, all_logits: bool = False) -> None:
        """One chunk, up to the chunk's edge at most."""
        room = self.contract.ring.room_in_chunk(self.positions[row])
        tokens = tokens[:room]
        index = list(range(len(tokens))) if all_logits else [len(tokens) - 1]
        self.run(prefill_step(row, tokens, self.positions[row], index))
        self.positions[row] += len(tokens)

    def decode(self, tokens: list[int]) -> None:
        """The next token of rows 0…B-1."""
        self.run(decode_step(tokens, self.positions[: len(tokens)]))
        for row in range(len(tokens)):
            self.positions[row] += 1

    def copy(self, source: int, target: int) -> None:
        self.ours.copy_row(source, target)
        self.theirs.write_row(target, self.theirs.read_row(source))
        self.positions[target] = self.positions[source]

    def move(self, source: int, target: int) -> None:
        """By way of the host, as a session's ring goes."""
        self.ours.write_row(target, self.ours.read_row(source))
        self.theirs.write_row(target, self.theirs.read_row(source))
        self.positions[target] = self.positions[source]

    def zero(self, row: int) -> None:
        self.ours.write_row(row, None)
        self.theirs.write_row(row, None)
        self.positions[row] = 0

    def require_equal_rings(self) -> None:
        for row in range(self.contract.max_batch_size):
            for a, b in zip(self.ours.read_row(row), self.theirs.read_row(row), strict=True):
                np.testing.assert_array_equal(a, b)


def play(pair: Reference, seed: int, calls: int = 60) -> None:
    """A random life of four rows, far past the wrap of a ring of 12 slots."""
    random = np.random.default_rng(seed)
    rows, vocab = pair.contract.max_batch_size, pair.contract.config.vocab_size
    for _ in range(calls):
        tokens = random.integers(0, vocab, 8).tolist()
        row, other = random.integers(0, rows, 2).tolist()
        kind = random.choice(["prefill", "decode", "copy", "move", "zero"], p=[0.4, 0.45, 0.06, 0.06, 0.03])
        if kind == "prefill":
            pair.prefill(row, tokens[: int(random.integers(1, 5))], all_logits=bool(random.integers(2)))
        elif kind == "decode":
            pair.decode(tokens[: int(random.choice(decode_batches(rows)))])
        elif kind == "zero":
            pair.zero(row)
        else:
            getattr(pair, kind)(row, other)
    pair.require_equal_rings()


# --- laws -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
def test_logits_and_rings_equal_onnxruntimes_bit_for_bit(
    opened: TensorRtBackend, onnx: Path, warm: bool
) -> None:
    if warm:
        opened.warm_up()
    for seed in range(3):
        pair = Reference(opened, onnx)
        for row in range(4):
            opened.write_row(row, None)
        play(pair, seed)


def test_a_sequence_decoded_past_several_wraps_stays_equal(opened: TensorRtBackend, onnx: Path) -> None:
    opened.warm_up()
    pair = Reference(opened, onnx)
    tokens = np.random.default_rng(5).integers(0, 97, 80).tolist()
    while pair.positions[0] < 30:
        pair.prefill(0, tokens[pair.positions[0] :][:4])
    for token in tokens[30:]:
        pair.decode([token])
    pair.require_equal_rings()


def test_without_graphs_nothing_is_captured_and_all_is_equal(
    gpu: Machine, engine: Path, onnx: Path, flavor: str
) -> None:
    opened = gpu.open(engine, cuda_graphs=False)
    opened.warm_up()
    play(Reference(opened, onnx), 1)
    assert opened.ready and "cudaStreamBeginCapture" not in gpu.device.called
    opened.close()


def test_weights_from_files_give_the_same_logits(gpu: Machine, external: Path, onnx: Path) -> None:
    opened = gpu.open(external)
    opened.warm_up()
    play(Reference(opened, onnx), 2)
    opened.close()


def test_after_warming_up_nothing_is_allocated_captured_or_compiled(
    opened: TensorRtBackend, gpu: Machine, onnx: Path, flavor: str
) -> None:
    opened.warm_up()
    compiled = list(gpu.trt._compiled)
    assert len(compiled) == (3 if flavor == "tensorrt-rtx" else 0)
    gpu.device.called.clear()
    pair = Reference(opened, onnx)
    for batch in (1, 4, 2, 1, 2, 4):
        pair.decode([3] * batch)
        pair.prefill(3, [1, 2])
    assert gpu.trt._compiled == compiled and gpu.trt._recaptured == 0
    calls = set(gpu.device.called)
    copies = {"cudaMemcpyAsync", "cudaStreamSynchronize", "cudaSetDevice"}
    assert calls == copies | ({"cudaGraphLaunch"} if flavor == "tensorrt" else set())


def test_a_captured_step_costs_one_launch_and_one_wait(gpu: Machine, onnx: Path, tmp_path: Path) -> None:
    gpu = machine("tensorrt")
    opened = gpu.open(write_engine_folder(onnx, tmp_path / "full", flavor="tensorrt"))
    opened.warm_up()
    gpu.device.called.clear()
    opened.run(decode_step([1, 2], [0, 0]))
    assert gpu.device.called == ["cudaSetDevice", "cudaGraphLaunch", "cudaStreamSynchronize"]
    opened.close()


def test_warming_up_makes_ready_and_leaves_the_rings_zero(opened: TensorRtBackend, flavor: str) -> None:
    said: list[tuple[str, float]] = []
    assert not opened.ready
    opened.warm_up(lambda what, share: said.append((what, share)))
    assert opened.ready
    assert [what for what, _ in said] == [
        "warming up 1 rows",
        "warming up 2 rows",
        "warming up 4 rows",
        "warming up chunks of 1",
        "warming up chunks of 4",
    ]
    shares = [share for _, share in said]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] < 1
    assert not any(ring.any() for row in range(4) for ring in opened.read_row(row))
    opened.warm_up()  # again captures nothing twice
    assert opened.ready


def test_the_batches_are_the_powers_of_two_and_the_largest() -> None:
    assert decode_batches(1) == [1] and decode_batches(4) == [1, 2, 4] and decode_batches(6) == [1, 2, 4, 6]


def test_logits_are_the_callers_own(opened: TensorRtBackend) -> None:
    first = opened.run(decode_step([1], [0]))
    kept = first.copy()
    opened.run(decode_step([2], [1]))
    opened.close()
    np.testing.assert_array_equal(first, kept)


def test_another_thread_may_run_what_one_has_loaded(gpu: Machine, engine: Path, onnx: Path) -> None:
    """Also where the thread that loads has chosen the second GPU: a new thread begins on the first."""
    gpu.cudart.cudaSetDevice(1)
    opened = gpu.open(engine)
    opened.warm_up()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(play, Reference(opened, onnx), 3).result()
        pool.submit(opened.close).result()


@pytest.mark.parametrize("weights", ["embedded", "external"])
def test_an_engine_folder_gives_the_texts_of_its_onnx_folder(
    gpu: Machine, onnx: Path, tmp_path: Path, flavor: str, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    """By way of `Engine.load`, with everything that it checks."""
    folder = write_engine_folder(onnx, tmp_path / "engine", flavor=flavor, weights=weights)
    gpu.install(monkeypatch)
    prompts = [[1, 2, 3], list(range(20, 50)), [7], [9, 9], [5, 6, 7, 8, 9]]
    params = SamplingParams(max_tokens=30, temperature=0.8, seed=3)
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache"} if flavor == "tensorrt-rtx" else {}
    with Engine.load(folder, **options) as engine:
        assert engine.ready
        found = [output.tokens for output in engine.generate(prompts, params)]
    with Engine.load(onnx) as engine:
        assert found == [output.tokens for output in engine.generate(prompts, params)]


# --- rows -----------------------------------------------------------------------------------------------


def test_a_row_is_written_and_read_where_it_lies(opened: TensorRtBackend) -> None:
    rings = [np.full((2, 12, 16), value, np.float32) for value in range(1, 5)]
    opened.write_row(1, rings)
    opened.copy_row(1, 3)
    opened.copy_row(1, 1)
    for row in (1, 3):
        for before, after in zip(rings, opened.read_row(row), strict=True):
            np.testing.assert_array_equal(before, after)
    assert not any(ring.any() for row in (0, 2) for ring in opened.read_row(row))
    opened.write_row(1, None)
    assert not any(ring.any() for ring in opened.read_row(1)) and opened.read_row(3)[0].all()


@pytest.mark.parametrize("row", [-1, 4])
def test_a_row_that_is_none_is_refused(opened: TensorRtBackend, row: int) -> None:
    for use in (
        lambda: opened.read_row(row),
        lambda: opened.copy_row(0, row),
        lambda: opened.copy_row(row, 0),
    ):
        with pytest.raises(ValueError, match=f"expected a row of 0…3, found {row}"):
            use()
    assert opened.run(decode_step([1], [0])).shape == (1, 1, 97)


@pytest.mark.parametrize(
    "rings",
    [
        [np.zeros((2, 12, 16), np.float32)] * 3,
        [np.zeros((2, 12, 15), np.float32)] * 4,
        [np.zeros((2, 12, 16), np.float16)] * 4,
    ],
)
def test_rings_of_another_form_are_refused(opened: TensorRtBackend, rings: list[RingArray]) -> None:
    with pytest.raises(ValueError, match=r"expected 4 rings of float32 \[2, 12, 16\]"):
        opened.write_row(0, rings)


def test_rings_that_do_not_lie_in_one_piece_are_written_whole(opened: TensorRtBackend) -> None:
    rings = [np.arange(384, dtype=np.float32).reshape(16, 12, 2).T for _ in range(4)]
    opened.write_row(2, rings)
    np.testing.assert_array_equal(opened.read_row(2)[3], rings[3])


def test_bfloat16_rings_are_the_same_bits_as_uint16(gpu: Machine, onnx: Path) -> None:
    """numpy has no bfloat16; arrays of ml_dtypes are taken as well."""
    from contextlib import ExitStack

    contract = replace(read_manifest(onnx, check_files=False).contract, precision="bf16")
    cuda, resources = Cuda(gpu.cudart), ExitStack()
    cuda.open_stream()
    rings = DeviceRings(cuda, contract, resources)
    assert stored_dtype(contract.past()[0]) == np.uint16
    given = [np.full((2, 12, 16), value, ml_dtypes.bfloat16) for value in (1.5, 2, 3, 4)]
    rings.write_row(1, given)
    found = rings.read_row(1)
    assert [ring.dtype for ring in found] == [np.uint16] * 4
    np.testing.assert_array_equal(found[0].view(ml_dtypes.bfloat16), given[0])
    rings.write_row(0, found)
    np.testing.assert_array_equal(rings.read_row(0)[3], found[3])
    with pytest.raises(ValueError, match="expected 4 rings of bfloat16 or uint16"):
        rings.write_row(0, [ring.view(np.float16) for ring in found])
    resources.close()
    cuda.close_stream()


def test_rows_that_do_not_begin_on_256_bytes_are_refused(onnx: Path) -> None:
    contract = read_manifest(onnx, check_files=False).contract
    require_aligned_rows(contract, 512)
    require_aligned_rows(replace(contract, max_batch_size=1), 500)
    with pytest.raises(EngineMismatchError, match="a row of a ring has 500 bytes.*--max-batch-size 1"):
        require_aligned_rows(contract, 500)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (decode_step([1] * 3, [0] * 3), r"of \[1, 2, 4\] rows .* found 3 rows of 1 tokens from row 0"),
        (replace(decode_step([1, 2], [0, 0]), first_row=2), "found 2 rows of 1 tokens from row 2"),
        (prefill_step(0, [1, 2, 3], 0, [0, 1, 2, 2]), "does not take logits_index"),
    ],
    ids=["three rows", "not from the first row", "more logits than tokens"],
)
def test_a_step_that_the_engine_has_no_shape_for_is_refused(
    opened: TensorRtBackend, monkeypatch: pytest.MonkeyPatch, step: Step, words: str
) -> None:
    if "logits_index" in words:
        monkeypatch.setattr(
            doubles._Context, "set_input_shape", lambda self, name, shape: "index" not in name
        )
    with pytest.raises(BackendError, match=words) as refused:
        opened.run(step)
    assert not refused.value.fatal
    monkeypatch.undo()
    assert np.isfinite(opened.run(decode_step([1], [0]))).all()


# --- weights --------------------------------------------------------------------------------------------


@pytest.fixture
def other_onnx(onnx: Path, tmp_path: Path) -> Path:
    """The same graph, other weights: a fine-tune."""
    folder = Path(shutil.copytree(onnx, tmp_path / "other"))
    data = np.fromfile(onnx / "model.onnx.data", np.float32)
    (data * np.random.default_rng(0).uniform(0.9, 1.1, data.size)).astype(np.float32).tofile(
        folder / "model.onnx.data"
    )
    replace(read_manifest(onnx), files=describe_files(folder)).write(folder)
    return folder


def with_weights(folder: Path, onnx: Path) -> Path:
    """What `mistral-trt refit` makes: the plan of `folder`, the weights of `onnx`."""
    out = folder.parent / f"{folder.name}-refitted"
    shutil.copytree(folder, out)
    for entry in read_weight_index(out):
        shutil.copy(onnx / entry.file, out / entry.file)
    rewrite(out)
    return out


def rewrite(folder: Path, **details: Any) -> Manifest:
    """Make the manifest true again after files were changed."""
    old = read_manifest(folder, "engine", check_files=None)
    new = replace(old, files=describe_files(folder), details={**old.details, **details})
    new.write(folder)
    return new


def test_a_refit_exchanges_the_weights_and_drops_every_graph(
    gpu: Machine, external: Path, onnx: Path, other_onnx: Path, flavor: str
) -> None:
    opened = gpu.open(external)
    opened.warm_up()
    opened.run(decode_step([5], [0]))
    second = with_weights(external, other_onnx)
    opened.refit(second, read_manifest(second, "engine"))
    assert not opened.ready and gpu.device.instances == {}
    assert not any(ring.any() for ring in opened.read_row(0))
    opened.warm_up()
    play(Reference(opened, other_onnx), 4)
    assert opened.ready and len(gpu.device.instances) == (3 if flavor == "tensorrt" else 0)
    opened.close()


def test_a_refit_to_another_plan_changes_nothing(
    gpu: Machine, external: Path, engine: Path, onnx: Path
) -> None:
    opened = gpu.open(external)
    opened.warm_up()
    with pytest.raises(EngineMismatchError, match="expected a folder with the plan of .* mistral-trt refit"):
        opened.refit(engine, read_manifest(engine, "engine"))
    assert opened.ready
    play(Reference(opened, onnx), 1, 20)
    opened.close()


def test_a_refit_that_fails_halfway_ends_the_backend(gpu: Machine, external: Path, other_onnx: Path) -> None:
    opened = gpu.open(external)
    second = with_weights(external, other_onnx)
    manifest = read_manifest(second, "engine")
    flip(second / "model.onnx.data")
    with pytest.raises(ManifestError, match="was altered"):
        opened.refit(second, manifest)
    for use in (lambda: opened.run(decode_step([1], [0])), opened.warm_up, lambda: opened.read_row(0)):
        with pytest.raises(BackendError, match="did not go into the engine whole") as dead:
            use()
        assert dead.value.fatal and not opened.ready
    opened.close()


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [PLAN_NAME, INDEX_NAME, "model.onnx.data"])
def test_an_altered_file_is_refused_before_the_first_step(gpu: Machine, external: Path, name: str) -> None:
    flip(external / name)
    with pytest.raises(ManifestError, match=rf"{name} was altered .*mistral-trt build .*--weights external"):
        gpu.open(external)
    assert not any(name.startswith("cudaGraph") for name in gpu.device.called)


def test_a_file_that_the_manifest_does_not_name_is_refused(gpu: Machine, external: Path) -> None:
    manifest = read_manifest(external, "engine")
    files = {name: entry for name, entry in manifest.files.items() if name != "model.onnx.data"}
    with pytest.raises(ManifestError, match=r"model.onnx.data is not among the manifest's files"):
        open_tensorrt_backend(
            external, replace(manifest, files=files), trt=gpu.trt, cudart=gpu.cudart, cache_dir=external
        )


def test_an_empty_plan_is_refused(gpu: Machine, engine: Path) -> None:
    (engine / PLAN_NAME).write_bytes(b"")
    manifest = replace(read_manifest(engine, "engine", check_files=None))
    with pytest.raises(ManifestError, match="model.plan was altered"):
        open_tensorrt_backend(engine, manifest, trt=gpu.trt, cudart=gpu.cudart)


def test_trusted_weights_are_not_hashed_and_that_is_said(
    gpu: Machine, external: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip(external / "model.onnx.data")
    with caplog.at_level(logging.WARNING, "mistral_trt.runtime"):
        gpu.open(external, trust_weights=True).close()
    assert "the weights are trusted, so their hashes are not compared" in caplog.text
    for name in (PLAN_NAME, INDEX_NAME):  # the plan is code and is never trusted
        folder = Path(shutil.copytree(external, external.parent / f"without-{name}"))
        flip(folder / name)
        with pytest.raises(ManifestError, match="was altered"):
            gpu.open(folder, trust_weights=True)


def test_weights_are_hashed_whole_while_they_go_in(
    gpu: Machine, external: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[tuple[str, int]] = []
    real = mapped_file.require_hash

    def note(data: memoryview, folder: Path, name: str, manifest: Manifest) -> None:
        hashed.append((name, len(data)))
        real(data, folder, name, manifest)

    for module in (refit, mapped_file):
        monkeypatch.setattr(module, "require_hash", note)
    said: list[str] = []
    gpu.open(external, progress=lambda what, share: said.append(what)).close()
    size = (external / "model.onnx.data").stat().st_size
    plan, index = ((name, (external / name).stat().st_size) for name in (PLAN_NAME, INDEX_NAME))
    assert hashed == [plan, index, ("model.onnx.data", size)]
    assert said == ["loading the plan", "hashing model.onnx.data"]


def test_large_files_are_hashed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mapped_file.sha256(memoryview(bytes(range(100))))
    monkeypatch.setattr(mapped_file, "_HASHED_AT_ONCE", 7)
    assert mapped_file.sha256(memoryview(bytes(range(100)))) == whole


@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (lambda weights: weights[:-1], "has no numbers for 1 weights of the plan, "),
        (
            lambda weights: [replace(weights[0], name="?"), *weights[1:]],
            "the plan does not take [?] as float32",
        ),
    ],
    ids=["one missing", "one unknown"],
)
def test_weights_that_are_not_the_plans_are_refused(
    gpu: Machine, external: Path, alter: Any, words: str
) -> None:
    write_weight_index(external, alter(read_weight_index(external)))
    rewrite(external)
    with pytest.raises(EngineMismatchError, match=words):
        gpu.open(external)


def test_a_plan_that_cannot_be_refitted_is_refused(gpu: Machine, external: Path) -> None:
    gpu.trt._alter = lambda plan: plan.weights.clear()
    with pytest.raises(EngineMismatchError, match="its plan cannot be refitted"):
        gpu.open(external)


def test_a_refit_that_tensorrt_refuses_is_told_with_its_reason(
    gpu: Machine, external: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any) -> bool:
        return bool(self._engine._error("the weights do not\nfit"))

    monkeypatch.setattr(doubles._Refitter, "refit_cuda_engine", refuse)
    with pytest.raises(EngineMismatchError, match="does not refit the plan: the weights do not fit"):
        gpu.open(external)
    flip(external / "model.onnx.data")  # the better reason of the two
    with pytest.raises(ManifestError, match="was altered"):
        gpu.open(external)


# --- the plan -------------------------------------------------------------------------------------------


def tensor(plan: SimulatedPlan, name: str) -> Any:
    return next(tensor for tensor in plan.tensors if tensor.name == name)


def rename(plan: SimulatedPlan) -> None:
    tensor(plan, "logits").name = "logitz"


def shrink(plan: SimulatedPlan) -> None:
    lowest, usual, _ = plan.profiles[1]["input_ids"]
    plan.profiles[1]["input_ids"] = (lowest, usual, (1, 3))


ALTERED: dict[str, tuple[Callable[[SimulatedPlan], Any], str]] = {
    "name": (rename, "2 tensors are not those of the contract: expected logits"),
    "one more": (
        lambda plan: plan.tensors.append(replace(tensor(plan, "logits"), name="aaa")),
        "1 tensors are not those of the contract: found aaa",
    ),
    "mode": (lambda plan: setattr(tensor(plan, "input_ids"), "is_input", False), "expected input_ids"),
    "dtype": (
        lambda plan: setattr(tensor(plan, "past_key_values.1.value"), "dtype", "HALF"),
        r"past_key_values.1.value: expected FLOAT \[-1, 2, 12, 16\] on DEVICE, found HALF",
    ),
    "shape": (
        lambda plan: setattr(tensor(plan, "logits"), "shape", (-1, -1, 96)),
        r"logits: expected FLOAT \[-1, -1, 97\] on DEVICE, found FLOAT \[-1, -1, 96\]",
    ),
    "place": (
        lambda plan: setattr(tensor(plan, "position_ids"), "location", "HOST"),
        "found INT64 .* on HOST",
    ),
    "profiles": (lambda plan: plan.profiles.pop(), "expected 2 optimization profiles, found 1"),
    "order of profiles": (
        lambda plan: plan.profiles.reverse(),
        r"input_ids in profile decode: expected room for \[1, 1\] to \[4, 1\], found \[1, 1\] to \[1, 4\]",
    ),
    "chunk": (shrink, r"input_ids in profile prefill: expected room for \[1, 1\] to \[1, 4\]"),
    "no alias": (
        lambda plan: plan.aliases.pop("present.1.key"),
        "expected present.1.key on the memory of past_key_values.1.key, found it on that of None",
    ),
    "wrong alias": (
        lambda plan: plan.aliases.update({"present.0.key": "past_key_values.0.value"}),
        "present.0.key on the memory of past_key_values.0.key, found it on that of 'past_key_values.0.value'",
    ),
}


@pytest.mark.parametrize(("alter", "words"), ALTERED.values(), ids=ALTERED)
def test_a_plan_that_is_not_the_contracts_is_refused(
    gpu: Machine, engine: Path, alter: Callable[[SimulatedPlan], None], words: str
) -> None:
    gpu.trt._alter = alter
    with pytest.raises(EngineMismatchError, match=f"{words}.*make it again with: mistral-trt build"):
        gpu.open(engine)


def test_a_profile_with_more_room_is_taken(gpu: Machine, engine: Path) -> None:
    def widen(plan: SimulatedPlan) -> None:
        for name, (lowest, usual, most) in plan.profiles[1].items():
            plan.profiles[1][name] = (lowest, usual, (2, *most[1:]))

    gpu.trt._alter = widen
    gpu.open(engine).close()


def test_a_plan_that_tensorrt_does_not_load_is_told_with_its_reason(
    gpu: Machine, engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (engine / PLAN_NAME).write_bytes(b"not a plan")
    rewrite(engine)
    with (
        caplog.at_level(logging.DEBUG, "mistral_trt.runtime"),
        pytest.raises(EngineMismatchError, match=r"does not load .*model.plan: .*magicTag failed; make it"),
    ):
        gpu.open(engine)
    said = [(record.levelname, record.message) for record in caplog.records]
    assert ("ERROR", "TensorRT: Serialization assertion header.magicTag failed") in said
    assert ("DEBUG", "TensorRT: Loaded engine size: 0 MiB") in said
    assert not any("nobody wants" in message for _, message in said)


def test_the_installed_tensorrt_takes_the_mapped_plan_and_our_logger(onnx: Path, tmp_path: Path) -> None:
    """In a process of its own: TensorRT knows one logger a process. It refuses the plan, GPU or none."""
    folder = write_engine_folder(onnx, tmp_path / "engine")
    program = (
        "import sys, pathlib, tensorrt_rtx as trt\n"
        "from mistral_trt.errors import EngineMismatchError\n"
        "from mistral_trt.manifest import read_manifest\n"
        "from mistral_trt.runtime.tensorrt.log import tensorrt_log\n"
        "from mistral_trt.runtime.tensorrt.plan import load_plan\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "try:\n"
        "    load_plan(trt, tensorrt_log(trt), folder, read_manifest(folder))\n"
        "except EngineMismatchError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True
    )
    assert re.match(r"TensorRT [\d.]+ does not load .*model.plan: .*erialization.*; make it", done.stdout)


def test_there_is_one_logger_for_each_tensorrt(gpu: Machine) -> None:
    log = tensorrt_log(gpu.trt)
    assert tensorrt_log(machine("tensorrt-rtx").trt) is tensorrt_log(machine("tensorrt-rtx").trt)
    assert tensorrt_log(machine("tensorrt").trt) is not tensorrt_log(machine("tensorrt-rtx").trt)
    log.take_errors()
    assert log.because() == ": it gives no reason"
    for line in range(20):
        log.add("INTERNAL_ERROR", f"line {line}")
    assert log.because() == ": " + "; ".join(f"line {line}" for line in range(12, 20))


# --- the machine ----------------------------------------------------------------------------------------


def test_without_a_driver_the_real_cuda_says_so_in_plain_words(onnx: Path, tmp_path: Path) -> None:
    """The installed modules, on whatever machine this is: no plan of the simulation loads there."""
    folder = write_engine_folder(onnx, tmp_path / "engine")
    with pytest.raises(EngineMismatchError) as refused:
        open_tensorrt_backend(folder, read_manifest(folder, "engine"), cache_dir=tmp_path)
    status, _ = cudart.cudaGetDeviceCount()
    if status == Error.cudaErrorInsufficientDriver and cudart.cudaDriverGetVersion()[1] == 0:
        assert str(refused.value) == (
            "an engine needs an NVIDIA GPU and its driver, and this machine has no driver; run the ONNX "
            "folder it was built from instead, which needs neither: "
            "mistral-trt generate ONNX_DIR --prompt TEXT"
        )
    assert str(tmp_path) not in str(refused.value) or status == Error.cudaSuccess


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"present": Error.cudaErrorNoDevice}, "CUDA finds none here"),
        ({"present": Error.cudaErrorInsufficientDriver, "driver": 0}, "this machine has no driver"),
        (
            {"present": Error.cudaErrorInsufficientDriver, "driver": 12080},
            r"needs a driver for CUDA \d+\.\d, and the NVIDIA driver here serves CUDA 12.8",
        ),
        (
            {"compute_capability": (8, 9)},
            r"built for compute capability 8.6, and CUDA uses the NVIDIA A10G \(8.9",
        ),
    ],
    ids=["no GPU", "no driver", "old driver", "another GPU"],
)
def test_a_machine_that_cannot_run_it_is_told(
    engine: Path, flavor: str, facts: dict[str, Any], words: str
) -> None:
    found = machine(flavor, **facts)
    with pytest.raises(EngineMismatchError, match=words):
        found.open(engine)
    assert found.device.leaks() == {}


def test_a_gpu_that_cannot_be_asked_for_is_a_failure_of_cuda(engine: Path, flavor: str) -> None:
    found = machine(flavor, failures={"cudaGetDeviceCount": (0, Error.cudaErrorSystemNotReady)})
    with pytest.raises(
        BackendError, match=r"failed looking for a GPU: .*\(cudaErrorSystemNotReady\)"
    ) as told:
        found.open(engine)
    assert not told.value.fatal


def test_missing_modules_are_named_with_the_line_that_installs_them(
    engine: Path, flavor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(engine, "engine")

    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(api, "import_module", absent)
    with pytest.raises(MissingDependencyError, match=f"run: pip install {flavor}$"):
        open_tensorrt_backend(engine, manifest)
    with pytest.raises(
        MissingDependencyError, match=r"cuda.bindings.runtime.*run: pip install cuda-bindings$"
    ):
        open_tensorrt_backend(engine, manifest, trt=object())


def test_a_library_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("libtensorrt_rtx.so.1: cannot open shared object file")

    monkeypatch.setattr(api, "import_module", broken)
    with pytest.raises(
        MissingDependencyError, match=r"cannot be imported \(libtensorrt_rtx.so.1: cannot open"
    ):
        api.load_modules("tensorrt-rtx")


def test_the_installed_modules_are_imported_by_name() -> None:
    trt, runtime = api.load_modules("tensorrt-rtx")
    assert trt.__name__ == "tensorrt_rtx" and runtime is cudart
    assert api.load_modules("tensorrt", trt=trt, cudart=runtime) == (trt, runtime)


# --- memory ---------------------------------------------------------------------------------------------


def test_memory_is_counted_as_it_is_allocated(opened: TensorRtBackend, gpu: Machine) -> None:
    wanted = demand(opened.contract, 4096)
    assert gpu.device.used_bytes == wanted.total_bytes
    assert wanted.total_bytes == 4 * 6144 + 4096 + 4 * (3 * 8 + 4 * 97)


@pytest.mark.parametrize(("short", "rows"), [(1, 3), (6144, 3), (6145, 2), (4 * 6144, 0), (10**9, 0)])
def test_too_little_memory_is_told_with_the_rows_that_would_fit(
    engine: Path, flavor: str, short: int, rows: int
) -> None:
    total = Demand(6144, 4, 4 * (3 * 8 + 4 * 97), 4096).total_bytes
    found = machine(flavor, memory_bytes=max(0, total - short))
    said = rf"{rows} rows would fit: mistral-trt build .*--max-batch-size {rows}$" if rows else "not one row"
    with pytest.raises(EngineMismatchError, match=said):
        found.open(engine)
    assert found.device.leaks() == {} and "cudaMalloc" not in found.device.called
    machine(flavor, memory_bytes=total).open(engine).close()


def test_the_memory_sentence_has_every_number(onnx: Path, tmp_path: Path) -> None:
    manifest = engine_manifest(read_manifest(onnx), onnx, "tensorrt", "external")
    with pytest.raises(EngineMismatchError) as refused:
        require_memory(Demand(570 * 10**6, 8, 10**8, 10**9), 3 * 10**9, Path("engines/a10g"), manifest)
    assert str(refused.value) == (
        "engines/a10g needs 5.660 GB of GPU memory beside its weights (8 rows of 0.570 GB among it), and "
        "3.000 GB are free; 3 rows would fit: mistral-trt build ONNX_DIR --gpu a10g --out engines/a10g "
        "--weights external --max-batch-size 3"
    )


def test_an_allocation_that_fails_all_the_same_names_its_bytes(engine: Path, flavor: str) -> None:
    found = machine(flavor, failures={"cudaMalloc": (2, Error.cudaErrorMemoryAllocation)})
    with pytest.raises(
        BackendError, match=r"no room for past_key_values.1.key: 6144 bytes wanted \(0.000 GB\)"
    ):
        found.open(engine)
    assert found.device.leaks() == {}


# --- failures -------------------------------------------------------------------------------------------

TAKING = (
    "cudaGetDevice",
    "cudaGetDeviceProperties",
    "cudaHostAlloc",
    "cudaMalloc",
    "cudaMemGetInfo",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
    "cudaSetDevice",
    "cudaStreamCreateWithFlags",
    "cudaStreamSynchronize",
    "cudaGraphInstantiate",
    "cudaGraphLaunch",
    "cudaStreamBeginCapture",
    "cudaStreamEndCapture",
)


@pytest.mark.parametrize("name", TAKING)
def test_whatever_fails_while_it_starts_is_told_and_leaves_nothing(
    engine: Path, flavor: str, name: str
) -> None:
    calls, call = 0, 0
    while True:
        found = machine(flavor, failures={name: (call, Error.cudaErrorInvalidValue)})
        started = False
        try:
            opened = found.open(engine)
            try:
                opened.warm_up()
                started = True
            finally:
                opened.close()
        except BackendError as error:
            assert "cudaErrorInvalidValue" in str(error) and not error.fatal
        if name != "cudaStreamEndCapture":  # a stream whose capture cannot end is not usable
            assert found.device.leaks() == {}, call
        calls = found.device.called.count(name)
        if started or call > calls:
            break
        call += 1 if call < 4 else 7
    assert call > 0 or name not in found.device.called


def test_a_fault_on_the_gpu_ends_the_backend(opened: TensorRtBackend, gpu: Machine) -> None:
    opened.warm_up()
    gpu.device.failures["cudaStreamSynchronize"] = (0, Error.cudaErrorIllegalAddress)
    with pytest.raises(
        BackendError, match=r"illegal memory access.*\(cudaErrorIllegalAddress\); this"
    ) as fault:
        opened.run(decode_step([1], [0]))
    assert fault.value.fatal and not opened.ready
    for use in (lambda: opened.run(decode_step([1], [0])), lambda: opened.read_row(0), opened.warm_up):
        with pytest.raises(BackendError, match="cudaErrorIllegalAddress") as dead:
            use()
        assert dead.value.fatal
    opened.close()


def test_closing_after_a_fault_is_quiet(gpu: Machine, engine: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened = gpu.open(engine)
    gpu.device.sticky = Error.cudaErrorIllegalAddress
    with caplog.at_level(logging.INFO, "mistral_trt.runtime"):
        opened.close()
    assert caplog.records == []


@pytest.mark.parametrize("status", sorted(STICKY))
def test_errors_that_stick_are_fatal(gpu: Machine, engine: Path, status: str) -> None:
    opened = gpu.open(engine)
    gpu.device.failures["cudaMemcpyAsync"] = (1, getattr(Error, status))
    with pytest.raises(BackendError, match=f"{status}.*start it again") as fault:
        opened.run(decode_step([1], [0]))
    assert fault.value.fatal
    opened.close()


def test_an_error_that_passes_costs_one_step(opened: TensorRtBackend, gpu: Machine, onnx: Path) -> None:
    opened.warm_up()
    for name in ("cudaMemcpyAsync", "cudaStreamSynchronize"):
        gpu.device.failures[name] = (0, Error.cudaErrorInvalidValue)
        with pytest.raises(BackendError, match=r"CUDA failed .*\(cudaErrorInvalidValue\)") as passing:
            opened.run(prefill_step(1, [1, 2], 0, [1]))
        assert not passing.value.fatal and opened.ready
        opened.write_row(1, None)
    play(Reference(opened, onnx), 6, 30)


def test_a_token_outside_the_vocabulary_faults_as_it_would(opened: TensorRtBackend) -> None:
    with pytest.raises(BackendError, match="cudaErrorIllegalAddress") as fault:
        opened.run(decode_step([10**6], [0]))
    assert fault.value.fatal


def test_what_tensorrt_refuses_to_run_is_told_with_its_reason(
    gpu: Machine, engine: Path, monkeypatch: pytest.MonkeyPatch, onnx: Path
) -> None:
    opened = gpu.open(engine)
    refuse = lambda self, stream: self._engine._error("no kernel image")  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(doubles._Context, "execute_async_v3", refuse)
        with pytest.raises(BackendError, match="does not execute the step: no kernel image") as refused:
            opened.run(decode_step([1], [0]))
        assert not refused.value.fatal
        # TensorRT only says no where the GPU has faulted: the stream tells.
        gpu.device.failures["cudaStreamSynchronize"] = (0, Error.cudaErrorLaunchFailure)
        with pytest.raises(BackendError, match="cudaErrorLaunchFailure") as fault:
            opened.run(decode_step([1], [0]))
        assert fault.value.fatal and isinstance(fault.value.__cause__, BackendError)
    opened.close()


def test_an_interrupted_step_leaves_nothing_running(
    opened: TensorRtBackend, monkeypatch: pytest.MonkeyPatch, gpu: Machine
) -> None:
    def interrupt(self: Any, batch: int, count: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StepBuffers, "download", interrupt)
        with pytest.raises(KeyboardInterrupt):
            opened.run(decode_step([1], [0]))
        assert gpu.device.pending() == []
        gpu.device.failures["cudaStreamSynchronize"] = (0, Error.cudaErrorIllegalAddress)
        with pytest.raises(KeyboardInterrupt):
            opened.run(decode_step([1], [0]))
    with pytest.raises(BackendError, match="cudaErrorIllegalAddress"):
        opened.run(decode_step([1], [0]))


@pytest.mark.parametrize(
    ("owner", "method", "answer", "words"),
    [
        (
            doubles._Engine,
            "create_execution_context",
            lambda *a: None,
            "makes no execution context: it gives no",
        ),
        (
            doubles._Context,
            "set_optimization_profile_async",
            lambda *a: False,
            "does not take the profile decode: it gives no reason",
        ),
        (doubles._Context, "set_tensor_address", lambda *a: False, "does not take an address for input_ids"),
        (doubles._Context, "infer_shapes", lambda self: ["input_ids"], "has no shape for input_ids"),
    ],
)
def test_what_tensorrt_refuses_at_load_is_told(
    gpu: Machine, engine: Path, monkeypatch: Any, owner: Any, method: str, answer: Any, words: str
) -> None:
    monkeypatch.setattr(owner, method, answer)
    with pytest.raises(BackendError, match=words):
        gpu.open(engine)


def test_shapes_that_cannot_be_inferred_are_told(
    gpu: Machine, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> list[str]:
        raise RuntimeError("a negative dimension")

    monkeypatch.setattr(doubles._Context, "infer_shapes", fail)
    with pytest.raises(BackendError, match="cannot infer the shapes of a step: a negative dimension"):
        gpu.open(engine)


def test_after_a_failed_binding_everything_is_bound_again(
    opened: TensorRtBackend, monkeypatch: pytest.MonkeyPatch, onnx: Path
) -> None:
    """The context remembers what it is bound to; what a failure left unknown must not count as bound."""
    opened.run(prefill_step(0, [1, 2], 0, [1]))
    for method in ("set_input_shape", "set_tensor_address"):
        with monkeypatch.context() as patch:
            patch.setattr(doubles._Context, method, lambda *a: False)
            with pytest.raises(BackendError, match="does not take"):
                opened.run(prefill_step(1, [1, 2, 3], 0, [2]))
    with monkeypatch.context() as patch:
        patch.setattr(doubles._Context, "infer_shapes", lambda self: ["input_ids"])
        with pytest.raises(BackendError, match="has no shape for input_ids"):
            opened.run(prefill_step(1, [1, 2, 3], 0, [2]))
    for row in range(4):
        opened.write_row(row, None)
    play(Reference(opened, onnx), 8, 30)


def test_what_cannot_be_given_back_is_logged_and_the_rest_is(
    gpu: Machine, engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = gpu.open(engine)
    gpu.device.failures["cudaFreeHost"] = (1, Error.cudaErrorInvalidValue)
    with caplog.at_level(logging.WARNING, "mistral_trt.runtime"):
        opened.close()
    assert "CUDA failed cudaFreeHost: invalid argument (cudaErrorInvalidValue)" in caplog.text
    assert gpu.device.leaks() == {"memory": 1}
    gpu.device.blocks.clear()


def test_closing_twice_is_closing_once(gpu: Machine, engine: Path) -> None:
    opened = gpu.open(engine)
    opened.warm_up()
    opened.close()
    called = list(gpu.device.called)
    opened.close()
    assert gpu.device.called == called and gpu.device.leaks() == {} and not opened.ready
    with pytest.raises(BackendError, match="the backend is closed") as closed:
        opened.run(decode_step([1], [0]))
    assert closed.value.fatal


def test_two_backends_of_one_engine_are_closed_together(gpu: Machine, engine: Path, onnx: Path) -> None:
    manifest = read_manifest(engine, "engine")
    cache = engine.parent / "cache"
    shared = loaded.LoadedEngine(gpu.trt, gpu.cudart, engine, manifest, cache_dir=cache)
    graphs, plain = TensorRtBackend(shared), TensorRtBackend(shared, cuda_graphs=False)
    graphs.warm_up()
    for one in (graphs, plain, graphs):
        for row in range(4):
            one.write_row(row, None)
        play(Reference(one, onnx), 9, 20)
    graphs.close()
    for one in (graphs, plain):
        with pytest.raises(BackendError, match="the backend is closed"):
            one.run(decode_step([1], [0]))
    plain.close()


def test_what_was_taken_last_is_given_back_first(gpu: Machine, engine: Path, flavor: str) -> None:
    opened = gpu.open(engine)
    opened.warm_up()
    gpu.device.called.clear()
    opened.close()
    assert gpu.device.called[:2] == ["cudaSetDevice", "cudaStreamSynchronize"]
    frees = gpu.device.called[2:]
    graphs = ["cudaGraphExecDestroy"] * (3 if flavor == "tensorrt" else 0)
    buffers = ["cudaFreeHost", "cudaFree"] * 4
    assert frees == [*graphs, "cudaFree", *buffers, *["cudaFree"] * 4, "cudaStreamDestroy"]


# --- CUDA graphs ----------------------------------------------------------------------------------------


@pytest.fixture
def full(onnx: Path, tmp_path: Path) -> tuple[Machine, Path]:
    return machine("tensorrt"), write_engine_folder(onnx, tmp_path / "full", flavor="tensorrt")


def test_full_tensorrt_is_captured_by_hand_for_each_batch(full: tuple[Machine, Path]) -> None:
    gpu, folder = full
    opened = gpu.open(folder)
    assert gpu.device.instances == {}
    opened.warm_up()
    assert len(gpu.device.instances) == 3 and gpu.device.graphs == {}
    for instance in gpu.device.instances.values():  # tokens in, a step, logits out
        assert [work.context is not None for work in instance.work] == [False, False, False, True, False]
    opened.close()


def test_an_error_inside_a_capture_is_the_one_that_is_raised(
    full: tuple[Machine, Path], monkeypatch: pytest.MonkeyPatch, onnx: Path
) -> None:
    gpu, folder = full
    opened = gpu.open(folder)
    real = doubles._Context.execute_async_v3

    def refuse(self: Any, stream_handle: int) -> bool:
        if self._device.capturing() is not None:
            return bool(self._engine._error("not while capturing"))
        return real(self, stream_handle)

    for broken in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(doubles._Context, "execute_async_v3", refuse)
            if broken:
                gpu.device.failures["cudaStreamEndCapture"] = (0, Error.cudaErrorStreamCaptureInvalidated)
            with pytest.raises(BackendError, match="does not execute the step: not while capturing"):
                opened.warm_up()
        assert not opened.ready
        for stream in gpu.device.streams.values():
            stream.capture = None
    opened.warm_up()
    play(Reference(opened, onnx), 7, 20)
    opened.close()
    assert gpu.device.leaks() == {}


@pytest.mark.parametrize("name", ["cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_step_that_cannot_be_captured_is_an_error_with_its_remedy(
    full: tuple[Machine, Path], name: str, onnx: Path
) -> None:
    gpu, folder = full
    opened = gpu.open(folder)
    gpu.device.failures[name] = (0, Error.cudaErrorStreamCaptureInvalidated)
    with pytest.raises(
        BackendError, match=r"of 1 rows cannot be captured .*cuda_graphs=False\) runs without"
    ):
        opened.warm_up()
    assert not opened.ready and gpu.device.graphs == {}
    opened.close()


def test_a_batch_is_captured_once(full: tuple[Machine, Path]) -> None:
    gpu, folder = full
    opened = gpu.open(folder)
    opened.warm_up()
    before = set(gpu.device.instances)
    opened._graphs.capture(1, lambda: opened._enqueue(opened._decode[1], 1, 1, 1))
    assert len(gpu.device.instances) == 3 and set(gpu.device.instances) != before
    opened.close()


def test_rtx_captures_decode_by_itself_and_prefill_not_at_all(onnx: Path, tmp_path: Path) -> None:
    gpu = machine()
    opened = gpu.open(write_engine_folder(onnx, tmp_path / "rtx"))
    settings = [opened._decode[batch]._context._inside._settings for batch in (1, 2, 4)]
    assert opened._prefill is not None
    prefill = opened._prefill._context._inside._settings
    assert {s.cuda_graph_strategy.name for s in settings} == {"WHOLE_GRAPH_CAPTURE"}
    assert {s.dynamic_shapes_kernel_specialization_strategy.name for s in settings} == {"EAGER"}
    assert prefill.cuda_graph_strategy.name == "DISABLED"
    assert prefill.dynamic_shapes_kernel_specialization_strategy.name == "LAZY"
    assert all(s._user_managed for s in (*settings, prefill))
    opened.close()
    opened = gpu.open(tmp_path / "rtx", cuda_graphs=False)
    assert opened._decode[1]._context._inside._settings.cuda_graph_strategy.name == "DISABLED"
    opened.close()
    assert gpu.device.leaks() == {}


def logits_of(opened: TensorRtBackend, row: int, length: int) -> Logits:
    """After a prompt of so many tokens on a row, at the start of a text."""
    return opened.run(prefill_step(row, list(range(length)), 0, [length - 1]))


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("fixed_batch", [True, False])
def test_a_fixed_batch_is_steady_to_the_last_bit(
    onnx: Path, tmp_path: Path, length: int, fixed_batch: bool
) -> None:
    """Whatever has run before, and on whichever row; otherwise only nearly so."""
    opened = machine().open(write_engine_folder(onnx, tmp_path / "rtx"), fixed_batch=fixed_batch)
    first, second = logits_of(opened, 2, length), logits_of(opened, 0, length)
    opened.close()
    np.testing.assert_allclose(first, second, rtol=2e-6, atol=0)
    assert bool((first == second).all()) == fixed_batch


@pytest.mark.parametrize("fixed_batch", [True, False])
def test_log_probabilities_of_a_fixed_batch_are_those_of_any_other_time(
    onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fixed_batch: bool
) -> None:
    """By way of `Engine.load`: the first text of a process, and the same among others later."""
    machine().install(monkeypatch)
    folder, params = write_engine_folder(onnx, tmp_path / "rtx"), SamplingParams(max_tokens=3, logprobs=0)
    prompts = [[1, 2], [4, 5, 6], [9]]
    with Engine.load(folder, fixed_batch=fixed_batch, cache_dir=tmp_path / "cache") as engine:
        (alone,) = engine.generate([prompts[1]], params)
        assert (engine.generate(prompts, params)[1] == alone) == fixed_batch


def test_a_fixed_batch_has_one_decode_step(onnx: Path, tmp_path: Path) -> None:
    """A prompt of one token is prefill on every row, on row 0 too."""
    for flavor, graphs in (("tensorrt", 1), ("tensorrt-rtx", 0)):
        gpu, said = machine(flavor), list[str]()
        opened = gpu.open(write_engine_folder(onnx, tmp_path / flavor, flavor=flavor), fixed_batch=True)
        opened.warm_up(lambda what, share, said=said: said.append(what))  # type: ignore[misc]
        assert said == ["warming up 4 rows", "warming up chunks of 1", "warming up chunks of 4"]
        assert opened.ready and list(opened._decode) == [4] and len(gpu.device.instances) == graphs
        logits_of(opened, 0, 1)
        with pytest.raises(BackendError, match=r"expected a decode step of \[4\] rows"):
            opened.run(decode_step([1, 2], [0, 0]))
        opened.close()


def test_settings_that_rtx_does_not_take_are_told(
    onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, gpu = write_engine_folder(onnx, tmp_path / "rtx"), machine()
    with monkeypatch.context() as patch:
        patch.setattr(doubles._RuntimeConfig, "set_runtime_cache", lambda self, cache: False)
        with pytest.raises(BackendError, match="does not take its runtime cache"):
            gpu.open(folder)
    disabled = gpu.trt.CudaGraphStrategy.DISABLED
    deaf = property(lambda self: disabled, lambda self, value: None)
    monkeypatch.setattr(doubles._RuntimeConfig, "cuda_graph_strategy", deaf)
    with pytest.raises(BackendError, match="does not take WHOLE_GRAPH_CAPTURE for its CUDA graphs"):
        gpu.open(folder)
    assert gpu.device.leaks() == {}


# --- compiled kernels -----------------------------------------------------------------------------------


@pytest.fixture
def rtx(onnx: Path, tmp_path: Path) -> Path:
    return write_engine_folder(onnx, tmp_path / "rtx")


def start(folder: Path, cache: Path | None, **facts: Any) -> Machine:
    gpu = machine(**facts)
    opened = gpu.open(folder, cache_dir=cache)
    opened.warm_up()
    opened.close()
    return gpu


def test_a_second_start_compiles_nothing(rtx: Path, tmp_path: Path) -> None:
    cache = tmp_path / "kernels"
    assert len(start(rtx, cache).trt._compiled) == 3
    (file,) = cache.rglob("*.bin")
    assert start(rtx, cache).trt._compiled == []
    assert [file] == [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize("data", [b"", b"{", b"\x00" * 100])
def test_a_damaged_cache_is_said_and_written_anew(
    rtx: Path, tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    start(rtx, tmp_path / "kernels")
    (file,) = (tmp_path / "kernels").rglob("*.bin")
    whole = file.read_bytes()
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING, "mistral_trt.runtime"):
        assert len(start(rtx, tmp_path / "kernels").trt._compiled) == 3
    assert f"{file} is damaged or of another machine" in caplog.text
    assert file.read_bytes() == whole and start(rtx, tmp_path / "kernels").trt._compiled == []


def test_kernels_are_kept_apart_by_what_they_depend_on(tmp_path: Path) -> None:
    gpu = Gpu("NVIDIA A10G", "8.6", "13.0")
    paths = {
        kernel_cache.cache_path(tmp_path, "plan", gpu, "1.7.1"),
        kernel_cache.cache_path(tmp_path, "other", gpu, "1.7.1"),
        kernel_cache.cache_path(tmp_path, "plan", replace(gpu, name="NVIDIA A10"), "1.7.1"),
        kernel_cache.cache_path(tmp_path, "plan", replace(gpu, driver="13.1"), "1.7.1"),
        kernel_cache.cache_path(tmp_path, "plan", replace(gpu, compute_capability="8.9"), "1.7.1"),
        kernel_cache.cache_path(tmp_path, "plan", gpu, "1.7.2"),
    }
    assert len(paths) == 6 and all(path and path.is_relative_to(tmp_path) for path in paths)


def test_kernels_lie_in_the_users_cache_unless_told(
    rtx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    start(rtx, None)
    (file,) = (tmp_path / "xdg").rglob("*.bin")
    assert file.is_relative_to(tmp_path / "xdg" / "mistral-trt")


def test_a_cache_folder_that_cannot_be_used_is_no_error(
    rtx: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, "mistral_trt.runtime"):
        start(rtx, tmp_path / "file")
    assert "compiled kernels cannot be read" in caplog.text
    assert "compiled kernels cannot be kept" in caplog.text


def test_kernels_that_were_compiled_while_serving_are_kept_too(rtx: Path, tmp_path: Path) -> None:
    opened = machine().open(rtx, cache_dir=tmp_path / "kernels")
    opened.warm_up()
    (file,) = (tmp_path / "kernels").rglob("*.bin")
    warm, written = file.read_bytes(), file.stat().st_mtime_ns
    opened.run(prefill_step(1, [1, 2, 3], 0, [2]))  # a shape that warming up does not run
    opened.close()
    later = file.read_bytes()
    assert len(later) > len(warm) and file.stat().st_mtime_ns > written
    start(rtx, tmp_path / "kernels")
    assert file.read_bytes() == later


def test_a_user_without_a_home_has_no_cache(
    rtx: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(kernel_cache, "cache_folder", homeless)
    with caplog.at_level(logging.WARNING, "mistral_trt.runtime"):
        start(rtx, None)
    assert "compiled kernels are not kept for the next start: Could not determine home" in caplog.text


def test_full_tensorrt_keeps_no_kernels(full: tuple[Machine, Path], tmp_path: Path) -> None:
    gpu, folder = full
    opened = gpu.open(folder, cache_dir=tmp_path / "kernels")
    opened.warm_up()
    opened.close()
    assert not (tmp_path / "kernels").exists()


# --- mistakes that the tests above must notice ----------------------------------------------------------


def wrong_alias(patch: pytest.MonkeyPatch) -> None:
    real = BoundContext._set_address

    def bind(self: Any, name: str, address: int) -> None:
        real(self, name, self._addresses["past_key_values.0.key"] if name == "present.0.value" else address)

    patch.setattr(BoundContext, "_set_address", bind)


def wrong_profile(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(contexts, "PROFILES", ("prefill", "decode"))


def missed_wait(patch: pytest.MonkeyPatch) -> None:
    real = Cuda.wait

    def wait(self: Any) -> None:
        if sys._getframe(1).f_code.co_name != "run":
            real(self)

    patch.setattr(Cuda, "wait", wait)


def freed_buffer(patch: pytest.MonkeyPatch) -> None:
    real = loaded.LoadedEngine._allocate

    def allocate(self: Any) -> None:
        real(self)
        self.cuda.release("cudaFree", self._activations[0])

    patch.setattr(loaded.LoadedEngine, "_allocate", allocate)


def freed_ring(patch: pytest.MonkeyPatch) -> None:
    real = DeviceRings.clear

    def clear(self: Any) -> None:
        real(self)
        self._cuda.release("cudaFree", self.addresses[-1])

    patch.setattr(DeviceRings, "clear", clear)


def double_capture(patch: pytest.MonkeyPatch) -> None:
    real = StepGraphs.capture

    def capture(self: Any, batch: int, enqueue: Callable[[], None]) -> None:
        real(self, batch, lambda: real(self, batch, enqueue))

    patch.setattr(StepGraphs, "capture", capture)


def kept_graphs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TensorRtBackend, "_drop_contexts", lambda self: None)
    patch.setattr(TensorRtBackend, "_make_contexts", make_contexts_once)


_MAKE = TensorRtBackend._make_contexts


def make_contexts_once(self: TensorRtBackend) -> None:
    if self._prefill is None:
        _MAKE(self)


def unchecked_hash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(refit, "require_hash", lambda *a: None)


def row_too_far(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        DeviceRings,
        "at_row",
        lambda self, row: [
            a + min(row + 1, 3) * s for a, s in zip(self.addresses, self._row_bytes, strict=True)
        ],
    )


def row_too_near(patch: pytest.MonkeyPatch) -> None:
    real = DeviceRings.at_row
    patch.setattr(DeviceRings, "at_row", lambda self, row: real(self, max(0, row - 1)))


def row_a_slot_too_far(patch: pytest.MonkeyPatch) -> None:
    real = DeviceRings.at_row
    patch.setattr(DeviceRings, "at_row", lambda self, row: [a + 64 * bool(row) for a in real(self, row)])


def rings_not_zeroed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeviceRings, "clear", lambda self: None)


def captured_at_once(patch: pytest.MonkeyPatch) -> None:
    def warm(self: Any, batch: int) -> None:
        self._graphs.capture(batch, lambda: self._enqueue(self._decode[batch], batch, 1, 1))

    patch.setattr(TensorRtBackend, "_warm_decode", warm)


def one_decode_context(patch: pytest.MonkeyPatch) -> None:
    def make(self: Any) -> None:
        maker = self._loaded.context_maker(cuda_graphs=True, eager_prefill=False)
        context = maker.make("decode")
        self._decode = dict.fromkeys(decode_batches(4), context)
        self._prefill = maker.make("prefill")

    def run(self: Any, step: Step, batch: int) -> None:
        self._bind(self._decode[batch], self.contract.decode_shape(batch), 0)
        real(self, step, batch)

    real = TensorRtBackend._run_decode
    patch.setattr(TensorRtBackend, "_make_contexts", make)
    patch.setattr(TensorRtBackend, "_run_decode", run)


def pageable_buffers(patch: pytest.MonkeyPatch) -> None:
    kept = []

    def allocate(self: Any, size: int) -> int:
        kept.append(np.zeros(size, np.uint8))
        return int(kept[-1].ctypes.data)

    patch.setattr(Cuda, "allocate_pinned", allocate)


def tokens_not_uploaded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TensorRtBackend, "_enqueue", enqueue_without_upload)


def enqueue_without_upload(self: Any, context: Any, batch: int, new: int, count: int) -> None:
    context.enqueue()
    self._buffers.download(batch, count)


def device_of_another_thread(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cuda, "use", lambda self: None)


MISTAKES: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    wrong_alias: "alias-one-memory",
    wrong_profile: "does not take input_ids as",
    missed_wait: "Not equal to tolerance",
    freed_buffer: "cudaErrorIllegalAddress",
    freed_ring: "cudaErrorIllegalAddress",
    double_capture: "capturing a decode step",
    kept_graphs: "captured-before-refit",
    unchecked_hash: "DID NOT RAISE ManifestError",
    row_too_far: "cudaErrorIllegalAddress",
    row_too_near: "Not equal to tolerance",
    row_a_slot_too_far: "cudaErrorInvalidValue",
    rings_not_zeroed: "nan location mismatch",
    captured_at_once: "capture-after-a-step",
    one_decode_context: "captured-context-untouched",
    pageable_buffers: "cudaErrorStreamCaptureUnsupported",
    tokens_not_uploaded: "cudaErrorIllegalAddress",
    device_of_another_thread: "device-of-the-thread",
}
"""What could be wrong with the backend, and the words of what notices it."""


def live(folder: Path, onnx: Path, other_onnx: Path) -> None:
    """Load, serve, refit and serve again in full TensorRT, from two threads; raises if all is not well."""
    gpu = machine("tensorrt")
    gpu.cudart.cudaSetDevice(1)
    opened = gpu.open(folder)
    opened.warm_up()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(play, Reference(opened, onnx), 0, 40).result()
    second = with_weights(folder, other_onnx)
    manifest = read_manifest(second, "engine")
    opened.refit(second, manifest)
    opened.run(decode_step([1], [0]))
    opened.warm_up()
    play(Reference(opened, other_onnx), 1, 40)
    opened.close()
    assert gpu.device.leaks() == {}
    flip(folder / "model.onnx.data")
    with pytest.raises(ManifestError):
        gpu.open(folder)


@pytest.fixture
def whole(onnx: Path, tmp_path: Path) -> Path:
    return write_engine_folder(onnx, tmp_path / "whole", flavor="tensorrt", weights="external")


def test_without_a_mistake_it_lives(whole: Path, onnx: Path, other_onnx: Path) -> None:
    live(whole, onnx, other_onnx)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_the_backend_is_noticed(
    whole: Path, onnx: Path, other_onnx: Path, monkeypatch: pytest.MonkeyPatch, mistake: Any
) -> None:
    mistake(monkeypatch)
    with pytest.raises((AssertionError, RuleBroken, BackendError, pytest.fail.Exception)) as noticed:
        live(whole, onnx, other_onnx)
    assert MISTAKES[mistake] in str(noticed.value)


# --- the end: every line has run ------------------------------------------------------------------------


def test_lines_are_those_of_functions() -> None:
    text = "import sys\ndef f():\n  def g():\n    return 1\n  return g\nclass C:\n  def m(self):\n    pass"
    assert lines_of(compile(text, "f.py", "exec")) == {3, 4, 5, 8}


def test_every_line_of_the_backend_has_run(request: pytest.FixtureRequest) -> None:
    """Of each function, once all tests of this file have run; a part of them shows nothing."""
    chosen = {item.originalname for item in request.session.items if item.path == request.path}  # type: ignore[attr-defined]
    if chosen < {name for name in globals() if name.startswith("test_")}:
        return
    missed = []
    for path in (path for folder in SOURCES for path in folder.glob("*.py")):
        code = compile(path.read_text(), str(path), "exec")
        missed += [f"{path.name}:{line}" for line in sorted(lines_of(code) - RAN.get(path.name, set()))]
    assert missed == []
