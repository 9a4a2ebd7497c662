"""GPU + what is installed → the TensorRT that builds for it.

`tensorrt-rtx` builds ahead of time, on any machine, for the compute capabilities it knows; `tensorrt`
(full) builds only on the GPU itself. The API is nearly the same, so only the imported module differs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mistral_trt import tensorrt_names
from mistral_trt.devices import local_devices
from mistral_trt.engines.gpu import GpuTarget, RtxSupport
from mistral_trt.engines.versions import install_command
from mistral_trt.errors import GpuError, MissingDependencyError
from mistral_trt.progress import note

AUTO = "auto"


@dataclass(frozen=True)
class Flavor:
    """One of the two TensorRTs.  name: of its distribution.  module: what is imported of it."""

    name: str
    module: str

    @property
    def installed(self) -> bool:
        return find_spec(self.module) is not None

    def load(self) -> Any:
        """Import it. Raises MissingDependencyError if it is not installed."""
        try:
            return import_module(self.module)
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f"this needs {self.name}, which is not installed; run: {install_command(self.name)}"
            ) from error


FULL, RTX = (Flavor(name, tensorrt_names.MODULES[name]) for name in tensorrt_names.FLAVORS)
NAMES = (AUTO, *tensorrt_names.FLAVORS)


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
            f"full TensorRT is not installed; run, on the machine with the target GPU: "
            f"{install_command(FULL.name)}"
        )
    here = local_gpus()
    if _is_target(gpu, here):
        return FULL
    if wanted == AUTO and gpu.rtx_support is not RtxSupport.IMPOSSIBLE:
        note(f"full TensorRT builds only on the target itself, and {_describe(here)}: using {RTX.name}")
        return _rtx(gpu)
    raise GpuError(f"full TensorRT builds only on the target itself, and {_describe(here)}; {_remedy(gpu)}")


def likely_flavor(gpu: GpuTarget, wanted: str = AUTO) -> Flavor:
    """The flavor that `choose_flavor` would give, were it able to build here."""
    return _likely(gpu, wanted, local_gpus() if FULL.installed else [])


def builders_here(gpus: Iterable[GpuTarget], wanted: str = AUTO) -> dict[str, Flavor]:
    """Key of a GPU → the flavor that `choose_flavor` gives, where that is installed."""
    here, found = local_gpus() if FULL.installed else [], {}
    for gpu in gpus:
        flavor = _likely(gpu, wanted, here)
        able = _is_target(gpu, here) if flavor == FULL else gpu.rtx_support is not RtxSupport.IMPOSSIBLE
        if flavor.installed and able:
            found[gpu.key] = flavor
    return found


def local_gpus() -> list[str]:
    """Names of the GPUs that CUDA sees on this machine, as nvidia-smi prints them; empty without a driver."""
    return [device.name for device in local_devices().devices]


def on_target(gpu: GpuTarget) -> str:
    """What to do for an engine of full TensorRT, in words."""
    return (
        f"on a machine whose GPU is an {gpu.name}, run: {install_command(FULL.name)} && "
        f"mistral-trt build ONNX_DIR --gpu {gpu.key} --flavor {FULL.name} --out DIR"
    )


def _rtx(gpu: GpuTarget) -> Flavor:
    if gpu.rtx_support is RtxSupport.IMPOSSIBLE:
        raise GpuError(f"TensorRT-RTX cannot build for {gpu.name} ({gpu.sm}); {_remedy(gpu)}")
    return RTX


def _likely(gpu: GpuTarget, wanted: str, here: list[str]) -> Flavor:
    """here: names of this machine's GPUs, which matter only where full TensorRT is installed."""
    if wanted in (FULL.name, RTX.name):
        return FULL if wanted == FULL.name else RTX
    only_full = gpu.rtx_support is RtxSupport.IMPOSSIBLE
    return FULL if only_full or (FULL.installed and _is_target(gpu, here)) else RTX


def _is_target(gpu: GpuTarget, here: list[str]) -> bool:
    """Whether every GPU here is that one: TensorRT would take any of them."""
    return bool(here) and all(gpu.answers_to(name) for name in here)


def _describe(here: list[str]) -> str:
    return f"this machine has {', '.join(here)}" if here else "this machine has no NVIDIA GPU"


def _remedy(gpu: GpuTarget) -> str:
    if gpu.rtx_support is RtxSupport.IMPOSSIBLE:
        return on_target(gpu)
    return f"build here with --flavor {RTX.name}, or {on_target(gpu)}"
