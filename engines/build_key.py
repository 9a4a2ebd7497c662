"""ONNX folder + target + versions → the key of a build: two builds of one key make plans that may stand in
for each other.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mistral_trt import __version__
from mistral_trt.manifest import Manifest
from mistral_trt.weight_index import EMBEDDED

BUILD_VERSION = 1
"""Raise it when the same ONNX folder, target and versions give another plan, or other details of it, than
before: after a change to how the network is parsed, rewired, configured or looked at. A release does so by
itself, because mistral-trt's version is part of the key; this is for the time between.
"""

_VERSIONS = {"tensorrt": "tensorrt", "mistral_trt": "mistral-trt", "build_version": "build version"}


@dataclass(frozen=True)
class BuildKey:
    """What a plan depends on, by name; the values are what JSON can hold."""

    parts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """32 hex digits; it names the folder of the plan in the cache."""
        text = json.dumps(dict(self.parts), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def changes_since(self, other: Mapping[str, Any]) -> list[str]:
        """["tensorrt 1.7.0 → 1.7.1"]: the versions that differ; empty if anything else does, or nothing."""
        if set(other) != set(self.parts):
            return []
        changed = [name for name in self.parts if other[name] != self.parts[name]]
        if not set(changed) <= set(_VERSIONS):
            return []
        return [f"{_VERSIONS[name]} {other[name]} → {self.parts[name]}" for name in changed]


def build_key(
    source: Manifest,
    *,
    compute_capabilities: Sequence[str],
    flavor: str,
    tensorrt: str,
    weights: str,
    device: str | None = None,
) -> BuildKey:
    """The key of a build from the ONNX folder `source`.

    weights: "embedded" or "external"; a plan without its weights depends on the graph alone.  tensorrt: its
    version.  device: name of the GPU here for full TensorRT, which chooses kernels by timing them on it; None
    for TensorRT-RTX.
    """
    texts = set(source.details["text_files"])
    files = {name: entry.sha256 for name, entry in sorted(source.files.items()) if name not in texts}
    graph = {"files": files} if weights == EMBEDDED else {"graph": source.details["graph_sha256"]}
    return BuildKey(
        {
            **graph,
            "config": source.config.to_json(),
            "contract": source.contract.to_json(),
            "weights": weights,
            "compute_capabilities": list(compute_capabilities),
            "flavor": flavor,
            "device": device,
            "tensorrt": tensorrt,
            "mistral_trt": __version__,
            "build_version": BUILD_VERSION,
        }
    )
