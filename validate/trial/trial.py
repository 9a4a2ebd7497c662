"""What both ways of validating are given: the artifact, its checkpoint, the tokens and how they are fed."""

from dataclasses import dataclass
from pathlib import Path

from mistral_trt.contract import GraphContract
from mistral_trt.errors import ManifestError
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.runtime.text.tokenizer import Tokenizer
from mistral_trt.validate.job import Job
from mistral_trt.validate.scenarios.scenario import READING, Scenario
from mistral_trt.validate.scenarios.tokens import Tokens
from mistral_trt.validate.subject import Subject


@dataclass(frozen=True)
class Trial:
    """A validation that is about to be run.  plans: the scenarios, among them the one that is read."""

    job: Job
    subject: Subject
    source: Checkpoint
    tokens: Tokens
    plans: tuple[Scenario, ...]

    @property
    def contract(self) -> GraphContract:
        return self.subject.contract

    @property
    def folder(self) -> Path:
        """Of the graph."""
        return self.subject.folder

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The artifact's, None where it has none that can be read, which is a finding of the weights'."""
        if "tokenizer.json" not in self.subject.manifest.files:
            return None
        try:
            return Tokenizer.from_folder(self.folder)
        except ManifestError:
            return None

    @property
    def reading(self) -> Scenario:
        return next(plan for plan in self.plans if plan.name == READING)

    @property
    def sliding_window(self) -> int:
        """W of the artifact, whatever the checkpoint says."""
        return self.contract.ring.sliding_window

    @property
    def compares_own_precision(self) -> bool:
        """Whether there is a third leg: not where the artifact computes as the reference does."""
        return self.job.budget.own_precision and self.contract.precision != "fp32"


def parameters(source: Checkpoint) -> int:
    """Parameters of the model."""
    return sum(weight.elements for weight in source.weights.values())
