"""`junit.xml`: what a CI system counts is what the gates said."""

from dataclasses import replace
from xml.etree import ElementTree

from mistral_trt.validate.report.junit import render_junit
from mistral_trt.validate.report.report import Report
from mistral_trt.validate.verdict.gates import TITLES
from tests.reports import full_report, layer_findings, report


def suite(found: Report) -> ElementTree.Element:
    root = ElementTree.fromstring(render_junit(found))
    (only,) = root
    assert (root.tag, only.tag) == ("testsuites", "testsuite")
    for count in ("tests", "failures", "errors", "skipped"):
        assert root.get(count) == only.get(count)
    return only


def test_there_is_a_case_for_every_gate_and_its_counts_add_up() -> None:
    found = full_report(layers=layer_findings(wrong=7))
    suited = suite(found)
    cases = {str(case.get("name")): case for case in suited.findall("testcase")}
    gates = [*(gate.name for gate in found.gates), *(left.gate.metric for left in found.undecided)]
    assert list(cases) == gates
    assert suited.get("tests") == str(len(cases))
    assert suited.get("failures") == str(len(suited.findall("testcase/failure"))) == "1"
    assert suited.get("skipped") == str(len(suited.findall("testcase/skipped"))) == "2"
    assert suited.get("errors") == "0"
    assert all(case.get("classname") and case.get("time") for case in cases.values())


def test_a_failure_says_value_limit_place_and_reason() -> None:
    found = full_report(layers=layer_findings(wrong=7))
    (failure,) = suite(found).findall("testcase/failure")
    assert failure.get("message") == "Layer update error, worst layer: 0.0864, allowed at most 0.006"
    text = failure.text or ""
    assert "where: layer 7 (position 11)" in text
    assert "why this limit: " in text
    assert failure.get("type") == "gate"


def test_a_gate_that_was_not_run_is_skipped_and_never_a_pass() -> None:
    skipped = {str(case.get("name")): case.find("skipped") for case in suite(report()).findall("testcase")}
    left = skipped["weights_wrong"]
    assert left is not None
    assert left.get("message") == f"{TITLES['weights_wrong']}: not run; allowed at most 0"
    assert skipped["kl_max"] is None


def test_elements_stand_in_the_order_of_the_schema() -> None:
    """Properties, cases, output; a time without a zone."""
    suited = suite(report())
    tags = [element.tag for element in suited]
    assert tags == ["properties", *["testcase"] * int(suited.get("tests", "0")), "system-out"]
    assert suited.get("timestamp") == "2026-01-01T00:00:00"
    assert suited.find("system-out").text == report().verdict  # type: ignore[union-attr]


def test_an_engine_is_named_by_its_hash() -> None:
    def named(found: Report) -> list[str | None]:
        properties = suite(found).findall("properties/property")
        return [entry.get("value") for entry in properties if entry.get("name") == "engine"]

    assert named(full_report()) == ["d" * 64]
    assert named(report()) == []


def test_what_xml_cannot_hold_does_not_break_it() -> None:
    found = report()
    hostile = "a\x00\x1b[31m<b>&\ud800\uffff\"'"
    note = suite(replace(found, notes=(hostile,), artifact={**found.artifact, "name": hostile}))
    assert "a\ufffd\ufffd[31m<b>&\ufffd\ufffd\"'" in (note.find("system-out").text or "")  # type: ignore[union-attr]
