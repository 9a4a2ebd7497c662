"""A checkpoint → the same with fewer layers, or with noise on its linears, as a folder of its own."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistral_trt.export.quantization.scheme import KINDS

GRID_BLOCK = 32
GRID_STEPS = 15
"""The demo model's weights were stored as Q4_1: in each block of 32, the smallest plus 0…15 equal steps."""

_LINEARS = tuple(f"{kind}.weight" for kind in KINDS)


def cut(source: Path, out: Path, layers: int) -> Path:
    """The checkpoint with its first layers alone."""
    tensors = {name: tensor for name, tensor in read(source).items() if layer_of(name) < layers}
    return write(source, out, tensors, num_hidden_layers=layers)


def noised(source: Path, out: Path, *, relative: float, seed: int = 0) -> Path:
    """The checkpoint in float32, its linears moved by `relative` times their row's root mean square."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in sorted(read(source).items()):
        exact = tensor.float()
        tensors[name] = disturbed(exact, relative, generator) if name.endswith(_LINEARS) else exact
    return write(source, out, tensors, dtype="float32")


def disturbed(weight: Tensor, relative: float, generator: torch.Generator) -> Tensor:
    """weight: float32 [out, in].  Noise is normal, of one size in a row."""
    rms = weight.square().mean(1, keepdim=True).sqrt()
    return weight + relative * rms * torch.randn(weight.shape, generator=generator)


def grid_distance(original: Path, moved: Path) -> float:
    """Mean distance of the moved linears from the original's 4-bit grid, in steps.

    0 on the grid; 0.25 where a weight may lie anywhere between two steps.
    """
    before, after = read(original), read(moved)
    total, count = 0.0, 0
    for name in sorted(name for name in before if name.endswith(_LINEARS)):
        distances = steps_off_grid(before[name].float(), after[name].float())
        total, count = total + float(distances.sum()), count + distances.numel()
    return total / count


def steps_off_grid(original: Tensor, moved: Tensor) -> Tensor:
    """Distance of each weight from the nearest step of its block's grid, in steps.

    A block 0 … 15 of the original is the grid itself: 3.0 -> 0, 3.2 -> 0.2, 3.6 -> 0.4.
    """
    blocks, places = original.view(-1, GRID_BLOCK), moved.view(-1, GRID_BLOCK)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    steps = (places - low) / ((high - low) / GRID_STEPS).clamp(min=1e-12)
    return (steps - steps.round()).abs()


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def layer_of(name: str) -> int:
    """model.layers.3.mlp.up_proj.weight -> 3; what belongs to no layer -> -1"""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1


def write(source: Path, out: Path, tensors: dict[str, Tensor], **changed: int | str) -> Path:
    """A checkpoint folder with these tensors, the source's texts, and a changed config."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    for path in _texts(source):
        shutil.copyfile(path, out / path.name)
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **changed}, indent=2) + "\n")
    return out


def _texts(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model") and not path.name.endswith(".index.json"):
            yield path
