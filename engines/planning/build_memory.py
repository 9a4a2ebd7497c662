"""Layers and bytes of weights → the peak of anonymous memory that a build takes, predicted.

    peak = base + per_layer * L + quantized_factor * quantized_bytes + factor * other_bytes

An external build reads no weights, so its two factors are 0 and what is left is what the builder, its
libraries and the graph of L layers take. An embedded build takes the same for the same graph, and then holds
weights, of which it makes copies: hence factors, not constants, and one for codes and scales and one for all
other weights, because each kind is laid out in its own way. File-backed pages are not counted: the kernel
takes them back.
"""

from dataclasses import dataclass

from mistral_trt.weight_index import EMBEDDED, EXTERNAL


@dataclass(frozen=True)
class BuildMemory:
    """The constants of one line of the table.  base_bytes and layer_bytes: what no weight is to blame for.

    quantized_factor: of codes and scales.  factor: of the other weights.
    """

    base_bytes: int
    layer_bytes: int
    quantized_factor: float
    factor: float

    def peak_bytes(self, layers: int, *, quantized_bytes: int, other_bytes: int) -> int:
        weights = self.quantized_factor * quantized_bytes + self.factor * other_bytes
        return int(self.base_bytes + self.layer_bytes * layers + weights)


BUILD_MEMORY = {
    ("fp16", EMBEDDED): BuildMemory(1_000_000_000, 10_000_000, 0.0, 1.9),
    ("fp16", EXTERNAL): BuildMemory(1_000_000_000, 10_000_000, 0.0, 0.0),
    ("int8", EMBEDDED): BuildMemory(1_000_000_000, 10_000_000, 1.6, 1.9),
    ("int8", EXTERNAL): BuildMemory(1_000_000_000, 10_000_000, 0.0, 0.0),
    ("int4", EMBEDDED): BuildMemory(1_000_000_000, 10_000_000, 1.9, 1.9),
    ("int4", EXTERNAL): BuildMemory(1_000_000_000, 10_000_000, 0.0, 0.0),
}
"""(precision, where the weights are) → its line: round numbers from builds of 1 to 32 layers of a 7B.

bench/build.py measures these builds and fits the constants to those of 4 and 8 layers; deeper ones are what
it judges them by. Only its builds of 32 layers in int8 and int4 have been run yet (bench/results/build.json),
and int4's embedded factor was set from one of them: the table holds no independent forecast of that build.
"""

_COUNTS_AS = {"fp32": "fp16", "bf16": "fp16", "int8-weight-only": "int8", "fp8": "int8"}
# Of fp8: chains of 2 to 32 linears of a 7B build with the same peak as int8's.


def build_memory(precision: str, weights: str) -> BuildMemory:
    """The line of a precision: its own, or that of the one whose weights have codes or numbers as wide."""
    return BUILD_MEMORY[_COUNTS_AS.get(precision, precision), weights]
