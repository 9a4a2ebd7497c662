"""Mistral 7B at full width and depth, seeded random weights → its float16 artifact validated, layer by layer.

wrap   the artifact exported with a window of 256 tokens, `mistral-trt validate --streaming --quick`, past one
       turn of its ring
poke   the artifact with its own window of 4,096 tokens: the poke probe of one layer, past two turns

Both artifacts lie over the same weight files. Memory is anonymous memory, sampled every 0.1 s (process.py);
mapped weights come on top as far as the machine has room. Exit status 1 if a gate or a probe fails or the
memory is above its bound. Figures of parts that are not run are kept, with their date.
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from process import Measurement, machine, run_measured

from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.manifest import manifest_sha256, read_manifest
from mistral_trt.validate.budget import QUICK
from mistral_trt.validate.job import Job
from mistral_trt.validate.scenarios.tokens import random_tokens
from mistral_trt.validate.subject import open_subject
from mistral_trt.validate.trial.streaming import poke_layer
from mistral_trt.validate.trial.trial import Trial

ROOT = Path(__file__).resolve().parent.parent
CLI = (sys.executable, "-m", "mistral_trt.cli")
CONFIG = "mistral-7b-v0.1"
WINDOW = 256
MEMORY_MAX_BYTES = 8_000_000_000


def main() -> int:
    args = parse()
    scratch = args.scratch.resolve()
    checkpoint, own, short = scratch / "checkpoint", scratch / "onnx", scratch / f"onnx-{WINDOW}"
    if args.probe:
        return probe(own, checkpoint, args.layer)
    make(checkpoint, own, short, layers=args.layers)
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    parts = {
        "wrap": lambda: wrap(short, checkpoint, scratch / "report"),
        "poke": lambda: poke(scratch, args.layer),
    }
    for name in args.only:
        results[name] = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "artifact": identity({"wrap": short, "poke": own}[name]),
            **parts[name](),
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    if not args.keep:
        shutil.rmtree(scratch)
    return 0 if all(results[name]["passed"] for name in args.only) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "full_size.json")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "full-size", help="29 GB")
    parser.add_argument("--layers", type=int, help="only the first N layers")
    parser.add_argument("--layer", type=int, default=0, help="the one that is poked")
    parser.add_argument("--only", nargs="+", choices=("wrap", "poke"), default=["wrap", "poke"])
    parser.add_argument("--keep", action="store_true", help="do not remove what was made")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def make(checkpoint: Path, own: Path, short: Path, *, layers: int | None) -> None:
    """The checkpoint in float16, so that both artifacts refer into hard links of its files."""
    cut = [] if layers is None else ["--layers", str(layers)]
    commands: list[tuple[Path, list[str]]] = [
        (checkpoint, ["synth", "--config", CONFIG, "--dtype", "fp16", *cut, "--out", str(checkpoint)]),
        (own, ["export", str(checkpoint), "--precision", "fp16", "--out", str(own)]),
        (
            short,
            [
                *["export", str(checkpoint), "--precision", "fp16", "--out", str(short)],
                *["--sliding-window", str(WINDOW)],
            ],
        ),
    ]
    for folder, command in commands:
        if not folder.is_dir():
            require_done(run_measured([*CLI, *command]))


def identity(folder: Path) -> dict[str, Any]:
    """What names an artifact, and that its weights are links."""
    manifest = read_manifest(folder, check_files=None)
    links = min((folder / name).stat().st_nlink for name in manifest.details["linked"])
    return {
        "manifest_sha256": manifest_sha256(folder),
        "graph_sha256": manifest.details["graph_sha256"],
        "layers": manifest.contract.config.num_hidden_layers,
        "sliding_window": manifest.contract.ring.sliding_window,
        "ring_capacity": manifest.contract.ring.capacity,
        "names_of_each_weight_file": links,
    }


def wrap(folder: Path, checkpoint: Path, out: Path) -> dict[str, Any]:
    """The command a person would type."""
    words = ["validate", str(folder), "--reference", str(checkpoint), "--out", str(out)]
    done = run_measured([*CLI, *words, "--streaming", "--quick"])
    if done.status not in (0, 1):
        require_done(done)
    report = json.loads((out / "report.json").read_text())
    return {
        "passed": report["verdict"] == "pass" and done.peak_anonymous_bytes <= MEMORY_MAX_BYTES,
        "summary": report["summary"],
        "positions": report["tokens"]["count"],
        "seconds": round(done.seconds),
        "predicted_seconds": report["run"]["predicted_seconds"],
        "peak_anonymous_gb": round(done.peak_anonymous_bytes / 1e9, 2),
        "gates": {gate["name"]: gate["value"] for gate in report["gates"]},
    }


def poke(scratch: Path, layer: int) -> dict[str, Any]:
    """In a process of its own, so that its memory is its own."""
    command = [sys.executable, __file__, "--probe", "--scratch", str(scratch), "--layer", str(layer)]
    done = run_measured(command)
    found = json.loads(require_done(done).splitlines()[-1])
    memory = done.peak_anonymous_bytes
    return {
        "passed": not found["failed"] and memory <= MEMORY_MAX_BYTES,
        "layer": layer,
        "seconds": round(done.seconds),
        "peak_anonymous_gb": round(memory / 1e9, 2),
        **found,
    }


def probe(folder: Path, checkpoint: Path, layer: int) -> int:
    """Put the poke probe to one layer; a line of JSON."""
    subject = open_subject(folder, None)
    ring, config = subject.contract.ring, subject.contract.config
    length = 2 * ring.capacity + ring.prefill_chunk + 8
    tokens = random_tokens(length=length, vocab_size=config.vocab_size, seed=0)
    job = Job(folder, checkpoint, folder.parent / "unused", budget=QUICK)
    results, failure = poke_layer(Trial(job, subject, Checkpoint.open(checkpoint), tokens, ()), layer)
    failed = [asdict(result) for result in results if not result.passed]
    calls = sorted({result.question.stop - 1 for result in results})
    print(
        json.dumps(
            {"pokes": len(results), "last_positions": calls, "failed": failed + [failure][failure is None :]}
        )
    )
    return 0


def require_done(done: Measurement) -> str:
    """What a command printed. Ends the bench where it failed."""
    if done.status:
        sys.exit(f"a command ended with status {done.status}:\n{done.output}")
    return done.output


if __name__ == "__main__":
    sys.exit(main())
