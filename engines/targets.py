"""Names of GPUs → the set of targets that one plan is built for.

TensorRT-RTX puts the kernels of several compute capabilities into one plan; full TensorRT builds for the GPU
it runs on and for no other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mistral_trt.contract import CACHE_DTYPES
from mistral_trt.engines.flavor import AUTO, FULL
from mistral_trt.engines.gpu import GpuTarget, RtxSupport, can_run, check_precision, find_gpu
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

    A name may hold blanks ("NVIDIA A10G"); where it is no GPU, blanks separate names too ("a10g l4").
    Raises GpuError listing the known GPUs.
    """
    texts = [names] if isinstance(names, str) else list(names)
    pieces = [piece.strip() for text in texts for piece in text.split(",") if piece.strip()]
    if not pieces:
        raise GpuError(f"expected at least one GPU, found {', '.join(texts)!r}; run: mistral-trt gpus")
    found = [target for piece in pieces for target in _find(piece)]
    return list({target.key: target for target in found}.values())


def group_targets(targets: Sequence[GpuTarget], precision: str, flavor: str = AUTO) -> TargetSet:
    """The targets as one set that a single plan can serve.

    flavor: the one asked for; full TensorRT takes one GPU, so several mean TensorRT-RTX.
    Raises GpuError naming the GPUs that do not fit together and the commands that serve them, or BuildError
    for a precision that no engine has.
    """
    ordered = sorted(targets, key=lambda target: (_number(target.compute_capability), target.key))
    if len(ordered) > 1:
        _require_rtx(ordered, flavor)
    _require_precision(ordered, precision)
    return TargetSet(tuple(ordered))


def _find(piece: str) -> list[GpuTarget]:
    try:
        return [find_gpu(piece)]
    except GpuError:
        words = piece.split()
        if not any(_known(word) for word in words):
            raise
    return [find_gpu(word) for word in words]


def _known(name: str) -> bool:
    try:
        find_gpu(name)
    except GpuError:
        return False
    return True


def _require_rtx(targets: Sequence[GpuTarget], flavor: str) -> None:
    if flavor == FULL.name:
        raise GpuError(
            f"full TensorRT builds for one GPU, the one it runs on, found {_keys(targets)}; build each on "
            f"its own machine, or leave out --flavor {FULL.name}"
        )
    alone = [target for target in targets if target.rtx_support is RtxSupport.IMPOSSIBLE]
    if not alone:
        return
    rest = [target.key for target in targets if target not in alone]
    commands = [f"mistral-trt build ONNX_DIR --gpu {target.key} --flavor {FULL.name}" for target in alone]
    commands = [
        f"on a machine whose GPU is an {target.name}, run: {command} --out DIR"
        for target, command in zip(alone, commands, strict=True)
    ]
    if rest:
        commands.append(f"here, run: mistral-trt build ONNX_DIR --gpu {','.join(rest)} --out DIR")
    names = " and ".join(f"{target.name} ({target.sm})" for target in alone)
    raise GpuError(
        f"several GPUs share a plan of TensorRT-RTX, which cannot build for {names}; " + "; ".join(commands)
    )


def _require_precision(targets: Sequence[GpuTarget], precision: str) -> None:
    failed = [(target, error) for target in targets if (error := _refusal(target, precision))]
    if len(targets) == 1 and failed:
        raise failed[0][1]
    if not failed:
        return
    unable = ", ".join(f"{gpu.name} (compute capability {gpu.compute_capability})" for gpu, _ in failed)
    refused = {target.key for target, _ in failed}
    able = [target.key for target in targets if target.key not in refused]
    shared = [name for name in CACHE_DTYPES if all(can_run(target, name) for target in targets)]
    rest = f"build for --gpu {','.join(able)} alone, or " if able else ""
    raise GpuError(
        f"not every GPU of {_keys(targets)} runs {precision}: {unable} cannot; "
        f"{rest}export with a precision that all of them run: {', '.join(shared)}"
    )


def _refusal(target: GpuTarget, precision: str) -> GpuError | None:
    """Why this GPU does not run it; a precision that no engine has (BuildError) is not about the GPU."""
    try:
        check_precision(target, precision)
    except GpuError as error:
        return error
    return None


def _keys(targets: Sequence[GpuTarget]) -> str:
    return ", ".join(target.key for target in targets)


def _number(compute_capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in compute_capability.split("."))
