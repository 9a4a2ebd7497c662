"""Weights outside the plan: each one becomes a placeholder of its name, and proof that a miss is noticed."""

import errno
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from mistral_trt.contract import QUANTIZED
from mistral_trt.engines.build import build_engine
from mistral_trt.engines.build_log import BuilderLog
from mistral_trt.engines.builder.callbacks import make_logger
from mistral_trt.engines.flavor import AUTO, RTX
from mistral_trt.engines.gpu import find_gpu
from mistral_trt.engines.network import placeholders as placeholders_module
from mistral_trt.engines.network.parse import ParsedNetwork, parse_network
from mistral_trt.engines.network.placeholders import (
    bring_file,
    check_external_plan,
    placeholder_name,
    refit_weights,
    replace_by_placeholders,
    set_external,
)
from mistral_trt.engines.network.quantized import Wiring, read_quantization
from mistral_trt.engines.planning import settle as settle_module
from mistral_trt.engines.planning.build_memory import BUILD_MEMORY, BuildMemory
from mistral_trt.engines.planning.settle import look_at_host, predict_budget, settle_weights
from mistral_trt.engines.planning.wish import Wish
from mistral_trt.engines.targets import TargetSet
from mistral_trt.errors import ArtifactError, BuildError, ManifestError
from mistral_trt.export.onnx_folder import export_checkpoint
from mistral_trt.manifest import manifest_sha256, read_manifest
from mistral_trt.weight_index import EMBEDDED, RefitWeight, read_weight_index
from tests.graphs import weights_of
from tests.models import write_checkpoint, write_tokenizer

trt = pytest.importorskip("tensorrt_rtx")

pytestmark = pytest.mark.usefixtures("one_trace")

Folder = Callable[..., Path]
SIZES: dict[str, Any] = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 192, "vocab_size": 259}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """folders(precision, tied=False) → the ONNX folder of one layer that TensorRT and ModelOpt both take."""
    root = tmp_path_factory.mktemp("external")

    def folder(precision: str, tied: bool = False) -> Path:
        checkpoint, out = root / f"checkpoint-{tied}", root / f"{precision}-{tied}"
        if not checkpoint.exists():
            write_checkpoint(checkpoint, num_hidden_layers=1, tie_word_embeddings=tied, **SIZES)
            write_tokenizer(checkpoint)
        if not out.exists():
            export_checkpoint(checkpoint, out, precision=precision, prefill_chunk=4, max_batch_size=2)
        return out

    return folder


@pytest.fixture(scope="module")
def fp16(folders: Folder) -> Path:
    return folders("fp16")


def parse(folder: Path) -> ParsedNetwork:
    source, log = read_manifest(folder, "onnx"), BuilderLog()
    quantization = read_quantization(source)
    logger = make_logger(trt, log)
    return parse_network(trt, folder / "model.onnx", source.contract, logger, log, quantization=quantization)


def constants(network: Any) -> dict[str, Any]:
    return {layer.name: layer for layer in Wiring.of(network).of_type("CONSTANT")}


