"""Settings of a bench → the checkpoints, tokens and artifacts that its parts work on, each made once."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from process import Measurement, run_measured
from quantization_text import EVALUATION, calibration_folder, speech_paths, token_ids
from torch import Tensor

from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.manifest import read_manifest

CLI = (sys.executable, "-m", "mistral_trt.cli")
WINDOW = 512
"""W of the demo model; every evaluation text crosses it several times."""


@dataclass(frozen=True)
class Bench:
    """Where it works and how much it reads.

    model: the demo model, cut to `layers` where that is given.  tokens: of each evaluation text.
    samples: of calibration.  repeat: decode steps of which the median counts.
    """

    model: Path
    scratch: Path
    speeches: Path
    tokens: int
    samples: int
    layers: int | None
    repeat: int
    exported: dict[str, Path] = field(default_factory=dict)

    @property
    def sample_tokens(self) -> int:
        """Of each calibration sample, BOS included: as many as are read, so that both cross the window.

        Where BOS has left the window, other tokens take the largest activations; scales that never saw it
        clip them (int8, perplexity over float32's: 1.18 with 16 samples of 512 tokens, 1.14 with 4 of 2,048).
        """
        return self.tokens

    @property
    def environment(self) -> Mapping[str, str]:
        """Of exports: they share calibrations with each other and with no earlier run."""
        return {**os.environ, "XDG_CACHE_HOME": str(self.scratch / "cache")}

    def settings(self) -> dict[str, Any]:
        """What the figures depend on, for the results."""
        return {
            "layers": Checkpoint.open(self.model).config.num_hidden_layers,
            "sliding_window": WINDOW,
            "calibration": [self.samples, self.sample_tokens],
            "evaluation": [len(EVALUATION), self.tokens],
        }


def calibration_ids(bench: Bench) -> Tensor:
    """What every export of the bench calibrates on: int64 [samples, tokens]."""
    folder = calibration_folder(bench.speeches, bench.scratch / "calibration")
    ids = token_ids(folder, **_text(bench), samples=bench.samples, tokens=bench.sample_tokens)
    return torch.from_numpy(ids)


def evaluation_ids(bench: Bench) -> list[list[int]]:
    """The beginnings of the evaluation speeches, `tokens` each."""
    paths = speech_paths(bench.speeches, EVALUATION)
    return [token_ids(path, **_text(bench), samples=1, tokens=bench.tokens)[0].tolist() for path in paths]


def _text(bench: Bench) -> dict[str, Any]:
    config = Checkpoint.open(bench.model).raw_config
    return {
        "tokenizer": bench.model / "tokenizer.json",
        "vocab_size": config["vocab_size"],
        "bos": config["bos_token_id"],
    }


def export(bench: Bench, name: str, checkpoint: Path, precision: str, *options: str) -> Path:
    """The artifact of this name, made unless this run has made it."""
    if name not in bench.exported:
        calibration = calibration_folder(bench.speeches, bench.scratch / "calibration")
        words = [
            *(str(checkpoint), "--out", str(bench.scratch / name), "--precision", precision),
            *("--sliding-window", str(WINDOW), "--max-batch-size", "1", "--calibration", str(calibration)),
            *("--calibration-samples", str(bench.samples), "--calibration-tokens", str(bench.sample_tokens)),
        ]
        run_cli("export", *words, *options, env=bench.environment)
        bench.exported[name] = bench.scratch / name
    return bench.exported[name]


def quantization_of(artifact: Path) -> dict[str, Any]:
    """What the manifest says of the quantized linears."""
    found: dict[str, Any] = read_manifest(artifact, check_files=False).details["quantization"]
    return found


def run_cli(*words: str, env: Mapping[str, str] | None = None) -> None:
    """One command of mistral-trt, its progress on stderr. Ends the bench if it fails."""
    done = subprocess.run([*CLI, *words], env=env, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"mistral-trt {words[0]} ended with status {done.returncode}; see above")


def measure_cli(*words: str, env: Mapping[str, str]) -> Measurement:
    """The same, measured as a process of its own."""
    run = run_measured([*CLI, *words], env=env)
    if run.status:
        sys.exit(f"mistral-trt {words[0]} ended with status {run.status}:\n{run.output}")
    return run


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
