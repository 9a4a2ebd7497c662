"""The loader of engine folders: every damage is refused in one plain sentence that names a command."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mistral_trt.artifact import MANIFEST_NAME
from mistral_trt.contract import plan_contract
from mistral_trt.devices import Device
from mistral_trt.errors import EngineMismatchError, ManifestError, MistralTrtError
from mistral_trt.manifest import Manifest, content_sha256, describe_files, read_manifest, tool_versions
from mistral_trt.runtime import Engine, SamplingParams, loading
from mistral_trt.runtime import device as device_module
from mistral_trt.runtime import engine_folder as engine_folder_module
from mistral_trt.runtime.device import local_device
from mistral_trt.runtime.engine import open_cache
from mistral_trt.runtime.engine_folder import check_engine_folder, check_machine, read_engine_details
from mistral_trt.weight_index import RefitWeight, write_weight_index
from tests.conftest import Folder
from tests.models import TINY
from tests.simulated import folder as simulated

A10G = Device("NVIDIA A10G", 23028 << 20, "580.65.06", "8.6")
CONTRACT = plan_contract(TINY, precision="fp16", prefill_chunk=4, max_batch_size=4)
REST = 1_000_000
PREDICTED = {
    "weights_bytes": 4096,
    "ring_bytes_per_row": CONTRACT.ring_bytes_per_row,
    "max_batch_size": 4,
    "device_bytes": REST + 4 * CONTRACT.ring_bytes_per_row,
}
DETAILS: dict[str, Any] = {
    "name": "tiny",
    "gpus": ["a10g"],
    "gpu_name": "NVIDIA A10G",
    "compute_capabilities": ["8.6"],
    "flavor": "tensorrt-rtx",
    "tensorrt": "1.7.1.116",
    "weights": "embedded",
    "predicted": PREDICTED,
}
WEIGHTS = [
    RefitWeight("a", "float16", (64, 32), "model.onnx.data", 0, 4096),
    RefitWeight("b", "float16", (2048,), "model.onnx.data", 4096, 4096),
]
COMMAND = re.compile(r"mistral-trt (export|build|generate) |pip install (tensorrt|tensorrt-rtx)==")

Damage = Callable[[Path], None]


def write_engine(folder: Path, *, external: bool = False, **details: Any) -> Path:
    """An engine folder of random bytes, whole by its manifest."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    (folder / "model.plan").write_bytes(draw.bytes(4096))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    if external:
        (folder / "model.onnx.data").write_bytes(draw.bytes(8192))
        write_weight_index(folder, WEIGHTS)
        details = {"weights": "external", **details}
    described(folder, **details).write(folder)
    return folder


