"""Quantized exports from checkpoint to logits: calibrated ones, and checkpoints that are stored quantized."""

import importlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MistralForCausalLM

from mistral_trt.cli import main
from mistral_trt.contract import QUANTIZED, GraphContract
from mistral_trt.errors import CalibrationError, CheckpointError, ConfigError, MissingDependencyError
from mistral_trt.export.checkpoint import EMBEDDING, Checkpoint
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.export.quantization import scheme as scheme_module
from mistral_trt.export.quantization.codes import weight_codes
from mistral_trt.export.quantization.quality import FakeQuantLinear, dequantized, rounded_input
from mistral_trt.export.quantization.scales import LinearScales
from mistral_trt.export.quantization.scheme import LM_HEAD_MODULE, linear_names, scheme_for
from mistral_trt.export.quantization.settings import Budget, QuantizationSettings
from mistral_trt.export.quantization.store import CalibrationStore
from mistral_trt.manifest import Manifest, read_manifest
from mistral_trt.runtime.cache import RollingCache
from mistral_trt.runtime.engine import Engine, open_cache
from mistral_trt.validate.scenarios.scenario import Name, play, scenarios
from tests import test_stored_codes as stored
from tests.checkpoints import SINGLE, altered
from tests.conftest import Folder
from tests.graphs import files_of, initializers_of, numbers_of
from tests.models import write_tokenizer
from tests.test_lora import merge_by_peft, train

pytest.importorskip("modelopt.torch.quantization")  # quietly: importing it warns of torch's plans

pytestmark = pytest.mark.usefixtures("one_trace")

VOCAB, W, C = 259, 8, 4
LENGTH = 40  # R = 12: the ring wraps three times
SETTINGS = QuantizationSettings(samples=4, tokens=32)
LAYER = "model.layers.0."
KEPT = ("*.0.self_attn.v_proj", "*.up_proj", "*.1.*.o_proj")

FREE_RUNNING = {"int8": 0.06, "int8-weight-only": 0.05, "int4": 0.05, "fp8": 0.15}
"""Relative RMS of the logits to the fake-quantized model's: what float16 rounds otherwise moves an activation
to another code, and ONNX Runtime takes the inputs of int4 and int8-weight-only linears in INT8."""

EXACT = 5e-3
"""The same with exact kernels, where no activation is quantized: float16."""

TEACHER_FORCED = {"int8": 5e-3, "int8-weight-only": 1e-3, "int4": 1e-3, "fp8": 5e-3}
"""Relative RMS of one linear's output, given its own input."""


@dataclass(frozen=True)
class Exported:
    """A quantized ONNX folder, and what it was made from.

    scales: what its calibration found.
    """

    folder: Path
    checkpoint: Path
    manifest: Manifest
    scales: Mapping[str, LinearScales]

    @property
    def precision(self) -> str:
        return self.manifest.contract.precision

    @property
    def details(self) -> dict[str, Any]:
        found: dict[str, Any] = self.manifest.details["quantization"]
        return found

    @property
    def quantized(self) -> list[str]:
        return [name.removesuffix(".weight") for name in self.details["quantized"]]


