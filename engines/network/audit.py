"""A parsed TensorRT network + contract → proof that it is the one exported, and a list of what was seen.

It is the last look before a build that needs no GPU. No layer is trusted for its name: tensors are followed.
"""

from dataclasses import dataclass
from typing import Any

from mistral_trt.contract import GraphContract, TensorSpec
from mistral_trt.engines.network.blame import blaming
from mistral_trt.engines.network.quantized import Quantization, Wiring, audit_quantized
from mistral_trt.errors import BuildError
from mistral_trt.tensorrt_names import TRT_DTYPES

_KEY, _VALUE = 1, 2  # inputs of IAttention; the mask has an accessor of its own

_PRODUCTS = ("MATRIX_MULTIPLY", "EINSUM", "CONVOLUTION", "DECONVOLUTION")
"""Types of layers that multiply matrices; Attention is looked at by itself."""


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.  checks: (what was looked at, what it is), in the order of the audit."""

    checks: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> list[dict[str, str]]:
        return [{"check": check, "found": found} for check, found in self.checks]


def audit(
    trt: Any, network: Any, contract: GraphContract, quantization: Quantization | None = None
) -> AuditReport:
    """Raise BuildError, naming module and node, unless the network is the contract's; say what it holds.

    Looked at: inputs, outputs, ring writes, attentions, float32 matrix products, quantized linears.
    """
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    with blaming():
        checks = [
            ("inputs", _audit_tensors("input", inputs, contract.inputs())),
            ("outputs", _audit_tensors("output", outputs, contract.outputs())),
            ("ring writes", _audit_rings(trt, network, contract)),
            ("attentions", _audit_attentions(trt, network, contract)),
        ]
        if quantization is not None:
            checks.append(("quantized", _audit_linears(network, quantization)))
        checks.append(("float32 products", audit_float32(network, contract)))
    return AuditReport(tuple(checks))


def audit_float32(network: Any, contract: GraphContract) -> str:
    """Raise BuildError if a matrix product is in float32 and is no quantized linear between its Casts.

    One that slipped through costs four times the time and is easily missed: the plan is as right as before.
    Norms and rotary angles are float32 too, and meant to be, but multiply no matrices.
    """
    wiring, cache = Wiring.of(network), TRT_DTYPES[contract.cache_dtype]
    if contract.cache_dtype == "float32":
        return "every one, as the network is in float32"
    islands = 0
    for product in [layer for layer in wiring.layers if layer.type.name in _PRODUCTS]:
        operands = [product.get_input(i) for i in range(product.num_inputs)]
        if all(operand.dtype.name != TRT_DTYPES["float32"] for operand in operands):
            continue
        fault = _island_fault(wiring, product, operands, cache)
        if fault:
            raise BuildError(
                f"{product.name}: {product.type.name} in FLOAT where the network is in {cache}, and {fault}; "
                "export the checkpoint again"
            )
        islands += 1
    return f"{islands}, each a quantized linear between Casts" if islands else "none"


def attentions(trt: Any, network: Any) -> list[Any]:
    """The IAttention of each attention in the network, in the order of the layers."""
    found = []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings hand out the base class
            found.append(layer.attention)
    return found


def _audit_tensors(kind: str, tensors: list[Any], specs: list[TensorSpec]) -> str:
    found = [(t.name, t.dtype.name, tuple(t.shape)) for t in tensors]
    expected = [(s.name, TRT_DTYPES[s.dtype], _open_shape(s)) for s in specs]
    for have, want in zip(found, expected, strict=False):
        if have != want:
            raise BuildError(f"network {kind}: expected {want}, found {have}")
    if len(found) != len(expected):
        beyond = sorted({name for name, _, _ in found} - {spec.name for spec in specs})
        raise BuildError(
            f"the network must have {len(expected)} {kind}s, found {len(found)}; "
            f"not in the contract: {beyond}"
        )
    return f"{len(found)}, as in the contract"


def _audit_rings(trt: Any, network: Any, contract: GraphContract) -> str:
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
    return f"{len(found)}, each from its past to its present"


def _audit_attentions(trt: Any, network: Any, contract: GraphContract) -> str:
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
        for wrong, what in attention_faults(trt, attention):
            if wrong:
                raise BuildError(f"{attention.name}: {what}")
    return f"{len(found)}, each over its own ring, none decomposable"


def attention_faults(trt: Any, attention: Any) -> list[tuple[bool, str]]:
    """Each thing that may be wrong with an attention: whether it is, and what to say of it."""
    return [
        (attention.decomposable, "may be decomposed, so nothing says it is fused"),
        (attention.mask is None, "has no mask, so it would attend to unwritten and expired slots"),
        (attention.causal_kind != trt.CausalMaskKind.NONE, "has a causal mask; slots are not in token order"),
        (attention.norm_op != trt.AttentionNormalizationOp.SOFTMAX, "does not normalise with a softmax"),
        (attention.key_value_lengths is not None, "has key_value_lengths, which TensorRT 11 gets wrong"),
        (attention.query_lengths is not None, "has query_lengths, but queries are not packed"),
    ]


def _audit_linears(network: Any, quantization: Quantization) -> str:
    audit_quantized(network, quantization)
    products = sum(network.get_layer(i).type.name == "MATRIX_MULTIPLY" for i in range(network.num_layers))
    inputs = quantization.activations or "float16"
    kept = products - len(quantization.quantized)
    return f"{len(quantization.quantized)} linears in {quantization.weights}, inputs {inputs}; {kept} not"


def _island_fault(wiring: Wiring, product: Any, operands: list[Any], cache: str) -> str | None:
    """Why a float32 product is not of dequantized codes with a Cast behind it; None if it is."""
    for operand in operands:
        maker = wiring.maker(operand, "SHUFFLE")
        if maker is None or maker.type.name != "DEQUANTIZE":
            return f"{operand.name!r} is not dequantized codes"
    readers = [layer for layer, _ in wiring.readers[product.get_output(0).name]]
    back = [layer.type.name == "CAST" and layer.get_output(0).dtype.name == cache for layer in readers]
    return None if back and all(back) else f"its result is not cast back to {cache}"


def _open_shape(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(-1 if isinstance(dim, str) else dim for dim in spec.shape)
