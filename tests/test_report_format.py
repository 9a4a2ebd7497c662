"""docs/report-format.md names every field of `report.json`, and no other."""

import re
from pathlib import Path
from typing import Any

import pytest

from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.manifest import Manifest
from mistral_trt.validate.polygraphy_run import PolygraphyResult
from mistral_trt.validate.provenance import (
    describe_artifact,
    describe_engine,
    describe_reference,
)
from mistral_trt.validate.report.record import to_json
from mistral_trt.validate.report.report import FORMAT_VERSION
from mistral_trt.validate.subject import Engine
from tests.models import write_checkpoint
from tests.reports import CONTRACT, full_report, layer_findings, report

TEXT = (Path(__file__).parent.parent / "docs" / "report-format.md").read_text(encoding="utf-8")
WHOLE = "The record"


def documented() -> dict[str, list[str]]:
    """Section → the fields of its table."""
    found = {}
    for section in TEXT.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        fields = re.findall(r"^\| (`.*?) \|", body, re.MULTILINE)
        if fields:
            found[title] = fields
    return found


def written(data: Any, section: str) -> list[dict[str, Any]]:
    """The objects of a record that a section describes: layers.ranges[] -> every range."""
    places = [data]
    for part in [] if section == WHOLE else section.split("."):
        places = [place[part.removesuffix("[]")] for place in places]
        if part.endswith("[]"):
            places = [entry for place in places for entry in place]
    return places


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A record whose every part was run, with a gate of each bound on both sides."""
    folder = tmp_path_factory.mktemp("artifact")
    manifest = Manifest("onnx", {}, {"checkpoint": "c" * 64}, CONTRACT, {"onnx": "1"}, {})
    manifest.write(folder)
    source = Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))
    made = to_json(full_report(layers=layer_findings(wrong=7)))
    engine = Engine(folder, manifest, None)
    results = [PolygraphyResult("decode", None, "not found")]
    made["artifact"] = describe_artifact(folder, manifest) | describe_engine(engine, results)
    made["reference"] = describe_reference(source, CONTRACT)
    return made


def test_every_section_describes_a_part_of_the_record(record: dict[str, Any]) -> None:
    sections = documented()
    assert all(written(record, section) for section in sections)
    objects = {key for key, value in record.items() if isinstance(value, dict) and key != "quantization"}
    lists = {f"{key}[]" for key, value in record.items() if isinstance(value, list)}
    assert objects | lists - {"files[]", "notes[]"} <= set(sections)


@pytest.mark.parametrize("section", documented())
def test_the_fields_of_a_section_are_those_written(record: dict[str, Any], section: str) -> None:
    for entry in written(record, section):
        bounds = {"at_most", "at_least"} & set(entry)
        names = ["`at_most` or `at_least`" if name in bounds else f"`{name}`" for name in entry]
        assert sorted(names) == sorted(documented()[section])


def test_the_version_is_the_documented_one(record: dict[str, Any]) -> None:
    assert f"# Report format, version {FORMAT_VERSION}\n" in TEXT
    assert f"| `format_version` | integer | {FORMAT_VERSION} |" in TEXT
    assert record["format_version"] == FORMAT_VERSION


def test_a_field_that_is_not_documented_is_noticed(record: dict[str, Any]) -> None:
    assert sorted(f"`{name}`" for name in {**record, "more": 1}) != sorted(documented()[WHOLE])
    assert to_json(report()).keys() == record.keys()
