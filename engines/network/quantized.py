"""What an ONNX manifest says of its quantized linears → proof that the parsed network holds them so.

A weight that reaches TensorRT as float16, or is dequantized for two users, builds without a word into an
engine that is larger, slower or less accurate than its name says. So each matrix product is followed back
to the constant it multiplies with, and each quantized constant forward to its one product.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from mistral_trt.contract import QUANTIZED
from mistral_trt.errors import BuildError, ManifestError
from mistral_trt.manifest import Manifest
from mistral_trt.tensorrt_names import TRT_DTYPES

_CODES = ("int8", "int4", "float8_e4m3fn")
"""Dtypes that codes may have."""

_EMBEDDINGS = ("lm_head.weight", "model.embed_tokens.weight")
"""Weights that need not be listed as kept to be multiplied with in the cache dtype."""

_PASSING = ("SHUFFLE", "CAST")  # layers behind which a constant is still the same weight
_LEFT_OUT = ("sensitivity", "frontier")  # as long as the model has linears, and of use to the export alone


@dataclass(frozen=True)
class Quantization:
    """The quantized linears of a graph.

    weights, activations: ONNX dtype of the codes; activations None where the inputs stay float16.
    block_size: input features that share a scale, or None.  quantized, kept: names of the linears' weights.
    quantized_bytes: of codes and scales.
    """

    weights: str
    activations: str | None
    block_size: int | None
    quantized: tuple[str, ...]
    kept: tuple[str, ...]
    quantized_bytes: int

    def scales(self, rows: int, columns: int) -> int:
        """How many scales a linear of [rows, columns] = [in, out] has."""
        if self.block_size is not None:
            return rows // self.block_size * columns
        return 1 if self.weights == "float8_e4m3fn" else columns


@dataclass
class Wiring:
    """A network's layers, and who makes and who reads each tensor, by its name.

    readers: tensor → (layer, index of its input) of each use.
    """

    layers: list[Any] = field(default_factory=list)
    makers: dict[str, Any] = field(default_factory=dict)
    readers: dict[str, list[tuple[Any, int]]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, network: Any) -> "Wiring":
        wiring = cls([network.get_layer(i) for i in range(network.num_layers)])
        for layer in wiring.layers:
            for i in range(layer.num_inputs):
                if layer.get_input(i) is not None:
                    wiring.readers[layer.get_input(i).name].append((layer, i))
            for i in range(layer.num_outputs):
                wiring.makers[layer.get_output(i).name] = layer
        return wiring

    def of_type(self, name: str) -> list[Any]:
        return [layer for layer in self.layers if layer.type.name == name]

    def maker(self, tensor: Any, *passing: str) -> Any:
        """The layer a tensor comes from, seen through layers of the types `passing`; None for an input."""
        layer = self.makers.get(tensor.name)
        while layer is not None and layer.type.name in passing:
            layer = self.makers.get(layer.get_input(0).name)
        return layer

    def only_reader(self, layer: Any, what: str) -> tuple[Any, int]:
        """The one use of a layer's result, past layers that only shape it. Raises BuildError."""
        while True:
            readers = self.readers[layer.get_output(0).name]
            if len(readers) != 1:
                raise BuildError(f"{what}: expected one use of {layer.name!r}, found {len(readers)}")
            if readers[0][0].type.name != "SHUFFLE":
                return readers[0]
            layer = readers[0][0]


def read_quantization(source: Manifest) -> Quantization | None:
    """The manifest's `quantization`; None for a precision without one. Raises ManifestError."""
    precision, found = source.contract.precision, source.details.get("quantization")
    if precision not in QUANTIZED:
        return None
    if found is None:
        raise ManifestError(
            f"the ONNX manifest has no 'quantization' in its details, and its precision is {precision}; "
            "export the checkpoint again"
        )
    try:
        scheme = found["scheme"]
        named = scheme["precision"]
        quantization = Quantization(
            scheme["weights"],
            scheme["activations"],
            scheme["block_size"],
            tuple(found["quantized"]),
            tuple(found["kept"]),
            found["quantized_bytes"],
        )
    except (KeyError, TypeError) as error:
        raise ManifestError(
            f"the 'quantization' of the ONNX manifest cannot be read ({type(error).__name__}: {error}); "
            "export the checkpoint again"
        ) from error
    known = quantization.weights in _CODES and quantization.activations in (None, *_CODES)
    if named != precision or not known or not quantization.quantized:
        raise ManifestError(
            f"the 'quantization' of the ONNX manifest must be of {precision} with quantized linears, found "
            f"{scheme} with {len(quantization.quantized)}; export the checkpoint again"
        )
    return quantization


