"""`mistral-trt compare`: what changed between two reports, and what is refused."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from mistral_trt.cli import main
from mistral_trt.errors import ValidationError
from mistral_trt.validate.report.compare import compare_records, describe, printable
from mistral_trt.validate.report.record import to_json
from mistral_trt.validate.report.record_reader import Record, read_record
from mistral_trt.validate.report.report import JSON_NAME
from tests.reports import full_report, layer_findings, report

Write = Callable[[dict[str, Any]], Path]
HEALTHY = to_json(full_report())
WRONG = to_json(full_report(layers=layer_findings(wrong=7)))
PLAIN = to_json(report())


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Each record into a folder of its own."""

    def written(data: dict[str, Any]) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / JSON_NAME).write_text(json.dumps(data))
        return folder

    return written


def with_gate(data: dict[str, Any], name: str, **changes: object) -> dict[str, Any]:
    """A record whose gate and verdict are altered."""
    made = deepcopy(data)
    for gate in made["gates"]:
        if gate["name"] == name:
            gate |= changes
    made["verdict"] = "pass" if all(gate["passed"] for gate in made["gates"]) else "fail"
    return made


def test_a_report_is_equal_to_itself(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(HEALTHY)
    changes = compare_records(read_record(folder), read_record(folder / JSON_NAME))
    assert not changes.facts and not changes.layers and not changes.notes_gone + changes.notes_new
    assert {gate.ratio for gate in changes.gates} <= {None, 1.0}
    assert main(["compare", str(folder), str(folder)]) == 0
    out = capsys.readouterr().out
    assert "verdict: pass\n" in out
    assert "→" not in out
    assert out.endswith("no gate fails that did not fail before\n")


def test_a_gate_that_went_from_pass_to_fail_is_status_1_and_back_is_0(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy, wrong = str(write(HEALTHY)), str(write(WRONG))
    assert main(["compare", healthy, wrong]) == 1
    out = capsys.readouterr().out
    assert "verdict: pass → fail" in out
    assert "✓ → ✗  Layer update error, worst layer: 0.00108 → 0.0864 (× 80.04), at most 0.006" in out
    assert "layer 7   0.00108 → 0.0864 (× 80.04)" in out
    assert out.count("  layer ") == 1, "the layers that did not change are not listed"
    assert out.endswith("worse: Layer update error, worst layer\n")
    assert main(["compare", wrong, healthy]) == 0
    assert main(["compare", wrong, wrong]) == 0, "it was not right before either"


def test_a_gate_that_fails_and_was_not_run_before_is_worse(write: Write) -> None:
    changes = compare_records(read_record(write(PLAIN)), read_record(write(WRONG)))
    assert changes.worse == ["layer_update_error_max"]
    assert any(
        "– → ✗  Layer update error, worst layer: not run → 0.0864" in line for line in describe(changes)
    )
    back = compare_records(read_record(write(HEALTHY)), read_record(write(PLAIN)))
    assert back.worse == []
    assert "✓ → –  Layer update error, worst layer: 0.00108 → not run" in "\n".join(describe(back))


def test_values_limits_and_ratios_are_compared(write: Write) -> None:
    tighter = with_gate(HEALTHY, "kl_max", value=2e-3, at_most=5e-3)
    (gate,) = [
        gate
        for gate in compare_records(read_record(write(HEALTHY)), read_record(write(tighter))).gates
        if gate.name == "kl_max"
    ]
    assert gate.before is not None and gate.after is not None
    assert (gate.before.limit, gate.after.limit) == (0.01, 0.005)
    assert gate.ratio == pytest.approx(2e-3 / gate.before.value)  # type: ignore[operator]
    broken = with_gate(HEALTHY, "kl_max", value=None, passed=False)
    changes = compare_records(read_record(write(HEALTHY)), read_record(write(broken)))
    assert changes.worse == ["kl_max"]
    assert any("→ not finite, at most 0.01" in line for line in describe(changes))


def test_hashes_versions_settings_and_notes_are_compared(write: Write) -> None:
    other = deepcopy(HEALTHY)
    other["artifact"] |= {
        "manifest_sha256": "c" * 64,
        "prefill_chunk": 8,
        "versions": {"onnx": "2", "x": "1"},
    }
    other["run"]["seed"] = 5
    other["notes"] = ["new"]
    changes = compare_records(read_record(write(HEALTHY | {"notes": ["old"]})), read_record(write(other)))
    assert changes.facts == {
        "artifact manifest": ("a" * 64, "c" * 64),
        "seed": ("0", "5"),
        "prefill_chunk": ("4", "8"),
        "made with onnx": ("1", "2"),
        "made with x": (None, "1"),
    }
    assert (changes.notes_gone, changes.notes_new) == (("old",), ("new",))
    lines = "\n".join(describe(changes))
    assert "made with x        · → 1" in lines
    assert "  - old\n  + new" in lines


@pytest.mark.parametrize(
    ("before", "after", "listed"),
    [(0.1, 0.19, False), (0.1, 0.21, True), (0.21, 0.1, True), (0.1, None, True), (None, None, False),
     (0.0, 0.1, True), (0.0, 0.0, False), (0.1, 0.0, True)],
)  # fmt: skip
def test_a_layer_is_listed_above_a_factor_of_two(
    before: float | None, after: float | None, listed: bool
) -> None:
    sides = [Record("pass", {}, {}, {3: error, 4: 1.0}, ()) for error in (before, after)]
    assert (3 in compare_records(*sides).layers) is listed


def test_an_engine_and_where_it_ran_are_compared(write: Write) -> None:
    elsewhere = deepcopy(HEALTHY)
    elsewhere["artifact"]["engine"] |= {"manifest_sha256": "e" * 64, "executed_on": None}
    before, after = read_record(write(HEALTHY)), read_record(write(elsewhere))
    assert compare_records(before, after).facts == {
        "engine manifest": ("d" * 64, "e" * 64),
        "engine executed on": ("NVIDIA A10G", "none"),
    }
    plain = read_record(write(HEALTHY | {"artifact": {**HEALTHY["artifact"], "engine": None}}))
    assert compare_records(plain, before).facts["engine manifest"] == (None, "d" * 64)


def test_as_json_it_says_the_same(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(write(HEALTHY)), str(write(WRONG)), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == ["pass", "fail"]
    assert found["worse"] == ["layer_update_error_max"]
    assert found["layers"] == {"7": [0.001079, 0.08636]}


def drop(*path: str | int) -> Callable[[dict[str, Any]], None]:
    """Take a field out of a record."""

    def damage(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return damage


def put(value: object, *path: str | int) -> Callable[[dict[str, Any]], None]:
    """Give a field of a record another value."""

    def damage(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put(2, "format_version"), "expected format_version 3 of a report, found 2"),
        (put(True, "format_version"), "found True"),
        (drop("format_version"), "found None"),
        (drop("gates"), "expected the report to have 'gates'"),
        (put([], "gates"), "expected gates that were decided, found none"),
        (put({}, "gates"), "expected 'gates' of the report to be list, found dict"),
        (put([1], "gates"), "expected 'gates'\\[0\\] to be an object, found int"),
        (put("much", "gates", 0, "value"), "expected 'value' of 'gates'\\[0\\] to be int or float"),
        (put(10**400, "gates", 0, "value"), "finite number"),
        (put(1, "gates", 0, "passed"), "expected 'passed'"),
        (put(None, "gates", 0, "at_most"), "found null"),
        (drop("gates", 0, "at_most"), "to have 'at_most'"),
        (put("kl_max", "gates", 0, "name"), "found 'kl_max' twice"),
        (put("fail", "verdict"), "expected the verdict 'pass' of its gates, found 'fail'"),
        (put(False, "gates", 0, "passed"), "expected the verdict 'fail' of its gates, found 'pass'"),
        (put([1], "notes"), "expected 'notes' to be texts"),
        (put("x", "artifact"), "expected 'artifact' of the report to be dict, found str"),
        (put(None, "reference", "sha256"), "expected 'sha256' of 'reference'"),
        (put({"torch": 2}, "run", "versions"), "expected 'torch'"),
        (put("7", "layers", "layers", 0, "index"), "expected 'index'"),
    ],
)  # fmt: skip
def test_what_is_no_report_is_refused_in_words(
    write: Write, damage: Callable[[dict[str, Any]], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = deepcopy(HEALTHY)
    damage(data)
    folder, sound = write(data), write(HEALTHY)
    with pytest.raises(ValidationError, match=message):
        read_record(folder)
    assert main(["compare", str(sound), str(folder)]) == 2
    assert "make it again with mistral-trt validate" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"a": NaN}', "\xff", "[]", "7"])
def test_what_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / JSON_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValidationError, match="cannot be read|expected format_version 3"):
        read_record(tmp_path)


def test_a_missing_report_is_refused(tmp_path: Path) -> None:
    assert main(["compare", str(tmp_path), str(tmp_path / "none")]) == 2


def test_a_report_cannot_command_the_terminal(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = deepcopy(HEALTHY)
    hostile["notes"] = ["\x1b]0;title\x07\x1b[2J\u202egood"]
    hostile["artifact"]["versions"] = {"\x1b[31m": "\r1"}
    assert main(["compare", str(write(HEALTHY)), str(write(hostile))]) == 0
    assert printable("a\x1b\u202eb") == "a\ufffd\ufffdb"
    assert all(c.isprintable() or c == "\n" for c in capsys.readouterr().out)
