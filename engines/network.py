"""ONNX decode graph + contract → a parsed TensorRT network that is audited and ready to build.

TensorRT's importer drops what it does not know, so the file is held to the operators' exact form first, and
the parsed network to the contract after. No layer is trusted for its name: tensors are followed.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from mistral_trt.contract import QUANTIZED, GraphContract, TensorSpec
from mistral_trt.engines.callbacks import BuilderLog
from mistral_trt.engines.quantized import Quantization, audit_quantized
from mistral_trt.errors import BuildError

_QUERY, _KEY, _VALUE = 0, 1, 2  # inputs of IAttention; the mask has an accessor of its own

_NO_DRIVER = "(cudaError 35:"  # follows every error on a machine without a GPU

_TRT_DTYPES = {"int64": "INT64", "float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}

_OPERATOR_FORMS: dict[str, tuple[int, dict[str, tuple[Any, ...]]]] = {
    "Attention": (4, {"scale": (1.0,), "is_causal": (0,), "softcap": (0.0,), "qk_matmul_output_mode": (0,)}),
    "TensorScatter": (3, {"axis": (2, -2), "mode": (b"linear",)}),
}
"""Operator → number of inputs, and the values its attributes may have.

TensorRT ignores further inputs of Attention (nonpad_kv_seqlen, a past of its own) and builds without a word.
"""


@dataclass(frozen=True)
class ParsedNetwork:
    """A network with its builder, and the parser that owns the weights the network points to.

    layers: layer type → count, as parsed.
    """

    builder: Any
    parser: Any
    network: Any
    layers: Mapping[str, int]


def parse_network(
    trt: Any,
    path: Path,
    contract: GraphContract,
    logger: Any,
    log: BuilderLog,
    *,
    quantization: Quantization | None = None,
) -> ParsedNetwork:
    """Parse, check and audit the graph. Raises BuildError naming the node or tensor at fault."""
    check_operators(path)
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(path))
    errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
    if not parsed or errors or log.problems:
        said = errors or [one_line(problem) for problem in log.problems] or ["it gives no reason"]
        raise BuildError(f"TensorRT cannot read {path}: {said[0]}")
    layers = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    attend_ring_itself(trt, network, contract)
    audit(trt, network, contract)
    if quantization is not None:
        audit_quantized(network, quantization)
    if log.problems:
        raise BuildError(f"TensorRT reports an error in {path}: {one_line(log.problems[0])}")
    return ParsedNetwork(builder, parser, network, dict(sorted(layers.items())))


def check_operators(path: Path) -> None:
    """Raise BuildError if a node has an input or attribute that TensorRT would drop."""
    for node in onnx.load(path, load_external_data=False).graph.node:
        if node.op_type not in _OPERATOR_FORMS:
            continue
        inputs, forms = _OPERATOR_FORMS[node.op_type]
        used = [i for i, name in enumerate(node.input) if name]
        if used != list(range(inputs)):
            raise BuildError(
                f"{node.name}: {node.op_type} must have its first {inputs} inputs and no other, "
                f"found inputs {used}; TensorRT would ignore the rest"
            )
        for attribute in node.attribute:
            value = onnx.helper.get_attribute_value(attribute)
            if value not in forms.get(attribute.name, ()):
                raise BuildError(
                    f"{node.name}: {node.op_type} with {attribute.name} = {value!r} is not what this "
                    f"package builds; export the checkpoint again"
                )


def attend_ring_itself(trt: Any, network: Any, contract: GraphContract) -> None:
    """Let each Attention read the ring, not a product of the ring and 1.

    The importer multiplies query and key by sqrt(scale). With scale = 1 the compiler drops the product, but
    the plan then copies the whole key ring in every layer and step (seen in the builder's layer report).
    """
    producers = _producers(network)
    for attention, ring in zip(attentions(trt, network), contract.present()[0::2], strict=False):
        key = attention.get_input(_KEY)
        if key.name == ring.name:
            continue
        layer = producers.get(key.name)
        if layer is None or not _is_product(trt, layer) or layer.get_input(0).name != ring.name:
            raise BuildError(f"{attention.name}: expected the keys to be {ring.name!r}, found {key.name!r}")
        if not attention.set_input(_KEY, layer.get_input(0)):
            raise BuildError(f"{attention.name}: TensorRT does not take {ring.name!r} as keys")


def audit(trt: Any, network: Any, contract: GraphContract) -> None:
    """Raise BuildError unless tensors, ring writes and attentions of the network are the contract's."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    _audit_tensors("input", inputs, contract.inputs())
    _audit_tensors("output", outputs, contract.outputs())
    _audit_rings(trt, network, contract)
    _audit_attentions(trt, network, contract)


def add_profiles(builder: Any, config: Any, contract: GraphContract) -> None:
    """One optimization profile per entry of `profile_ranges`, in that order.

    Raises BuildError if TensorRT refuses one.
    """
    for name, ranges in profile_ranges(contract).items():
        profile = builder.create_optimization_profile()
        for spec in contract.inputs():
            profile.set_shape(spec.name, *(_shape(spec, sizes) for sizes in ranges))
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"TensorRT refuses the optimization profile {name!r} with {ranges}")


