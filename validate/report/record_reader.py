"""`report.json`, which may come from anywhere → what a comparison needs of it, its shape checked."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_trt.errors import ValidationError
from mistral_trt.validate.report.report import FORMAT_VERSION, JSON_NAME

_SETTINGS = ("precision", "sliding_window", "prefill_chunk", "ring_capacity", "max_batch_size", "max_context")


@dataclass(frozen=True)
class GateRecord:
    """A gate as it was recorded.

    verdict: "pass", "fail" or "not decided".  value: None where it was not finite or not measured.
    where: the place of the value, or why nothing was decided.
    """

    verdict: str
    value: float | None
    bound: str
    limit: float
    where: str


@dataclass(frozen=True)
class Record:
    """What is compared of a report.

    facts: name → hash, version or setting, in words.  gates: by metric.  layers: mean error of each
    layer's update, None where it was not finite; empty where the layers were not run.
    """

    verdict: str
    facts: Mapping[str, str]
    gates: Mapping[str, GateRecord]
    layers: Mapping[int, float | None]
    notes: tuple[str, ...]


def read_record(path: Path) -> Record:
    """Read a report's folder or its `report.json`.

    Raises ValidationError for what is not such a file, was written by another version or is damaged.
    """
    file = path / JSON_NAME if path.is_dir() else path
    again = "make it again with mistral-trt validate"
    try:
        data = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise ValidationError(f"{file} cannot be read as a report ({error}); {again}") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ValidationError(
            f"{file}: expected format_version {FORMAT_VERSION} of a report, found {version!r}; {again}"
        )
    try:
        return _record(_Object(data, "the report"))
    except ValidationError as error:
        raise ValidationError(f"{file} is damaged: {error}; {again}") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


class _Object:
    """A JSON object whose fields are taken by name and kind. Raises ValidationError for any other."""

    def __init__(self, data: object, name: str) -> None:
        if not isinstance(data, dict):
            raise ValidationError(f"expected {name} to be an object, found {_kind(data)}")
        self.data: dict[str, Any] = data
        self._name = name

    def take(self, key: str, *kinds: type) -> Any:
        """A field of one of the kinds; NoneType allows null."""
        if key not in self.data:
            raise ValidationError(f"expected {self._name} to have {key!r}, found no such field")
        value = self.data[key]
        if type(value) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValidationError(f"expected {key!r} of {self._name} to be {names}, found {_kind(value)}")
        return value

    def number(self, key: str, *kinds: type) -> float | None:
        value = self.take(key, int, float, *kinds)
        if value is None:
            return None
        if abs(value) > 1e300 or not math.isfinite(value):
            raise ValidationError(f"expected {key!r} of {self._name} to be a finite number")
        return float(value)

    def inner(self, key: str) -> "_Object":
        return _Object(self.take(key, dict), f"{key!r} of {self._name}")

    def each(self, key: str) -> list["_Object"]:
        return [_Object(entry, f"{key!r}[{i}]") for i, entry in enumerate(self.take(key, list))]


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _record(data: _Object) -> Record:
    gates = _gates(data)
    if all(gate.verdict == "not decided" for gate in gates.values()):
        raise ValidationError("expected gates that were decided, found none")
    verdict = data.take("verdict", str)
    expected = "fail" if any(gate.verdict == "fail" for gate in gates.values()) else "pass"
    if verdict != expected:
        raise ValidationError(f"expected the verdict {expected!r} of its gates, found {verdict!r}")
    notes = data.take("notes", list)
    if not all(isinstance(note, str) for note in notes):
        raise ValidationError("expected 'notes' to be texts")
    return Record(verdict, _facts(data), gates, _layers(data), tuple(notes))


def _gates(data: _Object) -> dict[str, GateRecord]:
    found: dict[str, GateRecord] = {}
    entries = [(entry, _decided(entry)) for entry in data.each("gates")]
    entries += [(entry, _left(entry)) for entry in data.each("undecided")]
    for entry, gate in entries:
        name = entry.take("name", str)
        if name in found:
            raise ValidationError(f"expected each gate once, found {name!r} twice")
        found[name] = gate
    return found


def _decided(entry: _Object) -> GateRecord:
    bound, limit = _limit(entry)
    verdict = "pass" if entry.take("passed", bool) else "fail"
    value = entry.number("value", type(None))
    return GateRecord(verdict, value, bound, limit, entry.take("where", str))


def _left(entry: _Object) -> GateRecord:
    return GateRecord("not decided", None, *_limit(entry), entry.take("why", str))


def _limit(entry: _Object) -> tuple[str, float]:
    bound = "at_least" if "at_least" in entry.data else "at_most"
    limit = entry.number(bound)
    assert limit is not None  # null was not allowed
    return bound, limit


def _facts(data: _Object) -> dict[str, str]:
    """Hashes first, then settings, then versions."""
    artifact, reference, run = data.inner("artifact"), data.inner("reference"), data.inner("run")
    tokens = data.inner("tokens")
    facts = {
        "artifact": artifact.take("name", str),
        "artifact manifest": artifact.take("manifest_sha256", str),
        "artifact graph": artifact.take("graph_sha256", str, type(None)),
        **_engine_facts(artifact),
        "reference": reference.take("sha256", str),
        "tokens": f"{tokens.take('count', int)}, {tokens.take('source', str)}",
        "tokens sha256": tokens.take("sha256", str),
        "seed": run.take("seed", int),
        "processor": run.inner("machine").take("processor", str),
        **{name: artifact.take(name, str, int, type(None)) for name in _SETTINGS},
    }
    for owner, name in ((artifact, "made with"), (run, "compared with")):
        versions = owner.inner("versions")
        facts |= {f"{name} {package}": versions.take(package, str) for package in sorted(versions.data)}
    return {name: "none" if value is None else str(value) for name, value in facts.items()}


def _engine_facts(artifact: _Object) -> dict[str, str | None]:
    if artifact.take("engine", dict, type(None)) is None:
        return {}
    engine = artifact.inner("engine")
    return {
        "engine manifest": engine.take("manifest_sha256", str),
        "engine executed on": engine.take("executed_on", str, type(None)),
    }


def _layers(data: _Object) -> dict[int, float | None]:
    if data.take("layers", dict, type(None)) is None:
        return {}
    layers = data.inner("layers").each("layers")
    return {layer.take("index", int): layer.inner("update").number("mean", type(None)) for layer in layers}
