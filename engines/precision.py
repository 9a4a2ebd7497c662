"""GPUs + the TensorRT that builds for them → the precisions an engine may have, or what to export instead."""

from collections.abc import Iterable, Sequence

from mistral_trt.engines.gpu import FP8_CAPABILITY, GpuTarget, RtxSupport
from mistral_trt.errors import BuildError, GpuError
from mistral_trt.tensorrt_names import FULL, RTX

WEIGHT_ONLY = "int8-weight-only"
"""The precision that TensorRT-RTX alone is known to keep."""

_NEEDS = {
    "fp16": ("7.5", "float16 tensor cores"),
    "bf16": ("8.0", "bfloat16 arithmetic"),
    "int8": ("8.0", "TensorRT's INT8 linears between float32"),
    WEIGHT_ONLY: ("7.5", "float16 tensor cores"),
    "int4": ("8.0", "TensorRT's INT4 kernels"),
    "fp8": (FP8_CAPABILITY, "FP8 tensor cores"),
}
"""Precision → first compute capability it is built for, and what that has.

Measured with tensorrt-rtx 1.7.1. SM75 has INT8 tensor cores, but an int8 linear stands between float32 (ONNX
Runtime fuses no other form), and TensorRT compiles no float32 matrix product for SM75, not even this one.
"""

_UNBUILDABLE = {
    "fp32": "TensorRT has no fused float32 attention, on any GPU; fp32 runs in ONNX Runtime",
}


def can_run(gpu: GpuTarget, precision: str) -> bool:
    """Whether an engine of this precision can be built for the GPU, by one TensorRT or the other."""
    return precision in _NEEDS and gpu.runs(_NEEDS[precision][0])


def buildable(targets: Iterable[GpuTarget], flavor: str) -> tuple[str, ...]:
    """The precisions that this TensorRT builds for each of these GPUs.

    flavor: "tensorrt" or "tensorrt-rtx", which counts as the former where it cannot build for a GPU at all.
    """
    gpus = list(targets)
    only_full = flavor == FULL or any(gpu.rtx_support is RtxSupport.IMPOSSIBLE for gpu in gpus)
    names = [name for name in _NEEDS if name != WEIGHT_ONLY or not only_full]
    return tuple(name for name in names if all(can_run(gpu, name) for gpu in gpus))


def check_precision(targets: Sequence[GpuTarget], precision: str, flavor: str = RTX) -> None:
    """Raise unless `buildable` has the precision, naming those it has.

    Raises BuildError for a precision that no engine has, GpuError for one that these have not.
    """
    known, offered = [*_NEEDS, *_UNBUILDABLE], buildable(targets, flavor)
    if precision not in known:
        raise BuildError(f"precision must be one of {', '.join(known)}, found {precision!r}")
    if precision in _UNBUILDABLE:
        raise BuildError(
            f"an engine cannot be built in {precision}: {_UNBUILDABLE[precision]}; "
            f"export with --precision {either(offered)}"
        )
    if precision in offered:
        return
    unable = [gpu for gpu in targets if not can_run(gpu, precision)]
    if not unable:
        raise GpuError(_weight_only_refusal(targets))
    if len(targets) > 1:
        raise GpuError(_shared_refusal(targets, unable, precision, offered))
    (gpu,), (lowest, what) = unable, _NEEDS[precision]
    raise GpuError(
        f"{gpu.name} (compute capability {gpu.compute_capability}) cannot run {precision}, which needs "
        f"compute capability {lowest} or later ({what}); export with --precision {either(offered)}"
    )


def either(names: Sequence[str]) -> str:
    """fp16, bf16 -> "fp16 or bf16"."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _weight_only_refusal(targets: Sequence[GpuTarget]) -> str:
    other = "int8" if all(can_run(gpu, "int8") for gpu in targets) else "fp16"
    possible = all(gpu.rtx_support is not RtxSupport.IMPOSSIBLE for gpu in targets)
    return (
        "full TensorRT documents weight-only quantization for INT4 alone, so nothing says that it keeps "
        f"{WEIGHT_ONLY} in INT8; export with --precision {other}"
        + (f", or build with --flavor {RTX}" if possible else "")
    )


def _shared_refusal(
    targets: Sequence[GpuTarget], unable: Sequence[GpuTarget], precision: str, offered: Sequence[str]
) -> str:
    names = ", ".join(f"{gpu.name} (compute capability {gpu.compute_capability})" for gpu in unable)
    able = [gpu.key for gpu in targets if gpu not in unable]
    rest = f"build for --gpu {','.join(able)} alone, or " if able else ""
    return (
        f"not every GPU of {', '.join(gpu.key for gpu in targets)} runs {precision}: {names} cannot; "
        f"{rest}export with a precision that all of them run: {', '.join(offered)}"
    )
