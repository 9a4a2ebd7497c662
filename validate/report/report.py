"""Results of a validation → its verdict; `record`, `page` and `junit` write down what is gathered here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mistral_trt.contract import GraphContract
from mistral_trt.validate.findings import LayerFindings, WeightFindings, WorstCase
from mistral_trt.validate.report.figures import figure
from mistral_trt.validate.scenarios.poke import PokeResult
from mistral_trt.validate.scenarios.probes import Probe
from mistral_trt.validate.scenarios.tokens import Tokens
from mistral_trt.validate.verdict.gates import GateResult, Undecided
from mistral_trt.validate.verdict.parts import Offender, first_offender
from mistral_trt.validate.verdict.quality import Quality
from mistral_trt.validate.verdict.scenario_results import OwnPrecision, ScenarioResult

FORMAT_VERSION = 3
JSON_NAME, HTML_NAME, JUNIT_NAME = "report.json", "report.html", "junit.xml"

_HEADLINES = (("perplexity_ratio", "logit_error_max"), ("kl_max", "kl_mean"), ("top1_agreement",))
"""What a verdict and the head of the page show: of each group the first that is gated."""


@dataclass(frozen=True)
class Report:
    """Everything a validation found.

    artifact, reference: what was compared, by hash.  executed: what ran, and what did not.
    undecided: gates that nothing was held against.
    weights, layers, own_precision, worst_cases: None where that part was not run.
    quantization: details.quantization of the artifact's manifest, None where nothing is quantized.
    run: the command, versions, machine, duration.  notes: what a reader has to know beside the numbers.
    """

    contract: GraphContract
    artifact: Mapping[str, Any]
    reference: Mapping[str, Any]
    executed: str
    tokens: Tokens
    probes: tuple[Probe, ...]
    scenarios: tuple[ScenarioResult, ...]
    pokes: tuple[PokeResult, ...]
    gates: tuple[GateResult, ...]
    undecided: tuple[Undecided, ...]
    weights: WeightFindings | None
    layers: LayerFindings | None
    own_precision: OwnPrecision | None
    worst_cases: tuple[WorstCase, ...] | None
    quality: Quality
    quantization: Mapping[str, Any] | None
    notes: tuple[str, ...]
    run: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    @property
    def failed(self) -> list[GateResult]:
        return [gate for gate in self.gates if not gate.passed]

    @property
    def headlines(self) -> list[GateResult]:
        """The gates that are shown first."""
        gates = {gate.name: gate for gate in self.gates}
        found = [next((gates[name] for name in group if name in gates), None) for group in _HEADLINES]
        return [gate for gate in found if gate is not None]

    def limit(self, metric: str) -> float | None:
        """Limit of a gate that decided, None where there is none."""
        return next((gate.gate.limit for gate in self.gates if gate.name == metric), None)

    @property
    def offender(self) -> Offender | None:
        """The layer to look at first, if one is wrong or stands out."""
        if self.layers is None:
            return None
        return first_offender(self.layers, self.limit("layer_update_error_max"))

    @property
    def positions(self) -> int:
        """Positions compared, all scenarios together."""
        return sum(len(result.errors) for result in self.scenarios)

    @property
    def verdict(self) -> str:
        """One line.  PASS demo fp16: 9 gates hold over 6,936 positions; Logit error, largest: 0.106 …"""
        name = f"{self.artifact['name']} {self.contract.precision}"
        if self.failed:
            found = "; ".join(describe(gate) for gate in self.failed)
            first = f"; {self.offender.words}" if self.offender else ""
            return f"FAIL {name}: {len(self.failed)} of {len(self.gates)} gates failed: {found}{first}"
        found = "; ".join(describe(gate) for gate in self.headlines)
        short = self.contract.wraps and len(self.tokens.ids) <= self.contract.ring.capacity
        unseen = " (the ring never turned)" if short else ""
        gates = f"{len(self.gates)} gates hold over {self.positions:,} positions{unseen}"
        left = f", {len(self.undecided)} not decided" if self.undecided else ""
        return f"PASS {name}: {gates}{left}; {found}"


def describe(result: GateResult) -> str:
    """Logit error, largest: 0.106 (at most 0.5)"""
    bound = result.gate.bound.replace("_", " ")
    where = f", {result.measured.where}" if result.measured.where and not result.passed else ""
    return f"{result.title}: {figure(result.measured.value)} ({bound} {figure(result.gate.limit)}){where}"
