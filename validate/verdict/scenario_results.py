"""What the scenarios gave: errors against the reference, and against it in the artifact's own precision."""

from dataclasses import dataclass

from mistral_trt.validate.metrics import LogitErrors
from mistral_trt.validate.scenarios.scenario import Scenario


@dataclass(frozen=True)
class ScenarioResult:
    """What a scenario gave: errors of the positions it reached, and why it stopped short if it did."""

    scenario: Scenario
    errors: LogitErrors
    failure: str | None


@dataclass(frozen=True)
class OwnPrecision:
    """The reference computed in the artifact's own precision: what rounding alone does.

    words: how.  scenarios: the artifact's logits against it, in the order they were played.  reference: its
    own against the float32 reference's, at every position.
    """

    words: str
    scenarios: tuple[ScenarioResult, ...]
    reference: LogitErrors
