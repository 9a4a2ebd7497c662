"""Exports of Mistral 7B, whole and cut to four layers → seconds, memory and bytes written, beside peers'.

full         the whole model from bfloat16: to float16 against a plain copy of its files; to bfloat16
slice        four layers to float32
peers        the same four layers to float32, by the exporters of onnxruntime-genai and optimum-onnx
correctness  the float32 slice against its checkpoint

Every run is a process of its own with nothing remembered; before it the checkpoint is read once, so that
the page cache is equally warm, and the disk is at rest. Memory is anonymous memory of the process tree (see
process.py). Figures of parts that are not run are kept, with their date. Run it on a quiet machine.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peer_environment import peer_environment
from process import Measurement, machine, run_measured

ROOT = Path(__file__).resolve().parent.parent
CLI = (sys.executable, "-m", "mistral_trt.cli")
CONFIG = "mistral-7b-v0.1"
LOGIT_ERROR_MAX = 1e-3
LENGTH = 256
PEERS = {
    "onnxruntime-genai": (
        "{bin}/python -m onnxruntime_genai.models.builder -i {checkpoint} -o {out} -p fp32 -e cpu -c {cache}"
    ),
    "optimum-onnx": (
        "{bin}/optimum-cli export onnx --model {checkpoint} --task text-generation-with-past {out}"
    ),
}


@dataclass(frozen=True)
class Bench:
    """Where it works and how often.  scratch: for checkpoints and results."""

    scratch: Path
    full_layers: int | None
    layers: int
    repeat: int


def main() -> int:
    args = parse()
    scratch = args.scratch.resolve() / "bench-export"
    bench = Bench(scratch, args.full_layers, args.layers, args.repeat)
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        for name in (name for name in PARTS if name in args.only):
            say(f"== {name}")
            figures = PARTS[name](bench)
            date = datetime.now(UTC).strftime("%Y-%m-%d")
            results[name] = {"date": date, "machine": machine(), "figures": figures}
            write_results(args.out, results)
    finally:
        tidy(scratch, keep=("full", "slice") if args.keep else ())
    print(table(results))
    failed = (
        "correctness" in args.only and results["correctness"]["figures"]["logit_error_max"] > LOGIT_ERROR_MAX
    )
    return 1 if failed else 0


def write_results(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = {name: results[name] for name in PARTS if name in results}
    path.write_text(json.dumps(ordered, indent=2, ensure_ascii=False) + "\n")


def tidy(scratch: Path, keep: Sequence[str]) -> None:
    for path in scratch.iterdir():
        if path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)
    if not any(scratch.iterdir()):
        scratch.rmdir()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--scratch", type=Path, default=ROOT / "build", metavar="DIR", help="gets a folder bench-export"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=" ".join(PARTS)
    )
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of which the median counts")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="of the slice")
    parser.add_argument("--full-layers", type=int, metavar="N", help="a smaller stand-in for the whole model")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints for the next run")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/export.json", metavar="FILE")
    return parser.parse_args()


# ---------------------------------------------------------------- the parts


def full(bench: Bench) -> dict[str, Any]:
    """A copy and a float16 export in turn, then bfloat16, which needs no new weights."""
    checkpoint, out = synthetic(bench, "full", bench.full_layers), bench.scratch / "full-out"
    copies, converted = [], []
    for _ in range(2):
        copies.append(copy(checkpoint, out))
        converted.append(export(checkpoint, out, precision="fp16", scratch=bench.scratch))
    linked = [export(checkpoint, out, precision="bf16", scratch=bench.scratch) for _ in range(bench.repeat)]
    discard(out)
    return {
        "model": model(bench.full_layers),
        "checkpoint_bytes": sum(path.stat().st_size for path in weights(checkpoint)),
        "copy": summary(copies),
        "fp16": summary(converted),
        "bf16": summary(linked),
        "fp16_seconds_per_copy": round(median_s(converted) / median_s(copies), 2),
    }


def slice_(bench: Bench) -> dict[str, Any]:
    checkpoint, out = synthetic(bench, "slice", bench.layers), bench.scratch / "slice-out"
    runs = [
        export(checkpoint, out, precision="fp32", scratch=bench.scratch) for _ in range(bench.repeat)
    ]  # the last stays for `correctness`
    return {"model": model(bench.layers), "fp32": summary(runs)}


def peers(bench: Bench) -> dict[str, Any]:
    checkpoint, out = synthetic(bench, "slice", bench.layers), bench.scratch / "peer-out"
    figures: dict[str, Any] = {"model": model(bench.layers)}
    for name, words in PEERS.items():
        bin = peer_environment(name) / "bin"
        cache = bench.scratch / "peer-cache"
        command = words.format(bin=bin, checkpoint=checkpoint, out=out, cache=cache).split()
        own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "XDG_CACHE_HOME": str(cache)}
        run = timed(name, command, checkpoint=checkpoint, out=out, env=own)
        figures[name] = {"version": version(name), **summary([run]), "remarks": remarks(run.output)}
        discard(out)
    return figures


def correctness(bench: Bench) -> dict[str, Any]:
    checkpoint, out = synthetic(bench, "slice", bench.layers), bench.scratch / "slice-out"
    if not (out / "manifest.json").is_file():
        export(checkpoint, out, precision="fp32", scratch=bench.scratch)
    report = bench.scratch / "report"
    arguments = ["--reference", str(checkpoint), "--out", str(report), "--length", str(LENGTH)]
    run = run_measured([*CLI, "validate", str(out), *arguments])
    if run.status not in (0, 1):
        sys.exit(f"validate failed:\n{run.output}")
    written = json.loads((report / "report.json").read_text())
    gates = {gate["name"]: gate["value"] for gate in written["gates"]}
    error = gates["logit_error_max"]
    say(f"{written['verdict']}, largest logit error {error:.3g} (at most {LOGIT_ERROR_MAX:g})")
    return {
        "model": model(bench.layers),
        "positions": LENGTH,
        "verdict": written["verdict"],
        "logit_error_max": error,
        **summary([run]),
    }


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "full": full,
    "slice": slice_,
    "peers": peers,
    "correctness": correctness,
}


# ---------------------------------------------------------------- one run


def synthetic(bench: Bench, name: str, layers: int | None) -> Path:
    """The checkpoint of that many layers, made unless it is there and whole."""
    folder = bench.scratch / name
    options = [
        "--config",
        CONFIG,
        *(["--layers", str(layers)] if layers else []),
        "--dtype",
        "bf16",
        "--seed",
        "0",
    ]
    try:
        origin = json.loads((folder / "ORIGIN.json").read_text())
        if origin["source"] == " ".join(["mistral-trt synth", *options]):
            if all((folder / file).is_file() for file in origin["files"]):
                return folder
    except (OSError, ValueError, KeyError):
        pass
    subprocess.run([*CLI, "synth", *options, "--out", str(folder)], check=True, stdout=sys.stderr)
    return folder


def copy(checkpoint: Path, out: Path) -> Measurement:
    """The weights' files copied and on disk: what a conversion of the same size cannot beat by much."""
    words = ["bash", "-c", 'mkdir "${@: -1}" && cp --reflink=never "$@" && sync', "copy"]
    return timed("copy", [*words, *map(str, weights(checkpoint)), str(out)], checkpoint=checkpoint, out=out)


