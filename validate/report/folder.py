"""A report → the folder of its three files: the page, JUnit's file and, last, the record."""

import json
from pathlib import Path

from mistral_trt.artifact import write_file
from mistral_trt.validate.report.junit import render_junit
from mistral_trt.validate.report.page import render_html
from mistral_trt.validate.report.record import to_json
from mistral_trt.validate.report.report import HTML_NAME, JSON_NAME, JUNIT_NAME, Report


def write_report(report: Report, folder: Path) -> None:
    """Write all three; the record's presence says that they are whole."""
    text = json.dumps(to_json(report), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    write_file(folder / HTML_NAME, render_html(report).encode())
    write_file(folder / JUNIT_NAME, render_junit(report))
    write_file(folder / JSON_NAME, (text + "\n").encode())
