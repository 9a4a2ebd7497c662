"""ONNX folder + GPU → what a build and its engine would need, printed; nothing is built."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from mistral_trt.artifact import require_apart
from mistral_trt.engines.engine_cache import EngineCache
from mistral_trt.engines.flavor import AUTO
from mistral_trt.engines.gpu import GpuTarget
from mistral_trt.engines.network.quantized import read_quantization
from mistral_trt.engines.planning.budget import RESERVE_BYTES, Budget, build_parts, gigabytes, usable_bytes
from mistral_trt.engines.planning.host import Host
from mistral_trt.engines.planning.roofline import Ceilings, ceilings
from mistral_trt.engines.planning.settle import (
    check_target,
    look_at_host,
    predict_budget,
    require_version,
    settle_weights,
    with_rows,
)
from mistral_trt.engines.planning.wish import Wish, place_weights
from mistral_trt.errors import BuildError
from mistral_trt.manifest import read_manifest
from mistral_trt.weight_index import EXTERNAL


def dry_run(
    onnx_dir: Path,
    gpus: str | Iterable[str],
    out: Path,
    *,
    flavor: str = AUTO,
    weights: str = AUTO,
    max_batch_size: int | None = None,
    cache: EngineCache | None = None,
    polygraphy: bool = False,
    as_json: bool = False,
) -> None:
    """Print what is predicted, to stdout, and raise what a build would be refused for, after printing.

    Arguments as of `settle.settle`, and its errors; of what a build looks at, only the content of the
    ONNX folder's files is not.
    """
    require_apart(out, onnx_dir)
    source = with_rows(read_manifest(onnx_dir, "onnx", check_files=False), max_batch_size)
    targets, chosen = check_target(gpus, source.contract.precision, flavor)
    budget = predict_budget(source, read_quantization(source))
    wish = Wish(targets, flavor, chosen, weights, budget, polygraphy)
    host, refusal = look_at_host(onnx_dir, out, cache), None
    try:
        budget = settle_weights(wish, host, out)
    except BuildError as error:
        refusal, budget = error, place_weights(wish, host)
    require_version(chosen, source.contract, budget)
    if as_json:
        print(json.dumps(to_json(budget, targets.targets, host, refusal=refusal), indent=2))
    else:
        for target in targets.targets:
            for label, text in describe_budget(budget, target, ceilings(budget, target), host):
                print(f"{label:<24}{text}")
    if refusal is not None:
        raise refusal


def to_json(
    budget: Budget, gpus: Sequence[GpuTarget], host: Host, *, refusal: Exception | None = None
) -> dict[str, object]:
    """The rows as numbers.  refusal: null where a build would start."""
    return {
        "weights": budget.weights,
        "predicted": budget.to_json(),
        "disk_bytes": budget.disk_bytes(linked=host.linked),
        "cache_disk_bytes": host.kept_copy_bytes(budget.plan_bytes),
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


def describe_budget(budget: Budget, gpu: GpuTarget, roof: Ceilings, host: Host) -> list[tuple[str, str]]:
    """The prediction as label and text, in the order of a build's life."""
    rows, contract = budget.max_batch_size, budget.contract
    return [
        ("all of it predicted for", f"{gpu.name}, {contract.precision}, weights {budget.weights}"),
        ("build memory", f"{gigabytes(budget.build_memory_bytes)} ({build_parts(budget)})"),
        ("disk", _disk(budget, host)),
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


def _disk(budget: Budget, host: Host) -> str:
    words = f"{gigabytes(budget.disk_bytes(linked=host.linked))}, the plan {_size(budget.plan_bytes)}"
    if budget.weights == EXTERNAL:
        words += f", its weights beside it as {'hard links' if host.linked else 'copies'}"
    copy = host.kept_copy_bytes(budget.plan_bytes)
    return f"{words}; {_size(copy)} more on the cache's own disk" if copy else words


def _size(amount: int) -> str:
    return gigabytes(amount) if amount >= 1e9 else f"{amount / 1e6:.1f} MB"
