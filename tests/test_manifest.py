"""`manifest.json`: written last, read first, and what is said of a folder that is not what it claims."""

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mistral_trt import manifest as manifests
from mistral_trt.artifact import MANIFEST_NAME
from mistral_trt.contract import plan_contract
from mistral_trt.errors import ManifestError
from mistral_trt.manifest import (
    FORMAT_VERSION,
    FileEntry,
    Manifest,
    describe_files,
    is_plain_name,
    manifest_sha256,
    read_manifest,
    repair_command,
    sha256_file,
    tool_versions,
)
from tests.models import TINY

CONFIG = TINY
REPAIR = "with: mistral-trt export CHECKPOINT --out "


def described(files: dict[str, FileEntry], **changes: Any) -> Manifest:
    settings: dict[str, Any] = {
        "stage": "onnx",
        "files": files,
        "sources": {"checkpoint": "0" * 64},
        "contract": plan_contract(CONFIG, precision="fp16", prefill_chunk=4),
        "versions": tool_versions("numpy"),
        "details": {"name": "naïve", "weights": ["a", "b"]},
        **changes,
    }
    return Manifest(**settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact of two files."""
    path = tmp_path / "artifact"
    path.mkdir()
    (path / "model.onnx").write_bytes(b"graph")
    (path / "model.onnx.data").write_bytes(bytes(range(256)))
    described(describe_files(path)).write(path)
    return path


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / MANIFEST_NAME).read_text())
    change(data)
    (folder / MANIFEST_NAME).write_text(json.dumps(data))


def test_written_and_read_is_the_same(folder: Path) -> None:
    read = read_manifest(folder, "onnx")
    assert read == described(describe_files(folder)) == read_manifest(folder)
    assert read.config == CONFIG
    assert read.to_json()["format_version"] == FORMAT_VERSION


def test_the_same_content_is_the_same_bytes(folder: Path) -> None:
    before = (folder / MANIFEST_NAME).read_bytes()
    entries = dict(reversed(describe_files(folder).items()))
    described(entries).write(folder)
    assert (folder / MANIFEST_NAME).read_bytes() == before
    assert before.decode().endswith("}\n") and "naïve" in before.decode()


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("position", [0, -1])
def test_one_altered_bit_is_seen(folder: Path, name: str, position: int) -> None:
    data = bytearray((folder / name).read_bytes())
    data[position] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ManifestError, match=f"{name} was altered after it was made .*SHA-256.*{REPAIR}"):
        read_manifest(folder, "onnx")
    read_manifest(folder, "onnx", check_files=False)


@pytest.mark.parametrize("check_files", [True, False])
def test_a_file_of_another_size_is_always_seen(folder: Path, check_files: bool) -> None:
    (folder / "model.onnx").write_bytes(b"grap")
    with pytest.raises(
        ManifestError, match=f"model.onnx: expected 5 bytes, found 4; make the folder again {REPAIR}"
    ):
        read_manifest(folder, "onnx", check_files=check_files)


@pytest.mark.parametrize("check_files", [True, False])
def test_a_missing_file_is_always_seen(folder: Path, check_files: bool) -> None:
    (folder / "model.onnx.data").unlink()
    with pytest.raises(ManifestError, match=f"model.onnx.data is missing; make the folder again {REPAIR}"):
        read_manifest(folder, "onnx", check_files=check_files)


def test_a_path_that_is_no_folder(folder: Path) -> None:
    with pytest.raises(ManifestError, match=f"nowhere is not a folder; make it {REPAIR}.*nowhere"):
        read_manifest(folder / "nowhere", "onnx")
    with pytest.raises(
        ManifestError,
        match=r"nowhere is not a folder; make it with: mistral-trt export .* or mistral-trt build ",
    ):
        read_manifest(folder / "nowhere")
    with pytest.raises(
        ManifestError, match="make it with: mistral-trt build ONNX_DIR --gpu GPU --out .*model.onnx"
    ):
        read_manifest(folder / "model.onnx", "engine")


def test_a_folder_without_a_manifest_is_not_finished(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(
        ManifestError, match="holds no manifest.json, so it is not a finished artifact; make it with"
    ):
        read_manifest(folder, "onnx")


def test_another_stage_is_refused(folder: Path) -> None:
    with pytest.raises(ManifestError, match="artifact: expected an engine folder, found an onnx folder"):
        read_manifest(folder, "engine")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"{'stage': 1}"],
    ids=["empty", "half", "latin", "deep", "python"],
)
def test_what_is_not_json_is_told(folder: Path, text: bytes) -> None:
    (folder / MANIFEST_NAME).write_bytes(text)
    with pytest.raises(
        ManifestError, match=r"manifest.json cannot be read as JSON \(.*\); make it again with: mist"
    ):
        read_manifest(folder, "onnx")


@pytest.mark.parametrize(
    ("text", "found"), [("{}", "None"), ("[]", "'list'"), ('{"format_version": 2}', "2"), ("3", "'int'")]
)
def test_another_format_version_is_refused(folder: Path, text: str, found: str) -> None:
    (folder / MANIFEST_NAME).write_text(text)
    with pytest.raises(ManifestError, match=f"expected format_version 1, found {found}; make it again with"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("sources"), "expected the fields .* found "),
        (lambda d: d.update(extra=1), "expected the fields .* found .*'extra'"),
        (lambda d: d.update(stage="weights"), r"stage must be one of \['engine', 'onnx'\], found 'weights'"),
        (lambda d: d.update(stage=["onnx"]), "is damaged"),
        (
            lambda d: d["files"].update({"../evil": {"sha256": "0", "bytes": 1}}),
            "'../evil' is not a plain file name",
        ),
        (
            lambda d: d["files"].update({"/etc/passwd": {"sha256": "0", "bytes": 1}}),
            "is not a plain file name",
        ),
        (lambda d: d["files"]["model.onnx"].pop("bytes"), "bytes"),
        (lambda d: d["files"]["model.onnx"].update(more=1), "more"),
        (lambda d: d.update(files=["model.onnx"]), "is damaged"),
        (lambda d: d.update(files={"model.onnx": None}), "is damaged"),
        (lambda d: d["config"].pop("head_dim"), "model config: expected the fields"),
        (lambda d: d["config"].update(head_dim=0), "head_dim must be a positive integer, found 0"),
        (lambda d: d.update(config=None), "is damaged"),
        (lambda d: d["contract"].update(ring_capacity=13), "ring_capacity must be 12 for W=8, C=4, found 13"),
        (lambda d: d["contract"].update(precision="fp9"), "precision must be one of"),
        (lambda d: d["contract"].update(max_batch_size="4"), "max_batch_size must be a positive integer"),
        (lambda d: d.update(contract=7), "is damaged"),
        (lambda d: d.update(sources=[]), r"sources must be an object, found \[\]"),
        (lambda d: d.update(versions=None), "versions must be an object, found None"),
        (lambda d: d.update(details=5), "details must be an object, found 5"),
    ],
)
def test_a_damaged_manifest_is_told_with_its_repair(
    folder: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(ManifestError, match=f"manifest.json is damaged: .*{REPAIR}") as caught:
        read_manifest(folder, "onnx")
    assert re.search(words, str(caught.value))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 30), max_size=3),
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=4)
    | st.just([])
    | st.just({})
    | st.just([[]]),
)
@example([4, 0], -1)
def test_any_change_to_a_manifest_is_read_or_refused(folder: Path, steps: list[int], value: Any) -> None:
    original = json.loads((folder / MANIFEST_NAME).read_text())
    changed = copy.deepcopy(original)
    place = changed
    for step in steps[:-1]:
        key = sorted(place)[step % len(place)]
        if not isinstance(place[key], dict) or not place[key]:
            break
        place = place[key]
    place[sorted(place)[(steps or [0])[-1] % len(place)]] = value
    (folder / MANIFEST_NAME).write_text(json.dumps(changed))
    try:
        read = read_manifest(folder)
    except ManifestError as error:
        assert "\n" not in str(error)
    else:
        assert read.to_json() == changed
    finally:
        (folder / MANIFEST_NAME).write_text(json.dumps(original))


def test_manifest_sha256_follows_every_file(folder: Path) -> None:
    before = manifest_sha256(folder)
    assert before == sha256_file(folder / MANIFEST_NAME)
    (folder / "model.onnx").write_bytes(b"other")
    described(describe_files(folder)).write(folder)
    assert manifest_sha256(folder) != before


def test_describe_files_lists_all_but_the_manifest_and_trusts_known_hashes(folder: Path) -> None:
    entries = describe_files(folder, {"model.onnx.data": "known"})
    assert sorted(entries) == ["model.onnx", "model.onnx.data"]
    assert entries["model.onnx"] == FileEntry(sha256_file(folder / "model.onnx"), 5)
    assert entries["model.onnx.data"] == FileEntry("known", 256)


def test_sha256_file_is_that_of_the_whole_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sha256_file(folder / "model.onnx.data")
    assert whole == "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880"
    monkeypatch.setattr(manifests, "_CHUNK_BYTES", 7)
    assert sha256_file(folder / "model.onnx.data") == whole


def test_tool_versions_leaves_out_what_is_not_installed() -> None:
    found = tool_versions("numpy", "no-such-package-anywhere")
    assert set(found) == {"python", "mistral-trt", "numpy"}
    assert all(version[0].isdigit() for version in found.values())


@given(
    st.text(max_size=12)
    | st.sampled_from(["..", ".", "a/b", "a\\b", "a\0b", "", "/", ".hidden", "model.onnx"])
)
def test_a_plain_name_stays_in_its_folder(name: str) -> None:
    if is_plain_name(name):
        joined = os.path.normpath(os.path.join("/folder", name))  # noqa: PTH118
        assert joined == f"/folder/{name}"
    else:
        assert not name or name[0] == "." or set(name) & set("/\\\0")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage": "x"}, "manifest: stage must be one of"),
        ({"files": {"a/b": FileEntry("0", 1)}}, "manifest: 'a/b' is not a plain file name"),
        ({"details": []}, "manifest: details must be an object"),
    ],
)
def test_a_manifest_that_could_not_be_read_cannot_be_made(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ManifestError, match=words):
        described(**{"files": {}, **changes})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("contract", "max_context", 7),
        ("details", "generation", None),
        ("config", "rope_theta", 1e6),
        ("versions", "python", "2.7"),
    ],
)
def test_a_value_changed_by_hand_is_noticed(
    onnx_folder: Callable[..., Path], tmp_path: Path, section: str, key: str, value: object
) -> None:
    """Each of these would parse, and run, and be wrong."""
    shutil.copytree(onnx_folder(), tmp_path / "copy")
    path = tmp_path / "copy" / "manifest.json"
    data = json.loads(path.read_text())
    data[section][key] = value
    path.write_text(json.dumps(data))
    with pytest.raises(ManifestError, match="altered after it was written.*make it again with"):
        read_manifest(tmp_path / "copy")


def test_a_checkpoint_is_answered_with_the_command_that_exports_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ManifestError, match="looks like a checkpoint.*mistral-trt export .* --out ONNX_DIR"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("stage", "details", "command"),
    [
        ("onnx", {}, "mistral-trt export CHECKPOINT --out 'a b'"),
        ("engine", {}, "mistral-trt build ONNX_DIR --gpu GPU --out 'a b'"),
        ("engine", {"gpus": ["a10g", "l4"]}, "mistral-trt build ONNX_DIR --gpu a10g,l4 --out 'a b'"),
        ("engine", {"gpus": ["$(x)"]}, "mistral-trt build ONNX_DIR --gpu '$(x)' --out 'a b'"),
        ("engine", {"gpus": 3}, "mistral-trt build ONNX_DIR --gpu GPU --out 'a b'"),
        (
            "engine",
            {"gpus": ["l4"], "weights": "external"},
            "mistral-trt build ONNX_DIR --gpu l4 --out 'a b' --weights external",
        ),
    ],
)
def test_the_command_that_repairs_a_folder(stage: str, details: dict[str, object], command: str) -> None:
    assert repair_command(Path("a b"), stage, details) == command
    assert command.partition(" --gpu")[0] in repair_command(Path("a b"), None)
