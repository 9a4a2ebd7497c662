"""Layers and bytes of weights → the peak of anonymous memory that a build takes, predicted.

    external    base + per_layer * L
    embedded    base + quantized_factor * quantized_bytes + factor * other_bytes,
                and no less than the external build of the same graph

An external build reads no weights: what it takes is the builder, its libraries and the kernels of L layers.
An embedded build peaks later, where the weights are laid out and written, and what the kernels took is free
again: hence the larger of the two and not their sum, and a base that may be negative. Its factors count
copies of weights, one for codes and scales and one for the others, as each kind is laid out in its own way.
File-backed pages are not counted: the kernel takes them back.
"""

from dataclasses import dataclass

from mistral_trt.weight_index import EMBEDDED, EXTERNAL


@dataclass(frozen=True)
class BuildMemory:
    """The constants of one line of the table.

    quantized_factor: of codes and scales.  factor: of the other weights.  least: what it is never below.
    """

    base_bytes: int
    layer_bytes: int = 0
    quantized_factor: float = 0.0
    factor: float = 0.0
    least: "BuildMemory | None" = None

    def peak_bytes(self, layers: int, *, quantized_bytes: int, other_bytes: int) -> int:
        weights = self.quantized_factor * quantized_bytes + self.factor * other_bytes
        peak = int(self.base_bytes + self.layer_bytes * layers + weights)
        if self.least is None:
            return peak
        least = self.least.peak_bytes(layers, quantized_bytes=quantized_bytes, other_bytes=other_bytes)
        return max(peak, least)


_EXTERNAL = {
    "fp16": BuildMemory(946_000_000, 10_600_000),
    "int8": BuildMemory(940_000_000, 15_800_000),
    "int4": BuildMemory(952_000_000, 9_690_000),
}
_EMBEDDED = {
    "fp16": BuildMemory(-200_000_000, 0, 0.0, 1.675, _EXTERNAL["fp16"]),
    "int8": BuildMemory(155_000_000, 0, 1.72, 1.0, _EXTERNAL["int8"]),
    "int4": BuildMemory(-43_000_000, 0, 2.526, 1.0, _EXTERNAL["int4"]),
}
BUILD_MEMORY = {
    **{(precision, EXTERNAL): line for precision, line in _EXTERNAL.items()},
    **{(precision, EMBEDDED): line for precision, line in _EMBEDDED.items()},
}
"""(precision, where the weights are) → its line, fitted by bench/build.py to builds of 4 and 8 layers of a 7B
and judged there by builds of 16 and 32 layers (bench/results/build.json)."""

_COUNTS_AS = {"fp32": "fp16", "bf16": "fp16", "int8-weight-only": "int8", "fp8": "int8"}
# Of fp8: chains of 2 to 32 linears of a 7B build with the same peak as int8's.


def build_memory(precision: str, weights: str) -> BuildMemory:
    """The line of a precision: its own, or that of the one whose weights have codes or numbers as wide."""
    return BUILD_MEMORY[_COUNTS_AS.get(precision, precision), weights]
