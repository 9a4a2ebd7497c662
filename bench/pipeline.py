"""The whole pipeline on one checkpoint → the figures of docs/measurements.md, as a table and as JSON.

Times are whole processes, started cold; the decode step is the median of 100 steps after ten, with the
ring full. Figures of parts that are not run are kept. Run it on a quiet machine:
python bench/pipeline.py CHECKPOINT --out FILE
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from process import machine

from mistral_trt.manifest import read_manifest
from mistral_trt.runtime.engine import open_cache

PARTS = ("export", "build", "decode", "validate")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    kept = json.loads(args.out.read_text())["figures"] if args.out.is_file() else {}
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        found = measure(args.checkpoint, Path(scratch), args.only)
    figures = {"machine": machine(), "figures": kept | found}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(table(figures["figures"]))
    return 0


def measure(checkpoint: Path, scratch: Path, parts: Sequence[str]) -> dict[str, Any]:
    """precision or GPU → its figures."""
    figures: dict[str, Any] = {}
    for precision in ("fp32", "fp16", "bf16"):
        folder = scratch / f"onnx-{precision}"
        seconds = timed("export", str(checkpoint), "--out", str(folder), "--precision", precision)
        if "export" in parts:
            figures[f"export {precision}"] = {"seconds": seconds, "bytes": total_bytes(folder)}
    for gpu, precision in (("a10g", "fp16"), ("l4", "bf16")) if "build" in parts else ():
        folder = scratch / f"{gpu}-{precision}"
        onnx = str(scratch / f"onnx-{precision}")
        seconds = timed("build", onnx, "--gpu", gpu, "--out", str(folder), "--no-cache")
        figures[f"build {gpu} {precision}"] = {"seconds": seconds, "bytes": total_bytes(folder)}
    for precision in ("fp32", "fp16") if "decode" in parts else ():
        figures[f"decode {precision}"] = decode(scratch / f"onnx-{precision}")
    for precision in ("fp32", "fp16", "bf16") if "validate" in parts else ():
        figures[f"validate {precision}"] = validate(checkpoint, scratch, precision)
    return figures


def decode(folder: Path) -> dict[str, float]:
    """Load time, prefill rate and step time of the ONNX Runtime backend, one row, ring full."""
    started = time.perf_counter()
    cache = open_cache(folder)
    load_s = time.perf_counter() - started
    row, ring = cache.acquire(), cache.contract.ring
    prompt = [i % cache.contract.config.vocab_size for i in range(2 * ring.capacity)]
    started = time.perf_counter()
    cache.append(row, prompt)
    prefill_s = time.perf_counter() - started
    steps = []
    for token in range(110):
        started = time.perf_counter()
        cache.step({row: token})
        steps.append(time.perf_counter() - started)
    return {
        "load_s": round(load_s, 2),
        "prefill_tokens_per_s": round(len(prompt) / prefill_s, 1),
        "step_ms": round(1e3 * statistics.median(steps[10:]), 1),
    }


def validate(checkpoint: Path, scratch: Path, precision: str) -> dict[str, Any]:
    out = scratch / f"report-{precision}"
    onnx = str(scratch / f"onnx-{precision}")
    seconds = timed("validate", onnx, "--reference", str(checkpoint), "--out", str(out))
    report = json.loads((out / "report.json").read_text())
    gates = {gate["name"]: gate["value"] for gate in report["gates"]}
    positions = sum(scenario["summary"]["positions"] for scenario in report["scenarios"])
    return {"seconds": seconds, "verdict": report["verdict"], "positions": positions, **gates}


def timed(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mistral_trt.cli", *arguments], check=True, stdout=sys.stderr)
    return round(time.perf_counter() - started, 1)


def total_bytes(folder: Path) -> int:
    return sum(entry.bytes for entry in read_manifest(folder, check_files=False).files.values())


def table(figures: dict[str, Any]) -> str:
    lines = ["| what | figures |", "| --- | --- |"]
    for name, values in figures.items():
        cells = ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                          for key, value in values.items())  # fmt: skip
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
