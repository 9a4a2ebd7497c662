"""Graph + contract → what is wrong with it before any weight is read: who reads what, forms, constants."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from onnx import NodeProto, TensorProto

from mistral_trt.contract import GraphContract
from mistral_trt.errors import ValidationError
from mistral_trt.export.checkpoint import EMBEDDING, LM_HEAD
from mistral_trt.export.quantization.scheme import KINDS, Scheme
from mistral_trt.validate.weights.graph import GraphLinear, WeightGraph, attribute
from mistral_trt.validate.weights.linear import FINAL_NORM, HEAD, input_step, norm_of, readers_of

Wrong = dict[str, str]
"""Tensor → what is wrong with it, in a sentence."""

_POWER_ROUNDING = 2e-6  # of theta ** (2 i / D) in float32


def modules_of(layers: int) -> Iterator[str]:
    """Every module with a weight, in the order of the forward pass."""
    yield EMBEDDING.removesuffix(".weight")
    for i in range(layers):
        layer = f"model.layers.{i}."
        yield from (f"{layer}input_layernorm", *(layer + kind for kind in KINDS[:4]))
        yield from (f"{layer}post_attention_layernorm", *(layer + kind for kind in KINDS[4:]))
    yield from (FINAL_NORM, HEAD)


def wrong_wiring(
    graph: WeightGraph, contract: GraphContract, scheme: Scheme | None, quantized: frozenset[str]
) -> Wrong:
    """Modules that do not compute with their own weight on their own input, in the form the precision says.

    scheme: None where nothing is quantized.  quantized: names of the weights that the manifest calls so.
    """
    wrong: Wrong = {}
    for module in modules_of(contract.config.num_hidden_layers):
        name = f"{module}.weight"
        try:
            if name == EMBEDDING:
                _require(graph, f"{module}/Gather", 0, name)
            elif norm_of(module) is None and module.endswith("norm"):
                _check_norm(graph, module, contract.config.rms_norm_eps)
            else:
                _check_linear(graph, module, contract, scheme, quantized=name in quantized)
        except ValidationError as error:
            wrong[name] = str(error)
    return wrong


def _require(graph: WeightGraph, node: str, place: int, name: str) -> NodeProto:
    found = graph.node(node)
    if graph.reads(found, place) != name:
        raise ValidationError(f"{node} computes with {found.input[place]}; expected {name}")
    return found


def _check_norm(graph: WeightGraph, module: str, eps: float) -> None:
    node = _require(graph, f"{module}/RMSNormalization", 1, f"{module}.weight")
    found = attribute(node, "epsilon", 1e-5)
    if np.float32(found) != np.float32(eps):
        raise ValidationError(f"{node.name} has epsilon {found:g}; config.json has rms_norm_eps {eps:g}")


def _check_linear(
    graph: WeightGraph, module: str, contract: GraphContract, scheme: Scheme | None, *, quantized: bool
) -> None:
    name, found = f"{module}.weight", graph.linear(module)
    if quantized != (found.scale is not None):
        words = ("float", "quantized")
        raise ValidationError(f"is {words[not quantized]} in the graph; the manifest says {words[quantized]}")
    tied = name == LM_HEAD and contract.config.tie_word_embeddings and not quantized
    if found.weight != (EMBEDDING if tied else name):
        raise ValidationError(
            f"{module}/MatMul computes with {found.weight}; expected {EMBEDDING if tied else name}"
        )
    norm, reads = norm_of(module), found.reads
    if module == HEAD and reads in graph.nodes:  # past the choice of the tokens that get logits
        gathered = graph.makers.get(graph.reads(graph.node(reads), 0))
        reads = "" if gathered is None else gathered.name
    if norm is not None and reads != f"{norm}/RMSNormalization":
        raise ValidationError(f"{module}/MatMul reads what {reads or 'no node'} makes; expected {norm}")
    if scheme is not None and found.scale is not None:
        _check_form(graph, found, scheme)
        _check_shared(graph, module, found)
    elif found.pre_quant_scale or found.input_scale:
        raise ValidationError("is float, but its input is multiplied or quantized")


def _check_form(graph: WeightGraph, linear: GraphLinear, scheme: Scheme) -> None:
    """dtypes, and a scale for each channel, block or weight."""
    assert linear.scale is not None
    found, (columns, rows) = graph.dtype(linear.weight), graph.shape(linear.weight)
    if found != scheme.weights:
        raise ValidationError(f"holds {found}; {scheme.precision} has codes of {scheme.weights}")
    expected: tuple[int, ...] = (rows,) if scheme.weights != "float8_e4m3fn" else ()
    if scheme.block_size is not None:
        expected = (columns // scheme.block_size, rows)
    if graph.shape(linear.scale) != expected:
        raise ValidationError(
            f"has scales of shape {list(graph.shape(linear.scale))}; {scheme.precision} asks for "
            f"{list(expected)} with [{columns}, {rows}] codes"
        )
    if (linear.input_scale is None) != (scheme.activations is None):
        words = "no input_scale" if linear.input_scale is None else "an input_scale"
        raise ValidationError(f"has {words}; {scheme.precision} is not so")


def _check_shared(graph: WeightGraph, module: str, linear: GraphLinear) -> None:
    """Linears that read one tensor multiply and round it alike."""
    norm = norm_of(module)
    first = graph.linear(readers_of(norm)[0]) if norm else linear
    if first.scale is None or first is linear:
        return
    if linear.pre_quant_scale != first.pre_quant_scale:
        raise ValidationError(
            f"multiplies its input by {linear.pre_quant_scale}, {readers_of(str(norm))[0]} by "
            f"{first.pre_quant_scale}; expected one scale for one input"
        )
    if linear.input_scale and first.input_scale:
        own, other = (input_step(graph, name) for name in (linear.input_scale, first.input_scale))
        if own != other:
            raise ValidationError(
                f"rounds its input in steps of {own:.6g}, {readers_of(str(norm))[0]} in steps of "
                f"{other:.6g}; expected one step for one input"
            )


def wrong_initializers(graph: WeightGraph, layers: int, *, rotary: str | None) -> Wrong:
    """Numbers that are of no module, nor of the graph's own constants.

    rotary: name of the rotary frequencies.
    """
    known = {EMBEDDING, rotary}
    for module in modules_of(layers):
        known.add(f"{module}.weight")
        if f"{module}/MatMul" in graph.nodes:
            known.update(_initializers(graph, module))
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return {
        name: "belongs to no weight of the checkpoint"
        for name, tensor in graph.initializers.items()
        if name not in known and (graph.external(name) or (tensor.data_type in floats and tensor.dims))
    }


def _initializers(graph: WeightGraph, module: str) -> list[str]:
    try:
        return graph.linear(module).initializers
    except ValidationError:  # said of the module itself
        return []


def rotary_frequencies(graph: WeightGraph) -> str | None:
    """The initializer that positions are multiplied by before their cosine is taken."""
    for node in graph.graph.node:
        if node.op_type == "Cos" and node.input:
            maker = graph.makers.get(node.input[0])
            return next((name for name in maker.input if name in graph.initializers), None) if maker else None
    return None


def wrong_constants(graph: WeightGraph, contract: GraphContract) -> Wrong:
    """Constants of the graph that are not those of config.json and of the ring."""
    config, ring = contract.config, contract.ring
    wrong = _wrong_frequencies(graph, contract)
    scalars = {
        "model/Mod": (1, ring.capacity, "R"),
        "model/Mod_1": (1, ring.capacity, "R"),
        "model/Sub_2": (1, ring.sliding_window, "W"),
    }
    scalars |= {
        f"model.layers.{i}.self_attn/Mul": (1, config.head_dim**-0.5, "head_dim ** -0.5")
        for i in range(config.num_hidden_layers)
    }
    for node, (place, value, words) in scalars.items():
        said = _wrong_scalar(graph, node, place, value, words)
        wrong |= {node: said} if said else {}
    return wrong


def _wrong_frequencies(graph: WeightGraph, contract: GraphContract) -> Wrong:
    config, name = contract.config, rotary_frequencies(graph)
    powers = np.arange(0, config.head_dim, 2) / config.head_dim
    expected = 1.0 / np.float64(config.rope_theta) ** powers
    try:
        found = np.zeros(0) if name is None else graph.numbers(name).double().numpy()
    except ValidationError as error:
        return {name or "rotary frequencies": str(error)}
    if found.shape == expected.shape and (np.abs(found / expected - 1) <= _POWER_ROUNDING).all():
        return {}
    return {name or "rotary frequencies": f"are not those of rope_theta {config.rope_theta:g}"}


def _wrong_scalar(graph: WeightGraph, node: str, place: int, value: float, words: str) -> str | None:
    try:
        found = graph.numbers(graph.reads(graph.node(node), place))
    except ValidationError:
        return f"is not there with a constant; expected {words} = {value:g}"
    if found.numel() == 1 and torch.equal(found.reshape(()), torch.tensor(value, dtype=found.dtype)):
        return None
    return f"computes with {found.flatten().tolist()[:3]}; expected {words} = {value:g}"


def quantized_names(details: Mapping[str, Any] | None) -> frozenset[str]:
    """What the manifest's `quantization` calls quantized."""
    return frozenset((details or {}).get("quantized", ()))