def carried(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """What the engine's manifest repeats of it."""
    return {name: value for name, value in quantization.items() if name not in _LEFT_OUT}


def audit_quantized(network: Any, quantization: Quantization) -> None:
    """Raise BuildError unless exactly the linears that are said to be quantized are, and as it is said."""
    wiring = Wiring.of(network)
    constants = {layer.name: layer for layer in wiring.of_type("CONSTANT")}
    products = set()
    for name in quantization.quantized:
        if name not in constants:
            raise BuildError(f"{name}: expected its quantized weight in the network, found none")
        product = _product_of(wiring, name, constants[name], quantization)
        _audit_input(wiring, name, product, quantization.activations)
        products.add(product.get_output(0).name)
    for product in wiring.of_type("MATRIX_MULTIPLY"):
        if product.get_output(0).name not in products:
            _audit_kept(wiring, product, quantization)


def _product_of(wiring: Wiring, name: str, constant: Any, quantization: Quantization) -> Any:
    """The matrix product that a quantized weight is for."""
    codes, found = TRT_DTYPES[quantization.weights], constant.get_output(0).dtype.name
    if found != codes:
        raise BuildError(f"{name}: expected {codes} codes in the network, found {found}")
    dequantize, index = wiring.only_reader(constant, name)
    if (dequantize.type.name, index) != ("DEQUANTIZE", 0):
        raise BuildError(f"{name}: expected its codes to be dequantized, found {dequantize.type.name}")
    product, index = wiring.only_reader(dequantize, name)
    if (product.type.name, index) != ("MATRIX_MULTIPLY", 1):
        raise BuildError(f"{name}: expected it to be multiplied with, found {product.type.name}")
    elements, columns = prod(constant.get_output(0).shape), product.get_output(0).shape[-1]
    scales = prod(dequantize.get_input(1).shape)
    if scales != quantization.scales(elements // columns, columns):
        raise BuildError(
            f"{name}: expected {quantization.scales(elements // columns, columns)} scales for "
            f"[{elements // columns}, {columns}] codes, found {scales}"
        )
    return product


def _audit_input(wiring: Wiring, name: str, product: Any, activations: str | None) -> None:
    """The other operand is quantized, to `activations`, or it is not."""
    expected = "float" if activations is None else TRT_DTYPES[activations]
    found = "float"
    dequantize = wiring.maker(product.get_input(0), "SHUFFLE")
    if dequantize is not None and dequantize.type.name == "DEQUANTIZE":
        quantize = wiring.maker(dequantize.get_input(0), "SHUFFLE")
        made = quantize is not None and quantize.type.name == "QUANTIZE"
        found = quantize.get_output(0).dtype.name if made else "codes that no QUANTIZE makes"
    if found != expected:
        raise BuildError(f"{name}: expected its input as {expected}, found {found}")


def _audit_kept(wiring: Wiring, product: Any, quantization: Quantization) -> None:
    """A product that is not of a quantized weight is of one that was kept."""
    weight = wiring.maker(product.get_input(1), *_PASSING)
    if weight is None or weight.type.name != "CONSTANT":
        found = "an input" if weight is None else weight.type.name
        raise BuildError(f"{product.name}: expected a product with a weight, found one with {found}")
    if weight.name not in (*quantization.kept, *_EMBEDDINGS):
        raise BuildError(
            f"{product.name}: {weight.name} is multiplied with as {weight.get_output(0).dtype.name}, and it "
            "is not among the linears that stay float16"
        )
