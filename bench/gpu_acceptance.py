"""A checkpoint + the GPU it is for → what no machine without that GPU can show, step by step, as a report.

    python bench/gpu_acceptance.py CHECKPOINT --gpu a10g --precision fp16 --out DIR

Exit status: 0 everything was done and holds, 1 a step failed, 3 nothing failed but steps that need the GPU
were not run, because it is not here (`make` makes 2 of both). Whatever needs no GPU is done for real.
"""

import argparse
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_checks import Bench, against_onnxruntime, against_pytorch, cuda_graph, load, speed
from gpu_report import write_report

from mistral_trt.devices import Device
from mistral_trt.engines.flavor import FULL, RTX, Flavor
from mistral_trt.engines.gpu import GpuTarget, find_gpu
from mistral_trt.engines.targets import group_targets
from mistral_trt.engines.versions import install_command
from mistral_trt.errors import MistralTrtError
from mistral_trt.manifest import read_manifest
from mistral_trt.runtime.device import local_device
from mistral_trt.runtime.tensorrt.api import load_modules

DONE, FAILED, NEEDS_GPU, NOT_RUN = "done", "failed", "needs-gpu", "not-run"
EXIT = {"passed": 0, "failed": 1, "needs-gpu": 3}

GPU_STEPS: tuple[tuple[str, Callable[[Bench], dict[str, Any]]], ...] = (
    ("load", load),
    ("compare with ONNX Runtime", against_onnxruntime),
    ("compare with PyTorch", against_pytorch),
    ("CUDA graph", cuda_graph),
    ("speed", speed),
)
"""What is done with each engine on the GPU; `load` opens it, so what follows needs it."""


@dataclass(frozen=True)
class Job:
    """What was asked for.  length: positions compared, None for enough to turn the ring twice."""

    model: Path
    gpu: str
    precision: str
    out: Path
    length: int | None = None
    export: tuple[str, ...] = ()


@dataclass
class StepResult:
    """One step.  figures: what it measured.  log: what it said."""

    name: str
    status: str = DONE
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    own, options = words, []
    if "--" in words:  # what follows is for `mistral-trt export`
        own, options = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--gpu", required=True)
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--length", type=int)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(own)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        report = accept(Job(args.model, args.gpu, args.precision, args.out, args.length, tuple(options)))
    except MistralTrtError as error:
        print(f"gpu-acceptance: {error}", file=sys.stderr)
        return 2
    for step in report["steps"]:
        print(f"{step['status']:<10}{step['name']}", *step["log"][-1:], sep="  ")
    print(f"{report['verdict']}: {args.out / 'gpu-report.html'}")
    return EXIT[report["verdict"]]


def accept(
    job: Job,
    find_device: Callable[[], Device | None] = local_device,
    modules: Callable[[str], tuple[Any, Any]] = load_modules,
) -> dict[str, Any]:
    """Run every step, write `gpu-report.json` and `gpu-report.html`, and return the report.

    modules: flavour → TensorRT and the CUDA runtime; the tests give a simulation.
    """
    target = group_targets(
        [find_gpu(job.gpu)], job.precision, RTX.name
    ).smallest  # refuses what it cannot run
    job.out.mkdir(parents=True, exist_ok=True)
    device = find_device()
    steps = [run(StepResult("environment"), environment, target, device)]
    steps.append(run(StepResult("export"), export, job))
    engines: dict[str, Path] = {}
    if steps[-1].status == DONE:
        steps += [build(job, target, flavor, engines) for flavor in (FULL, RTX)]
    for name, folder in engines.items():
        steps += on_gpu(
            name,
            missing(target, device),
            Bench(job.model, job.out / "onnx", folder, modules, find_device, job.length),
        )
    if not engines and not any(step.status == FAILED for step in steps):
        why = missing(target, device) or "no TensorRT here can build this engine: not run"
        steps += [StepResult(name, NEEDS_GPU, log=[why]) for name, _ in GPU_STEPS]
    report = {
        "verdict": verdict(steps),
        "gpu": target.name,
        "device": asdict(device) if device else None,
        "model": str(job.model),
        "precision": job.precision,
        "steps": [asdict(step) for step in steps],
    }
    write_report(report, job.out)
    return report


def missing(target: GpuTarget, device: Device | None) -> str | None:
    """Why steps that need the GPU cannot run here, None if they can."""
    if device is None:
        return f"needs an NVIDIA GPU ({target.name}), and this machine has none: not run"
    if not target.answers_to(device.name):
        return f"needs an {target.name}, and this machine has an {device.name}: not run"
    return None