def profile_ranges(contract: GraphContract) -> dict[str, tuple[dict[str, int], ...]]:
    """`contract.profiles()`; with quantized weights there is room for a second row, used or not.

    TensorRT-RTX 1.7.1 stores codes once for each profile that lays them out in its own way (seen in its
    reports): INT8 and FP8 where each size of decode is fixed (in int8-weight-only it then also dequantizes
    every weight whole in every step), INT4 and FP8 where the batch of prefill is, because it then joins the
    linears that read one tensor.
    """
    found: dict[str, tuple[dict[str, int], ...]] = dict(contract.profiles())
    if contract.precision in QUANTIZED:
        found = {name: _with_two_rows(ranges) for name, ranges in found.items()}
    return found


def _with_two_rows(ranges: tuple[dict[str, int], ...]) -> tuple[dict[str, int], ...]:
    lowest, usual, most = ranges
    return lowest, usual, {**most, "B": max(2, most["B"])}


def attentions(trt: Any, network: Any) -> list[Any]:
    """The IAttention of each attention in the network, in the order of the layers."""
    found = []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings hand out the base class
            found.append(layer.attention)
    return found


def one_line(message: str) -> str:
    """A message of TensorRT without line breaks and, after an error, its remark on the missing driver."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return "; ".join([line for line in lines if _NO_DRIVER not in line] or lines)


def _parser_error(error: Any) -> str:
    node = error.node_name()
    where = f"node {node!r} ({error.node_operator()}): " if node else ""
    return where + one_line(error.desc())


def _audit_tensors(kind: str, tensors: list[Any], specs: list[TensorSpec]) -> None:
    found = [(t.name, t.dtype.name, tuple(t.shape)) for t in tensors]
    expected = [(s.name, _TRT_DTYPES[s.dtype], _open_shape(s)) for s in specs]
    for have, want in zip(found, expected, strict=False):
        if have != want:
            raise BuildError(f"network {kind}: expected {want}, found {have}")
    if len(found) != len(expected):
        beyond = sorted({name for name, _, _ in found} - {spec.name for spec in specs})
        raise BuildError(
            f"the network must have {len(expected)} {kind}s, found {len(found)}; "
            f"not in the contract: {beyond}"
        )


def _audit_rings(trt: Any, network: Any, contract: GraphContract) -> None:
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    found = [
        (layer.get_input(0).name, layer.get_output(0).name)
        for layer in layers
        if layer.type == trt.LayerType.KV_CACHE_UPDATE
    ]
    expected = [(a.name, b.name) for a, b in zip(contract.past(), contract.present(), strict=True)]
    for have, want in zip(sorted(found), sorted(expected), strict=False):
        if have != want:
            raise BuildError(f"ring write: expected {want[0]} -> {want[1]}, found {have[0]} -> {have[1]}")
    if len(found) != len(expected):
        raise BuildError(f"the network must write {len(expected)} rings, found {len(found)} writes")


def _audit_attentions(trt: Any, network: Any, contract: GraphContract) -> None:
    found = attentions(trt, network)
    layers = contract.config.num_hidden_layers
    if len(found) != layers:
        raise BuildError(f"the network must hold {layers} attentions, found {len(found)}")
    rings = contract.present()
    for attention, key, value in zip(found, rings[0::2], rings[1::2], strict=True):
        for index, ring in ((_KEY, key), (_VALUE, value)):
            name = attention.get_input(index).name
            if name != ring.name:
                raise BuildError(f"{attention.name}: expected to attend {ring.name}, found {name}")
        for wrong, what in _attention_faults(trt, attention):
            if wrong:
                raise BuildError(f"{attention.name}: {what}")


def _attention_faults(trt: Any, attention: Any) -> list[tuple[bool, str]]:
    return [
        (attention.decomposable, "may be decomposed, so nothing says it is fused"),
        (attention.mask is None, "has no mask, so it would attend to unwritten and expired slots"),
        (attention.causal_kind != trt.CausalMaskKind.NONE, "has a causal mask; slots are not in token order"),
        (attention.norm_op != trt.AttentionNormalizationOp.SOFTMAX, "does not normalise with a softmax"),
        (attention.key_value_lengths is not None, "has key_value_lengths, which TensorRT 11 gets wrong"),
        (attention.query_lengths is not None, "has query_lengths, but queries are not packed"),
    ]


def _producers(network: Any) -> dict[str, Any]:
    """Tensor name → the layer it comes from."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return {layer.get_output(j).name: layer for layer in layers for j in range(layer.num_outputs)}


def _is_product(trt: Any, layer: Any) -> bool:
    if layer.type != trt.LayerType.ELEMENTWISE:
        return False
    layer.__class__ = trt.IElementWiseLayer
    return bool(layer.op == trt.ElementWiseOperation.PROD)


def _shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)


def _open_shape(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(-1 if isinstance(dim, str) else dim for dim in spec.shape)