def described(folder: Path, **details: Any) -> Manifest:
    return Manifest(
        stage="engine",
        files=describe_files(folder),
        sources={"onnx": "0" * 64},
        contract=CONTRACT,
        versions=tool_versions("numpy"),
        details={key: value for key, value in {**DETAILS, **details}.items() if value is not None},
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """machine(gpu, tensorrt-rtx, tensorrt): what the loader is told about this machine."""

    def pretend(gpu: Device | None = A10G, rtx: str | None = "1.7.1.116", full: str | None = None) -> None:
        versions = {"tensorrt-rtx": rtx, "tensorrt": full}
        monkeypatch.setattr(device_module, "local_device", lambda: gpu)
        monkeypatch.setattr(engine_folder_module, "installed_version", versions.get)

    pretend()
    return pretend


@pytest.fixture
def folder(tmp_path: Path, machine: Callable[..., None]) -> Path:
    return write_engine(tmp_path / "engine")


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the backend's place: what comes as far as it has passed every check of the folder."""

    def opened(folder: Path, *_: Any, **__: Any) -> None:
        raise EngineMismatchError(f"{folder} is whole and fits this machine; mistral-trt generate ")

    monkeypatch.setattr(loading, "require", lambda *_: SimpleNamespace(open_tensorrt_backend=opened))


def refusal(folder: Path, **options: Any) -> str:
    """What `Engine.load` says: one sentence with a command in it."""
    with pytest.raises(MistralTrtError) as caught:
        Engine.load(folder, **options)
    said = str(caught.value)
    assert "\n" not in said and COMMAND.search(said), said
    with pytest.raises(type(caught.value)) as again:
        open_cache(folder, trust_weights=bool(options))
    assert str(again.value) == said
    return said


# --- a whole folder on the right machine ---------------------------------------------------------------


def test_a_whole_engine_passes_every_check_and_is_then_loaded(folder: Path) -> None:
    assert refusal(folder) == f"{folder} is whole and fits this machine; mistral-trt generate "


@pytest.mark.parametrize("external", [False, True])
def test_the_check_itself_passes(tmp_path: Path, machine: Callable[..., None], external: bool) -> None:
    folder = write_engine(tmp_path / "engine", external=external)
    check_engine_folder(folder, read_manifest(folder))
    check_machine(folder, read_manifest(folder), lambda: A10G)


@pytest.mark.parametrize(
    "gpu",
    [
        replace(A10G, name="NVIDIA RTX A6000"),
        replace(A10G, driver="999"),
        replace(A10G, memory_bytes=PREDICTED["device_bytes"]),
        replace(A10G, memory_bytes=None),
    ],
    ids=["other name", "other driver", "just enough memory", "memory not told"],
)
def test_the_same_compute_capability_is_enough(
    folder: Path, machine: Callable[..., None], gpu: Device
) -> None:
    machine(gpu)
    assert "is whole and fits this machine" in refusal(folder)


def test_an_engine_for_several_gpus(tmp_path: Path, machine: Callable[..., None]) -> None:
    both: dict[str, Any] = {"compute_capabilities": ["8.6", "8.9"], "gpus": ["a10g", "l4"]}
    folder = write_engine(tmp_path / "engine", **both, gpu_name="NVIDIA A10G, NVIDIA L4")
    details = read_engine_details(read_manifest(folder))
    assert (details.compute_capabilities, details.gpus) == (("8.6", "8.9"), ("a10g", "l4"))
    for capability in ("8.6", "8.9"):
        machine(replace(A10G, compute_capability=capability))
        assert "is whole and fits this machine" in refusal(folder)
    machine(replace(A10G, name="NVIDIA A100-SXM4-40GB", compute_capability="8.0"))
    assert "built for NVIDIA A10G, NVIDIA L4 (compute capability 8.6 or 8.9)" in refusal(folder)
    machine(rtx="1.8.0.1")
    assert "build the engine again with: mistral-trt build ONNX_DIR --gpu a10g,l4 --out" in refusal(folder)


def test_a_link_to_the_same_bytes_is_the_same_file(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "model.plan", tmp_path / "elsewhere.plan")
    (folder / "model.plan").symlink_to(tmp_path / "elsewhere.plan")
    assert "is whole and fits this machine" in refusal(folder)


# --- damage to the files -------------------------------------------------------------------------------


def flip(name: str) -> Damage:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return damage


def resize(name: str, change: int) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:change] if change < 0 else data + bytes(change))

    return damage


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def write(name: str, data: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return damage


def plan_is_a_folder(folder: Path) -> None:
    (folder / "model.plan").unlink()
    (folder / "model.plan").mkdir()


def link_to_other_bytes(folder: Path) -> None:
    other = folder.parent / "other.plan"
    other.write_bytes(bytes((folder / "model.plan").stat().st_size))
    (folder / "model.plan").unlink()
    (folder / "model.plan").symlink_to(other)


def dangling_link(folder: Path) -> None:
    (folder / "model.plan").unlink()
    (folder / "model.plan").symlink_to("/nowhere/model.plan")


def other_fine_tune(folder: Path) -> None:
    """Weights of the same shapes, from another folder of the same size."""
    size = (folder / "model.onnx.data").stat().st_size
    (folder / "model.onnx.data").write_bytes(np.random.default_rng(1).bytes(size))


FILES: dict[str, tuple[Damage, str, bool]] = {
    "one bit of the plan": (flip("model.plan"), "model.plan was altered after it was made", False),
    "a truncated plan": (resize("model.plan", -1), "model.plan: expected 4096 bytes, found 4095", False),
    "a plan with a byte more": (resize("model.plan", 1), "expected 4096 bytes, found 4097", False),
    "an empty plan": (write("model.plan", b""), "model.plan: expected 4096 bytes, found 0", False),
    "no plan": (remove("model.plan"), "model.plan is missing", False),
    "a plan that is a folder": (plan_is_a_folder, "model.plan is missing", False),
    "a link to another plan": (link_to_other_bytes, "model.plan was altered", False),
    "a link to nothing": (dangling_link, "model.plan is missing", False),
    "another tokenizer": (flip("tokenizer.json"), "tokenizer.json was altered", False),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json is missing", False),
    "no manifest": (remove(MANIFEST_NAME), "holds no manifest.json, so it is not a finished", False),
    "half a manifest": (resize(MANIFEST_NAME, -9), "cannot be read as JSON", False),
    "an empty manifest": (write(MANIFEST_NAME, b""), "cannot be read as JSON", False),
    "no weight file": (remove("model.onnx.data"), "model.onnx.data is missing", True),
    "truncated weights": (resize("model.onnx.data", -100), "expected 8192 bytes, found 8092", True),
    "an altered weights index": (flip("weights.json"), "weights.json was altered", True),
    "no weights index": (remove("weights.json"), "weights.json is missing", True),
}


@pytest.mark.parametrize(("damage", "words", "external"), FILES.values(), ids=FILES)
def test_a_damaged_file_is_refused(
    tmp_path: Path, machine: Callable[..., None], damage: Damage, words: str, external: bool
) -> None:
    folder = write_engine(tmp_path / "engine", external=external)
    assert "is whole and fits" in refusal(folder)
    damage(folder)
    assert words in refusal(folder)


def test_trusted_weights_are_not_hashed_but_the_plan_always_is(
    tmp_path: Path, machine: Callable[..., None]
) -> None:
    folder = write_engine(tmp_path / "engine", external=True)
    other_fine_tune(folder)
    assert "is whole and fits" in refusal(folder, trust_weights=True)
    flip("model.plan")(folder)
    assert "model.plan was altered after it was made" in refusal(folder, trust_weights=True)


def test_a_path_that_is_no_folder(folder: Path) -> None:
    assert "is not a folder" in refusal(folder / "model.plan")
    assert "is not a folder" in refusal(folder / "nowhere")


def test_a_checkpoint_instead(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "looks like a checkpoint, not an artifact" in refusal(tmp_path)


# --- damage to the manifest ----------------------------------------------------------------------------

RAW: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another format version": (lambda d: d.update(format_version=2), "expected format_version 1, found 2"),
    "no predicted memory": (
        lambda d: d["details"].pop("predicted"),
        "predicted must hold the numbers device_bytes",
    ),
    "predicted memory of none": (lambda d: d["details"]["predicted"].update(device_bytes=None), "predicted"),
    "no compute capability": (
        lambda d: d["details"].pop("compute_capabilities"),
        "compute_capabilities must",
    ),
    "an empty list of them": (lambda d: d["details"].update(compute_capabilities=[]), "found []"),
    "a strange one": (lambda d: d["details"].update(compute_capabilities=["sm_86"]), 'must look like "8.6"'),
    "no GPU": (lambda d: d["details"].pop("gpus"), "details.gpus must be a list of names, found None"),
    "a GPU that is no name": (lambda d: d["details"].update(gpus=[86]), "a list of names, found [86]"),
    "no name of it": (lambda d: d["details"].pop("gpu_name"), "details.gpu_name must be a text, found None"),
    "no plan among the files": (lambda d: d["files"].pop("model.plan"), "model.plan is not among its files"),
    "no TensorRT version": (lambda d: d["details"].pop("tensorrt"), "details.tensorrt must be a text"),
    "an unknown flavour": (lambda d: d["details"].update(flavor="trt"), "must be tensorrt or tensorrt-rtx"),
    "no word of the weights": (lambda d: d["details"].pop("weights"), "must be embedded or external"),
    "external weights without an index": (
        lambda d: d["details"].update(weights="external"),
        "weights.json is not among its files",
    ),
    "an R that does not follow": (
        lambda d: d["contract"].update(ring_capacity=13),
        "ring_capacity must be 12 for W=8, C=4, found 13",
    ),
    "a file outside the folder": (
        lambda d: d["files"].update({"../model.plan": {"sha256": "0" * 64, "bytes": 1}}),
        "'../model.plan' is not a plain file name",
    ),
    "a file with an absolute path": (
        lambda d: d["files"].update({"/etc/passwd": {"sha256": "0" * 64, "bytes": 1}}),
        "is not a plain file name",
    ),
    "a file that is not there": (
        lambda d: d["files"].update({"more.bin": {"sha256": "0" * 64, "bytes": 1}}),
        "more.bin is missing",
    ),
    "details that are a list": (lambda d: d.update(details=[]), "details must be an object"),
}


@pytest.mark.parametrize(("change", "words"), RAW.values(), ids=RAW)
def test_a_manifest_that_is_wrong_though_its_hash_holds(
    folder: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    data = json.loads((folder / MANIFEST_NAME).read_text())
    change(data)
    data["sha256"] = content_sha256(data)
    (folder / MANIFEST_NAME).write_text(json.dumps(data))
    assert words in refusal(folder)


def test_a_manifest_altered_by_hand(folder: Path) -> None:
    data = json.loads((folder / MANIFEST_NAME).read_text())
    data["details"]["compute_capabilities"] = ["8.9"]
    (folder / MANIFEST_NAME).write_text(json.dumps(data))
    assert "it was altered after it was written" in refusal(folder)


INDEX: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "past the end of the file": (
        lambda d: d["weights"][1].update(offset=4098),
        "b: expected bytes 4098 to 8194 of model.onnx.data, found 8192 bytes there",
    ),
    "a file that is not there": (lambda d: d["weights"][0].update(file="b.data"), "b.data, which is missing"),
    "a file outside the folder": (lambda d: d["weights"][0].update(file="../b"), "is not a plain file name"),
    "a file that nothing vouches for": (
        lambda d: d["weights"][0].update(file="stray.bin"),
        "names 'stray.bin', which is not among the manifest's files",
    ),
    "more bytes than its shape has": (lambda d: d["weights"][0].update(bytes=4098), "expected 4096 bytes"),
    "one weight twice": (lambda d: d["weights"][1].update(name="a"), "a is listed twice"),
    "another version": (lambda d: d.update(format_version=9), "expected format_version 1, found 9"),
    "no list": (lambda d: d.pop("weights"), "cannot be used"),
}


@pytest.mark.parametrize(("change", "words"), INDEX.values(), ids=INDEX)
def test_an_index_that_is_wrong_though_its_hash_holds(
    tmp_path: Path, machine: Callable[..., None], change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    folder = write_engine(tmp_path / "engine", external=True)
    data = json.loads((folder / "weights.json").read_text())
    change(data)
    (folder / "weights.json").write_text(json.dumps(data))
    described(folder, weights="external").write(folder)
    (folder / "stray.bin").write_bytes(bytes(8192))
    assert words in refusal(folder)


def test_an_empty_plan_that_its_manifest_agrees_to(folder: Path) -> None:
    (folder / "model.plan").write_bytes(b"")
    described(folder).write(folder)
    assert "model.plan is empty" in refusal(folder)


def test_an_onnx_folder_given_as_an_engine(folder: Path) -> None:
    replace(described(folder), stage="onnx").write(folder)
    with pytest.raises(ManifestError, match="expected an engine folder, found an onnx folder.*mistral-trt b"):
        read_manifest(folder, "engine")


# --- another machine -----------------------------------------------------------------------------------

BUILD = "mistral-trt build ONNX_DIR --gpu 'NVIDIA L4' --out "
MACHINES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no GPU": ({"gpu": None}, ["this machine has no NVIDIA GPU", "run the ONNX folder", "mistral-trt gen"]),
    "another compute capability": (
        {"gpu": Device("NVIDIA L4", 24 << 30, "580", "8.9")},
        ["(compute capability 8.6), and this machine has NVIDIA L4 (8.9); build for it", BUILD],
    ),
    "a GPU that holds three rows": (
        {"gpu": replace(A10G, memory_bytes=REST + 4 * CONTRACT.ring_bytes_per_row - 1)},
        ["of GPU memory by prediction", "build ONNX_DIR --gpu a10g --out", "--max-batch-size 3"],
    ),
    "a GPU that holds no row": (
        {"gpu": replace(A10G, memory_bytes=REST)},
        ["not one row would fit, so build for a larger GPU: mistral-trt build"],
    ),
    "no TensorRT": (
        {"rtx": None},
        ["this machine has no TensorRT;", "run: pip install tensorrt-rtx==1.7.1.116"],
    ),
    "another version": (
        {"rtx": "1.8.0.1"},
        ["this machine has tensorrt-rtx 1.8.0.1;", "tensorrt-rtx==1.7.1.116, or build", "--gpu a10g"],
    ),
    "the other flavour": (
        {"rtx": None, "full": "11.2.0.1"},
        ["this machine has tensorrt 11.2.0.1;", "pip install tensorrt-rtx==1.7.1.116"],
    ),
    "both, of other versions": (
        {"rtx": "1.6", "full": "1.7.1.116"},
        ["has tensorrt 1.7.1.116 and tensorrt-rtx 1.6;"],
    ),
}


@pytest.mark.parametrize(("settings", "words"), MACHINES.values(), ids=MACHINES)
def test_another_machine_is_refused(
    folder: Path, machine: Callable[..., None], settings: dict[str, Any], words: list[str]
) -> None:
    machine(**settings)
    said = refusal(folder)
    assert all(part in said for part in words), said
    with pytest.raises(EngineMismatchError):
        Engine.load(folder)


def test_files_come_before_versions_and_versions_before_the_gpu(
    folder: Path, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden() -> Device | None:
        raise AssertionError("a device was looked for")

    machine(rtx=None)
    monkeypatch.setattr(device_module, "local_device", forbidden)
    assert "this machine has no TensorRT" in refusal(folder)
    flip("model.plan")(folder)
    assert "was altered" in refusal(folder)


def test_rings_are_counted_by_the_contract_and_not_by_the_prediction(tmp_path: Path) -> None:
    few = {**PREDICTED, "max_batch_size": 1, "device_bytes": REST + CONTRACT.ring_bytes_per_row}
    folder = write_engine(tmp_path / "engine", predicted=few)
    assert read_engine_details(read_manifest(folder)).device_bytes == PREDICTED["device_bytes"]


def test_a_name_with_line_breaks_stays_in_one_line(folder: Path, machine: Callable[..., None]) -> None:
    described(folder, gpu_name="NVIDIA\nA10G\r\nx").write(folder)
    machine(None)
    assert "built for NVIDIA A10G x, and" in refusal(folder)


# --- what a machine says -------------------------------------------------------------------------------


def test_a_machine_without_nvidia_smi_has_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert local_device() is None


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose nvidia-smi lists an A10G and an L4; returns the program."""
    tool = tmp_path / "nvidia-smi"
    lines = ["NVIDIA A10G, 23028, 580.65.06, 8.6, GPU-a10g", "NVIDIA L4, 23034, 580.65.06, 8.9, GPU-l4"]
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    return tool


@pytest.mark.parametrize(
    ("visible", "order", "name"),
    [
        (None, "PCI_BUS_ID", "NVIDIA A10G"),
        ("1,0", "PCI_BUS_ID", "NVIDIA L4"),
        ("GPU-l4", None, "NVIDIA L4"),
        ("GPU-l4,GPU-a10g", "FASTEST_FIRST", "NVIDIA L4"),
        ("", None, None),
        ("-1", None, None),
        ("7,0", "PCI_BUS_ID", None),
    ],
)
def test_the_gpu_is_the_first_that_cuda_sees(
    two_gpus: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, order: str | None, name: str | None
) -> None:
    for variable, value in (("CUDA_VISIBLE_DEVICES", visible), ("CUDA_DEVICE_ORDER", order)):
        if value is not None:
            monkeypatch.setenv(variable, value)
    found = local_device()
    assert (found.name if found else None) == name


def test_an_engine_is_held_to_the_gpu_that_is_visible(
    tmp_path: Path, two_gpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_engine(tmp_path / "engine")
    monkeypatch.setattr(engine_folder_module, "installed_version", lambda _: "1.7.1.116")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a10g")
    check_machine(folder, read_manifest(folder), local_device)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-l4")
    with pytest.raises(EngineMismatchError, match=r"this machine has NVIDIA L4 \(8.9\)"):
        check_machine(folder, read_manifest(folder), local_device)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(EngineMismatchError, match="no NVIDIA GPU .*or CUDA_VISIBLE_DEVICES hides it"):
        check_machine(folder, read_manifest(folder), local_device)


def test_of_different_gpus_it_is_not_guessed_which_comes_first(
    tmp_path: Path, two_gpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_engine(tmp_path / "engine")
    monkeypatch.setattr(engine_folder_module, "installed_version", lambda _: "1.7.1.116")
    for visible, words in ((None, "which one CUDA takes first"), ("0", "which CUDA_VISIBLE_DEVICES=0 means")):
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(EngineMismatchError) as error:
            check_machine(folder, read_manifest(folder), local_device)
        assert str(error.value) == (
            f"this machine has different GPUs (NVIDIA A10G, NVIDIA L4), and {words} is not known unless "
            "CUDA_DEVICE_ORDER is PCI_BUS_ID; run: export CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    check_machine(folder, read_manifest(folder), local_device)


def test_a_driver_that_does_not_answer_is_no_gpu(two_gpus: Path) -> None:
    two_gpus.write_text("#!/bin/sh\nexit 9\n")
    assert local_device() is None


@pytest.mark.parametrize("options", [{"threads": 2}, {"provider": "cpu"}, {"provider": "typo"}])
def test_options_of_onnxruntime_are_refused_for_an_engine(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(EngineMismatchError, match="threads and provider are for ONNX folders"):
        Engine.load(folder, **options)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("trusted", [False, True])
def test_no_byte_is_hashed_twice(
    onnx_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool, trusted: bool
) -> None:
    """Of the files that grow with the model; the manifest and the weights' index are small."""
    monkeypatch.undo()
    gpu = simulated.machine()
    gpu.install(monkeypatch)
    weights = "external" if external else "embedded"
    folder = simulated.write_engine_folder(onnx_folder(), tmp_path / "engine", weights=weights)
    hashed, real = [], hashlib.sha256

    class Counting:
        """A hash, whose length is noted when it is asked for."""

        def __init__(self, data: bytes = b"") -> None:
            self._hash, self._size = real(data), len(data)

        def update(self, data: memoryview) -> None:
            self._hash.update(data)
            self._size += len(data)

        def digest(self) -> bytes:
            return self._hash.digest()

        def hexdigest(self) -> str:
            hashed.append(self._size)
            return self._hash.hexdigest()

    monkeypatch.setattr(hashlib, "sha256", Counting)
    with Engine.load(folder, trust_weights=trusted, cache_dir=tmp_path / "cache") as engine:
        assert len(engine.generate([[1, 2]], SamplingParams(max_tokens=2))[0].tokens) == 2
    large = {"model.plan": 1, "model.onnx.data": int(external and not trusted)}
    for name, wanted in large.items():
        if (folder / name).exists():
            assert hashed.count((folder / name).stat().st_size) == wanted, name


def test_where_kernels_are_kept_is_refused_for_what_compiles_none(
    tmp_path: Path, machine: Callable[..., None], onnx_folder: Folder
) -> None:
    full = write_engine(tmp_path / "full", flavor="tensorrt")
    for folder in (full, onnx_folder()):
        with pytest.raises(EngineMismatchError, match="cache_dir is where tensorrt-rtx keeps"):
            Engine.load(folder, cache_dir=tmp_path)
    assert "is whole and fits" in refusal(write_engine(tmp_path / "rtx"))


def test_what_is_being_done_is_told_of_either_kind(
    onnx_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    said: list[str] = []
    Engine.load(onnx_folder(), progress=lambda what, share: said.append(what)).close()
    assert said == ["checking the files", "loading the graph"]
    simulated.machine().install(monkeypatch)
    folder = simulated.write_engine_folder(onnx_folder(), tmp_path / "engine")
    said.clear()
    Engine.load(folder, cache_dir=tmp_path, progress=lambda what, share: said.append(what)).close()
    assert said[:2] == ["checking the files", "loading the plan"] and "warming up 1 rows" in said
