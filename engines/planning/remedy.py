"""A budget that does not fit its GPU → the refusal, with the nearest thing that would fit."""

from collections.abc import Iterator
from dataclasses import replace

from mistral_trt.contract import DTYPE_BYTES, QUANTIZED
from mistral_trt.engines.gpu import GpuTarget, can_run, load_catalogue
from mistral_trt.engines.planning.budget import Budget, usable_bytes
from mistral_trt.engines.planning.sizes import linear_elements, quantized_linear_bytes
from mistral_trt.errors import BuildError

_SMALLER = ("int8", "int8-weight-only", "int4")  # from the widest codes to the narrowest
_AS_WIDE = {
    "int8": ("int8", "int8-weight-only"),
    "int8-weight-only": ("int8", "int8-weight-only"),
    "fp8": ("int8", "int8-weight-only"),
    "int4": _SMALLER,
}
"""Precision → those of them that make no weight smaller."""


def check_device(budget: Budget, gpu: GpuTarget) -> None:
    """Raise BuildError if the engine does not fit the GPU, saying what would."""
    if budget.fits(gpu):
        return
    rows = budget.max_batch_size
    what = f"{rows} rows of ring need" if rows > 1 else "1 row of ring needs"
    rest = budget.activation_bytes + budget.logits_bytes
    raise BuildError(
        f"predicted: {what} {_gb(budget.rings_bytes)} beside {_gb(budget.weights_bytes)} of weights and "
        f"{_gb(rest)} of activations and logits; {gpu.key} has {_gb(usable_bytes(gpu))} usable: "
        f"{remedy(budget, gpu)}"
    )


def remedy(budget: Budget, gpu: GpuTarget) -> str:
    """Fewer rows, or the first smaller precision that holds them all; then both; then a larger GPU."""
    rows, smaller = budget.rows_that_fit(gpu), list(smaller_budgets(budget, gpu))
    same_rows = next((f"--precision {name}" for name, other in smaller if other.fits(gpu)), None)
    if rows:
        return f"use --max-batch-size {rows}" + (f", or export with {same_rows}" if same_rows else "")
    if same_rows:
        return f"export with {same_rows}"
    for name, other in smaller:
        if rows := other.rows_that_fit(gpu):
            return f"export with --precision {name} and use --max-batch-size {rows}"
    by_memory = sorted(load_catalogue().values(), key=lambda target: (target.memory_bytes, target.key))
    larger = [g.key for g in by_memory if can_run(g, budget.contract.precision) and budget.fits(g)]
    return f"it would fit {', '.join(larger)}" if larger else "no GPU of the catalogue is large enough"


def smaller_budgets(budget: Budget, gpu: GpuTarget) -> Iterator[tuple[str, Budget]]:
    """The same model in each precision that the GPU runs and that has smaller weights, all linears in it."""
    contract, config = budget.contract, budget.contract.config
    linears = budget.quantized_bytes
    if contract.precision not in QUANTIZED:
        linears = linear_elements(config) * DTYPE_BYTES[contract.cache_dtype]
    for precision in _SMALLER:
        quantized = quantized_linear_bytes(config, precision)
        weights = max(0, budget.weights_bytes - linears) + quantized
        if can_run(gpu, precision) and precision not in _AS_WIDE.get(contract.precision, ()):
            other = replace(contract, precision=precision)
            yield precision, replace(budget, contract=other, weights_bytes=weights, quantized_bytes=quantized)


def _gb(amount: int) -> str:
    return f"{amount / 1e9:.1f} GB"
