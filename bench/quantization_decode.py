"""`decode` and `scale`: what INT8 and INT4 save at full width, and what making them takes at full size.

Both work on Mistral 7B v0.1 with random weights. A decode step is timed in ONNX Runtime past the window,
with the rings full of random numbers; all precisions step in turn, and the kernels' times are from ONNX
Runtime's profiler over the same steps.
"""

import gc
import json
import re
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from quantization_checks import Check
from quantization_reading import session_options
from quantization_runs import Bench, measure_cli, run_cli, say

from mistral_trt.runtime.cache import RollingCache, RowSnapshot
from mistral_trt.runtime.engine import open_cache

CONFIG = "mistral-7b-v0.1"
SLICE_LAYERS, POSITION, WARM_UP = 4, 5000, 2
LINEARS_MIN = {"int4": 5.0, "int8-weight-only": 2.5, "int8": 1.7}
STEP_MIN = {"int4": 2.0, "int8-weight-only": 1.4, "int8": 1.2}
FUSED = {
    "fp32": "MatMul",
    "int4": "MatMulNBits",
    "int8-weight-only": "MatMulNBits",
    "int8": "MatMulIntegerToFloat",
}
"""Precision → the one kernel that a linear is in ONNX Runtime's optimized graph."""
PEAK_MAX_BYTES = 4e9

_LINEAR = "_proj"
"""In the name of every node that is part of a linear, casts and QuantizeLinear included."""
_KERNEL = "_kernel_time"
_PHASE = re.compile(r"^(calibrating|weights)\b.*? in ([\d.]+) s", re.MULTILINE)


# ---------------------------------------------------------------- decode


@dataclass
class Profiled:
    """An artifact whose every step is timed and profiled.  profile: the beginning of the profiler's path."""

    cache: RollingCache
    row: int
    profile: Path
    steps_s: list[float]

    @classmethod
    def open(cls, artifact: Path, profile: Path, *, position: int) -> "Profiled":
        """Load it and put its row at `position`, the rings full of random numbers."""

        def profiled(options: Any) -> None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
            options.add_session_config_entry("session.force_spinning_stop", "1")  # others step meanwhile

        with session_options(profiled):
            cache = open_cache(artifact, trust_weights=True)
        row, rng = cache.acquire(), np.random.default_rng(0)
        dtype = cache.contract.cache_dtype
        shape = cache.snapshot(row).rings[0].shape
        rings = [rng.standard_normal(shape, dtype=np.float32).astype(dtype) for _ in cache.contract.past()]
        cache.restore(row, RowSnapshot(position, tuple(rings)))
        return cls(cache, row, profile, [])

    def step(self) -> None:
        started = time.perf_counter()
        self.cache.step({self.row: 1})
        self.steps_s.append(time.perf_counter() - started)


def decode(bench: Bench) -> dict[str, Any]:
    """fp32, int4, int8-weight-only and int8 of the slice, step by step in turn."""
    layers = min(SLICE_LAYERS, bench.layers or SLICE_LAYERS)
    checkpoint = synthetic(bench, layers)
    artifacts = {precision: export_slice(bench, checkpoint, precision) for precision in FUSED}
    figures: dict[str, Any] = {"model": f"{CONFIG}, {layers} layers", "position": POSITION}
    figures |= time_steps(artifacts, bench.scratch, position=POSITION, repeat=bench.repeat)
    shutil.rmtree(checkpoint)
    for folder in artifacts.values():
        shutil.rmtree(folder)
    return {"figures": figures, "checks": decode_checks(figures, 7 * layers), "remarks": []}


def export_slice(bench: Bench, checkpoint: Path, precision: str) -> Path:
    out = bench.scratch / f"slice-{precision}"
    small = [] if precision == "fp32" else ["--calibration-samples", "2", "--calibration-tokens", "64"]
    options = ["--precision", precision, "--max-batch-size", "1", *small]
    run_cli("export", str(checkpoint), "--out", str(out), *options, env=bench.environment)
    return out


def time_steps(
    artifacts: Mapping[str, Path], scratch: Path, *, position: int, repeat: int
) -> dict[str, dict[str, Any]]:
    """Precision → median of a whole step and of its linears' kernels, and what kernels those are."""
    for path in scratch.glob("profile-*.json"):
        path.unlink()
    opened = {}
    for precision, artifact in artifacts.items():
        say(f"{precision}: loading {artifact.name}")
        opened[precision] = Profiled.open(artifact, scratch / f"profile-{precision}", position=position)
    say(f"{WARM_UP} + {repeat} steps of each in turn, from position {position}")
    for _ in range(WARM_UP + repeat):
        for profiled in opened.values():
            profiled.step()
    steps_s = {precision: profiled.steps_s[WARM_UP:] for precision, profiled in opened.items()}
    opened.clear()
    del profiled
    gc.collect()  # a session writes its profile when it goes
    return {
        precision: {
            "step_ms": round(1e3 * statistics.median(steps), 2),
            **linears_of(scratch.glob(f"profile-{precision}_*.json").__next__()),
        }
        for precision, steps in steps_s.items()
    }


