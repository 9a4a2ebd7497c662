"""Engine builds of Mistral 7B at several depths → seconds, memory and plan size, beside what was predicted.

For an A10G with TensorRT-RTX, two profiles, 8 rows, chunks of 256, in fp16, int8 and int4, weights embedded
in the plan and external to it. The constants of the memory model (engines/planning/build_memory.py) are
fitted to the shallow builds; the deep ones judge them. What the build itself refuses for want of memory is
not run.

Bounds: deep builds within 15 % of the prediction; external within 60 s and 2 GB; embedded int8 and int4
within 20 GB. What build_memory.py holds must foretell each deep build within 2 % of what the fitted constants
do. One ONNX folder exists at a time; its figures are written before the next. Run it on a quiet machine with
30 GB of disk free.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from build_fit import Constants, Point, fit, predicted
from build_models import CLI, PRECISIONS, onnx_folder
from process import Measurement, machine, run_measured

from mistral_trt.artifact import write_file
from mistral_trt.engines.planning.build_memory import BuildMemory, build_memory
from mistral_trt.manifest import read_manifest
from mistral_trt.weight_index import EMBEDDED, EXTERNAL

ROOT = Path(__file__).resolve().parent.parent
ROWS = 8
ERROR_MAX = 0.15
SHIFT_MAX = 0.02
EXTERNAL_SECONDS_MAX, EXTERNAL_BYTES_MAX = 60.0, 2e9
EMBEDDED_BYTES_MAX = 20e9
MODES = (EXTERNAL, EMBEDDED)

Runner = Callable[..., Measurement]
Shipped = Callable[[str, str], BuildMemory]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.judge:
        about, points = stored(args.out)
    else:
        about = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "config": args.config}
        points = build_all(args, about)
    results = write(args, about, points)
    print(table(results))
    return 1 if results["failures"] else 0


def build_all(args: argparse.Namespace, about: dict[str, Any]) -> list[Point]:
    """Every build; what is measured is written after each folder, so that a run that is killed leaves it."""
    args.scratch.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    for layers in sorted(args.layers):
        for precision in args.precisions:
            points += measure(args, precision, layers)
            write(args, about, points)
    return points


def write(args: argparse.Namespace, about: dict[str, Any], points: Sequence[Point]) -> dict[str, Any]:
    """Judge the points and put them, with what was found, into args.out."""
    results = {**about, **judge(points, args.fit)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_file(args.out, (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
    return results


def stored(path: Path) -> tuple[dict[str, Any], list[Point]]:
    """What a run said of itself, and its points."""
    try:
        results = json.loads(path.read_text())
        points = [
            Point(**{field.name: row[field.name] for field in fields(Point)}) for row in results["builds"]
        ]
        return {name: results[name] for name in ("date", "machine", "config")}, points
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(
            f"--judge: expected the results of a run in {path}, found none ({type(error).__name__}: "
            f"{error}); run: python bench/build.py --out {path}"
        )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="mistral-7b-v0.1", metavar="NAME", help="of mistral-trt synth")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32], metavar="N")
    parser.add_argument("--fit", type=int, nargs="+", default=[4, 8], metavar="N", help="depths to fit to")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--weights", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "bench-build", metavar="DIR")
    parser.add_argument(
        "--artifacts",
        type=Path,
        metavar="DIR",
        help="ONNX folders {precision}-{layers} to use where they are",
    )
    parser.add_argument("--judge", action="store_true", help="build nothing: judge what --out holds anew")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/build.json", metavar="FILE")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, precision: str, layers: int) -> list[Point]:
    """Every build of one ONNX folder, which is made for it and deleted after it unless it was there."""
    own = args.artifacts and args.artifacts / f"{precision}-{layers}"
    if own and (own / "manifest.json").is_file():
        return [build_point(own, weights, args.scratch) for weights in args.weights]
    folder = onnx_folder(args.config, precision, layers, args.scratch)
    try:
        return [build_point(folder, weights, args.scratch) for weights in args.weights]
    finally:
        shutil.rmtree(folder)


def build_point(onnx: Path, weights: str, scratch: Path, run: Runner = run_measured) -> Point:
    """One build as a process of its own, with a cache of its own. Ends the bench if it fails."""
    source = read_manifest(onnx, check_files=False)
    quantized = source.details.get("quantization", {}).get("quantized_bytes", 0)
    layers = source.contract.config.num_hidden_layers
    about = (source.contract.precision, weights, layers, source.details["weights_bytes"], quantized)
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        out = Path(place) / "engine"
        words = [*CLI, "build", str(onnx), "--gpu", "a10g", "--flavor", "tensorrt-rtx", "--out", str(out)]
        words += ["--weights", weights, "--max-batch-size", str(ROWS)]
        taken = run(words, env=cache_in(Path(place)))
        if taken.status == 2 and "predicted: the build needs" in taken.output:
            return Point(*about, round(taken.seconds, 1), note=taken.output.strip().splitlines()[-1])
        if taken.status:
            sys.exit(f"{' '.join(words)}\nended with status {taken.status}:\n{taken.output}")
        details = read_manifest(out, "engine", check_files=False).details
    print(f"{about[:3]}: {taken.seconds:.1f} s, {taken.peak_anonymous_bytes / 1e9:.2f} GB", file=sys.stderr)
    return Point(
        *about,
        round(taken.seconds, 1),
        peak_bytes=taken.peak_anonymous_bytes,
        plan_bytes=details["plan_bytes"],
        activation_bytes=sum(details["compiled"].get("activation_bytes", {}).values()),
        predicted_activation_bytes=details["predicted"]["activation_bytes"],
    )


def cache_in(folder: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}


# ---------------------------------------------------------------- figures


def judge(points: Sequence[Point], fitted: Sequence[int], shipped: Shipped | None = None) -> dict[str, Any]:
    """Constants from the builds of the depths `fitted`, every build beside them, and what broke a bound.

    shipped: the constants in use, which must foretell the judged builds as the fitted ones do; None for those
    of build_memory.py.
    """
    in_use = shipped or build_memory
    constants = fit([point for point in points if point.layers in fitted])
    rows = [row(point, constants, deep=point.layers not in fitted, shipped=in_use) for point in points]
    return {
        "constants": {f"{precision} {weights}": to_json(c) for (precision, weights), c in constants.items()},
        "builds": rows,
        "failures": [f"{name_of(found)}: {why}" for found in rows for why in found["failures"]],
    }


def to_json(line: BuildMemory) -> dict[str, float]:
    """Its own constants, without those of the line it is never below."""
    return {name: value for name, value in vars(line).items() if name != "least"}


def row(point: Point, constants: Constants, *, deep: bool, shipped: Shipped) -> dict[str, Any]:
    """One build as JSON.  deep: judged by the constants, not among what they were fitted to."""
    known, in_use = point.series in constants, predicted(shipped(*point.series), point)
    expected = predicted(constants[point.series], point) if known else in_use
    error = None if point.peak_bytes is None else round(expected / point.peak_bytes - 1, 3)
    found = {**vars(point), "predicted_bytes": expected, "shipped_bytes": in_use, "error": error}
    found["judged"] = deep and known
    return {**found, "failures": [*unfit(found, deep), *broken(found)]}


def unfit(found: dict[str, Any], deep: bool) -> list[str]:
    """What keeps a deep build from judging the constants in use."""
    if not deep:
        return []
    if not found["judged"]:
        return ["its series was not fitted, so nothing judges it; build the depths of --fit as well"]
    expected, in_use = found["predicted_bytes"], found["shipped_bytes"]
    if abs(in_use / expected - 1) <= SHIFT_MAX:
        return []
    return [
        f"build_memory.py foretells {gb(in_use)} GB and the fitted constants {gb(expected)}; put those below "
        "into it"
    ]


def broken(found: dict[str, Any]) -> list[str]:
    """The bounds that a build breaks."""
    peak, expected = found["peak_bytes"], found["predicted_bytes"]
    if peak is None:
        must_fit = found["weights"] == EXTERNAL or found["precision"] != "fp16"
        return ["it has to fit, and was refused: is the machine quiet?"] if must_fit else []
    bounds = [
        (
            found["judged"] and abs(found["error"] or 0) > ERROR_MAX,
            f"predicted {gb(expected)} GB, took {gb(peak)}",
        ),
    ]
    if found["weights"] == EXTERNAL:
        seconds = found["seconds"]
        bounds.append((seconds > EXTERNAL_SECONDS_MAX, f"{seconds} s, at most {EXTERNAL_SECONDS_MAX:g}"))
        bounds.append((peak > EXTERNAL_BYTES_MAX, f"{gb(peak)} GB, at most {gb(EXTERNAL_BYTES_MAX)}"))
    elif found["precision"] != "fp16":
        bounds.append((peak > EMBEDDED_BYTES_MAX, f"{gb(peak)} GB, at most {gb(EMBEDDED_BYTES_MAX)}"))
    return [why for failed, why in bounds if failed]


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown, then the lines of engines/planning/build_memory.py that were fitted."""
    head = ("build", "layers", "seconds", "peak memory, GB", "predicted, GB", "error", "plan, MB")
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for found in results["builds"]:
        refused = found["peak_bytes"] is None
        fitted = f"{found['precision']} {found['weights']}" in results["constants"]
        how = "" if found["judged"] else " (fitted)" if fitted else " (not judged)"
        cells = (
            f"{found['precision']} {found['weights']}",
            str(found["layers"]),
            str(found["seconds"]),
            "refused before it starts" if refused else gb(found["peak_bytes"]),
            gb(found["predicted_bytes"]),
            "" if refused else f"{found['error'] + 0.0:+.1%}{how}",
            "" if refused else f"{found['plan_bytes'] / 1e6:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(constant_line(name, c) for name, c in results["constants"].items())]
    return "\n".join([*lines, *(f"FAILED {why}" for why in results["failures"])])


def constant_line(name: str, c: dict[str, Any]) -> str:
    """fp16 embedded: BuildMemory(-200_000_000, 0, 0.000, 1.674)"""
    numbers = f"{c['base_bytes']:_}, {c['layer_bytes']:_}, {c['quantized_factor']:.3f}, {c['factor']:.3f}"
    return f"{name}: BuildMemory({numbers})"


def name_of(found: dict[str, Any]) -> str:
    return f"{found['precision']} {found['weights']}, {found['layers']} layers"


def gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


if __name__ == "__main__":
    sys.exit(main())