def verdict(steps: Sequence[StepResult]) -> str:
    states = {step.status for step in steps}
    return "failed" if FAILED in states else "needs-gpu" if NEEDS_GPU in states else "passed"


def run(step: StepResult, work: Callable[..., dict[str, Any]], *arguments: Any) -> StepResult:
    """Time `work` and note what it gives; an exception of any kind is a failed step, not the end."""
    started = time.perf_counter()
    try:
        step.figures = work(*arguments)
        step.log += step.figures.pop("log", [])
        if step.figures.get("failures"):
            step.status = FAILED
    except Exception as error:  # TensorRT, CUDA and ONNX Runtime each have classes of their own
        step.status = FAILED
        step.log.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
    step.seconds = round(time.perf_counter() - started, 2)
    return step


def environment(target: GpuTarget, device: Device | None) -> dict[str, Any]:
    """What `mistral-trt doctor` says of this machine. That something is missing is no failure here."""
    done = command("doctor", "--json", "--gpu", target.key)
    found = json.loads(done.stdout) if done.stdout.strip() else {}
    names = ", ".join(f.name for f in (FULL, RTX) if f.installed) or "no TensorRT"
    return {"doctor": found, "log": [f"{device.name if device else 'no NVIDIA GPU'}; {names} installed"]}


def export(job: Job) -> dict[str, Any]:
    out = job.out / "onnx"
    options = ["--precision", job.precision, *job.export]
    done = command("export", str(job.model), "--out", str(out), *options, check=True)
    bytes_written = sum(entry.bytes for entry in read_manifest(out, "onnx").files.values())
    return {"bytes": bytes_written, "log": [*_tail(done.stderr), f"{bytes_written / 1e9:.3f} GB"]}


def build(job: Job, target: GpuTarget, flavor: Flavor, engines: dict[str, Path]) -> StepResult:
    """Build with one flavour; a flavour that is not installed or not for this GPU is not run."""
    step = StepResult(f"build with {flavor.name}")
    if not flavor.installed:
        step.status, step.log = NOT_RUN, [f"not installed; run: {install_command(flavor.name)}"]
        return step
    possible = command("gpus", "--check", target.key, "--precision", job.precision, "--flavor", flavor.name)
    if possible.returncode:
        full = flavor.name == FULL.name
        step.status, step.log = NEEDS_GPU if full else NOT_RUN, _tail(possible.stderr)
        return step
    folder = job.out / "engines" / flavor.name
    run(step, _build, job, target, flavor.name, folder)
    if step.status == DONE:
        engines[flavor.name] = folder
    return step


def _build(job: Job, target: GpuTarget, flavor: str, folder: Path) -> dict[str, Any]:
    onnx = str(job.out / "onnx")
    words = ("build", onnx, "--gpu", target.key, "--flavor", flavor, "--out", str(folder), "--no-cache")
    done = command(*words, check=True)
    manifest = read_manifest(folder, "engine")
    details = manifest.details
    size = manifest.files["model.plan"].bytes
    return {
        "plan_bytes": size,
        "tensorrt": details["tensorrt"],
        "weights": details["weights"],
        "predicted": details["predicted"],
        "log": [*_tail(done.stderr), f"{flavor} {details['tensorrt']}, plan of {size / 1e6:.1f} MB"],
    }


def on_gpu(name: str, why_not: str | None, bench: Bench) -> list[StepResult]:
    """The steps that need the GPU, with one engine."""
    steps = [StepResult(f"{title}, {name}") for title, _ in GPU_STEPS]
    if why_not:
        for step in steps:
            step.status, step.log = NEEDS_GPU, [why_not]
        return steps
    try:
        for step, (_, work) in zip(steps, GPU_STEPS, strict=True):
            if bench.backend is None and step is not steps[0]:
                step.status, step.log = NOT_RUN, ["the engine did not load"]
            else:
                run(step, work, bench)
    finally:
        bench.close()
    return steps


def command(*arguments: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    """Run mistral-trt. With check, raises RuntimeError with its last words if it fails."""
    words = [sys.executable, "-m", "mistral_trt.cli", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        raise RuntimeError(" ".join(_tail(done.stderr)) or f"mistral-trt {arguments[0]} failed")
    return done


def _tail(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()][-3:]


if __name__ == "__main__":
    sys.exit(main())
