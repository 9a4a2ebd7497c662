"""An artifact folder → what a person wants to know of it."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_trt.manifest import PLAN_NAME, Manifest, manifest_sha256, read_manifest

_COUNTS = ("predicted", "network_layers", "compiled")
"""Sections of an engine's details that are numbers by name."""


def describe(manifest: Manifest) -> list[tuple[str, str]]:
    """The manifest as label and text, most asked first."""
    config, contract, details = manifest.config, manifest.contract, manifest.details
    ring = contract.ring
    end = f"sequences end at {contract.max_context}" if contract.max_context else "no end"
    rows = [
        ("stage", f"{manifest.stage}, {contract.precision}"),
        (
            "model",
            f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, heads "
            f"{config.num_attention_heads}/{config.num_key_value_heads} of {config.head_dim}, "
            f"vocabulary {config.vocab_size}",
        ),
        ("ring", f"W={ring.sliding_window} C={ring.prefill_chunk} R={ring.capacity}; {end}"),
        ("rows", f"{contract.max_batch_size}, {size(contract.ring_bytes_per_row)} of ring each"),
    ]
    for key in ("name", "gpu_name", "flavor", "tensorrt", "weights", "graph_sha256"):
        if isinstance(details.get(key), str):
            rows.append((key.replace("_", " "), details[key]))
    if capabilities := details.get("compute_capabilities"):
        rows.append(("compute capabilities", ", ".join(capabilities)))
    rows += weights_rows(details)
    rows += [(f"from {stage}", sha256) for stage, sha256 in manifest.sources.items()]
    rows += [(name.replace("_", " "), counts(details[name])) for name in _COUNTS if details.get(name)]
    rows += [(f"audit: {row['check']}", row["found"]) for row in details.get("audit", [])]
    if manifest.stage == "engine" and PLAN_NAME in manifest.files:
        rows += plan_rows(manifest)
    rows += [(name, size(entry.bytes)) for name, entry in sorted(manifest.files.items())]
    rows.append(("versions", ", ".join(f"{name} {v}" for name, v in manifest.versions.items())))
    return rows


def plan_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """What can be known of a plan without a GPU."""
    plan, details = manifest.files[PLAN_NAME], manifest.details
    weights = details.get("predicted", {}).get("weights_bytes")
    where = "outside it" if details.get("weights") == "external" else "in it"
    sizes = [size(plan.bytes), *([f"{size(weights)} of weights {where}"] if weights else [])]
    return [("plan", ", ".join(sizes)), ("plan sha256", plan.sha256)]


def weights_rows(details: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was done to the weights on their way from the checkpoint."""
    rows = []
    if quantization := details.get("quantization"):
        rows.append(("quantization", describe_quantization(quantization)))
        if calibration := quantization.get("calibration"):
            rows.append(("calibration", describe_calibration(calibration)))
    if linked := details.get("linked"):
        rows.append(("linked", f"{', '.join(linked)} of the checkpoint"))
    if hazards := details.get("hazards"):
        lost = f"{hazards['subnormal']:,} subnormal, {hazards['flushed_to_zero']:,} flushed to zero"
        worst = hazards["subnormal"] + hazards["flushed_to_zero"] and f", most in {hazards['worst']}"
        rows.append(("hazards", f"in {hazards['dtype']}: {lost}{worst or ''}"))
    if loras := details.get("lora"):
        rows.append(("lora", ", ".join(f"{lora['name']} x {lora['scale']:g}" for lora in loras)))
    return rows


def describe_quantization(quantization: Mapping[str, Any]) -> str:
    """int4 in blocks of 64, inputs float16; 93.0 % of the linears' weights, 3 linears kept in float16"""
    scheme = quantization["scheme"]
    block = f" in blocks of {scheme['block_size']}" if scheme["block_size"] else ""
    return (
        f"{scheme['weights']}{block}, inputs {scheme['activations'] or 'float16'}; "
        f"{100 * quantization['quantized_share']:.1f} % of the linears' weights, "
        f"{len(quantization['kept'])} linears kept in float16"
    )


def describe_calibration(calibration: Mapping[str, Any]) -> str:
    """INT4_AWQ_CFG, 16 x 512 tokens of speeches"""
    amount = f"{calibration['samples']} x {calibration['tokens']} tokens"
    return f"{calibration['algorithm']}, {amount} of {calibration['source']}"


def counts(values: Mapping[str, Any]) -> str:
    """A mapping on one line; what is nested under a name follows it in brackets."""
    parts = [
        f"{key} ({counts(value)})" if isinstance(value, Mapping) else f"{key} {value}"
        for key, value in values.items()
    ]
    return ", ".join(parts)


def size(amount_bytes: int) -> str:
    """Bytes in the decimal unit that keeps them readable."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount_bytes >= scale:
            return f"{amount_bytes / scale:.1f} {unit}"
    return f"{amount_bytes} B"


def inspect(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("mistral-trt inspect", description="What an artifact folder holds.")
    parser.add_argument("artifact", type=Path, help="an ONNX or engine folder")
    parser.add_argument("--json", action="store_true", help="the whole manifest, as JSON")
    args = parser.parse_args(argv)
    manifest = read_manifest(args.artifact)
    if args.json:
        print(json.dumps({"manifest_sha256": manifest_sha256(args.artifact), **manifest.to_json()}, indent=2))
        return 0
    for label, text in [("folder", str(args.artifact)), *describe(manifest)]:
        print(f"{label:<24}{text}")
    return 0
