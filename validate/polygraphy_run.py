"""An engine on its GPU + its ONNX folder → what NVIDIA's Polygraphy says of the two.

Polygraphy runs the plan in TensorRT and the graph in ONNX Runtime on the same inputs, past two turns of the
ring, and compares logits and rings; for `layers-…` it builds an engine in which every tensor is an output.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mistral_trt.engines.polygraphy_scripts import write_polygraphy
from mistral_trt.errors import BuildError
from mistral_trt.progress import track
from mistral_trt.validate.subject import Engine, Subject

ENGINE = ("decode", "prefill")
LAYERS = ("layers-decode", "layers-prefill")

_LAST_LINES = 12
_NOT_STARTED = (126, 127)
"""What a shell's exit status is where a command could not be run, or was not found."""


@dataclass(frozen=True)
class PolygraphyResult:
    """One comparison.

    passed: None where it could not be made.  words: the end of what was printed, or why not.
    """

    name: str
    passed: bool | None
    words: str


def run_polygraphy(subject: Subject, engine: Engine, names: Sequence[str]) -> tuple[PolygraphyResult, ...]:
    """Make the named comparisons of `run.sh` (engines/polygraphy_scripts.py), one after another."""
    details = engine.manifest.details
    with tempfile.TemporaryDirectory(prefix="mistral-trt-polygraphy-") as scratch:
        linked = Path(scratch) / "engine"
        linked.symlink_to(engine.folder.resolve(), target_is_directory=True)
        try:
            folder = write_polygraphy(
                subject.folder,
                linked,
                engine.manifest.contract,
                flavor=str(details["flavor"]),
                weights=str(details["weights"]),
            )
        except BuildError as error:
            return tuple(PolygraphyResult(name, None, str(error)) for name in names)
        with track("polygraphy", len(names), unit="comparisons") as advance:
            found = []
            for name in names:
                found.append(_run(folder, name))
                advance(1)
        return tuple(found)


def _run(folder: Path, name: str) -> PolygraphyResult:
    """The commands of this Python come first on the path: Polygraphy is installed beside it."""
    beside = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(
        ["bash", "run.sh", name], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    lines = f"{done.stdout}\n{done.stderr}".strip().splitlines()
    passed = None if done.returncode in _NOT_STARTED else done.returncode == 0
    return PolygraphyResult(name, passed, "\n".join(lines[-_LAST_LINES:]))
