"""The runtime on a tiny model → what it costs beside the graph, as a table of figures and bounds.

import    seconds to import mistral_trt.runtime
overhead  host time of a decode step: everything but the backend's run
peer      whole decode steps beside onnxruntime-genai's on the same weights, in turn
rhythm    time to first token and inter-token gaps: 1 stream, 8 streams, beside a long prompt's prefill
position  a step at position 40 W beside one at 2 W, in turn
memory    what 50,000 tokens of one stream leave behind

The model has one layer, hidden size 64 and a vocabulary of 32,000; one thread computes it. Figures of parts
that are not run are kept, with their date. Exit status 1 if a bound is not kept. Run it on a quiet machine.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from process import anonymous_bytes, machine
from quantization_checks import Check, failed, table
from runtime_model import export, make_checkpoint
from runtime_peer import MODES, compare
from runtime_rhythm import prompt_of, rhythm
from runtime_steps import microseconds, overheads, steps, timed_runs

from mistral_trt.runtime import Engine, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
IMPORT_MAX_S = 0.3
OVERHEAD_MAX_US = {"greedy": 150, "top-p": 500}
"""Of one row."""
POSITION_MAX = 1.05
GROWTH_MAX_BYTES = 5_000_000
IMPORT = "import time; t = time.perf_counter(); import mistral_trt.runtime; print(time.perf_counter() - t)"
PROMPT = [0, *range(3, 34)]


@dataclass(frozen=True)
class Bench:
    """What the parts work on, and how often.  steps: of each overhead.  tokens: of `memory`."""

    checkpoint: Path
    artifact: Path
    scratch: Path
    threads: int
    steps: int
    tokens: int
    repeat: int

    def settings(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("threads", "steps", "tokens", "repeat")}

    def engine(self) -> Engine:
        return Engine.load(self.artifact, threads=self.threads)


def main() -> int:
    args = parse()
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    scratch = args.scratch.resolve() / "bench-runtime"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        checkpoint = make_checkpoint(scratch / "checkpoint")
        artifact = export(checkpoint, scratch / "onnx")
        bench = Bench(checkpoint, artifact, scratch, args.threads, args.steps, args.tokens, args.repeat)
        for name in (name for name in PARTS if name in args.only):
            say(f"== {name}")
            results[name] = run_part(name, bench)
            write_results(args.out, results)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(table(results))
    return 1 if failed(results[name] for name in args.only) else 0


def run_part(name: str, bench: Bench) -> dict[str, Any]:
    found = PARTS[name](bench)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "settings": bench.settings(),
        **found,
        "checks": [check.to_json() for check in found["checks"]],
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = {name: results[name] for name in PARTS if name in results}
    path.write_text(json.dumps(ordered, indent=2, ensure_ascii=False) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="of ONNX Runtime, ours and the peer's"
    )
    parser.add_argument("--steps", type=int, default=2500, metavar="N", help="of which a median is taken")
    parser.add_argument("--tokens", type=int, default=50_000, metavar="N", help="of the memory part")
    parser.add_argument("--repeat", type=int, default=30, metavar="N", help="blocks of steps taken in turn")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build", metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/runtime.json", metavar="FILE")
    return parser.parse_args()


# ---------------------------------------------------------------- the parts


def import_(bench: Bench) -> dict[str, Any]:
    """In fresh processes, the first of which does not count."""
    words = [sys.executable, "-c", IMPORT]
    runs = [subprocess.run(words, check=True, capture_output=True, text=True) for _ in range(12)]
    seconds = statistics.median(float(run.stdout) for run in runs[1:])
    checks = [Check("import mistral_trt.runtime, seconds", seconds, at_most=IMPORT_MAX_S)]
    return {"figures": {"import_s": round(seconds, 3)}, "checks": checks, "remarks": []}


def overhead(bench: Bench) -> dict[str, Any]:
    """Greedy and top-p, on one row and on all."""
    figures: dict[str, Any] = {}
    with bench.engine() as engine:
        for mode in MODES:
            for rows in (1, engine.manifest.contract.max_batch_size):
                figures[f"{mode}, {rows} row(s)"] = overhead_of(engine, mode, rows, bench.steps)
    checks = []
    for what, of in figures.items():
        bound = OVERHEAD_MAX_US[what.split(",")[0]] if what.endswith(" 1 row(s)") else None
        checks += [
            Check(f"{what}: host time of a step, median, µs", of["host"]["median_us"], at_most=bound),
            Check(f"{what}: backend's run, median, µs", of["run"]["median_us"]),
        ]
    return {"figures": figures, "checks": checks, "remarks": []}


def overhead_of(engine: Engine, mode: str, rows: int, count: int) -> dict[str, Any]:
    """Of one stream, or of a batch that fills the rows."""
    # The first token is prefill's, and between count + 1 decode runs there are count gaps.
    params = SamplingParams(max_tokens=count + 2, ignore_eos=True, seed=0, **MODES[mode])
    with timed_runs() as runs:
        if rows == 1:
            for _ in engine.stream(PROMPT, params):
                pass
        else:
            engine.generate([PROMPT] * rows, params)
    decoding = [run.seconds for run in runs if run.decodes and run.rows == rows]
    return {"host": microseconds(overheads(runs, rows)), "run": microseconds(decoding)}


def peer(bench: Bench) -> dict[str, Any]:
    return compare(
        bench.checkpoint, bench.artifact, bench.scratch, blocks=bench.repeat, threads=bench.threads
    )


def rhythm_(bench: Bench) -> dict[str, Any]:
    with bench.engine() as engine:
        return rhythm(engine, tokens=bench.steps)


def position(bench: Bench) -> dict[str, Any]:
    """A hundred steps from 2 W on and a hundred from 40 W on, in turn."""
    found: dict[int, list[float]] = {2: [], 40: []}
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    with bench.engine() as engine:
        for windows in [2, 40] * bench.repeat:
            with timed_runs() as runs:
                for _ in engine.stream(prompt_of(engine, windows), params):
                    pass
            found[windows] += steps(runs, 1)
    early, late = (statistics.median(found[windows]) for windows in (2, 40))
    checks = [
        Check("whole step at position 2 W, µs", 1e6 * early),
        Check("whole step at position 40 W, × as long", late / early, at_most=POSITION_MAX),
    ]
    figures = {f"{windows} W": microseconds(times) for windows, times in found.items()}
    return {"figures": figures, "checks": checks, "remarks": []}


def memory(bench: Bench) -> dict[str, Any]:
    """Anonymous memory of this process, at 25 places of a stream; the first of them does not count."""
    params = SamplingParams(max_tokens=bench.tokens, ignore_eos=True)
    samples, every = [], max(1, bench.tokens // 25)
    with bench.engine() as engine:
        for count, _ in enumerate(engine.stream(PROMPT, params)):
            if count % every == 0:
                samples.append(anonymous_bytes(os.getpid()))
    growth = samples[-1] - samples[1]
    what = f"growth of memory over {bench.tokens:,} tokens, MB"
    checks = [Check(what, growth / 1e6, at_most=GROWTH_MAX_BYTES / 1e6)]
    return {"figures": {"anonymous_bytes": samples}, "checks": checks, "remarks": []}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "import": import_,
    "overhead": overhead,
    "peer": peer,
    "rhythm": rhythm_,
    "position": position,
    "memory": memory,
}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
