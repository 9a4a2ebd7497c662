"""ONNX decode graph + contract → a parsed TensorRT network that is audited and ready to build.

TensorRT's importer drops what it does not know, so the file is held to the operators' exact form first, and
the parsed network to the contract after (`audit`).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from mistral_trt.contract import QUANTIZED, GraphContract, TensorSpec
from mistral_trt.engines.build_log import BuilderLog
from mistral_trt.engines.network.audit import AuditReport, attentions, audit
from mistral_trt.engines.network.blame import blame, blaming
from mistral_trt.engines.network.graph_file import load_graph
from mistral_trt.engines.network.quantized import Quantization
from mistral_trt.errors import BuildError

_KEY = 1  # an input of IAttention

_NO_DRIVER = "(cudaError 35:"  # follows every error on a machine without a GPU

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

    layers: layer type → count, as parsed.  audit: what was looked at, and found to be the contract's.
    """

    builder: Any
    parser: Any
    network: Any
    layers: Mapping[str, int]
    audit: AuditReport = field(default_factory=AuditReport)


def parse_network(
    trt: Any,
    path: Path,
    contract: GraphContract,
    logger: Any,
    log: BuilderLog,
    *,
    quantization: Quantization | None = None,
) -> ParsedNetwork:
    """Parse, check and audit the graph. Raises BuildError naming the node at fault and its module."""
    with blaming():
        check_operators(path)
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(path))
    errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
    if not parsed or errors or log.problems:
        said = errors or [blame(one_line(problem)) for problem in log.problems] or ["it gives no reason"]
        raise BuildError(f"TensorRT cannot read {path}: {said[0]}")
    layers = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    with blaming():
        attend_ring_itself(trt, network, contract)
    report = audit(trt, network, contract, quantization)
    if log.problems:
        raise BuildError(f"TensorRT reports an error in {path}: {blame(one_line(log.problems[0]))}")
    return ParsedNetwork(builder, parser, network, dict(sorted(layers.items())), report)


def check_operators(path: Path) -> None:
    """Raise BuildError if a node has an input or attribute that TensorRT would drop."""
    for node in load_graph(path).node:
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


def one_line(message: str) -> str:
    """A message of TensorRT without line breaks and, after an error, its remark on the missing driver."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return "; ".join([line for line in lines if _NO_DRIVER not in line] or lines)


def _parser_error(error: Any) -> str:
    node, said = error.node_name(), one_line(error.desc())
    return blame(f"{node}: {error.node_operator()}: {said}") if node else blame(said)


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
