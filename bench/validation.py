"""Healthy tiny artifacts, validated at the default budget → how far each gate's limit is from what they give.

Each seed is a model of its own, exported and calibrated as `mistral-trt export` does it, in every precision.
A gate that fails is a false alarm, and the exit status is 1. Results are held against the limits as they
stand now, so after a limit has been changed nothing needs to be measured again.
"""

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from process import machine
from validation_runs import Runs, run_seeds

from mistral_trt.contract import CACHE_DTYPES
from mistral_trt.manifest import tool_versions
from mistral_trt.validate.verdict.gates import Gate, read_gates

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    args = parse()
    runs = Runs(args.scratch.resolve(), args.precisions)
    run_seeds(runs, args.seeds, processes=args.processes)
    here = machine()
    results = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {**here, "versions": {**here["versions"], **tool_versions("nvidia-modelopt")}},
        "precisions": {precision: summary(runs, precision) for precision in args.precisions},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results["precisions"]))
    return 1 if any(found["false_alarms"] for found in results["precisions"].values()) else 0


def summary(runs: Runs, precision: str) -> dict[str, Any]:
    """Over all seeds that were run: per gate its limit, the worst value and the median, and what failed."""
    paths = sorted(runs.folder.glob(f"results/{precision}-[0-9]*.json"))
    found = [json.loads(path.read_text()) for path in paths]
    by_gate = {gate.metric: over_seeds(gate, found) for gate in read_gates(precision)}
    gates = {metric: values for metric, values in by_gate.items() if values is not None}
    return {
        "seeds": len(found),
        "cpu_seconds": round(sum(run["cpu_seconds"] for run in found), 1),
        "false_alarms": sum(len(gate["failed_seeds"]) for gate in gates.values()),
        "gates": gates,
    }


def over_seeds(gate: Gate, found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The values of one gate, of the seeds in which it decided; None where there are none."""
    values = {run["seed"]: run["gates"][gate.metric]["value"] for run in found if gate.metric in run["gates"]}
    if not values:
        return None
    sign = 1 if gate.bound == "at_most" else -1
    seed = max(values, key=lambda seed: math.inf if math.isnan(values[seed]) else sign * values[seed])
    return {
        gate.bound: gate.limit,
        "seeds": len(values),
        "worst": values[seed],
        "worst_seed": seed,
        "median": statistics.median(values.values()),
        "failed_seeds": [seed for seed, value in sorted(values.items()) if not gate.holds(value)],
    }


def table(precisions: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| precision | gate | limit | worst | median | failed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for precision, found in precisions.items():
        lines.append(
            f"| {precision} | {found['seeds']} seeds, {found['false_alarms']} false alarms | | | | |"
        )
        for metric, gate in found["gates"].items():
            limit = gate.get("at_most", gate.get("at_least"))
            numbers = (limit, gate["worst"], gate["median"], len(gate["failed_seeds"]))
            lines.append(f"| | {metric} | " + " | ".join(f"{number:.3g}" for number in numbers) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50, metavar="N")
    parser.add_argument(
        "--precisions", nargs="+", choices=list(CACHE_DTYPES), default=list(CACHE_DTYPES), metavar="P"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=ROOT / "build/bench-validation",
        metavar="DIR",
        help="keeps the result of each artifact; remove it to measure anew",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/validation.json", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