def linears_of(profile: Path) -> dict[str, Any]:
    """Median time of a step's linears from a profile, and their kernels by operator."""
    events = json.loads(profile.read_text())
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")[WARM_UP:]
    kernels = [
        event
        for event in events
        if event["cat"] == "Node" and _LINEAR in event["name"] and event["name"].endswith(_KERNEL)
    ]
    steps = [[event for event in kernels if start <= event["ts"] < end] for start, end in runs]
    sums_us = [sum(event["dur"] for event in step) for step in steps]
    return {
        "linears_ms": round(statistics.median(sums_us) / 1e3, 3),
        "linear_kernels": dict(Counter(event["args"]["op_name"] for event in steps[0]).most_common()),
    }


def decode_checks(figures: Mapping[str, Any], linears: int) -> list[Check]:
    """How many times faster than fp32, and whether every linear is one fused kernel."""
    base = figures["fp32"]
    checks = [Check("fp32: step, ms", base["step_ms"]), Check("fp32: its linears, ms", base["linears_ms"])]
    for precision in LINEARS_MIN:
        found = figures[precision]
        faster = base["linears_ms"] / found["linears_ms"], base["step_ms"] / found["step_ms"]
        fused = found["linear_kernels"].get(FUSED[precision], 0)
        checks += [
            Check(f"{precision}: step, ms", found["step_ms"]),
            Check(f"{precision}: linears × faster than fp32", faster[0], at_least=LINEARS_MIN[precision]),
            Check(f"{precision}: step × faster than fp32", faster[1], at_least=STEP_MIN[precision]),
            Check(f"{precision}: linears that are one {FUSED[precision]}", fused, at_least=linears),
        ]
    return checks


# ---------------------------------------------------------------- scale


def scale(bench: Bench) -> dict[str, Any]:
    """int8 and int4 of the whole model: peak memory, and the wall time with its split."""
    checkpoint = synthetic(bench, bench.layers)
    layers = bench.layers or 32
    found: dict[str, Any] = {"model": f"{CONFIG}, {layers} layers", "calibration": [8, 256]}
    checks = []
    for precision in ("int8", "int4"):
        found[precision] = export_whole(bench, checkpoint, precision)
        peak = found[precision]["peak_anonymous_bytes"]
        checks += [
            Check(f"{precision}, {layers} layers: peak memory, GB", peak / 1e9, at_most=PEAK_MAX_BYTES / 1e9),
            *(Check(f"{precision}: {name}", value) for name, value in found[precision]["seconds"].items()),
        ]
    shutil.rmtree(checkpoint)
    return {"figures": found, "checks": checks, "remarks": []}


def export_whole(bench: Bench, checkpoint: Path, precision: str) -> dict[str, Any]:
    out = bench.scratch / f"whole-{precision}"
    say(f"{precision}: the whole model, measured as a process of its own, which prints nothing until its end")
    options = ["--calibration-samples", "8", "--calibration-tokens", "256", "--max-batch-size", "1"]
    words = [str(checkpoint), "--out", str(out), "--precision", precision, *options]
    run = measure_cli("export", *words, env=bench.environment)
    shutil.rmtree(out)
    return {
        "peak_anonymous_bytes": run.peak_anonymous_bytes,
        "written_bytes": run.written_bytes,
        "seconds": split_seconds(run.output, run.seconds),
    }


def split_seconds(output: str, seconds: float) -> dict[str, float]:
    """Seconds of the whole and of its phases, as the export's log tells; the rest is tracing and start-up.

    Raises ValueError if the log names no end of a phase.
    """
    phases = {phase: float(took) for phase, took in _PHASE.findall(output)}
    if missing := {"calibrating", "weights"} - set(phases):
        raise ValueError(
            f"expected the export's log to tell how long {sorted(missing)} took: {output[-400:]}"
        )
    calibrating, weights = phases["calibrating"], phases["weights"]
    return {
        "seconds": round(seconds, 1),
        "calibrating, seconds": calibrating,
        "writing weights, seconds": weights,
        "tracing and the rest, seconds": round(seconds - calibrating - weights, 1),
    }


def synthetic(bench: Bench, layers: int | None) -> Path:
    """Random weights in bfloat16, made anew."""
    out = bench.scratch / "synthetic"
    shutil.rmtree(out, ignore_errors=True)
    shorter = [] if layers is None else ["--layers", str(layers)]
    run_cli("synth", "--config", CONFIG, *shorter, "--dtype", "bf16", "--seed", "0", "--out", str(out))
    return out
