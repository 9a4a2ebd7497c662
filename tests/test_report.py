"""`report.json` and `report.html`: complete, whole, self-contained, safe and the same every time."""

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mistral_trt.contract import GraphContract, Ring
from mistral_trt.validate.gates import ScenarioResult, judge, measure, read_gates
from mistral_trt.validate.metrics import LogitErrors, concatenate
from mistral_trt.validate.plots import COLOURS, Axis, error_plot
from mistral_trt.validate.poke import Poke, PokeResult, Question
from mistral_trt.validate.probes import probes, random_tokens, scenarios
from mistral_trt.validate.report import (
    HTML_NAME,
    JSON_NAME,
    Report,
    figure,
    number,
    plots,
    render_html,
    write_report,
)
from tests.test_probes import CONFIG

LENGTH = 60
CONTRACT = GraphContract(CONFIG, "fp16", Ring(8, 4), 1, None)


def errors(size: int, scale: float) -> LogitErrors:
    draw = np.random.default_rng(size)
    columns = {
        name: scale * draw.random(size) for name in ("max_abs", "mean_abs", "relative", "cosine", "kl")
    }
    return LogitErrors(**columns, agree=draw.random(size) > 0.1)


def report(scale: float = 1e-5, **changes: object) -> Report:
    """A report of 60 positions; a scale past the limits fails it."""
    plans = scenarios(CONTRACT, LENGTH, weights=1, seed=0)
    results = tuple(ScenarioResult(plan, errors(LENGTH, scale), None) for plan in plans)
    pokes = (PokeResult(Question(26, 27), Poke("q-W", (6,), False), 0, 97),)
    made = Report(
        contract=CONTRACT,
        artifact={
            "name": "tiny", "folder": "onnx", "manifest_sha256": "a" * 64, "graph_sha256": None,
            "versions": {"onnx": "1"},
        },
        reference={"folder": "checkpoint", "sha256": "b" * 64, "implementation": "Hugging Face"},
        executed="The ONNX graph ran. No TensorRT engine was executed.",
        tokens=random_tokens(length=LENGTH, vocab_size=97, seed=0),
        probes=tuple(probes(CONTRACT, LENGTH)),
        scenarios=results,
        pokes=pokes,
        gates=judge(read_gates("fp16"), measure(results, pokes)),
        notes=(),
        run={
            "command": "mistral-trt validate onnx", "seed": 0, "started": "2026-01-01T00:00:00+00:00",
            "seconds": 1.5, "versions": {"torch": "2"},
            "machine": {"processor": "P", "cores": 2, "memory_gb": 8.0, "system": "Linux"},
        },
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def page() -> str:
    return render_html(report())


class _Elements(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "br", "path", "use"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "use"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_record_holds_everything_and_no_nan() -> None:
    found = json.loads(json.dumps(report().to_json(), allow_nan=False))
    assert found["format_version"] == 1
    assert found["verdict"] == "pass"
    assert found["artifact"]["manifest_sha256"] == "a" * 64
    assert found["reference"]["sha256"] == "b" * 64
    assert len(found["tokens"]["sha256"]) == 64
    gate = next(gate for gate in found["gates"] if gate["name"] == "logit_error_max")
    assert gate["at_most"] == 0.5
    assert gate["passed"] is True
    assert gate["value"] == pytest.approx(9.9e-6, rel=0.1)
    for scenario in found["scenarios"]:
        assert {len(values) for values in scenario["per_position"].values()} == {LENGTH}
        assert scenario["summary"]["positions"] == LENGTH
    assert found["pokes"] == [
        {
            "call": "decode at 26", "poke": "q-W", "slots": 1, "expected": "unchanged",
            "changed_logits": 0, "of": 97, "passed": True,
        }
    ]  # fmt: skip


def test_a_number_that_is_not_finite_becomes_null() -> None:
    broken = replace(errors(LENGTH, 1e-5), kl=np.full(LENGTH, np.nan))
    results = tuple(replace(result, errors=broken) for result in report().scenarios)
    gates = judge(read_gates("fp16"), measure(results, ()))
    found = report(scenarios=results, gates=gates)
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["verdict"] == "fail"
    assert data["scenarios"][0]["per_position"]["kl"][0] is None
    assert "none" in render_html(found)


def test_the_verdict_is_one_line_that_names_what_failed() -> None:
    good, bad = report(), report(1.0)
    assert good.verdict.startswith("PASS tiny fp16: 8 gates hold over 240 positions; Logit error, largest: ")
    assert bad.verdict.startswith("FAIL tiny fp16: 5 of 8 gates failed: Logit error, largest: 1 ")
    assert "(at most 0.5), " in bad.verdict
    assert "\n" not in good.verdict + bad.verdict


def test_the_page_says_its_verdict_first(page: str) -> None:
    text = " ".join(_Elements(page).text.split())
    assert text.index("Passed") < text.index("What ran") < text.index("Gates") < text.index("Scenarios")
    failed = " ".join(_Elements(render_html(report(1.0))).text.split())
    assert failed.index("Failed") < failed.index("allowed at most 0.5") < failed.index("What ran")
    assert "Passed" not in failed


def test_the_page_is_well_formed_and_ids_are_unique(page: str) -> None:
    elements = _Elements(page)
    assert elements.open == []
    ids = [value for _, name, value in elements.attributes if name == "id"]
    assert len(ids) > 50
    assert len(ids) == len(set(ids))
    used = [value for _, name, value in elements.attributes if name == "xlink:href"]
    assert used
    assert {value.removeprefix("#") for value in used} <= set(ids)


def test_the_page_loads_nothing(page: str) -> None:
    assert "default-src 'none'" in page
    addresses = set(re.findall(r"[a-z]+://[^\"' ]+", page))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)", page)


def test_the_page_serves_light_dark_print_and_phone(page: str) -> None:
    for query in ("prefers-color-scheme: dark", "@media print", "max-width: 36rem", "width=device-width"):
        assert query in page
    for variable in COLOURS.values():
        name = variable.removeprefix("var(").removesuffix(")")
        assert page.count(f"{name}: ") == 3, "each colour is set for light, dark and print"


def test_what_comes_from_outside_is_escaped() -> None:
    hostile = "<script>alert(1)</script>"
    found = report()
    page = render_html(
        replace(
            found,
            artifact={**found.artifact, "name": hostile, "folder": hostile, "versions": {hostile: hostile}},
            run={**found.run, "command": hostile},
            notes=(hostile,),
            tokens=replace(found.tokens, source=hostile),
        )
    )
    assert hostile not in page
    assert page.count("&lt;script&gt;") >= 6


def test_the_same_numbers_give_the_same_bytes(page: str) -> None:
    assert render_html(report()) == page


def test_pictures_are_xml_without_colours_or_fonts_of_their_own() -> None:
    for name, picture in plots(report()).items():
        ElementTree.fromstring(picture)
        assert picture.startswith("<svg viewBox=")
        assert not re.search(r"#[0-9a-fA-F]{6}\b", picture), f"{name} has a colour that no theme can change"
        assert "font-family" not in picture
        assert "<style" not in picture


def test_pictures_mark_turns_probes_and_the_gate() -> None:
    found = report()
    axis = Axis(CONTRACT, LENGTH, found.probes)
    assert axis.turns()[:4] == [(8, "W"), (12, "R"), (16, "2W"), (24, "3W = 2R")]
    gates = {gate.name: gate for gate in found.gates}
    marked = error_plot(found.scenarios, "max_abs", axis=axis, limit=gates["logit_error_max"], name="a")
    plain = error_plot(found.scenarios, "max_abs", axis=axis, limit=None, name="a")
    assert ">3W = 2R<" in marked
    assert "var(--bad)" in marked
    assert "var(--bad)" not in plain
    assert marked.count("stroke: var(--mark)") >= len(found.scenarios)


def test_of_very_many_turns_only_the_first_are_marked() -> None:
    assert len(Axis(CONTRACT, 2060, ()).turns()) == 5
    assert Axis(replace(CONTRACT, ring=Ring(60, 4), max_context=60), 60, ()).turns() == []


def test_a_scenario_that_broke_is_still_drawn_and_told() -> None:
    first, *others = report().scenarios
    results = (
        replace(first, errors=errors(7, 1e-5), failure="RuntimeError: no <room>"),
        replace(others[0], errors=concatenate([]), failure="RuntimeError: at once"),
    )
    gates = judge(read_gates("fp16"), measure(results, ()))
    page = render_html(report(scenarios=results, gates=gates))
    text = " ".join(_Elements(page).text.split())
    assert "prefill stopped at position 7. RuntimeError: no <room>" in text
    assert "decode stopped at position 0. RuntimeError: at once" in text
    assert "not reached" in text
    nothing = render_html(report(scenarios=(results[1],), gates=gates))
    assert "<svg" not in nothing


def test_a_wrong_poke_is_shown_open() -> None:
    wrong = PokeResult(Question(26, 27), Poke("q-W", (6,), False), 97, 97)
    page = render_html(report(pokes=(wrong,)))
    assert "<details open>" in page
    assert "97 of 97 logits changed" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (2312, "2,312"), (0.106008, "0.106"), (0.99784, "0.9978"), (4.6581, "4.658"),
        (5e-4, "5 × 10⁻⁴"), (1e-7, "10⁻⁷"), (1.53e-4, "1.5 × 10⁻⁴"),
        (float("nan"), "none"), (float("inf"), "infinity"),
    ],
)  # fmt: skip
def test_figures_are_readable(value: float, text: str) -> None:
    assert figure(value) == text


def test_numbers_keep_four_digits() -> None:
    assert number(0.123456) == 0.1235
    assert number(2.0) == 2
    assert number(float("inf")) is None


def test_both_files_are_written(tmp_path: Path) -> None:
    write_report(report(), tmp_path)
    assert json.loads((tmp_path / JSON_NAME).read_text())["verdict"] == "pass"
    assert (tmp_path / HTML_NAME).read_text().startswith("<!doctype html>")
