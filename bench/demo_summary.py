"""A run folder that `make demo` filled → a short summary on the terminal, and a streamed answer."""

import json
import sys
from pathlib import Path
from typing import Any

from mistral_trt.errors import MistralTrtError
from mistral_trt.manifest import read_manifest
from mistral_trt.runtime import Engine, SamplingParams

QUESTION = "What is gravity?"


def main(run: Path) -> int:
    print(f"\n{run} -> {run.resolve().name}\n")
    manifests = sorted([*run.glob("onnx-*/manifest.json"), *run.glob("engines/*/manifest.json")])
    for folder in (manifest.parent for manifest in manifests):
        files = read_manifest(folder, check_files=False).files.values()
        print(f"  {folder!s:<34}{sum(entry.bytes for entry in files) / 1e6:8.1f} MB")
    for report in sorted(run.glob("report-*/report.json")):
        print(f"\n  {report.with_suffix('.html')}\n    {worst(json.loads(report.read_text()))}")
    print(f"\n  > {QUESTION}\n  ", end="")
    engine = Engine.load(run / "onnx-fp16")
    messages = [{"role": "user", "content": QUESTION}]
    for piece in engine.stream(messages=messages, params=SamplingParams(max_tokens=32)):
        print(piece.text, end="", flush=True)
    print("\n\nThe engine was built and audited here, not executed: that needs its GPU.")
    return 0


def worst(report: dict[str, Any]) -> str:
    """The verdict and the worst logit error beside its gate."""
    gate = next(gate for gate in report["gates"] if gate["name"] == "logit_error_max")
    return (
        f"{report['verdict']}: largest logit error {gate['value']:.3g} (at most {gate['at_most']:g}) "
        f"at {gate['where']}, {gate['positions']} positions"
    )


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except MistralTrtError as error:
        sys.exit(f"{error}\nor remove {Path(sys.argv[1]).resolve()} and run make again")
