"""An artifact by its layers: together they are the whole graph, to the last bit, at every precision."""

import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mistral_trt.contract import GraphContract, plan_contract
from mistral_trt.errors import GraphError, ValidationError
from mistral_trt.export.quantization.nodes import quantize_graph
from mistral_trt.export.quantization.placement import place_stored
from mistral_trt.export.quantization.scheme import linear_names, scheme_for
from mistral_trt.manifest import GRAPH_NAME
from mistral_trt.runtime.backend import Backend
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.onnxruntime_backend import OnnxRuntimeBackend
from mistral_trt.validate.layerwise import runner, segments
from mistral_trt.validate.layerwise.layer_slice import layer_slice
from mistral_trt.validate.layerwise.loaded import LoadedSegment
from mistral_trt.validate.layerwise.ranges import RangeLog
from mistral_trt.validate.layerwise.runner import SegmentedArtifact
from mistral_trt.validate.layerwise.segments import cut_layer, read_graph
from mistral_trt.validate.layerwise.steps import Hidden, Recording, gather
from mistral_trt.validate.scenarios.poke import poke_probe, questions
from mistral_trt.validate.scenarios.scenario import Scenario, play, scenarios
from mistral_trt.validate.twin import float32_twin
from tests.alteration import edit_graph, node
from tests.conftest import BuiltGraph
from tests.graphs import fill_weights
from tests.models import TINY

LENGTH = 30  # W = 8, C = 4, R = 12: the ring wraps twice
TOKENS = tuple(int(t) for t in np.random.default_rng(7).integers(0, TINY.vocab_size, LENGTH))
UP = "model.layers.1.mlp.up_proj"

Files: TypeAlias = Callable[[str], "Artifact"]


@dataclass(frozen=True)
class Artifact:
    """An ONNX folder without a manifest."""

    folder: Path
    contract: GraphContract

    @property
    def path(self) -> Path:
        return self.folder / GRAPH_NAME


@dataclass(frozen=True)
class Made:
    """How an artifact of the tests is made.  multiplied: linears whose pre_quant_scale stays a Mul."""

    precision: str
    tied: bool = False
    lm_head: bool = False
    kept: tuple[str, ...] = ()
    multiplied: tuple[str, ...] = ()


MADE = {
    "fp32": Made("fp32"),
    "fp16": Made("fp16"),
    "fp16 tied": Made("fp16", tied=True),
    "bf16": Made("bf16"),
    "int8": Made("int8", multiplied=("model.layers.0.self_attn.o_proj",)),
    "int8 with its head": Made("int8", lm_head=True),
    "int8-weight-only with its head": Made("int8-weight-only", lm_head=True),
    "int4, parts kept": Made("int4", tied=True, kept=(UP,), multiplied=("model.layers.1.mlp.down_proj",)),
    "fp8": Made("fp8"),
}
SIZES = {"weight_scale": 20.0, "input_scale": 15.0, "pre_quant_scale": 700.0, "_proj.weight": 0.15}
"""End of a name → what `fill_weights`'s numbers are multiplied by: attention is far from uniform then, and
no activation is clipped."""


