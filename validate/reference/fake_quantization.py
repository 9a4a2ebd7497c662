"""Quantized artifact → what makes a layer of Hugging Face's Mistral round as it does.

The codes come from the checkpoint's weights, the scales from the artifact; rounding is NVIDIA ModelOpt's own.
So a layer that was altered computes what the artifact was meant to compute, without its graph and its codes.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mistral_trt.contract import GraphContract
from mistral_trt.errors import require
from mistral_trt.export.quantization.scheme import KINDS, quiet_modelopt
from mistral_trt.manifest import read_manifest
from mistral_trt.validate.reference.input_log import InputLog, range_used
from mistral_trt.validate.reference.own_precision import Alter, AlterHead
from mistral_trt.validate.weights.graph import CODES, WeightGraph
from mistral_trt.validate.weights.linear import FINAL_NORM, HEAD, UP, Factor, Folds, StoredLinear, read_linear

Saw = Callable[[Tensor], None]
"""Told of an input that is rounded: of each position the share of the step's range that it uses."""

_BITS = {127.0: 8, 7.0: 4}
_NORMS = ("input_layernorm", "post_attention_layernorm")


class FakeQuantizedLinear(nn.Module):
    """A linear whose weight, and input where the artifact says so, are rounded to codes and back.

    The product is in float32 where inputs have codes, else in the dtype of the input: as in the graph.
    """

    def __init__(
        self,
        weight: Tensor,
        linear: StoredLinear,
        *,
        reads: Factor | None,
        gives: Factor | None,
        saw: Saw = lambda used: None,
    ) -> None:
        """weight: the checkpoint's, [out, in].  reads, gives: what the artifact's input and output are
        multiplied by; here the input is, too.  saw: see `Saw`."""
        super().__init__()
        step, dtype = linear.input_scale, weight.dtype
        self.reads = None if reads is None else reads.values.nan_to_num(1.0)
        self.weight = _rounded_weight(weight.float(), linear, reads, gives)
        self.weight = self.weight if step else self.weight.to(dtype)
        self.bound, self.held, self.saw = linear.bound, linear.bound * (step or 0.0), saw
        self.input_amax = None if step is None else torch.full((1, 1), step) * linear.bound

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in], float16 or float32."""
        return nn.functional.linear(self.entering(x), self.weight).to(x.dtype)

    def entering(self, x: Tensor) -> Tensor:
        """What the weight is multiplied with: the same, scaled and rounded; float32 where it has codes."""
        scaled = x.float() if self.reads is None else x.float() * self.reads
        if self.input_amax is None:
            return scaled.to(x.dtype)
        self.saw(range_used(scaled, self.held))
        return _round(scaled, self.input_amax, self.bound)


def fake_quantized(folder: Path, contract: GraphContract, inputs: InputLog | None = None) -> Alter:
    """A function that replaces, in a MistralDecoderLayer, each linear that the artifact has quantized.

    inputs: is told of all that they round, while the layer runs.
    It takes the layer, with the checkpoint's weights as floats, and its index, and gives the same layer back.
    It raises ValidationError where the artifact's scales are none.  Raises ManifestError for a folder that is
    no ONNX artifact, MissingDependencyError without ModelOpt.
    """
    graph, folds = _open(folder, contract)

    def alter(layer: nn.Module, index: int) -> nn.Module:
        prefix = f"model.layers.{index}."
        for norm in _NORMS:
            _take_norm(folds, prefix + norm, layer.get_submodule(norm))
        for kind in KINDS:
            if graph.dtype(f"{prefix}{kind}.weight") in CODES:
                parent, _, child = kind.rpartition(".")
                old: Any = layer.get_submodule(kind)
                new = _fake_quantized(graph, folds, prefix + kind, old.weight.detach(), inputs)
                setattr(layer.get_submodule(parent), child, new)
        return layer

    return alter


def fake_quantized_head(folder: Path, contract: GraphContract, inputs: InputLog | None = None) -> AlterHead:
    """The same for the lm_head and the norm before it; a head that is not quantized is given back as it is.

    Raises as `fake_quantized` does.
    """
    graph, folds = _open(folder, contract)

    def alter(head: nn.Linear, norm: nn.Module) -> nn.Module:
        if graph.linear(HEAD).scale is None:
            return head
        _take_norm(folds, FINAL_NORM, norm)
        return _fake_quantized(graph, folds, HEAD, head.weight.detach(), inputs)

    return alter


def _open(folder: Path, contract: GraphContract) -> tuple[WeightGraph, Folds]:
    with quiet_modelopt():
        require("modelopt", "quantize")
    manifest, graph = read_manifest(folder, "onnx", check_files=None), WeightGraph(folder)
    imported = "imported_from" in (manifest.details.get("quantization") or {})
    return graph, Folds(graph, precision=contract.precision, imported=imported)


def _take_norm(folds: Folds, name: str, norm: Any) -> None:
    if folds.may_be_in(name):
        folds.take_norm(name, norm.weight.detach())


def _fake_quantized(
    graph: WeightGraph, folds: Folds, module: str, weight: Tensor, inputs: InputLog | None
) -> FakeQuantizedLinear:
    linear = read_linear(graph, module)
    if module.endswith(UP):
        folds.take_up(module, linear, weight.float())
    reads, gives = folds.of_input(module), folds.of_output(module)
    saw = partial((inputs or InputLog()).add, module)
    return FakeQuantizedLinear(weight, linear, reads=reads, gives=gives, saw=saw)


def _rounded_weight(
    weight: Tensor, linear: StoredLinear, reads: Factor | None, gives: Factor | None
) -> Tensor:
    """The weight that the artifact's linear should have: float32 [out, in], its output not multiplied.

    Where two codes are equally near, up to what float16 rounded in the scales, the artifact's own is taken:
    which of them calibration had to choose cannot be told any more.
    """
    scale = linear.scale if gives is None else linear.scale / gives.values[:, None]
    smoothed = weight if reads is None else weight / reads.values.nan_to_num(1.0)
    rounded = _round(smoothed, scale * linear.bound, linear.bound)
    stored = (linear.codes.float().view(*scale.shape, -1) * scale[:, :, None]).view(weight.shape)
    drift = linear.drift(reads, gives) * stored.abs()
    tied = (stored - smoothed).abs() <= (rounded - smoothed).abs() + drift
    return torch.where(tied, stored, rounded)


def _round(numbers: Tensor, amax: Tensor, bound: float) -> Tensor:
    """Numbers to their codes and back, by ModelOpt: float32 [..., in].

    amax: what the last code stands for, [rows or 1, groups].
    """
    with quiet_modelopt():
        from modelopt.torch.quantization.tensor_quant import fake_tensor_quant, scaled_e4m3
    if bound not in _BITS:  # E4M3: one scale for all
        rounded: Tensor = scaled_e4m3(numbers, amax.reshape(-1)[0], None, 4, 3)
        return rounded
    blocks = numbers.reshape(*numbers.shape[:-1], amax.shape[1], -1)
    rounded = fake_tensor_quant(blocks, amax[:, :, None], None, _BITS[bound], False, False)
    return rounded.reshape(numbers.shape)
