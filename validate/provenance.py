"""What was compared with what, on which machine, and how far it went: the words and hashes of a report."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from mistral_trt.contract import QUANTIZED, GraphContract
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.manifest import Manifest, manifest_sha256, tool_versions
from mistral_trt.validate.polygraphy_run import PolygraphyResult
from mistral_trt.validate.scenarios.poke import late_edge
from mistral_trt.validate.subject import Engine
from mistral_trt.validate.verdict.gates import Undecided

_TOOLS = ("torch", "transformers", "onnxruntime", "onnx", "onnx-ir", "numpy")


def describe_artifact(folder: Path, manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.details.get("name", folder.name),
        "folder": str(folder),
        "stage": manifest.stage,
        "manifest_sha256": manifest_sha256(folder),
        "graph_sha256": manifest.details.get("graph_sha256"),
        "hazards": manifest.details.get("hazards"),
        "lora": manifest.details.get("lora", []),
        "versions": dict(manifest.versions),
        **manifest.contract.to_json(),
    }


def describe_engine(engine: Engine | None, polygraphy: Sequence[PolygraphyResult]) -> dict[str, Any]:
    """`engine`: None, or the engine that was named, where it ran, its audit and Polygraphy's verdicts."""
    if engine is None:
        return {"engine": None}
    details, device = engine.manifest.details, engine.device
    return {
        "engine": {
            "folder": str(engine.folder),
            "manifest_sha256": manifest_sha256(engine.folder),
            **{key: details.get(key) for key in ("gpus", "flavor", "tensorrt", "weights", "audit")},
            "executed_on": None if device is None else device.name,
            "polygraphy": [asdict(result) for result in polygraphy],
        }
    }


def describe_reference(
    source: Checkpoint, contract: GraphContract, *, streaming: bool = False
) -> dict[str, Any]:
    merged = f", adapters merged by {'our reader' if streaming else 'peft'}" if source.adapters else ""
    how = "one layer in memory at a time" if streaming else "MistralForCausalLM whole in memory"
    return {
        "folder": str(source.folder),
        "format": source.format,
        "sha256": source.sources()["checkpoint"],
        "implementation": f"Hugging Face's Mistral, {how}, float32, eager attention, every key kept{merged}",
        "sliding_window": contract.ring.sliding_window,
        "config": source.config.to_json(),
    }


def describe_execution(contract: GraphContract, engine: Engine | None = None) -> str:
    """What ran and what did not, in words for the report."""
    if engine is not None and engine.device is not None:
        return (
            f"The engine ran in TensorRT on {engine.device.name}. Its layers were followed in the ONNX "
            "graph it was built from, in ONNX Runtime on the CPU."
        )
    return f"{_graph_ran(contract)} {_engine_did_not(engine)}"


def _engine_did_not(engine: Engine | None) -> str:
    if engine is None:
        return "No TensorRT engine was executed: that takes the GPU it was built for."
    details = engine.manifest.details
    gpus = ", ".join(details.get("gpus", []))
    return (
        f"The engine {engine.folder.name} ({gpus}, {details.get('flavor')}) was audited when it was "
        "built but not executed: this machine has no GPU. What ran is the graph it was built from."
    )


def _graph_ran(contract: GraphContract) -> str:
    runtime = f"ONNX Runtime {tool_versions('onnxruntime').get('onnxruntime', '')}"
    if contract.cache_dtype == "bfloat16":
        return (
            f"A float32 twin of the ONNX graph ran in {runtime} on the CPU: the same graph over the same "
            "weight bytes, widened to float32, because ONNX Runtime has no bfloat16 kernels there. The "
            "rounding of bfloat16 activations is therefore not part of these numbers."
        )
    dequantized = (
        " Its quantized weights were dequantized when it was loaded, for the numbers to be the graph's: ONNX "
        "Runtime's own INT4 and INT8 kernels also round what the graph does not."
        if contract.precision in QUANTIZED
        else ""
    )
    return f"The ONNX graph ran in {runtime} on the CPU.{dequantized}"


def describe_failures(failures: Mapping[str, str]) -> list[str]:
    """What stopped outside the scenarios, and why.  failures: place → the error in words."""
    names = {
        "greedy": "Greedy generation",
        "poke": "The poke probe",
        "layers": "The run of single layers",
    }
    return [
        f"{names.get(place, place.capitalize())} stopped at a call that failed. {why}"
        for place, why in failures.items()
    ]


def describe_polygraphy(results: Sequence[PolygraphyResult]) -> list[str]:
    """What Polygraphy found apart, and what it could not compare: a sentence for each reason."""
    apart = [
        f"Polygraphy found engine and ONNX graph apart ({found.name}). {_last_line(found.words)}"
        for found in results
        if found.passed is False
    ]
    reasons: dict[str, list[str]] = {}
    for found in results:
        if found.passed is None:
            reasons.setdefault(_last_line(found.words), []).append(found.name)
    left = [f"Polygraphy compared nothing ({', '.join(names)}): {why}" for why, names in reasons.items()]
    return [*apart, *left]


def _last_line(words: str) -> str:
    return words.rsplit("\n", 1)[-1]


def describe_limits(contract: GraphContract, length: int) -> list[str]:
    """What this run did not reach."""
    ring = contract.ring
    if not contract.wraps:
        return [
            f"Sequences end at {contract.max_context} tokens, inside the window, so the ring never wraps: "
            "the poke probe asked slots that hold nothing yet, and the newest token."
        ]
    places = {
        "W": ring.sliding_window,
        "R": ring.capacity,
        "2R": 2 * ring.capacity,
        "3W": 3 * ring.sliding_window,
    }
    missed = [f"{name} ({position})" for name, position in places.items() if position >= length]
    notes = [f"The sequence of {length} tokens ends before {', '.join(missed)}."] if missed else []
    if late_edge(contract, length) < 2 * ring.capacity:
        edge = late_edge(contract, length)
        notes.append(f"The poke probe ran from position {edge}, before the ring had turned twice.")
    return notes


def describe_undecided(left: Sequence[Undecided]) -> list[str]:
    """Which gates decided nothing, and why: a sentence for each reason."""
    reasons: dict[str, list[str]] = {}
    for gate in left:
        reasons.setdefault(gate.why, []).append(gate.title)
    return [f"Not gated ({why}): {'; '.join(titles)}." for why, titles in reasons.items()]


def describe_run(command: str, seed: int, *, started: datetime, seconds: float) -> dict[str, Any]:
    return {
        "command": command,
        "seed": seed,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "system": platform.platform(),
        },
        "versions": tool_versions(*_TOOLS),
    }


def processor_name() -> str:
    """The processor as the kernel names it, or its architecture where the kernel does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
