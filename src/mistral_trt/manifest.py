"""`manifest.json`: what makes a folder an artifact, and how a reader knows it is whole and unaltered.

It is the last file written. It lists every other file with size and SHA-256, names the manifest it was
made from, and carries the model config, the graph contract and the versions of all tools involved.
"""

import hashlib
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mistral_trt.artifact import MANIFEST_NAME, write_file
from mistral_trt.config import ModelConfig
from mistral_trt.contract import GraphContract
from mistral_trt.errors import ConfigError, ManifestError

FORMAT_VERSION = 1

GRAPH_NAME = "model.onnx"
"""The decode graph of an ONNX folder."""

PLAN_NAME = "model.plan"
"""TensorRT's plan in an engine folder."""

STAGES = {
    "onnx": "mistral-trt export CHECKPOINT --out {folder}",
    "engine": "mistral-trt build ONNX_DIR --gpu {gpu} --out {folder}",
}
"""Stage → the command that makes (and repairs) its folder."""

_CHUNK_BYTES = 1 << 24
_FIELDS = (
    "format_version",
    "stage",
    "files",
    "sources",
    "config",
    "contract",
    "versions",
    "details",
    "sha256",
)


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The content of one `manifest.json`.

    files: every file of the folder but the manifest itself.
    sources: stage → SHA-256 of what this was made from (a checkpoint's files, or another manifest).
    details: what only this stage has to say (see docs/artifact-format.md).
    """

    stage: str
    files: Mapping[str, FileEntry]
    sources: Mapping[str, str]
    contract: GraphContract
    versions: Mapping[str, str]
    details: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ManifestError(f"manifest: stage must be one of {sorted(STAGES)}, found {self.stage!r}")
        for name in self.files:
            if not is_plain_name(name):
                raise ManifestError(f"manifest: {name!r} is not a plain file name")
        for field in ("sources", "versions", "details"):
            if not isinstance(getattr(self, field), Mapping):
                raise ManifestError(f"manifest: {field} must be an object, found {getattr(self, field)!r}")

    @property
    def config(self) -> ModelConfig:
        return self.contract.config

    def to_json(self) -> dict[str, Any]:
        content = {
            "format_version": FORMAT_VERSION,
            "stage": self.stage,
            "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
            "sources": dict(self.sources),
            "config": self.config.to_json(),
            "contract": self.contract.to_json(),
            "versions": dict(self.versions),
            "details": dict(self.details),
        }
        return {**content, "sha256": content_sha256(content)}

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, atomically; call it after every other file is in place."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        write_file(folder / MANIFEST_NAME, text.encode())


def read_manifest(folder: Path, stage: str | None = None, *, check_files: bool | None = True) -> Manifest:
    """Read an artifact's manifest and check that the folder is what it says.

    stage: the stage expected, None for any.  check_files: compare every file's SHA-256; False: only its size;
    None: do not look at the files.  Raises ManifestError in plain words, with the command that repairs it.
    """
    repair = repair_command(folder, stage)
    if not folder.is_dir():
        raise ManifestError(f"{folder} is not a folder; make it with: {repair}")
    path = folder / MANIFEST_NAME
    if not path.is_file() and (folder / "config.json").is_file():
        raise ManifestError(
            f"{folder} looks like a checkpoint, not an artifact; "
            f"make one from it with: mistral-trt export {shlex.quote(str(folder))} --out ONNX_DIR"
        )
    if not path.is_file():
        raise ManifestError(
            f"{folder} holds no {MANIFEST_NAME}, so it is not a finished artifact; make it with: {repair}"
        )
    manifest = _parse(path, stage)
    if stage is not None and manifest.stage != stage:
        raise ManifestError(
            f"{folder}: expected an {stage} folder, found an {manifest.stage} folder; make one with: "
            f"{STAGES[stage].format(folder='DIR', gpu='GPU')}"
        )
    if check_files is not None:
        repair = repair_command(folder, manifest.stage, manifest.details)
        for name, entry in manifest.files.items():
            _check_file(folder / name, entry, check_hash=check_files, repair=repair)
    return manifest


def repair_command(folder: Path, stage: str | None, details: Mapping[str, Any] | None = None) -> str:
    """The command that makes a folder, as far as is known what it was made for.

    stage: None where that is not known.  details: of its manifest, which name an engine's GPUs and weights.
    """
    place = shlex.quote(str(folder))
    if stage not in STAGES:
        return " or ".join(command.format(folder=place, gpu="GPU") for command in STAGES.values())
    known = details or {}
    gpus = known.get("gpus")
    named = isinstance(gpus, list) and gpus and all(isinstance(gpu, str) for gpu in gpus)
    gpu = shlex.quote(" ".join(",".join(gpus).split())) if named and gpus else "GPU"
    command = STAGES[stage].format(folder=place, gpu=gpu)
    return command + (" --weights external" if known.get("weights") == "external" else "")


def manifest_sha256(folder: Path) -> str:
    """Identity of an artifact: the hash of its manifest, which holds the hashes of all else."""
    return sha256_file(folder / MANIFEST_NAME)


def content_sha256(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's fields but `sha256`, as JSON with sorted keys and without spaces."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces: large ones, which leave other threads the interpreter."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def describe_files(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, FileEntry]:
    """The `files` section for everything in `folder`; `known` gives hashes already taken while writing."""
    known = known or {}
    entries = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST_NAME:
            entries[path.name] = FileEntry(known.get(path.name) or sha256_file(path), path.stat().st_size)
    return entries


def tool_versions(*packages: str) -> dict[str, str]:
    """Versions of this package, of Python and of the given distributions that are installed."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and readers do without

    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("mistral-trt", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def is_plain_name(name: str) -> bool:
    """Whether `name` stays inside its folder: one path component, not hidden."""
    return bool(name) and not name.startswith(".") and not any(c in name for c in "/\\\0")


def _parse(path: Path, stage: str | None) -> Manifest:
    repair = repair_command(path.parent, stage)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ManifestError(
            f"{path} cannot be read as JSON ({error}); make it again with: {repair}"
        ) from error
    if isinstance(data, dict) and isinstance(data.get("stage"), str):
        details = data.get("details")
        repair = repair_command(path.parent, data["stage"], details if isinstance(details, dict) else None)
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        found = data.get("format_version") if isinstance(data, dict) else type(data).__name__
        raise ManifestError(
            f"{path}: expected format_version {FORMAT_VERSION}, found {found!r}; make it again with: {repair}"
        )
    try:
        if sorted(data) != sorted(_FIELDS):
            raise ManifestError(f"expected the fields {sorted(_FIELDS)}, found {sorted(data)}")
        config = ModelConfig.from_json(data["config"])
        manifest = Manifest(
            stage=data["stage"],
            files={name: FileEntry(**entry) for name, entry in data["files"].items()},
            sources=data["sources"],
            contract=GraphContract.from_json(data["contract"], config),
            versions=data["versions"],
            details=data["details"],
        )
        if data["sha256"] != content_sha256(data):
            raise ManifestError("it was altered after it was written (its own SHA-256 differs)")
        return manifest
    except (ConfigError, ManifestError, TypeError, KeyError, AttributeError) as error:
        raise ManifestError(f"{path} is damaged: {error}; make it again with: {repair}") from error


def _check_file(path: Path, entry: FileEntry, *, check_hash: bool, repair: str) -> None:
    if not path.is_file():
        raise ManifestError(f"{path} is missing; make the folder again with: {repair}")
    if path.stat().st_size != entry.bytes:
        raise ManifestError(
            f"{path}: expected {entry.bytes} bytes, found {path.stat().st_size}; "
            f"make the folder again with: {repair}"
        )
    if check_hash and sha256_file(path) != entry.sha256:
        raise ManifestError(
            f"{path} was altered after it was made (its SHA-256 differs from the manifest's); "
            f"make the folder again with: {repair}"
        )