@pytest.fixture(scope="module")
def made(built_graph: BuiltGraph, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """made(name of MADE) -> its artifact, made once."""
    done: dict[str, Artifact] = {}

    def artifact(name: str) -> Artifact:
        if name not in done:
            done[name] = write_artifact(MADE[name], built_graph, tmp_path_factory.mktemp("artifact"))
        return done[name]

    return artifact


def write_artifact(how: Made, built_graph: BuiltGraph, folder: Path) -> Artifact:
    config = replace(TINY, tie_word_embeddings=how.tied)
    contract = plan_contract(config, precision=how.precision, prefill_chunk=4, max_batch_size=3)
    floats = how.precision if how.precision in ("fp32", "bf16") else "fp16"
    model = built_graph(replace(contract, precision=floats))
    if how.precision not in ("fp32", "fp16", "bf16"):
        names = linear_names(config, lm_head=how.lm_head)
        placement = place_stored(names, how.kept, layers=config.num_hidden_layers)
        placement = replace(placement, multiplied=frozenset(how.multiplied))
        quantize_graph(model, scheme_for(how.precision, config), placement)
    fill_weights(model)
    for name, value in model.graph.initializers.items():
        for end, size in SIZES.items():
            if name.endswith(end) and value.dtype in (
                ir.DataType.FLOAT,
                ir.DataType.FLOAT16,
                ir.DataType.BFLOAT16,
            ):
                multiply(value, size)
    ir.save(model, folder / GRAPH_NAME, external_data=f"{GRAPH_NAME}.data")
    return Artifact(folder, contract)


def multiply(value: ir.Value, factor: float) -> None:
    assert value.const_value is not None and value.dtype is not None
    numbers = value.const_value.numpy().astype(np.float32) * factor
    value.const_value = ir.tensor(numbers.astype(value.dtype.numpy()), dtype=value.dtype, name=value.name)


@contextmanager
def whole(artifact: Artifact) -> Iterator[OnnxRuntimeBackend]:
    """The artifact as the runtime runs it, or its twin."""
    if artifact.contract.precision != "bf16":
        yield OnnxRuntimeBackend(artifact.path, artifact.contract, threads=1, exact=True)
        return
    with float32_twin(artifact.path, artifact.contract) as (path, contract):
        yield OnnxRuntimeBackend(path, contract, threads=1)


def opened(artifact: Artifact) -> SegmentedArtifact:
    return SegmentedArtifact(artifact.folder, artifact.contract, threads=1)


def plans(contract: GraphContract) -> list[Scenario]:
    return scenarios(contract, LENGTH, names=["prefill", "decode", "padded", "stepwise"], seed=0)


def recorded(contract: GraphContract, scenario: Scenario) -> Recording:
    recording = Recording(contract)
    for _ in play(RollingCache(recording), scenario, tokens=TOKENS):
        pass
    return recording


@dataclass(frozen=True)
class Ran:
    """states: what leaves the embedding and each layer.  rings: in the contract's order, [rows, K, R, D]."""

    states: list[Hidden]
    rings: list[np.ndarray]


def run_layers(artifact: SegmentedArtifact, recording: Recording, ranges: RangeLog | None = None) -> Ran:
    found = Ran([artifact.embed(recording)], [])
    for index in range(artifact.num_hidden_layers):
        run = artifact.run(index, recording, found.states[-1], ranges=ranges)
        found.states.append(run.hidden)
        found.rings.extend([run.keys, run.values])
    return found


def logits_of(artifact: SegmentedArtifact, recording: Recording, ran: Ran) -> np.ndarray:
    """[T, V], by position."""
    found = np.zeros((LENGTH, artifact.contract.config.vocab_size), np.float32)
    steps = artifact.logits(recording, ran.states[-1])
    for step, logits in zip(recording.steps, steps, strict=True):
        found[step.position_ids[0, step.logits_index[0]]] = logits[0]
    return found


def run_all(artifact: SegmentedArtifact, recording: Recording) -> np.ndarray:
    return logits_of(artifact, recording, run_layers(artifact, recording))


def played(cache: RollingCache, scenario: Scenario) -> np.ndarray:
    return np.concatenate([logits for _, logits in play(cache, scenario, tokens=TOKENS)])


# ---------------------------------------------------------------- the law


@pytest.mark.parametrize("name", MADE)
def test_the_layers_are_the_whole_graph_to_the_last_bit(made: Files, name: str) -> None:
    """Logits of every scenario and the rings it leaves, watched or not."""
    artifact = made(name)
    with whole(artifact) as backend, opened(artifact) as layers:
        for scenario in plans(artifact.contract):
            expected = played(RollingCache(backend), scenario)
            assert np.abs(expected).max() > 0.5
            recording = recorded(artifact.contract, scenario)
            for log in (None, RangeLog()):
                ran = run_layers(layers, recording, log)
                np.testing.assert_array_equal(logits_of(layers, recording, ran), expected)
                for ours, theirs in zip(ran.rings, backend.read_row(0), strict=True):
                    np.testing.assert_array_equal(ours[0], theirs)


def test_an_edge_that_rounds_is_seen(made: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Sum at an edge is for: without it a float16 graph gives other logits."""
    widened = segments._widened_input
    monkeypatch.setattr(
        segments, "_widened_input", lambda graph, value, *, summed: widened(graph, value, summed=False)
    )
    artifact = made("fp16")
    scenario = plans(artifact.contract)[0]
    with whole(artifact) as backend, opened(artifact) as layers:
        found = run_all(layers, recorded(artifact.contract, scenario))
        assert not np.array_equal(found, played(RollingCache(backend), scenario))


def test_hidden_states_are_those_of_the_whole_graph(made: Files) -> None:
    """Its values, made outputs, over one chunk and the next."""
    artifact, inner = (
        made("fp32"),
        ("model.embed_tokens/Gather", "model.layers.0/Add_1", "model.layers.1/Add_1"),
    )
    model = ir.load(artifact.path)
    model.graph.outputs.extend(ir.convenience.create_value_mapping(model.graph)[name] for name in inner)
    options = ort.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(artifact.folder)
    )
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    recording = recorded(artifact.contract, plans(artifact.contract)[0])
    with opened(artifact) as layers:
        states = run_layers(layers, recording).states
    past = {
        spec.name: np.zeros((1, *(int(size) for size in spec.shape[1:])), np.float32)
        for spec in artifact.contract.past()
    }
    for i, step in enumerate(recording.steps[:4]):
        feeds = {"input_ids": step.input_ids, "position_ids": step.position_ids}
        found = session.run(None, {**feeds, "logits_index": step.logits_index, **past})
        for ours, theirs in zip(states, found[-len(inner) :], strict=True):
            np.testing.assert_array_equal(ours[i], theirs)
        past = dict(zip(past, found[1 : 1 + len(past)], strict=True))


# ---------------------------------------------------------------- rows


def drive(backend: Backend) -> list[np.ndarray]:
    """Rows that come and go, idle, and decode together.  Returns the logits of row 1 at every call."""
    cache = RollingCache(backend)
    first, second = cache.acquire_rows(2)
    cache.append(first, TOKENS[:9])
    found = [cache.append(second, TOKENS[:6], all_logits=True)]
    for i in range(6, 12):
        both = {first: TOKENS[i + 3], second: TOKENS[i]}
        found.append(cache.step(both)[second][None])
    third = cache.acquire()
    cache.step({third: TOKENS[0]})  # the others idle
    found.append(cache.step({second: TOKENS[12]})[second][None])
    cache.release(first)
    again = cache.acquire()
    cache.append(again, TOKENS[5:8])
    return [*found, cache.step({again: TOKENS[0], second: TOKENS[13]})[second][None]]


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_rows_are_the_whole_graphs_too(made: Files, name: str) -> None:
    artifact = made(name)
    recording = Recording(artifact.contract)
    drive(recording)
    with whole(artifact) as backend, opened(artifact) as layers:
        expected = np.concatenate(drive(backend))
        ran = run_layers(layers, recording)
        for row in range(3):
            for ours, theirs in zip(ran.rings, backend.read_row(row), strict=True):
                np.testing.assert_array_equal(ours[row], theirs)
        found = np.zeros_like(expected)
        for step, logits in zip(recording.steps, layers.logits(recording, ran.states[-1]), strict=True):
            place = 1 - step.first_row
            if 0 <= place < len(logits):
                found[step.position_ids[place, step.logits_index[place]]] = logits[place]
    np.testing.assert_array_equal(found, expected)
    assert max(len(step.input_ids) for step in recording.steps) == 3


def test_a_row_that_is_zeroed_between_steps_is_zeroed_there(made: Files) -> None:
    artifact = made("fp32")
    step = recorded(artifact.contract, plans(artifact.contract)[0]).steps
    recording = Recording(artifact.contract)
    with whole(artifact) as backend, opened(artifact) as layers:
        for target in (backend, recording):
            target.run(step[0])
            target.write_row(0, None)
            target.run(step[1])
        ran = run_layers(layers, recording)
        for ours, theirs in zip(ran.rings, backend.read_row(0), strict=True):
            np.testing.assert_array_equal(ours[0], theirs)
            assert not ours[0][:, :4].any() and ours[0][:, 4:8].any()


# ---------------------------------------------------------------- weights and memory


def altered(
    artifact: Artifact, folder: Path, changes: Mapping[str, Callable[[np.ndarray], np.ndarray]]
) -> Artifact:
    """A copy whose initializers are changed."""
    shutil.copytree(artifact.folder, folder)
    model = ir.load(artifact.path)
    for name, change in changes.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        numbers = change(value.const_value.numpy())
        value.const_value = ir.tensor(numbers, dtype=value.dtype, name=name)
    ir.save(model, folder / GRAPH_NAME, external_data=f"{GRAPH_NAME}.data")
    return replace(artifact, folder=folder)


@pytest.mark.parametrize("name", ["fp16", "bf16", "int4, parts kept"])
def test_weights_in_a_file_with_a_second_name_are_read(made: Files, tmp_path: Path, name: str) -> None:
    artifact = made(name)
    linked = replace(artifact, folder=tmp_path / "linked")
    shutil.copytree(artifact.folder, linked.folder)
    os.link(linked.folder / f"{GRAPH_NAME}.data", tmp_path / "second name")
    recording = recorded(artifact.contract, plans(artifact.contract)[0])
    with opened(artifact) as one, opened(linked) as other:
        np.testing.assert_array_equal(run_all(one, recording), run_all(other, recording))
    with layer_slice(linked.folder, linked.contract, 1) as (path, _):
        assert path.exists()


def test_a_layer_is_gone_before_the_next_is_loaded(made: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    loaded = LoadedSegment

    def load(*arguments: Any, **options: Any) -> Any:
        assert not any(ref() for ref in alive)
        found = loaded(*arguments, **options)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(runner, "LoadedSegment", load)
    artifact = made("fp32")
    recording = recorded(artifact.contract, plans(artifact.contract)[0])
    with opened(artifact) as layers:
        run_all(layers, recording)
        assert len(alive) == 4, "embedding, two layers, head"
        run = layers.run(0, recording, layers.embed(recording), ranges=RangeLog())
        count = len(alive)
        layers.run(0, recording, run.hidden)
        assert len(alive) == count, "what was loaded to be watched serves unwatched too"
    assert not any(ref() for ref in alive)


def test_a_graph_of_another_make_is_refused(made: Files, tmp_path: Path) -> None:
    artifact = altered(made("fp32"), tmp_path / "other", {})
    model = ir.load(artifact.path)
    for renamed in model.graph:
        renamed.name = str(renamed.name).replace("layers.1.", "blocks.1.")
    ir.save(model, artifact.path)
    recording = recorded(artifact.contract, plans(artifact.contract)[0])
    with (
        opened(artifact) as layers,
        pytest.raises(GraphError, match="cannot be cut into its layers: .*graph inputs"),
    ):
        run_layers(layers, recording)
    model = read_graph(artifact.folder, artifact.contract)
    next(node for node in model.graph if node.name == "model/Mod_1").replace_input_with(
        0, next(value for value in model.graph.inputs if value.name == "logits_index")
    )
    with pytest.raises(GraphError, match="cannot be cut into its layers: .*logits_index"):
        cut_layer(model, 0)


def test_what_cannot_be_loaded_is_said(made: Files, tmp_path: Path) -> None:
    artifact = altered(made("fp32"), tmp_path / "other", {})
    (artifact.folder / f"{GRAPH_NAME}.data").write_bytes(b"short")
    recording = recorded(artifact.contract, plans(artifact.contract)[0])
    with pytest.raises(GraphError, match=r"expected \d+ bytes in .*model.onnx.data, found 5"):
        opened(artifact)
    other = altered(made("fp32"), tmp_path / "operator", {})
    edit_graph(other.folder, lambda graph: setattr(node(graph, f"{UP}/MatMul"), "op_type", "Unheard"))
    with opened(other) as layers, pytest.raises(GraphError, match="cannot load a part of"):
        layers.run(1, recording, [np.zeros((1, 4, TINY.hidden_size), np.float32)])


# ---------------------------------------------------------------- ranges


def test_every_activation_of_every_layer_is_measured(made: Files) -> None:
    artifact, log = made("fp32"), RangeLog()
    recording = recorded(artifact.contract, plans(artifact.contract)[0])
    with opened(artifact) as layers:
        states = run_layers(layers, recording, log).states
    found = {(r.activation, r.layer): r for r in log.found()}
    linears = [f"self_attn.{kind}_proj" for kind in "qkvo"]
    linears += [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    others = ["input_layernorm", "self_attn", "post_attention_layernorm", "mlp.product", "residual"]
    assert set(found) == {(name, i) for name in [*linears, *others] for i in (0, 1)}
    left = max(float(np.abs(state).max()) for state in states[2])
    assert found["residual", 1].largest >= left > 0


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_an_activation_past_float16_shows(made: Files, tmp_path: Path, name: str) -> None:
    """The same with small weights: the share below float16's normal numbers."""
    weight = f"{UP}.weight" if name == "fp16" else f"{UP}.weight_scale"
    artifact = made(name)
    recording = recorded(artifact.contract, plans(artifact.contract)[0])
    measured = {}
    for factor in (1.0, 3e4, 1e-6):
        change = {weight: lambda numbers, factor=factor: (numbers * factor).astype(numbers.dtype)}
        with opened(altered(artifact, tmp_path / str(factor), change)) as layers:
            log, hidden = RangeLog(), layers.embed(recording)
            layers.run(1, recording, hidden, ranges=log)
        measured[factor] = {r.activation: r for r in log.found()}
    assert measured[1.0]["mlp.product"].largest < 65504 < measured[3e4]["mlp.product"].largest
    assert measured[1.0]["mlp.up_proj"].subnormal < 0.05 < 0.5 < measured[1e-6]["mlp.up_proj"].subnormal
    for other in ("input_layernorm", "self_attn.q_proj", "mlp.gate_proj"):
        assert measured[1.0][other] == measured[3e4][other]


def test_a_range_keeps_what_is_not_finite() -> None:
    log = RangeLog()
    for values in ([1.0, -3.0], [np.nan, 2.0], [np.inf, 1e-5]):
        log.add("mlp", 0, np.array(values, np.float16))
    log.add("mlp", 1, np.array([0.0, -1e-5, 2.0**-14, -np.inf], np.float32))
    first, second = log.found()
    assert np.isnan(first.largest) and first.subnormal == pytest.approx(1 / 6)
    assert second.largest == np.inf and second.subnormal == pytest.approx(1 / 4)


# ---------------------------------------------------------------- one layer as an artifact


@pytest.mark.parametrize("name", MADE)
def test_a_slice_is_run_as_an_artifact_is(made: Files, name: str) -> None:
    """The poke probe holds for each layer alone; nothing is left behind."""
    artifact = made(name)
    for index in (0, 1):
        with layer_slice(artifact.folder, artifact.contract, index) as (path, contract):
            cache = RollingCache(OnnxRuntimeBackend(path, contract, threads=1, exact=True))
            asked = questions(contract, LENGTH)[:3]
            results = list(poke_probe(cache, asked, tokens=TOKENS))
            assert results and all(result.passed for result in results)
        assert not path.parent.exists()


@pytest.mark.parametrize("index", [0, 1])
def test_a_slice_is_embedding_layer_and_head(made: Files, index: int) -> None:
    artifact = made("fp32")
    scenario = plans(artifact.contract)[1]
    recording = recorded(artifact.contract, scenario)
    with opened(artifact) as layers:
        hidden = layers.run(index, recording, layers.embed(recording)).hidden
        expected = np.concatenate([logits[0] for logits in layers.logits(recording, hidden)])
    with layer_slice(artifact.folder, artifact.contract, index) as (path, contract):
        found = played(RollingCache(OnnxRuntimeBackend(path, contract, threads=1)), scenario)
    np.testing.assert_array_equal(found, expected)


def test_a_slice_that_cannot_be_made_is_said(made: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = made("fp32")

    def slice_of(index: int) -> AbstractContextManager[tuple[Path, GraphContract]]:
        return layer_slice(artifact.folder, artifact.contract, index)

    for index in (-1, 2):
        with pytest.raises(ValidationError, match=f"from 0 to 1, found {index}"), slice_of(index):
            pass

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(ValidationError, match="No space left on device; set TMPDIR"), slice_of(1):
        pass


# ---------------------------------------------------------------- what a recording is


def test_a_recording_has_nothing_to_give_back(made: Files) -> None:
    recording = Recording(made("fp32").contract)
    cache = RollingCache(recording)
    first, second = cache.acquire_rows(2)
    cache.append(first, TOKENS[:3])
    refused: Sequence[Callable[[], object]] = (
        lambda: cache.snapshot(first),
        lambda: cache.copy(first, second),
        lambda: recording.write_row(0, ()),
    )
    for ask in refused:
        with pytest.raises(ValidationError, match="a recording computes nothing, so it has no rings"):
            ask()
    assert len(recording.events) == 1 and recording.rows == 1


def test_a_recording_keeps_what_was_asked_though_the_caller_reuses_his_arrays(made: Files) -> None:
    recording = Recording(made("fp32").contract)
    drive(recording)
    ids = [step.input_ids for step in recording.steps if step.input_ids.shape == (2, 1)]
    assert [int(i[1, 0]) for i in ids[:6]] == list(TOKENS[6:12])


@pytest.mark.parametrize("kind", range(4))
def test_gathering_the_tokens_gives_the_sequence(made: Files, kind: int) -> None:
    """Of what pads a chunk nothing is left."""
    contract = made("fp32").contract
    recording = recorded(contract, plans(contract)[kind])
    ids = [step.input_ids for step in recording.steps]
    assert tuple(gather(recording, ids, LENGTH)) == TOKENS
    with pytest.raises(ValidationError, match="position [0-9]+ was not fed"):
        gather(recording, ids, 61)
