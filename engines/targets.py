"""Names of GPUs → the set of targets that one plan is built for.

TensorRT-RTX puts the kernels of several compute capabilities into one plan; full TensorRT builds for the GPU
it runs on and for no other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mistral_trt.engines.flavor import AUTO, FULL, RTX, likely_flavor, on_target
from mistral_trt.engines.gpu import GpuTarget, RtxSupport, split_names
from mistral_trt.engines.precision import buildable, check_precision, either
from mistral_trt.errors import GpuError


@dataclass(frozen=True)
class TargetSet:
    """GPUs that share one plan, oldest compute capability first; make it with `group_targets`."""

    targets: tuple[GpuTarget, ...]

    @property
    def name(self) -> str:
        """a10g+l4, whatever order they were given in."""
        return "+".join(target.key for target in self.targets)

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """Each once, oldest first: two boards of one capability need one."""
        return tuple(dict.fromkeys(target.compute_capability for target in self.targets))

    @property
    def sms(self) -> tuple[str, ...]:
        """TensorRT's names for the compute capabilities."""
        return tuple(dict.fromkeys(target.sm for target in self.targets))

    @property
    def smallest(self) -> GpuTarget:
        """The GPU with the least memory: what fits it fits all."""
        return min(self.targets, key=lambda target: target.memory_bytes)


def parse_gpus(names: str | Iterable[str]) -> list[GpuTarget]:
    """The GPUs of "a10g,l4" or of a list of such, each once, in the order given.

    A name may hold blanks ("NVIDIA A10G"); between names they separate as commas do.
    Raises GpuError listing the known GPUs.
    """
    texts = [names] if isinstance(names, str) else list(names)
    found = [target for targets in split_names(",".join(texts)) for target in targets]
    if not found:
        raise GpuError(f"expected at least one GPU, found {', '.join(texts)!r}; run: mistral-trt gpus")
    return list({target.key: target for target in found}.values())


def group_targets(targets: Sequence[GpuTarget], precision: str, flavor: str = AUTO) -> TargetSet:
    """The targets as one set that a single plan can serve.

    flavor: the one asked for; full TensorRT takes one GPU, so several mean TensorRT-RTX.
    Raises GpuError naming the GPUs that do not fit together and the commands that serve them, or BuildError
    for a precision that no engine has.
    """
    ordered = sorted(targets, key=lambda target: (_number(target.compute_capability), target.key))
    if len(ordered) == 1:
        check_precision(ordered, precision, likely_flavor(ordered[0], flavor).name)
        return TargetSet(tuple(ordered))
    _require_rtx(ordered, precision, flavor)
    check_precision(ordered, precision, RTX.name)
    return TargetSet(tuple(ordered))


def _require_rtx(targets: Sequence[GpuTarget], precision: str, flavor: str) -> None:
    """Raise GpuError unless TensorRT-RTX may build one plan for all of them."""
    alone = [target for target in targets if target.rtx_support is RtxSupport.IMPOSSIBLE]
    if flavor == FULL.name:
        again = not alone and precision in buildable(targets, RTX.name)
        raise GpuError(
            f"full TensorRT builds for one GPU, the one it runs on, found {_keys(targets)}; "
            f"{_export(targets, precision, FULL.name)}build each on its own machine"
            + (f", or leave out --flavor {FULL.name}" if again else "")
        )
    if not alone:
        return
    rest = [target for target in targets if target not in alone]
    commands = [on_target(target) for target in alone]
    if rest:
        words = f"--gpu {_keys(rest, ',')} --flavor {RTX.name}"
        commands.append(f"here, run: mistral-trt build ONNX_DIR {words} --out DIR")
    names = " and ".join(f"{target.name} ({target.sm})" for target in alone)
    raise GpuError(
        f"several GPUs share a plan of TensorRT-RTX, which cannot build for {names}; "
        f"{_export(targets, precision, RTX.name)}{'; '.join(commands)}"
    )


def _export(targets: Sequence[GpuTarget], precision: str, flavor: str) -> str:
    """What comes before the builds where not all of them have this precision; else nothing."""
    offered = buildable(targets, flavor)
    return "" if precision in offered else f"export with --precision {either(offered)}, then "


def _keys(targets: Sequence[GpuTarget], separator: str = ", ") -> str:
    return separator.join(target.key for target in targets)


def _number(compute_capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in compute_capability.split("."))
