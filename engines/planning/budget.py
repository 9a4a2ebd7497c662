"""ONNX manifest + GPU → what a build and its engine will need, predicted.

Nothing here is measured when it is printed: `build_memory` and `sizes` say where their constants come from.
"""

from dataclasses import dataclass, replace

from mistral_trt.contract import GraphContract
from mistral_trt.engines.gpu import GpuTarget
from mistral_trt.engines.planning.build_memory import BuildMemory, build_memory
from mistral_trt.engines.planning.sizes import activation_bytes, logits_bytes
from mistral_trt.errors import BuildError
from mistral_trt.weight_index import EMBEDDED, EXTERNAL

RESERVE_BYTES = 1_600_000_000
"""What an engine cannot have of the total that nvidia-smi prints: 0.3 to 0.8 GB that the driver keeps (people
report 79.25 GiB of an A100's 80 for CUDA, 23.68 of an RTX 4090's 23.99), and as much again for the CUDA
context, kernels and what is lost between allocations, which was not measured."""

_PLAN_BASE_BYTES = 40_000_000  # of an embedded plan beside its weights: 13 to 37 MB for 32 layers
# Without weights, layers of a 7B: fp16 4 MB of 1 and 6 of 2; int8 10 of 2 and 107 of 32. The largest counts.
_EXTERNAL_PLAN_BASE_BYTES, _EXTERNAL_PLAN_LAYER_BYTES = 5_000_000, 3_200_000
_PLAN_TOLERANCE = 0.05


@dataclass(frozen=True)
class Budget:
    """Predicted bytes of one engine and its build.

    weights_bytes: all weights.  quantized_bytes: the codes and scales among them.
    weights: "embedded" in the plan, or "external".
    """

    contract: GraphContract
    weights_bytes: int
    quantized_bytes: int = 0
    weights: str = EMBEDDED

    @property
    def max_batch_size(self) -> int:
        return self.contract.max_batch_size

    @property
    def ring_bytes_per_row(self) -> int:
        return self.contract.ring_bytes_per_row

    @property
    def rings_bytes(self) -> int:
        return self.ring_bytes_per_row * self.max_batch_size

    @property
    def activation_bytes(self) -> int:
        return activation_bytes(self.contract)

    @property
    def logits_bytes(self) -> int:
        return logits_bytes(self.contract)

    @property
    def engine_bytes(self) -> int:
        """GPU memory that the engine itself takes: weights, rings of every row, activations and logits."""
        return self.weights_bytes + self.rings_bytes + self.activation_bytes + self.logits_bytes

    @property
    def device_bytes(self) -> int:
        """What a GPU must have by nvidia-smi's count."""
        return self.engine_bytes + RESERVE_BYTES

    @property
    def build_constants(self) -> BuildMemory:
        return build_memory(self.contract.precision, self.weights)

    @property
    def build_memory_bytes(self) -> int:
        """Peak of anonymous memory while the plan is built."""
        other = self.weights_bytes - self.quantized_bytes
        layers = self.contract.config.num_hidden_layers
        return self.build_constants.peak_bytes(
            layers, quantized_bytes=self.quantized_bytes, other_bytes=other
        )

    @property
    def plan_bytes(self) -> int:
        if self.weights == EMBEDDED:
            return self.weights_bytes + _PLAN_BASE_BYTES
        layers = self.contract.config.num_hidden_layers
        return _EXTERNAL_PLAN_BASE_BYTES + _EXTERNAL_PLAN_LAYER_BYTES * layers

    def disk_bytes(self, *, linked: bool = True) -> int:
        """What the engine folder takes of the disk.  linked: external weights are hard links, not copies."""
        copies = self.weights == EXTERNAL and not linked
        return self.plan_bytes + (self.weights_bytes if copies else 0)

    def with_rows(self, max_batch_size: int) -> "Budget":
        return replace(self, contract=replace(self.contract, max_batch_size=max_batch_size))

    def fits(self, gpu: GpuTarget) -> bool:
        return self.engine_bytes <= usable_bytes(gpu)

    def rows_that_fit(self, gpu: GpuTarget) -> int:
        """The largest max_batch_size that fits, 0 if not even one row does."""
        low, high = 0, max(1, usable_bytes(gpu) // self.ring_bytes_per_row + 1)
        while high - low > 1:  # `low` rows fit, `high` rows do not
            middle = (low + high) // 2
            low, high = (middle, high) if self.with_rows(middle).fits(gpu) else (low, middle)
        return low

    def to_json(self) -> dict[str, int]:
        """The manifest's `predicted` section."""
        return {
            "weights_bytes": self.weights_bytes,
            "ring_bytes_per_row": self.ring_bytes_per_row,
            "max_batch_size": self.max_batch_size,
            "activation_bytes": self.activation_bytes,
            "logits_bytes": self.logits_bytes,
            "reserve_bytes": RESERVE_BYTES,
            "device_bytes": self.device_bytes,
            "build_memory_bytes": self.build_memory_bytes,
            "plan_bytes": self.plan_bytes,
        }


def predict(
    contract: GraphContract, weights_bytes: int, *, quantized_bytes: int = 0, weights: str = EMBEDDED
) -> Budget:
    """What an engine needs.  quantized_bytes: codes and scales among the weights.  weights: see Budget."""
    return Budget(contract, weights_bytes, quantized_bytes, weights)


def usable_bytes(gpu: GpuTarget) -> int:
    """GPU memory an engine can have."""
    return gpu.memory_bytes - RESERVE_BYTES


def build_parts(budget: Budget) -> str:
    """1.72 x 6.98 GB quantized + 1 x 0.52 GB other weights + 0.15 GB"""
    constants, other = budget.build_constants, budget.weights_bytes - budget.quantized_bytes
    layers = budget.contract.config.num_hidden_layers
    if budget.weights == EXTERNAL:
        return f"{gigabytes(budget.build_memory_bytes)} for {layers} layers without their weights"
    sign = "+" if constants.base_bytes >= 0 else "-"
    own = f"{sign} {gigabytes(abs(constants.base_bytes))}"
    if not budget.quantized_bytes:
        return f"{constants.factor:g} x {gigabytes(other)} weights {own}"
    quantized = f"{constants.quantized_factor:g} x {gigabytes(budget.quantized_bytes)} quantized"
    return f"{quantized} + {constants.factor:g} x {gigabytes(other)} other weights {own}"


def check_plan(budget: Budget, plan_bytes: int) -> None:
    """Raise BuildError if an embedded plan's size shows that it does not hold the weights as stored.

    A quantized plan may be smaller, because TensorRT merges scales that are equal.
    """
    slack = int(_PLAN_TOLERANCE * budget.weights_bytes) + _PLAN_BASE_BYTES
    expected = f"expected a plan of {gigabytes(budget.weights_bytes)} and at most {gigabytes(slack)}"
    if plan_bytes > budget.weights_bytes + slack:
        why = "TensorRT stored weights more than once or in a wider type"
        raise BuildError(f"{expected} more, the size of its weights, found {gigabytes(plan_bytes)}: {why}")
    if not budget.quantized_bytes and plan_bytes < budget.weights_bytes - slack:
        raise BuildError(
            f"{expected} less, the size of its weights, found {gigabytes(plan_bytes)}: "
            "weights are missing from it"
        )


def gigabytes(amount: int) -> str:
    return f"{amount / 1e9:.2f} GB"