def uses(folder: Path, names: Sequence[str]) -> dict[str, int]:
    """How often the nodes of the graph read each initializer."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    read = [name for node in graph.node for name in node.input]
    return {name: read.count(name) for name in names}


# --- what the graph says of its weights -----------------------------------------------------------------


def test_every_weight_of_the_folder_is_listed_where_it_lies(fp16: Path) -> None:
    weights, source = refit_weights(fp16 / "model.onnx"), read_manifest(fp16)
    assert [weight.name for weight in weights] == source.details["weights"]
    assert sum(weight.bytes for weight in weights) == source.details["weights_bytes"]
    found = weights_of(fp16)
    for weight in weights:
        data = (fp16 / weight.file).read_bytes()[weight.offset : weight.offset + weight.bytes]
        assert data == found[weight.name].numpy().tobytes()
        assert (weight.dtype, weight.shape) == ("float16", tuple(found[weight.name].shape))


def place(tensor: TensorProto, **entries: str) -> None:
    for entry in tensor.external_data:
        entry.value = entries.get(entry.key, entry.value)


def forget(tensor: TensorProto, key: str) -> None:
    kept = [(entry.key, entry.value) for entry in tensor.external_data if entry.key != key]
    del tensor.external_data[:]
    for name, value in kept:
        tensor.external_data.add(key=name, value=value)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: place(t, offset="1000000000"), ManifestError, "expected bytes 1000000000 to .*export"),
        (lambda t: place(t, offset="-4096"), ManifestError, "none below 0"),
        (lambda t: place(t, length="7"), ManifestError, "expected 66304 bytes for float16 .*found 7"),
        (lambda t: place(t, length="many"), ManifestError, "expected location, offset and length"),
        (lambda t: forget(t, "length"), ManifestError, "expected location, offset and length"),
        (lambda t: place(t, location="../x"), ManifestError, "'../x' is not a plain file name"),
        (lambda t: place(t, location="gone"), ManifestError, "in gone, which is missing"),
        (lambda t: place(t, location="model.plan"), ManifestError, "model.plan holds weights, and an engine"),
        (lambda t: setattr(t, "data_type", TensorProto.DOUBLE), BuildError, "a weight of dtype DOUBLE"),
    ],
)
def test_a_weight_that_is_not_where_it_says_is_refused(
    fp16: Path,
    tmp_path: Path,
    change: Callable[[TensorProto], object],
    error: type[Exception],
    words: str,
) -> None:
    (tmp_path / "model.onnx.data").symlink_to(fp16 / "model.onnx.data")
    (tmp_path / "model.plan").symlink_to(fp16 / "model.onnx.data")
    model = onnx.load(fp16 / "model.onnx", load_external_data=False)
    change(model.graph.initializer[0])
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(error, match=words):
        refit_weights(tmp_path / "model.onnx")


# --- placeholders ---------------------------------------------------------------------------------------


def check_replaced(folder: Path) -> None:
    """Each external initializer is a placeholder for all its uses, and nothing else is refittable."""
    parsed, weights = parse(folder), refit_weights(folder / "model.onnx")
    network, before = parsed.network, parsed.network.num_layers
    assert sorted(weight.name for weight in weights) == sorted(read_manifest(folder).details["weights"])
    replace_by_placeholders(trt, network, weights)
    assert network.num_layers == before + len(weights)
    wiring, found, expected = Wiring.of(network), constants(network), uses(folder, [w.name for w in weights])
    for weight in weights:
        layer = found[placeholder_name(weight)]
        assert layer.get_output(0).dtype == found[weight.name].get_output(0).dtype
        assert tuple(layer.get_output(0).shape) == weight.shape
        assert len(wiring.readers[layer.get_output(0).name]) == expected[weight.name]
        assert not wiring.readers[found[weight.name].get_output(0).name]
        assert network.are_weights_marked_refittable(weight.name)
    others = set(found) - {weight.name for weight in weights}
    assert not any(network.are_weights_marked_refittable(name) for name in others)


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_every_weight_becomes_a_placeholder(folders: Folder, precision: str) -> None:
    check_replaced(folders(precision))


@pytest.mark.slow
def test_tied_embeddings_are_one_placeholder_with_two_readers(folders: Folder) -> None:
    folder = folders("fp16", tied=True)
    assert uses(folder, ["model.embed_tokens.weight"]) == {"model.embed_tokens.weight": 2}
    check_replaced(folder)


@pytest.mark.slow
@pytest.mark.parametrize("precision", QUANTIZED)
def test_codes_and_scales_become_placeholders(folders: Folder, precision: str) -> None:
    folder = folders(precision)
    names = [weight.name for weight in refit_weights(folder / "model.onnx")]
    assert sum(name.endswith(".weight_scale") for name in names) == 7
    assert sum(name.endswith(".input_scale") for name in names) == (7 if precision in ("int8", "fp8") else 0)
    check_replaced(folder)


@pytest.mark.parametrize("index", [0, 5])
def test_a_weight_that_is_left_in_the_plan_is_noticed(
    fp16: Path, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    weights, whole = refit_weights(fp16 / "model.onnx"), placeholders_module._replace

    def skip(trt: Any, network: Any, wiring: Wiring, weight: RefitWeight, old: Any) -> None:
        if weight != weights[index]:
            whole(trt, network, wiring, weight, old)

    monkeypatch.setattr(placeholders_module, "_replace", skip)
    with pytest.raises(BuildError, match=f"{weights[index].name} is not refittable; build with"):
        replace_by_placeholders(trt, parse(fp16).network, weights)


def test_a_reader_that_is_left_behind_is_noticed(folders: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, whole = folders("fp16", tied=True), placeholders_module._replace

    def lose(trt: Any, network: Any, wiring: Wiring, weight: RefitWeight, old: Any) -> None:
        wiring.readers[old.get_output(0).name][1:] = []
        whole(trt, network, wiring, weight, old)

    monkeypatch.setattr(placeholders_module, "_replace", lose)
    with pytest.raises(BuildError, match="model.embed_tokens.weight is still read as a constant"):
        replace_by_placeholders(trt, parse(folder).network, refit_weights(folder / "model.onnx"))


def test_a_placeholder_that_nothing_reads_is_noticed(fp16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the importer had made a second constant of a weight, under another name."""
    network, weights = parse(fp16).network, refit_weights(fp16 / "model.onnx")
    norm = constants(network)["model.norm.weight"]
    copy = network.add_constant((128,), trt.Weights(trt.float16, 0, 128))
    for reader, index in Wiring.of(network).readers[norm.get_output(0).name]:
        reader.set_input(index, copy.get_output(0))
    with pytest.raises(BuildError, match=r"expected all 12 weights .* model.norm.weight is not read; build"):
        replace_by_placeholders(trt, network, weights)


