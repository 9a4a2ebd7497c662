"""What `gpu_acceptance` found → gpu-report.json and a gpu-report.html that needs nothing but itself."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mistral_trt.artifact import write_file

VERDICTS = {
    "passed": "Passed: every step ran on the GPU and holds",
    "failed": "Failed",
    "needs-gpu": "Not decided: the steps that need the GPU were not run",
}
STATES = {"done": "done", "failed": "failed", "needs-gpu": "needs the GPU", "not-run": "not run"}

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #d8d8d8; --soft: #666;
  --done: #14703c; --failed: #b3261e; --needs-gpu: #8a5a00; --not-run: #666; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #161616; --line: #3a3a3a;
  --soft: #9a9a9a; --done: #6fcf97; --failed: #f28b82; --needs-gpu: #e6b450; --not-run: #9a9a9a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h1.failed { color: var(--failed); } h1.passed { color: var(--done); }
h1.needs-gpu { color: var(--needs-gpu); }
table { border-collapse: collapse; width: 100%; } td, th { border-bottom: 1px solid var(--line);
  padding: .35rem .6rem; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.done { color: var(--done); } .failed { color: var(--failed); }
.needs-gpu { color: var(--needs-gpu); } .not-run { color: var(--not-run); }
p.soft, td.soft { color: var(--soft); }
"""


def write_report(report: Mapping[str, Any], out: Path) -> None:
    """Write both files."""
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    write_file(out / "gpu-report.json", text.encode())
    write_file(out / "gpu-report.html", html(report).encode())


def html(report: Mapping[str, Any]) -> str:
    """The page: verdict, what ran where, the steps, their numbers."""
    verdict = report["verdict"]
    device = report["device"]
    where = f"{device['name']}, driver {device['driver']}" if device else "no NVIDIA GPU"
    about = f"{report['model']}, {report['precision']}, for {report['gpu']}; this machine: {where}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(VERDICTS[verdict])}</title><style>{_STYLE}</style></head><body>",
            f'<h1 class="{verdict}">{escape(VERDICTS[verdict])}</h1>',
            f'<p class="soft">{escape(about)}</p>',
            "<table><tr><th>step</th><th>state</th><th>s</th><th>what it says</th></tr>",
            *(_step(step) for step in report["steps"]),
            "</table>",
            *(row for step in report["steps"] if "batches" in step["figures"] for row in _speeds(step)),
            "<h2>Numbers</h2>",
            "<table><tr><th>step</th><th>number</th><th></th></tr>",
            *(row for step in report["steps"] for row in _figures(step)),
            "</table></body></html>",
            "",
        ]
    )


def _step(step: Mapping[str, Any]) -> str:
    said = "<br>".join(escape(line) for line in step["log"])
    state = step["status"]
    return (
        f'<tr><td>{escape(step["name"])}</td><td class="{state}">{STATES[state]}</td>'
        f'<td class="number">{step["seconds"]:.1f}</td><td>{said}</td></tr>'
    )


SPEEDS = (
    ("rows", "batch"),
    ("tokens/s, CUDA graph", "tokens_per_s_graph"),
    ("tokens/s, step by step", "tokens_per_s"),
    ("predicted roofline", "decode_roofline_tokens_per_s"),
    ("%", "decode_percent"),
    ("first token, ms", "first_token_ms"),
    ("predicted roofline, ms", "first_token_roofline_ms"),
    ("%", "first_token_percent"),
    ("every row's, ms", "every_first_token_ms"),
    ("predicted roofline, ms", "every_first_token_roofline_ms"),
    ("%", "every_first_token_percent"),
)
"""Heading → figure of a batch."""


def _speeds(step: Mapping[str, Any]) -> Sequence[str]:
    """One row a batch size, each measurement beside its roofline."""
    prompts = f"Prompts of {step['figures']['prompt_tokens']} tokens arrive together"
    about = f"Decode with a full window. {prompts}, until the first token of one row, and of every row."
    cells = [
        "".join(f'<td class="number">{figures[name]:,}</td>' for _, name in SPEEDS)
        for figures in step["figures"]["batches"]
    ]
    return [
        f"<h2>{escape(step['name'])}</h2>",
        f'<p class="soft">{about}</p>',
        f"<table><tr>{''.join(f'<th>{escape(heading)}</th>' for heading, _ in SPEEDS)}</tr>",
        *(f"<tr>{row}</tr>" for row in cells),
        "</table>",
    ]


def _figures(step: Mapping[str, Any]) -> Sequence[str]:
    numbers = [(key, value) for key, value in step["figures"].items() if isinstance(value, int | float)]
    return [
        f'<tr><td>{escape(step["name"])}</td><td>{escape(key)}</td><td class="number">{value:,}</td></tr>'
        for key, value in numbers
    ]
