"""`plans`: whether a TensorRT plan holds the quantized weights once, and as small as they are.

Four layers of Mistral 7B v0.1 at full width, random weights, built for a GPU that runs the precision. A plan
also holds compiled kernels, tens of megabytes whatever the model, which is why a small one shows little.
"""

import shutil
from typing import Any

from quantization_checks import Check
from quantization_decode import CONFIG, SLICE_LAYERS, export_slice, synthetic
from quantization_runs import Bench, run_cli

from mistral_trt.manifest import read_manifest

TARGETS = {"int8": "a10g", "int8-weight-only": "a10g", "int4": "a10g", "fp8": "l4"}
OFF_MAX = 0.05


def plans(bench: Bench) -> dict[str, Any]:
    """Plan bytes over weight bytes of each quantized precision."""
    layers = min(SLICE_LAYERS, bench.layers or SLICE_LAYERS)
    checkpoint = synthetic(bench, layers)
    figures: dict[str, Any] = {"model": f"{CONFIG}, {layers} layers"}
    checks = []
    for precision, gpu in TARGETS.items():
        onnx = export_slice(bench, checkpoint, precision)
        engine = bench.scratch / f"engine-{precision}"
        run_cli("build", str(onnx), "--gpu", gpu, "--out", str(engine), "--no-cache")
        details = read_manifest(engine, check_files=False).details
        plan, weights = details["plan_bytes"], details["predicted"]["weights_bytes"]
        figures[precision] = {"gpu": gpu, "plan_bytes": plan, "weights_bytes": weights}
        checks += size_checks(precision, gpu, plan, weights)
        shutil.rmtree(onnx)
        shutil.rmtree(engine)
    shutil.rmtree(checkpoint)
    return {"figures": figures, "checks": checks, "remarks": []}


def size_checks(precision: str, gpu: str, plan_bytes: int, weights_bytes: int) -> list[Check]:
    """A plan's size beside its weights'."""
    return [
        Check(f"{precision} for {gpu}: weights, GB", weights_bytes / 1e9),
        Check(f"{precision} for {gpu}: plan over weights", plan_bytes / weights_bytes, at_most=1 + OFF_MAX),
        Check(f"{precision} for {gpu}: weights over plan", weights_bytes / plan_bytes, at_most=1 + OFF_MAX),
    ]
