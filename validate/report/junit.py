"""A report → `junit.xml`, which CI systems show as tests: a suite for the validation, a case for each gate.

A gate that failed is a failure, one that decided nothing is skipped.
"""

import re
from datetime import datetime
from xml.etree import ElementTree

from mistral_trt.validate.report.figures import figure
from mistral_trt.validate.report.report import Report
from mistral_trt.validate.verdict.gates import Gate, GateResult, Undecided

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no way to write, not even escaped."""


def render_junit(report: Report) -> bytes:
    """The file, UTF-8 with its declaration. Times of single gates are not known and stand as 0."""
    name = f"mistral-trt validate {report.artifact['name']} {report.contract.precision}"
    counts = {
        "tests": len(report.gates) + len(report.undecided),
        "failures": len(report.failed),
        "errors": 0,
        "skipped": len(report.undecided),
        "time": report.run["seconds"],
    }
    root = _element("testsuites", name=name, **counts)
    started = datetime.fromisoformat(report.run["started"]).replace(tzinfo=None)  # the schema takes no zone
    suite = _element("testsuite", name=name, **counts, timestamp=started.isoformat(timespec="seconds"))
    root.append(suite)
    properties = _element("properties")
    properties.extend(_element("property", name=key, value=value) for key, value in _facts(report).items())
    suite.append(properties)
    suite.extend(_decided(result, report) for result in report.gates)
    suite.extend(_skipped(left, report) for left in report.undecided)
    output = _element("system-out")
    output.text = _clean("\n".join([report.verdict, *report.notes]))
    suite.append(output)
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _facts(report: Report) -> dict[str, object]:
    engine = report.artifact["engine"]
    return {
        "artifact": report.artifact["manifest_sha256"],
        **({} if engine is None else {"engine": engine["manifest_sha256"]}),
        "reference": report.reference["sha256"],
        "tokens": report.tokens.sha256,
        "command": report.run["command"],
    }


def _decided(result: GateResult, report: Report) -> ElementTree.Element:
    case = _case(result.gate, report)
    if not result.passed:
        found = f"{result.title}: {figure(result.measured.value)}, {_allowed(result.gate)}"
        failure = _element("failure", type="gate", message=found)
        where = f"where: {result.measured.where}\n" if result.measured.where else ""
        failure.text = _clean(f"{found}\n{where}why this limit: {result.gate.reason}")
        case.append(failure)
    return case


def _skipped(left: Undecided, report: Report) -> ElementTree.Element:
    case = _case(left.gate, report)
    case.append(_element("skipped", message=f"{left.title}: {left.why}; {_allowed(left.gate)}"))
    return case


def _case(gate: Gate, report: Report) -> ElementTree.Element:
    return _element(
        "testcase", classname=f"mistral-trt.{report.contract.precision}", name=gate.metric, time=0
    )


def _allowed(gate: Gate) -> str:
    return f"allowed {gate.bound.replace('_', ' ')} {figure(gate.limit)}"


def _element(tag: str, **attributes: object) -> ElementTree.Element:
    return ElementTree.Element(tag, {key: _clean(str(value)) for key, value in attributes.items()})


def _clean(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
