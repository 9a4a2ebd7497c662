"""ONNX folder + GPU → what a build and its engine would need, printed; nothing is built."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from mistral_trt.artifact import require_apart
from mistral_trt.engines.flavor import AUTO
from mistral_trt.engines.gpu import GpuTarget
from mistral_trt.engines.network.quantized import read_quantization
from mistral_trt.engines.planning.budget import RESERVE_BYTES, Budget, build_parts, gigabytes, usable_bytes
from mistral_trt.engines.planning.build_memory import EMBEDDED, EXTERNAL
from mistral_trt.engines.planning.host import can_link
from mistral_trt.engines.planning.remedy import check_device
from mistral_trt.engines.planning.roofline import Ceilings, ceilings
from mistral_trt.engines.planning.settle import (
    check_target,
    predict_budget,
    require_version,
    settle_weights,
    weights_of,
    with_rows,
)
from mistral_trt.errors import BuildError
from mistral_trt.manifest import read_manifest


def dry_run(
    onnx_dir: Path,
    gpus: str | Iterable[str],
    out: Path,
    *,
    flavor: str = AUTO,
    weights: str = AUTO,
    max_batch_size: int | None = None,
    as_json: bool = False,
) -> None:
    """Print what is predicted, to stdout, and raise what a build would be refused for, after printing.

    Arguments as of `build.build_engine`, and its errors; of what a build looks at, only the content of the
    ONNX folder's files is not.
    """
    require_apart(out, onnx_dir)
    source = with_rows(read_manifest(onnx_dir, "onnx", check_files=False), max_batch_size)
    targets, chosen = check_target(gpus, source.contract.precision, flavor)
    budget, refusal = predict_budget(source, read_quantization(source)), None
    try:
        check_device(budget, targets.smallest)
        budget = settle_weights(weights_of(targets, weights), budget, onnx_dir, out)
    except BuildError as error:
        refusal = error
        budget = replace(budget, weights=EXTERNAL if weights == EXTERNAL else EMBEDDED)
    require_version(chosen, source.contract, budget)
    linked = can_link(onnx_dir, out)
    if as_json:
        print(json.dumps(to_json(budget, targets.targets, linked=linked, refusal=refusal), indent=2))
    else:
        for target in targets.targets:
            for label, text in describe_budget(budget, target, ceilings(budget, target), linked=linked):
                print(f"{label:<24}{text}")
    if refusal is not None:
        raise refusal


def to_json(
    budget: Budget, gpus: Sequence[GpuTarget], *, linked: bool, refusal: Exception | None = None
) -> dict[str, object]:
    """The rows as numbers.  refusal: null where a build would start."""
    return {
        "weights": budget.weights,
        "predicted": budget.to_json(),
        "disk_bytes": budget.disk_bytes(linked=linked),
        "rings_bytes": budget.rings_bytes,
        "gpus": [
            {
                "gpu": gpu.key,
                "usable_bytes": usable_bytes(gpu),
                "rows_that_fit": budget.rows_that_fit(gpu),
                "ceilings": ceilings(budget, gpu).to_json(),
            }
            for gpu in gpus
        ],
        "refusal": None if refusal is None else str(refusal),
    }


def describe_budget(
    budget: Budget, gpu: GpuTarget, roof: Ceilings, *, linked: bool = True
) -> list[tuple[str, str]]:
    """The prediction as label and text, in the order of a build's life.  linked: see Budget.disk_bytes."""
    rows, contract = budget.max_batch_size, budget.contract
    external = ", its weights beside it as " + ("hard links" if linked else "copies")
    how = external if budget.weights == EXTERNAL else ""
    return [
        ("all of it predicted for", f"{gpu.name}, {contract.precision}, weights {budget.weights}"),
        ("build memory", f"{gigabytes(budget.build_memory_bytes)} ({build_parts(budget)})"),
        ("disk", f"{gigabytes(budget.disk_bytes(linked=linked))}, the plan {_size(budget.plan_bytes)}{how}"),
        ("GPU: weights", gigabytes(budget.weights_bytes)),
        ("GPU: rings", f"{gigabytes(budget.rings_bytes)}, {rows} x {_size(budget.ring_bytes_per_row)}"),
        ("GPU: activations", _size(budget.activation_bytes)),
        ("GPU: logits", _size(budget.logits_bytes)),
        ("GPU: reserve", f"{gigabytes(RESERVE_BYTES)} of {gigabytes(gpu.memory_bytes)}"),
        (
            "GPU: all but reserve",
            f"{gigabytes(budget.engine_bytes)} of {gigabytes(usable_bytes(gpu))} usable",
        ),
        ("largest batch", f"{budget.rows_that_fit(gpu)} rows"),
        ("decode, one row", f"at most {roof.decode_tokens_per_s:,.0f} tokens/s, ring full"),
        (f"decode, {rows} rows", f"at most {roof.decode_all_rows_tokens_per_s:,.0f} tokens/s together"),
        ("prefill", f"at most {roof.prefill_tokens_per_s:,.0f} tokens/s, window full"),
    ]


def _size(amount: int) -> str:
    return gigabytes(amount) if amount >= 1e9 else f"{amount / 1e6:.1f} MB"
