"""How much is to be validated, and about how long that takes on this machine.

quick    past one wrap, in chunks, around the probes and over several rows: for every build
default  past four turns of the ring, padding too: what a release rests on
full     past eight turns, and every position decoded step by step: overnight
"""

from dataclasses import dataclass

from mistral_trt.contract import POSITION_ACCURATE_LIMIT, GraphContract
from mistral_trt.errors import ValidationError
from mistral_trt.validate.scenarios.scenario import Name

_STEPWISE_WORK = 2e10
"""Weights times positions up to which every budget decodes step by step: some seconds."""


@dataclass(frozen=True)
class Budget:
    """How much is validated.

    turns: of the ring that a sequence gets past.  positions: at least so many, for shares to mean something.
    own_precision: whether the reference is computed in the artifact's precision too.
    """

    name: str
    turns: int
    positions: int
    names: tuple[Name, ...]
    own_precision: bool

    def length(self, contract: GraphContract) -> int:
        """Positions to compare: past the turns with a chunk to spare, within the artifact's limits.

        default, W=512, C=256 (R=768): 3336.  W=4096, C=256 (R=4352): 17672.
        """
        ring = contract.ring
        spare = ring.prefill_chunk + 8
        length = max(self.turns * ring.capacity, self.positions) + spare
        return min(length, contract.max_context or POSITION_ACCURATE_LIMIT)

    def scenarios(self, *, length: int, weights: int) -> tuple[Name, ...]:
        """What is played.  weights: parameters of the model, to know what is cheap."""
        if "stepwise" in self.names or length * weights > _STEPWISE_WORK:
            return self.names
        return (*self.names, "stepwise")


QUICK = Budget("quick", 1, 256, ("prefill", "decode", "rows"), own_precision=False)
DEFAULT = Budget("default", 4, 2048, ("prefill", "decode", "padded", "rows"), own_precision=True)
FULL = Budget("full", 8, 4096, ("prefill", "decode", "padded", "rows", "stepwise"), own_precision=True)


def check_length(length: int, contract: GraphContract) -> int:
    """Raise ValidationError unless `length` positions can be compared."""
    limit = contract.max_context or POSITION_ACCURATE_LIMIT
    if not 2 <= length <= limit:
        raise ValidationError(f"--length must be from 2 to {limit} for this artifact, found {length}")
    return length
