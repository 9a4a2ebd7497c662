"""GPU targets → the table that `mistral-trt gpus` prints."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mistral_trt.engines.gpu import GpuTarget, RtxSupport

_CAPTION = (
    "Dense peaks. TensorRT-RTX builds on any machine; listed: NVIDIA's support matrix names the GPU's "
    "family. Full TensorRT builds only on the GPU itself."
)
_RTX_STYLE = {RtxSupport.LISTED: "green", RtxSupport.UNLISTED: "yellow", RtxSupport.IMPOSSIBLE: "red"}


def print_table(gpus: Sequence[GpuTarget]) -> None:
    """Print to stdout, other names below; in a pipe or a file no column is cut, however wide."""
    table = gpu_table(gpus)
    console = Console()
    if not console.is_terminal:
        console = Console(width=console.measure(table, options=console.options.update(max_width=500)).maximum)
    console.print(table)
    console.print("\nAlso called:", highlight=False)
    for gpu in [gpu for gpu in gpus if gpu.aliases]:
        console.print(f"  {gpu.key}: {', '.join(gpu.aliases)}", highlight=False, soft_wrap=True)


def gpu_table(gpus: Sequence[GpuTarget]) -> Table:
    """One row a GPU, peaks dense; on a narrow terminal the texts wrap and no figure is cut."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption=_CAPTION)
    table.caption_justify = "left"
    table.add_column("key", no_wrap=True)
    table.add_column("name")
    table.add_column("SM", no_wrap=True)
    for heading in ("GB", "GB/s", "FP16\nTFLOP/s", "INT8\nTOP/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("TensorRT\n-RTX")
    table.add_column("full\nTensorRT")
    for gpu in gpus:
        figures = (gpu.memory_gb, gpu.memory_bandwidth_gb_per_s, gpu.fp16_tflops, gpu.int8_tops)
        support = gpu.rtx_support
        table.add_row(
            gpu.key,
            gpu.name,
            gpu.sm.removeprefix("SM"),
            *(f"{figure:g}" for figure in figures),
            f"[{_RTX_STYLE[support]}]{support.value}[/]",
            "the only way" if support is RtxSupport.IMPOSSIBLE else "yes",
        )
    return table
