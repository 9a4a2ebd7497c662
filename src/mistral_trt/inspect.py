"""An artifact folder → what a person wants to know of it."""

import argparse
import json
from pathlib import Path

from mistral_trt.manifest import Manifest, manifest_sha256, read_manifest


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
        ("rows", f"{contract.max_batch_size}, {contract.ring_bytes_per_row / 1e6:.1f} MB of ring each"),
    ]
    for key in ("name", "gpu_name", "compute_capability", "flavor", "tensorrt", "weights", "graph_sha256"):
        if isinstance(details.get(key), str):
            rows.append((key.replace("_", " "), details[key]))
    rows += [(f"from {stage}", sha256) for stage, sha256 in manifest.sources.items()]
    rows += [(name, f"{entry.bytes / 1e6:.1f} MB") for name, entry in sorted(manifest.files.items())]
    rows.append(("versions", ", ".join(f"{name} {v}" for name, v in manifest.versions.items())))
    return rows


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
        print(f"{label:<20}{text}")
    return 0