def test_a_weight_that_the_network_does_not_hold_is_refused(fp16: Path) -> None:
    network = parse(fp16).network
    constants(network)["model.norm.weight"].name = "another"
    with pytest.raises(BuildError, match=r"norm.weight: expected a constant .*'HALF', \(128,.*, found none"):
        replace_by_placeholders(trt, network, refit_weights(fp16 / "model.onnx"))


def test_tensorrt_keeps_the_names_of_constants_distinct(fp16: Path) -> None:
    network = parse(fp16).network
    network.add_constant((128,), trt.Weights(trt.float16, 0, 128)).name = "model.norm.weight"
    names = [layer.name for layer in Wiring.of(network).of_type("CONSTANT")]
    assert len(names) == len(set(names))
    norm = constants(network)["model.norm.weight"]
    assert Wiring.of(network).readers[norm.get_output(0).name]


def test_a_weight_that_the_importer_changed_is_refused(fp16: Path) -> None:
    weights = refit_weights(fp16 / "model.onnx")
    wider = [replace(weight, dtype="float32", bytes=2 * weight.bytes) for weight in weights]
    with pytest.raises(BuildError, match=r"embed_tokens.weight: .*'FLOAT', .* found \('HALF', "):
        replace_by_placeholders(trt, parse(fp16).network, wider)
    turned = [replace(weight, shape=weight.shape[::-1]) for weight in weights]
    with pytest.raises(BuildError, match=r"\(128, 259\)\) in the network, found .*\(259, 128\)"):
        replace_by_placeholders(trt, parse(fp16).network, turned)


