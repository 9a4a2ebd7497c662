"""What calibration found for each linear, and its file: one safetensors a layer, a few megabytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from mistral_trt.artifact import write_file

_SEPARATOR = "/"


@dataclass(frozen=True)
class LinearScales:
    """ModelOpt's result for one linear [out, in]; every tensor is float32.

    weight_amax: largest magnitude of the smoothed weight, [out, groups]; [1, 1] where the whole weight
    shares one.  input_amax: of the smoothed input, [], or None where the input stays as it is.
    pre_quant_scale: what the input is multiplied by before, and the weight divided by, [in], or None.
    own_scale: the pre_quant_scale before linears with the same input were given a common one, or None.
    output_amax: largest magnitude of the unquantized output, [out].
    error: [], root mean square error of the output over that of the output itself.
    """

    weight_amax: Tensor
    output_amax: Tensor
    error: Tensor
    input_amax: Tensor | None = None
    pre_quant_scale: Tensor | None = None
    own_scale: Tensor | None = None


def save_scales(path: Path, scales: Mapping[str, LinearScales]) -> None:
    """Write the scales of some linears, whole or not at all."""
    tensors = {
        f"{name}{_SEPARATOR}{field}": value.contiguous()
        for name, found in scales.items()
        for field, value in vars(found).items()
        if value is not None
    }
    write_file(path, save(tensors))


def load_scales(path: Path) -> dict[str, LinearScales]:
    """The inverse of `save_scales`."""
    fields: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        name, field = key.split(_SEPARATOR)
        fields.setdefault(name, {})[field] = tensor
    return {name: LinearScales(**found) for name, found in fields.items()}


def smoothed(weight: Tensor, scales: LinearScales) -> Tensor:
    """The weight that is quantized: [out, in] float32, divided by the pre_quant_scale.

    In ModelOpt's order of operations, so that the codes are its codes to the last bit.
    """
    own = scales.pre_quant_scale if scales.own_scale is None else scales.own_scale
    if own is None or scales.pre_quant_scale is None:
        return weight
    weight = weight * (1.0 / own)
    if torch.equal(own, scales.pre_quant_scale):
        return weight
    return weight * own / scales.pre_quant_scale
