"""GPUs of the catalogue + this machine → what of each works here, and the command for what does not."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mistral_trt.engines.flavor import FULL, RTX, Flavor, on_target
from mistral_trt.engines.gpu import GpuTarget, RtxSupport, find_gpu, load_catalogue
from mistral_trt.engines.planning.host import available_memory_bytes
from mistral_trt.engines.precision import buildable
from mistral_trt.engines.versions import install_command, oldest_usable
from mistral_trt.packages import installed_version, release

__all__ = ["Outlook", "available_memory_bytes", "look_ahead", "print_outlooks"]


@dataclass(frozen=True)
class Outlook:
    """What this machine is to one GPU.

    build: the TensorRT that builds for it here, None for none.  why: that in words.  fits: name of the GPU
    here that takes its engines, one of the same compute capability.  precisions: what that TensorRT builds
    for it, or would.  command: what builds for it, or is missing for that.
    """

    gpu: str
    name: str
    compute_capability: str
    build: str | None
    why: str
    fits: str | None
    precisions: tuple[str, ...]
    command: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def look_ahead(here: Sequence[tuple[str, str]], gpu: str | None = None) -> list[Outlook]:
    """The outlook of every GPU, or of one.  here: name and compute capability of this machine's GPUs.

    Raises GpuError for a name that is not in the catalogue.
    """
    targets = load_catalogue().values() if gpu is None else [find_gpu(gpu)]
    return [_outlook(target, here) for target in targets]


def print_outlooks(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print to stdout: a table on a terminal, plain lines everywhere else."""
    console = Console()
    if not console.is_terminal:
        for row in rows:
            words = (row["why"], _run_words(row), ", ".join(row["precisions"]))
            print(f"{row['gpu']:<10} {row['compute_capability']:>5}  {'; '.join(words)}")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("GPU", no_wrap=True)
    table.add_column("compute\ncapability", justify="right")
    for heading in ("build", "run", "precisions"):
        table.add_column(heading)
    for row in rows:
        style = "green" if row["build"] else "yellow"
        why = f"[{style}]{row['why']}[/]"
        precisions = ", ".join(row["precisions"])
        table.add_row(row["gpu"], row["compute_capability"], why, _run_words(row), precisions)
    console.print(table)


def _run_words(row: Mapping[str, Any]) -> str:
    return f"fits {row['fits']} here" if row["fits"] else "runs elsewhere: no such GPU here"


def _outlook(target: GpuTarget, here: Sequence[tuple[str, str]]) -> Outlook:
    build, why, command = _build(target, [name for name, _ in here])
    only_full = build == FULL.name or target.rtx_support is RtxSupport.IMPOSSIBLE
    flavor = FULL.name if only_full else RTX.name
    same = [name for name, capability in here if capability == target.compute_capability]
    return Outlook(
        gpu=target.key,
        name=target.name,
        compute_capability=target.compute_capability,
        build=build,
        why=why,
        fits=same[0] if same else None,
        precisions=buildable([target], flavor),
        command=command,
    )


def _build(target: GpuTarget, here: Sequence[str]) -> tuple[str | None, str, str]:
    """The flavor that builds here, that in words, and the command: to build, or to become able to."""
    command = f"mistral-trt build ONNX_DIR --gpu {target.key} --out DIR"
    is_here = bool(here) and all(target.answers_to(name) for name in here)
    only_full = target.rtx_support is RtxSupport.IMPOSSIBLE
    flavor = FULL if only_full or (is_here and FULL.installed) else RTX
    if flavor == FULL and not is_here:
        return None, "needs full TensorRT on the target", on_target(target)
    if fault := _fault(flavor):
        return None, f"needs {flavor.name}, {fault}", install_command(flavor.name)
    return flavor.name, f"builds with {flavor.name} here", command


def _fault(flavor: Flavor) -> str | None:
    """What keeps a flavor that may build here from doing so: "which is not installed"."""
    if not flavor.installed:
        return "which is not installed"
    oldest, found = oldest_usable(flavor.name), installed_version(flavor.name)
    if found is not None and release(found) < release(oldest):
        return f"{oldest} or later, found {found}"
    return None