def export(checkpoint: Path, out: Path, *, precision: str, scratch: Path) -> Measurement:
    """One export that remembers no hash of an earlier one."""
    with tempfile.TemporaryDirectory(dir=scratch) as cache:
        command = [*CLI, "export", str(checkpoint), "--out", str(out), "--precision", precision]
        own = {"XDG_CACHE_HOME": cache}
        return timed(f"export {precision}", command, checkpoint=checkpoint, out=out, env=own)


def timed(
    what: str, command: Sequence[str], *, checkpoint: Path, out: Path, env: dict[str, str] | None = None
) -> Measurement:
    """Run it with `out` away, the checkpoint in the page cache as far as it fits, and the disk at rest."""
    discard(out)
    for path in weights(checkpoint):
        read_through(path)
    os.sync()
    run = run_measured(command, env={**os.environ, **(env or {})})
    if run.status:
        sys.exit(f"{' '.join(command)}\nended with status {run.status}:\n{run.output}")
    memory, written = gb(run.peak_anonymous_bytes), gb(run.written_bytes)
    say(f"{what}: {run.seconds:.1f} s, peak {memory} GB, written {written} GB")
    return run


def weights(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("*.safetensors"))


def read_through(path: Path) -> None:
    buffer = bytearray(1 << 24)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def discard(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    os.sync()


# ---------------------------------------------------------------- figures


def summary(runs: Sequence[Measurement]) -> dict[str, Any]:
    """Medians of seconds and bytes written, each run's seconds, and the highest peak."""
    return {
        "seconds": median_s(runs),
        "runs_s": [round(run.seconds, 1) for run in runs],
        "peak_anonymous_bytes": max(run.peak_anonymous_bytes for run in runs),
        "written_bytes": int(statistics.median(run.written_bytes for run in runs)),
    }


def median_s(runs: Sequence[Measurement]) -> float:
    return round(statistics.median(run.seconds for run in runs), 1)


def remarks(output: str) -> list[str]:
    """What an exporter said of its own check."""
    lines = [line.strip() for line in output.replace("\r", "\n").splitlines()]
    return [line for line in lines if "with the warning" in line or "max diff =" in line]


def version(peer: str) -> str:
    lines = (ROOT / "bench/peers" / f"{peer}.txt").read_text().splitlines()
    return next(line.split("==")[1] for line in lines if line.startswith(f"{peer}=="))


def model(layers: int | None) -> str:
    return f"{CONFIG}, {layers} layers" if layers else CONFIG


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown, peers beside ours."""
    lines = ["| what | seconds | peak memory, GB | written, GB | |", "| --- | --- | --- | --- | --- |"]
    parts = {name: part["figures"] for name, part in results.items()}
    if whole := parts.get("full"):
        ratio = f"{whole['fp16_seconds_per_copy']} × the copy"
        lines.append(
            row(f"{whole['model']}: `cp` and `sync`", whole["copy"], f"{gb(whole['checkpoint_bytes'])} GB")
        )
        lines.append(row(f"{whole['model']} → fp16", whole["fp16"], ratio))
        lines.append(row(f"{whole['model']} → bf16", whole["bf16"], ""))
    ours = parts.get("slice")
    if ours:
        lines.append(row(f"{ours['model']} → fp32", ours["fp32"], ""))
    for name in PEERS:
        if peer := parts.get("peers", {}).get(name):
            ratios = compare(peer, ours["fp32"]) if ours and ours["model"] == parts["peers"]["model"] else ""
            lines.append(row(f"the same, {name} {peer['version']}", peer, ratios))
    if checked := parts.get("correctness"):
        error = f"largest logit error {checked['logit_error_max']:.2g} (at most {LOGIT_ERROR_MAX:g})"
        lines.append(row(f"fp32 against PyTorch, {checked['positions']} positions", checked, error))
    said = [
        f"{name}: {line}"
        for name in PEERS
        for line in parts.get("peers", {}).get(name, {}).get("remarks", [])
    ]
    return "\n".join([*lines, "", *said] if said else lines)


def compare(peer: dict[str, Any], ours: dict[str, Any]) -> str:
    seconds = peer["seconds"] / ours["seconds"]
    memory = peer["peak_anonymous_bytes"] / ours["peak_anonymous_bytes"]
    return f"{seconds:.1f} × the time, {memory:.1f} × the memory"


def row(what: str, figures: dict[str, Any], more: str) -> str:
    cells = (figures["seconds"], gb(figures["peak_anonymous_bytes"]), gb(figures["written_bytes"]))
    return f"| {what} | {' | '.join(map(str, cells))} | {more} |"


def gb(count: int) -> str:
    return f"{count / 1e9:.2f}"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
