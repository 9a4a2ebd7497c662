"""Contract + activation bytes → what must be free on the GPU, or a refusal that says how many rows fit."""

from dataclasses import dataclass
from pathlib import Path

from mistral_trt.contract import GraphContract
from mistral_trt.errors import EngineMismatchError
from mistral_trt.manifest import Manifest, repair_command

ALIGNMENT = 256
"""TensorRT takes addresses that are multiples of this; so must a row's place in its ring be."""


@dataclass(frozen=True)
class Demand:
    """Bytes of GPU memory that remain to be allocated once the weights are there."""

    ring_bytes_per_row: int
    rows: int
    step_bytes: int
    activation_bytes: int

    @property
    def fixed_bytes(self) -> int:
        """What does not grow with the rows, or hardly."""
        return self.step_bytes + self.activation_bytes

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.rows * self.ring_bytes_per_row

    def rows_in(self, free_bytes: int) -> int:
        """How many rows would fit."""
        return max(0, (free_bytes - self.fixed_bytes) // self.ring_bytes_per_row)


def step_tokens(contract: GraphContract) -> int:
    """Tokens of the largest call: every row's next one, or a chunk of one row."""
    return max(contract.max_batch_size, contract.ring.prefill_chunk)


def demand(contract: GraphContract, activation_bytes: int) -> Demand:
    """activation_bytes: what the engine says that a context needs."""
    tokens = step_tokens(contract)
    return Demand(
        ring_bytes_per_row=contract.ring_bytes_per_row,
        rows=contract.max_batch_size,
        step_bytes=tokens * (8 * len(contract.step_inputs()) + 4 * contract.config.vocab_size),
        activation_bytes=activation_bytes,
    )


def require_memory(wanted: Demand, free_bytes: int, folder: Path, manifest: Manifest) -> None:
    """Raise EngineMismatchError unless the rings and all else fit into what is free."""
    if wanted.total_bytes <= free_bytes:
        return
    rows = wanted.rows_in(free_bytes)
    command = repair_command(folder, "engine", manifest.details)
    remedy = (
        f"{rows} rows would fit: {command} --max-batch-size {rows}"
        if rows
        else "not one row would fit, so end what else uses this GPU, or build for a larger one"
    )
    raise EngineMismatchError(
        f"{folder} needs {wanted.total_bytes / 1e9:.3f} GB of GPU memory beside its weights "
        f"({wanted.rows} rows of {wanted.ring_bytes_per_row / 1e9:.3f} GB among it), and "
        f"{free_bytes / 1e9:.3f} GB are free; {remedy}"
    )
