"""ModelOpt's activation codes + a layer's float32 twin → how far the twin is when it computes with them.

Two float32 kernels differ in the last bits, more where terms cancel. An activation that lies between two
codes then takes the one or the other, and two codes of E4M3 lie up to 12.5 % apart: a few such ties of a
hundred thousand are all that can be seen of a layer fed only its hidden state. Here each linear is given
ModelOpt's dequantized activations, and what enters its quantizer is compared with what entered ModelOpt's;
so every part of the layer is compared, and none inherits a tie from the part before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from quantization_layers import LayerGraph, relative_rms
from quantization_modelopt import quantized_linears
from torch import Tensor

_ACTIVATION = ".input/DequantizeLinear"
_SAME_CODE = 1e-3
"""Relative: neighbouring codes are further apart (INT8 0.8 %, E4M3 6 %), one code's roundings much nearer."""


@dataclass(frozen=True)
class Activation:
    """What enters a linear's quantizer in ModelOpt, and what leaves it: float32 [1, S, in] each."""

    entered: np.ndarray
    left: np.ndarray


@dataclass(frozen=True)
class CodedError:
    """worst: largest relative RMS error of a layer's update and of what enters its quantizers.

    flips: activation codes that differ from ModelOpt's, of `codes`.
    """

    worst: float
    flips: int
    codes: int


def activations(model: Any, ids: Sequence[int]) -> dict[str, Activation]:
    """Of every quantized linear over one text, by the linear's name."""
    found: dict[str, Activation] = {}
    linears = quantized_linears(model)

    def keep(name: str, quantizer: Any, entered: Tensor, left: Tensor) -> None:
        scale = quantizer.pre_quant_scale  # the graph has it in the layer before
        smoothed = entered if scale is None else entered * scale
        found[name] = Activation(smoothed.numpy().copy(), left.numpy().copy())

    handles = [
        linear.input_quantizer.register_forward_hook(
            lambda quantizer, args, left, name=name: keep(name, quantizer, args[0], left)
        )
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        model.model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def coded_error(
    twin: LayerGraph, passed: tuple[Tensor, Tensor], given: Mapping[str, Activation]
) -> CodedError:
    """passed: what entered and what left ModelOpt's layer.  given: the activations of its linears."""
    model = twin.model.clone()
    linears = feed_activations(model.graph)
    entered, left = (tensor.numpy() for tensor in passed)
    fed = [given[name].left for name in linears]
    out, *found = LayerGraph(model, twin.index).run(entered, fed)
    errors, flips = [relative_rms(out - entered, left - entered)], 0
    for name, before, after in zip(linears, found[::2], found[1::2], strict=True):
        errors.append(relative_rms(before, given[name].entered))
        flips += int((~np.isclose(after, given[name].left, rtol=_SAME_CODE, atol=0)).sum())
    return CodedError(max(errors), flips, sum(array.size for array in fed))


def feed_activations(graph: ir.Graph) -> list[str]:
    """Give each linear its dequantized activation as an input of the graph; return the linears.

    What enters the quantizer and what left it become outputs, in that order, linear by linear.
    """
    linears = []
    for node in list(graph):
        quantizer = (
            node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] else None
        )
        if quantizer is None:  # a weight's
            continue
        (own,) = node.outputs
        linears.append(str(node.name).removesuffix(_ACTIVATION))
        value = ir.Value(name=f"{linears[-1]}.given", shape=own.shape, type=own.type)
        for user, place in list(own.uses()):
            user.replace_input_with(place, value)
        graph.inputs.append(value)
        graph.outputs.extend([_named(graph, quantizer.inputs[0], f"{linears[-1]}.entered"), own])
    return linears


def _named(graph: ir.Graph, value: ir.Value | None, name: str) -> ir.Value:
    """The same value under a name of its own: linears that read one tensor make one output each of it."""
    assert value is not None
    node = ir.node("Identity", [value], name=name)
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, value.shape, value.type
    graph.append(node)
    return node.outputs[0]
