"""GPU + what is installed → the TensorRT that builds for it.

`tensorrt-rtx` builds ahead of time, on any machine, for the compute capabilities it knows; `tensorrt`
(full) builds only on the GPU itself. The API is nearly the same, so only the imported module differs.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from mistral_trt.devices import local_devices
from mistral_trt.engines.gpu import GpuTarget, RtxSupport
from mistral_trt.errors import GpuError, MissingDependencyError, require
from mistral_trt.progress import note

AUTO = "auto"


@dataclass(frozen=True)
class Flavor:
    """One of the two TensorRTs. `name` is also the name of its distribution."""

    name: str
    module: str

    @property
    def installed(self) -> bool:
        return find_spec(self.module) is not None

    def load(self) -> Any:
        """Import it. Raises MissingDependencyError if it is not installed."""
        return require(self.module, "engines")


FULL = Flavor("tensorrt", "tensorrt")
RTX = Flavor("tensorrt-rtx", "tensorrt_rtx")
NAMES = (AUTO, FULL.name, RTX.name)


def choose_flavor(gpu: GpuTarget, wanted: str = AUTO) -> Flavor:
    """The flavor that builds for `gpu` here: full TensorRT where it can, else TensorRT-RTX.

    Raises GpuError saying what would work, or MissingDependencyError.
    """
    if wanted not in NAMES:
        raise GpuError(f"flavor must be one of {', '.join(NAMES)}, found {wanted!r}")
    if wanted == RTX.name or (wanted == AUTO and not FULL.installed):
        return _rtx(gpu)
    if not FULL.installed:
        raise MissingDependencyError(
            "full TensorRT is not installed; run: pip install tensorrt (on the machine with the target GPU)"
        )
    here = local_gpus()
    if here and all(gpu.answers_to(name) for name in here):
        return FULL
    if wanted == AUTO and gpu.rtx_support is not RtxSupport.IMPOSSIBLE:
        note(f"full TensorRT builds only on the target itself, and {_describe(here)}: using {RTX.name}")
        return _rtx(gpu)
    raise GpuError(f"full TensorRT builds only on the target itself, and {_describe(here)}; {_remedy(gpu)}")


def check_weight_only(gpu: GpuTarget, precision: str, flavor: str) -> None:
    """Raise GpuError for int8-weight-only where full TensorRT builds: by `flavor`, or as the only one."""
    only_full = gpu.rtx_support is RtxSupport.IMPOSSIBLE
    if precision != "int8-weight-only" or not (flavor == FULL.name or only_full):
        return
    remedy = "" if only_full else f", or build with --flavor {RTX.name}"
    raise GpuError(
        f"full TensorRT documents weight-only quantization for INT4 alone, so nothing says that it keeps "
        f"{precision} in INT8; export with --precision int8{remedy}"
    )


def local_gpus() -> list[str]:
    """Names of this machine's NVIDIA GPUs, as nvidia-smi prints them; empty without a driver."""
    return [device.name for device in local_devices().devices]


def _rtx(gpu: GpuTarget) -> Flavor:
    if gpu.rtx_support is RtxSupport.IMPOSSIBLE:
        raise GpuError(f"TensorRT-RTX cannot build for {gpu.name} ({gpu.sm}); {_remedy(gpu)}")
    return RTX


def _describe(here: list[str]) -> str:
    return f"this machine has {', '.join(here)}" if here else "this machine has no NVIDIA GPU"


def _remedy(gpu: GpuTarget) -> str:
    on_target = (
        f"on a machine whose GPU is an {gpu.name}, run: pip install tensorrt && "
        f"mistral-trt build ONNX_DIR --gpu {gpu.key} --flavor {FULL.name} --out DIR"
    )
    if gpu.rtx_support is RtxSupport.IMPOSSIBLE:
        return on_target
    return f"build here with --flavor {RTX.name}, or {on_target}"
