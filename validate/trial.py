"""What both ways of validating are given, and what both find."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mistral_trt.contract import QUANTIZED, GraphContract
from mistral_trt.export.checkpoint import Checkpoint
from mistral_trt.validate.findings import LayerFindings, WorstCase
from mistral_trt.validate.job import Job
from mistral_trt.validate.reference.fake_quantization import fake_quantized
from mistral_trt.validate.reference.own_precision import Alter
from mistral_trt.validate.scenarios.greedy import GreedyAgreement
from mistral_trt.validate.scenarios.poke import PokeResult
from mistral_trt.validate.scenarios.scenario import Scenario
from mistral_trt.validate.scenarios.tokens import Tokens
from mistral_trt.validate.subject import Subject
from mistral_trt.validate.verdict.quality import READING
from mistral_trt.validate.verdict.scenario_results import OwnPrecision, ScenarioResult


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

    def fake_quantization(self) -> Alter | None:
        """What the artifact's precision does to the linears of a layer beyond its dtype."""
        if self.contract.precision not in QUANTIZED:
            return None
        return fake_quantized(self.folder, self.contract)


@dataclass(frozen=True)
class Findings:
    """What was found.  greedy: None where nothing was generated.  layers, own_precision: None where not run.

    failures: place outside the scenarios → why a call failed there.  notes: what this way leaves out.
    """

    scenarios: tuple[ScenarioResult, ...]
    greedy: GreedyAgreement | None
    pokes: tuple[PokeResult, ...]
    layers: LayerFindings | None
    own_precision: OwnPrecision | None
    worst_cases: tuple[WorstCase, ...]
    failures: Mapping[str, str]
    notes: tuple[str, ...]