Export: TypeAlias = Callable[..., Exported]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of the tests, empty each time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mistral-trt" / "calibration"


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Folder, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """source(**config) -> a checkpoint with a tokenizer, made once."""
    made: dict[str, Path] = {}

    def checkpoint(**config: object) -> Path:
        key = json.dumps(config, sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("source") / "tiny"
            made[key] = write_tokenizer(shutil.copytree(tiny_checkpoint(vocab_size=VOCAB, **config), folder))
        return made[key]

    return checkpoint


def export(checkpoint: Path, root: Path, precision: str, **options: Any) -> Exported:
    """Export with a cache folder of its own, in which the scales are found."""
    settings = {"quantization": SETTINGS, "prefill_chunk": C, **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        manifest = export_checkpoint(checkpoint, root / "onnx", precision=precision, **settings)
    (store,) = (root / "cache" / "mistral-trt" / "calibration").iterdir()
    head = settings["quantization"].quantize_lm_head
    scales = CalibrationStore(store).load(manifest.config.num_hidden_layers + head)
    assert scales is not None
    return Exported(root / "onnx", checkpoint, manifest, scales)


@pytest.fixture(scope="module")
def exported(source: Folder, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """exported(precision, config={}, **settings) -> made once; settings: of QuantizationSettings."""
    made: dict[str, Exported] = {}

    def folder(precision: str, config: Mapping[str, object] | None = None, **settings: Any) -> Exported:
        key = repr((precision, config, sorted(settings.items())))
        if key not in made:
            wishes = replace(SETTINGS, **settings)
            root = tmp_path_factory.mktemp("quantized")
            made[key] = export(source(**(config or {})), root, precision, quantization=wishes)
        return made[key]

    return folder


@pytest.fixture(params=QUANTIZED)
def artifact(request: pytest.FixtureRequest, exported: Export) -> Exported:
    return exported(request.param)


# ---------------------------------------------------------------- the whole model


def tokens(count: int = LENGTH) -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(0, VOCAB, count)]


def load(checkpoint: Path) -> MistralForCausalLM:
    return MistralForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")


def fake_quantized(artifact: Exported) -> MistralForCausalLM:
    """transformers' own model, each quantized linear rounded to its codes and back."""
    model = load(artifact.checkpoint)
    scheme = scheme_for(artifact.precision, artifact.manifest.config)
    for name in artifact.quantized:
        parent, _, child = name.rpartition(".")
        old: Any = model.get_submodule(name)
        fake = FakeQuantLinear(old.weight.data, artifact.scales[name], scheme)
        setattr(model.get_submodule(parent), child, fake)
    return model


def logits_of(model: MistralForCausalLM) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([tokens()])).logits[0].numpy()
    return logits


def played(cache: RollingCache, name: Name) -> np.ndarray:
    """Logits of every position, fed in the calls of a scenario."""
    (plan,) = scenarios(cache.contract, LENGTH, names=[name], seed=0)
    return np.concatenate([logits for _, logits in play(cache, plan, tokens=tokens())])


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference over that of the expected."""
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


@pytest.mark.parametrize("scenario", ["prefill", "decode", "padded"])
def test_the_logits_are_the_fake_quantized_models(artifact: Exported, scenario: Name) -> None:
    expected, plain = logits_of(fake_quantized(artifact)), logits_of(load(artifact.checkpoint))
    for exact in (False, True):
        found = played(open_cache(artifact.folder, threads=1, exact=exact), scenario)
        assert distance(found, expected) < FREE_RUNNING[artifact.precision]
        assert distance(found, expected) < distance(found, plain), "quantization shows"
    if artifact.precision in ("int8-weight-only", "int4"):
        assert distance(found, expected) < EXACT < 0.5 * distance(found, plain)


def test_the_logits_are_those_of_what_is_kept_and_what_is_not(exported: Export) -> None:
    """Where one of a group is kept, the pre_quant_scale is a Mul; where up_proj is, down_proj's too."""
    artifact = exported("int4", keep=KEPT)
    assert artifact.details["pre_quant_scales"] == {"norm": 1, "up_proj": 0, "mul": 6}
    found = played(open_cache(artifact.folder, threads=1, exact=True), "decode")
    assert distance(found, logits_of(fake_quantized(artifact))) < EXACT
    assert distance(found, logits_of(fake_quantized(exported("int4")))) > 10 * EXACT, "what is kept shows"


# ---------------------------------------------------------------- one linear at a time


def linear_values(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """What each linear reads, before it is cast or multiplied, and gives: the first chunk of a sequence."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    nodes = {node.name: node for node in model.graph.node}
    producers = {output: node for node in model.graph.node for output in node.output}
    ends = {}
    for name, node in nodes.items():
        if node.op_type != "MatMul":
            continue
        linear, value = name.removesuffix("/MatMul"), node.input[0]
        while (maker := producers[value]).name.startswith(
            tuple(f"{other}.input/" for other in siblings(linear))
        ):
            value = maker.input[0]
        out = f"{linear}.output/Cast" if f"{linear}.output/Cast" in nodes else node.output[0]
        ends[linear] = value, out
    made = {value.name for value in model.graph.output}
    for value in dict.fromkeys(value for pair in ends.values() for value in pair if value not in made):
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(value))
    path = folder / "with-outputs.onnx"
    path.write_bytes(model.SerializeToString())
    found = run_chunk(path, read_manifest(folder, check_files=False).contract)
    return {name: (found[reads], found[gives]) for name, (reads, gives) in ends.items()}


def siblings(linear: str) -> list[str]:
    """The linears that read the same."""
    stem, _, kind = linear.rpartition(".")
    groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    return (
        [f"{stem}.{other}" for other in next((g for g in groups if kind in g), (kind,))] if stem else [linear]
    )


def run_chunk(path: Path, contract: GraphContract) -> dict[str, Tensor]:
    """Every output of a graph for the first chunk of a sequence, by name, float32.

    By the quantized kernels, which take their input as it is; left alone MatMulNBits takes it in INT8.
    """
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    places = np.arange(C)[None]
    feeds = {"input_ids": np.array([tokens(C)]), "position_ids": places, "logits_index": places}
    for spec in contract.past():
        feeds[spec.name] = np.zeros((1, *(int(size) for size in spec.shape[1:])), spec.dtype)
    names = [value.name for value in session.get_outputs()]
    return {
        name: torch.from_numpy(np.asarray(value)).float()
        for name, value in zip(names, session.run(names, feeds), strict=True)
    }


def expected_output(artifact: Exported, name: str, value: Tensor, made: Collection[str]) -> Tensor:
    """A quantized linear's output, from the checkpoint's weight and the calibration's scales.

    made: the graph's initializers, which say where a pre_quant_scale is a Mul.
    """
    scheme, scales = scheme_for(artifact.precision, artifact.manifest.config), artifact.scales[name]
    weight = load_file(artifact.checkpoint / SINGLE)[f"{name}.weight"]
    first = next(other for other in siblings(name) if other in artifact.quantized)
    if f"{first}.pre_quant_scale" in made:
        assert scales.pre_quant_scale is not None
        value = value * scales.pre_quant_scale
    if scheme.activations is not None:
        value = rounded_input(value, scales, scheme)
    out = nn.functional.linear(value, dequantized(weight.float(), scales, scheme))
    down = name.replace("up_proj", "down_proj")
    folded = artifact.scales[down].pre_quant_scale
    return out if down == name or folded is None or f"{down}.pre_quant_scale" in made else out * folded


def errors_of(artifact: Exported) -> dict[str, float]:
    """Relative RMS error of each quantized linear's output, given what it read."""
    values = linear_values(artifact.folder)
    made = set(initializers_of(artifact.folder))
    return {
        name: distance(
            values[name][1].numpy(), expected_output(artifact, name, values[name][0], made).numpy()
        )
        for name in artifact.quantized
    }


def in_copy(artifact: Exported, tmp_path: Path) -> Exported:
    """The same, in a folder that may be altered."""
    return replace(artifact, folder=Path(shutil.copytree(artifact.folder, tmp_path / "copy")))


@pytest.fixture
def copied(artifact: Exported, tmp_path: Path) -> Exported:
    return in_copy(artifact, tmp_path)


@pytest.mark.parametrize("keep", [(), KEPT], ids=["all", "some kept"])
@pytest.mark.parametrize("precision", QUANTIZED)
def test_each_linear_gives_what_its_codes_and_scales_say(
    exported: Export, tmp_path: Path, precision: str, keep: tuple[str, ...]
) -> None:
    found = errors_of(in_copy(exported(precision, keep=keep), tmp_path))
    assert len(found) == 14 - (4 if keep else 0)
    assert max(found.values()) < TEACHER_FORCED[precision]


def change(folder: Path, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    """Alter the bytes of one initializer; edit: flat array of its dtype, INT4 as bytes."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    (tensor,) = [tensor for tensor in graph.initializer if tensor.name == name]
    place = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(place["offset"]), int(place["length"])
    dtypes = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16}
    data = bytearray((folder / place["location"]).read_bytes())
    old = np.frombuffer(bytes(data[offset : offset + length]), dtypes.get(tensor.data_type, np.uint8))
    data[offset : offset + length] = edit(old).astype(old.dtype).tobytes()
    (folder / place["location"]).write_bytes(data)


def transposed(data: np.ndarray) -> np.ndarray:
    """The bytes of a [64, 64] weight's codes, one a byte or two, turned."""
    if len(data) == 64 * 64:
        return data.reshape(64, 64).T.reshape(-1)
    codes = np.stack([data & 15, data >> 4], 1).reshape(64, 64).T.reshape(-1)
    packed: np.ndarray = codes[0::2] | (codes[1::2] << 4)
    return packed


@pytest.mark.parametrize("kind", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_a_scale_that_is_off_by_5_percent_is_seen(copied: Exported, kind: str) -> None:
    name = f"model.layers.1.{kind}"
    change(copied.folder, f"{name}.weight_scale", lambda scale: scale * 1.05)
    found = errors_of(copied)
    assert {other for other, error in found.items() if error > TEACHER_FORCED[copied.precision]} == {name}
    assert found[name] == pytest.approx(0.05, rel=0.2)


@pytest.mark.parametrize("kind", ["self_attn.q_proj", "self_attn.o_proj"])
def test_codes_that_are_transposed_are_seen(copied: Exported, kind: str) -> None:
    expected = logits_of(fake_quantized(copied))
    change(copied.folder, f"{LAYER}{kind}.weight", transposed)
    assert errors_of(copied)[f"{LAYER}{kind}"] > 0.5
    found = played(open_cache(copied.folder, threads=1, trust_weights=True), "prefill")
    assert distance(found, expected) > FREE_RUNNING[copied.precision]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_an_input_scale_that_is_off_is_seen(exported: Export, tmp_path: Path, precision: str) -> None:
    artifact = in_copy(exported(precision), tmp_path)
    name = f"{LAYER}mlp.down_proj"
    change(artifact.folder, f"{name}.input_scale", lambda scale: scale * 1.05)
    assert errors_of(artifact)[name] > TEACHER_FORCED[precision]


def test_norms_hold_the_scales_of_their_groups(artifact: Exported) -> None:
    found, weights = numbers_of(artifact.folder), load_file(artifact.checkpoint / SINGLE)
    for i in range(2):
        layer = f"model.layers.{i}."
        for norm, first in (
            ("input_layernorm", "self_attn.q_proj"),
            ("post_attention_layernorm", "mlp.up_proj"),
        ):
            scale = artifact.scales[layer + first].pre_quant_scale
            name = f"{layer}{norm}.weight"
            expected = weights[name] if scale is None else weights[name] * scale
            assert np.array_equal(found[name], expected.half().float().numpy())


def test_codes_in_the_file_are_those_of_the_checkpoints_weights(artifact: Exported) -> None:
    found, weights = numbers_of(artifact.folder), load_file(artifact.checkpoint / SINGLE)
    scheme = scheme_for(artifact.precision, artifact.manifest.config)
    for name in artifact.quantized:
        codes = weight_codes(weights[f"{name}.weight"], artifact.scales[name], scheme)
        assert np.array_equal(found[f"{name}.weight"], codes.float().numpy().T)


# ---------------------------------------------------------------- the folder


def test_the_same_inputs_give_the_same_bytes(artifact: Exported, tmp_path: Path) -> None:
    """Calibrated anew, not taken from a store."""
    again = export(artifact.checkpoint, tmp_path, artifact.precision)
    assert files_of(again.folder) == files_of(artifact.folder)


def test_onnx_checks_the_folder(artifact: Exported, tmp_path: Path) -> None:
    """Nothing is linked here: the checker refuses a file that has two names."""
    assert artifact.manifest.details["linked"] == []
    onnx.checker.check_model(str(artifact.folder / "model.onnx"), full_check=True)


def test_the_manifest_tells_what_was_quantized(artifact: Exported) -> None:
    details, names = artifact.details, linear_names(artifact.manifest.config)
    assert details["scheme"]["precision"] == artifact.precision == artifact.manifest.contract.precision
    assert details["scheme"]["block_size"] == (32 if artifact.precision == "int4" else None)
    assert artifact.quantized == names and details["kept"] == []
    assert details["quantized_share"] == 1.0 and details["frontier"] == []
    smooth = artifact.precision != "fp8"
    assert details["pre_quant_scales"] == dict.fromkeys(("norm", "up_proj", "mul"), 0) | (
        {"norm": 4, "up_proj": 2, "mul": 2} if smooth else {}
    )
    assert sorted(entry["name"] for entry in details["sensitivity"]) == sorted(names)
    found = [entry["error"] for entry in details["sensitivity"]]
    assert found == sorted(found, reverse=True) and all(0 < error < 1 for error in found)
    calibration = details["calibration"]
    assert (calibration["samples"], calibration["tokens"], calibration["sliding_window"]) == (4, 32, W)
    assert calibration["source"].startswith("State of the Union")
    assert "imported_from" not in details
    assert {"nvidia-modelopt", "transformers"} <= set(artifact.manifest.versions)
    made = [w for w in artifact.manifest.details["weights"] if "_proj" in w or ("layernorm" in w and smooth)]
    tensors = initializers_of(artifact.folder)
    assert details["quantized_bytes"] == sum(len(tensors[name].raw_data) for name in made)
    assert json.loads(json.dumps(details)) == details


def test_the_artifact_writes_text(artifact: Exported) -> None:
    engine = Engine.load(artifact.folder, threads=1)
    assert len(engine.generate(["abc"])[0].tokens) > 0


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("precision", QUANTIZED)
def test_what_is_kept_is_the_checkpoints_weight_in_float16(exported: Export, precision: str) -> None:
    artifact = exported(precision, keep=KEPT)
    kept = [name.removesuffix(".weight") for name in artifact.details["kept"]]
    assert kept == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert sorted(kept + artifact.quantized) == sorted(linear_names(artifact.manifest.config))
    found, weights = initializers_of(artifact.folder), load_file(artifact.checkpoint / SINGLE)
    for name in (*kept, LM_HEAD_MODULE, "model.embed_tokens"):
        array = numpy_helper.to_array(found[f"{name}.weight"])
        assert np.array_equal(array, weights[f"{name}.weight"].half().numpy())
        assert f"{name}.weight_scale" not in found
    sizes = {name: weights[f"{name}.weight"].numel() for name in (*kept, *artifact.quantized)}
    expected = sum(sizes[name] for name in artifact.quantized) / sum(sizes.values())
    assert artifact.details["quantized_share"] == pytest.approx(expected, abs=1e-4)
    assert [entry["name"] for entry in artifact.details["sensitivity"] if entry["kept"]] == [
        entry["name"] for entry in artifact.details["sensitivity"] if entry["name"] in kept
    ]


def test_a_budget_keeps_what_is_needed_and_shows_the_frontier(exported: Export) -> None:
    free = exported("int4")
    artifact = exported("int4", quality=Budget("kl", 0.02), keep=("*.1.*.k_proj",))
    frontier = artifact.details["frontier"]
    kept = [name.removesuffix(".weight") for name in artifact.details["kept"]]
    assert "model.layers.1.self_attn.k_proj" in kept and 1 < len(kept) < 14
    assert [point["kl"] <= 0.02 for point in frontier if point["kept"] == len(kept)] == [True]
    assert all(point["kl"] > 0.02 for point in frontier if point["kept"] < len(kept))
    plain = logits_of(load(artifact.checkpoint))
    assert distance(logits_of(fake_quantized(artifact)), plain) < distance(
        logits_of(fake_quantized(free)), plain
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_head_is_quantized_on_request(exported: Export, precision: str, tied: bool) -> None:
    config = {"num_hidden_layers": 1, "tie_word_embeddings": True} if tied else {}
    artifact = exported(precision, config, quantize_lm_head=True)
    assert artifact.quantized[-1] == LM_HEAD_MODULE
    assert artifact.details["pre_quant_scales"]["norm"] == (3 if tied else 5)
    found, weights = numbers_of(artifact.folder), load_file(artifact.checkpoint / SINGLE)
    head = weights[EMBEDDING if tied else "lm_head.weight"]
    codes = weight_codes(
        head, artifact.scales[LM_HEAD_MODULE], scheme_for(precision, artifact.manifest.config)
    )
    assert np.array_equal(found["lm_head.weight"], codes.float().numpy().T)
    assert np.array_equal(found[EMBEDDING], weights[EMBEDDING].half().float().numpy())
    logits = played(open_cache(artifact.folder, threads=1), "decode")
    assert distance(logits, logits_of(fake_quantized(artifact))) < FREE_RUNNING[precision]


# ---------------------------------------------------------------- other checkpoints


@pytest.fixture
def unsmoothed(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8-weight-only without AWQ, so that a code is its weight alone."""
    plain = replace(scheme_module._SCHEMES["int8-weight-only"], awq=False)
    monkeypatch.setitem(scheme_module._SCHEMES, "int8-weight-only", plain)


@pytest.mark.usefixtures("unsmoothed")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_codes_are_those_of_the_numbers_that_are_stored(source: Folder, tmp_path: Path, dtype: str) -> None:
    """Per-channel INT8, by hand: w * 127 / amax, rounded."""
    checkpoint = source(dtype=dtype)
    artifact = export(checkpoint, tmp_path, "int8-weight-only")
    found = numbers_of(artifact.folder)
    for name, weight in load_file(checkpoint / SINGLE).items():
        numbers = weight.float().numpy()
        if "_proj" not in name:
            assert np.array_equal(found[name], weight.half().float().numpy())
            continue
        amax = np.abs(numbers).max(1, keepdims=True)
        assert np.abs(found[name].T - numbers * (127 / amax)).max() < 0.50001
        scale = (amax[:, 0] / np.float32(127)).astype(np.float16)
        assert np.array_equal(found[f"{name}_scale"], scale.astype(np.float32))


def test_what_is_kept_may_be_used_as_it_lies(source: Folder, tmp_path: Path) -> None:
    """Codes are written beside a checkpoint's own file, in which a kept weight is float16 already."""
    checkpoint = source(dtype="float16")
    settings = replace(SETTINGS, keep=("*.1.*", "*.0.self_attn.*"))
    artifact = export(checkpoint, tmp_path, "int4", quantization=settings)
    assert artifact.manifest.details["linked"] == [SINGLE]
    assert (artifact.folder / SINGLE).samefile(checkpoint / SINGLE)
    logits = played(open_cache(artifact.folder, threads=1, exact=True), "decode")
    assert distance(logits, logits_of(fake_quantized(artifact))) < EXACT
    written = (artifact.folder / "model.onnx.data").stat().st_size
    assert written < 2 * artifact.details["quantized_bytes"] + 4096 * 10, "the codes, on pages"


@pytest.mark.usefixtures("unsmoothed")
def test_an_adapter_is_merged_before_it_is_quantized(source: Folder, tmp_path: Path) -> None:
    checkpoint = source()
    lora = tmp_path / "lora"
    train(load(checkpoint), lora, r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    merged = merge_by_peft(load(checkpoint), [(lora, 0.5)])
    artifact = export(checkpoint, tmp_path / "a", "int8-weight-only", loras=[(lora, 0.5)])
    found, plain = numbers_of(artifact.folder), load_file(checkpoint / SINGLE)
    for name in artifact.details["quantized"]:
        numbers, scale = found[name] * found[f"{name}_scale"], found[f"{name}_scale"]
        # half a step, and what rounding the scale to float16 does to the largest code
        assert (np.abs(numbers.T - merged[name].numpy()) <= 0.57 * scale[:, None]).all()
        touched = name.endswith(("q_proj.weight", "down_proj.weight"))
        assert (np.abs(numbers.T - plain[name].numpy()) <= 0.57 * scale[:, None]).all() != touched
    assert [entry["name"] for entry in artifact.manifest.details["lora"]] == ["lora"]


def test_a_calibration_serves_what_it_is_for_alone(
    source: Folder, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other text, another window, precision, checkpoint or head: each has a store of its own."""
    from mistral_trt.export.quantization import recipe

    made: list[Path] = []
    one = source(num_hidden_layers=1)
    other = altered(one, tmp_path / "other", tensors={"model.norm.weight": torch.full((64,), 0.5)})
    text = tmp_path / "text.txt"
    text.write_text("other words " * 100)

    def remember(stream: Any, ids: Any, scheme: Any, store: CalibrationStore, **rest: Any) -> Any:
        made.append(store.folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "calibrate", remember)
    wishes: list[tuple[Path, dict[str, Any]]] = [
        (one, {}),
        (one, {"precision": "int4"}),
        (one, {"sliding_window": W + 1}),
        (one, {"quantization": replace(SETTINGS, calibration=text)}),
        (one, {"quantization": replace(SETTINGS, tokens=31)}),
        (one, {"quantization": replace(SETTINGS, quantize_lm_head=True)}),
        (other, {}),
        (one, {"quantization": replace(SETTINGS, keep=("*.q_proj",))}),
        (one, {"max_batch_size": 2, "prefill_chunk": 8}),
    ]
    for i, (checkpoint, options) in enumerate(wishes):
        settings = {"precision": "int8", "quantization": SETTINGS, "prefill_chunk": C, **options}
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(checkpoint, tmp_path / str(i), **settings)
    assert len(set(made)) == 7
    assert made[7] == made[8] == made[0], "what is kept, and the ring beside its window, do not matter"


# ---------------------------------------------------------------- refusals


def refused(
    checkpoint: Path,
    tmp_path: Path,
    error: type[Exception],
    words: str,
    precision: str = "int8",
    **options: Any,
) -> None:
    settings = {"quantization": SETTINGS, **options}
    with pytest.raises(error, match=words):
        export_checkpoint(checkpoint, tmp_path / "out", precision=precision, **settings)
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_matches_nothing_is_refused(source: Folder, tmp_path: Path) -> None:
    words = (
        r"--keep 'down_proj' matches no linear; the names are like model.layers.0.self_attn.q_proj and model"
    )
    for keep in (("down_proj",), ("*.up_proj", "down_proj")):
        refused(source(), tmp_path, ConfigError, words, quantization=replace(SETTINGS, keep=keep))
    settings = replace(SETTINGS, keep=("lm_head",))
    refused(source(), tmp_path, ConfigError, "'lm_head' matches no linear", quantization=settings)


@pytest.mark.parametrize("settings", [{"keep": ("*",)}, {"quality": Budget("kl", 0.0)}], ids=str)
def test_an_export_that_quantizes_nothing_is_refused(
    source: Folder, tmp_path: Path, settings: dict[str, Any]
) -> None:
    wishes = replace(SETTINGS, **settings)
    words = "leave nothing to quantize: all 14 linears would stay float16; use --precision fp16"
    refused(source(), tmp_path, ConfigError, words, quantization=wishes)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_settings_without_effect_are_refused(source: Folder, tmp_path: Path, precision: str) -> None:
    words = f"have no effect on {precision}; they are for a float checkpoint with --precision int8, int8-w"
    for settings in (
        SETTINGS,
        QuantizationSettings(quantize_lm_head=True),
        QuantizationSettings(keep=("*",)),
    ):
        refused(source(), tmp_path, ConfigError, words, precision, quantization=settings)


def test_a_checkpoint_without_a_tokenizer_is_refused(tiny_checkpoint: Folder, tmp_path: Path) -> None:
    refused(
        tiny_checkpoint(), tmp_path, CalibrationError, "has no tokenizer, so calibration text cannot be read"
    )


@pytest.mark.parametrize("package", ["modelopt", "transformers", "safetensors"])
def test_without_modelopt_the_extra_is_named(
    source: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    found = importlib.import_module

    def missing(module: str) -> Any:
        if module == package:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return found(module)

    monkeypatch.setattr("mistral_trt.errors.import_module", missing)
    words = rf"needs the package '{package}', .*pip install 'mistral-trt\[quantize\]'"
    refused(source(), tmp_path, MissingDependencyError, words)


# ---------------------------------------------------------------- the command line


def test_the_command_line_passes_every_setting_on(
    source: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def remember(checkpoint: Path, out: Path, **options: Any) -> None:
        asked.append((options["precision"], options["quantization"]))

    monkeypatch.setattr("mistral_trt.export.__main__.export_checkpoint", remember)
    command = ["export", str(source()), "--out", str(tmp_path / "x"), "--precision"]
    flags = ["--calibration", "a.txt", "--calibration-samples", "3", "--calibration-tokens", "17"]
    flags += ["--keep", "*.o_proj", "--keep", "*.0.*", "--quality", "kl=0.5", "--quantize-lm-head"]
    assert main([*command, "fp8", *flags]) == 0
    assert main([*command, "int8"]) == 0
    expected = QuantizationSettings(Path("a.txt"), 3, 17, ("*.o_proj", "*.0.*"), Budget("kl", 0.5), True)
    assert asked == [("fp8", expected), ("int8", QuantizationSettings())]


def test_the_command_line_exports(
    source: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    """stdout is the result's path alone, though ModelOpt prints."""
    out = tmp_path / "out"
    text = tmp_path / "words.txt"
    text.write_text("some words of calibration, " * 20)
    flags = ["--calibration", str(text), "--calibration-samples", "2", "--calibration-tokens", "16"]
    command = ["export", str(source()), "--out", str(out), "--prefill-chunk", "4"]
    assert main([*command, "--precision", "int4", *flags, "--keep", "*.k_proj"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert (
        "calibrating int4: 2 layers" in said.err
        and "calibration: 2 samples of 16 tokens of text:" in said.err
    )
    details = read_manifest(out, "onnx").details["quantization"]
    assert details["calibration"]["source"] == "text: words.txt"
    assert details["kept"] == [f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 1)]
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--precision", "int8", "--quality", "good"], "--quality must be perplexity=RATIO or kl=NATS"),
        (["--precision", "int8", "--keep", "nothing"], "--keep 'nothing' matches no linear"),
        (["--precision", "fp16", "--keep", "*"], "have no effect on fp16"),
        (["--quantize-lm-head"], "have no effect on fp16"),
        (["--precision", "int4", "--calibration", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_the_command_line_refuses_in_one_line(
    source: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(["export", str(source()), "--out", str(tmp_path / "x"), "--quiet", *flags]) == 2
    said = capsys.readouterr()
    assert said.out == "" and words in said.err
    assert said.err.startswith("mistral-trt export: ") and said.err.count("\n") == 1


# ---------------------------------------------------------------- stored quantized


@dataclass(frozen=True)
class Stored:
    """A checkpoint that is stored quantized.

    codes, scales: by linear, [out, in] and [out, groups].  weights: all in floats, what they stand for.
    """

    folder: Path
    precision: str
    method: str
    codes: Mapping[str, np.ndarray]
    scales: Mapping[str, np.ndarray]
    weights: Mapping[str, Tensor]


FORMATS: dict[str, tuple[str, str, Callable[[], stored.Made]]] = {
    "gptq": ("int4", "gptq", lambda: stored.gptq(4, 32)),
    "gptq_v2": ("int4", "gptq", lambda: stored.gptq(4, 32, "gptq_v2")),
    "gptq 8 bits": ("int8-weight-only", "gptq", lambda: stored.gptq(8, None)),
    "awq": ("int4", "awq", lambda: stored.awq(32)),
    "packed": ("int4", "compressed-tensors", lambda: stored.packed(4, 32)),
    "plain": ("int8-weight-only", "compressed-tensors", lambda: stored.plain()),
}
LEFT_FLOAT = ("self_attn.k_proj", "mlp.down_proj")


def made_linear(maker: Callable[[], stored.Made], shape: tuple[int, ...], seed: int) -> stored.Made:
    """One linear of a shape, by the packers of the tests of the formats; scales as of a real weight."""
    numbers = stored.numbers

    def other_numbers(_: int, bits: int, group: int | None) -> tuple[np.ndarray, np.ndarray]:
        codes, scales = numbers(seed, bits, group)
        return codes, (scales * (0.3 / 2 ** (bits - 1))).astype(np.float16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "OUT", shape[0])
        patch.setattr(stored, "IN", shape[1])
        patch.setattr(stored, "numbers", other_numbers)
        return maker()


def write_stored(source: Path, folder: Path, name: str) -> Stored:
    """A checkpoint whose linears are stored in a format, all but LEFT_FLOAT."""
    precision, method, maker = FORMATS[name]
    shutil.copytree(source, folder)
    tensors = load_file(folder / SINGLE)
    weights, codes, scales = dict(tensors), {}, {}
    config: dict[str, Any] = {}
    for seed, weight in enumerate(sorted(tensors)):
        linear = weight.removesuffix(".weight")
        if "_proj" not in linear or linear.endswith(LEFT_FLOAT):
            continue
        made = made_linear(maker, tuple(tensors.pop(weight).shape), seed)
        config = made.config
        parts = [part for part in made.tensors if part.startswith(f"{stored.MODULE}.")]
        tensors |= {part.replace(stored.MODULE, linear): made.tensors[part] for part in parts}
        codes[linear], scales[linear] = made.codes, made.scales
        spread = np.repeat(made.scales, made.codes.shape[1] // made.scales.shape[1], axis=1)
        weights[weight] = torch.from_numpy(made.codes * spread)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"}
    )
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": config}))
    return Stored(folder, precision, method, codes, scales, weights)


@pytest.fixture(params=FORMATS)
def stored_checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Folder, tmp_path: Path) -> Stored:
    return write_stored(tiny_checkpoint(vocab_size=VOCAB), tmp_path / "stored", request.param)


def test_a_stored_checkpoint_is_taken_as_it_is(
    stored_checkpoint: Stored, tiny_checkpoint: Folder, tmp_path: Path
) -> None:
    precision, out = stored_checkpoint.precision, tmp_path / "onnx"
    manifest = export_checkpoint(stored_checkpoint.folder, out, precision=precision, prefill_chunk=C)
    details, found = manifest.details["quantization"], numbers_of(out)
    assert details["imported_from"] == stored_checkpoint.method
    assert [name.removesuffix(".weight") for name in details["quantized"]] == [
        name for name in linear_names(manifest.config) if name in stored_checkpoint.codes
    ]
    assert details["kept"] == [f"model.layers.{i}.{kind}.weight" for i in (0, 1) for kind in LEFT_FLOAT]
    assert details["calibration"] is None and details["sensitivity"] == []
    for name, codes in stored_checkpoint.codes.items():
        assert np.array_equal(found[f"{name}.weight"], codes.T)
        scales = stored_checkpoint.scales[name].T
        assert np.array_equal(
            found[f"{name}.weight_scale"], scales.reshape(found[f"{name}.weight_scale"].shape)
        )
    model = load(tiny_checkpoint(vocab_size=VOCAB))
    model.load_state_dict({name: tensor.float() for name, tensor in stored_checkpoint.weights.items()})
    logits = played(open_cache(out, threads=1, exact=True), "decode")
    assert distance(logits, logits_of(model)) < EXACT
    dict(model.named_parameters())[f"{LAYER}mlp.up_proj.weight"].data *= 1.05
    assert distance(logits, logits_of(model)) > 2 * EXACT, "5 % of one linear show"


def test_a_stored_checkpoint_has_one_precision(stored_checkpoint: Stored, tmp_path: Path) -> None:
    folder, right = stored_checkpoint.folder, stored_checkpoint.precision
    for precision in ("fp16", "fp32", "int8", "int4", "int8-weight-only"):
        if precision != right:
            words = rf"holds {right} weights \({stored_checkpoint.method}\); use --precision {right}, or the"
            refused(folder, tmp_path, ConfigError, words, precision, quantization=QuantizationSettings())


def test_a_stored_checkpoint_takes_no_settings_and_no_adapter(
    source: Folder, tiny_checkpoint: Folder, tmp_path: Path
) -> None:
    made = write_stored(tiny_checkpoint(), tmp_path / "stored", "awq")
    refused(made.folder, tmp_path, ConfigError, "no effect on a checkpoint that is stored quantized", "int4")
    lora = tmp_path / "lora"
    train(load(source()), lora, r=2, target_modules=["q_proj"])
    words = r"is quantized \(awq\), so an adapter cannot be merged into it"
    plain = QuantizationSettings()
    refused(made.folder, tmp_path, CheckpointError, words, "int4", loras=[(lora, 1.0)], quantization=plain)


def test_a_stored_checkpoint_keeps_its_identity(tiny_checkpoint: Folder, tmp_path: Path) -> None:
    """The same numbers in another format are another checkpoint with the same graph and data."""
    source = tiny_checkpoint(vocab_size=VOCAB)
    manifests = []
    for name in ("gptq", "gptq_v2"):
        made = write_stored(source, tmp_path / name, name)
        out = tmp_path / f"{name}-onnx"
        manifests.append(export_checkpoint(made.folder, out, precision="int4", prefill_chunk=C))
        assert Checkpoint.open(made.folder).stored_quantization is not None
    first, second = manifests
    assert first.sources != second.sources
    for file in ("model.onnx", "model.onnx.data"):
        assert first.files[file] == second.files[file]
    assert first.details["graph_sha256"] == second.details["graph_sha256"]