def test_a_name_that_tensorrt_refuses_is_an_error(fp16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = parse(fp16)
    monkeypatch.setattr(type(parsed.network), "mark_weights_refittable", lambda network, name: False)
    with pytest.raises(BuildError, match="embed_tokens.weight: TensorRT does not let it be refitted"):
        replace_by_placeholders(trt, parsed.network, refit_weights(fp16 / "model.onnx"))


def test_the_flags_leave_out_what_is_marked_and_nothing_else(fp16: Path) -> None:
    config = parse(fp16).builder.create_builder_config()
    set_external(trt, config)
    flags = trt.BuilderFlag
    assert config.get_flag(flags.STRIP_PLAN) and config.get_flag(flags.REFIT_INDIVIDUAL)
    assert not config.get_flag(flags.REFIT) and not config.get_flag(flags.REFIT_IDENTICAL)


def network_of(folder: Path) -> list[object]:
    """Every layer of a network without weights, with what it reads, makes and is."""
    parsed = parse(folder)
    replace_by_placeholders(trt, parsed.network, refit_weights(folder / "model.onnx"))
    found: list[object] = []
    for layer in Wiring.of(parsed.network).layers:
        ends = [layer.get_input(i) for i in range(layer.num_inputs)]
        ends += [layer.get_output(i) for i in range(layer.num_outputs)]
        tensors = [(t.name, t.dtype.name, tuple(t.shape)) for t in ends if t is not None]
        found.append((layer.type.name, layer.name, tensors))
    return found


def test_two_fine_tunes_have_one_network(fp16: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "checkpoint", seed=1, num_hidden_layers=1, **SIZES)
    export_checkpoint(other, tmp_path / "onnx", precision="fp16", prefill_chunk=4, max_batch_size=2)
    assert network_of(tmp_path / "onnx") == network_of(fp16)


# --- the folder -----------------------------------------------------------------------------------------


def test_a_plan_that_kept_weights_is_refused() -> None:
    check_external_plan(18_000_000, 2)
    with pytest.raises(BuildError, match=r"at most 18.0 MB for 2 layers, found 18.1 MB: TensorRT kept"):
        check_external_plan(18_100_000, 2)


def test_weights_go_outside_by_themselves_where_the_build_does_not_fit(
    fp16: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mistral_trt")
    monkeypatch.setitem(BUILD_MEMORY, ("fp16", EMBEDDED), BuildMemory(2_000_000_000))
    budget = predict_budget(read_manifest(fp16))
    most = max(replace(budget, weights=kind).build_memory_bytes for kind in ("embedded", "external"))

    def settled(wanted: str) -> str:
        wish = Wish(TargetSet((find_gpu("a10g"),)), AUTO, RTX, wanted, budget)
        return settle_weights(wish, look_at_host(fp16, tmp_path), tmp_path).weights

    monkeypatch.setattr(settle_module, "available_memory_bytes", lambda: most)
    assert [settled(kind) for kind in ("auto", "embedded", "external")] == [
        "embedded",
        "embedded",
        "external",
    ]
    assert not caplog.records
    monkeypatch.setattr(settle_module, "available_memory_bytes", lambda: most - 1)
    assert settled("auto") == "external"
    assert re.search(r"the weights stay outside the plan: predicted: .* is available$", caplog.text, re.M)
    with pytest.raises(BuildError, match=r"the build needs .*; use --weights external, which needs"):
        settled("embedded")
    with pytest.raises(BuildError, match="weights must be one of auto, embedded, external, found 'inside'"):
        settled("inside")


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_linked_or_copied_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, links: bool
) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 1000)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "another disk")

    if not links:
        monkeypatch.setattr("os.link", refuse)
    assert bring_file(tmp_path / "a", tmp_path / "b") == links
    assert (tmp_path / "a").samefile(tmp_path / "b") == links
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert ("cannot be hard-linked" in caplog.text) != links


def test_a_copy_needs_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(1000))
    monkeypatch.setattr(placeholders_module, "link_file", lambda source, target: False)
    monkeypatch.setattr("mistral_trt.artifact.free_disk_bytes", lambda out: 999)
    with pytest.raises(ArtifactError, match="GB of disk"):
        bring_file(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def check_engine(engine: Path, onnx_dir: Path) -> None:
    """The folder is whole, holds the weights by other names of their files, and a plan without them."""
    manifest, source = read_manifest(engine, "engine"), read_manifest(onnx_dir, "onnx")
    assert manifest.details["weights"] == "external"
    assert manifest.files["model.plan"].bytes == manifest.details["plan_bytes"]
    assert manifest.sources["onnx"] == manifest_sha256(onnx_dir)
    assert read_weight_index(engine) == refit_weights(onnx_dir / "model.onnx")
    assert (engine / "model.onnx.data").samefile(onnx_dir / "model.onnx.data")
    assert manifest.files["model.onnx.data"] == source.files["model.onnx.data"]
    plan = (engine / "model.plan").read_bytes()
    for weight in read_weight_index(engine):
        assert weight.name.encode() in plan
        if len(weight.shape) == 1 and weight.count > 1:
            data = (engine / weight.file).read_bytes()[weight.offset : weight.offset + weight.bytes]
            assert data not in plan or len(set(data)) < 3  # a norm of ones looks like nothing else


TARGETS = [("a10g", "fp16"), ("l4", "bf16"), ("a10g", "int8"), ("a10g", "int4"), ("l4", "fp8")]


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "precision"), [*TARGETS, ("a10g", "int8-weight-only")])
def test_a_real_plan_without_weights(folders: Folder, tmp_path: Path, gpu: str, precision: str) -> None:
    onnx_dir = folders(precision)
    manifest = build_engine(onnx_dir, gpu, tmp_path / "engine", weights="external")
    check_engine(tmp_path / "engine", onnx_dir)
    assert manifest.details["compiled"]["attention_kernels"] == {"decode": 1, "prefill": 1}
    assert manifest.details["compiled"]["ring_copies"] == {"decode": 0, "prefill": 0}
