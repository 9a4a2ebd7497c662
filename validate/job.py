"""The arguments of a validation, checked, and the command line that says the same."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from mistral_trt.errors import ValidationError
from mistral_trt.validate.budget import DEFAULT, Budget


@dataclass(frozen=True)
class Job:
    """What was asked for.

    folder: an ONNX folder, or an engine folder.  onnx: the ONNX folder an engine was built from.
    text: what both sides read, None for the text that comes along; random_tokens: neither.
    length: positions compared, None for the budget's.  streaming: both sides one layer at a time.
    gates: a table that tightens ours.  loras: adapters the artifact was made with, and their scales.
    """

    folder: Path
    reference: Path
    out: Path
    budget: Budget = DEFAULT
    onnx: Path | None = None
    text: Path | None = None
    random_tokens: bool = False
    length: int | None = None
    streaming: bool = False
    gates: Path | None = None
    seed: int = 0
    threads: int | None = None
    loras: tuple[tuple[Path, float], ...] = ()

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValidationError(f"--seed must not be negative, found {self.seed}")
        if self.threads is not None and self.threads < 1:
            raise ValidationError(f"--threads must be at least 1, found {self.threads}")
        if self.random_tokens and self.text is not None:
            raise ValidationError("--text and --random-tokens exclude each other; give one of them")
        for artifact in {self.folder, self.onnx or self.folder}:
            if self.out.resolve().is_relative_to(artifact.resolve()):
                raise ValidationError(
                    f"--out {self.out} lies in the artifact {artifact}, which holds what its manifest lists "
                    "and nothing else; give a folder outside it"
                )

    @property
    def command(self) -> str:
        """The command line that does the same again."""
        words = ["mistral-trt", "validate", self.folder, "--reference", self.reference, "--out", self.out]
        words += [] if self.budget is DEFAULT else [f"--{self.budget.name}"]
        for name in ("onnx", "text", "length", "gates", "threads"):
            value = getattr(self, name)
            words += [] if value is None else [f"--{name}", value]
        for name in ("random_tokens", "streaming"):
            words += [f"--{name.replace('_', '-')}"] if getattr(self, name) else []
        for adapter, scale in self.loras:
            words += ["--lora", f"{adapter}:{scale}"]
        return shlex.join(str(word) for word in [*words, "--seed", self.seed])
